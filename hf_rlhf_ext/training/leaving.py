"""Leaves a long part of training at a signal: a rollout or an evaluation, of which nothing is needed afterward.

A rollout may take minutes, and batch systems and torchrun kill a process some seconds after SIGTERM. So the part is
left, all processes agree on it, and the trainer saves a checkpoint of the state before the part:

    with may_be_left("rollout"):
        ...                      # what this process computes alone; `check` and code in `at_once` may leave it
    agree_to_leave()             # raises `PartLeft` on all processes if any of them was asked to stop

Outside of training nothing here has an effect: then no signal is handled by a trainer.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch


class PartLeft(KeyboardInterrupt):
    """A signal has ended a part of training, on all processes."""


class _Leave(KeyboardInterrupt):
    """Ends the part in this process, on the way to the others."""


class Listener(Protocol):
    """What handles signals during training.

    Attributes:
        received: whether this process has received a signal that asks it to stop.
    """

    received: bool

    def any_received(self) -> bool:
        """Whether any process has received one. All processes call it together."""
        ...


# Of this process, as signals are. None outside of training, and outside of a part.
_listener: Listener | None = None
_part: str | None = None
_is_at_once = False


@contextmanager
def listens(listener: Listener) -> Iterator[None]:
    """Inside the context, which is that of a training, signals that `listener` receives leave parts."""
    global _listener  # signals belong to the process
    before = _listener
    _listener = listener
    try:
        yield
    finally:
        _listener = before


@contextmanager
def may_be_left(part: str, *, when: bool = True) -> Iterator[None]:
    """Around a part of training that a signal may end. Then the context ends without an error; see `agree_to_leave`.

    Args:
        part: what it is, for the user.
        when: False if other processes wait for this one inside the part, so that it must not leave on its own.
    """
    global _part
    if _listener is None or not when:
        yield
        return
    _part = part
    try:
        check()
        yield
    except _Leave:
        pass
    finally:
        _part = None


def agree_to_leave() -> None:
    """Raises `PartLeft` if any process was asked to stop. All processes call it together, before they exchange data."""
    if _listener is not None and _listener.any_received():
        raise PartLeft


def check() -> None:
    """Leaves the part if a signal has come. Call it often where nothing half done would be left behind."""
    if _part is not None and _listener is not None and _listener.received:
        raise _Leave


@contextmanager
def at_once() -> Iterator[None]:
    """Around code of the user, such as a reward function that asks a slow service: a signal ends it where it is."""
    global _is_at_once
    # First, so that no signal comes between the two lines unnoticed.
    _is_at_once = True
    try:
        check()
        yield
    finally:
        _is_at_once = False


def part_to_leave() -> str | None:
    """The part that a signal ends now; `None` if there is none. For signal handlers."""
    return _part


def leave_at_once() -> None:
    """Called at the end of a signal handler: ends the code of the user that the signal has come in, if any."""
    global _is_at_once
    if _is_at_once and _part is not None:
        _is_at_once = False
        raise _Leave


class RandomState(NamedTuple):
    """The global random states that checkpoints contain, to return to.

    Attributes:
        python: state of `random`.
        numpy: state of `numpy.random`.
        cpu: state of PyTorch on the CPU, uint8.
        device: the device of the model, and its state, uint8; `None` for a device without random numbers of its own.
    """

    python: Any
    numpy: Any
    cpu: torch.Tensor
    device: tuple[torch.device, torch.Tensor] | None

    @classmethod
    def now(cls, device: torch.device) -> Self:
        """The states as they are."""
        get_state = getattr(torch.get_device_module(device), "get_rng_state", None)  # that of the CPU has none
        of_device = None if get_state is None else (device, get_state(device))
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), of_device)

    def restore(self) -> None:
        """Sets the states again."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            device, state = self.device
            torch.get_device_module(device).set_rng_state(state, device)
