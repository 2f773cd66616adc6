"""The runs of the golden run: small trainings that together use every part of both trainers.

Everything is created here from fixed seeds: a random two-layer Llama, its tokenizer, prompts and comparisons. A run
gets a folder to write to and returns what must not change: digests of weights and of the optimizer's state, every
logged metric, and results that are specific to the run. Each run also checks that what it is named for has happened
(`expect`).

Only public names of the library are used, so that the same file can train an older tree. `OPTIONS`, `ATTRIBUTES` and
`METRICS` list names that were different there.
"""

import hashlib
import json
import random
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)

import hf_rlhf_ext
from hf_rlhf_ext import (
    BradleyTerryConfig,
    BradleyTerryTrainer,
    PPOConfig,
    PPOTrainer,
    RewardEnsemble,
    RewardScorer,
    export_merged,
    load_base_model,
)

# New name → old name. The runs use the new names.
OPTIONS = {"early_stop_kl": "target_kl", "joint_scoring": "mixed_pass"}
ATTRIBUTES = {"stop_reason": "stopped_by"}
METRICS: dict[str, str] = {}

# Logged values that differ in every run of the same program.
TIMINGS = ("_runtime", "_per_second")

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENIZER_TEXTS = [
    "You are a helpful assistant. user system assistant",
    "Tell me about a sunny day in the garden, and what makes people happy or sad there.",
    "The quick brown fox jumps over the lazy dog; numbers 0123456789 and words, many words!",
]
PROMPTS = ["Tell me", "a sunny day", "fox", "The quick brown fox jumps over", "words, many", "happy or sad?"]
WORDS = ["sunny", "garden", "happy", "lazy dog", "fox jumps", "words", "day", "quick brown"]
ENCODER_VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *" ".join(WORDS).split(), "user", "assistant", ":"]
SCORED_PROMPTS = ["Tell sunny:", "Tell me:", "", "garden?"]
SCORED_COMPLETIONS = ["a sunny day", "", "the lazy dog the lazy dog", "happy"]


@dataclass(frozen=True)
class GoldenRun:
    """A training to repeat. `train(folder)` returns what must not change; `processes` is the number of processes."""

    train: Callable[[Path], dict[str, Any]]
    processes: int


RUNS: dict[str, GoldenRun] = {}


def golden_run(processes: int = 1):
    """Adds a function to `RUNS` under its name."""

    def add(train: Callable[[Path], dict[str, Any]]):
        RUNS[train.__name__] = GoldenRun(train, processes)
        return train

    return add


def prepare_torch() -> None:
    """Sets one thread and deterministic kernels, as sums in another order differ in their last bits."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore")


def package_file() -> str:
    """The file of the library that was imported."""
    return str(Path(hf_rlhf_ext.__file__).resolve())


def api() -> str:
    """Whether the imported library uses the new or the old names."""
    if "early_stop_kl" in PPOConfig.__dataclass_fields__:
        return "new"
    return "old"


# ---- What is recorded ----


def tensor_digest(tensor: Tensor) -> str:
    """sha256 of a tensor's dtype, shape and bytes."""
    tensor = tensor.detach().cpu().contiguous()
    header = f"{tensor.dtype} {tuple(tensor.shape)} "
    return hashlib.sha256(header.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def weight_digests(model: torch.nn.Module) -> dict[str, str]:
    """A digest for every weight of the model, including adapters and heads of all roles."""
    return {name: tensor_digest(weight) for name, weight in model.state_dict().items()}


def trained_digest(model: torch.nn.Module) -> str:
    """One digest of the names of the trained parameters."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            digest.update(f"{name} {tensor_digest(parameter)}\n".encode())
    return digest.hexdigest()


def optimizer_digests(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """A digest for every tensor of the optimizer's state, and the options of its parameter groups."""
    content = optimizer.state_dict()
    digests = {}
    for number, state in content["state"].items():
        for name, value in state.items():
            digests[f"parameter {number} {name}"] = tensor_digest(torch.as_tensor(value))
    for number, group in enumerate(content["param_groups"]):
        digests[f"group {number}"] = json.dumps(group, sort_keys=True, default=str)
    return digests


def random_digests() -> dict[str, str]:
    """Digests of the random states. They are equal if the same numbers were drawn in the same order."""
    numpy_state = np.random.get_state()[1].tobytes()
    return {
        "torch": tensor_digest(torch.get_rng_state()),
        "numpy": hashlib.sha256(numpy_state).hexdigest(),
        "python": hashlib.sha256(repr(random.getstate()).encode()).hexdigest(),
    }


def metrics_log(trainer) -> list[dict[str, Any]]:
    """Everything that was logged, in order, under the new names and without timings."""
    new_names = {old: new for new, old in METRICS.items()}
    log = []
    for entry in trainer.state.log_history:
        log.append({new_names.get(name, name): value for name, value in entry.items() if not name.endswith(TIMINGS)})
    return log


def outcome(trainer, **values: Any) -> dict[str, Any]:
    """The outcome of a training; `values` are further results of the run that JSON can represent."""
    return {
        "package": package_file(),
        "weights": weight_digests(trainer.model),
        "trained": trained_digest(trainer.model),
        "optimizer": optimizer_digests(trainer.optimizer),
        "log": metrics_log(trainer),
        "values": values | {"global_step": trainer.state.global_step, "random": random_digests()},
    }


def attribute(owner: Any, name: str) -> Any:
    """An attribute under its new name or, in an older tree, under its old name."""
    if hasattr(owner, name):
        return getattr(owner, name)
    return getattr(owner, ATTRIBUTES[name])


def logged(trainer, name: str) -> list[float]:
    """Every logged value of a metric, oldest first."""
    return [entry[name] for entry in metrics_log(trainer) if name in entry]


def expect(condition: bool, what: str) -> None:
    """Raises an error if a run no longer does what it is named for."""
    if not condition:
        raise RuntimeError(f"this run does not do what it is for: {what}")


# ---- Models, tokenizers, data ----


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a ChatML template, eos `<|im_end|>` and a separate pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TOKENIZER_TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>", padding_side="left"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_config() -> LlamaConfig:
    tokenizer = make_tokenizer()
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )


