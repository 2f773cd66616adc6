"""KL of a policy to its reference, for `evaluate.load`."""

import datasets
import evaluate

from hf_rlhf_ext.metrics.info import info
from hf_rlhf_ext.metrics.outcomes import estimate_kl

_DESCRIPTION = """kl: KL(policy || reference) in nats per completion: k1 summed over tokens, mean over completions.
kl_k3: the same with k3, which is never negative.
kl_per_token: mean of k1 over all tokens, in nats per token."""

_INPUTS = """predictions: for each completion that the policy sampled, the log-probability of each token under it.
references: the same under the reference. Both in nats."""


class KLToReference(evaluate.Metric):
    """Computes `kl`, `kl_k3` and `kl_per_token`."""

    def _info(self):
        logprobs = datasets.Sequence(datasets.Value("float64"))
        return info(_DESCRIPTION, _INPUTS, predictions=logprobs, references=logprobs)

    def _compute(self, predictions, references):
        return estimate_kl(predictions, references)
