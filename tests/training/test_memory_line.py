"""The memory of a run in one line."""

import logging
import os
import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from transformers.utils import logging as hf_logging

from hf_rlhf_ext import BradleyTerryConfig, PPOConfig, RewardEnsemble, RewardScorer
from hf_rlhf_ext.modeling.memory.plan import MemoryPlan, Part, Phase
from hf_rlhf_ext.training import memory_line
from hf_rlhf_ext.training.leaving import RandomState
from hf_rlhf_ext.training.memory_line import GB, RunMemory, device_memory, in_gb, log_memory
from hf_rlhf_ext.training.memory_line import memory_line as line_of


def plan_of(*phases: Phase, reserve: int = 0) -> MemoryPlan:
    return MemoryPlan("a-model", "ppo", "cuda", {}, phases, reserve)


PLAN = plan_of(
    Phase("rollout", (Part("base weights", 3 * GB), Part("KV cache", 1 * GB))),
    Phase("policy update", (Part("base weights", 3 * GB), Part("activations", 4 * GB + 40_000_000))),
    reserve=GB // 2,
)


def test_the_line_has_the_whole_the_device_the_peak_and_its_largest_part():
    # 3 + 4.04 + 0.5 = 7.54
    assert line_of(PLAN, 24 * GB) == "Memory: about 7.5 GB of 24.0 GB, peak at policy update (activations 4.0 GB)"
    assert line_of(PLAN, None).startswith("Memory: about 7.5 GB, peak")


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


def test_auto_batch_plans_with_all_reward_models_also_after_a_recipe(monkeypatch, tiny_config, chat_tokenizer, caplog):
    tiny_config.num_labels = 1
    reward = RewardScorer(LlamaForSequenceClassification(tiny_config), chat_tokenizer)
    ensemble = RewardEnsemble([reward, RewardScorer(LlamaForSequenceClassification(tiny_config), chat_tokenizer)])
    monkeypatch.setattr(memory_line, "card_memory", lambda device: GB)
    args = PPOConfig("ppo", use_cpu=True, bf16=False, report_to="none", auto_batch=True)
    args.memory_is_planned = True
    with caplog.at_level(logging.INFO):
        memory = log_memory(
            LlamaForCausalLM(tiny_config), "ppo", args, reward_funcs=[len, reward, ensemble, None], prompt_tokens=7
        )
    assert len(memory.request.reward_sources) == 3 and memory.request.setup.prompt_tokens == 7
    assert memory.n_bytes == GB and "Memory:" not in caplog.text
    args.auto_batch = False
    assert log_memory(object(), "ppo", args) is None
    args.auto_batch, args.memory_is_planned = True, False
    assert log_memory(object(), "ppo", args) is None  # which no planner can read


def test_a_driver_that_does_not_say_its_memory_stops_no_run(monkeypatch):
    def refuses(device):
        raise RuntimeError("CUDA error: operation not supported\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(memory_line, "device_memory", refuses)
    args = SimpleNamespace(device=torch.device("cuda", 0))
    assert log_memory(object(), "ppo", args) is None


def test_a_reward_that_no_planner_can_read_stops_no_run(monkeypatch, tiny_config, caplog):
    def reward(completions):
        return [0.0] * len(completions)

    reward.members = 3  # a name that ensembles have too
    monkeypatch.setattr(memory_line, "card_memory", lambda device: GB)
    args = PPOConfig("ppo", use_cpu=True, bf16=False, report_to="none")
    with caplog.at_level(logging.INFO):
        assert log_memory(LlamaForCausalLM(tiny_config), "ppo", args, reward_funcs=[reward]) is None
    assert "Memory: not planned (TypeError" in caplog.text


def test_a_plan_changes_no_random_numbers_and_no_settings(tiny_config, monkeypatch, tmp_path):
    monkeypatch.setattr(memory_line, "card_memory", lambda device: 1)
    args = BradleyTerryConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", auto_batch=True)
    model = LlamaForSequenceClassification(tiny_config)

    def settings():
        state = RandomState.now(torch.device("cpu"))
        numbers = (state.python, str(state.numpy), state.cpu.tolist())
        defaults = (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled())
        weights = [(p.requires_grad, p.grad, float(p.detach().sum())) for p in model.parameters()]
        return numbers, defaults, list(warnings.filters), hf_logging.get_verbosity(), model.config.to_dict(), weights

    before = settings()
    memory = log_memory(model, "reward", args)
    assert memory.sizes(prompt_tokens=40, completion_tokens=24)
    assert settings() == before


def test_what_cannot_be_planned_begins_with_the_options():
    assert RunMemory(None, GB).sizes(prompt_tokens=3) == {}


def test_on_a_cpu_nothing_is_planned(caplog):
    args = SimpleNamespace(device=torch.device("cpu"))
    with caplog.at_level(logging.INFO):
        log_memory(object(), "ppo", args)  # which no planner could read
    assert not caplog.records and not hasattr(args, "memory_is_planned")