def tiny_policy(sharpness: float = 1.0) -> LlamaForCausalLM:
    """A random Llama, always the same. `sharpness` scales its logits, so that the KL is not negligible."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config())
    model.lm_head.weight.data *= sharpness
    return model


def tiny_reward_model() -> LlamaForSequenceClassification:
    config = tiny_config()
    config.num_labels = 1
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config)


def saved_base(folder: Path) -> str:
    """A folder with the tiny Llama and its tokenizer, for runs that load models by path."""
    base = folder / "base"
    tiny_policy().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    return str(base)


def lora(task_type: str) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type=task_type)


def prompt_rows() -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS})


def chat_rows() -> Dataset:
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": prompt}] for prompt in PROMPTS]})


def pair_rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Preference rows in TRL's format. The completion with the word "happy" is better."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(n):
        words = " ".join(rng.choice(WORDS, int(rng.integers(1, 5))))
        prompt = f"Tell {rng.choice(WORDS)} {number}:"
        rows.append({"prompt": prompt, "chosen": f"{words} happy", "rejected": f"{words} lazy"})
    return rows


def chat_pair_rows(n: int) -> list[dict[str, Any]]:
    rows = []
    for row in pair_rows(n):
        messages = {"prompt": [{"role": "user", "content": row["prompt"]}]}
        for side in ("chosen", "rejected"):
            messages[side] = [{"role": "assistant", "content": row[side]}]
        rows.append(messages)
    return rows


def comparison_rows(n: int, *, seed: int = 0, size: int | None = None) -> list[dict[str, Any]]:
    """Comparison rows of 2 to 4 completions (or `size`) with soft targets, ties, margins and different weights."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(n):
        n_completions = size or int(rng.integers(2, 5))
        completions = []
        for place in range(n_completions):
            words = " ".join(rng.choice(WORDS, int(rng.integers(1, 5))))
            completions.append(f"{words} {place}")
        pairs = [[i, j] for i in range(n_completions) for j in range(i + 1, n_completions)]
        row = {
            "prompt": f"Tell {rng.choice(WORDS)} {number}:",
            "completions": completions,
            "pairs": pairs,
            "targets": rng.choice([0.0, 0.5, 0.8, 1.0], len(pairs)).tolist(),
            "weights": rng.uniform(0.2, 2, len(pairs)).tolist(),
            "margins": rng.normal(0, 0.3, len(pairs)).tolist(),
            "category": str(rng.choice(["help", "harm"])),
        }
        rows.append(row)
    return rows


def ranked_rows(n: int) -> list[dict[str, Any]]:
    """Comparison rows with fully ranked completions, from the best to the worst, for Plackett-Luce."""
    rows = comparison_rows(n, size=4)
    for row in rows:
        row["targets"] = [1.0] * len(row["pairs"])
        del row["margins"]
    return rows


# ---- Reward functions ----


def letter_reward(completions, **columns):
    return [text.count("e") - 0.2 * len(text) for text in completions]


def chat_letter_reward(completions, **columns):
    return letter_reward([messages[0]["content"] for messages in completions])


def length_reward(completions, **columns):
    return [float(len(text)) for text in completions]


def token_reward(completion_ids, **columns):
    """A reward for each token."""
    return [[0.1 * (token % 7) - 0.2 for token in ids] for ids in completion_ids]


async def partial_reward(completions, log_metric, log_extra, **columns):
    """An async function that returns no score for some completions and logs a metric."""
    scores = [None if len(text) % 3 == 0 else 0.1 * len(text) for text in completions]
    log_metric("partial/unscored", float(scores.count(None)))
    log_extra("length", [len(text) for text in completions])
    return scores


# ---- Callbacks ----


