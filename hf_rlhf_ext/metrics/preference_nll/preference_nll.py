"""Negative log-likelihood of comparisons under a reward model, for `evaluate.load`."""

import evaluate

from hf_rlhf_ext.metrics.info import preference_info
from hf_rlhf_ext.reward.preference_metrics import preference_nll

_DESCRIPTION = """Bradley-Terry negative log-likelihood in nats per pair; log 2 is chance."""

_INPUTS = """weights (optional): weight of each pair."""


class PreferenceNLL(evaluate.Metric):
    """Computes `nll`, a weighted mean if `weights` are given."""

    def _info(self):
        return preference_info(_DESCRIPTION, _INPUTS)

    def _compute(self, predictions, references, weights=None):
        return {"nll": preference_nll(predictions, references, weights)}
