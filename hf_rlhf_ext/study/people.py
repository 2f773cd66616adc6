"""People as judges: pairs of answers on the collection page, blinded and shuffled."""

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..collect.outcomes import PairOutcomes, pair_task, same_words
from ..collect.tasks import Task
from ..data.text import plain_text
from ..errors import UserError
from .judgments import TIE, Coverage, Text, are_same

STORE = "judgments.sqlite"
"""File of the store in the folder of the judgments."""
BATCH = "compare"


class PeopleJudge:
    """Judges by people at the page of `hf-rlhf collect`.

    They do not see which system wrote what: the sides of a pair and the order of all pairs are drawn by the seed. Only
    pairs that differ in text are asked for. Judgments are on disk at once, and a second call goes on from there. The
    outcome of a pair is the mean over people.

    Args:
        folder: where `judgments.sqlite` is kept.
        names: people, who get a link each.
        name: how reports name the judge.
        wanted: number of people who judge each pair.
        judgments: number of pairs to ask for, spread evenly over the pairs of systems, the first prompts of each; None
            is all.
        host: address on which the page listens.
        port: port of the page. 0 takes 8347 or a free one.
        url: address of the page in links, if people reach it by another one.
        seed: draws the orders.
        simulated: simulated people who judge in place of people, for a trial.
        show: prints a line.
    """

    functions: tuple[Callable, ...] = ()
    reward_model: str | None = None
    trained_on: Any = None

    def __init__(
        self,
        folder: str | Path,
        names: Sequence[str],
        name: str = "people",
        *,
        wanted: int = 1,
        judgments: int | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        url: str | None = None,
        seed: int = 0,
        simulated: Sequence[Any] = (),
        show: Callable[[str], None] | None = None,
    ):
        for option, value in (("wanted", wanted), ("judgments", judgments)):
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (is_whole and value >= 1):
                raise UserError(f"judges: {option}={value!r} of people: give a whole number of at least 1.")
        n_people = len(set(names)) + len(simulated)
        if wanted > n_people:
            raise UserError(f"judges: wanted={wanted} people judge each pair, and people names {n_people}: name more.")
        self.folder = Path(folder)
        self.names = tuple(names)
        self.name = name
        self.wanted = wanted
        self.judgments = judgments
        self.page = {"host": host, "port": port, "url": url}
        self.seed = seed
        self.simulated = tuple(simulated)
        self.show = show
        self.coverage = Coverage("pairs")

    def score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> None:
        """None: people compare."""
        return None

    def compare(
        self,
        prompts: Sequence[Text],
        first: Sequence[Text],
        second: Sequence[Text],
        categories: Sequence[str | None] | None = None,
    ) -> list[float | None]:
        """P(the first answer is better), the mean over people; None for a pair that was not judged."""
        answers = {"first": first, "second": second}
        return self.compare_all(prompts, answers, [("first", "second")], categories)["first", "second"]

    def compare_all(
        self,
        prompts: Sequence[Text],
        answers: Mapping[str, Sequence[Text]],
        pairs: Sequence[tuple[str, str]],
        categories: Sequence[str | None] | None = None,
    ) -> dict[tuple[str, str], list[float | None]]:
        """The outcomes of several pairs of systems, judged in one batch: see `hf_rlhf_ext.study.judges.compare_all`."""
        coverage = Coverage("pairs")  # of all pairs, as a second call goes on where the first one stopped
        chosen = _evenly(len(prompts), len(pairs), self.judgments)
        tasks: dict[str, Task] = {}
        to_judge: list[tuple[tuple[str, str], int]] = []
        outcomes: dict[tuple[str, str], list[float | None]] = {}
        for pair, n_chosen in zip(pairs, chosen, strict=True):
            outcomes[pair] = [None] * len(prompts)
            n_asked = 0
            for row, prompt in enumerate(prompts):
                first, second = (answers[name][row] for name in pair)
                if are_same(first, second):
                    coverage.same_text += 1
                    outcomes[pair][row] = TIE
                    continue
                if n_asked == n_chosen:
                    coverage.not_asked += 1
                    continue
                n_asked += 1
                category = None if categories is None else categories[row]
                task = self._task(prompt, pair, (first, second), category)
                tasks.setdefault(task.fingerprint, task)  # two systems may give the same two answers
                to_judge.append((pair, row))

        judged = PairOutcomes(self._judged(tasks.values()))
        for pair, row in to_judge:
            outcome = judged.of(prompts[row], answers[pair[0]][row], answers[pair[1]][row])
            outcomes[pair][row] = outcome
            if outcome is None:
                coverage.no_answer += 1
            else:
                coverage.judged += 1
        self.coverage = coverage
        return outcomes

    def _task(self, prompt: Text, pair: tuple[str, str], sides: tuple[Text, Text], category: str | None) -> Task:
        sides = tuple(_like(prompt, side) for side in sides)
        words = sorted(same_words(side) for side in sides)
        return pair_task(
            prompt,
            list(zip(pair, sides, strict=True)),
            category=category,
            batch=BATCH,
            wanted=self.wanted,
            key=f"{self.seed}|{BATCH}|{same_words(prompt)}|{words}",
        )

    def _judged(self, tasks: Iterable[Task]) -> list[dict[str, Any]]:
        """The judged tasks as comparison rows."""
        # The pairs of a prompt would follow each other, and the pairs of a system, too.
        shuffled = sorted(tasks, key=lambda task: task.fingerprint)
        random.Random(self.seed).shuffle(shuffled)
        if not shuffled:
            return []
        # A batch of its own for these answers: an earlier call may have had others, for which nobody waits any more.
        digest = hashlib.sha256("".join(task.fingerprint for task in shuffled).encode()).hexdigest()[:12]
        batch = f"{BATCH}-{digest}"
        shuffled = [replace(task, batch=batch) for task in shuffled]
        # Imported here: they need the packages of the extra `collect`.
        from ..collect.export import comparisons
        from ..collect.judging import judge_tasks
        from ..collect.store import Store

        self.folder.mkdir(parents=True, exist_ok=True)
        how = "page"
        if self.simulated:
            how = "mixed" if self.names else "simulated"
        options = {} if self.show is None else {"show": self.show}
        with Store(self.folder / STORE) as store:
            store.add_tasks(shuffled)
            judge_tasks(store, how=how, batch=batch, names=self.names, people=self.simulated, **self.page, **options)
            rows, _ = comparisons(store, batch=batch)
        return rows


def _like(prompt: Text, completion: Text) -> Text:
    """The completion as text for a prompt that is text, else as messages: a task is all the one or all the other."""
    if isinstance(prompt, str):
        return plain_text(completion)
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion


def _evenly(n_prompts: int, n_pairs: int, judgments: int | None) -> list[int]:
    """How many prompts each pair of systems gets of all judgments: as evenly as they divide, the rest to the first."""
    if judgments is None:
        return [n_prompts] * n_pairs
    chosen = []
    left = judgments
    for position in range(n_pairs):
        n = min(n_prompts, -(-left // (n_pairs - position)))  # rounded up
        chosen.append(n)
        left -= n
    return chosen
