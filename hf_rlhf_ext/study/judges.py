"""Judges of answers: a gold function, a reward model, a function that compares two answers, and people.

An outcome of a pair is P(the first answer is better), in [0, 1]: 0.5 is a tie, None means that there is no judgment.
"""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..collect.gold import CheckedGold, is_number
from ..collect.simulated import GoldReward
from ..data.text import plain_text, text_key
from ..errors import UserError
from ..reward_functions.named import is_call
from .judgments import FAILED, TIE, Coverage, Text, are_same, as_read, ask_in_batches
from .people import PeopleJudge

__all__ = [
    "Coverage",
    "Judge",
    "PairwiseJudge",
    "PeopleJudge",
    "RewardModelJudge",
    "ScoreJudge",
    "compare_all",
    "judge_from",
    "outcomes_from_scores",
]

Load = Callable[[str, str], Callable]
"""Finds the function that a name such as `file.py:function` means; the second argument is the option, for messages."""

Outcomes = list[float | None]


class Judge(Protocol):
    """What every judge has.

    Attributes:
        name: how reports name it.
        coverage: how much of what it was asked it has judged so far.
        functions: the callables by which it judges, for the check of independence.
        reward_model: folder or Hub id of the reward model by which it judges, or None.
        trained_on: the comparisons on which that reward model was trained, if the user named them.
    """

    name: str
    coverage: Coverage
    functions: tuple[Callable, ...]
    reward_model: str | None
    trained_on: Any

    def score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float | None] | None:
        """One score for each completion, None without a judgment. Returns None for a judge that only compares."""

    def compare(
        self,
        prompts: Sequence[Text],
        first: Sequence[Text],
        second: Sequence[Text],
        categories: Sequence[str | None] | None = None,
    ) -> Outcomes:
        """P(the first answer is better) for each prompt; None without a judgment.

        Args:
            prompts: N prompts, as text or as messages.
            first: N answers.
            second: N other answers.
            categories: N use cases, which people see.
        """


def outcomes_from_scores(
    first: Sequence[float | None], second: Sequence[float | None], *, tie: float = 0.0
) -> Outcomes:
    """1, 0.5 or 0 for each pair of scores: which is greater. Scores that differ by `tie` or less are a tie."""
    outcomes: Outcomes = []
    for one, other in zip(first, second, strict=True):
        if one is None or other is None:
            outcomes.append(None)
        elif abs(one - other) <= tie:
            outcomes.append(TIE)
        else:
            outcomes.append(float(one > other))
    return outcomes


class ScoreJudge:
    """Judges by a function that scores each answer alone: the higher score is better.

    Equal answers to equal prompts are scored once. Where the function fails on a batch, it is asked row by row.

    Args:
        function: `function(prompts, completions)` returns one number for each completion, or None. The completions are
            text; a prompt of several messages is a list of messages. A reward function of TRL works too.
        name: how reports name it.
        tie: scores that differ by this or less are a tie, in units of the score.
        batch_size: number of completions in a call.
    """

    reward_model: str | None = None
    trained_on: Any = None

    def __init__(self, function: Callable, name: str = "gold", *, tie: float = 0.0, batch_size: int = 64):
        if not (is_number(tie) and math.isfinite(tie) and tie >= 0):
            raise UserError(f"judge {name}: tie={tie!r}: give a finite number of at least 0, in units of the score.")
        self.name = name
        self.tie = float(tie)
        self.batch_size = batch_size
        self.functions: tuple[Callable, ...] = (function,)
        self.coverage = Coverage("completions")
        self._checked = CheckedGold(function, name, needs_all=False)
        self._known: dict[tuple[str, str], float | None] = {}

    def score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float | None]:
        """One score for each completion; None where there is none."""
        keys = [(text_key(prompt), text_key(answer)) for prompt, answer in zip(prompts, completions, strict=True)]
        new: dict[tuple[str, str], int] = {}
        for row, key in enumerate(keys):
            if key not in self._known:
                new.setdefault(key, row)
        rows = list(new.values())

        def ask(numbers: list[int]) -> Sequence[float | None]:
            chosen = [rows[number] for number in numbers]
            return self._scores([prompts[row] for row in chosen], [completions[row] for row in chosen])

        scores, error = ask_in_batches(ask, len(rows), self.batch_size)
        self.coverage.first_error = self.coverage.first_error or error
        for key, score in zip(new, scores, strict=True):
            self._known[key] = self._counted(score)
        return [self._known[key] for key in keys]

    def _scores(self, prompts: list[Text], completions: list[Text]) -> Sequence[float | None]:
        return self._checked([as_read(prompt) for prompt in prompts], [plain_text(answer) for answer in completions])

    def _counted(self, score: Any) -> float | None:
        if score is FAILED:
            self.coverage.failed += 1
            return None
        if score is None:
            self.coverage.no_answer += 1
            return None
        self.coverage.judged += 1
        return score

    def compare(
        self,
        prompts: Sequence[Text],
        first: Sequence[Text],
        second: Sequence[Text],
        categories: Sequence[str | None] | None = None,
    ) -> Outcomes:
        """1, 0.5 or 0 for each prompt: whether the first answer has the higher score; None if one has no score."""
        return outcomes_from_scores(self.score(prompts, first), self.score(prompts, second), tie=self.tie)


