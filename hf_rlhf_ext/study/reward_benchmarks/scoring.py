"""Has a reward model score the rows of a benchmark: in parts that are kept in a file, so that a stopped run goes on."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...data.text import Unrenderable, make_message
from ...errors import UserError
from ...modeling.adapters import bare_model
from ...modeling.heads import learned_positions
from ...quality.reward_check import Fits, within
from ...reward.ensemble import RewardEnsemble
from ...reward.scorer import RewardScorer
from ...training.bars import progress_bar
from .rows import Coverage

SCORES_AT_A_TIME = 256
"""Completions that are scored, and then written to the file, at a time."""

RawScores = Callable[..., list[float]]
"""(prompts, completions) -> scores."""


@dataclass(frozen=True)
class Scorable:
    """A prompt with completions to score, as any benchmark has them.

    Attributes:
        position: Its place in the benchmark, which its scores are kept under.
        prompt: Text or messages.
        completions: Texts or messages.
        columns: `tools` and `chat_template_kwargs` of the row, if it has them.
    """

    position: int
    prompt: Any
    completions: Sequence[Any]
    columns: dict[str, Any] = field(default_factory=dict)

    def as_turns(self) -> "Scorable":
        """The same with text as a turn of the user and one of the assistant. Messages stay as they are."""
        if not isinstance(self.prompt, str):
            return self
        completions = [[make_message("assistant", text)] for text in self.completions]
        return replace(self, prompt=[make_message("user", self.prompt)], completions=completions)


@dataclass
class Scores:
    """The scores of a benchmark.

    Attributes:
        by_position: Scores of each row that was scored.
        coverage: How many rows that is, and why the others were left out.
    """

    by_position: dict[int, tuple[float, ...]]
    coverage: Coverage


@dataclass
class ScoreFile:
    """A file with the scores of rows so far, one a line. A broken last line, of a killed run, is not read.

    Args:
        path: The file. It belongs to one benchmark, one reward model and one limit of tokens. None keeps nothing.
    """

    path: Path | None
    lines: dict[int, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self):
        if self.path is None or not self.path.is_file():
            return
        whole_lines = []
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                content = json.loads(line)
                row, has_result = content["row"], "scores" in content or "left_out" in content
            except (ValueError, KeyError, TypeError):
                break
            if not has_result or not line.endswith("\n"):
                break
            self.lines[row] = content
            whole_lines.append(line)
        self.path.write_text("".join(whole_lines), encoding="utf-8")  # what is added starts a line of its own

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        """Adds the scores of rows, or the reasons why they have none."""
        for line in lines:
            self.lines[line["row"]] = line
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)


def input_limit(scorer: RewardScorer | RewardEnsemble, max_length: int | None = None) -> int | None:
    """The largest number of tokens that a reward model reads: its positions, or `max_length` if that is smaller."""
    first = scorer.members[0] if isinstance(scorer, RewardEnsemble) else scorer
    model = bare_model(first.model)
    limits = [learned_positions(model), max_length]
    if limits[0] is None:  # rotary positions: what the model was trained for
        limits[0] = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def fits_into(scorer: RewardScorer | RewardEnsemble, limit: int | None) -> Fits:
    """A function (prompt, completion) -> whether both have at most `limit` tokens together."""
    first = scorer.members[0] if isinstance(scorer, RewardEnsemble) else scorer
    return within(first.tokenizer, limit, first.asked)


def scores_function(scorer: RewardScorer | RewardEnsemble) -> RawScores:
    """Raw scores of a reward model; the combined rewards of an ensemble."""
    return scorer if isinstance(scorer, RewardEnsemble) else scorer.raw


def score_rows(
    score: RawScores,
    rows: Sequence[Scorable],
    *,
    fits: Fits | None = None,
    limit: int | None = None,
    path: Path | None = None,
    title: str = "benchmark",
) -> Scores:
    """Scores rows. A row of which one completion does not fit is left out, with the reason.

    Args:
        score: Function (prompts, completions) -> scores.
        rows: The rows.
        fits: Function (prompt, completion) -> whether both fit into the model. `None` means that all do.
        limit: The limit of tokens of `fits`, for the reason.
        path: File that scores are kept in. Rows that it has are not scored again.
        title: What the progress bar says.

    Raises:
        UserError: A score is not finite.
    """
    file = ScoreFile(path)
    waiting = [row for row in rows if row.position not in file.lines]
    n_completions = sum(len(row.completions) for row in waiting)
    with progress_bar(f"{title}: {n_completions} completions", n_completions) as advance:
        for part in _parts(waiting):
            file.add(_scored_part(score, part, fits, limit, title))
            advance(sum(len(row.completions) for row in part))

    by_position = {}
    left_out: Counter[str] = Counter()
    for row in rows:
        line = file.lines[row.position]
        if "left_out" in line:
            left_out[line["left_out"]] += 1
        else:
            by_position[row.position] = tuple(line["scores"])
    return Scores(by_position, Coverage(len(rows), len(by_position), left_out))


def _parts(rows: Sequence[Scorable]) -> Iterator[list[Scorable]]:
    """Parts of about `SCORES_AT_A_TIME` completions."""
    part: list[Scorable] = []
    size = 0
    for row in rows:
        part.append(row)
        size += len(row.completions)
        if size >= SCORES_AT_A_TIME:
            yield part
            part, size = [], 0
    if part:
        yield part


def _scored_part(
    score: RawScores, rows: Sequence[Scorable], fits: Fits | None, limit: int | None, title: str
) -> list[dict[str, Any]]:
    """The lines of rows: their scores, or why they have none."""
    lines: list[dict[str, Any]] = []
    able: list[Scorable] = []
    for row in rows:
        reason = _reason_against(row, fits, limit)
        if reason is None:
            able.append(row)
        else:
            lines.append({"row": row.position, "left_out": reason})
    if not able:
        return lines

    prompts: list[Any] = []
    completions: list[Any] = []
    columns: dict[str, list[Any]] = {name: [] for row in able for name in row.columns}
    for row in able:
        prompts += [row.prompt] * len(row.completions)
        completions += row.completions
        for name, values in columns.items():
            values += [row.columns.get(name)] * len(row.completions)
    scores = score(prompts, completions, **columns)
    if not np.isfinite(np.array(scores, float)).all():
        raise UserError(
            f"{title}: the reward model gives scores that are not finite, so it has diverged: train it again with a "
            "lower learning rate."
        )
    start = 0
    for row in able:
        end = start + len(row.completions)
        lines.append({"row": row.position, "scores": [float(value) for value in scores[start:end]]})
        start = end
    return lines


def _reason_against(row: Scorable, fits: Fits | None, limit: int | None) -> str | None:
    """Why a row cannot be scored. None if it can."""
    if fits is None:
        return None
    try:
        if all(fits(row.prompt, completion, **row.columns) for completion in row.completions):
            return None
    except Unrenderable as error:
        return error.reason
    return f"over {limit} tokens"
