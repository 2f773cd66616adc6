"""Evaluation of the systems of a seed: answers to the held-out prompts, KL, proxy, gold, lengths, alignment tax.

What is measured of a system is kept in `seed-N/evaluation/<name>.json`, so that a stopped run goes on where it was.
"""

import hashlib
import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_rlhf_ext.data.text import plain_text, text_key
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.run_files import content_digest
from hf_rlhf_ext.metrics.texts import distinct_n, refusal_rate, repetition
from hf_rlhf_ext.recipes.compare_parts.answers import Answers, PinnedEvaluator
from hf_rlhf_ext.recipes.compare_parts.judging import finite_or_none, judge_systems, scores_of_judge
from hf_rlhf_ext.recipes.compare_parts.picking import best_of_n_entry, largest_n, scores_of_samples
from hf_rlhf_ext.recipes.compare_parts.records import SystemRecord
from hf_rlhf_ext.recipes.rounds_parts.data import Row, read_rows
from hf_rlhf_ext.reward.scorer import RewardScorer
from hf_rlhf_ext.study.alignment_tax import exact_match, perplexity
from hf_rlhf_ext.study.best_of_n import BestOfN
from hf_rlhf_ext.study.judges import Judge, RewardModelJudge

RESULTS = "results.json"
"""File of a seed's results, in the folder of the seed."""
Reward = Callable[[Sequence[Any], Sequence[Any]], Sequence[float | None]]


@dataclass(frozen=True)
class EvaluationSetup:
    """What the evaluation of every seed shares.

    Attributes:
        folder: folder of the run.
        judges: judges of the answers; the first one is that of the main table.
        base_model: name or folder of the base model.
        revision: its revision on the Hub.
        base_options: options of `load_policy` for all policies, such as `dtype`.
        temperature: temperature of sampling, at which KL is computed too.
        max_completion_length: maximum length of an answer, in tokens.
        max_tokens_per_batch: maximum number of tokens in a forward pass.
        clock: which time the tables show: "wall" or "cpu".
        reward_model: folder of the reward model of training, relative to the folder of the seed; None without one.
        proxy: the reward of training, if it is a function rather than a reward model.
        plain_texts: texts for the perplexity.
        exact_match_items: items of the exact-match task.
        reference: name of the system to which KL and win rates refer.
    """

    folder: Path
    judges: Sequence[Judge]
    base_model: str
    revision: str | None = None
    base_options: Mapping[str, Any] = field(default_factory=dict)
    temperature: float = 1.0
    max_completion_length: int = 64
    max_tokens_per_batch: int = 16384
    clock: Literal["cpu", "wall"] = "wall"
    reward_model: str | None = "reward_model"
    proxy: Reward | None = None
    plain_texts: Sequence[str] = ()
    exact_match_items: Sequence[Any] = ()
    reference: str = "sft"

    def seed_folder(self, seed: int) -> Path:
        """Folder of a seed."""
        return self.folder / f"seed-{seed}"


