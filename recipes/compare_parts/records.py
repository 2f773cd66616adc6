"""What `hf-rlhf compare` writes down about a trained system: the seam between training, evaluation and report.

A run has one folder a seed, and in it one folder a system:

    seed-0/data/                     demonstrations.jsonl, comparisons/, prompts/train.jsonl, prompts/heldout.jsonl
    seed-0/systems/<name>/system.json        the `SystemRecord`
    seed-0/systems/<name>/policy/            the adapter, if the system trains one
    seed-0/systems/<name>/snapshots/<n>/     adapters saved during training
    seed-0/completions/<name>.jsonl          one answer to each held-out prompt
    seed-0/results.json                      what the evaluation measured
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SYSTEM_FILE = "system.json"


@dataclass(frozen=True)
class Clock:
    """Time of a piece of work.

    Attributes:
        seconds: wall time.
        cpu_seconds: time of this process on all its cores, which other work on the machine does not change.
    """

    seconds: float
    cpu_seconds: float

    def __add__(self, other: "Clock") -> "Clock":
        return Clock(self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds)


@dataclass(frozen=True)
class Snapshot:
    """A policy that was saved during training.

    Attributes:
        step: optimizer steps so far.
        own: time of training so far, without evaluations and saving.
        location: folder of the adapter, relative to the folder of the seed.
    """

    step: int
    own: Clock
    location: str


@dataclass(frozen=True)
class SystemRecord:
    """A system that is ready to answer.

    Attributes:
        name: as in the YAML file, such as "ppo" or "sft_lima_style".
        kind: what it is, such as "base", "sft", "best_of_n", "rejection_sampling", "dpo", "grpo", "rloo" or "ppo".
        location: the policy that answers: a folder relative to the folder of the seed, or the name of the base model.
        n: completions sampled for each answer, of which the reward model picks the best; 1 without best-of-n.
        labels: labels that the system was given, by kind: "demonstrations", "ratings" and "judgments".
            They are what people had to give: a choice by ratings counts all demonstrations that were rated.
        needs: names of the stages whose work it builds on, such as "sft" and "reward_model".
        own: time of the system's own stage.
        total: `own`, and the time of all stages in `needs`, directly or not, each once.
        completions: number of completions that were sampled in training.
        settings: options of training that matter to a reader.
        rule: for a choice of demonstrations: source file and selection rule in a sentence.
        snapshots: policies saved during training, in their order.
    """

    name: str
    kind: str
    location: str
    n: int = 1
    labels: Mapping[str, int] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    own: Clock = Clock(0.0, 0.0)
    total: Clock = Clock(0.0, 0.0)
    completions: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    rule: str | None = None
    snapshots: tuple[Snapshot, ...] = ()

    def save(self, folder: str | Path) -> None:
        """Writes `system.json` into the folder of the system."""
        path = Path(folder) / SYSTEM_FILE
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)

    @classmethod
    def load(cls, folder: str | Path) -> "SystemRecord":
        """Reads `system.json` of the folder of the system."""
        values = json.loads((Path(folder) / SYSTEM_FILE).read_text(encoding="utf-8"))
        for name in ("own", "total"):
            values[name] = Clock(**values[name])
        values["needs"] = tuple(values["needs"])
        snapshots = [entry | {"own": Clock(**entry["own"])} for entry in values["snapshots"]]
        values["snapshots"] = tuple(Snapshot(**entry) for entry in snapshots)
        return cls(**values)
