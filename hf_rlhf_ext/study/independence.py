"""Whether a judge is independent of the training reward: no shared words, weights or training rows.

A judge that shares any of them measures how well training learned the judge's own mistakes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..hub.run_files import content_digest
from .judges import Judge
from .lexicons import Found, find_lexicons, is_same_callable, shared_words
from .training_rows import TrainingRows, read_training_rows

SHOWN_WORDS = 5
"""Number of shared words that a message lists."""


@dataclass(frozen=True)
class TrainingReward:
    """What the systems were trained on.

    Attributes:
        name: how messages name it.
        functions: reward functions that training called.
        reward_model: folder or Hub id of the reward model that training used, or None.
        trained_on: comparisons on which that reward model (or DPO) was trained: a file, a folder, rows, a list of
            these, or None to look them up in what the folder says of its training.
        files: files or folders from which `trained_on` was read, where it is rows: a judge whose folder says that it
            was trained on a file with the same content is refused even if that file is not there anymore.
    """

    name: str = "training reward"
    functions: Sequence[Callable] = ()
    reward_model: str | Path | None = None
    trained_on: Any = None
    files: Sequence[str | Path] = ()


@dataclass(frozen=True)
class Statement:
    """What a check found out about a judge, for the report.

    Attributes:
        judge: name of the judge.
        what: "words", "weights" or "rows".
        status: "independent", or "unknown" where it could not be checked.
        text: a sentence.
    """

    judge: str
    what: str
    status: str
    text: str


def check_independence(judges: Sequence[Judge], training: TrainingReward | Sequence[TrainingReward]) -> list[Statement]:
    """Refuses a judge that shares words, weights or training rows with the training reward.

    - Words: the same function, or collections of words that both look for. Two lists are related if they share 1 % of
      the smaller one and at least one word. `hf_rlhf_ext.study.lexicons` says what is seen.
    - Weights: the same folder, the same digest of the weights, or the same model in memory.
    - Rows: a pair of completions with the same prompt on which both reward models were trained; white space and roles
      do not count. All rows of a file count, also those that training held out. If the rows of one of them are not
      there anymore, the SHA-256 of its file, which the folder of a reward model has, is compared.

    Args:
        judges: the judges.
        training: what the systems were trained on; one, or several.

    Returns:
        What was checked and found independent, and what could not be checked ("unknown"), for the report.

    Raises:
        UserError: a judge and the training reward share something.
    """
    rewards = [training] if isinstance(training, TrainingReward) else list(training)
    statements = []
    for reward in rewards:
        known_rows = _Rows(reward)
        for judge in judges:
            statements += _check_words(judge, reward)
            statements += _check_weights(judge, reward)
            statements += known_rows.check(judge)
            if not judge.functions and judge.reward_model is None:
                statements.append(_people(judge, reward, known_rows))
    return statements


# --- words ------------------------------------------------------------------------------------------------------------


def _check_words(judge: Judge, reward: TrainingReward) -> Iterator[Statement]:
    for function in judge.functions:
        for other in reward.functions:
            if is_same_callable(function, other):
                raise UserError(
                    f"judges: {judge.name} is a function of {reward.name}, {_name_of(other)}: training would be judged "
                    "by what it optimized. Give another judge, or train on another reward."
                )
            yield _compare_words(judge, function, reward, other)
        if not reward.functions:
            yield Statement(
                judge.name,
                "words",
                "independent",
                f"judge {judge.name} shares nothing with {reward.name}, which is no function",
            )


def _compare_words(judge: Judge, function: Callable, reward: TrainingReward, other: Callable) -> Statement:
    ours, theirs = find_lexicons(function), find_lexicons(other)
    if ours.models.keys() & theirs.models.keys():
        raise UserError(
            f"judges: {judge.name} and {reward.name} ({_name_of(other)}) compute with the same model: give a judge "
            "with a model of its own."
        )
    for mine in ours.lexicons:
        for its in theirs.lexicons:
            shared = shared_words(mine.words, its.words)
            if shared:
                smaller = min(len(mine.words), len(its.words))
                shown = ", ".join(sorted(shared)[:SHOWN_WORDS])
                more = ", …" if len(shared) > SHOWN_WORDS else ""
                raise UserError(
                    f"judges: {judge.name} shares {len(shared)} of {smaller} words ({shown}{more}) with {reward.name}: "
                    f"they are in {mine.place} of the judge and in {its.place} of {_name_of(other)}. Give a judge, or "
                    "a reward, that looks for other words."
                )
    pair = f"{judge.name} and {_name_of(other)}"
    if not (ours.has_code or ours.lexicons) or not (theirs.has_code or theirs.lexicons):
        return Statement(
            judge.name, "words", "unknown", f"the code of {pair} cannot be read: whether they share words is unknown"
        )
    text = f"{pair} share no words ({_counted(ours)} and {_counted(theirs)})"
    return Statement(judge.name, "words", "independent", text)


def _counted(found: Found) -> str:
    words = set().union(*(lexicon.words for lexicon in found.lexicons))
    return f"{len(words)} words in {len(found.lexicons)} lists" if words else "no list of words"


def _name_of(function: Callable) -> str:
    return getattr(function, "__name__", type(function).__name__)


# --- weights ----------------------------------------------------------------------------------------------------------


def _check_weights(judge: Judge, reward: TrainingReward) -> Iterator[Statement]:
    if judge.reward_model is None:
        return
    if reward.reward_model is None:
        yield Statement(judge.name, "weights", "independent", f"{reward.name} has no reward model")
        return
    ours, theirs = (Path(str(name)).expanduser() for name in (judge.reward_model, reward.reward_model))
    same = str(judge.reward_model) == str(reward.reward_model)
    if ours.exists() and theirs.exists():
        same = same or ours.resolve() == theirs.resolve() or content_digest(ours) == content_digest(theirs)
    if same:
        raise UserError(
            f"judges: {judge.name} ({judge.reward_model}) has the same weights as {reward.name} "
            f"({reward.reward_model}): train a reward model on other comparisons, and give that one."
        )
    if ours.exists() and theirs.exists():
        yield Statement(judge.name, "weights", "independent", f"{judge.name} and {reward.name} have other weights")
    else:
        missing = ours if not ours.exists() else theirs
        yield Statement(
            judge.name, "weights", "unknown", f"{missing} is no local folder: its weights were compared by name only"
        )


# --- training rows ----------------------------------------------------------------------------------------------------


class _Rows:
    """The training rows of a training reward, read once for all judges."""

    def __init__(self, reward: TrainingReward):
        self.reward = reward
        self._rows: TrainingRows | None = None

    @property
    def is_trained(self) -> bool:
        return self.reward.reward_model is not None or self.reward.trained_on is not None

    @property
    def rows(self) -> TrainingRows:
        if self._rows is None:
            reward = self.reward
            self._rows = read_training_rows(reward.reward_model, reward.trained_on, reward.name, reward.files)
        return self._rows

    def check(self, judge: Judge) -> Iterator[Statement]:
        if judge.reward_model is None or not self.is_trained:
            return
        ours = read_training_rows(judge.reward_model, judge.trained_on, judge.name)
        theirs = self.rows
        if ours.dataset is not None and ours.dataset == theirs.dataset:
            raise UserError(
                f"judges: {judge.name} and {self.reward.name} were trained on the same dataset {ours.dataset}: train "
                "one of them on other comparisons, or say with `trained_on` on which rows each was trained."
            )
        for rows in (ours, theirs):
            if rows.pairs is None:
                self._refuse_same_file(judge, ours, theirs)
                text = f"{rows.why_unknown}: whether {judge.name} and {self.reward.name} share training rows is unknown"
                yield Statement(judge.name, "rows", "unknown", text)
                return
        shared = ours.pairs.keys() & theirs.pairs.keys()
        if shared:
            example = " ".join(ours.pairs[min(shared)].split())[:60]
            raise UserError(
                f"judges: {judge.name} and {self.reward.name} share {len(shared)} of {len(ours.pairs)} pairs on which "
                f"the judge was trained, such as {example!r}: train the judge without them."
            )
        prompts = len(ours.prompts & theirs.prompts)
        text = (
            f"{judge.name} was trained on {len(ours.pairs)} pairs and {self.reward.name} on {len(theirs.pairs)}, and "
            f"no pair is in both; of the judge's {len(ours.prompts)} prompts, {prompts} are in both"
        )
        yield Statement(judge.name, "rows", "independent", text)

    def _refuse_same_file(self, judge: Judge, ours: TrainingRows, theirs: TrainingRows) -> None:
        if ours.is_of_same_file(theirs):
            raise UserError(
                f"judges: {judge.name} and {self.reward.name} were trained on comparisons with the same SHA-256: "
                f"report.json in {judge.reward_model} says so. Train the judge on other comparisons, or say with "
                "`trained_on` on which rows it was trained."
            )


def _people(judge: Judge, reward: TrainingReward, known_rows: _Rows) -> Statement:
    """People share no words and no weights with a reward, but the same ones may have judged its comparisons."""
    if known_rows.is_trained:
        rows = known_rows.rows
        if rows.pairs is None:
            text = f"{rows.why_unknown}: whether the same people judged the comparisons of {reward.name} is unknown"
            return Statement(judge.name, "rows", "unknown", text)
        both = sorted(rows.annotators & set(getattr(judge, "names", ())))
        if both:
            text = (
                f"{', '.join(both)} also judged comparisons on which {reward.name} was trained: what the same people "
                "like is measured, and whether others like it is unknown"
            )
            return Statement(judge.name, "rows", "unknown", text)
    return Statement(judge.name, "rows", "independent", f"people judge, who have no part in {reward.name}")
