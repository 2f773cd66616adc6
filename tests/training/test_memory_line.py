"""The memory of a run in one line."""

import logging
import os
from types import SimpleNamespace

import pytest
import torch

from hf_rlhf_ext.modeling.memory.plan import MemoryPlan, Part, Phase
from hf_rlhf_ext.training.memory_line import GB, device_memory, in_gb, log_memory, memory_line


def plan_of(*phases: Phase, reserve: int = 0) -> MemoryPlan:
    return MemoryPlan("a-model", "ppo", "cuda", {}, phases, reserve)


PLAN = plan_of(
    Phase("rollout", (Part("base weights", 3 * GB), Part("KV cache", 1 * GB))),
    Phase("policy update", (Part("base weights", 3 * GB), Part("activations", 4 * GB + 40_000_000))),
    reserve=GB // 2,
)


def test_the_line_has_the_whole_the_device_the_peak_and_its_largest_part():
    # 3 + 4.04 + 0.5 = 7.54
    assert memory_line(PLAN, 24 * GB) == "Memory: about 7.5 GB of 24.0 GB, peak at policy update (activations 4.0 GB)"
    assert memory_line(PLAN, None).startswith("Memory: about 7.5 GB, peak")


@pytest.mark.parametrize(
    "n_bytes, text", [(94_000_000, "0.09 GB"), (96_000_000, "0.1 GB"), (7_949_999_999, "7.9 GB"), (0, "0.00 GB")]
)
def test_small_sizes_keep_a_digit(n_bytes, text):
    assert in_gb(n_bytes) == text


def test_the_memory_of_a_cpu_is_that_of_the_machine():
    kilobytes = next(int(line.split()[1]) for line in open("/proc/meminfo") if line.startswith("MemTotal"))
    assert device_memory(torch.device("cpu")) == pytest.approx(1024 * kilobytes, rel=0.02)


def test_a_system_that_does_not_say_its_memory(monkeypatch):
    monkeypatch.delattr(os, "sysconf")
    assert device_memory(torch.device("cpu")) is None


def test_on_a_cpu_nothing_is_planned(caplog):
    args = SimpleNamespace(device=torch.device("cpu"))
    with caplog.at_level(logging.INFO):
        log_memory(object(), "ppo", args)  # which no planner could read
    assert not caplog.records and not hasattr(args, "memory_is_planned")
