"""Judging of the answers of all systems: scores, and who wins on each prompt."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from hf_rlhf_ext.cli.first_checks import check_model_folder, check_reward_folder
from hf_rlhf_ext.cli.functions import reward_function
from hf_rlhf_ext.data.text import plain_text
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.loading import base_and_revision, found_or_refused
from hf_rlhf_ext.modeling.locations import resolve_location
from hf_rlhf_ext.recipes.rounds_parts.data import Row
from hf_rlhf_ext.recipes.rounds_parts.evaluation import same_text
from hf_rlhf_ext.study.judges import Judge, PeopleJudge, compare_all, judge_from, outcomes_from_scores

TIE = 0.5
ASKED_FIRST = (("ppo",), ("dpo", "grpo", "rloo", "best_of_n"))
"""Kinds of systems in the order in which people are asked about them: what the study is about, then its rivals."""

Scores = list[float | None]
Outcomes = dict[str, list[float | None]]


@dataclass
class Judged:
    """Who won.

    Attributes:
        outcomes: for each judge and each pair "a|b", P(the answer of a is better) for each prompt; None where the judge
            failed.
        coverage: for each judge, how many answers or pairs it judged, on how many it failed, and
            how many it was not asked about, for its budget.
    """

    outcomes: dict[str, Outcomes] = field(default_factory=dict)
    coverage: dict[str, dict[str, Any]] = field(default_factory=dict)


def make_judges(specs: Sequence[Mapping[str, Any]], people: Path, *, trust_remote_code: bool = False) -> list[Judge]:
    """The judges that the options name. `people` is the folder where people's judgments are kept.

    Raises:
        UserError: an entry is wrong, two judges have the same name, or a folder holds no reward model.
    """
    judges: list[Judge] = []
    for spec in specs:
        judge = judge_from(spec, load=reward_function, folder=people)
        if judge.name in [other.name for other in judges]:
            raise UserError(f"judges: two have the name {judge.name}: give one of them a `name`.")
        if judge.reward_model is not None:
            check_judge_folder(judge.reward_model, trust_remote_code)
        judges.append(judge)
    return judges


def check_judge_folder(location: str, trust_remote_code: bool) -> None:
    """Raises `UserError` for a folder that cannot be loaded as a reward model, before all systems are trained."""
    check_reward_folder(location, "judges")
    if not Path(location).expanduser().is_dir():
        return  # on the Hub
    base, revision = base_and_revision(location, None)
    if base is not None:
        check_model_folder(base, f"judges: {location}: its base")
        path, options = resolve_location(base, revision)
        with found_or_refused("judges", f"{location}: its base {base}"):
            AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **options)


def finite_or_none(value: Any) -> float | None:
    """A number as float; None for None, NaN and infinities, which JSON has no word for."""
    if value is None or not math.isfinite(value):
        return None
    return float(value)


def scores_of_judge(judge: Judge, rows: Sequence[Row]) -> Scores | None:
    """The judge's score of each answer; None if it only compares."""
    return flat_scores_of_judge(judge, [row["prompt"] for row in rows], [row["completion"] for row in rows])


def flat_scores_of_judge(judge: Judge, prompts: Sequence[Any], completions: Sequence[Any]) -> Scores | None:
    """The judge's score of each completion; None if it only compares."""
    scores = judge.score(prompts, completions)
    return None if scores is None else [finite_or_none(score) for score in scores]


def judge_systems(
    judges: Sequence[Judge],
    answers: Mapping[str, Sequence[Row]],
    scores: Mapping[str, Mapping[str, Scores]],
    *,
    reference: str,
    folder: Path,
    kinds: Mapping[str, str] | None = None,
) -> Judged:
    """Who wins on each prompt, by each judge.

    A judge with scores compares every pair of systems. A judge that only compares is asked about the reference and each
    other system, as every question costs money or a person's time. Its answers are kept in `folder`.

    Args:
        judges: the judges.
        answers: the answers of each system, in the order of the systems.
        scores: by judge and system, the score of each answer.
        reference: name of the system with which judges without scores compare the others.
        folder: where judgments are kept, one file a judge.
        kinds: kind of each system. People whose judgments do not divide evenly judge PPO first: see `ASKED_FIRST`.
    """
    judged = Judged()
    others = [name for name in answers if name != reference]
    for judge in judges:
        of_systems = scores.get(judge.name)
        if of_systems:
            outcomes = {}
            for first, second in combinations(answers, 2):
                pair = outcomes_from_scores(of_systems[first], of_systems[second], tie=getattr(judge, "tie", 0.0))
                outcomes[f"{first}|{second}"] = pair
            asked = [score for values in of_systems.values() for score in values]
        else:
            if isinstance(judge, PeopleJudge):
                outcomes = asked_in_one_batch(judge, answers, reference, most_wanted_first(others, kinds or {}))
            else:
                outcomes = compared_with(judge, answers, reference, others, folder / f"{file_name(judge.name)}.json")
            asked = [value for values in outcomes.values() for value in values]
        judged.outcomes[judge.name] = outcomes
        counts = coverage_of(asked)
        counts["failed"] -= judge.coverage.not_asked  # no failure: people have a budget of judgments
        judged.coverage[judge.name] = counts | {
            "not_asked": judge.coverage.not_asked,
            "unit": "answers" if of_systems else "pairs",
            "first_error": judge.coverage.first_error,
        }
    return judged


