"""Accuracy of a reward model by group of comparisons, for `evaluate.load`."""

import evaluate
import numpy as np

from hf_rlhf_ext.metrics.info import preference_info
from hf_rlhf_ext.reward.preference_metrics import JudgedPairs

_DESCRIPTION = (
    """Accuracy on pairs without a tie, by category and by quartile of the length difference and the margin."""
)

_INPUTS = """categories (optional): name of the category of each pair, "" for none.
length_deltas (optional): length of i minus length of j for each pair, in any unit.
margins (optional): how much better i is than j, in any unit."""


class PreferenceGroups(evaluate.Metric):
    """Computes `accuracy/<group>/<name>` and `n/<group>/<name>`, like `BradleyTerryTrainer`."""

    def _info(self):
        return preference_info(_DESCRIPTION, _INPUTS)

    def _compute(
        self,
        predictions,
        references,
        categories=None,
        length_deltas=None,
        margins=None,
    ):
        n_pairs = len(predictions)
        zeros = np.zeros(n_pairs)
        # Constant values make no groups.
        if categories is None:
            categories = [""] * n_pairs
        if length_deltas is None:
            length_deltas = zeros
        if margins is None:
            margins = zeros
        judged = JudgedPairs(
            scores_i=np.asarray(predictions),  # only the difference of the two scores is used
            scores_j=zeros,
            targets=np.asarray(references),
            weights=np.ones(n_pairs),
            margins=np.asarray(margins, float),
            length_deltas=np.asarray(length_deltas, float),
            prompts=zeros,
            categories=np.asarray(list(categories), str),
        )
        result = {}
        for title, groups in judged.groups().items():
            for name, group in groups.items():
                result[f"accuracy/{title}/{name}"] = group["accuracy"]
                result[f"n/{title}/{name}"] = group["n"]
        return result
