"""Negative log-likelihood of comparisons under a reward model, for `evaluate.load`."""

import evaluate

from hf_rlhf_ext.evaluation.metrics.info import preference_info
from hf_rlhf_ext.metrics.preference import preference_nll

_DESCRIPTION = """Bradley-Terry negative log-likelihood in nats a pair; log 2 is a coin's."""

_INPUTS = """weights (optional): of each pair."""


class PreferenceNLL(evaluate.Metric):
    """`nll`, weighted if `weights` are given."""

    def _info(self):
        return preference_info(_DESCRIPTION, _INPUTS)

    def _compute(self, predictions, references, weights=None):
        return {"nll": preference_nll(predictions, references, weights)}