class RewardModelJudge(ScoreJudge):
    """Judges by a reward model that was trained on other comparisons than the training reward. It loads when asked.

    Args:
        folder: folder or Hub id of the reward model.
        name: how reports name it. None is "reward model" with the name of the folder.
        trained_on: the comparisons on which it was trained: a file, a folder, a Hub id, or rows. None looks them up in
            what the folder says of its training.
        tie: scores that differ by this or less are a tie, in units of the normalized reward.
        batch_size: number of completions in a forward pass.
        load: makes the scorer from the folder. None is `RewardScorer.from_pretrained`.
    """

    def __init__(
        self,
        folder: str | Path,
        name: str | None = None,
        *,
        trained_on: Any = None,
        tie: float = 0.0,
        batch_size: int = 32,
        load: Callable[[str], Callable] | None = None,
    ):
        super().__init__(self._ask_model, name or f"reward model {Path(folder).name}", tie=tie, batch_size=batch_size)
        self.functions = ()  # weights are compared, not words
        self.reward_model = str(folder)
        self.trained_on = trained_on
        self._load = load
        self._scorer: Callable | None = None

    def _ask_model(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        return self._scorer(prompts, completions)

    def _scores(self, prompts: list[Text], completions: list[Text]) -> Sequence[float | None]:
        return self._checked(prompts, completions)  # with their messages, as in training

    def score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float | None]:
        """The normalized reward of each completion.

        Raises:
            UserError: the reward model cannot be loaded.
        """
        if self._scorer is None:
            self._scorer = self._loaded()
        return super().score(prompts, completions)

    def _loaded(self) -> Callable:
        if self._load is not None:
            return self._load(self.reward_model)
        from ..reward.scorer import RewardScorer  # slow to import

        return RewardScorer.from_pretrained(self.reward_model, batch_size=self.batch_size)

    def release(self) -> None:
        """Frees the memory of the model. It is loaded again when it is needed."""
        self._scorer = None


