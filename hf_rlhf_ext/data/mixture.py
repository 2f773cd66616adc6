"""Demonstrations by rating and by use case: what text-davinci-001 and -002 were trained on, and InstructGPT's mix."""

import logging
import math
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset

from ..errors import UserError
from .text import plain_text

logger = logging.getLogger(__name__)

USE_CASE_SHARES: dict[str, float] = {
    "generation": 0.456,
    "open QA": 0.124,
    "brainstorming": 0.112,
    "chat": 0.084,
    "rewrite": 0.066,
    "summarization": 0.042,
    "classification": 0.035,
    "other": 0.035,
    "closed QA": 0.026,
    "extract": 0.019,
}
"""Shares of API prompts by use case (Ouyang et al. 2022, arXiv:2203.02155, table 1); they sum to 0.999 there too."""

DOLLY_USE_CASES = {
    "brainstorming": "brainstorming",
    "classification": "classification",
    "closed_qa": "closed QA",
    "creative_writing": "generation",
    "general_qa": "open QA",
    "information_extraction": "extract",
    "open_qa": "open QA",
    "summarization": "summarization",
}
"""Categories of databricks-dolly-15k as use cases; Dolly has no chat, rewrite or other."""


def apportion(n: int, shares: dict[str, float] = USE_CASE_SHARES, *, min_per_category: int = 0) -> dict[str, int]:
    """Splits `n` over the categories by largest remainder (Hamilton), then lifts small ones to the minimum.

    What the lifted categories gain is taken from the largest one. Raises `UserError` when `n` cannot hold the minimum.
    """
    if n < max(1, min_per_category * len(shares)):
        raise UserError(f"n={n} prompts cannot give {min_per_category} to each of {len(shares)} categories.")
    total = sum(shares.values())
    quotas = {name: n * share / total for name, share in shares.items()}
    counts = {name: math.floor(quota) for name, quota in quotas.items()}
    by_remainder = sorted(quotas, key=lambda name: counts[name] - quotas[name])
    for name in by_remainder[: n - sum(counts.values())]:
        counts[name] += 1
    while min(counts.values()) < min_per_category:
        counts[min(counts, key=counts.__getitem__)] += 1
        counts[max(counts, key=counts.__getitem__)] -= 1
    return counts


def filter_by_rating(dataset: Dataset, min_rating: float) -> tuple[Dataset, dict[str, int]]:
    """Rows rated at least `min_rating`, and rows without a rating: people's own demonstrations.

    OpenAI's "FeedME" models are SFT on both: demonstrations, and samples of the model rated 7 of 7 (its model index).

    Returns:
        The rows, and how many of each kind were kept and dropped. Where no row has a rating all stay, and a warning
        says so.

    Raises:
        UserError: every row has a rating, a lower one.
    """
    ratings = dataset["rating"] if "rating" in dataset.column_names else [None] * len(dataset)
    rated = [rating is not None and not math.isnan(rating) for rating in ratings]
    if not any(rated):
        logger.warning(
            f"min_rating={min_rating:g}: no row has a rating (looked for rating, score, stars, quality): all "
            f"{len(dataset)} rows are kept as people's demonstrations."
        )
    kept = [k for k, rating in enumerate(ratings) if not rated[k] or rating >= min_rating]
    if rated and not kept:
        raise UserError(f"min_rating={min_rating:g}: the highest rating is {max(ratings):g}: lower it.")
    unrated = len(rated) - sum(rated)
    counts = {"rated_kept": len(kept) - unrated, "rated_dropped": len(rated) - len(kept), "unrated_kept": unrated}
    return dataset.select(kept), counts


@dataclass(frozen=True)
class MixReport:
    """Wanted and obtained shares by category, and how many rows had a category that the mix does not name, or none."""

    rows: int
    wanted: dict[str, float]
    obtained: dict[str, int]
    other_category: int
    no_category: int

    def summary(self) -> str:
        shares = ", ".join(f"{c} {self.obtained[c] / self.rows:.3f} of {w:.3f}" for c, w in self.wanted.items())
        rest = f"; {self.other_category} rows of other categories and {self.no_category} without one were left out"
        return f"mix: {self.rows} rows; obtained of wanted share: {shares}{rest}"


