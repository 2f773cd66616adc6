"""Negative log-likelihood of comparisons under a reward model, for `evaluate.load`."""

import datasets
import evaluate

from hf_rlhf_ext.metrics.preference import preference_nll

_DESCRIPTION = """Bradley-Terry negative log-likelihood in nats a pair; log 2 is a coin's."""

_INPUTS = """predictions: r_i - r_j of each pair, in reward.
references: P(i over j) in [0, 1]; 0.5 is a tie.
weights (optional): of each pair."""


class PreferenceNLL(evaluate.Metric):
    """`nll`, weighted if `weights` are given."""

    def _info(self):
        value = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(self, predictions, references, weights=None):
        return {"nll": preference_nll(predictions, references, weights)}
