"""Diversity of generated texts, for `evaluate.load`."""

import datasets
import evaluate

from hf_rlhf_ext.metrics.info import info
from hf_rlhf_ext.metrics.texts import distinct_n

_DESCRIPTION = """distinct_<n>: number of distinct n-grams of all texts, divided by their number of words
(Li et al. 2016, arXiv:1510.03055). More and longer texts have a smaller one."""

_INPUTS = """predictions: generated texts.
n (optional): number of words in an n-gram; without it, both 1 and 2."""


class DistinctN(evaluate.Metric):
    """Computes `distinct_1` and `distinct_2`, or the one that is asked for."""

    def _info(self):
        return info(_DESCRIPTION, _INPUTS, predictions=datasets.Value("string"))

    def _compute(self, predictions, n=None):
        sizes = (1, 2) if n is None else (n,)
        return {f"distinct_{size}": distinct_n(predictions, size) for size in sizes}
