"""Every way to train and to score, on tiny models: `RUNS`, name -> a function of a folder and a device.

The folder is empty, and the model lies three folders above it, in `base`. A function returns what has to be equal on
all devices: weights, metrics, scores. `placement.trainers_use` puts trainers on the pretend device; for CUDA,
`test_cuda.py` only changes `use_cpu`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from hf_rlhf_ext import (
    BradleyTerryConfig,
    BradleyTerryTrainer,
    PPOConfig,
    PPOTrainer,
    RewardEnsemble,
    RewardScorer,
    export_merged,
)
from hf_rlhf_ext.hub.merge import merge_run
from hf_rlhf_ext.modeling.layouts import Layout
from tests.devices.data import PROMPTS, WORDS, comparisons, letters, per_token, rankings

Result = dict[str, Any]
RUNS: dict[str, Callable[[Path, torch.device], Result]] = {}

TIMES = ("runtime", "per_second", "total_flos")  # metrics that are another number in every run

USUAL = {"use_cpu": True, "bf16": False, "report_to": "none", "seed": 3, "disable_tqdm": True, "logging_steps": 1}
USUAL |= {"save_strategy": "no", "activation_checkpointing": False, "lr_scheduler_type": "constant"}
USUAL |= {"per_device_train_batch_size": 4}

REWARD = USUAL | {"learning_rate": 1e-2, "max_steps": 2}
PPO = USUAL | {"learning_rate": 1e-2, "max_steps": 2, "num_mini_batches": 2, "num_ppo_epochs": 1}
PPO |= {"max_completion_length": 5, "kl_coef": 0.2, "vf_coef": 0.5, "critic": "head"}


def path(name: str):
    """Adds a function to `RUNS`."""

    def add(function):
        RUNS[name] = function
        return function

    return add


def named(name: str, function: Callable, **options) -> None:
    """Adds a run of a function with options."""
    RUNS[name] = lambda folder, device: function(folder, device, **options)


def base_of(folder: Path) -> Path:
    return folder.parents[2] / "base"


# ---- Trainers, and what of them has to be equal ----


def lora(task: str) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type=task)


def reward_trainer(folder: Path, *, rows=None, adapter=True, callbacks=None, model=None, **options):
    base = str(base_of(folder))
    options = REWARD | {"output_dir": str(folder / "reward")} | options
    if model is None:
        options["model_init_kwargs"] = {"dtype": "float32"}
    return BradleyTerryTrainer(
        model or base,
        BradleyTerryConfig(**options),
        comparisons(8) if rows is None else rows,
        comparisons(6, seed=1),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=lora("SEQ_CLS") if adapter else None,
        callbacks=callbacks,
    )


def ppo_trainer(folder: Path, *, rewards=letters, adapter=True, sharpness=1.0, attention="sdpa", **options):
    base = str(base_of(folder))
    names = ("callbacks", "eval_reward_funcs", "value_model", "ptx_dataset")
    arguments = {key: options.pop(key) for key in names if key in options}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32", attn_implementation=attention)
    model.lm_head.weight.data *= sharpness
    stops = list(range(0, model.config.vocab_size, 5))  # completions of several lengths
    return PPOTrainer(
        model,
        rewards,
        args=PPOConfig(str(folder / "ppo"), **(PPO | {"stop_token_ids": stops} | options)),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:3]}),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=lora("CAUSAL_LM") if adapter else None,
        **arguments,
    )


def outcome(trainer) -> Result:
    """Trained weights and logged metrics."""
    weights = {f"weights/{name}": value for name, value in trained(trainer).items()}
    assert weights
    return weights | metrics(trainer.state.log_history)


def trained(trainer) -> dict[str, torch.Tensor]:
    """Copies of the weights that are trained."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def metrics(history: list[dict]) -> Result:
    return {
        f"{name}@{number}": value
        for number, log in enumerate(history)
        for name, value in log.items()
        if not any(name.endswith(end) for end in TIMES)
    }


def is_on(trainer, device: torch.device) -> None:
    devices = {p.device for p in trainer.model.parameters()}
    assert devices == {device}, devices


# ---- Reward models ----


def train_reward(folder: Path, device: torch.device, **options) -> Result:
    trainer = reward_trainer(folder, **options)
    trainer.train()
    is_on(trainer, device)
    return outcome(trainer) | {"layout": trainer.layout}


@path("reward: K-wise, layout plain, activation checkpointing")
def reward_plain(folder, device):
    options = {"layout": "plain", "activation_checkpointing": True, "center_rewards_coefficient": 0.1}
    return train_reward(folder, device, eval_strategy="steps", eval_steps=2, margin_scale=0.5, **options)


