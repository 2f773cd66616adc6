"""Options of `PPOTrainer`."""

from dataclasses import dataclass, field

from ..compat import BaseConfig
from ..errors import UserError, renamed_options
from .kl import KL_ESTIMATORS

CHOICES = {
    "critic": ("adapter", "head", "model"),
    "kl_placement": ("reward", "loss"),
    "kl_estimator": tuple(KL_ESTIMATORS),
    "max_kl_action": ("stop", "raise_kl_coef", "rollback"),
}

# Ranges of the options, by what is wrong outside of them.
AT_LEAST_1 = (
    "max_completion_length",
    "num_ppo_epochs",
    "num_mini_batches",
    "kl_horizon",
    "ptx_batch_size",
    "logprobs_chunk_size",
    "generation_batch_size",
    "max_tokens_per_batch",
    "max_skipped_steps",
    "warn_every",
)
NOT_NEGATIVE = (
    "ptx_coef",
    "kl_coef",
    "length_target",
    "exact_kl_rows",
    "vf_coef",
    "top_k",
    "missing_eos_penalty",
)
FRACTIONS = ("gamma", "gae_lambda", "top_p")
_NO_LIMIT = ", got {}: leave it out for no limit."
POSITIVE = {
    "clip_range": ", got {}.",
    "top_p": ", got {}.",
    "temperature": ", got {}: PPO needs sampled completions.",
    "kl_target": " nats, got {}. For a fixed kl_coef, leave it out.",
    "max_kl": _NO_LIMIT,
    "early_stop_kl": _NO_LIMIT,
    "importance_sampling_cap": _NO_LIMIT,
    "reward_clip": _NO_LIMIT,
    "value_clip_range": _NO_LIMIT,
}
"""Option -> how the message goes on after "must be positive", with the value."""

OWN_SAMPLING_OPTIONS = {"max_new_tokens", "temperature", "top_p", "top_k", "eos_token_id", "pad_token_id"}
"""What `generation_kwargs` must not hold."""

RENAMED_OPTIONS = {"target_kl": "early_stop_kl", "mixed_pass": "joint_scoring"}
"""Options of version 0.1.0 under other names; using one says the new name."""


