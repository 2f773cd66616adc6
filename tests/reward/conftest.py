"""A trainer on a tiny reward model, and its options."""

import copy

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaForSequenceClassification

from hf_rlhf_ext.reward.config import BradleyTerryConfig
from hf_rlhf_ext.reward.trainer import BradleyTerryTrainer


@pytest.fixture
def seqcls(tiny_config):
    """A random two-layer reward model in fp32, always with the same weights."""
    tiny_config.num_labels = 1
    torch.manual_seed(0)
    return LlamaForSequenceClassification(tiny_config)


@pytest.fixture
def make_trainer(seqcls, chat_tokenizer, tmp_path):
    pristine = copy.deepcopy(seqcls)
    first = True

    def make(train, *, model=None, peft="lora", folder="out", **options):
        nonlocal first
        if model is None:
            # The second trainer gets a base of its own: the first one has put its adapter into `seqcls`.
            model = seqcls if first else copy.deepcopy(pristine)
            first = False
        names = ("eval_dataset", "normalization_dataset", "compute_metrics", "callbacks", "optimizers")
        arguments = {name: options.pop(name) for name in names if name in options}
        defaults = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none"}
        defaults |= {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "seed": 3, "disable_tqdm": True}
        args = BradleyTerryConfig(output_dir=str(tmp_path / folder), **(defaults | options))
        config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS") if peft == "lora" else peft
        return BradleyTerryTrainer(model, args, train, processing_class=chat_tokenizer, peft_config=config, **arguments)

    return make