@path("reward: shared prefix, token budget")
def reward_shared(folder, device):
    found = train_reward(folder, device, layout="shared_prefix", max_tokens_per_batch=60, eval_strategy="epoch")
    assert found["layout"] == "shared_prefix"
    return found


@path("reward: layout auto, whole model, tie model, Adafactor")
def reward_whole(folder, device):
    options = {"tie_model": "davidson", "tie_threshold": 0.5, "optim": "adafactor", "learning_rate": 1e-3}
    return train_reward(folder, device, adapter=False, max_steps=2, **options)


@path("reward: Plackett-Luce, SGD")
def reward_rankings(folder, device):
    return train_reward(folder, device, rows=rankings(6), ranking_loss="plackett_luce", max_steps=2, optim="sgd")


def train_reward_in_half(folder, device, **options):
    """With eager attention: its mask has the dtype of autocast."""
    model = AutoModelForSequenceClassification.from_pretrained(
        base_of(folder), num_labels=1, dtype="float32", attn_implementation="eager"
    )
    return train_reward(folder, device, model=model, layout="shared_prefix", optim="sgd", **options)


named("reward: bf16", train_reward_in_half, bf16=True)
named("reward: fp16", train_reward_in_half, fp16=True)

CHECKPOINTS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}


@path("reward: resume, best model, predict")
def reward_resumed(folder, device):
    straight = reward_trainer(folder, **CHECKPOINTS)
    straight.train()
    resumed = reward_trainer(folder, **CHECKPOINTS)
    resumed.train(resume_from_checkpoint=str(folder / "reward" / "checkpoint-2"))
    assert_same_weights(resumed, straight)
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "output_dir": folder / "best"}
    trainer = reward_trainer(folder, metric_for_best_model="accuracy", **(CHECKPOINTS | best))
    trainer.train()
    is_on(trainer, device)
    predicted = trainer.predict(comparisons(5, seed=2))
    found = outcome(resumed) | {f"best/{name}": value for name, value in outcome(trainer).items()}
    return found | {"scores": torch.as_tensor(predicted.predictions)}


@path("reward: scorer, ensemble, merges")
def reward_used(folder, device):
    """Two reward models: as scorers, as an ensemble, merged into the base."""
    homes = []
    for seed in (1, 2):
        trainer = reward_trainer(folder, seed=seed, max_steps=2, output_dir=str(folder / f"member-{seed}"))
        trainer.train()
        trainer.save_model()
        homes.append(str(folder / f"member-{seed}"))
    texts = {"prompts": PROMPTS, "completions": WORDS[: len(PROMPTS)]}
    scorer = RewardScorer.from_pretrained(homes[0], device=device)
    ensemble = RewardEnsemble.from_pretrained(homes, device=device, combine="conservative")
    assert next(scorer.model.parameters()).device == device
    in_memory = RewardScorer(trainer.model, trainer.processing_class)
    found = {"scorer": scorer(**texts), "ensemble": ensemble(**texts), "in memory": in_memory.raw(**texts)}
    found["disagreement"] = list(ensemble.disagreement(**texts))
    found["rounding of the export"] = export_merged(homes[0], folder / "exported", device=device)
    merged = merge_run(homes[1], folder / "merged", dtype="float32")
    found["merged"] = RewardScorer.from_pretrained(merged, device=device)(**texts)
    return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in found.items()}


# ---- PPO ----


def layouts_of(trainer: PPOTrainer) -> set[Layout]:
    """How completions pass through the policy, its reference and its critic."""
    roles = trainer.stack.roles
    return {roles[name].layout for name in ("policy", "reference", "value") if name in roles}


def train_ppo(folder: Path, device: torch.device, *, layout: Layout = Layout.PLAIN, **options) -> Result:
    trainer = ppo_trainer(folder, **options)
    assert layouts_of(trainer) == {layout}
    trainer.train()
    is_on(trainer, device)
    return outcome(trainer)