@renamed_options(RENAMED_OPTIONS)
@dataclass
class PPOConfig(BaseConfig):
    """Options of [`PPOTrainer`], beside those of `transformers.TrainingArguments`.

    One *rollout* is `per_device_train_batch_size × gradient_accumulation_steps × num_mini_batches` completions a
    process. Each of its `num_ppo_epochs` passes takes `num_mini_batches` optimizer steps; `max_steps`, `save_steps`,
    `eval_steps` and `logging_steps` count optimizer steps. Without `max_steps`, `num_train_epochs` counts passes over
    the prompts.

    Defaults that differ from `TrainingArguments`: those of TRL's trainers (bf16, gradient checkpointing on, logs every
    10 steps) and `learning_rate` 1e-5.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "Initial learning rate of AdamW for the policy."})
    critic: str | None = field(
        default=None,
        metadata={
            "help": "What estimates values: `adapter` (its own on the policy's base, which starts from the reward "
            "adapter where there is one), `head` (a scalar head on the policy: one forward pass less), or `model` "
            "(`value_model`, or a copy of a policy that is trained whole). If `None`, `adapter` where the policy is an "
            "adapter, else `head`."
        },
    )
    value_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the critic. If `None`, `learning_rate`."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Turn dropout off, so that the first ratio of an update is exactly 1."}
    )

    trust_remote_code: bool = field(default=False, metadata={"help": "Run Python code that comes with a model."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True,
        metadata={"help": "Early stopping and the memory of health warnings go on where the checkpoint was saved."},
    )

    # Rollouts
    max_completion_length: int = field(
        default=256, metadata={"help": "Most new tokens of a completion, the stop token included."}
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Most tokens of a prompt; a longer one is an error that names its row. If `None`, no limit "
                          "but the model's positions."},
    )  # fmt: skip
    temperature: float = field(
        default=1.0, metadata={"help": "Sampling temperature; log-probabilities are taken after it, as in GRPO."}
    )
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling; 1.0 considers every token."})
    top_k: int = field(default=0, metadata={"help": "Tokens considered at each step; 0 considers every token."})
    generation_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Further fields of `GenerationConfig` for rollouts."}
    )
    stop_token_ids: list[int] | None = field(
        default=None,
        metadata={
            "help": "Ids that end a completion. If `None`, the tokenizer's eos and the model's generation config's."
        },
    )
    generation_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Prompts that generate at one time, of similar length. If `None`, the whole rollout, in its order."
        },
    )
    merge_for_generation: bool = field(
        default=True,
        metadata={
            "help": "Generate from weights with the adapter merged in (faster); they are restored to the bit after. "
            "Never done on a quantized base, where merging would re-quantize it."
        },
    )

    # Rewards
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function in the sum. If `None`, 1 each."}
    )
    reward_scale: float = field(default=1.0, metadata={"help": "Factor on every score and token reward."})
    normalize_rewards: bool = field(
        default=False,
        metadata={
            "help": "Shift and scale scores by the mean and deviation of all rollouts so far, this one included."
        },
    )
    reward_clip: float | None = field(
        default=None,
        metadata={"help": "Scores are clipped to ± this, after scaling and normalization. If `None`, not clipped."},
    )
    missing_eos_penalty: float | None = field(
        default=None,
        metadata={"help": "Taken off the score of a completion that has no stop token. If `None`, nothing."},
    )

    length_penalty: float = field(
        default=0.0, metadata={"help": "Taken off the score for every token of a completion beyond `length_target`."}
    )
    length_target: int = field(default=0, metadata={"help": "Tokens of a completion that cost nothing."})

    # KL penalty
    kl_coef: float = field(
        default=0.05, metadata={"help": "β: reward per nat of KL(policy || reference); the start value if it adapts."}
    )
    kl_placement: str = field(
        default="reward",
        metadata={"help": "`reward`: −β·KL is a reward of each token (InstructGPT); `loss`: β·KL is part of the loss."},
    )
    kl_estimator: str | None = field(
        default=None,
        metadata={
            "help": "Per-token estimator of that KL: k1, k2 or k3 (Schulman 2020). If `None`, k1 in the reward, k2 in "
            "the loss."
        },
    )
    kl_target: float | None = field(
        default=None,
        metadata={
            "help": "Target KL(policy || reference) per completion, in nats: the mean over completions of the sum over "
            "tokens. `kl_coef` adapts towards it (Ziegler et al. 2019, arXiv:1909.08593). If `None`, it is fixed."
        },
    )
    kl_horizon: int | None = field(
        default=None,
        metadata={
            "help": "Completions over which an error of ±0.2, the clip, moves `kl_coef` by a factor e^±0.2. If `None`, "
            "those of ten rollouts: Ziegler et al. took 10000 for runs of millions of completions."
        },
    )

    max_kl: float | None = field(
        default=100.0,
        metadata={
            "help": "Hard ceiling on KL(policy || reference) of a rollout, nats per completion; `None`: no ceiling."
        },
    )
    max_kl_action: str = field(
        default="stop",
        metadata={
            "help": "Above `max_kl`: `stop` training, `raise_kl_coef` (double it), or `rollback` to the last "
            "checkpoint below it, and double `kl_coef`."
        },
    )
    exact_kl_rows: int = field(
        default=4,
        metadata={"help": "Completions of an evaluation whose KL is also computed over the whole vocabulary."},
    )

    # PPO
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over each rollout."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimizer steps in each pass over a rollout."})
    clip_range: float = field(default=0.2, metadata={"help": "ε of the clipped surrogate."})
    value_clip_range: float | None = field(
        default=0.2, metadata={"help": "How far values may move from the rollout's; `None` turns the clip off."}
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy bonus."})
    gamma: float = field(default=1.0, metadata={"help": "Discount per token."})
    gae_lambda: float = field(default=0.95, metadata={"help": "λ of generalized advantage estimation."})
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Scale advantages to mean 0 and variance 1 over the whole rollout."}
    )
    early_stop_kl: float | None = field(
        default=None,
        metadata={
            "help": "Leave a rollout for the next one after an optimizer step whose KL from the policy that made it is "
            "larger, in nats per token (k3). If `None`, all inner epochs are run."
        },
    )
    ptx_coef: float = field(
        default=0.0,
        metadata={"help": "γ of PPO-ptx (InstructGPT): weight of the language-model loss on `ptx_dataset`."},
    )
    ptx_batch_size: int | None = field(
        default=None, metadata={"help": "Its rows in each optimizer step. If `None`, as many as completions."}
    )
    importance_sampling_correction: bool = field(
        default=False,
        metadata={
            "help": "Weight each token's loss by its probability under the policy over the sampler's: for "
            "top-k, top-p, or an engine whose numbers differ."
        },
    )
    importance_sampling_cap: float = field(default=2.0, metadata={"help": "Largest such weight."})

    # Memory and guards
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens, padding included, of a forward pass in scoring and training; batches are split, and "
            "their gradients stay the same. If `None`, `per_device_train_batch_size` alone decides."
        },
    )
    joint_scoring: bool | None = field(
        default=None,
        metadata={
            "help": "Score policy, reference and value in one pass where adapters are LoRA. If `None`, on a GPU only: "
            "a CPU gains nothing."
        },
    )
    max_skipped_steps: int = field(
        default=5,
        metadata={"help": "Optimizer steps with gradients that are not finite, in a row, before training ends."},
    )
    warn_every: int = field(
        default=20, metadata={"help": "Rollouts between two warnings of the same kind about how training goes."}
    )
    logprobs_chunk_size: int = field(
        default=128, metadata={"help": "Completion tokens whose logits exist at one time; lower it to save memory."}
    )

    # Logging
    log_completions: bool = field(default=False, metadata={"help": "Print a sample of completions at each log."})
    num_completions_to_print: int = field(default=4, metadata={"help": "Completions in that sample."})

    _VALID_DICT_FIELDS = [*BaseConfig._VALID_DICT_FIELDS, "generation_kwargs"]

    def __post_init__(self):
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.save_strategy == "best"):
            self.metric_for_best_model = "objective/scores"  # Transformers' own choice is a loss
        if self.greater_is_better is None and "objective/kl" in (self.metric_for_best_model or ""):
            self.greater_is_better = False
        super().__post_init__()
        self._check_ranges()
        self._check_trainer_options()
        self._check_combinations()

    def _check_ranges(self) -> None:
        for name in AT_LEAST_1:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}.")
        for name in NOT_NEGATIVE:
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UserError(f"{name} must not be negative, got {value}.")
        for name in FRACTIONS:
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UserError(f"{name} must be between 0 and 1, got {value}.")
        for name, remedy in POSITIVE.items():
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"{name} must be positive{remedy.format(value)}")
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in (None, *allowed):
                raise UserError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")

    def _check_combinations(self) -> None:
        clashes = OWN_SAMPLING_OPTIONS & set(self.generation_kwargs or ())
        if clashes:
            raise UserError(
                f"generation_kwargs: {sorted(clashes)[0]} has an option of its own in PPOConfig: set that one."
            )
        if self.kl_target is not None and self.kl_coef <= 0:
            raise UserError("kl_coef must be positive when kl_target is set: the controller multiplies it.")
        if self.max_kl is not None and self.max_kl_action == "raise_kl_coef" and self.kl_coef <= 0:
            raise UserError("max_kl_action: raise_kl_coef doubles kl_coef, which is 0: set it, or choose stop.")
        if self.kl_placement == "loss" and self.kl_estimator == "k1":
            raise UserError("kl_estimator: the gradient of k1 in the loss is zero in expectation: choose k2 or k3.")

    def _check_trainer_options(self) -> None:
        for name in ("eval_strategy", "save_strategy", "logging_strategy"):
            if getattr(self, name) == "epoch":
                steps = name.replace("strategy", "steps")
                raise UserError(f"{name}='epoch': PPO is one epoch of rollouts: set {name}='steps' and {steps}.")
        if self.metric_for_best_model in ("loss", "eval_loss"):
            raise UserError(
                f"metric_for_best_model={self.metric_for_best_model!r}: PPO's evaluation has no loss: take "
                "objective/scores, or rewards/NAME/mean of a reward function."
            )

    @property
    def estimator(self) -> str:
        """The name of the KL estimator in use."""
        return self.kl_estimator or ("k1" if self.kl_placement == "reward" else "k2")

    @property
    def minibatch_size(self) -> int:
        """Completions of one optimizer step on this process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def rollout_size(self) -> int:
        """Completions of one rollout on this process."""
        return self.minibatch_size * self.num_mini_batches

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps taken on one rollout."""
        return self.num_ppo_epochs * self.num_mini_batches