def most_wanted_first(names: Sequence[str], kinds: Mapping[str, str]) -> list[str]:
    """The systems in the order in which people are asked about them; those of equal rank stay in their order."""
    ranks = {kind: rank for rank, group in enumerate(ASKED_FIRST) for kind in group}
    return sorted(names, key=lambda name: ranks.get(kinds.get(name), len(ASKED_FIRST)))


def coverage_of(values: Sequence[float | None]) -> dict[str, int]:
    """How many values are there, and how many are missing."""
    failed = sum(value is None for value in values)
    return {"judged": len(values) - failed, "failed": failed}


def file_name(name: str) -> str:
    """The name of a judge, such as `judges.py:judge`, as that of a file."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)


def asked_in_one_batch(
    judge: PeopleJudge, answers: Mapping[str, Sequence[Row]], reference: str, others: Sequence[str]
) -> Outcomes:
    """Asks people about each other system and the reference. They keep their judgments themselves."""
    rows = answers[reference]
    texts = {name: [row["completion"] for row in of_system] for name, of_system in answers.items()}
    pairs = [(name, reference) for name in others]
    categories = [row.get("category") for row in rows]
    found = compare_all(judge, [row["prompt"] for row in rows], texts, pairs, categories)
    return {f"{first}|{second}": [finite_or_none(v) for v in values] for (first, second), values in found.items()}


def compared_with(
    judge: Judge, answers: Mapping[str, Sequence[Row]], reference: str, others: Sequence[str], path: Path
) -> Outcomes:
    """Asks a judge about each other system and the reference. Equal texts are ties that nobody is asked about."""
    kept = KeptJudgments(path)
    outcomes: Outcomes = {}
    for name in others:
        pairs = list(zip(answers[name], answers[reference], strict=True))
        new = [k for k, (first, second) in enumerate(pairs) if not same_text(first, second)]
        new = [k for k in new if not kept.has(*pairs[k])]
        if new:
            prompts = [pairs[k][0]["prompt"] for k in new]
            first_texts = [pairs[k][0]["completion"] for k in new]
            second_texts = [pairs[k][1]["completion"] for k in new]
            for k, value in zip(new, judge.compare(prompts, first_texts, second_texts), strict=True):
                kept.add(*pairs[k], value)
            kept.save()
        outcomes[f"{name}|{reference}"] = [
            TIE if same_text(first, second) else kept.of(first, second) for first, second in pairs
        ]
    return outcomes


class KeptJudgments:
    """Judgments of pairs in a file, so that no pair is asked about twice.

    Args:
        path: the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.outcomes: dict[str, float | None] = {}
        if path.is_file():
            self.outcomes = json.loads(path.read_text(encoding="utf-8"))

    def has(self, first: Row, second: Row) -> bool:
        """Whether the pair was judged, or the judge failed on it."""
        return self._key(first, second) in self.outcomes

    def add(self, first: Row, second: Row, outcome: float | None) -> None:
        """Adds P(`first` is better)."""
        self.outcomes[self._key(first, second)] = finite_or_none(outcome)

    def of(self, first: Row, second: Row) -> float | None:
        """P(`first` is better)."""
        return self.outcomes[self._key(first, second)]

    def save(self) -> None:
        """Writes the file, never half of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.outcomes, indent=0) + "\n", encoding="utf-8")
        temporary.replace(self.path)

    @staticmethod
    def _key(first: Row, second: Row) -> str:
        texts = [plain_text(first["prompt"]), plain_text(first["completion"]), plain_text(second["completion"])]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:24]
