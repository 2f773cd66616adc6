"""What counts as a lack of memory, with which sizes a run begins, and where `auto_batch` is refused."""

from types import SimpleNamespace

import pytest
import torch

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.training.auto_batch import (
    COMPLETIONS,
    REWARD_TOKENS,
    TOKENS,
    check_engine_of_auto_batch,
    initial_sizes,
)
from hf_rlhf_ext.training.engines import Engine
from hf_rlhf_ext.training.out_of_memory import is_out_of_memory
from hf_rlhf_ext.training.sft_config import CheckedSFTConfig


@pytest.mark.parametrize(
    "error, expected",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (torch.OutOfMemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (RuntimeError("CUDA driver error: out of memory"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasGemmEx`"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RuntimeError(KeyError("x")), False),
        (ValueError("CUDA out of memory. Tried to allocate"), False),
    ],
)
def test_a_lack_of_memory_is_told_from_other_errors(error, expected):
    assert is_out_of_memory(error) == expected


def test_the_allocator_of_the_cpu_is_recognized():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_out_of_memory(error.value)


def test_a_run_begins_with_the_options_or_with_a_smaller_plan():
    args = SimpleNamespace(max_tokens_per_batch=4096)
    assert initial_sizes(args) == {TOKENS: 4096, COMPLETIONS: None, REWARD_TOKENS: None}
    plan = {TOKENS: 8192, COMPLETIONS: 16}
    assert initial_sizes(args, lambda: plan) == {TOKENS: 4096, COMPLETIONS: 16, REWARD_TOKENS: None}
    plan = {TOKENS: 1024, COMPLETIONS: None}
    assert initial_sizes(args, lambda: plan)[TOKENS] == 1024


def test_engines_that_shard_the_model_are_refused():
    args = SimpleNamespace(auto_batch=True)
    check_engine_of_auto_batch(args, Engine.DDP)
    check_engine_of_auto_batch(SimpleNamespace(), Engine.FSDP2)
    for engine in (Engine.FSDP2, Engine.ZERO3):
        with pytest.raises(UserError, match=f"auto_batch is not supported with {engine}.*max_tokens_per_batch.*ddp"):
            check_engine_of_auto_batch(args, engine)


def test_sft_refuses_it_with_the_reason(tmp_path):
    with pytest.raises(UserError, match="auto_batch is not supported by SFTTrainer.*gradient_accumulation_steps"):
        CheckedSFTConfig(str(tmp_path), auto_batch=True, use_cpu=True, bf16=False, report_to="none")
