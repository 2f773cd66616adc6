"""What the metric modules have in common; a function, as `evaluate.load` takes the first class that it finds."""

import datasets
import evaluate

_INPUTS = """predictions: r_i - r_j of each pair, in reward.
references: P(i over j) in [0, 1]; 0.5 is a tie.
"""


def preference_info(description: str, more_inputs: str) -> evaluate.MetricInfo:
    """The description of a metric of score gaps against judgements; `more_inputs` describes its further arguments."""
    value = datasets.Value("float64")
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description=_INPUTS + more_inputs,
        features=datasets.Features({"predictions": value, "references": value}),
    )
