"""Recognizes that memory has run out, and frees what can be freed."""

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

_TEXTS = ("out of memory", "cublas_status_alloc_failed")
"""What libraries below PyTorch say in other errors: the CUDA driver, Triton, bitsandbytes, cuBLAS; in lower case."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a device or of the machine has run out in PyTorch."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _TEXTS):
        return True
    has_text = all(isinstance(argument, str) for argument in error.args)  # accelerate looks into the first one
    return isinstance(error, Exception) and has_text and should_reduce_batch_size(error)


def free_memory() -> None:
    """Frees what an error has left, and the caches of the device. Call it when the error itself is gone.

    The traceback of an error holds the tensors of all functions that it has passed through.
    """
    clear_device_cache(garbage_collection=True)