named("ppo: head critic, nucleus sampling", train_ppo, top_p=0.9, top_k=50, temperature=0.8)
named(
    "ppo: adapter critic, activation checkpointing, several batches, no merge",
    train_ppo,
    critic="adapter",
    activation_checkpointing=True,
    merge_for_generation=False,
    generation_batch_size=2,
    gradient_accumulation_steps=2,
    per_device_train_batch_size=2,
    importance_sampling_correction=True,
)
named(
    "ppo: KL in the loss, token budget, dense rewards, entropy bonus, joint scoring off",
    train_ppo,
    rewards=[letters, per_token],
    kl_placement="loss",
    max_tokens_per_batch=40,
    entropy_coef=0.01,
    joint_scoring=False,
    early_stop_kl=5.0,
    missing_eos_penalty=1.0,
    length_penalty=0.1,
    length_target=3,
    optim="sgd",
)
named(
    "ppo: 2 completions per prompt, no critic, token budget, evaluation",
    train_ppo,
    layout=Layout.SEGMENTS,
    num_generations=2,
    critic="none",
    max_tokens_per_batch=60,
    eval_strategy="steps",
    eval_steps=2,
)
named(
    "ppo: 2 completions per prompt behind a mask, head critic",
    train_ppo,
    layout=Layout.MASK,
    attention="eager",
    num_generations=2,
)
named(
    "ppo: reference answers (PAR), cut completions masked, overlong penalty, no critic",
    train_ppo,
    layout=Layout.SEGMENTS,
    num_generations=4,
    critic="none",
    max_completion_length=4,
    reward_shaping="par",
    num_reference_answers=2,
    mask_truncated_completions=True,
    soft_overlong_tokens=2,
    clip_range_high=0.28,
    entropy_coef=0.01,
)
named(
    "ppo: a warm-up of the head critic in fp16, lambdas of returns and lengths",
    train_ppo,
    fp16=True,
    optim="sgd",
    critic_warmup_steps=1,
    max_steps=4,
    value_gae_lambda=1.0,
    length_adaptive_lambda=0.5,
)
named(
    "ppo: a warm-up of the adapter critic, activation checkpointing, token budget, cut completions masked",
    train_ppo,
    critic="adapter",
    activation_checkpointing=True,
    max_tokens_per_batch=40,
    max_completion_length=4,
    mask_truncated_completions=True,
    critic_warmup_steps=1,
    max_steps=4,
)
named("ppo: bf16", train_ppo, bf16=True, optim="sgd", critic="adapter")
named("ppo: fp16", train_ppo, fp16=True, optim="sgd")


@path("ppo: an overflow in fp16 is skipped")
def ppo_overflow(folder, device):
    """A step whose loss is infinite changes no weight, halves the scale, and is counted."""
    trainer = ppo_trainer(folder, fp16=True, optim="sgd", max_steps=3)
    compute, before = trainer.compute_loss, {}

    def overflowing(*args, **kwargs):
        loss = compute(*args, **kwargs)
        if trainer.state.global_step != 1:
            return loss
        if not before:
            before.update(trained(trainer))
        return loss * float("inf")

    class CheckSkipped(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                assert all(torch.equal(value, before[name]) for name, value in trained(trainer).items())

    trainer.compute_loss = overflowing
    trainer.add_callback(CheckSkipped())
    trainer.train()
    is_on(trainer, device)
    skipped = [log["guards/skipped_steps"] for log in trainer.state.log_history if "loss" in log]
    assert before and skipped[1] == 1, skipped  # real fp16 may overflow in its first step by itself
    assert trainer.accelerator.scaler.get_scale() == 65536 / 2 ** sum(skipped)
    return outcome(trainer)


TEXTS = Dataset.from_list([{"prompt": p, "completion": f" {w}"} for p, w in zip(PROMPTS, WORDS, strict=False)])


@path("ppo: whole policy, value model, ptx, checkpoint")
def ppo_whole(folder, device):
    options = {"critic": "model", "value_model": str(base_of(folder)), "ptx_coef": 0.1, "ptx_dataset": TEXTS}
    options |= {"learning_rate": 1e-3, "kl_target": 0.5, "kl_horizon": 40, "logprobs_chunk_size": 5}
    options |= {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}  # with the frozen reference
    ppo_trainer(folder, adapter=False, **options).train()
    resumed = ppo_trainer(folder, adapter=False, **(options | {"max_steps": 3}))
    resumed.train(resume_from_checkpoint=True)
    is_on(resumed, device)
    return outcome(resumed)


@path("ppo: reward models as adapter and as model, joint scoring, adapter critic, evaluation")
def ppo_with_reward_models(folder, device):
    homes = []
    for adapter in (True, False):
        home = str(folder / f"reward-{adapter}")
        trainer = reward_trainer(folder, adapter=adapter, max_steps=1, output_dir=home)
        trainer.train()
        trainer.save_model()
        homes.append(home)
    options = {"critic": "adapter", "joint_scoring": True, "normalize_rewards": True, "reward_clip": 2.0}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "exact_kl_rows": 2, "eval_reward_funcs": letters}
    trainer = ppo_trainer(folder, rewards=homes, reward_weights=[1.0, 0.5], **options)
    assert "reward" in trainer.stack.roles
    trainer.train()
    is_on(trainer, device)
    predicted = trainer.predict(Dataset.from_dict({"prompt": PROMPTS}))
    ids = torch.tensor([[5, 6, 7]], device=device)
    greedy = trainer.policy.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    return outcome(trainer) | {"predictions": list(predicted.predictions), "greedy": greedy}


