"""Makes one system of a seed: chooses its rows, trains it, and says in its record what it was given."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_rlhf_ext import load_policy
from hf_rlhf_ext.recipes.compare_parts.data import RATING, Chosen, in_style, preferred, rows_of_seed, top_rated
from hf_rlhf_ext.recipes.compare_parts.learners import Place, Trained
from hf_rlhf_ext.recipes.compare_parts.records import Clock, SystemRecord
from hf_rlhf_ext.recipes.compare_parts.snapshots import now, since
from hf_rlhf_ext.recipes.compare_parts.systems import REWARD_MODEL, SystemSpec
from hf_rlhf_ext.recipes.compare_parts.trl_learners import with_sampling
from hf_rlhf_ext.study.best_of_n import best_of_n

if TYPE_CHECKING:
    from hf_rlhf_ext.recipes.compare_parts.running import CompareRun

SAMPLES = "samples.jsonl"
SAMPLING_TIME = "sampling_time.json"
BATCH_SIZE = 64
"""Completions in a batch of sampling."""


class SystemMaker:
    """Makes the systems of a seed.

    Args:
        run: the comparison.
        seed: the seed.
    """

    def __init__(self, run: "CompareRun", seed: int):
        self.run = run
        self.args = run.args
        self.seed = seed
        self.seed_folder = run.seed_folder(seed)
        self.data = self.seed_folder / "data"

    def make(self, spec: SystemSpec) -> SystemRecord:
        """Trains a system, if it has to be, and returns its record."""
        if spec.kind == "base":
            base = self.run.model_args.model_name_or_path
            return SystemRecord(spec.name, spec.kind, base, settings={"model": base})
        if spec.kind == "best_of_n":
            return self._record(spec, Trained(Clock(0.0, 0.0)), self._labels_of_reward())
        return getattr(self, f"_{spec.kind}")(spec)

    # ---- Kinds ----

    def _sft(self, spec: SystemSpec) -> SystemRecord:
        chosen = self.demonstrations(spec)
        place = self._place(spec)
        if spec.options.start == "base":
            trained = self.run.learners.sft(spec, chosen.rows, place)
        else:
            trained = self.run.trl.sft(spec, self._start(spec), chosen.rows, place)
        return self._record(spec, trained, chosen.labels, chosen.rule)

    def _rejection_sampling(self, spec: SystemSpec) -> SystemRecord:
        prompts = rows_of_seed(self.data, "prompts/train.jsonl")[: spec.options.n_prompts]
        place = self._place(spec)
        began = now()
        model, tokenizer = load_policy(self._start(spec), **self.run.base_options)
        if torch.cuda.is_available():
            model.to("cuda")
        sampled = best_of_n(
            model.eval(),
            prompts,
            self.run.training_reward(self.seed),
            spec.options.n,
            tokenizer=tokenizer,
            max_new_tokens=self.args.max_completion_length,
            temperature=self.args.temperature,
            seed=self.seed,
            batch_size=BATCH_SIZE,
            path=place.folder / SAMPLES,
        )
        del model
        sampling = time_with_earlier_calls(since(began), place.folder / SAMPLING_TIME)
        winners = list(sampled.demonstrations())
        trained = self.run.trl.sft(spec, self._start(spec), winners, place)
        trained = with_sampling(trained, sampling, len(sampled.prompts) * spec.options.n)
        rule = f"the best of {spec.options.n} completions by the reward for {len(winners)} prompts"
        return self._record(spec, trained, self._labels_of_reward(), rule)

    def _dpo(self, spec: SystemSpec) -> SystemRecord:
        pairs, n_judgments = self.run.pairs(self.seed)
        trained = self.run.trl.dpo(spec, self._start(spec), pairs, self._place(spec))
        return self._record(spec, trained, {"judgments": n_judgments})

    def _grpo(self, spec: SystemSpec) -> SystemRecord:
        return self._online(spec)

    def _rloo(self, spec: SystemSpec) -> SystemRecord:
        return self._online(spec)

    def _online(self, spec: SystemSpec) -> SystemRecord:
        prompts = rows_of_seed(self.data, "prompts/train.jsonl")
        reward = self.run.training_reward(self.seed)
        trained = self.run.trl.online(spec, self._start(spec), reward, prompts, self._place(spec))
        return self._record(spec, trained, self._labels_of_reward())

    def _ppo(self, spec: SystemSpec) -> SystemRecord:
        prompts = self.data / "prompts" / "train.jsonl"
        trained = self.run.learners.ppo(
            spec,
            self._start(spec),
            self.run.reward_options(self.seed),
            self._place(spec),
            prompts=str(prompts),
            n_prompts=len(rows_of_seed(self.data, "prompts/train.jsonl")),
            texts=str(self.data / "plain_text" / "train.jsonl"),
        )
        return self._record(spec, trained, self._labels_of_reward())

    # ---- Rows and labels ----

    def demonstrations(self, spec: SystemSpec) -> Chosen:
        """The demonstrations of a system, and how they were chosen."""
        options = spec.options
        if options.top_rated == "labels":
            return preferred(self.run.comparisons(self.seed), Path(self.args.comparisons).name)
        given = options.demonstrations or self.args.demonstrations
        source = Path(given).name
        if options.demonstrations is None:
            rows = rows_of_seed(self.data, "demonstrations.jsonl")
        else:
            rows = self.run.data.own_rows(options.demonstrations)
        if options.top_rated == "ratings":
            return top_rated(rows, options.min_rating, self.args.labels, self.seed, source)
        if options.style is not None:
            return in_style(rows, options, self.seed, source)
        rule = options.rule or f"all {len(rows)} demonstrations of {source}"
        return Chosen([without_rating(row) for row in rows], {"demonstrations": len(rows)}, rule)

    def _labels_of_reward(self) -> dict[str, int]:
        """The judgments that the reward model was trained on."""
        if not self.args.trains_reward_model:
            return {}
        return {"judgments": self.run.stages.measured(f"seed-{self.seed}/{REWARD_MODEL}")["judgments"]}

    # ---- The record ----

    def _place(self, spec: SystemSpec) -> Place:
        return Place(self.seed_folder, self.run.system_folder(self.seed, spec.name), self.seed)

    def _start(self, spec: SystemSpec) -> str:
        """The policy that a system starts from."""
        if spec.options.start == "base":
            return self.run.model_args.model_name_or_path
        return self.run.location(self.seed, self._record_of(spec.options.start).location)

    def _record_of(self, name: str) -> SystemRecord:
        return SystemRecord.load(self.run.system_folder(self.seed, name))

    def _record(
        self, spec: SystemSpec, trained: Trained, labels: Mapping[str, int], rule: str | None = None
    ) -> SystemRecord:
        """The record of a system: its own labels and time, and those of all that it builds on."""
        needs = self.run.all_needs(spec.needs(self.args))
        all_labels = dict(labels)
        total = trained.own
        for name in needs:
            total = total + self.run.own_time(self.seed, name)
            if name in self.run.specs:
                for kind, number in self._record_of(name).labels.items():
                    all_labels[kind] = max(all_labels.get(kind, 0), number)  # the same labels are given once
        if spec.kind == "best_of_n":
            start = spec.options.start
            location = self._start(spec) if start == "base" else self._record_of(start).location
        else:
            location = f"{self._place(spec).location}/policy"
        return SystemRecord(
            name=spec.name,
            kind=spec.kind,
            location=location,
            n=spec.options.n if spec.kind == "best_of_n" else 1,
            labels=all_labels,
            needs=tuple(needs),
            own=trained.own,
            total=total,
            completions=trained.completions,
            settings=dict(trained.settings or {}) | described(spec),
            rule=rule,
            snapshots=trained.snapshots,
        )


def time_with_earlier_calls(spent: Clock, path: Path) -> Clock:
    """The time of sampling with that of a call that was stopped after it, which `path` keeps as its samples are kept.

    The time of a call that was stopped while it sampled is not known.
    """
    if path.is_file():
        spent = spent + Clock(**json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(asdict(spent)), encoding="utf-8")
    return spent


def without_rating(row: Mapping[str, Any]) -> dict[str, Any]:
    """A demonstration without its rating, by which it was not chosen."""
    return {name: value for name, value in row.items() if name != RATING}


def described(spec: SystemSpec) -> dict[str, Any]:
    """The options that the user gave, for the report."""
    given = {name: value for name, value in asdict(spec.options).items() if value is not None and name != "kind"}
    return given | dict(spec.training)