class SeedEvaluator:
    """Measures the systems of one seed.

    Args:
        setup: what all seeds share.
        seed: the seed, of sampling too.
        records: all systems of the seed that can answer, the reference among them.

    Raises:
        UserError: the reference is not among the systems.
    """

    def __init__(self, setup: EvaluationSetup, seed: int, records: Sequence[SystemRecord]):
        self.setup = setup
        self.seed = seed
        self.folder = setup.seed_folder(seed)
        self.records = {record.name: record for record in records}
        self.samples: dict[str, BestOfN] = {}
        self._sample_scores: dict[tuple[str, int], list[list[float | None]] | None] = {}
        if setup.reference not in self.records:
            raise UserError(
                f"systems: {setup.reference!r} has no answers, and all others are compared with it: see what its "
                "training printed, and run the same command again."
            )

    @cached_property
    def prompts(self) -> list[Row]:
        """The held-out prompts of the seed."""
        return read_rows(self.folder / "data" / "prompts" / "heldout.jsonl")

    @cached_property
    def answers(self) -> Answers:
        setup = self.setup
        evaluator = PinnedEvaluator(
            self.location(self.records[setup.reference].location),
            revisions={setup.base_model: setup.revision},
            base_options=setup.base_options,
            temperature=setup.temperature,
            max_new_tokens=setup.max_completion_length,
            max_tokens=setup.max_tokens_per_batch,
            seed=self.seed,
        )
        return Answers(evaluator, self.prompts)

    def location(self, name: str) -> str:
        """A folder of the seed as a path, or the name of a base model as it is."""
        folder = self.folder / name
        return str(folder) if folder.is_dir() else name

    def completions_file(self, name: str) -> Path:
        """File of the answers of a system or of a snapshot."""
        return self.folder / "completions" / f"{name}.jsonl"

    # ---- Rewards ----

    @cached_property
    def scorer(self) -> RewardScorer | None:
        """The reward model of training."""
        if self.setup.proxy is not None or self.setup.reward_model is None:
            return None
        folder = self.folder / self.setup.reward_model
        return RewardScorer.from_pretrained(folder) if folder.is_dir() else None

    def reward_scale(self) -> dict[str, float]:
        """By what a difference of rewards is multiplied to get log-odds; empty for a reward that is a function."""
        return {} if self.scorer is None else {"scale": self.scorer.std}

    def proxy(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float | None] | None:
        """The reward of training; None without any."""
        reward = self.setup.proxy or self.scorer
        if reward is None:
            return None
        return [finite_or_none(value) for value in reward(list(prompts), list(completions))]

    def proxy_of(self, rows: Sequence[Row]) -> list[float | None] | None:
        """The reward of training for each answer."""
        return self.proxy([row["prompt"] for row in rows], [row["completion"] for row in rows])

    def gold_of(self, rows: Sequence[Row]) -> dict[str, list[float | None]]:
        """The scores of each judge that gives scores."""
        scores = {}
        for judge in self.setup.judges:
            values = scores_of_judge(judge, rows)
            if values is not None:
                scores[judge.name] = values
        return scores

    def sample_scores(self, judge: Judge, samples: BestOfN) -> list[list[float | None]] | None:
        """The judge's score of every sample of best-of-n, computed once for all n; None without scores."""
        key = (judge.name, id(samples.completions))
        if key not in self._sample_scores:
            self._sample_scores[key] = scores_of_samples(judge, samples)
        return self._sample_scores[key]

    # ---- A system ----

    def system(self, record: SystemRecord) -> dict[str, Any]:
        """What is measured of a system, from the file of an earlier call if nothing has changed since.

        Answers are kept where only the judging has changed, such as by another judge, or where the call was stopped.
        """
        path = self.folder / "evaluation" / f"{record.name}.json"
        key = {"answers": self._key_of_answers(record), "measured": self._key_of_numbers(record)}
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"key": {}}
        if kept["key"] == key:
            return kept["measured"]
        if kept["key"].get("answers") != key["answers"]:
            self._forget_answers(record.name)  # of a policy that was trained again
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json({"key": {"answers": key["answers"]}}, path)  # a stopped call goes on with its answers
        measured = self._measure(record)
        write_json({"key": key, "measured": measured}, path)
        return measured

    def _measure(self, record: SystemRecord) -> dict[str, Any]:
        entry = described(record)
        if record.kind == "best_of_n":
            entry |= best_of_n_entry(self, record)
            entry["alignment_tax"] = None
        else:
            path = self.completions_file(record.name)
            rows, tax = self.answers.of_policy(self.location(record.location), path, self._alignment_tax)
            entry |= self._of_answers(rows)
            entry["alignment_tax"] = tax
        rows = read_rows(self.completions_file(record.name))
        entry["texts"] = text_metrics([plain_text(row["completion"]) for row in rows])
        entry["snapshots"] = [self._snapshot(record, number) for number in range(len(record.snapshots))]
        return entry

    def _of_answers(self, rows: Sequence[Row]) -> dict[str, Any]:
        return {
            "kl": [row["kl"] for row in rows],
            "length": [row["n_tokens"] for row in rows],
            "proxy": self.proxy_of(rows),
            "gold": self.gold_of(rows),
        }

    def _snapshot(self, record: SystemRecord, number: int) -> dict[str, Any]:
        snapshot = record.snapshots[number]
        path = self.completions_file(f"{record.name}@{number}")
        rows, _ = self.answers.of_policy(self.location(snapshot.location), path)
        return {"step": snapshot.step, "own": asdict(snapshot.own)} | self._of_answers(rows)

    def _alignment_tax(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        tax = {}
        if self.setup.plain_texts:
            tax["perplexity"] = perplexity(model, tokenizer, self.setup.plain_texts)
        if self.setup.exact_match_items:
            found = exact_match(model, tokenizer, self.setup.exact_match_items)
            tax["exact_match"] = {name: value for name, value in found.items() if name != "answers"}
        return tax

    def weights_digest(self, location: str) -> str:
        """A digest of the weights in a folder of the seed; of a base model, its name as part of a file name."""
        folder = self.folder / location
        if folder.is_dir():
            return content_digest(folder)
        return hashlib.sha256(f"{location} {self.setup.revision}".encode()).hexdigest()[:16]

    def _key_of_answers(self, record: SystemRecord) -> str:
        """A digest of all that the answers of a system and of its snapshots depend on."""
        setup = self.setup
        depends_on: dict[str, Any] = {
            "weights": self.weights_digest(record.location),
            "snapshots": [self.weights_digest(snapshot.location) for snapshot in record.snapshots],
            "reference": self.weights_digest(self.records[setup.reference].location),
            "prompts": [text_key(row["prompt"]) for row in self.prompts],
            "temperature": setup.temperature,
            "max_completion_length": setup.max_completion_length,
        }
        return digest_of(depends_on)

    def _key_of_numbers(self, record: SystemRecord) -> str:
        """A digest of what else the numbers of a system depend on."""
        setup = self.setup
        depends_on: dict[str, Any] = {
            "record": asdict(record),
            "reward_model": None if setup.reward_model is None else self.weights_digest(setup.reward_model),
            "proxy": code_of(setup.proxy),
            "judges": [(judge.name, [code_of(function) for function in judge.functions]) for judge in setup.judges],
            "plain_texts": list(setup.plain_texts),
            "exact_match_items": [str(item) for item in setup.exact_match_items],
        }
        if record.kind == "best_of_n":
            depends_on["samples"] = largest_n(self, record)
        return digest_of(depends_on)

    def _forget_answers(self, name: str) -> None:
        for path in (self.folder / "completions").glob(f"{name}.*"):
            path.unlink()
        for path in (self.folder / "completions").glob(f"{name}@*"):
            path.unlink()


def digest_of(content: Any) -> str:
    """A digest of JSON values."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code_of(function: Callable | None) -> str | None:
    """The name of a function and a digest of its instructions; of another callable, the name of its type."""
    if function is None:
        return None
    code = getattr(function, "__code__", None)
    if code is None:
        return type(function).__name__
    constants = [value for value in code.co_consts if isinstance(value, str | int | float | tuple)]
    return f"{function.__qualname__} {digest_of([code.co_code.hex(), list(code.co_names), constants])}"


def described(record: SystemRecord) -> dict[str, Any]:
    """What training wrote down about a system, as `results.json` has it."""
    values = asdict(record)
    entry = {"status": "ok", "error": None}
    for name in ("kind", "n", "location", "labels", "settings", "rule", "needs", "own", "total", "completions"):
        entry[name] = values[name]
    return entry


def text_metrics(texts: Sequence[str]) -> dict[str, float]:
    """Metrics of the answers of a system as texts."""
    return {"distinct_2": distinct_n(texts, n=2), "repetition": repetition(texts), "refusal_rate": refusal_rate(texts)}


def write_json(content: Any, path: Path) -> None:
    """Writes a JSON file, never half of it."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    temporary.replace(path)


# --- a seed ----------------------------------------------------------------------------------------------------------


def evaluate(
    setup: EvaluationSetup,
    seed: int,
    records: Sequence[SystemRecord],
    *,
    failures: Mapping[str, str] | None = None,
    kinds: Mapping[str, str] | None = None,
    leaks: Mapping[str, Any] | None = None,
    reward_model: Mapping[str, Any] | None = None,
    on_system: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measures all systems of a seed and compares their answers. Writes `results.json` and returns its content.

    A system whose evaluation fails is recorded as failed, and the others go on.

    Args:
        setup: what all seeds share.
        seed: the seed.
        records: the systems that can answer, in the order of the report.
        failures: reason of each system that failed in training.
        kinds: kind of every system, also of those that failed, in the order of the report. None: that of `records`,
            with the failed ones at the end.
        leaks: prompts of training among the held-out ones, which were left out.
        reward_model: what the training of the reward model measured, such as `accuracy` and `pairs`.
        on_system: called with the name of each system before it is evaluated.

    Raises:
        UserError: the reference cannot answer.
    """
    evaluator = SeedEvaluator(setup, seed, records)
    kinds = kinds or {record.name: record.kind for record in records}
    entries = {name: failed_entry(reason, kinds.get(name)) for name, reason in (failures or {}).items()}
    # The reference first: without it, nothing can be compared.
    in_order = sorted(evaluator.records.values(), key=lambda record: record.name != setup.reference)
    for record in in_order:
        if on_system is not None:
            on_system(record.name)
        try:
            entries[record.name] = evaluator.system(record)
        except Exception as error:
            if record.name == setup.reference:
                raise
            traceback.print_exc()
            entries[record.name] = described(record) | failed_entry(one_line(error), record.kind)
    names = [name for name in kinds if name in entries and entries[name]["status"] == "ok"]
    judged = judge_systems(
        setup.judges,
        {name: read_rows(evaluator.completions_file(name)) for name in names},
        scores_by_judge({name: entries[name] for name in names}),
        reference=setup.reference,
        folder=evaluator.folder / "judgments",
        kinds=kinds,
    )
    ordered = [*(name for name in kinds if name in entries), *(name for name in entries if name not in kinds)]
    results = {
        "seed": seed,
        "clock": setup.clock,
        "prompts": len(evaluator.prompts),
        "prompt_ids": [text_key(row["prompt"]) for row in evaluator.prompts],
        "leaks": dict(leaks or {}),
        "reference": setup.reference,
        "reward_model": dict(reward_model or {}) | evaluator.reward_scale(),
        "systems": {name: entries[name] for name in ordered},
        "categories": [row.get("category") for row in evaluator.prompts],
        "outcomes": judged.outcomes,
        "coverage": judged.coverage,
    }
    for judge in setup.judges:
        if isinstance(judge, RewardModelJudge):
            judge.release()
    path = evaluator.folder / RESULTS
    write_json(results, path)
    return json.loads(path.read_text(encoding="utf-8"))


def scores_by_judge(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, list[float | None]]]:
    """By judge and system, the score of each answer that was given; not what best-of-n reaches on average."""
    by_judge: dict[str, dict[str, list[float | None]]] = {}
    for name, entry in entries.items():
        for judge, scores in entry.get("answer_gold", entry["gold"]).items():
            by_judge.setdefault(judge, {})[name] = scores
    return by_judge


def failed_entry(reason: str, kind: str | None) -> dict[str, Any]:
    """The entry of a system that failed."""
    return {"status": "failed", "error": reason, "kind": kind}


def one_line(error: Exception) -> str:
    """An error as one line for the report."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, UserError) else f"{type(error).__name__}: {lines[0]}"
