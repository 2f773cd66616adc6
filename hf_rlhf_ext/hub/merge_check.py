"""What a model computes before and after a merge, so that what is published is what was trained."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..modeling.adapter_kinds import base_change
from ..modeling.base_record import BaseRecord
from ..modeling.embeddings import n_rows
from ..modeling.loading import attach_adapter, load_base_model, resolve_dtype
from ..modeling.probing import LOGPROB_ROUNDING, mean_difference, probe_logprobs, probe_sequences, token_logprobs
from ..modeling.quantization import describe_quantization
from ..reward.normalization import RewardNormalization

logger = logging.getLogger(__name__)

_MOST_ADDED = 64
"""At most how many tokens that were added to the vocabulary are compared."""
_LARGE_SHARE = 0.25
"""Standard deviations of the scores by which a merge may change them without a warning."""


@dataclass(frozen=True)
class Measured:
    """What a policy computes.

    Attributes:
        texts: (N,) log-probabilities of the tokens of probe texts, in nats.
        vocabulary: (T, V) log-probabilities of the whole vocabulary after tokens from all over it, in nats.
    """

    texts: Tensor
    vocabulary: Tensor

    def difference(self, other: "Measured") -> float:
        """The larger one of the two mean absolute differences, in nats per token; infinite for other vocabularies."""
        if self.vocabulary.shape != other.vocabulary.shape:
            return float("inf")
        return max(mean_difference(self.texts, other.texts), mean_difference(self.vocabulary, other.vocabulary))


@dataclass(frozen=True)
class PolicyProbe:
    """Measures what a policy computes on texts, on a chat, and on the tokens whose embeddings were trained or added.

    Attributes:
        sequences: token ids of the texts.
    """

    sequences: list[list[int]]

    @classmethod
    def of(cls, policy: PeftModel, tokenizer: PreTrainedTokenizerBase) -> "PolicyProbe":
        """The probe for a policy with the adapter that is to be merged."""
        tokens = set(sorted(tokenizer.added_tokens_decoder)[-_MOST_ADDED:])
        for module in policy.modules():
            if isinstance(module, TrainableTokensLayer):
                tokens.update(index for indices in module.token_indices.values() for index in indices)
        return cls(probe_sequences(tokenizer, n_rows(policy), tokens))

    def measure(self, model: nn.Module) -> Measured:
        """What a model computes now."""
        return Measured(token_logprobs(model, self.sequences).cpu(), probe_logprobs(model).cpu())

    def effect(self, policy: PeftModel) -> float | None:
        """How far the adapter is from its base, in nats per token; `None` where PEFT does not give the base back."""
        if base_change(policy.active_peft_config) is not None:
            return None
        with policy.disable_adapter():
            base_alone = token_logprobs(policy, self.sequences)
        return mean_difference(token_logprobs(policy, self.sequences), base_alone)


def check_merged(before: Measured, after: Measured, output_dir: Path, dtype: str) -> None:
    """Raises `UserError` if the model that was written computes something else than the adapter on its base.

    Args:
        before: What the adapter on its base computed, in `dtype`.
        after: What the model in `output_dir` computes, in `dtype`.
        output_dir: Folder of the merged model.
        dtype: Data type of the merged weights.
    """
    difference = before.difference(after)
    limit = LOGPROB_ROUNDING[resolve_dtype(dtype)]
    if not difference <= limit:
        raise UserError(
            f"merge: the model in {output_dir} is not the adapter on its base: log-probabilities differ by "
            f"{difference:.2g} nats on average, where {dtype} explains {limit:g}: remove it, and load the adapter with "
            "load_policy."
        )


def warn_of_lost_update(difference: float, effect: float | None, dtype: str) -> None:
    """Logs a warning if rounding lost about as much as the adapter had changed.

    Args:
        difference: Mean difference between the merged model and the adapter, in nats per token.
        effect: Mean difference between the adapter and its base, in nats per token.
        dtype: Data type of the merged weights.
    """
    if resolve_dtype(dtype) == torch.float32 or not effect or difference < effect / 2:
        return
    logger.warning(
        "merge: rounding to %s loses much of what was trained: the merged model is %.2g nats per token from the "
        "adapter, and the adapter is %.2g from its base: merge with --dtype float32 (dtype='float32' in Python).",
        dtype,
        difference,
        effect,
    )


def measured_as_trained(
    probe: PolicyProbe, folder: Path, base_id: str, revision: str | None, dtype: str
) -> Measured | None:
    """What the adapter computes on its base in the precision of its training, if that is another one than `dtype`.

    Args:
        probe: The probe of this adapter.
        folder: Folder of the adapter.
        base_id: The base that it is merged into.
        revision: Branch, tag or commit of the base.
        dtype: Data type of the merged weights.

    Returns:
        None if the precision is the same, if it is not recorded, or if this machine cannot load the base like this.
    """
    record = BaseRecord.load(folder)
    if record is None or (record.quantization is None and record.dtype == dtype):
        return None
    options = {"dtype": record.dtype, "quantization_config": record.quantization, "revision": revision}
    try:
        policy = attach_adapter(load_base_model(base_id, **options), folder)
    except UserError as error:  # such as a quantization without its package
        logger.warning("merge: not compared with the precision of training: %s", error)
        return None
    return probe.measure(policy)


def warn_of_other_precision(difference: float, folder: Path, dtype: str) -> None:
    """Logs a warning if the adapter was trained in a precision in which it computes something else than merged."""
    record = BaseRecord.load(folder)
    limit = LOGPROB_ROUNDING[resolve_dtype(dtype)]
    if record is None or difference <= limit:
        return
    trained = f"{record.dtype} weights" if record.quantization is None else describe_quantization(record.quantization)
    logger.warning(
        "merge: the adapter was trained on a base with %s, and the merged model in %s is %.2g nats per token from it: "
        "to share exactly what was trained, push the adapter.",
        trained,
        dtype,
        difference,
    )


def check_scores(difference: float, folder: Path, output_dir: Path, dtype: str) -> None:
    """Raises `UserError` if a merged reward model gives other scores than the adapter where nothing was rounded.

    Where something was rounded, a warning is logged if the difference is a large part of what scores differ by.

    Args:
        difference: Largest difference between the scores of probe texts before and after the merge.
        folder: Folder of the adapter.
        output_dir: Folder of the merged model.
        dtype: Data type of the merged weights.
    """
    recorded = RewardNormalization.load(folder) or RewardNormalization()
    precisions = {dtype, recorded.base_dtype, recorded.autocast or "float32"}
    is_exact = precisions == {"float32"} and not recorded.load_in_4bit and recorded.quantization is None
    if is_exact and not difference <= 1e-3 + 0.01 * recorded.std:
        raise UserError(
            f"merge: the model in {output_dir} is not the adapter on its base: scores differ by {difference:.2g}, "
            "where rounding explains nothing: remove it, and load the adapter with RewardScorer.from_pretrained."
        )
    if not difference <= _LARGE_SHARE * recorded.std:
        logger.warning(
            "merge: scores of the merged model in %s differ by up to %.2g from those of training, whose standard "
            "deviation is %.2g: merge with --dtype float32 (dtype='float32' in Python), or push the adapter.",
            dtype,
            difference,
            recorded.std,
        )
