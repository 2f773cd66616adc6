"""Selects demonstrations by rating (as OpenAI's FeedME models) and by use case (as InstructGPT's prompt mix)."""

import logging
import math
import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset

from ..data.schema import Row
from ..data.text import plain_text
from ..errors import UserError, first_line

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
"""Shares of API prompts by use case (Ouyang et al. 2022, arXiv:2203.02155, table 1). They sum to 0.999 in the paper."""

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
"""Category of databricks-dolly-15k -> use case. Dolly has no category for chat, rewrite or other."""


def apportion(
    n: int,
    shares: dict[str, float] = USE_CASE_SHARES,
    *,
    min_per_category: int = 0,
) -> dict[str, int]:
    """Splits `n` over the categories by the largest-remainder (Hamilton) method.

    Categories below `min_per_category` are then raised to it, at the expense of the largest category.

    Args:
        n: Number of rows to split.
        shares: Share by category; the shares need not sum to 1.
        min_per_category: Smallest number of rows in each category.

    Returns:
        Number of rows by category, which sum to `n`.

    Raises:
        UserError: `n` is too small for the minimum in every category.
    """
    if n < max(1, min_per_category * len(shares)):
        raise UserError(f"n={n} prompts cannot give {min_per_category} to each of {len(shares)} categories: raise n.")
    total = sum(shares.values())
    quotas = {name: n * share / total for name, share in shares.items()}
    counts = {name: math.floor(quota) for name, quota in quotas.items()}
    # Rows that rounding down left over go to the categories with the largest remainders, one each.
    left_over = n - sum(counts.values())
    rounded_by = {name: counts[name] - quotas[name] for name in shares}  # 0 or less
    by_remainder = sorted(shares, key=rounded_by.__getitem__)
    for name in by_remainder[:left_over]:
        counts[name] += 1

    # Rows move from the largest category to the smallest, so that the sum stays the same.
    while min(counts.values()) < min_per_category:
        smallest = min(counts, key=counts.__getitem__)
        counts[smallest] += 1
        largest = max(counts, key=counts.__getitem__)
        counts[largest] -= 1
    return counts


def filter_by_rating(dataset: Dataset, min_rating: float) -> tuple[Dataset, dict[str, int]]:
    """Keeps rows rated at least `min_rating`, and rows without a rating, which count as human demonstrations.

    OpenAI's "FeedME" models are trained by SFT on both: human demonstrations, and model samples rated 7 out of 7
    (according to OpenAI's model index). If no row has a rating, all rows are kept and a warning is logged.

    Args:
        dataset: Demonstrations, with a column `rating` if there are ratings.
        min_rating: Lowest rating to keep.

    Returns:
        The rows, and the counts `rated_kept`, `rated_dropped` and `unrated_kept`.

    Raises:
        UserError: Every row has a rating, and all ratings are below `min_rating`.
    """
    if "rating" in dataset.column_names:
        ratings = list(dataset["rating"])
    else:
        ratings = [None] * len(dataset)
    kept = []
    n_rated = 0
    for k, rating in enumerate(ratings):
        # NaN is how pandas writes a missing rating.
        has_rating = rating is not None and not math.isnan(rating)
        n_rated += has_rating
        if not has_rating or rating >= min_rating:
            kept.append(k)

    if n_rated == 0:
        logger.warning(
            f"min_rating={min_rating:g}: no row has a rating (looked for rating, score, stars, quality): all "
            f"{len(dataset)} rows are kept as human demonstrations."
        )
    if ratings and not kept:
        highest = max(ratings)
        raise UserError(f"min_rating={min_rating:g}: the highest rating is {highest:g}: lower min_rating.")
    n_unrated = len(ratings) - n_rated
    counts = {
        "rated_kept": len(kept) - n_unrated,
        "rated_dropped": len(ratings) - len(kept),
        "unrated_kept": n_unrated,
    }
    return dataset.select(kept), counts


@dataclass(frozen=True)
class MixReport:
    """Result of `sample_mix`.

    Attributes:
        rows: Number of rows in the sample.
        wanted: Requested share by category.
        obtained: Number of sampled rows by category.
        other_category: Number of source rows with a category that is not in the mix.
        no_category: Number of source rows without a category.
    """

    rows: int
    wanted: dict[str, float]
    obtained: dict[str, int]
    other_category: int
    no_category: int

    def summary(self) -> str:
        shares = []
        for category, wanted in self.wanted.items():
            obtained = self.obtained[category] / self.rows
            shares.append(f"{category} {obtained:.3f} of {wanted:.3f}")
        left_out = f"{self.other_category} rows of other categories and {self.no_category} without a category dropped"
        return f"mix: {self.rows} rows; obtained of requested share: {', '.join(shares)}; {left_out}"


def load_mix(name: str) -> dict[str, float]:
    """Loads the shares of a mix, scaled to sum to 1.

    Args:
        name: `"instructgpt"`, or the path of a YAML file that maps categories to shares.

    Raises:
        UserError: The file does not exist, or is not a table of positive shares.
    """
    shares = USE_CASE_SHARES if name == "instructgpt" else _read_shares(name)
    total = sum(shares.values())
    return {str(category): share / total for category, share in shares.items()}


def _read_shares(file: str) -> dict[Any, float]:
    shares = _read_yaml(file, "mix")
    is_table = isinstance(shares, dict) and len(shares) > 0
    if not is_table or not all(map(_is_share, shares.values())):
        raise UserError(f"mix: {Path(file).name} must map categories to shares above 0 (chat: 0.3).")
    return shares


