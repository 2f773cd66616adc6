"""Calibration of a reward model on comparisons, for `evaluate.load`."""

import datasets
import evaluate

from hf_rlhf_ext.metrics.preference import brier_score, calibration_error

_DESCRIPTION = """Brier score and expected calibration error (Guo et al. 2017) of the chances sigma(r_i - r_j)."""

_INPUTS = """predictions: r_i - r_j of each pair, in reward.
references: P(i over j) in [0, 1]; 0.5 is a tie.
n_bins (optional): bins of the calibration error, 10."""


class PreferenceCalibration(evaluate.Metric):
    """`brier` and `ece`."""

    def _info(self):
        value = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(self, predictions, references, n_bins=10):
        ece = calibration_error(predictions, references, n_bins)
        return {"brier": brier_score(predictions, references), "ece": ece}
