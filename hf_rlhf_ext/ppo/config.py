"""Options of `PPOTrainer`."""

from dataclasses import dataclass, field

from ..compat import BaseConfig
from ..errors import UserError
from .kl import KL_ESTIMATORS


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
    value_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the value head. If `None`, `learning_rate`."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Turn dropout off, so that the first ratio of an update is exactly 1."}
    )

    trust_remote_code: bool = field(default=False, metadata={"help": "Run Python code that comes with a model."})

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
    merge_for_generation: bool = field(
        default=True,
        metadata={
            "help": "Generate from weights with the adapter merged in (faster); they are restored to the bit after. "
            "Never done on a quantised base, where merging would re-quantise it."
        },
    )

    # Rewards
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function in the sum. If `None`, 1 each."}
    )
    reward_clip: float | None = field(
        default=None, metadata={"help": "Scores are clipped to ± this, in units of reward. If `None`, not clipped."}
    )
    missing_eos_penalty: float | None = field(
        default=None,
        metadata={"help": "Taken off the score of a completion that has no stop token. If `None`, nothing."},
    )

    # KL leash
    kl_coef: float = field(
        default=0.05, metadata={"help": "β: reward per nat of KL(policy || reference); the start value if it adapts."}
    )
    kl_estimator: str = field(
        default="k1", metadata={"help": "Per-token estimator of the KL in the reward: k1, k2 or k3 (Schulman 2020)."}
    )
    kl_target: float | None = field(
        default=None,
        metadata={
            "help": "Target KL(policy || reference) per completion, in nats: the mean over completions of the sum over "
            "tokens. `kl_coef` adapts towards it (Ziegler et al. 2019, arXiv:1909.08593). If `None`, it is fixed."
        },
    )
    kl_horizon: int = field(
        default=10000,
        metadata={"help": "Completions over which an error of ±0.2, the clip, moves `kl_coef` by a factor e^±0.2."},
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
    gae_lambda: float = field(default=0.95, metadata={"help": "λ of generalised advantage estimation."})
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Scale advantages to mean 0 and variance 1 over the whole rollout."}
    )
    logprobs_chunk_size: int = field(
        default=128, metadata={"help": "Completion tokens whose logits exist at one time; lower it to save memory."}
    )

    # Logging
    log_completions: bool = field(default=False, metadata={"help": "Print a sample of completions at each log."})
    num_completions_to_print: int = field(default=4, metadata={"help": "Completions in that sample."})

    _VALID_DICT_FIELDS = [*BaseConfig._VALID_DICT_FIELDS, "generation_kwargs"]

    def __post_init__(self):
        super().__post_init__()
        sizes = ("max_completion_length", "num_ppo_epochs", "num_mini_batches", "kl_horizon", "logprobs_chunk_size")
        for name in sizes:
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if clash := {"max_new_tokens", "temperature", "top_p", "top_k", "eos_token_id", "pad_token_id"} & set(
            self.generation_kwargs or ()
        ):
            raise UserError(
                f"generation_kwargs: {sorted(clash)[0]} has an option of its own in PPOConfig: set that one."
            )
        if self.temperature <= 0:
            raise UserError(f"temperature must be positive, got {self.temperature}: PPO needs sampled completions.")
        if self.kl_target is not None and self.kl_target <= 0:
            raise UserError(
                f"kl_target must be positive nats, got {self.kl_target}. For a fixed kl_coef, leave it out."
            )
        if self.kl_target is not None and self.kl_coef <= 0:
            raise UserError("kl_coef must be positive when kl_target is set: the controller multiplies it.")
        if self.kl_estimator not in KL_ESTIMATORS:
            raise UserError(f"kl_estimator must be one of {', '.join(KL_ESTIMATORS)}, got {self.kl_estimator!r}.")

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
