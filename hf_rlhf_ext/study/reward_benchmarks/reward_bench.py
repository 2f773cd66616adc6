"""RewardBench (Lambert et al. 2024, arXiv:2403.13787): 23 subsets of pairs in four sections, and four prior sets.

The aggregation follows github.com/allenai/reward-bench. The section of each subset and its number of pairs are those of
`rewardbench/constants.py` in the package rewardbench 0.1.4 (`SUBSET_MAPPING`, `EXAMPLE_COUNTS`). Earlier versions, such
as commit a32e272b3e018467f742a1b4d18c4cc3d0317d31, exchange the counts of the two XSTest subsets. The mean of a section
is `calculate_scores_per_section` in `rewardbench/utils.py` of the package, and the total score
`get_average_over_rewardbench` in `analysis/get_benchmark_results.py`, commit 0972ad3284a58ade36a6f2c6160cc83b68a67c62.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...data.text import is_messages
from .measures import Outcome, Term, measured, score_of_all
from .rows import BadRow, BenchmarkRow, ScoredRow, text_of

NAME = "reward-bench"
TITLE = "RewardBench"
HUB_ID = "allenai/reward-bench"
SPLITS = ("filtered",)
SOURCE = (
    "https://github.com/allenai/reward-bench/blob/0972ad3284a58ade36a6f2c6160cc83b68a67c62/"
    "analysis/get_benchmark_results.py"
)

PRIOR_HUB_ID = "allenai/preference-test-sets"
PRIOR_SETS = ("anthropic_helpful", "anthropic_hhh", "shp", "summarize")
PRIOR_WEIGHT = 0.5
"""Weight of the mean over the prior sets in the total score. A section has weight 1."""
PRIOR_SECTION = "Prior sets"

SECTIONS: dict[str, dict[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,  # earlier versions of the published constants exchange these two counts
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,  # 447 pairs, with as much weight as all code together
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    },
}
"""Section -> subset -> its weight in the section."""

_SUBSETS = {subset for subsets in SECTIONS.values() for subset in subsets}


def matches(record: Mapping[str, Any]) -> bool:
    """Whether a record has the published shape."""
    is_pair = isinstance(record.get("chosen"), str) and isinstance(record.get("rejected"), str)
    return is_pair and "prompt" in record and record.get("subset") in _SUBSETS


def read_row(record: Mapping[str, Any], number: int) -> BenchmarkRow:
    """Reads a row: `prompt` (text, or messages in the prior sets), `chosen`, `rejected`, `subset`."""
    prompt = record.get("prompt")
    if not (isinstance(prompt, str) and prompt) and not is_messages(prompt):
        raise BadRow("`prompt` is neither text nor messages")
    subset = text_of(record, "subset")
    if subset not in _SUBSETS and subset not in PRIOR_SETS:
        raise BadRow(f"`subset` {subset!r} is no subset of {TITLE}")
    completions = (text_of(record, "chosen"), text_of(record, "rejected"))
    return BenchmarkRow(prompt, completions, 1, subset, unit=str(number))


def aggregate(scored: Sequence[ScoredRow], *, seed: int = 0) -> Outcome:
    """Sections are means of subsets, weighted by `SECTIONS`; the score is the mean of the sections.

    A pair counts where the chosen completion scores strictly higher. The prior sets, if there are rows of them, enter
    the score with weight 0.5, by the unweighted mean of the sets. Subsets without rows are left out, as upstream does.
    Sections without rows are left out too, where upstream gives 0, and a note says so.
    """
    parts: dict[str, list[float]] = {}
    for entry in scored:
        is_right = entry.correct[0] > entry.wrong[0]
        parts.setdefault(entry.row.group, []).append(float(is_right))

    sections: dict[str, list[Term]] = {}
    missing = []
    for section, weights in SECTIONS.items():
        present = {subset: weight for subset, weight in weights.items() if subset in parts}
        if present:
            total = sum(present.values())
            sections[section] = [Term(subset, weight / total) for subset, weight in present.items()]
        else:
            missing.append(section)
    prior = [name for name in PRIOR_SETS if name in parts]
    if prior:
        sections[PRIOR_SECTION] = [Term(name, 1 / len(prior)) for name in prior]

    score, notes = score_of_all(missing, "section")
    formulas = {score: _total(sections), **sections}
    subsets = {f"subset {name}": [Term(name, 1.0)] for name in parts}
    arrays = {name: np.array(values) for name, values in parts.items()}
    every = measured(arrays, formulas | subsets, seed=seed)
    return Outcome(
        measures={name: every[name] for name in formulas},
        details={"subsets": {name: every[f"subset {name}"].as_dict() for name in parts}},
        notes=notes,
    )


def _total(sections: Mapping[str, Sequence[Term]]) -> list[Term]:
    """The weighted mean of the sections that are there."""
    weights = {name: PRIOR_WEIGHT if name == PRIOR_SECTION else 1.0 for name in sections}
    total = sum(weights.values())
    terms = []
    for name, section in sections.items():
        terms += [term._replace(weight=term.weight * weights[name] / total) for term in section]
    return terms