class PairwiseJudge:
    """Judges by a function that compares two answers, which is asked in both orders.

    An answer wins only where it wins in both orders; otherwise the pair is a tie, as in MT-Bench (Zheng et al. 2023,
    arXiv:2306.05685, sec. 3.4). `coverage.disagreed` counts these.

    Args:
        function: `function(prompts, first, second)` returns for each prompt the probability that the first answer is
            better, in [0, 1]; or "first", "second" or "tie"; or None where it does not know.
        name: how reports name it.
        batch_size: number of pairs in a call.
    """

    reward_model: str | None = None
    trained_on: Any = None
    WORDS: Mapping[str, float] = {"first": 1.0, "second": 0.0, "tie": TIE}

    def __init__(self, function: Callable, name: str = "judge", *, batch_size: int = 64):
        self.name = name
        self.function = function
        self.batch_size = batch_size
        self.functions: tuple[Callable, ...] = (function,)
        self.coverage = Coverage("pairs")

    def score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> None:
        """None: it only compares."""
        return None

    def compare(
        self,
        prompts: Sequence[Text],
        first: Sequence[Text],
        second: Sequence[Text],
        categories: Sequence[str | None] | None = None,
    ) -> Outcomes:
        """P(the first answer is better) for each prompt, the mean of both orders if they agree, else 0.5."""
        outcomes: Outcomes = [TIE] * len(prompts)
        rows = [row for row in range(len(prompts)) if not are_same(first[row], second[row])]
        self.coverage.same_text += len(prompts) - len(rows)
        as_given = self._ask(prompts, first, second, rows)
        swapped = self._ask(prompts, second, first, rows)
        for row, one, other in zip(rows, as_given, swapped, strict=True):
            outcomes[row] = self._combined(one, other)
        return outcomes

    def _ask(
        self, prompts: Sequence[Text], first: Sequence[Text], second: Sequence[Text], rows: list[int]
    ) -> list[Any]:
        def ask(numbers: list[int]) -> list[float | None]:
            chosen = [rows[number] for number in numbers]
            answers = self.function(
                [as_read(prompts[row]) for row in chosen],
                [plain_text(first[row]) for row in chosen],
                [plain_text(second[row]) for row in chosen],
            )
            return [self._checked(answer) for answer in answers]

        answers, error = ask_in_batches(ask, len(rows), self.batch_size)
        self.coverage.first_error = self.coverage.first_error or error
        return answers

    def _checked(self, answer: Any) -> float | None:
        if isinstance(answer, str):
            answer = self.WORDS.get(answer.strip().lower(), answer)
        if answer is None or (is_number(answer) and math.isnan(answer)):
            return None
        if not is_number(answer) or not 0 <= answer <= 1:
            raise UserError(
                f"judge {self.name}: returned {answer!r}: return P(the first answer is better) between 0 and 1, "
                "or 'first', 'second' or 'tie'"
            )
        return float(answer)

    def _combined(self, as_given: Any, swapped: Any) -> float | None:
        """The outcome of a pair from the answers in both orders."""
        if as_given is FAILED or swapped is FAILED:
            self.coverage.failed += 1
            return None
        if as_given is None or swapped is None:
            self.coverage.no_answer += 1
            return None
        self.coverage.judged += 1
        turned = 1 - swapped  # also P(the first answer is better)
        if (as_given > TIE) == (turned > TIE) and (as_given < TIE) == (turned < TIE):
            return (as_given + turned) / 2
        self.coverage.disagreed += 1
        return TIE


def compare_all(
    judge: Judge,
    prompts: Sequence[Text],
    answers: Mapping[str, Sequence[Text]],
    pairs: Sequence[tuple[str, str]],
    categories: Sequence[str | None] | None = None,
) -> dict[tuple[str, str], Outcomes]:
    """Outcomes of several pairs of systems. People get all of them in one batch, shuffled.

    Args:
        judge: any judge.
        prompts: N prompts.
        answers: N answers of each system.
        pairs: names of two systems each.
        categories: N use cases.

    Returns:
        For each pair (a, b), N outcomes: P(the answer of a is better), or None.
    """
    if isinstance(judge, PeopleJudge):
        return judge.compare_all(prompts, answers, pairs, categories)
    return {(a, b): judge.compare(prompts, answers[a], answers[b], categories) for a, b in pairs}


# --- judges of a YAML file --------------------------------------------------------------------------------------------

KINDS: Mapping[str, tuple[str, ...]] = {
    "gold": ("tie", "batch_size"),
    "reward_model": ("trained_on", "tie", "batch_size"),
    "function": ("batch_size",),
    "people": ("wanted", "judgments", "host", "port", "url", "seed"),
}
"""Options of each kind of judge, besides `name`."""
VADER = "vader"