class StopAt(TrainerCallback):
    """Ends a run early, like a run that is killed."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


class Jump(TrainerCallback):
    """Moves the policy far from its reference after some steps, like an optimizer step that is far too large."""

    def __init__(self, *steps: int):
        self.steps = steps

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step not in self.steps:
            return
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B.default" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator))


class Break(TrainerCallback):
    """Makes a weight of the policy NaN after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            parameter = next(p for name, p in model.named_parameters() if "lora_B.default" in name)
            parameter.data.fill_(float("nan"))


class SpoilGradients(TrainerCallback):
    """Makes the gradients of some optimizer steps NaN."""

    def __init__(self, *steps: int):
        self.steps = steps
        self.hook = None

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step + 1 in self.steps:
            parameter = next(p for name, p in model.named_parameters() if "lora_B.default" in name)
            self.hook = parameter.register_hook(lambda gradient: gradient * float("nan"))

    def on_step_end(self, args, state, control, **kwargs):
        if self.hook is not None:
            self.hook.remove()
            self.hook = None


# ---- Trainers ----

COMMON_OPTIONS = {
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
}
PPO_OPTIONS = COMMON_OPTIONS | {
    "num_mini_batches": 2,
    "num_ppo_epochs": 2,
    "max_steps": 12,
    "max_completion_length": 8,
    "lr_scheduler_type": "constant",
}
REWARD_OPTIONS = COMMON_OPTIONS | {"max_steps": 8}


def ppo_config(folder: Path, options: dict[str, Any]) -> PPOConfig:
    options = PPO_OPTIONS | options
    for new, old in OPTIONS.items():
        if new in options and new not in PPOConfig.__dataclass_fields__:
            options[old] = options.pop(new)
    # A fifth of the vocabulary are stop tokens, so that completions have different lengths.
    options.setdefault("stop_token_ids", list(range(0, tiny_config().vocab_size, 5)))
    return PPOConfig(str(folder / "ppo"), **options)


def ppo_trainer(folder: Path, *, arguments: dict[str, Any] | None = None, **options: Any) -> PPOTrainer:
    """A `PPOTrainer` with a LoRA on the tiny Llama. `arguments` are those of the trainer, `options` of the config."""
    defaults = {
        "reward_funcs": letter_reward,
        "train_dataset": prompt_rows(),
        "processing_class": make_tokenizer(),
        "peft_config": lora("CAUSAL_LM"),
    }
    arguments = defaults | (arguments or {})
    if "model" not in arguments:
        arguments["model"] = tiny_policy()
    trainer = PPOTrainer(args=ppo_config(folder, options), **arguments)
    trainer.remove_callback(PrinterCallback)
    return trainer


def finished_ppo(trainer: PPOTrainer, **values: Any) -> dict[str, Any]:
    """Trains, saves and returns the outcome."""
    trainer.train()
    trainer.save_model()
    return outcome(trainer, stopped=attribute(trainer, "stop_reason") is not None, **values)


def reward_trainer(
    folder: Path, rows: list[dict[str, Any]], *, arguments: dict[str, Any] | None = None, **options: Any
) -> BradleyTerryTrainer:
    """A `BradleyTerryTrainer` with a LoRA. `arguments` are those of the trainer, `options` of the config."""
    defaults = {"processing_class": make_tokenizer(), "peft_config": lora("SEQ_CLS")}
    arguments = defaults | (arguments or {})
    if "model" not in arguments:
        arguments["model"] = tiny_reward_model()
    args = BradleyTerryConfig(str(folder / "reward"), **(REWARD_OPTIONS | options))
    trainer = BradleyTerryTrainer(args=args, train_dataset=Dataset.from_list(rows), **arguments)
    trainer.remove_callback(PrinterCallback)
    return trainer


def reward_outcome(trainer: BradleyTerryTrainer, **values: Any) -> dict[str, Any]:
    """The outcome of a reward run, with data reports, normalization, and scores in memory and after loading."""
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()  # the first process writes, all processes read
    folder = Path(trainer.args.output_dir)
    reloaded = RewardScorer.from_pretrained(folder, base=base_in_memory(trainer.model), device="cpu")
    normalization = json.loads((folder / "reward_normalization.json").read_text())
    here = RewardScorer(trainer.model, trainer.processing_class)
    return outcome(
        trainer,
        layout=trainer.layout,
        data_reports={name: asdict(report) for name, report in trainer.data_reports.items()},
        normalization=normalization,
        raw_scores=here.raw(SCORED_PROMPTS, SCORED_COMPLETIONS),
        rewards=reloaded(SCORED_PROMPTS, SCORED_COMPLETIONS),
        **values,
    )


def base_in_memory(model) -> LlamaForSequenceClassification | None:
    """The base of an adapter whose model was not loaded from a folder, so that the saved adapter names no base."""
    if isinstance(model, PeftModel) and not model.get_base_model().config.name_or_path:
        return tiny_reward_model()
    return None