def _is_share(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return math.isfinite(value) and value > 0


def _read_yaml(name: str, option: str) -> Any:
    try:
        return yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{option}: cannot read {name}: {first_line(error)}.") from error


def categorize(dataset: Dataset, column: str = "category", rules: str | None = None) -> Dataset:
    """Writes the use case of each row to the column `category`. Dolly's category names are translated.

    Args:
        dataset: Rows with the column `prompt`.
        column: Column that holds the categories of the source.
        rules: Path of a YAML file that maps each category to a list of regular expressions. A row without a category
            gets the first category with an expression that matches its prompt.

    Raises:
        UserError: The column does not exist and there are no rules, or the rules cannot be read.
    """
    patterns = {} if rules is None else _load_rules(rules)
    if column not in dataset.column_names and not patterns:
        columns = ", ".join(dataset.column_names)
        raise UserError(f"category_column: no column {column!r}; found {columns}.")
    categories = [_category(row, column, patterns) for row in dataset]
    if "category" in dataset.column_names:
        dataset = dataset.remove_columns("category")
    return dataset.add_column("category", categories)


def _category(
    row: Row,
    column: str,
    patterns: dict[str, list[re.Pattern]],
) -> str | None:
    label = row.get(column)
    if label is not None:
        return DOLLY_USE_CASES.get(str(label), str(label))
    prompt = plain_text(row["prompt"])
    for category, expressions in patterns.items():
        if any(expression.search(prompt) for expression in expressions):
            return category
    return None


def _load_rules(path: str) -> dict[str, list[re.Pattern]]:
    table = _read_yaml(path, "category_rules")
    file = Path(path).name
    if not isinstance(table, dict) or not table:
        raise UserError(f"category_rules: {file} must map categories to lists of expressions (chat: ['hello', 'hi']).")
    patterns: dict[str, list[re.Pattern]] = {}
    for category, expressions in table.items():
        where = f"category_rules: {file}, category {category!r}"
        if not isinstance(category, str):  # YAML reads no, on and 1 as booleans and numbers
            kind = type(category).__name__
            raise UserError(f"{where} is a {kind}, not a name: put it in quotes.")
        if not _are_expressions(expressions):
            raise UserError(
                f"{where}: write a list of regular expressions in quotes: {category}: ['summar', 'tl;?dr']."
            )
        patterns[category] = [_compile(expression, where) for expression in expressions]
    return patterns


def _are_expressions(value: Any) -> bool:
    """True for a non-empty list of non-empty texts. An empty expression would match every prompt."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(entry, str) and entry for entry in value)


def _compile(text: str, where: str) -> re.Pattern:
    try:
        return re.compile(text, re.IGNORECASE)
    except (re.error, OverflowError, RecursionError) as error:
        remedy = "correct it, or put \\ before a special character"
        raise UserError(f"{where}: {text!r} is not a regular expression ({error}): {remedy}.") from error


def sample_mix(
    dataset: Dataset,
    shares: dict[str, float],
    *,
    rows: int | None = None,
    seed: int = 0,
) -> tuple[Dataset, MixReport]:
    """Draws rows without replacement so that the categories have the requested shares. The order is shuffled.

    If a category has fewer rows than its share of `rows`, all its rows are used and the report shows the gap.

    Args:
        dataset: Rows with the column `category`.
        shares: Requested share by category; they sum to 1.
        rows: Number of rows to draw. `None` draws as many as possible without running out of rows in any category
            that occurs in the dataset.
        seed: Seed of the random choice.

    Returns:
        The sampled rows and a `MixReport`.

    Raises:
        UserError: No row has a requested category, or `rows` is too small for a single row.
    """
    if rows is not None and rows < 1:
        raise UserError(f"mix_rows={rows}: give a number above 0, or leave it out to use as many rows as possible.")
    category_counts = Counter(dataset["category"])
    by_category = _rows_by_category(dataset, shares)
    available = {name: len(indices) for name, indices in by_category.items() if indices}
    if not available:
        wanted = ", ".join(shares)
        known = ", ".join(map(str, category_counts))
        raise UserError(f"mix: no row has one of the categories {wanted}; found {known}.")

    n = rows
    if n is None:
        # The category that runs out first limits the number of rows.
        limits = [count / shares[name] for name, count in available.items()]
        n = max(1, math.floor(min(limits)))
    rng = random.Random(seed)
    chosen: list[int] = []
    for name, quota in apportion(n, shares).items():
        rng.shuffle(by_category[name])
        chosen += by_category[name][:quota]
    if not chosen:
        known = ", ".join(available)
        raise UserError(f"mix: {n} rows are too few for the available categories ({known}): raise mix_rows.")
    # Shuffle, so that a batch holds several categories.
    rng.shuffle(chosen)
    picked = dataset.select(chosen)

    drawn = Counter(picked["category"])
    without_category = category_counts.get(None, 0)
    named = sum(category_counts[name] for name in shares)
    report = MixReport(
        rows=len(picked),
        wanted=shares,
        obtained={name: drawn[name] for name in shares},
        other_category=len(dataset) - named - without_category,
        no_category=without_category,
    )
    return picked, report


def _rows_by_category(dataset: Dataset, categories: Iterable[str]) -> dict[str, list[int]]:
    """Returns the row numbers of each category."""
    by_category: dict[str, list[int]] = {name: [] for name in categories}
    for index, name in enumerate(dataset["category"]):
        if name in by_category:
            by_category[name].append(index)
    return by_category
