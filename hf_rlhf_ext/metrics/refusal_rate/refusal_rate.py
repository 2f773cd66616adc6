"""Share of answers that refuse, for `evaluate.load`."""

import datasets
import evaluate

from hf_rlhf_ext.metrics.info import info
from hf_rlhf_ext.metrics.texts import refusal_rate

_DESCRIPTION = """refusal_rate: share of the answers that have a phrase of refusal in their first two sentences
(`hf_rlhf_ext.metrics.texts.REFUSALS`). Refusals in other words, or not in English, are missed."""

_INPUTS = """predictions: generated answers."""


class RefusalRate(evaluate.Metric):
    """Computes `refusal_rate`."""

    def _info(self):
        return info(_DESCRIPTION, _INPUTS, predictions=datasets.Value("string"))

    def _compute(self, predictions):
        return {"refusal_rate": refusal_rate(predictions)}
