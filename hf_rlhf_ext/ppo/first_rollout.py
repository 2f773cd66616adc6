"""A check of the first rollout: the policy that is sampled, scored and trained is one and the same model.

A difference is not visible in a reward curve: training goes on with wrong ratios or with a wrong KL penalty. Before the
first optimizer step, however, three numbers are known: the ratio is 1, the sampler's log-probabilities are those of the
policy, and the KL to the reference is 0 where the reference is the policy at the start.
"""

import math
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..modeling.adapters import autocast_dtype, bare_model
from ..modeling.dropout import has_dropout
from ..modeling.probing import LOGPROB_ROUNDING
from ..modeling.stack import AdapterStack
from .config import PPOConfig
from .engine import RolloutEngine, TransformersEngine
from .experience import SamplingTools
from .prompts import other_sampling
from .ranks import Ranks
from .rollout import Rollout, Sequences

LIMIT_FP32_GPU = 1e-2  # matrix products of fp32 weights may be computed in TF32
_MANY_TOKENS = 8
LIMIT_8BIT = 0.3  # activations are quantized too, with a scale that depends on the batch


@dataclass(frozen=True)
class Comparison:
    """Log-probabilities of the same tokens, computed in two ways that should agree.

    Attributes:
        name: what is compared, in words.
        difference: sum of the absolute differences over the tokens of this process, in nats.
        tokens: number of tokens of this process.
        limit: mean difference that rounding explains, in nats per token.
        remedy: usual causes of a larger difference, and what to do.
    """

    name: str
    difference: float
    tokens: float
    limit: float
    remedy: str


TRAINED = (
    "trained and scored log-probabilities",
    "the model computes something else in training mode, such as dropout or noise of its own, experts that are drawn "
    "at random, or normalization over the batch: turn it off in the model's config, or use another model",
)
SAMPLED = (
    "sampled and scored log-probabilities",
    "the sampler does not use the weights or the distribution that are scored: an engine that is not in sync, a model "
    "that reads padding or counts positions in another way in `generate`, or an adapter that changes when it is "
    "merged: try merge_for_generation=False (--merge_for_generation false) and generation_batch_size=1, or set "
    "importance_sampling_correction to true",
)
REFERENCE = (
    "the policy and its reference, which should be equal at the start,",
    "weights changed after the trainer was made, the base was changed when an adapter was attached, or an old "
    "reference is left on the model: load the model again, and make a new trainer",
)


@dataclass(frozen=True)
class TrainedTokens:
    """Log-probabilities of some rows of a rollout, from the forward pass of training.

    Attributes:
        rows: (b,) int64, indices of rows.
        logprobs: (b, t) log-probabilities in nats.
        mask: (b, t) bool, True for emitted tokens.
    """

    rows: Tensor
    logprobs: Tensor
    mask: Tensor


def find_problem(
    rollout: Rollout, tools: SamplingTools, trained: TrainedTokens | None, *, starts_at_reference: bool
) -> str | None:
    """What is wrong with the first rollout, in one line; `None` if nothing is. Every process must call it.

    Args:
        rollout: the first rollout.
        tools: the objects that sampled and scored it.
        trained: some of its rows in training mode; `None` if they need not be the same, see `is_trained_as_scored`.
        starts_at_reference: whether policy and reference are the same, see `is_start_the_reference`.
    """
    args = tools.args
    policy = tools.roles.policy
    if type(tools.engine) is not TransformersEngine and begin_with_their_prompts(rollout.sequences):
        return (
            f"engine: every completion of {type(tools.engine).__name__}.generate begins with the tokens of its prompt: "
            "return the ids of the completion alone. check_first_rollout=False skips this check."
        )
    mask = rollout.sequences.mask
    limit = limit_of(policy, args)
    scored = rollout.old_logprobs
    comparisons = []
    if trained is not None:
        scored_rows = scored[trained.rows, : trained.mask.shape[1]]
        comparisons.append(compare(TRAINED, trained.logprobs, scored_rows, trained.mask, limit, args.temperature))
    sampling_limit = limit_of_sampling(tools.engine, policy, args)
    if sampling_limit is not None:
        comparisons.append(compare(SAMPLED, rollout.sampled_logprobs, scored, mask, sampling_limit, args.temperature))
    if starts_at_reference:
        comparisons.append(compare(REFERENCE, rollout.ref_logprobs, scored, mask, limit, args.temperature))
    return problem_of(comparisons, tools.ranks)


