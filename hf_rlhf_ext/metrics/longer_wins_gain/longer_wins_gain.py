"""Accuracy of a reward model beyond always preferring the longer completion, for `evaluate.load`."""

import evaluate

from hf_rlhf_ext.metrics.info import preference_info
from hf_rlhf_ext.reward.preference_metrics import bootstrap_gain_ci, longer_wins_baseline, pairwise_accuracy

_DESCRIPTION = """Accuracy minus the accuracy of always preferring the longer completion, on pairs without a tie."""

_INPUTS = """length_deltas: length of i minus length of j for each pair, in any unit.
prompts (optional): index of the prompt of each pair, for a 95 % bootstrap interval over prompts."""


class LongerWinsGain(evaluate.Metric):
    """Computes `longer_wins_baseline` and `gain`, and with `prompts` also `gain_low` and `gain_high`."""

    def _info(self):
        return preference_info(_DESCRIPTION, _INPUTS)

    def _compute(
        self,
        predictions,
        references,
        length_deltas,
        prompts=None,
    ):
        baseline = longer_wins_baseline(length_deltas, references)
        accuracy = pairwise_accuracy(predictions, references)
        result = {"longer_wins_baseline": baseline, "gain": accuracy - baseline}
        if prompts is not None:
            low, high = bootstrap_gain_ci(predictions, length_deltas, references, prompts)
            result["gain_low"] = low
            result["gain_high"] = high
        return result
