"""Batches that add nothing: rows repeated to fill the last batch, and forward passes that only keep processes together.

With several processes, accelerate fills the last batch of an epoch with rows of the first one. Their weight is 0 here,
so that every row counts once per epoch.

An engine that shards the model (FSDP, DeepSpeed) gathers weights in each forward and backward pass, so that all
processes must run the same number of passes, or they wait for each other forever. With a token budget, batches have
different numbers of micro-batches. A process with fewer repeats its smallest one with weights of 0.

A batch in which prompts do not count has the key `counted`: (B,) bool. Without the key, all prompts count.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..training.engines import Engine, active_engine

Batch = dict[str, Tensor]


def micro_batches_of(inputs: dict[str, Any]) -> list[Batch]:
    """The micro-batches of a batch from the collator; a batch that was not split is one micro-batch."""
    return inputs.get("micro_batches") or [inputs]


def has_shards(accelerator: Accelerator) -> bool:
    """Whether an engine shards the model, its gradients or its optimizer, so that passes communicate."""
    return active_engine(accelerator) is not Engine.DDP


# --- rows that fill the last batch ------------------------------------------------------------------------------------


def weight_repeated_rows_zero(batches: list[dict[str, Any]], accelerator: Accelerator) -> None:
    """Gives weight 0 to the rows with which accelerate filled the last batch of an epoch, in place.

    Do not call it where incomplete batches are dropped.

    Args:
        batches: The batches of one optimizer step on this process, as the data loader returned them.
        accelerator: The accelerator that prepared the data loader.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not batches or not state.end_of_dataloader:
        return
    last = batches[-1]
    n_rows = sum(len(part["completion_counts"]) for part in micro_batches_of(last))
    # Not `state.remainder`: accelerate does not know it in an epoch that is resumed in its middle.
    n_own = own_rows(len(state.active_dataloader.dataset), n_rows, accelerator.num_processes, accelerator.process_index)
    if n_own < n_rows:
        _count_first_rows(last, n_own)


def own_rows(n_dataset: int, batch_size: int, n_processes: int, process: int) -> int:
    """Returns how many rows of the last batch of an epoch are not repeated, on one process.

    Args:
        n_dataset: Rows of the dataset.
        batch_size: Rows in the last batch of each process, after it was filled.
        n_processes: Number of processes.
        process: Index of the process. The first processes have the rows, and repeated ones come after them.
    """
    last = n_dataset % (batch_size * n_processes)  # rows of all processes together, before they were filled
    if last == 0:
        return batch_size
    return min(max(last - process * batch_size, 0), batch_size)


def _count_first_rows(inputs: dict[str, Any], n_counted: int) -> None:
    """Lets only the first rows of a batch count, in place."""
    first = 0
    for batch in micro_batches_of(inputs):
        n_prompts = len(batch["completion_counts"])
        rows = list(range(first, first + n_prompts))
        if "order" in inputs:  # micro-batches are sorted by length
            rows = inputs["order"][first : first + n_prompts]
        first += n_prompts
        counted = torch.tensor([row < n_counted for row in rows], device=batch["weights"].device)
        batch["counted"] = counted
        batch["weights"] = batch["weights"] * counted[batch["prompt_index"]]


# --- equal numbers of passes ------------------------------------------------------------------------------------------


def even_out(batches: list[dict[str, Any]], accelerator: Accelerator) -> None:
    """Gives each batch as many micro-batches as the same batch has on the process with the most, in place.

    Every process must call it, with the same number of batches. It communicates once.

    Args:
        batches: Batches of the collator. Those that are not split into micro-batches are not changed.
        accelerator: The accelerator of the trainer.
    """
    split = [batch for batch in batches if "micro_batches" in batch]
    largest = largest_counts([len(batch["micro_batches"]) for batch in split], accelerator)
    for batch, count in zip(split, largest, strict=True):
        batch["micro_batches"] = filled_up(batch["micro_batches"], count)


def largest_counts(counts: Sequence[int], accelerator: Accelerator) -> list[int]:
    """Returns the largest of each count over all processes. Every process must call it, with as many counts."""
    if not counts or accelerator.num_processes == 1:
        return list(counts)
    largest = torch.tensor(counts, device=accelerator.device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return largest.tolist()


def filled_up(micro_batches: list[Batch], count: int) -> list[Batch]:
    """Returns the micro-batches and, before them, copies of the smallest one that do not count, `count` in all.

    The copies come first, so that the gradients of all processes are reduced in a pass that counts.
    """
    smallest = min(micro_batches, key=lambda batch: batch["input_ids"].numel())
    missing = count - len(micro_batches)
    return [uncounted(smallest) for _ in range(missing)] + micro_batches


def uncounted(batch: Batch) -> Batch:
    """Returns a copy of a batch that adds nothing to the loss and to the metrics."""
    counted = torch.zeros_like(batch["completion_counts"], dtype=torch.bool)
    return batch | {"weights": torch.zeros_like(batch["weights"]), "counted": counted}


def is_counted(batch: Batch) -> bool:
    """Whether a prompt of the batch counts."""
    return "counted" not in batch or bool(batch["counted"].any())


def average_gradients(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Averages gradients over processes, in place, as DDP does in a backward pass. Every process must call it.

    Args:
        parameters: The parameters that are trained, in the same order on every process. No gradient counts as zeros.
        accelerator: The accelerator of the trainer.
    """
    if accelerator.num_processes == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.div_(accelerator.num_processes)  # before the sum, as in DDP
        torch.distributed.all_reduce(parameter.grad)


@contextmanager
def without_reduction(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Inside the context, a backward pass adds to the gradients of this process, and no optimizer step is taken.

    Args:
        accelerator: The accelerator of the trainer.
        model: The model as the accelerator prepared it.
    """
    # DeepSpeed takes the optimizer step in the backward pass, if accelerate says that gradients are complete.
    was_last = accelerator.sync_gradients
    accelerator.sync_gradients = False
    try:
        with accelerator.no_sync(model):
            yield
    finally:
        accelerator.sync_gradients = was_last