def finished_reward(trainer: BradleyTerryTrainer, **values: Any) -> dict[str, Any]:
    trainer.train()
    return reward_outcome(trainer, **values)


def reward_adapter(folder: Path, base: str, name: str, seed: int = 3) -> BradleyTerryTrainer:
    """A reward adapter on the saved base, trained for a few steps and saved in `folder/name/reward`."""
    trainer = reward_trainer(
        folder / name,
        pair_rows(16, seed=seed),
        arguments={"model": base},
        max_steps=4,
        seed=seed,
        model_init_kwargs={"dtype": "float32"},  # "auto" means bf16 on some machines
    )
    trainer.train()
    trainer.save_model()
    return trainer


# ---- Reward runs ----


@golden_run()
def reward_pairs(folder: Path) -> dict[str, Any]:
    """Rows in TRL's format, with evaluations. A row that is too long and a row without a difference are dropped."""
    rows = pair_rows(24)
    rows[5]["chosen"] = "happy " * 60
    rows[7]["chosen"] = rows[7]["rejected"]
    evaluation = {"eval_dataset": Dataset.from_list(pair_rows(12, seed=1))}
    trainer = reward_trainer(
        folder, rows, arguments=evaluation, max_length=64, overflow="drop", eval_strategy="steps", eval_steps=4
    )
    result = finished_reward(trainer)
    expect(trainer.data_reports["train"].kept == 22, "two rows are dropped")
    return result


@golden_run()
def reward_kwise_shared(folder: Path) -> dict[str, Any]:
    """K completions share a row with their prompt. The evaluation has categories and margins."""
    evaluation = {"eval_dataset": Dataset.from_list(comparison_rows(16, seed=1))}
    trainer = reward_trainer(
        folder,
        comparison_rows(24),
        arguments=evaluation,
        layout="shared_prefix",
        eval_strategy="steps",
        eval_steps=4,
    )
    expect(trainer.layout == "shared_prefix", "completions share their prompt")
    return finished_reward(trainer)


@golden_run()
def reward_kwise_plain(folder: Path) -> dict[str, Any]:
    trainer = reward_trainer(folder, comparison_rows(24), layout="plain", warmup_steps=2, weight_decay=0.01)
    expect(trainer.layout == "plain", "one row per completion")
    return finished_reward(trainer)


@golden_run()
def reward_micro_batches(folder: Path) -> dict[str, Any]:
    """Batches that are split by a token budget, two of them per step; also in evaluation."""
    evaluation = {"eval_dataset": Dataset.from_list(comparison_rows(10, seed=1))}
    trainer = reward_trainer(
        folder,
        comparison_rows(32),
        arguments=evaluation,
        layout="plain",
        max_tokens_per_batch=150,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=4,
    )
    return finished_reward(trainer)


@golden_run()
def reward_ties_and_margins(folder: Path) -> dict[str, Any]:
    """Ties of Rao and Kupper, with margins, label smoothing and centered rewards."""
    trainer = reward_trainer(
        folder,
        comparison_rows(24),
        tie_model="rao_kupper",
        tie_threshold=0.7,
        margin_scale=0.5,
        label_smoothing_factor=0.1,
        center_rewards_coefficient=0.05,
    )
    return finished_reward(trainer)


@golden_run()
def reward_davidson(folder: Path) -> dict[str, Any]:
    trainer = reward_trainer(folder, comparison_rows(24), tie_model="davidson", layout="shared_prefix", max_steps=4)
    return finished_reward(trainer)


@golden_run()
def reward_plackett_luce(folder: Path) -> dict[str, Any]:
    """Full rankings, and two evaluation sets."""
    sets = {"easy": Dataset.from_list(ranked_rows(8)), "hard": Dataset.from_list(comparison_rows(8, seed=2))}
    trainer = reward_trainer(
        folder,
        ranked_rows(24),
        arguments={"eval_dataset": sets},
        ranking_loss="plackett_luce",
        activation_checkpointing=True,
        eval_strategy="steps",
        eval_steps=4,
    )
    return finished_reward(trainer)


@golden_run()
def reward_full(folder: Path) -> dict[str, Any]:
    """Full fine-tuning on conversations, with a normalization that is measured on demonstrations."""
    demonstrations = []
    for row in chat_pair_rows(10):
        demonstrations.append({"messages": row["prompt"] + row["chosen"]})
    arguments = {"peft_config": None, "normalization_dataset": Dataset.from_list(demonstrations)}
    trainer = reward_trainer(
        folder, chat_pair_rows(24), arguments=arguments, learning_rate=1e-3, normalization_max_rows=8
    )
    return finished_reward(trainer)


