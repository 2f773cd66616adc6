"""Sets up trainers that the engine of this run does not fit, and writes what they say: `refused_run.py FOLDER`.

The folder holds a model and its tokenizer. Each process writes `RANK.json`: the message by case. Where FSDP2 is on,
TRL's own RewardTrainer trains under it and under DDP, as a control of the engine: `fsdp2` and `ddp` hold its weights.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification
from trl import RewardConfig, RewardTrainer

from hf_rlhf_ext import BradleyTerryConfig, BradleyTerryTrainer, PPOConfig, PPOTrainer, UserError
from hf_rlhf_ext.training.engines import active_engine
from hf_rlhf_ext.training.sft_config import CheckedSFTConfig
from recipes.sft import train_sft

ON_CPU = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
PROMPTS = ["Tell me", "a sunny day", "fox", "words, many"]
PAIRS = Dataset.from_dict({"prompt": PROMPTS, "chosen": [" yes", " sun", " red", " few"], "rejected": [" no"] * 4})

folder = Path(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(folder)
lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def ppo(make_engine: Callable[[], object] = lambda: None, peft_config: LoraConfig | None = None, **options):
    args = PPOConfig(str(folder / "ppo"), **ON_CPU, stop_token_ids=[0], **options)
    make_engine()
    PPOTrainer(
        LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32),
        lambda completions, **kwargs: [1.0] * len(completions),
        args,
        Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def reward(make_engine: Callable[[], object] = lambda: None, **options):
    args = BradleyTerryConfig(str(folder / "reward"), **ON_CPU, **options)
    make_engine()
    model = LlamaForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    BradleyTerryTrainer(model, args, PAIRS, processing_class=tokenizer)


def fsdp1_of_user():
    """An accelerator that the user makes after the options."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=1, sync_module_states=False, cpu_ram_efficient_loading=False)
    Accelerator(cpu=True, fsdp_plugin=plugin)


def sft():
    """`hf-rlhf sft`, which trains with TRL's own trainer."""
    from hf_rlhf_ext.cli.options import DataArguments, ModelArguments

    rows = folder / f"demonstrations-{os.environ['RANK']}.jsonl"
    rows.write_text("".join(json.dumps({"prompt": prompt, "completion": " yes"}) + "\n" for prompt in PROMPTS))
    args = CheckedSFTConfig(str(folder / "sft"), **ON_CPU)
    train_sft(DataArguments(dataset_name=str(rows), eval_rows=0), ModelArguments(str(folder), dtype="float32"), args)


CASES = {
    # Where FSDP2 is on: what PPO cannot do with it, and another engine that the user turns on himself.
    "fsdp2": {
        "ppo, a whole model": ppo,
        "ppo, critic model": lambda: ppo(peft_config=lora, critic="model"),
        "ppo, accelerator of FSDP1": lambda: ppo(fsdp1_of_user, lora),
        "reward, accelerator of FSDP1": lambda: reward(fsdp1_of_user),
    },
    # Where it was asked for, and accelerate has not turned it on.
    "ddp": {"ppo": lambda: ppo(peft_config=lora, critic="head"), "reward": reward, "sft": sft},
}


def message_of(case: Callable[[], object]) -> str:
    try:
        case()
    except UserError as error:
        return str(error)
    return "nothing"


def train_with_trl(engine: str) -> None:
    os.environ["ACCELERATE_USE_FSDP"] = "true" if engine == "fsdp2" else "false"
    options = ON_CPU | {"per_device_train_batch_size": 1, "max_steps": 4, "learning_rate": 1e-2, "adam_epsilon": 1e-4}
    torch.manual_seed(0)  # the head is new
    trainer = RewardTrainer(
        LlamaForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32),
        RewardConfig(str(folder / engine), **options, activation_checkpointing=False, max_grad_norm=0.1, seed=3),
        train_dataset=PAIRS,
        processing_class=tokenizer,
    )
    assert active_engine(trainer.accelerator) == engine
    trainer.train()
    # Under FSDP, all processes take part in it.
    trainer.save_model(str(folder / engine))


def engine_here() -> str:
    """What accelerate makes of the settings of this run."""
    RewardConfig(str(folder / "any"), **ON_CPU)
    return active_engine(Accelerator(cpu=True))


if __name__ == "__main__":
    engine = engine_here()
    if engine == "fsdp2":
        train_with_trl("ddp")
        train_with_trl("fsdp2")
    messages = {name: message_of(case) for name, case in CASES[engine].items()}
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps({"engine": engine, "messages": messages}))
