"""Every kind of adapter in PEFT, in both trainers: it works, or it is refused in one line."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import peft
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners import lora
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_rlhf_ext import BradleyTerryConfig, BradleyTerryTrainer, PPOConfig, PPOTrainer, RewardScorer, load_base_model
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.loading import load_policy
from hf_rlhf_ext.modeling.probing import evaluating
from tests.support.rows import Row, each

LINEAR = ["q_proj", "v_proj", "gate_proj", "down_proj"]
PROMPTS = ["Tell me", "a sunny day", "The quick brown fox", "words, many"]
PROBE = "Tell me of a sunny day"
TOKENS = list(range(3, 380))
"""Tokens that occur in the prompts are among them."""
PAIRS = [{"prompt": f"day {k}", "chosen": " happy people" + "!" * (k % 3), "rejected": " sad"} for k in range(4)]

Make = Callable[[str], PeftConfig]
"""Makes the configuration for a task type."""


def lora_with(**options) -> Make:
    return lambda task: LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": LINEAR} | options), task_type=task)


def kind(name: str, **options) -> Make:
    return lambda task: getattr(peft, name)(**({"target_modules": LINEAR} | options), task_type=task)


def prompt_kind(name: str, **options) -> Make:
    return lambda task: getattr(peft, name)(num_virtual_tokens=4, **options, task_type=task)


def cpt(task: str) -> PeftConfig:
    return peft.CPTConfig(cpt_token_ids=[1, 2, 3], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3], task_type=task)


def block_diagonal(task: str) -> PeftConfig:
    blocks = lora.BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2)
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_bdlora=blocks, task_type=task)


# What works in both trainers: name, configuration, and words for PPO and for reward models.
FROZEN = "frozen reference"
UNMERGED = "sampled unmerged"
WORKING: list[tuple[str, Make, str]] = [
    ("LoRA", lora_with(), ""),
    ("LoRA, `use_rslora`", lora_with(use_rslora=True), ""),
    ("LoRA, `use_dora`", lora_with(use_dora=True), ""),
    ("LoRA, `init_lora_weights='gaussian'`", lora_with(init_lora_weights="gaussian"), ""),
    ("LoRA, `init_lora_weights=False`", lora_with(init_lora_weights=False), FROZEN),
    ("LoRA, `init_lora_weights='orthogonal'`", lora_with(init_lora_weights="orthogonal"), ""),
    ("LoRA, `init_lora_weights='eva'`", lora_with(init_lora_weights="eva"), ""),
    ("LoRA, `init_lora_weights='mica'`", lora_with(init_lora_weights="mica"), ""),
    ("PiSSA", lora_with(init_lora_weights="pissa"), FROZEN),
    ("PiSSA with DoRA", lora_with(init_lora_weights="pissa", use_dora=True), FROZEN),
    ("OLoRA", lora_with(init_lora_weights="olora"), FROZEN),
    ("KaSA", lora_with(kasa_config=lora.KasaConfig()), FROZEN),
    ("VeLoRA", lora_with(velora_config=lora.VeloraConfig()), ""),
    ("BD-LoRA", block_diagonal, ""),
    ("LoRA, `lora_bias`", lora_with(lora_bias=True), f"{UNMERGED} where a layer has no bias"),
    ("LoRA, `trainable_token_indices`", lora_with(trainable_token_indices=TOKENS), ""),
    ("IA³", kind("IA3Config", feedforward_modules=["down_proj"]), ""),
    ("LoHa", kind("LoHaConfig", r=4), ""),
    ("LoKr", kind("LoKrConfig", r=4), ""),
    ("OFT", kind("OFTConfig", oft_block_size=8), ""),
    ("BOFT", kind("BOFTConfig", boft_block_size=4), ""),
    ("VeRA", kind("VeraConfig", r=8), ""),
    ("RandLoRA", kind("RandLoraConfig", r=4), ""),
    ("FourierFT", kind("FourierFTConfig", n_frequency=16), FROZEN),
    ("HRA", kind("HRAConfig", r=4), ""),
    ("VB-LoRA", kind("VBLoRAConfig", r=4, num_vectors=16, vector_length=16), FROZEN),
    ("LN tuning", kind("LNTuningConfig", target_modules=["input_layernorm"]), ""),
    ("MiSS", kind("MissConfig", r=4), ""),
    ("MiSS, `init_weights='bat'` (Bone)", kind("MissConfig", r=4, init_weights="bat"), ""),
    ("MiSS, `init_weights='mini'`", kind("MissConfig", r=4, init_weights="mini", mini_r=4), ""),
    ("SHiRA", kind("ShiraConfig", r=4), ""),
    ("C³A", kind("C3AConfig", block_size=8), FROZEN),
    ("RoAd", kind("RoadConfig", group_size=8), ""),
    ("WaveFT", kind("WaveFTConfig", n_frequency=16), ""),
    ("DeLoRA", kind("DeloraConfig", r=4), ""),
    ("GraLoRA", kind("GraloraConfig", r=4, gralora_k=2), ""),
    ("HiRA", kind("HiraConfig", r=4), ""),
    ("PSOFT", kind("PsoftConfig", r=4), ""),
    ("PEANuT", kind("PeanutConfig", r=4), ""),
    ("TinyLoRA", kind("TinyLoraConfig", r=2), ""),
    ("Uni-LoRA", kind("UniLoraConfig", r=4), FROZEN),
    ("Lily", kind("LilyConfig", r=4), UNMERGED),
    ("GLoRA", kind("GloraConfig", r=4), ""),
    ("FRoD", kind("FrodConfig"), ""),
    ("BEFT", kind("BeftConfig", target_modules=["q_proj", "v_proj"]), ""),
    ("AdaMSS", kind("AdamssConfig", r=4, num_subspaces=2), ""),
    ("DEFT", kind("DeftConfig", r=4), ""),
    ("SuperTuning", kind("SupertuningConfig"), ""),
]  # fmt: skip

SINGLE_TOKENS = kind("TrainableTokensConfig", token_indices=TOKENS, target_modules=["embed_tokens"])

# Virtual tokens: the adapter changes the model from the start.
BASE_REFERENCE = "bare reference with `peft_config`"
VIRTUAL: list[tuple[str, Make]] = [
    ("Prompt tuning", prompt_kind("PromptTuningConfig")),
    ("P-tuning", prompt_kind("PromptEncoderConfig", encoder_hidden_size=16)),
    ("Prefix tuning", prompt_kind("PrefixTuningConfig")),
    ("CPT", cpt),
    ("Cartridge", prompt_kind("CartridgeConfig")),
]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ON_EXPERTS = lora_with(target_modules=["q_proj"], target_parameters=EXPERTS)
NITER = lora_with(init_lora_weights="pissa_niter_4")
LOFTQ = lora_with(init_lora_weights="loftq", loftq_config=peft.LoftQConfig())
REPLICATED = lora_with(layer_replication=[[0, 1], [0, 1]])
ADALORA = kind("AdaLoraConfig", init_r=6, target_r=4, total_step=9)
NOT_REPEATED = "in a way that is not repeated when the saved adapter is loaded"

PPO_ADAPTERS = [
    *[Row(name, value=make, note=note) for name, make, note in WORKING],
    Row("Trainable tokens", value=SINGLE_TOKENS),
    *[Row(name, value=make, note=BASE_REFERENCE) for name, make in VIRTUAL],
    Row("PiSSA, `'pissa_niter_4'`, with `peft_config`", value=NITER, note=FROZEN),
    Row("PiSSA, `'pissa_niter_4'`, in a `PeftModel`", NOT_REPEATED, NITER),
    Row("LoRA, `modules_to_save=['lm_head']`", value=lora_with(modules_to_save=["lm_head"])),
    Row("LoRA, `modules_to_save=['embed_tokens']`", value=lora_with(modules_to_save=["embed_tokens"])),
    Row("LoRA on `lm_head`", value=lora_with(target_modules=["q_proj", "lm_head"])),
    Row("LoRA on `embed_tokens`", value=lora_with(target_modules=["q_proj", "embed_tokens"])),
    Row("LoRA on a tied `lm_head`", value=lora_with(target_modules=["q_proj", "lm_head"]), note=UNMERGED),
    Row("LoRA on tied `embed_tokens`", value=lora_with(target_modules=["q_proj", "embed_tokens"]), note=UNMERGED),
    Row(
        "LoRA on tied `embed_tokens`, `ensure_weight_tying`",
        value=lora_with(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
        note=UNMERGED,
    ),
    Row("LoRA on fused experts (`target_parameters`)", value=ON_EXPERTS),
    Row("aLoRA", value="alora", note=UNMERGED),
    Row("LoRA, `bias='all'`", "trains biases of the base", lora_with(bias="all")),
    Row("LoRA, `bias='lora_only'`", "trains biases of the base", lora_with(bias="lora_only")),
    Row("LoRA, `layer_replication`", "layer_replication is not supported", REPLICATED),
    Row("MonteCLoRA", "draws weights at random", lora_with(monteclora_config=lora.MontecloraConfig())),
    Row("PVeRA", "draws weights at random", kind("PveraConfig", r=8)),
    Row("LoftQ on a CPU", "PEFT cannot attach this adapter", LOFTQ, "PEFT initializes it on a GPU"),
    Row("CorDA without `preprocess_corda`", "PEFT cannot attach this adapter", lora_with(init_lora_weights="corda")),
    Row("A target that the model lacks", "This model has layers named", lora_with(target_modules=["query"])),
    Row("AdaLoRA with `critic='adapter'`", "does not support two adapters", ADALORA),
    Row("OSF", "are not supported", kind("OSFConfig")),
    Row("Poly", "are not supported", kind("PolyConfig", r=4, n_tasks=2, n_skills=2)),
    Row("Multitask prompt tuning", "are not supported", prompt_kind("MultitaskPromptTuningConfig", num_tasks=2)),
    Row("LLaMA-Adapter (adaption prompt)", "are not supported", lambda task: peft.AdaptionPromptConfig(
        adapter_len=4, adapter_layers=1, task_type=task)),
    Row("ShadowPEFT", "are not supported", lambda task: peft.ShadowConfig(task_type=task)),
    Row("X-LoRA", "are not supported", lambda task: peft.XLoraConfig(
        hidden_size=32, adapters={"0": "./none"}, task_type=task)),
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(chat_tokenizer_factory):
    return chat_tokenizer_factory()


@pytest.fixture(scope="module")
def base_folder(tokenizer, tmp_path_factory) -> Callable[[str], Path]:
    """Saves a random one-layer model once: `plain` with biases in its attention, `tied`, or with `experts`."""

    @cache
    def save(shape: str) -> Path:
        sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
        sizes |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
        torch.manual_seed(0)
        if shape == "experts":
            experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
            model = MixtralForCausalLM(MixtralConfig(**sizes, **experts))
        else:
            model = LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True, tie_word_embeddings=shape == "tied"))
            for name, parameter in model.named_parameters():
                if name.endswith(".bias"):
                    torch.nn.init.normal_(parameter, std=0.1)
        folder = tmp_path_factory.mktemp(shape)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


def shape_for(row: Row) -> str:
    if "experts" in row.name:
        return "experts"
    return "tied" if "tied" in row.name else "plain"


def config_of(row: Row, task: str, tokenizer) -> PeftConfig:
    if row.value == "alora":
        # The token that starts the answer is in every prompt.
        return LoraConfig(
            r=4, target_modules=LINEAR, alora_invocation_tokens=tokenizer(" me")["input_ids"], task_type=task
        )
    return row.value(task)


@each(PPO_ADAPTERS)
def test_ppo(row, base_folder, tokenizer, tmp_path):
    ways = ["peft_config", "PeftModel"]
    if row.name.endswith(("`peft_config`", "`PeftModel`")):
        ways = [re.search(r"`(peft_config|PeftModel)`$", row.name)[1]]
    for way in ways:
        if row.says is None:
            check_ppo(row, way, base_folder(shape_for(row)), tokenizer, tmp_path / way)
        else:
            refuse_ppo(row, way, base_folder(shape_for(row)), tokenizer, tmp_path / way)


def ppo_trainer(row, way, base_path, tokenizer, folder) -> PPOTrainer:
    torch.manual_seed(0)
    model = load_base_model(str(base_path), dtype="float32")
    config = config_of(row, "CAUSAL_LM", tokenizer)
    if way == "PeftModel":
        model = get_peft_model(model, config)
    prompts = PROMPTS
    if row.value == "alora":
        prompts = [prompt + " me" for prompt in PROMPTS]
    args = PPOConfig(
        str(folder), per_device_train_batch_size=4, num_ppo_epochs=1, max_steps=2, max_completion_length=4,
        learning_rate=1e-2, lr_scheduler_type="constant", use_cpu=True, bf16=False, activation_checkpointing=False,
        report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1, seed=3,
    )  # fmt: skip
    return PPOTrainer(
        model,
        lambda completions, **columns: [float(text.count("e")) - len(text) for text in completions],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        peft_config=config if way == "peft_config" else None,
    )


def check_ppo(row, way, base_path, tokenizer, folder):
    """Trains two steps, each on a rollout of its own: the second one is sampled with trained weights."""
    trainer = ppo_trainer(row, way, base_path, tokenizer, folder)
    start = role_logprobs(trainer, "policy")
    reference = role_logprobs(trainer, "reference")
    trainer.train()

    history = trainer.state.log_history
    logged = {name: [entry[name] for entry in history if name in entry] for entry in history for name in entry}
    assert logged["val/ratio"] == pytest.approx([1, 1], abs=1e-5)  # scored = trained, at the first step on a rollout
    assert logged["sampling/logprob_mismatch"] == pytest.approx([0, 0], abs=1e-4)
    starts_as_reference = way == "PeftModel" or row.note != BASE_REFERENCE
    assert (abs(logged["objective/kl"][0]) < 1e-4) == starts_as_reference
    assert distance(role_logprobs(trainer, "reference"), reference) < 1e-6  # training does not move it
    trained = role_logprobs(trainer, "policy")
    assert distance(trained, start) > 1e-5

    # What is saved is the trained policy, for others and for a checkpoint.
    trainer.save_model(str(folder))
    assert distance(logprobs(load_policy(folder, dtype="float32")[0], tokenizer), trained) < 1e-4
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    trainer.roles.load(folder)
    assert distance(role_logprobs(trainer, "policy"), trained) < 1e-6


def refuse_ppo(row, way, base_path, tokenizer, folder):
    """The trainer refuses; where PEFT itself does not attach the adapter to a model, there is nothing to give to it."""
    if way == "PeftModel":
        try:
            get_peft_model(load_base_model(str(base_path), dtype="float32"), config_of(row, "CAUSAL_LM", tokenizer))
        except Exception:
            return
    with pytest.raises(UserError, match=re.escape(row.says)) as refusal:
        ppo_trainer(row, way, base_path, tokenizer, folder)
    assert "\n" not in str(refusal.value)


def role_logprobs(trainer, role):
    with trainer.stack.activate(role) as model:
        return logprobs(model, trainer.processing_class)


@torch.no_grad()
def logprobs(model, tokenizer):
    ids = tokenizer(PROBE, return_tensors="pt")["input_ids"]
    with evaluating(model):
        return torch.log_softmax(model(input_ids=ids).logits[0, -ids.shape[1] :], -1)


def distance(first, second) -> float:
    return float((first - second).abs().max())


REWARD_ADAPTERS = [
    *[Row(name, value=make) for name, make, _ in WORKING],
    *[Row(name, value=make) for name, make in VIRTUAL if name != "CPT"],  # which PEFT has for causal LMs only
    Row("Trainable tokens", "PEFT trains no score head", SINGLE_TOKENS),
    Row("LoRA, `bias='all'`", value=lora_with(bias="all"), note="never shares its base"),
    Row("LoRA, `bias='lora_only'`", value=lora_with(bias="lora_only"), note="never shares its base"),
    Row("LoRA, `modules_to_save=['embed_tokens']`", value=lora_with(modules_to_save=["embed_tokens"])),
    Row("LoRA on `embed_tokens`", value=lora_with(target_modules=["q_proj", "embed_tokens"])),
    Row("LoRA on fused experts (`target_parameters`)", value=ON_EXPERTS),
    Row("AdaLoRA", value=ADALORA, note="with its initial ranks"),
    Row("MonteCLoRA", value=lora_with(monteclora_config=lora.MontecloraConfig())),
    Row("PVeRA", value=kind("PveraConfig", r=8)),
    Row("OSF", value=kind("OSFConfig")),
    Row("ShadowPEFT", value=lambda task: peft.ShadowConfig(task_type=task)),
    Row("LoRA, `layer_replication`", value=REPLICATED),
    Row("PiSSA, `'pissa_niter_4'`", NOT_REPEATED, NITER),
    Row("CorDA", NOT_REPEATED, lora_with(init_lora_weights="corda")),
    Row("LoRA-GA", NOT_REPEATED, lora_with(init_lora_weights="lora_ga")),
    Row("LoftQ on a CPU", "PEFT cannot attach this adapter", LOFTQ, "PEFT initializes it on a GPU"),
    Row("A target that the model lacks", "This model has layers named", lora_with(target_modules=["query"])),
    Row("Poly", "are not supported", kind("PolyConfig", r=4, n_tasks=2, n_skills=2)),
    Row("Multitask prompt tuning", "are not supported", prompt_kind("MultitaskPromptTuningConfig", num_tasks=2)),
    Row("LLaMA-Adapter (adaption prompt)", "PEFT trains no score head", lambda task: peft.AdaptionPromptConfig(
        adapter_len=4, adapter_layers=1, task_type=task)),
    Row("X-LoRA", "are not supported", lambda task: peft.XLoraConfig(
        hidden_size=32, adapters={"0": "./none"}, task_type=task)),
]  # fmt: skip


def reward_trainer(row, base_path, tokenizer, folder) -> BradleyTerryTrainer:
    torch.manual_seed(0)
    args = BradleyTerryConfig(
        str(folder), per_device_train_batch_size=4, max_steps=2, learning_rate=1e-2, use_cpu=True, bf16=False,
        activation_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
        seed=3,
    )  # fmt: skip
    return BradleyTerryTrainer(
        load_base_model(str(base_path), task="reward", dtype="float32"),
        args,
        Dataset.from_list(PAIRS),
        processing_class=tokenizer,
        peft_config=config_of(row, "SEQ_CLS", tokenizer),
    )


@each(REWARD_ADAPTERS)
def test_reward(row, base_folder, tokenizer, tmp_path):
    base_path = base_folder(shape_for(row))
    if row.says is not None:
        with pytest.raises(UserError, match=re.escape(row.says)) as refusal:
            reward_trainer(row, base_path, tokenizer, tmp_path)
        assert "\n" not in str(refusal.value)
        return
    trainer = reward_trainer(row, base_path, tokenizer, tmp_path)
    adapter_weights = [p for n, p in trainer.model.named_parameters() if p.requires_grad and ".score." not in n]
    before = [parameter.detach().clone() for parameter in adapter_weights]
    trainer.train()
    moved = [not torch.equal(old, new) for old, new in zip(before, adapter_weights, strict=True)]
    assert any(moved)
    trainer.save_model()
    texts = ([" me", "day 1"], [" happy people", " sad"])
    live = RewardScorer(trainer.model, tokenizer).raw(*texts)
    assert RewardScorer.from_pretrained(tmp_path).raw(*texts) == pytest.approx(live, abs=1e-5)