@golden_run()
def reward_resumed(folder: Path) -> dict[str, Any]:
    """A run that resumes from a checkpoint in a new trainer. Prompts that are too long are cut."""
    rows = pair_rows(24)
    rows[3]["prompt"] = "Tell me about many words " * 6
    base = saved_base(folder)
    options = {"save_strategy": "steps", "save_steps": 3, "max_length": 48, "overflow": "truncate_prompt_left"}
    options["model_init_kwargs"] = {"dtype": "float32"}
    first = reward_trainer(folder, rows, arguments={"model": base, "callbacks": [StopAt(3)]}, **options)
    first.train()
    second = reward_trainer(folder, rows, arguments={"model": base}, **options)
    second.train(resume_from_checkpoint=True)
    return reward_outcome(second)


@golden_run()
def reward_ensemble(folder: Path) -> dict[str, Any]:
    """An ensemble of two members on one base."""
    base = saved_base(folder)
    members = []
    for seed in (0, 1):
        trainer = reward_adapter(folder, base, f"member-{seed}", seed)
        members.append(trainer.args.output_dir)
    values = {}
    for combine in ("mean", "min", "conservative"):
        ensemble = RewardEnsemble.from_pretrained(members, combine=combine, penalty=0.5, device="cpu")
        values[combine] = ensemble(SCORED_PROMPTS, SCORED_COMPLETIONS)
    values["members"] = ensemble.rewards(SCORED_PROMPTS, SCORED_COMPLETIONS).tolist()
    values["raw_mean"] = ensemble.raw(SCORED_PROMPTS, SCORED_COMPLETIONS)
    values["disagreement"] = ensemble.disagreement(SCORED_PROMPTS, SCORED_COMPLETIONS).tolist()
    expect(max(values["disagreement"]) > 0, "the members differ")
    export_merged(members[0], folder / "merged")  # its digest is compared with those of the other files
    return reward_outcome(trainer, **values)


@golden_run()
def reward_encoder(folder: Path) -> dict[str, Any]:
    """A random BERT, which returns one score per row."""
    config = BertConfig(
        vocab_size=len(ENCODER_VOCABULARY),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=40,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    base = folder / "base"
    BertModel(config).save_pretrained(base)
    BertTokenizer(vocab={word: number for number, word in enumerate(ENCODER_VOCABULARY)}).save_pretrained(base)
    # The tokenizer is loaded with the model, which gives encoders a chat template.
    arguments = {"model": load_base_model(str(base), task="reward", dtype="float32"), "processing_class": None}
    return finished_reward(reward_trainer(folder, chat_pair_rows(24), arguments=arguments))


@golden_run(processes=2)
def reward_two_processes(folder: Path) -> dict[str, Any]:
    evaluation = {"eval_dataset": Dataset.from_list(comparison_rows(10, seed=1))}
    trainer = reward_trainer(
        folder,
        comparison_rows(32),
        arguments=evaluation,
        per_device_train_batch_size=2,
        max_tokens_per_batch=150,
        eval_strategy="steps",
        eval_steps=4,
    )
    expect(trainer.accelerator.num_processes == 2, "two processes train")
    return finished_reward(trainer)


# ---- PPO runs ----


@golden_run()
def ppo_head_critic(folder: Path) -> dict[str, Any]:
    trainer = ppo_trainer(
        folder,
        critic="head",
        lr_scheduler_type="linear",
        weight_decay=0.01,
        entropy_coef=0.01,
        value_learning_rate=2e-2,
        value_clip_range=None,
    )
    return finished_ppo(trainer)


@golden_run()
def ppo_adapter_critic(folder: Path) -> dict[str, Any]:
    """The default critic, with a separate learning rate, and gamma below 1."""
    trainer = ppo_trainer(
        folder, critic="adapter", vf_coef=0.5, value_learning_rate=5e-3, gamma=0.95, whiten_advantages=False
    )
    return finished_ppo(trainer)


@golden_run()
def ppo_model_critic(folder: Path) -> dict[str, Any]:
    """Full fine-tuning: policy, reference and critic are separate models."""
    return finished_ppo(ppo_trainer(folder, arguments={"peft_config": None}, critic="model", learning_rate=1e-3))


@golden_run()
def ppo_from_paths(folder: Path) -> dict[str, Any]:
    """Policy, tokenizer and critic given by path, with full fine-tuning."""
    base = saved_base(folder)
    reward_folder = folder / "critic"
    tiny_reward_model().save_pretrained(reward_folder)
    make_tokenizer().save_pretrained(reward_folder)
    arguments = {
        "model": base,
        "processing_class": None,
        "peft_config": None,
        "value_model": str(reward_folder),
    }
    return finished_ppo(ppo_trainer(folder, arguments=arguments, learning_rate=1e-3, max_steps=8))


@golden_run()
def ppo_without_reference(folder: Path) -> dict[str, Any]:
    trainer = ppo_trainer(folder, kl_coef=0.0, max_kl=None)
    result = finished_ppo(trainer)
    expect(logged(trainer, "objective/kl") == [], "no KL is measured")
    return result


@golden_run()
def ppo_dora(folder: Path) -> dict[str, Any]:
    """DoRA on the attention and on the output head: adapters that cannot be scored jointly."""
    peft_config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "lm_head"], use_dora=True, task_type="CAUSAL_LM"
    )
    return finished_ppo(ppo_trainer(folder, arguments={"peft_config": peft_config}, joint_scoring=True))


