"""What a memory plan holds: the phases of a run, and what is in memory at the peak of each of them."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Part:
    """One use of memory, such as the base weights or the gradients.

    Attributes:
        name: what the memory is used for, see `PART_NAMES`.
        n_bytes: size in bytes.
    """

    name: str
    n_bytes: int


PART_NAMES = (
    "base weights",
    "adapters and heads",
    "reward model",
    "reference model",
    "critic model",
    "gradients",
    "optimizer",
    "rollout",
    "merged copy",
    "KV cache",
    "activations",
    "logits",
    "temporary",
)
"""All names of parts, in the order in which a plan lists them."""


@dataclass(frozen=True)
class Phase:
    """Something that happens in a run, with all that is in memory at its peak.

    Attributes:
        name: `training step`, `evaluation`, `optimizer step`, and in PPO `rollout`, `scoring`, `reward`,
            `policy update`, `value update` and `PPO-ptx`.
        parts: resident and transient memory at the peak of the phase; names occur once, in the order of `PART_NAMES`.
    """

    name: str
    parts: tuple[Part, ...]

    @property
    def n_bytes(self) -> int:
        """All parts together, in bytes."""
        return sum(part.n_bytes for part in self.parts)


@dataclass(frozen=True)
class Suggestion:
    """An option to change so that a run needs less memory.

    Attributes:
        option: as on the command line, such as `--load_in_4bit true`.
        saves: by how many bytes the whole plan gets smaller.
        costs: what is given up for it, in one short clause.
    """

    option: str
    saves: int
    costs: str


@dataclass(frozen=True)
class MemoryPlan:
    """The memory that a run needs, by phase.

    Attributes:
        model: name of the model, or its architecture if it has no name.
        stage: `sft`, `reward` or `ppo`.
        device: `cuda` or `cpu`.
        options: the options that the plan depends on, as resolved.
        phases: all phases of the run, in the order in which they happen.
        reserve: bytes beyond tensors: the CUDA context and the allocator's fragmentation; 0 on a CPU.
        notes: what is not known or was assumed, one line each.
    """

    model: str
    stage: str
    device: str
    options: dict[str, Any]
    phases: tuple[Phase, ...]
    reserve: int = 0
    notes: tuple[str, ...] = field(default=())

    @property
    def peak(self) -> Phase:
        """The phase that needs the most memory; the first one of equals."""
        return max(self.phases, key=lambda phase: phase.n_bytes)

    @property
    def n_bytes(self) -> int:
        """Bytes that the whole run needs: its peak phase and the reserve."""
        return self.peak.n_bytes + self.reserve

    def fits(self, card_bytes: int) -> bool:
        """Whether the run fits in a memory of `card_bytes` bytes."""
        return self.n_bytes <= card_bytes

    def to_dict(self) -> dict[str, Any]:
        """The plan as a dict for JSON; all sizes are in bytes."""
        phases = [
            {
                "name": phase.name,
                "bytes": phase.n_bytes,
                "parts": {part.name: part.n_bytes for part in phase.parts},
            }
            for phase in self.phases
        ]
        return {
            "model": self.model,
            "stage": self.stage,
            "device": self.device,
            "options": dict(self.options),
            "phases": phases,
            "peak": self.peak.name,
            "reserve": self.reserve,
            "bytes": self.n_bytes,
            "notes": list(self.notes),
        }
