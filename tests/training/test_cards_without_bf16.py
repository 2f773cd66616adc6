"""Cards without bf16, such as a T4, GTX 16 or RTX 20: what is fp16 there, and how 4-bit bases are trained in it."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, training_args
from trl import SFTConfig

from hf_rlhf_ext import BradleyTerryConfig, BradleyTerryTrainer, PPOConfig, PPOTrainer, load_base_model
from hf_rlhf_ext.cli import options, stage_options
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.sft import PublishingSFTTrainer
from hf_rlhf_ext.modeling import loading
from hf_rlhf_ext.modeling.loading import four_bit_config, resolve_dtype, warn_of_emulated_bf16
from hf_rlhf_ext.training import config_checks
from hf_rlhf_ext.training.sft_config import CheckedSFTConfig

COMMON = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "optim": "sgd"}
COMMON |= {"per_device_train_batch_size": 2, "max_steps": 2, "logging_steps": 1, "lr_scheduler_type": "constant"}
COMMON |= {"activation_checkpointing": False, "learning_rate": 0.1, "max_grad_norm": 0.0}
CONFIGS = [PPOConfig, BradleyTerryConfig, CheckedSFTConfig]


@pytest.fixture
def without_bf16(monkeypatch):
    """A card without bf16, as far as options and dtypes are chosen; tensors stay on the CPU."""
    for module in (loading, config_checks):
        monkeypatch.setattr(module, "card_lacks_bf16", lambda: True)
    for module in (loading, options):
        monkeypatch.setattr(module, "preferred_dtype", lambda: torch.float16)
    monkeypatch.setattr(training_args, "is_torch_bf16_gpu_available", lambda: True)  # PyTorch counts emulated bf16


def test_dtypes_and_options_are_fp16(without_bf16):
    assert resolve_dtype("auto") == torch.float16
    assert four_bit_config().bnb_4bit_compute_dtype == torch.float16
    defaults = options.machine_defaults()
    assert (defaults["bf16"], defaults["fp16"]) == (False, True)
    # A whole model is trained in fp32 weights, which a gradient scaler needs, and computed in fp16.
    whole = options.ModelArguments(use_peft=False)
    assert whole.base_options(PPOConfig("out", **COMMON))["dtype"] == "float32"
    asked = stage_options.trainer_options(options.ModelArguments(dtype="float16"))
    assert (asked["bf16"], asked["fp16"]) == (False, True)


def test_the_quickstart_trains_in_fp16(without_bf16, tmp_path):
    from hf_rlhf_ext.recipes.quickstart import Quickstart, QuickstartArguments

    common = Quickstart(QuickstartArguments(output_dir=str(tmp_path), gold="sentiment")).common("sft")
    assert (common["bf16"], common["fp16"]) == (False, True)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    "given, bf16, fp16",
    [({}, False, True), ({"bf16": True}, True, False), ({"bf16": False}, False, False), ({"fp16": True}, False, True)],
)
def test_the_default_of_the_configs_is_fp16(without_bf16, tmp_path, config, given, bf16, fp16):
    args = config(str(tmp_path), **(COMMON | {"use_cpu": False} | given))
    assert (args.bf16, args.fp16) == (bf16, fp16)


@pytest.mark.parametrize("config", CONFIGS)
def test_elsewhere_the_default_stays_bf16(tmp_path, config):
    args = config(str(tmp_path), **COMMON)
    assert args.bf16 and not args.fp16


def test_emulated_bf16_is_said(monkeypatch, caplog, tmp_path):
    args = PPOConfig(str(tmp_path), **COMMON)
    monkeypatch.setattr(PPOConfig, "device", torch.device("cuda"))
    for lacks_bf16 in (True, False):
        caplog.clear()
        monkeypatch.setattr(loading, "card_lacks_bf16", lambda lacks_bf16=lacks_bf16: lacks_bf16)
        warn_of_emulated_bf16(args)
        assert ("set fp16 to true" in caplog.text) == lacks_bf16


# ---- Training a 4-bit base in fp16 ----


@pytest.fixture
def base(tmp_path, chat_tokenizer) -> str:
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(chat_tokenizer), bos_token_id=None, **size)
    config.pad_token_id, config.eos_token_id = chat_tokenizer.pad_token_id, chat_tokenizer.eos_token_id
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def lora(task: str) -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", task_type=task)


def lengths(completions, **columns):
    return [float(len(text)) for text in completions]


def ppo(base, tokenizer, folder, **precision):
    options = COMMON | {"critic": "adapter", "max_completion_length": 4, "num_ppo_epochs": 2, "value_clip_range": None}
    prompts = Dataset.from_dict({"prompt": ["Tell me", "a sunny day"]})
    args = PPOConfig(str(folder / "ppo"), num_mini_batches=1, **options, **precision)
    model = load_base_model(base, load_in_4bit=True)
    return PPOTrainer(model, lengths, args, prompts, processing_class=tokenizer, peft_config=lora("CAUSAL_LM"))


def reward(base, tokenizer, folder, *, dtype="auto", **precision):
    pairs = {"prompt": ["Tell me", "fox"], "chosen": [" a day", " happy"], "rejected": [" sad", " no"]}
    args = BradleyTerryConfig(str(folder / "reward"), normalize_rewards=False, **COMMON, **precision)
    model = load_base_model(base, task="reward", load_in_4bit=True, dtype=dtype)
    rows = Dataset.from_dict(pairs)
    return BradleyTerryTrainer(model, args, rows, processing_class=tokenizer, peft_config=lora("SEQ_CLS"))


def sft(base, tokenizer, folder, *, dtype="auto", trained_before=False, **precision):
    args = SFTConfig(str(folder / "sft"), **COMMON, **precision)
    model = load_base_model(base, load_in_4bit=True, dtype=dtype)
    texts = Dataset.from_dict({"text": ["a sunny day in the garden", "the quick brown fox"]})
    adapter = {"peft_config": lora("CAUSAL_LM")}
    if trained_before:
        model, adapter = get_peft_model(model, lora("CAUSAL_LM")), {}
    return PublishingSFTTrainer(model, args=args, train_dataset=texts, processing_class=tokenizer, **adapter)


def scaled(trainer):
    """With the gradient scaler that Accelerate makes on a card in fp16, and not on a CPU."""
    trainer.accelerator.scaler, trainer.accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=1024.0), True
    return trainer


@pytest.mark.parametrize("make", [ppo, reward, sft], ids=lambda make: make.__name__)
def test_adapters_of_a_4_bit_base_are_trained_in_fp32_with_a_loss_scale(
    without_bf16, base, chat_tokenizer, tmp_path, make
):
    trainer = scaled(make(base, chat_tokenizer, tmp_path, fp16=True, bf16=False))
    compute_dtypes = {module.compute_dtype for module in trainer.model.modules() if hasattr(module, "compute_dtype")}
    assert compute_dtypes == {torch.float16}
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in before.values()} == {torch.float32}
    trainer.train()
    weights = dict(trainer.model.named_parameters())
    still = [name for name, value in before.items() if torch.equal(weights[name], value)]
    assert not [name for name in still if "lora_B" in name], still
    assert all(weights[name].isfinite().all() for name in before)
    assert trainer.accelerator.scaler.get_scale() == 1024.0  # no step overflowed


@pytest.mark.parametrize("make", [reward, sft], ids=lambda make: make.__name__)
def test_the_loss_scale_is_taken_out_of_the_updates(without_bf16, base, chat_tokenizer, tmp_path, make):
    """The steps of SGD in fp16 are those in fp32 from the same 4-bit weights, up to rounding."""
    steps = []
    for fp16 in (True, False):
        torch.manual_seed(0)
        dtype = "auto" if fp16 else "float32"
        trainer = make(base, chat_tokenizer, tmp_path, dtype=dtype, fp16=fp16, bf16=False)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_B" in name}
        (scaled(trainer) if fp16 else trainer).train()
        weights = dict(trainer.model.named_parameters())
        steps.append(torch.cat([(weights[name] - value).detach().float().flatten() for name, value in before.items()]))
    in_fp16, in_fp32 = steps
    assert in_fp32.norm() > 0
    assert (in_fp16 - in_fp32).norm() < 0.05 * in_fp32.norm()


def test_sft_keeps_the_weights_of_an_adapter_that_is_trained_further(without_bf16, base, chat_tokenizer, tmp_path):
    trainer = sft(base, chat_tokenizer, tmp_path, trained_before=True, fp16=True, bf16=False)
    rounded = [
        name
        for name, parameter in trainer.model.named_parameters()
        if "lora_A" in name and torch.equal(parameter, parameter.bfloat16().float())
    ]
    assert not rounded


def test_sft_refuses_to_train_fp16_weights(base, chat_tokenizer, tmp_path):
    args = SFTConfig(str(tmp_path / "sft"), **(COMMON | {"fp16": True, "bf16": False}))
    texts = Dataset.from_dict({"text": ["a sunny day"]})
    with pytest.raises(UserError, match="fp16=True: training of weights in fp16 is not supported: load") as error:
        PublishingSFTTrainer(
            load_base_model(base, dtype="float16"), args=args, train_dataset=texts, processing_class=chat_tokenizer
        )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", [ppo, reward, sft], ids=lambda make: make.__name__)
@pytest.mark.parametrize("fp16", [True, False])
def test_fp16_without_a_loss_scale_is_said(without_bf16, base, chat_tokenizer, tmp_path, caplog, make, fp16):
    make(base, chat_tokenizer, tmp_path, fp16=fp16, bf16=False)
    said = [record.getMessage() for record in caplog.records if "without a loss scale" in record.getMessage()]
    assert len(said) == (0 if fp16 else 1)