@golden_run()
def ppo_value_model(folder: Path) -> dict[str, Any]:
    """A critic that starts from a reward model, with gradient checkpointing."""
    arguments = {"value_model": tiny_reward_model()}
    trainer = ppo_trainer(folder, arguments=arguments, critic="model", activation_checkpointing=True, max_steps=8)
    return finished_ppo(trainer)


@golden_run()
def ppo_adaptive_kl(folder: Path) -> dict[str, Any]:
    trainer = ppo_trainer(
        folder, arguments={"model": tiny_policy(10.0)}, kl_target=0.05, kl_horizon=60, kl_coef=0.2, max_steps=20
    )
    result = finished_ppo(trainer)
    expect(len(set(logged(trainer, "objective/kl_coef"))) == 5, "the coefficient changes with every rollout")
    return result


@golden_run()
def ppo_token_rewards(folder: Path) -> dict[str, Any]:
    """Token rewards and scores of whole completions, weighted and scaled."""
    arguments = {"reward_funcs": [token_reward, letter_reward]}
    trainer = ppo_trainer(folder, arguments=arguments, reward_weights=[1.0, 0.3], reward_scale=0.5, reward_clip=1.0)
    return finished_ppo(trainer)


@golden_run()
def ppo_ptx(folder: Path) -> dict[str, Any]:
    texts = [{"text": text} for text in TOKENIZER_TEXTS]
    trainer = ppo_trainer(
        folder,
        arguments={"ptx_dataset": Dataset.from_list(texts)},
        critic="head",
        ptx_coef=0.5,
        ptx_batch_size=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    result = finished_ppo(trainer)
    expect(len(logged(trainer, "loss/ptx")) == 12, "every step has a language-model loss")
    return result


@golden_run()
def ppo_kl_in_loss(folder: Path) -> dict[str, Any]:
    trainer = ppo_trainer(folder, kl_placement="loss", kl_estimator="k3", kl_coef=0.3)
    result = finished_ppo(trainer)
    expect(len(logged(trainer, "policy/kl_loss")) == 12, "KL is part of the loss")
    return result


@golden_run()
def ppo_rollback(folder: Path) -> dict[str, Any]:
    """The policy exceeds `max_kl` after step 10, and weights and optimizer of step 8 are restored once."""
    trainer = ppo_trainer(
        folder,
        arguments={"model": tiny_policy(30.0), "callbacks": [Jump(10)]},
        critic="head",
        max_steps=20,
        learning_rate=3e-3,
        kl_coef=0.01,
        max_kl=5.0,
        max_kl_action="rollback",
        save_strategy="steps",
        save_steps=4,
        save_total_limit=2,
    )
    result = finished_ppo(trainer)
    coefficients = logged(trainer, "objective/kl_coef")
    # Rollouts of steps 0, 4 and 8, the mean of the one above `max_kl` and its repetition, and one of step 16.
    expect(coefficients == [0.01, 0.01, 0.01, 0.015, 0.02], f"kl_coef is doubled once, got {coefficients}")
    expect(not result["values"]["stopped"], "training continues after the rollback")
    return result


@golden_run()
def ppo_rollbacks_end(folder: Path) -> dict[str, Any]:
    """The policy exceeds `max_kl` repeatedly: after three rollbacks training stops with the weights of a checkpoint."""
    trainer = ppo_trainer(
        folder,
        arguments={"model": tiny_policy(30.0), "callbacks": [Jump(10, 14, 18, 22, 26)]},
        max_steps=32,
        learning_rate=3e-3,
        kl_coef=0.01,
        max_kl=5.0,
        max_kl_action="rollback",
        save_strategy="steps",
        save_steps=4,
    )
    result = finished_ppo(trainer)
    expect(result["values"]["stopped"] and trainer.state.global_step == 25, "training ends after three rollbacks")
    return result


@golden_run()
def ppo_kl_ceiling(folder: Path) -> dict[str, Any]:
    """The policy exceeds `max_kl`, and training stops."""
    arguments = {"model": tiny_policy(30.0), "callbacks": [Jump(6)]}
    trainer = ppo_trainer(folder, arguments=arguments, learning_rate=3e-3, kl_coef=0.01, max_kl=5.0)
    result = finished_ppo(trainer)
    expect(result["values"]["stopped"] and trainer.state.global_step == 9, "training stops at the next rollout")
    return result


@golden_run()
def ppo_raised_coefficient(folder: Path) -> dict[str, Any]:
    arguments = {"model": tiny_policy(30.0), "callbacks": [Jump(6)]}
    trainer = ppo_trainer(
        folder, arguments=arguments, learning_rate=3e-3, kl_coef=0.01, max_kl=5.0, max_kl_action="raise_kl_coef"
    )
    result = finished_ppo(trainer)
    expect(max(logged(trainer, "objective/kl")) > 5.0, "the policy exceeds max_kl")
    return result


@golden_run()
def ppo_skipped_step(folder: Path) -> dict[str, Any]:
    """The gradients of step 3 are not finite, so the step is skipped."""
    trainer = ppo_trainer(folder, arguments={"callbacks": [SpoilGradients(3)]}, weight_decay=0.1, max_steps=8)
    result = finished_ppo(trainer)
    expect(logged(trainer, "guards/skipped_steps") == [0, 0, 1, 0, 0, 0, 0, 0], "step 3 is skipped")
    return result


@golden_run()
def ppo_skipped_steps_end(folder: Path) -> dict[str, Any]:
    """Three consecutive steps with non-finite gradients stop training."""
    arguments = {"callbacks": [SpoilGradients(2, 3, 5, 6, 7, 8)]}
    trainer = ppo_trainer(folder, arguments=arguments, critic="head", max_skipped_steps=3)
    result = finished_ppo(trainer)
    expect(result["values"]["stopped"] and trainer.state.global_step == 7, "training ends after step 7")
    return result


@golden_run()
def ppo_broken_weights(folder: Path) -> dict[str, Any]:
    """Weights are not finite: those of the last good checkpoint are restored, and training stops."""
    arguments = {"callbacks": [Break(8)]}
    trainer = ppo_trainer(folder, arguments=arguments, save_strategy="steps", save_steps=4)
    result = finished_ppo(trainer)
    finite = all(bool(torch.isfinite(weight).all()) for weight in trainer.model.parameters())
    expect(result["values"]["stopped"] and finite, "training ends with finite weights")
    return result


@golden_run()
def ppo_early_stop(folder: Path) -> dict[str, Any]:
    """The passes over a rollout end early when the policy has moved too far from the one that made it."""
    trainer = ppo_trainer(folder, arguments={"model": tiny_policy(10.0)}, early_stop_kl=0.02, num_ppo_epochs=4)
    result = finished_ppo(trainer)
    expect(set(logged(trainer, "policy/stopped_early")) == {0.0, 1.0}, "some rollouts end early")
    return result


@golden_run()
def ppo_evaluation(folder: Path) -> dict[str, Any]:
    """Evaluations with a further reward. The best weights are loaded at the end."""
    arguments = {"eval_dataset": prompt_rows().select(range(5)), "eval_reward_funcs": length_reward}
    trainer = ppo_trainer(
        folder,
        arguments=arguments,
        critic="head",
        per_device_eval_batch_size=3,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
    )
    result = finished_ppo(trainer)
    rows = trainer.sample_and_score(other_prompt_rows(), seed=11)
    names = ("completion", "score", "rewards", "kl", "kl_k3", "n_tokens", "stopped", "completion_ids")
    result["values"]["samples"] = [{name: getattr(row, name) for name in names} for row in rows]
    result["values"]["best_global_step"] = trainer.state.best_global_step
    expect(len(logged(trainer, "eval_rewards/length_reward/mean")) == 6, "six evaluations")
    return result


def other_prompt_rows() -> Dataset:
    return Dataset.from_dict({"prompt": ["Tell me about", "The lazy dog", "many numbers"]})


@golden_run()
def ppo_shaped_scores(folder: Path) -> dict[str, Any]:
    """All options that change the score of a completion."""
    trainer = ppo_trainer(
        folder,
        normalize_rewards=True,
        reward_clip=1.0,
        length_penalty=0.05,
        length_target=3,
        missing_eos_penalty=0.5,
    )
    result = finished_ppo(trainer)
    expect(max(logged(trainer, "rewards/clipped_frac")) > 0, "some scores are clipped")
    expect(min(logged(trainer, "completions/stopped_frac")) < 1, "some completions have no stop token")
    return result


@golden_run()
def ppo_token_budget(folder: Path) -> dict[str, Any]:
    """Forward passes of at most 40 tokens in scoring and training, with gradient accumulation."""
    trainer = ppo_trainer(
        folder,
        max_tokens_per_batch=40,
        gradient_accumulation_steps=2,
        logprobs_chunk_size=5,
        generation_batch_size=5,
        max_grad_norm=0.5,
    )
    return finished_ppo(trainer)


@golden_run()
def ppo_resumed(folder: Path) -> dict[str, Any]:
    """Resumes from a checkpoint in the middle of a rollout, in a new trainer."""
    options = {
        "max_steps": 12,
        "save_strategy": "steps",
        "save_steps": 6,
        "lr_scheduler_type": "linear",
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "weight_decay": 0.01,
        "normalize_rewards": True,
        "kl_target": 0.05,
        "kl_horizon": 40,
        "kl_coef": 0.2,
    }
    first = ppo_trainer(folder, arguments={"callbacks": [StopAt(6)]}, **options)
    first.train()
    rollout_files = list(Path(first.args.output_dir).glob("checkpoint-6/*rollout*"))
    expect(len(rollout_files) == 1, "the checkpoint has the current rollout")
    torch.rand(7)  # a new process may have drawn random numbers before
    second = ppo_trainer(folder, **options)
    second.train(resume_from_checkpoint=True)
    second.save_model()
    expect(len(logged(second, "loss")) == 12, "the log has the steps of both trainers")
    return outcome(second, stopped=attribute(second, "stop_reason") is not None)


@golden_run()
def ppo_shared_reward(folder: Path) -> dict[str, Any]:
    """The reward adapter shares the policy's base, and the critic starts from it."""
    base = saved_base(folder)
    reward_folder = reward_adapter(folder, base, "member").args.output_dir
    arguments = {"model": load_base_model(base, dtype="float32"), "reward_funcs": reward_folder}
    trainer = ppo_trainer(folder, arguments=arguments, critic="adapter")
    names = [name for name in trainer.model.state_dict() if ".reward." in name]
    expect(len(names) > 0, "the policy's base has the reward adapter")
    return finished_ppo(trainer)


@golden_run()
def ppo_reward_models(folder: Path) -> dict[str, Any]:
    """An ensemble of two reward models on a separate base. The evaluation also uses one of them alone."""
    base = saved_base(folder)
    members = [reward_adapter(folder, base, f"member-{seed}", seed).args.output_dir for seed in (0, 1)]
    ensemble = RewardEnsemble.from_pretrained(members, combine="conservative", penalty=0.5, device="cpu")
    arguments = {
        "reward_funcs": [ensemble, letter_reward],
        "eval_reward_funcs": RewardScorer.from_pretrained(members[0], device="cpu"),
        "eval_dataset": prompt_rows(),
    }
    trainer = ppo_trainer(folder, arguments=arguments, reward_weights=[1.0, 0.1], max_steps=8)
    trainer.train()
    trainer.evaluate()
    expect(len(logged(trainer, "reward_disagreement")) > 0, "the ensemble logs its disagreement")
    return outcome(trainer, stopped=attribute(trainer, "stop_reason") is not None)


@golden_run()
def ppo_sft_adapter(folder: Path) -> dict[str, Any]:
    """Trains a LoRA further on conversations, with a frozen copy as the reference and joint scoring."""
    torch.manual_seed(1)
    policy = get_peft_model(tiny_policy(), lora("CAUSAL_LM"))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:  # zero in a new adapter; not zero in one that was trained
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    arguments = {
        "model": policy,
        "peft_config": None,
        "train_dataset": chat_rows(),
        "reward_funcs": chat_letter_reward,
    }
    return finished_ppo(ppo_trainer(folder, arguments=arguments, joint_scoring=True))


@golden_run()
def ppo_sampling(folder: Path) -> dict[str, Any]:
    """Sampling that differs from the policy's distribution, and an async reward without scores for some completions."""
    arguments = {"model": tiny_policy(10.0), "reward_funcs": [partial_reward, letter_reward]}
    trainer = ppo_trainer(
        folder,
        arguments=arguments,
        temperature=0.8,
        top_k=50,
        top_p=0.9,
        generation_kwargs={"min_p": 0.01},
        importance_sampling_correction=True,
        importance_sampling_cap=0.55,  # below 1, as top-k and top-p make the tokens that they keep more likely
        generation_batch_size=3,
        merge_for_generation=False,
    )
    result = finished_ppo(trainer)
    expect(max(logged(trainer, "partial/unscored")) > 0, "some completions have no score from one function")
    return result


@golden_run(processes=2)
def ppo_two_processes(folder: Path) -> dict[str, Any]:
    arguments = {"eval_dataset": prompt_rows().select(range(5)), "reward_funcs": [token_reward, letter_reward]}
    trainer = ppo_trainer(
        folder,
        arguments=arguments,
        critic="adapter",
        per_device_train_batch_size=2,
        kl_target=0.5,
        kl_horizon=32,
        early_stop_kl=0.5,
        normalize_rewards=True,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=6,
    )
    expect(trainer.accelerator.num_processes == 2, "two processes train")
    return finished_ppo(trainer)


@golden_run(processes=2)
def ppo_two_processes_resumed(folder: Path) -> dict[str, Any]:
    """PPO-ptx with gradient accumulation in two processes, resumed in the middle of a rollout."""
    texts = [{"text": text} for text in TOKENIZER_TEXTS]
    options = {
        "critic": "head",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_tokens_per_batch": 40,
        "ptx_coef": 0.5,
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 6,
        "missing_eos_penalty": 0.5,
    }
    arguments = {"ptx_dataset": Dataset.from_list(texts)}
    first = ppo_trainer(folder, arguments=arguments | {"callbacks": [StopAt(6)]}, **options)
    first.train()
    second = ppo_trainer(folder, arguments=arguments, **options)
    second.train(resume_from_checkpoint=True)
    second.save_model()
    expect(len(logged(second, "loss")) == 8, "the log has the steps of both trainers")
    return outcome(second, stopped=attribute(second, "stop_reason") is not None)
