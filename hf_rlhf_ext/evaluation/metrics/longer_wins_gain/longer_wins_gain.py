"""What a reward model knows beyond "the longer one is better", for `evaluate.load`."""

import datasets
import evaluate

from hf_rlhf_ext.metrics.preference import bootstrap_gain_ci, longer_wins_baseline, pairwise_accuracy

_DESCRIPTION = """Accuracy minus that of "the longer completion is better" on the same decided pairs."""

_INPUTS = """predictions: r_i - r_j of each pair, in reward.
references: P(i over j) in [0, 1]; 0.5 is a tie.
length_deltas: length of i minus length of j, in any unit.
prompts (optional): number of each pair's prompt, for a 95 % bootstrap interval over prompts."""


class LongerWinsGain(evaluate.Metric):
    """`longer_wins_baseline`, `gain`, and with `prompts` also `gain_low`, `gain_high`."""

    def _info(self):
        value = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(self, predictions, references, length_deltas, prompts=None):
        baseline = longer_wins_baseline(length_deltas, references)
        found = {"longer_wins_baseline": baseline, "gain": pairwise_accuracy(predictions, references) - baseline}
        if prompts is not None:
            interval = bootstrap_gain_ci(predictions, length_deltas, references, prompts)
            found |= zip(("gain_low", "gain_high"), interval, strict=True)
        return found
