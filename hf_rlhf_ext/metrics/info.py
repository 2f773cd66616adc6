"""Descriptions of the metric modules, as functions, since `evaluate.load` uses the first class of a module."""

import datasets
import evaluate

_INPUTS = """predictions: reward difference r_i - r_j of each pair.
references: P(i over j) of each pair, in [0, 1]; 0.5 is a tie.
"""


def preference_info(description: str, more_inputs: str) -> evaluate.MetricInfo:
    """Describes a metric that compares reward differences to judgments. `more_inputs` describes further arguments."""
    value = datasets.Value("float64")
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description=_INPUTS + more_inputs,
        features=datasets.Features({"predictions": value, "references": value}),
    )


def info(description: str, inputs: str, **features: datasets.Value | datasets.Sequence) -> evaluate.MetricInfo:
    """Describes a metric of generated answers. `features` are its inputs by name, which `inputs` describes."""
    return evaluate.MetricInfo(
        description=description, citation="", inputs_description=inputs, features=datasets.Features(features)
    )
