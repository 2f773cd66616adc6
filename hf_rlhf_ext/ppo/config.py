"""Options of `PPOTrainer`."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from numbers import Integral

from ..compat import BaseConfig
from ..data.tokenization import UNRENDERABLES
from ..errors import UserError, renamed_options
from ..training.config_checks import checked_options
from ..training.engines import refuse_loading_in_one_process
from ..training.option_values import check_ranges
from .generation_options import check_generation_kwargs
from .kl import KL_ESTIMATORS
from .trainer_options import ENGINES, REFUSED_OPTIONS, UNUSED_OPTIONS, check_ppo_options

CHOICES = {
    "critic": ("adapter", "head", "model", "none"),
    "critic_start": ("reward", "reward_features", "policy"),
    "kl_placement": ("reward", "loss"),
    "kl_estimator": tuple(KL_ESTIMATORS),
    "unrenderable": UNRENDERABLES,
    "max_kl_action": ("stop", "raise_kl_coef", "rollback"),
    "reward_shaping": ("par",),
}

# The valid range of each option.
_AT_LEAST_1 = (
    "max_completion_length",
    "max_prompt_length",
    "num_ppo_epochs",
    "num_mini_batches",
    "num_generations",
    "kl_horizon",
    "ptx_batch_size",
    "logprobs_chunk_size",
    "generation_batch_size",
    "max_skipped_steps",
    "warn_every",
    "num_reference_answers",
    "soft_overlong_tokens",
)
_NOT_NEGATIVE = (
    "ptx_coef",
    "kl_coef",
    "length_target",
    "exact_kl_rows",
    "vf_coef",
    "top_k",
    "missing_eos_penalty",
    "value_learning_rate",
    "critic_warmup_steps",
    "num_completions_to_print",
)
_FRACTIONS = ("gamma", "gae_lambda", "value_gae_lambda", "top_p")
OF_CRITIC = (
    "value_learning_rate",
    "value_clip_range",
    "vf_coef",
    "critic_start",
    "value_gae_lambda",
    "length_adaptive_lambda",
)
"""Options that nothing reads if there is no critic."""
_OF_RETURNS = ("gamma", "gae_lambda")
"""Options that, unless they are 1, say something else than what a return is without a critic: a plain sum."""
_OF_OTHERS = {
    "soft_overlong_weight": "soft_overlong_tokens",
    "reference_answers": "reward_shaping",
    "num_reference_answers": "reward_shaping",
}
"""Options that nothing reads unless another one is set: option -> the other one."""
_NO_LIMIT = "set it to None for no limit"
_LIMITS = {
    "max_kl": _NO_LIMIT,
    "early_stop_kl": _NO_LIMIT,
    "importance_sampling_cap": "choose a large number for no limit",
    "reward_clip": _NO_LIMIT,
    "value_clip_range": _NO_LIMIT,
}
_POSITIVE = {
    "clip_range": "",
    "clip_range_high": "leave it out for clip_range on both sides",
    "soft_overlong_weight": "leave soft_overlong_tokens out for no penalty",
    "top_p": "",
    "temperature": "PPO needs sampled completions, so greedy decoding is not supported",
    "kl_target": "leave it out for a fixed kl_coef",
    "length_adaptive_lambda": "leave it out for a fixed gae_lambda",
    **_LIMITS,
}
"""Option -> the remedy."""

RENAMED_OPTIONS = {"target_kl": "early_stop_kl", "mixed_pass": "joint_scoring"}
"""Options of version 0.1.0 that have a new name: old -> new. Using an old name is an error that states the new one."""


@renamed_options(RENAMED_OPTIONS)
@dataclass
class PPOConfig(BaseConfig):
    """Options of `PPOTrainer`, in addition to those of `transformers.TrainingArguments`.

    One *rollout* has `per_device_train_batch_size × gradient_accumulation_steps × num_mini_batches` completions per
    process, `num_generations` of each prompt. PPO makes `num_ppo_epochs` passes over each rollout and takes
    `num_mini_batches` optimizer steps in each pass. `max_steps`, `save_steps`, `eval_steps` and `logging_steps` count
    optimizer steps. If `max_steps` is not set, `num_train_epochs` counts passes over the prompts.

    The defaults that differ from `TrainingArguments` are those of TRL's trainers (bf16, gradient checkpointing, a log
    every 10 steps) and `learning_rate` = 1e-5. Each option is described in its field's `help`, which
    `hf-rlhf ppo --help-all` prints.

    Raises:
        UserError: if an option is outside of its range, if options contradict each other, or if an option has an old
            name.
    """

    unused_options = UNUSED_OPTIONS
    refused_options = REFUSED_OPTIONS

    learning_rate: float = field(
        default=1e-5, metadata={"help": "Initial learning rate of the optimizer (AdamW by default) for the policy."}
    )
    critic: str | None = field(
        default=None,
        metadata={
            "choices": list(CHOICES["critic"]),
            "help": "Kind of critic, which estimates values. `adapter`: a separate adapter on the policy's base model; "
            "it starts from the reward adapter if there is one. `head`: a scalar head on the policy, which saves a "
            "forward pass. `model`: a separate model, `value_model` or a copy of a fully trained policy. `none`: no "
            "critic; the baseline of a completion is the mean return of the other completions of its prompt (RLOO, "
            "Ahmadian et al. 2024, arXiv:2402.14740), of which `num_generations` must be 2 or more. If `None`: "
            "`model` if `value_model` is given, `adapter` if the policy is an adapter, and `head` otherwise.",
        },
    )
    value_learning_rate: float | None = field(
        default=None, metadata={"help": "Initial learning rate of the critic. If `None`, `learning_rate` is used."}
    )
    critic_start: str | None = field(
        default=None,
        metadata={
            "choices": list(CHOICES["critic_start"]),
            "help": "Weights that the critic starts from. `reward`: the reward adapter and its score head, as in "
            "InstructGPT. `reward_features`: the reward adapter with a head of zeros. `policy`: a copy of the policy "
            "with a head of zeros. With `critic='model'`, the first two take `value_model` as the reward model. If "
            "`None`: `reward` if there is a reward adapter on the policy's base model (with `critic='model'`: "
            "`value_model` as it is), else `policy`.",
        },
    )
    critic_warmup_steps: int = field(
        default=0,
        metadata={
            "help": "Number of optimizer steps at the start that train the critic only, rounded up to whole rollouts; "
            "the policy stays as it is. Until then the critic learns the plain returns (λ = 1) of its completions "
            "(VC-PPO, Yuan et al. 2025, arXiv:2503.01491). They count in `max_steps` and in the learning-rate "
            "schedule. 0 trains both from the first step on."
        },
    )
    disable_dropout: bool = field(
        default=True,
        metadata={
            "help": "Turn dropout off, so that the probability ratio of policy and old policy is exactly 1 at the "
            "first optimizer step on a rollout."
        },
    )

    check_first_rollout: bool = field(
        default=True,
        metadata={
            "help": "Check the first rollout of a new run: the log-probabilities of training equal those of the "
            "rollout, the sampler samples from the policy that is scored, and the KL to the reference is 0 where the "
            "reference is the policy at the start. If they differ by more than rounding explains, the run stops with "
            "an error that names the usual causes."
        },
    )

    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code from the repository of a model, as in Transformers."}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True,
        metadata={
            "help": "When a run resumes, restore the state of its callbacks, such as early stopping and the health "
            "warnings, from the checkpoint."
        },
    )

    # ---- Rollouts ----

    num_generations: int = field(
        default=1,
        metadata={
            "help": "Number of completions per prompt in a rollout, as in GRPO. With more than one, a prompt passes "
            "through the models once for all of its completions, where their attention allows it. Batch sizes count "
            "completions, so `per_device_train_batch_size` must be divisible by it; `num_train_epochs` counts passes "
            "over the prompts. An evaluation samples one completion per prompt, whatever the value."
        },
    )
    max_completion_length: int = field(
        default=256, metadata={"help": "Maximum length of a completion in tokens, including the stop token."}
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={
            "help": "Maximum length of a prompt in tokens. A longer prompt is an error that names its row. If `None`, "
            "only the number of positions of the model limits it."
        },
    )
    unrenderable: str = field(
        default="error",
        metadata={
            "help": "What to do with a row that the chat template cannot render, such as one with a system message for "
            "a template that takes none. `error`: stop with an error that names the row. `drop`: leave the row out; "
            "such rows are counted and logged.",
            "choices": list(UNRENDERABLES),
        },
    )
    temperature: float = field(
        default=1.0,
        metadata={"help": "Sampling temperature. Log-probabilities are computed at this temperature too, as in GRPO."},
    )
    top_p: float = field(
        default=1.0,
        metadata={
            "help": "Nucleus sampling: sample from the most probable tokens whose total probability reaches this "
            "value. 1.0 samples from all tokens."
        },
    )
    top_k: int = field(
        default=0, metadata={"help": "Number of most probable tokens to sample from. 0 samples from all tokens."}
    )
    generation_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "Further fields of `GenerationConfig` for sampling, as a dict, such as `min_p`, `min_new_tokens` "
            "or `stop_strings`. If `None`, no further fields."
        },
    )
    stop_token_ids: list[int] | None = field(
        default=None,
        metadata={
            "help": "Token ids that end a completion. If `None`, the end-of-sequence tokens of the tokenizer and of "
            "the model's generation config."
        },
    )
    generation_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Number of completions per generation batch; prompts of similar length are batched together. If "
            "`None`, all completions of a rollout are one batch."
        },
    )
    merge_for_generation: bool = field(
        default=True,
        metadata={
            "help": "Merge the adapter into the base during generation, which is faster. The base is restored exactly "
            "afterward. Ignored on a quantized base, which merging would quantize again."
        },
    )

    # ---- Rewards ----

    reward_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Weight of each reward in the sum, in the order in which the rewards are given. If `None`, each "
            "weight is 1."
        },
    )
    reward_scale: float = field(
        default=1.0, metadata={"help": "Factor by which every score and every token reward is multiplied."}
    )
    normalize_rewards: bool = field(
        default=False,
        metadata={
            "help": "Normalize scores with the running mean and standard deviation of all rollouts so far, including "
            "the current one."
        },
    )
    reward_clip: float | None = field(
        default=None,
        metadata={
            "help": "Clip scores to the range from -`reward_clip` to `reward_clip`, after scaling and normalization. "
            "If `None`, scores are not clipped."
        },
    )
    missing_eos_penalty: float | None = field(
        default=None,
        metadata={
            "help": "Reward subtracted from the score of a completion without a stop token. If `None`, nothing is "
            "subtracted."
        },
    )

    length_penalty: float = field(
        default=0.0,
        metadata={"help": "Reward subtracted from the score for each token of a completion beyond `length_target`."},
    )
    length_target: int = field(
        default=0, metadata={"help": "Length of a completion in tokens up to which `length_penalty` does not apply."}
    )

    soft_overlong_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Number of tokens before `max_completion_length` in which a penalty grows from 0 to "
            "`soft_overlong_weight` (soft overlong punishment of DAPO, Yu et al. 2025, arXiv:2503.14476). If `None`, "
            "there is no such penalty."
        },
    )
    soft_overlong_weight: float = field(
        default=1.0,
        metadata={
            "help": "Reward subtracted from the score of a completion of `max_completion_length` tokens, with "
            "`soft_overlong_tokens`."
        },
    )
    reward_shaping: str | None = field(
        default=None,
        metadata={
            "choices": list(CHOICES["reward_shaping"]),
            "help": "What replaces the weighted sum of the rewards. `par`: Preference As Reward (Fu et al. 2025, "
            "arXiv:2502.18770), the mean over reference answers of sigmoid(score - score of the answer), from 0 to 1. "
            "It comes before `reward_scale`, `normalize_rewards`, `reward_clip` and the penalties. Evaluations report "
            "scores without it. If `None`, scores are used as they are.",
        },
    )
    reference_answers: str | None = field(
        default=None,
        metadata={
            "help": "Column of the training data with the reference answers for `reward_shaping`: one answer or a list "
            "of answers per prompt, as text or as messages. If `None`, they are sampled from the reference policy."
        },
    )
    num_reference_answers: int = field(
        default=4,
        metadata={
            "help": "Number of reference answers sampled for each prompt, with `reward_shaping`. Each prompt gets them "
            "once per run, when it is first used."
        },
    )

    # ---- KL penalty ----

    kl_coef: float = field(
        default=0.05,
        metadata={
            "help": "β, the coefficient of the KL penalty: reward per nat of KL(policy || reference). With "
            "`kl_target`, the initial value."
        },
    )
    kl_placement: str = field(
        default="reward",
        metadata={
            "choices": list(CHOICES["kl_placement"]),
            "help": "Where the KL penalty enters. `reward`: -β·KL is added to the reward of each token, as in "
            "InstructGPT. `loss`: β·KL is added to the loss.",
        },
    )
    kl_estimator: str | None = field(
        default=None,
        metadata={
            "choices": list(CHOICES["kl_estimator"]),
            "help": "Estimator of the KL penalty per token: `k1`, `k2` or `k3` (Schulman 2020). If `None`, `k1` with "
            "`kl_placement='reward'` and `k2` with `kl_placement='loss'`.",
        },
    )
    kl_target: float | None = field(
        default=None,
        metadata={
            "help": "Target of KL(policy || reference) in nats per completion: the sum over the tokens of a "
            "completion, averaged over completions. `kl_coef` is adapted to reach it (Ziegler et al. 2019, "
            "arXiv:1909.08593). If `None`, `kl_coef` is fixed."
        },
    )
    kl_horizon: int | None = field(
        default=None,
        metadata={
            "help": "How slowly `kl_coef` adapts to `kl_target`: number of completions after which `kl_coef` has "
            "changed by a factor of about e^0.2, if the KL is 20 percent or more off its target. If `None`, the "
            "completions of ten rollouts. Ziegler et al. used 10000 for runs of millions of completions."
        },
    )

    max_kl: float | None = field(
        default=100.0,
        metadata={
            "help": "Limit on the mean KL(policy || reference) of a rollout, in nats per completion. `max_kl_action` "
            "is taken above it. If `None`, there is no limit."
        },
    )
    max_kl_action: str = field(
        default="stop",
        metadata={
            "choices": list(CHOICES["max_kl_action"]),
            "help": "What to do when the KL of a rollout exceeds `max_kl`. `stop`: restore the last checkpoint below "
            "`max_kl`, if there is one, and stop training. `raise_kl_coef`: double `kl_coef` and continue. `rollback`: "
            "restore that checkpoint, double `kl_coef` and continue, at most 3 times.",
        },
    )
    exact_kl_rows: int = field(
        default=4,
        metadata={
            "help": "Number of completions per evaluation whose KL is also computed exactly, over the whole "
            "vocabulary. 0 turns this off."
        },
    )

    # ---- PPO ----

    num_ppo_epochs: int = field(default=4, metadata={"help": "Number of passes over each rollout."})
    num_mini_batches: int = field(
        default=1, metadata={"help": "Number of mini-batches per pass over a rollout, each of them one optimizer step."}
    )
    clip_range: float = field(
        default=0.2,
        metadata={
            "help": "ε of PPO's clipped loss: the probability ratio is clipped to the range from 1 - ε to 1 + ε."
        },
    )
    clip_range_high: float | None = field(
        default=None,
        metadata={
            "help": "Another ε for the upper limit of the probability ratio, 1 + ε, so that improbable tokens may rise "
            "further (clip-higher of DAPO, arXiv:2503.14476, which uses 0.28 with `clip_range` 0.2). If `None`, "
            "`clip_range`."
        },
    )
    value_clip_range: float | None = field(
        default=0.2,
        metadata={
            "help": "How far a value may move from its value in the rollout, in units of reward, before the value loss "
            "is clipped. If `None`, it is not clipped."
        },
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss in the total loss."})
    entropy_coef: float = field(
        default=0.0, metadata={"help": "Weight of the entropy bonus (nats per token) in the total loss."}
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount factor γ per token, from 0 to 1."})
    gae_lambda: float = field(default=0.95, metadata={"help": "λ of generalized advantage estimation, from 0 to 1."})
    value_gae_lambda: float | None = field(
        default=None,
        metadata={
            "help": "λ of the returns that the critic learns, from 0 to 1; 1 means the plain sum of the rewards, as in "
            "VC-PPO (arXiv:2503.01491). If `None`, `gae_lambda`."
        },
    )
    length_adaptive_lambda: float | None = field(
        default=None,
        metadata={
            "help": "α of VAPO (arXiv:2504.05118): the λ of the advantages of a completion is 1 - 1/(α·number of its "
            "tokens), and 0 where that is negative. Made for thousands of tokens: with VAPO's α of 0.05, λ is 0.58 for "
            "48 tokens and 0 for 20 or fewer. If `None`, `gae_lambda` for all completions."
        },
    )
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Normalize advantages to mean 0 and variance 1 over the whole rollout."}
    )
    mask_truncated_completions: bool = field(
        default=False,
        metadata={
            "help": "Leave completions without a stop token out of the losses, of the normalization of advantages and "
            "of the baseline of other completions (overlong filtering of DAPO, arXiv:2503.14476). Metrics of "
            "completions and scores still count them."
        },
    )
    early_stop_kl: float | None = field(
        default=None,
        metadata={
            "help": "Skip the remaining optimizer steps on a rollout as soon as KL(rollout policy || policy) of a step "
            "exceeds this, in nats per token (k3). If `None`, all steps are taken."
        },
    )
    ptx_coef: float = field(
        default=0.0,
        metadata={
            "help": "γ of PPO-ptx (InstructGPT): weight of the language-model loss on `ptx_dataset`. 0 turns PPO-ptx "
            "off."
        },
    )
    ptx_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows of `ptx_dataset` per optimizer step and process. If `None`, the number of completions per "
            "optimizer step."
        },
    )
    importance_sampling_correction: bool = field(
        default=False,
        metadata={
            "help": "Multiply the loss of each token by its probability under the policy divided by its probability "
            "under the sampler. Use it with `top_k`, `top_p` or an engine whose log-probabilities differ from those of "
            "training."
        },
    )
    importance_sampling_cap: float = field(
        default=2.0, metadata={"help": "Maximum of the weights of `importance_sampling_correction`."}
    )

    # ---- Memory and guards ----

    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of tokens per forward pass in scoring and training, including padding. Larger "
            "batches are split, but never the completions of a prompt, which counts once if they share it; gradients "
            "stay the same. If `None`, only `per_device_train_batch_size` limits a pass."
        },
    )
    auto_batch: bool = field(
        default=False,
        metadata={
            "help": "Begin with the largest `max_tokens_per_batch` and `generation_batch_size` that fit by the plan of "
            "the run, on a GPU. When memory runs out, halve them and repeat what did not fit. Optimizer steps are the "
            "same as with the smaller number set by hand; batch sizes per step stay as they are. A line says each new "
            "number, and checkpoints keep it. Not for FSDP2."
        },
    )
    joint_scoring: bool | None = field(
        default=None,
        metadata={
            "help": "Score policy, reference and critic in one forward pass if all of them are LoRA adapters. If "
            "`None`, only on a GPU, as it is not faster on a CPU."
        },
    )
    offload_reward_model: bool = field(
        default=False,
        metadata={
            "help": "Keep reward models that have a base of their own in the CPU's memory, except while they score. "
            "Scores stay the same; a copy to the device and back per rollout takes time."
        },
    )
    offload_optimizer: bool = field(
        default=False,
        metadata={
            "help": "Keep the states of the optimizer in the CPU's memory, except during its steps. Updates stay the "
            "same; a copy to the device and back per optimizer step takes time."
        },
    )
    max_skipped_steps: int = field(
        default=5,
        metadata={
            "help": "Number of consecutive optimizer steps with non-finite gradients after which training stops. Each "
            "such step is skipped."
        },
    )
    warn_every: int = field(
        default=20,
        metadata={"help": "Minimum number of rollouts between two health warnings of the same kind."},
    )
    logprobs_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Number of completion tokens whose logits over the vocabulary are in memory at one time. A smaller "
            "number needs less memory. If `None`, a frozen output head is read in parts, whose logits take at most 64 "
            "MiB; logits of other heads take at most 128 MiB, and three times as much with their gradients."
        },
    )

    # ---- Logging ----

    log_completions: bool = field(default=False, metadata={"help": "Print a sample of completions at each log."})
    num_completions_to_print: int = field(
        default=4, metadata={"help": "Number of completions that `log_completions` prints."}
    )

    _VALID_DICT_FIELDS = [*BaseConfig._VALID_DICT_FIELDS, "generation_kwargs"]

    def __post_init__(self):
        with checked_options(
            self, trainer="PPOTrainer", engines=ENGINES, best_metric="objective/scores", remedies=_LIMITS
        ):
            super().__post_init__()
            refuse_loading_in_one_process(self)
        check_ranges(self, at_least_1=_AT_LEAST_1, not_negative=_NOT_NEGATIVE, fractions=_FRACTIONS, positive=_POSITIVE)
        self._check_choices()
        self._read_stop_tokens()
        check_ppo_options(self)
        self._check_combinations()

    def _check_choices(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in (None, *allowed):
                raise UserError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")

    def _read_stop_tokens(self) -> None:
        """Makes `stop_token_ids` a list, also of one id."""
        given = self.stop_token_ids
        if given is None:
            return
        ids = list(given) if isinstance(given, Iterable) else [given]
        if any(not isinstance(token_id, Integral) for token_id in ids):
            raise UserError(
                f"stop_token_ids must be a list of token ids, got {given!r}: take those of tokens from "
                "processing_class.convert_tokens_to_ids, or set stop_strings in generation_kwargs."
            )
        self.stop_token_ids = [int(token_id) for token_id in ids]

    def _check_combinations(self) -> None:
        if self.per_device_train_batch_size % self.num_generations:
            batch, generations = self.per_device_train_batch_size, self.num_generations
            nearest = -(-batch // generations) * generations
            raise UserError(
                f"num_generations={generations} does not divide per_device_train_batch_size={batch}, which counts "
                f"completions, and those of a prompt stay together: set per_device_train_batch_size={nearest}, or "
                "another num_generations."
            )
        if self.generation_kwargs is not None:
            if not isinstance(self.generation_kwargs, dict):
                raise UserError(
                    f"generation_kwargs: {self.generation_kwargs!r} is not a dict of fields of GenerationConfig: write "
                    "it as in '{\"min_p\": 0.1}'."
                )
            check_generation_kwargs(self.generation_kwargs, self.device.type)
        if self.kl_target is not None and self.kl_coef <= 0:
            raise UserError(
                "kl_coef must be positive when kl_target is set, as it is adapted by multiplication: set kl_coef."
            )
        if self.max_kl is not None and self.max_kl_action == "raise_kl_coef" and self.kl_coef <= 0:
            raise UserError("max_kl_action: raise_kl_coef doubles kl_coef, which is 0: set kl_coef, or choose stop.")
        if self.kl_placement == "loss" and self.kl_estimator == "k1":
            raise UserError("kl_estimator: the gradient of k1 in the loss is zero in expectation: choose k2 or k3.")
        self._check_shaping()
        if self.critic == "none":
            self._check_without_critic()
        if self.critic_warmup_steps > 0:
            self._check_warm_up()

    def _check_shaping(self) -> None:
        """Refuses options of the shaping of scores that have no effect."""
        for name, needed in _OF_OTHERS.items():
            if getattr(self, needed) is None and self.not_defaults([name]):
                remedy = " to par" if needed == "reward_shaping" else ""
                raise UserError(f"{name} has no effect without {needed}: set {needed}{remedy}, or leave it out.")
        if self.reference_answers is not None and self.not_defaults(["num_reference_answers"]):
            raise UserError(
                f"num_reference_answers={self.num_reference_answers}: the answers are those of the column "
                f"{self.reference_answers!r}, and none are sampled: leave it or reference_answers out."
            )
        if self.soft_overlong_tokens is not None and self.soft_overlong_tokens > self.max_completion_length:
            raise UserError(
                f"soft_overlong_tokens={self.soft_overlong_tokens} is more than "
                f"max_completion_length={self.max_completion_length}, at the end of which the penalty grows: set it to "
                "at most that, such as a fifth of it."
            )
        if self.mask_truncated_completions and self.missing_eos_penalty:
            raise UserError(
                f"missing_eos_penalty={self.missing_eos_penalty} has no effect with mask_truncated_completions, as "
                "completions without a stop token do not count: leave one of them out."
            )

    def _check_without_critic(self) -> None:
        """Refuses what a run without a critic cannot do."""
        if self.num_generations < 2:
            raise UserError(
                f"critic='none' compares the completions of a prompt, and num_generations={self.num_generations}: set "
                "num_generations to 2 or more, or choose another critic, such as head."
            )
        given = [name for name in self.not_defaults(_OF_RETURNS) if getattr(self, name) != 1]
        if given:
            raise UserError(
                f"{' and '.join(given)}: with critic='none', the return of a completion is the plain sum of its "
                "rewards: leave it out, or choose another critic."
            )

    def _check_warm_up(self) -> None:
        """Refuses a warm-up of the critic that trains nothing."""
        if self.critic == "none":
            raise UserError(
                f"critic_warmup_steps={self.critic_warmup_steps}: with critic='none' there is no critic to train: "
                "leave it out, or choose another critic, such as head."
            )
        for name in ("vf_coef", "value_learning_rate"):
            if getattr(self, name) == 0:
                raise UserError(
                    f"critic_warmup_steps={self.critic_warmup_steps} trains the critic only, which {name}=0 does not "
                    f"train: set {name} to a positive number, or leave critic_warmup_steps out."
                )
        if self.max_steps > 0:
            self.check_policy_is_trained()

    def check_policy_is_trained(self) -> None:
        """Refuses a warm-up of the critic that leaves no step for the policy. Call it once `max_steps` is set.

        Raises:
            UserError: if all `max_steps` optimizer steps are in the warm-up.
        """
        steps = self.critic_warmup_rollouts * self.steps_per_rollout
        if steps >= self.max_steps:
            raise UserError(
                f"critic_warmup_steps={self.critic_warmup_steps} takes {steps} optimizer steps (whole rollouts of "
                f"{self.steps_per_rollout}), and max_steps={self.max_steps} leaves none for the policy: raise "
                "max_steps (or num_train_epochs), or lower critic_warmup_steps."
            )

    def not_defaults(self, names: Iterable[str]) -> list[str]:
        """Those of these options that are set to something else than their default."""
        defaults = {option.name: option.default for option in fields(self)}
        return [name for name in names if getattr(self, name) != defaults[name]]

    @property
    def prompt_seed(self) -> int:
        """Seed of the order of prompts and of the texts of PPO-ptx."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def estimator(self) -> str:
        """Name of the KL estimator in use: `k1`, `k2` or `k3`."""
        return self.kl_estimator or ("k1" if self.kl_placement == "reward" else "k2")

    @property
    def minibatch_size(self) -> int:
        """Completions per optimizer step on this process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def rollout_size(self) -> int:
        """Completions per rollout on this process."""
        return self.minibatch_size * self.num_mini_batches

    @property
    def prompts_per_rollout(self) -> int:
        """Prompts per rollout on this process, each with `num_generations` completions."""
        return self.rollout_size // self.num_generations

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps per rollout."""
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def critic_warmup_rollouts(self) -> int:
        """Number of rollouts at the start that train the critic only."""
        return math.ceil(self.critic_warmup_steps / self.steps_per_rollout)
