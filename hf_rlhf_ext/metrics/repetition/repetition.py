"""How much generated texts repeat themselves, for `evaluate.load`."""

import datasets
import evaluate

from hf_rlhf_ext.metrics.info import info
from hf_rlhf_ext.metrics.texts import repetition

_DESCRIPTION = """repetition: 1 - (distinct n-grams / n-grams) of a text, mean over texts: seq-rep-n of Welleck et al.
2020 (arXiv:1908.04319). 0 if no text repeats itself."""

_INPUTS = """predictions: generated texts.
n (optional): number of words in an n-gram, by default 4."""


class Repetition(evaluate.Metric):
    """Computes `repetition`."""

    def _info(self):
        return info(_DESCRIPTION, _INPUTS, predictions=datasets.Value("string"))

    def _compute(self, predictions, n=4):
        return {"repetition": repetition(predictions, n)}
