"""Calibration of a reward model on comparisons, for `evaluate.load`."""

import evaluate

from hf_rlhf_ext.metrics.info import preference_info
from hf_rlhf_ext.reward.preference_metrics import brier_score, calibration_error, reliability_bins

_DESCRIPTION = """Brier score and expected calibration error (Guo et al. 2017) of the probabilities sigma(r_i - r_j)."""

_INPUTS = """n_bins (optional): number of bins of the calibration error, default 10."""


class PreferenceCalibration(evaluate.Metric):
    """Computes `brier`, `ece` and `reliability`, the bins of a reliability diagram (`n`, `confidence`, `accuracy`)."""

    def _info(self):
        return preference_info(_DESCRIPTION, _INPUTS)

    def _compute(self, predictions, references, n_bins=10):
        return {
            "brier": brier_score(predictions, references),
            "ece": calibration_error(predictions, references, n_bins),
            "reliability": reliability_bins(predictions, references, n_bins),
        }