@path("ppo: resume in the middle of a rollout, merge")
def ppo_resumed(folder, device):
    options = CHECKPOINTS | {"max_steps": 4, "save_steps": 3, "critic": "adapter"}  # 2 steps a rollout
    straight = ppo_trainer(folder, **options)
    straight.train()
    resumed = ppo_trainer(folder, **options)
    resumed.train(resume_from_checkpoint=str(folder / "ppo" / "checkpoint-3"))
    assert_same_weights(resumed, straight)
    is_on(resumed, device)
    resumed.save_model()
    merged = merge_run(folder / "ppo", folder / "merged", dtype="float32")
    weights = AutoModelForCausalLM.from_pretrained(merged).state_dict()
    return outcome(resumed) | {f"merged/{name}": value for name, value in weights.items()}


def places_of_states(trainer) -> set[str]:
    """The kinds of devices on which the states of the optimizer are; none before the first step."""
    states = [value for values in trainer.optimizer.state.values() for value in values.values()]
    return {value.device.type for value in states if isinstance(value, torch.Tensor) and value.numel() > 1}


def watched_places(trainer, reward_model) -> tuple[list[torch.device], list[set[str]]]:
    """Where the reward model is when it scores, and the states of the optimizer when the policy computes."""
    scored_on: list[torch.device] = []
    states_on: list[set[str]] = []
    reward_model.register_forward_pre_hook(lambda module, args: scored_on.append(module.device))
    policy = trainer.policy.get_base_model().model
    policy.register_forward_pre_hook(lambda module, args: states_on.append(places_of_states(trainer)))
    return scored_on, states_on


@path("ppo: reward model and optimizer states on the CPU between stages, resume")
def ppo_offloaded(folder, device):
    """The same run to the bit as without, from a complete checkpoint too."""
    trainer = reward_trainer(folder, adapter=False, max_steps=1)
    trainer.train()
    trainer.save_model()
    options = CHECKPOINTS | {"max_steps": 4, "save_steps": 3, "critic": "adapter", "rewards": str(folder / "reward")}
    kept = ppo_trainer(folder, **options)
    kept.train()

    options |= {"offload_reward_model": True, "offload_optimizer": True}
    for resumed in (False, True):
        trainer = ppo_trainer(folder, **options)
        (model,) = trainer.rewards.models()
        scored_on, states_on = watched_places(trainer, model)
        trainer.train(resume_from_checkpoint=str(folder / "ppo" / "checkpoint-3") if resumed else None)
        assert {"cpu"} in states_on and all(places <= {"cpu"} for places in states_on)
        assert model.device.type == "cpu" and places_of_states(trainer) == {"cpu"}
        assert set(scored_on) == (set() if resumed else {device})  # the resumed rollout is in the checkpoint
        assert_same_weights(trainer, kept)
        is_on(trainer, device)
    return outcome(trainer)


@path("ppo: 2 completions per prompt, reward model and adapter critic, joint scoring, resume in a rollout")
def ppo_shared_prompts(folder, device):
    """The reward model is an adapter on the policy's base, and the completions of a prompt share it everywhere."""
    trainer = reward_trainer(folder, max_steps=1)
    trainer.train()
    trainer.save_model()
    options = CHECKPOINTS | {"max_steps": 4, "save_steps": 3, "critic": "adapter"}  # 2 steps a rollout
    options |= {"num_generations": 2, "joint_scoring": True, "activation_checkpointing": True}
    straight = ppo_trainer(folder, rewards=str(folder / "reward"), **options)
    straight.train()
    resumed = ppo_trainer(folder, rewards=str(folder / "reward"), **options)
    resumed.train(resume_from_checkpoint=str(folder / "ppo" / "checkpoint-3"))
    assert layouts_of(resumed) == {Layout.SEGMENTS}
    assert_same_weights(resumed, straight)
    is_on(resumed, device)
    return outcome(resumed)


class Jump(TrainerCallback):
    """Moves the policy far away from the reference, once."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step != self.step:
            return
        self.step = 0
        for name, parameter in model.named_parameters():
            if "lora_B.default" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))


@path("ppo: rollback, then the best model")
def ppo_rolled_back(folder, device):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8, "learning_rate": 1e-3, "kl_coef": 0.01}
    options |= {"max_kl": 5.0, "max_kl_action": "rollback", "eval_strategy": "steps", "eval_steps": 2, "critic": "head"}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "objective/scores", "greater_is_better": True}
    # The KL of a random model hardly depends on its weights, but that of one with a low entropy does.
    trainer = ppo_trainer(folder, callbacks=[Jump(5)], sharpness=30.0, **options)
    trainer.train()
    is_on(trainer, device)
    assert trainer.ppo.rollbacks >= 1
    return outcome(trainer)


# ---- Comparing ----


def assert_same_weights(trainer, expected) -> None:
    """Equal to the bit, as training is the same in both."""
    wanted = dict(expected.model.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, wanted[name]), name
