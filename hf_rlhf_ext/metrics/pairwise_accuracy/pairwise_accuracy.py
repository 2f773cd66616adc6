"""Accuracy of a reward model on comparisons, for `evaluate.load`."""

import evaluate

from hf_rlhf_ext.metrics.info import preference_info
from hf_rlhf_ext.reward.preference_metrics import accuracy_with_ties, bootstrap_accuracy_ci, pairwise_accuracy

_DESCRIPTION = """accuracy: fraction of pairs without a tie in which the preferred completion scores higher.
accuracy_ties: fraction of all pairs predicted correctly as first, second or tie."""

_INPUTS = """prompts (optional): index of the prompt of each pair, for a 95 % bootstrap interval over prompts."""


class PairwiseAccuracy(evaluate.Metric):
    """Computes `accuracy` and `accuracy_ties`, and with `prompts` also `accuracy_low` and `accuracy_high`."""

    def _info(self):
        return preference_info(_DESCRIPTION, _INPUTS)

    def _compute(self, predictions, references, prompts=None):
        result = {
            "accuracy": pairwise_accuracy(predictions, references),
            "accuracy_ties": accuracy_with_ties(predictions, references),
        }
        if prompts is not None:
            low, high = bootstrap_accuracy_ci(predictions, references, prompts)
            result["accuracy_low"] = low
            result["accuracy_high"] = high
        return result
