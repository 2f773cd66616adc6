"""The processes of a run: which rows each process has, and sums over all processes.

With one process, everything here does nothing.
"""

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from .batching import concat_rows


class Ranks:
    """The processes of a run, and the operations over all of them.

    Args:
        accelerator: the accelerator of the trainer.

    Attributes:
        count: number of processes.
        index: number of this process, from 0.
        device: device of this process.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self.count: int = accelerator.num_processes
        self.index: int = accelerator.process_index
        self.device: torch.device = accelerator.device

    @property
    def alone(self) -> bool:
        """Whether there is only one process."""
        return self.count == 1

    def share(self, rows: Sequence | Tensor, together: int = 1) -> Sequence | Tensor:
        """The rows of this process in a mini-batch that all processes hold: every `count`-th row.

        Args:
            rows: the rows.
            together: number of consecutive rows that go to the same process, such as the completions of a prompt. If
                it is not 1, the rows are a tensor (n,), with n divisible by it.
        """
        if together == 1:
            return rows[self.index :: self.count]
        return rows.view(-1, together)[self.index :: self.count].flatten()

    def block(self, n: int) -> range:
        """The contiguous block of 0 … n - 1 that belongs to this process; the last processes may have fewer."""
        size = -(-n // self.count)  # rounded up
        start = min(self.index * size, n)
        end = min((self.index + 1) * size, n)
        return range(start, end)

    def gather(self, value: object) -> list:
        """The values of all processes, in the order of the processes."""
        if self.alone:
            return [value]
        return gather_object([value])

    def concatenate(self, values: list) -> list:
        """The lists of all processes, concatenated in the order of the processes."""
        if self.alone:
            return values
        return gather_object(values)

    def gather_rows(self, rows: dict[str, Tensor], pad_token_id: int) -> dict[str, Tensor]:
        """Concatenates the batches (B, …) of all processes on this device, see `batching.concat_rows`."""
        if self.alone:
            return rows
        parts: list[Mapping[str, Tensor]] = self.gather({name: tensor.cpu() for name, tensor in rows.items()})
        merged = concat_rows(parts, pad_token_id)
        return {name: tensor.to(self.device) for name, tensor in merged.items()}

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sums tensors over processes, in place and in one message."""
        if self.alone or not tensors:
            return
        flat = torch.cat([tensor.flatten().float() for tensor in tensors])
        total = self._accelerator.reduce(flat, reduction="sum")
        parts = total.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def sum_of(self, *numbers: float | Tensor) -> list[float]:
        """Sums each number over processes."""
        totals = torch.tensor([float(number) for number in numbers], device=self.device)
        self.sum_([totals])
        return totals.tolist()

    def wait(self) -> None:
        """Waits for all processes."""
        self._accelerator.wait_for_everyone()
