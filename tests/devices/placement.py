"""Makes Accelerate and Transformers put their models and batches on a device that they do not know."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from transformers import TrainingArguments


@contextmanager
def trainers_use(device: torch.device) -> Iterator[None]:
    """Inside the context, Accelerate and `TrainingArguments` (with `use_cpu=True`) see this device.

    In fp16 the accelerator has a gradient scaler too, which Accelerate has neither for a CPU nor for a device that it
    does not know.
    """
    seen = device  # another one while an accelerator starts
    start_state, start_accelerator = PartialState.__init__, Accelerator.__init__
    device_property, count_property = TrainingArguments.device, TrainingArguments.n_gpu

    def state_on_device(self, *args, **kwargs) -> None:
        start_state(self, *args, **kwargs)
        self.device = seen

    def accelerator_on_device(self, *args, **kwargs) -> None:
        nonlocal seen
        seen = torch.device("cpu")
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            start_accelerator(self, *args, **kwargs)
        finally:
            seen = device
        self.state.device = PartialState().device
        if self.mixed_precision == "fp16":
            self.scaler, self.native_amp = torch.amp.GradScaler(device.type), True

    def device_of_arguments(self) -> torch.device:
        device_property.fget(self)  # sets up the processes
        return device

    def count_of_arguments(self) -> int:
        count = count_property.fget(self)
        return count if device.type == "cpu" else 1

    def patch(state, accelerator, arguments_device, arguments_count) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState.__init__, Accelerator.__init__ = state, accelerator
        TrainingArguments.device, TrainingArguments.n_gpu = arguments_device, arguments_count

    patch(state_on_device, accelerator_on_device, property(device_of_arguments), property(count_of_arguments))
    try:
        yield
    finally:
        patch(start_state, start_accelerator, device_property, count_property)