def begin_with_their_prompts(sequences: Sequences) -> bool:
    """Whether every completion begins with its prompt, as the output of `generate` does where it is not cut.

    Args:
        sequences: prompts and completions of all processes.
    """
    rows = sequences.input_ids.tolist()
    repeated = 0
    for ids, start, size in zip(
        rows, sequences.prompt_lengths.tolist(), sequences.completion_lengths.tolist(), strict=True
    ):
        length = min(start, size)  # a long prompt may fill the whole completion
        if ids[start : start + length] != ids[:length]:
            return False
        repeated += length
    return repeated >= _MANY_TOKENS  # one or two tokens may be the same by chance


def compare(
    kind: tuple[str, str], first: Tensor, second: Tensor, mask: Tensor, limit: float, temperature: float
) -> Comparison:
    """Compares log-probabilities.

    Args:
        kind: `TRAINED`, `SAMPLED` or `REFERENCE`.
        first: (B, T) log-probabilities in nats.
        second: (B, T) log-probabilities of the same tokens.
        mask: (B, T) bool, True for emitted tokens.
        limit: see `limit_of`.
        temperature: sampling temperature, by which logits and their rounding errors are divided.
    """
    name, remedy = kind
    differences = (first.float() - second.float()).abs().masked_fill(~mask, 0.0)
    return Comparison(
        name=name,
        difference=float(differences.sum()),
        tokens=float(mask.sum()),
        limit=limit * max(1.0, 1.0 / temperature),
        remedy=remedy,
    )


def problem_of(comparisons: list[Comparison], ranks: Ranks) -> str | None:
    """The first comparison that rounding does not explain, as one line; `None` if there is none.

    Differences are summed over all processes, so that every process reaches the same verdict.
    """
    for comparison in comparisons:
        difference, tokens = ranks.sum_of(comparison.difference, comparison.tokens)
        mean = difference / max(tokens, 1.0)
        # Few tokens may differ by more than the mean of many.
        allowed = comparison.limit * (1.0 + 2.0 / math.sqrt(max(tokens, 1.0)))
        if not mean <= allowed:  # also if it is NaN
            return (
                f"check_first_rollout: {comparison.name} differ by {mean:.2g} nats per token in the first rollout, "
                f"where rounding explains {allowed:.2g}: {comparison.remedy}. check_first_rollout=False skips this "
                "check."
            )
    return None


def limit_of(policy: nn.Module, args: PPOConfig) -> float:
    """The mean difference of log-probabilities that the dtype of the policy explains, in nats per token."""
    model = bare_model(policy)
    if getattr(model, "is_loaded_in_8bit", False):
        return LIMIT_8BIT
    limit = max(LOGPROB_ROUNDING.get(dtype, 0.0) for dtype in _dtypes(model, args))
    if limit == LOGPROB_ROUNDING[torch.float32] and next(model.parameters()).device.type != "cpu":
        return LIMIT_FP32_GPU
    return limit


def _dtypes(model: nn.Module, args: PPOConfig) -> set[torch.dtype]:
    """The dtypes in which the model computes."""
    dtypes = {torch.float32}
    for parameter in model.parameters():
        dtypes.add(parameter.dtype)
    if getattr(model, "is_quantized", False):
        dtypes.add(torch.bfloat16)  # or fp16, which is more exact
    autocast = autocast_dtype(args)
    if autocast is not None:
        dtypes.add(autocast)
    return dtypes


def is_trained_as_scored(policy: nn.Module, args: PPOConfig) -> bool:
    """Whether a forward pass in training mode should equal the scoring: not with dropout, if it is left on."""
    return args.disable_dropout or not has_dropout(policy)


def limit_of_sampling(engine: RolloutEngine, policy: nn.Module, args: PPOConfig) -> float | None:
    """The mean difference between sampled and scored log-probabilities that is expected, in nats per token.

    Returns:
        The limit; `None` if tokens are not sampled from the distribution that is scored.
    """
    if args.importance_sampling_correction or other_sampling(args):
        return None
    limit = limit_of(policy, args)
    if isinstance(engine, TransformersEngine):
        return limit
    return max(limit, LOGPROB_ROUNDING[torch.bfloat16])  # another engine may have another dtype


def is_start_the_reference(stack: AdapterStack, *, new_adapter: bool) -> bool:
    """Whether policy and reference are the same before training.

    They are if the reference is a copy of the policy, and if it is the base without the new adapter, which then changes
    nothing at first. Virtual tokens of prompt tuning and similar adapters do change the base.

    Args:
        stack: stack with policy and reference.
        new_adapter: whether the trainer made the adapter of the policy.
    """
    reference = stack.roles["reference"]
    if reference.model is not None or reference.adapter is not None:
        return True
    if not isinstance(stack.model, PeftModel) or not new_adapter:
        return False
    return not stack.model.active_peft_config.is_prompt_learning
