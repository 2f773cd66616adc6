"""Accuracy of a reward model by group of comparisons, for `evaluate.load`."""

import evaluate
import numpy as np

from hf_rlhf_ext.evaluation.metrics.info import preference_info
from hf_rlhf_ext.metrics.preference import JudgedPairs

_DESCRIPTION = """Accuracy on decided pairs by category, and by quartile of the length gap and of the margin."""

_INPUTS = """categories (optional): name of each pair's, "" where it has none.
length_deltas (optional): length of i minus length of j, in any unit.
margins (optional): how much better i is, in any unit."""


class PreferenceGroups(evaluate.Metric):
    """`accuracy/<group>/<name>` and `n/<group>/<name>`, as `BradleyTerryTrainer` logs and counts them."""

    def _info(self):
        return preference_info(_DESCRIPTION, _INPUTS)

    def _compute(self, predictions, references, categories=None, length_deltas=None, margins=None):
        zeros = np.zeros(len(predictions))
        given = [zeros if values is None else np.asarray(values, float) for values in (margins, length_deltas)]
        names = np.asarray([""] * len(zeros) if categories is None else list(categories), str)
        judged = JudgedPairs(np.asarray(predictions), zeros, np.asarray(references), zeros + 1, *given, zeros, names)
        return {
            f"{figure}/{title}/{name}": group[figure]
            for title, groups in judged.groups().items()
            for name, group in groups.items()
            for figure in ("accuracy", "n")
        }
