"""The processes of a run: which rows each one has, and sums over all of them.

The same arithmetic would otherwise stand wherever a rollout is shared out. With one process everything here is a no-op.
"""

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from .batching import concat_rows


class Ranks:
    """What processes of a run do together.

    Args:
        accelerator: Trainer's, which has started the processes.

    Attributes:
        count: number of processes.
        index: number of this one, from 0.
        device: where this process computes.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self.count: int = accelerator.num_processes
        self.index: int = accelerator.process_index
        self.device: torch.device = accelerator.device

    @property
    def alone(self) -> bool:
        """Whether there is one process only."""
        return self.count == 1

    def share(self, rows: Sequence | Tensor) -> Sequence | Tensor:
        """This process's rows of a mini-batch that all hold: every `count`-th one."""
        return rows[self.index :: self.count]

    def block(self, n: int) -> range:
        """This process's numbers of 0 … n - 1, next to each other; the last processes may have fewer."""
        size = -(-n // self.count)  # rounded up
        start = min(self.index * size, n)
        end = min((self.index + 1) * size, n)
        return range(start, end)

    def gather(self, value: object) -> list:
        """`value` of every process, in the order of their numbers."""
        if self.alone:
            return [value]
        return gather_object([value])

    def concatenate(self, values: list) -> list:
        """The lists of all processes as one."""
        if self.alone:
            return values
        return gather_object(values)

    def gather_rows(self, rows: dict[str, Tensor], pad_token_id: int) -> dict[str, Tensor]:
        """Batches (B, …) of all processes as one, on this device; `batching.concat_rows` says how they are padded."""
        if self.alone:
            return rows
        parts: list[Mapping[str, Tensor]] = self.gather({name: tensor.cpu() for name, tensor in rows.items()})
        merged = concat_rows(parts, pad_token_id)
        return {name: tensor.to(self.device) for name, tensor in merged.items()}

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sums tensors over processes, in place, in one message."""
        if self.alone or not tensors:
            return
        flat = torch.cat([tensor.flatten().float() for tensor in tensors])
        total = self._accelerator.reduce(flat, reduction="sum")
        parts = total.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def sum_of(self, *numbers: float | Tensor) -> list[float]:
        """Each number summed over processes."""
        totals = torch.tensor([float(number) for number in numbers], device=self.device)
        self.sum_([totals])
        return totals.tolist()

    def wait(self) -> None:
        """Returns when every process has come here."""
        self._accelerator.wait_for_everyone()