def load_mix(name: str) -> dict[str, float]:
    """`"instructgpt"`, or a YAML file that maps categories to shares; shares are scaled to sum to 1.

    Raises:
        UserError: no such file, or something else in it.
    """
    shares: Any = USE_CASE_SHARES
    if name != "instructgpt":
        shares = _yaml(name, "mix")
        if not isinstance(shares, dict) or not all(_is_share(share) for share in shares.values()) or not shares:
            raise UserError(f"mix: {Path(name).name} must map categories to shares above 0 (chat: 0.3).")
    total = sum(shares.values())
    return {str(category): share / total for category, share in shares.items()}


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _yaml(name: str, option: str) -> Any:
    try:
        return yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{option}: cannot read {name}: {str(error).splitlines()[0]}.") from error


def categorise(dataset: Dataset, column: str = "category", rules: str | None = None) -> Dataset:
    """Use cases in `category`: Dolly's names translated; `rules`, a YAML file of category -> list of regular

    expressions, gives the first category one of whose expressions is found in the prompt to rows that have none.
    """
    patterns = {} if rules is None else _load_rules(rules)
    if column not in dataset.column_names and not patterns:
        raise UserError(f"category_column: no column {column!r}; found {', '.join(dataset.column_names)}.")

    def name(row: dict[str, Any]) -> str | None:
        given = row.get(column)
        if given is None:
            prompt = plain_text(row["prompt"])
            return next((use for use, found in patterns.items() if any(p.search(prompt) for p in found)), None)
        return DOLLY_USE_CASES.get(str(given), str(given))

    kept = dataset.remove_columns("category") if "category" in dataset.column_names else dataset
    return kept.add_column("category", [name(row) for row in dataset])


def _load_rules(path: str) -> dict[str, list[re.Pattern]]:
    table, file = _yaml(path, "category_rules"), Path(path).name
    if not isinstance(table, dict) or not table:
        raise UserError(f"category_rules: {file} must map categories to lists of expressions (chat: ['hello', 'hi']).")
    patterns: dict[str, list[re.Pattern]] = {}
    for category, expressions in table.items():
        where = f"category_rules: {file}, category {category!r}"
        if not isinstance(category, str):  # YAML reads no, on and 1 as something else
            raise UserError(f"{where} is a {type(category).__name__}, not a name: put it in quotes.")
        texts = expressions if isinstance(expressions, list) else []
        if not texts or not all(text and isinstance(text, str) for text in texts):
            raise UserError(
                f"{where}: write a list of regular expressions in quotes: {category}: ['summar', 'tl;?dr']."
            )
        patterns[category] = [_expression(text, where) for text in texts]
    return patterns


def _expression(text: str, where: str) -> re.Pattern:
    try:
        return re.compile(text, re.IGNORECASE)
    except (re.error, OverflowError, RecursionError) as error:
        mend = "mend it, or put \\ before a sign that stands for itself"
        raise UserError(f"{where}: {text!r} is no regular expression ({error}): {mend}.") from error


def sample_mix(
    dataset: Dataset, shares: dict[str, float], *, rows: int | None = None, seed: int = 0
) -> tuple[Dataset, MixReport]:
    """Draws rows without replacement so that `category` has the wanted shares, in shuffled order.

    Without `rows` it takes as many as the scarcest category that occurs at all allows. Where a category has fewer rows
    than its share of `rows` asks for, it gives what it has and the report shows the gap.

    Raises:
        UserError: no row has a wanted category, or `rows` are too few to give one.
    """
    by_category: dict[str, list[int]] = {name: [] for name in shares}
    seen = Counter(dataset["category"])
    for index, name in enumerate(dataset["category"]):
        if name in by_category:
            by_category[name].append(index)
    there = {name: len(indices) for name, indices in by_category.items() if indices}
    if not there:
        found = ", ".join(map(str, seen))
        raise UserError(f"mix: no row has one of the categories {', '.join(shares)}; found {found}.")
    if rows is not None and rows < 1:
        raise UserError(f"mix_rows={rows}: give a number above 0, or leave it out for as many as there can be.")
    n = rows or max(1, math.floor(min(count / shares[name] for name, count in there.items())))
    rng, chosen = random.Random(seed), []
    for name, quota in apportion(n, shares).items():
        rng.shuffle(by_category[name])
        chosen += by_category[name][:quota]
    if not chosen:
        raise UserError(f"mix: {n} rows give none to the categories that there are ({', '.join(there)}): ask for more.")
    rng.shuffle(chosen)
    picked = dataset.select(chosen)
    counts = Counter(picked["category"])
    unnamed = sum(count for name, count in seen.items() if name is not None and name not in shares)
    report = MixReport(len(picked), shares, {name: counts[name] for name in shares}, unnamed, seen.get(None, 0))
    return picked, report