def judge_from(
    spec: Mapping[str, Any] | str | Callable, *, load: Load | None = None, folder: str | Path | None = None
) -> Judge:
    """Makes a judge from an entry of a YAML file.

    Args:
        spec: one of these, each with an optional `name`:

            - `{"gold": "vader"}` or `{"gold": "file.py:function", "tie": 0.1}`: a function that scores,
            - `{"reward_model": folder, "trained_on": file}`: a reward model,
            - `{"function": "file.py:function"}`: a function that compares two answers,
            - `{"people": ["anna", "tom"], "wanted": 2, "judgments": 200}`: people at the page.

            A text or a function alone is a `gold`.
        load: finds a function by its name: `hf_rlhf_ext.cli.functions.reward_function` in commands. Without it, give
            functions instead of names.
        folder: where people's judgments are kept.

    Raises:
        UserError: an option is unknown, missing or wrong, or a function is not found.
    """
    if isinstance(spec, str) or callable(spec):
        spec = {"gold": spec}
    kind = _kind_of(spec)
    given = spec[kind]
    options = {name: value for name, value in spec.items() if name != kind and value is not None}
    name = options.pop("name", None)
    if kind == "people":
        return _people(given, name, options, folder)
    if kind == "reward_model":
        _check_options(spec, options)
        return RewardModelJudge(given, name, **options)
    _check_options(spec, options)
    if given == VADER and kind == "gold":
        return ScoreJudge(GoldReward(), name or VADER, **options)
    function = _function(given, kind, load)
    name = name or _name_of(given)
    return ScoreJudge(function, name, **options) if kind == "gold" else PairwiseJudge(function, name, **options)


def _kind_of(spec: Any) -> str:
    """The kind of a judge, after all its options have been checked."""
    if not isinstance(spec, Mapping):
        raise UserError(f"judges: {spec!r} is no judge: give a mapping with one of {', '.join(KINDS)}.")
    kinds = [name for name in spec if name in KINDS]
    known = (*KINDS, "name", *sorted({name for names in KINDS.values() for name in names}))
    for name in spec:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"a judge has one of {', '.join(KINDS)}, and options"
            raise UserError(f"judges: unknown option {name!r}: {hint}")
    if len(kinds) != 1:
        found = f"has {' and '.join(kinds)}" if kinds else "says nothing of its kind"
        raise UserError(f"judges: {dict(spec)!r} {found}: give exactly one of {', '.join(KINDS)}.")
    unused = [name for name in spec if name not in (kinds[0], "name", *KINDS[kinds[0]])]
    if unused:
        raise UserError(
            f"judges: {unused[0]} is not used by a judge of kind {kinds[0]}: remove it (it takes "
            f"{', '.join(KINDS[kinds[0]])})."
        )
    return kinds[0]


def _check_options(spec: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Refuses numbers that are none."""
    size = options.get("batch_size", 1)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise UserError(f"judges: batch_size={size!r} of {dict(spec)!r}: give a whole number of at least 1.")


def _function(given: Any, kind: str, load: Load | None) -> Callable:
    if callable(given):
        return given
    if not isinstance(given, str):
        raise UserError(f"judges: {kind}={given!r} is no function: give path/to/file.py:function.")
    if load is None:
        raise UserError(f"judges: {kind}={given!r} is a name: give the function itself, or `load` to find it.")
    return load(given, f"judges: {kind}")


def _name_of(given: Any) -> str:
    """The name of a function for reports, where the folder of its file is of no interest."""
    if isinstance(given, str):
        return given.partition("(")[0].strip() if is_call(given) else Path(given).name
    return getattr(given, "__name__", type(given).__name__)


def _people(given: Any, name: str | None, options: dict[str, Any], folder: str | Path | None) -> PeopleJudge:
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list | tuple) or not names or not all(isinstance(one, str) and one for one in names):
        raise UserError(f"judges: people={given!r}: give a list of names, as in [anna, tom].")
    if folder is None:
        raise UserError("judges: people need a folder for their judgments: pass `folder`.")
    return PeopleJudge(folder, names, name or "people", **options)
