"""Win rate of a system against another one, for `evaluate.load`."""

import datasets
import evaluate

from hf_rlhf_ext.metrics.info import info
from hf_rlhf_ext.metrics.outcomes import count_outcomes

_DESCRIPTION = """wins, ties, losses, failed: numbers of prompts.
win_rate: mean outcome, in which a tie counts half, with the 95 % bootstrap bounds win_rate_low and win_rate_high.
decided_low, decided_high: 95 % Wilson interval of wins / (wins + losses)."""

_INPUTS = """predictions: P(the answer of the system is better) for each prompt, in [0, 1]; 0.5 is a tie, NaN a prompt
without a judgment."""


class WinRate(evaluate.Metric):
    """Computes the counts and rates of `count_outcomes`."""

    def _info(self):
        return info(_DESCRIPTION, _INPUTS, predictions=datasets.Value("float64"))

    def _compute(self, predictions):
        return count_outcomes(predictions)
