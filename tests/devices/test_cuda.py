"""What only a card can show: `make test-gpu`, on one CUDA device. Small enough for less than 8 minutes.

All runs of `paths.py` on the card, and what the pretend device does not have: a random generator and kernels of its
own, memory, 4-bit kernels. `RLHF_GPU_TESTS_ON_CPU=1` runs the same code on a CPU, to see that it is not broken.
"""

import gc
import math
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoTokenizer, TrainerCallback

from hf_rlhf_ext import PPOConfig, PPOTrainer, RewardScorer, load_base_model
from hf_rlhf_ext.modeling.layouts import Layout, find_layout
from hf_rlhf_ext.modeling.logprobs import chunked_logprobs, completion_hidden_states
from hf_rlhf_ext.ppo.rollout import pack_sequences
from hf_rlhf_ext.reward.scorer import score_batch
from tests.devices import paths
from tests.devices.base import save_base
from tests.devices.data import PROMPTS, WORDS, letters

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: matrix products to the bit

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("devices")]

ON_CPU = os.environ.get("RLHF_GPU_TESTS_ON_CPU") == "1"
# On a card, sampling draws from the generator of the card: only runs without sampling are those of the CPU.
SAME_AS_ON_A_CPU = [
    "reward: K-wise, layout plain, activation checkpointing",
    "reward: shared prefix, token budget",
    "reward: layout auto, whole model, tie model, Adafactor",
    "reward: Plackett-Luce, SGD",
]


@pytest.fixture(autouse=True)
def device(monkeypatch) -> Iterator[torch.device]:
    if ON_CPU:
        yield torch.device("cpu")
        return
    assert torch.cuda.is_available(), "no CUDA device: these tests are for a machine with one"
    for options in (paths.REWARD, paths.PPO):
        monkeypatch.setitem(options, "use_cpu", False)
    torch.use_deterministic_algorithms(True, warn_only=True)  # resuming is exact only with them
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    yield torch.device("cuda", 0)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def folder(tmp_path, chat_tokenizer) -> Path:
    """An empty folder, with the model where the runs look for it."""
    save_base(tmp_path / "base", chat_tokenizer, width=128)
    home = tmp_path / "runs" / "run" / "device"
    home.mkdir(parents=True)
    return home


def finite(result: dict) -> bool:
    numbers = [value for value in result.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    return all(bool(value.isfinite().all()) for value in numbers)


@pytest.mark.parametrize("name", paths.RUNS)
def test_every_run_trains_on_the_card(folder, device, name):
    if ON_CPU and "fp16" in name:
        pytest.skip("there is no gradient scaler on a CPU")
    kernels = nullcontext()
    if "resume" in name:
        # Equal to the bit: the fused kernels add up in any order in their backward pass.
        kernels = sdpa_kernel(SDPBackend.MATH)
    with kernels:
        result = paths.RUNS[name](folder, device)
    assert finite(result)


@pytest.mark.parametrize("name", SAME_AS_ON_A_CPU)
def test_a_reward_model_is_trained_as_on_a_cpu(folder, device, name, monkeypatch):
    on_card = paths.RUNS[name](folder, device)
    other = folder.with_name("cpu")
    other.mkdir()
    for options in (paths.REWARD, paths.PPO):
        monkeypatch.setitem(options, "use_cpu", True)
    on_cpu = paths.RUNS[name](other, torch.device("cpu"))
    for key, value in on_cpu.items():
        if isinstance(value, torch.Tensor):
            # The mean: Adam turns a gradient that is only rounding into a step of the full size.
            assert float((on_card[key].cpu() - value).abs().mean()) <= 1e-4, key
        elif isinstance(value, float) and "norm" not in key:
            assert on_card[key] == pytest.approx(value, abs=2e-3, nan_ok=True), key


# ---- 4 bits, with bitsandbytes ----


def packed_bits(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.dtype == torch.uint8}


class Memory(TrainerCallback):
    """Bytes that tensors take up after each step."""

    def __init__(self):
        self.bytes: list[int] = []

    def on_step_end(self, args, state, control, **kwargs):
        gc.collect()
        self.bytes.append(0 if ON_CPU else torch.cuda.memory_allocated())


@pytest.mark.parametrize("optimizer", ["adamw_torch", "paged_adamw_8bit"])
def test_ppo_on_a_4_bit_base_leaves_the_base_and_the_memory_as_they_are(folder, device, optimizer):
    if ON_CPU and optimizer != "adamw_torch":
        pytest.skip("paged memory is the card's")
    base = str(paths.base_of(folder))
    model = load_base_model(base, load_in_4bit=True)
    bits, memory = packed_bits(model), Memory()
    assert bits
    options = paths.PPO | {"max_steps": 24, "critic": "adapter", "bf16": True, "optim": optimizer}
    trainer = PPOTrainer(
        model,
        letters,
        args=PPOConfig(str(folder / "ppo"), **(options | {"activation_checkpointing": True})),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=paths.lora("CAUSAL_LM"),
        callbacks=[memory],
    )
    trainer.train()
    paths.is_on(trainer, device)
    for name, value in packed_bits(trainer.model).items():
        assert torch.equal(value, bits[name.removeprefix("base_model.model.").replace(".base_layer", "")]), name
    assert finite(paths.trained(trainer))
    # The sizes of rollouts differ a little. A leak of one rollout's activations would be much more.
    half = len(memory.bytes) // 2
    assert max(memory.bytes[half:]) <= 1.02 * max(memory.bytes[4:half]) + 2**16, memory.bytes


def test_a_reward_model_on_a_4_bit_base_scores_the_same_after_loading(folder, device):
    quantized = load_base_model(str(paths.base_of(folder)), task="reward", load_in_4bit=True)
    trainer = paths.reward_trainer(folder, model=quantized, bf16=True, max_steps=4)
    trainer.train()
    trainer.save_model()
    texts = (PROMPTS, WORDS[: len(PROMPTS)])
    in_memory = RewardScorer(trainer.model, trainer.processing_class, autocast=torch.bfloat16).raw(*texts)
    loaded = RewardScorer.from_pretrained(folder / "reward", device=device)
    assert loaded.raw(*texts) == pytest.approx(in_memory, abs=1e-6)


# ---- Kernels ----


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_layouts_have_the_same_scores_with_every_kernel(folder, device, attention, dtype):
    model = load_base_model(str(paths.base_of(folder)), task="reward", dtype=dtype, attn_implementation=attention).to(
        device
    )
    scores = {}
    for layout in ("plain", "shared_prefix"):
        trainer = paths.reward_trainer(folder, model=model, adapter=False, layout=layout, bf16=dtype == "bfloat16")
        batch = trainer.data_collator(list(trainer.train_dataset))
        batch = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        with torch.no_grad():
            scores[layout] = score_batch(trainer.model.eval(), batch).float()
    spread = float(scores["plain"].std())
    allowed = 1e-4 if dtype == "float32" else 0.05
    assert math.isfinite(spread) and spread > 0
    assert (scores["plain"] - scores["shared_prefix"]).abs().max() <= allowed * max(1.0, spread)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rollouts_sample_what_is_scored_in_bf16(folder, device, attention):
    """With left padding, a cache and several lengths: the kernels of generation and of scoring agree."""
    base = str(paths.base_of(folder))
    trainer = PPOTrainer(
        load_base_model(base, dtype="bfloat16", attn_implementation=attention),
        letters,
        args=PPOConfig(str(folder / "ppo"), **(paths.PPO | {"bf16": True, "max_steps": 4, "joint_scoring": True})),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=paths.lora("CAUSAL_LM"),
    )
    trainer.train()  # its check of the first rollout compares them
    name = "sampling/logprob_mismatch"
    mismatches = [log[name] for log in trainer.state.log_history if name in log]
    assert len(mismatches) == 2 and max(map(abs, mismatches)) < 0.05


@pytest.mark.parametrize("lengths", [(40, 3, 17), (17, 17, 17)], ids=["with a mask", "lower-right causal"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "autocast"])
def test_completions_behind_one_prompt_are_those_of_plain_rows(folder, device, dtype, lengths):
    """Hidden states and gradients of 4 ragged completions of each prompt, with attention by segments."""
    weights = "bfloat16" if dtype == "bfloat16" else "float32"
    model = load_base_model(str(paths.base_of(folder)), dtype=weights).to(device)
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(5, 300, (n,), generator=generator).tolist()

    prompts = [ids(n) for n in lengths]
    completions = [ids(n) for n in (9, 1, 30, 12, 5, 5, 5, 5, 2, 64, 7, 1)]
    rows = [prompt for prompt in prompts for _ in range(4)]
    sequences = pack_sequences(rows, completions, 0, device, per_prompt=4)
    assert find_layout(model, device).layout is Layout.SEGMENTS
    states, gradients = {}, {}
    for layout in (Layout.PLAIN, Layout.SEGMENTS):
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "autocast"):
            hidden = completion_hidden_states(
                model,
                model,
                sequences.input_ids,
                sequences.prompt_lengths,
                sequences.mask,
                per_prompt=4,
                layout=layout,
            ).float()
        (hidden * torch.linspace(-1, 1, hidden.numel(), device=device).view_as(hidden)).mean().backward()
        states[layout] = hidden.detach()
        gradients[layout] = torch.cat([p.grad.float().flatten() for p in model.model.layers.parameters()])
    allowed = 1e-4 if dtype == "float32" else 0.05
    for found in (states, gradients):
        plain, shared = found[Layout.PLAIN], found[Layout.SEGMENTS]
        assert plain.isfinite().all() and plain.abs().max() > 0
        assert (shared - plain).norm() <= allowed * plain.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_frozen_head_is_read_in_parts_as_on_a_cpu(device, dtype):
    """Log-probabilities and gradients of 3000 tokens, whose parts are summed in fp32."""
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 20_001, bias=False, dtype=dtype).requires_grad_(False)
    hidden, targets = torch.randn(3000, 64, dtype=dtype), torch.randint(20_001, (3000,))
    found = []
    for place in (torch.device("cpu"), device):
        states = hidden.to(place).requires_grad_()
        logprobs, entropies = chunked_logprobs(states, head.to(place), targets.to(place), entropy_requires_grad=True)
        (gradient,) = torch.autograd.grad((logprobs + entropies).sum(), states)
        found.append([x.detach().float().cpu() for x in (logprobs, entropies, gradient)])
    for cpu, gpu in zip(*found, strict=True):
        assert (gpu - cpu).norm() <= (1e-4 if dtype == torch.float32 else 0.01) * cpu.norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("critic", ["none", "adapter"])
def test_four_completions_per_prompt_start_at_a_ratio_of_1(folder, device, dtype, critic):
    """Scoring and training compute the same with the kernels of the card."""
    options = {"num_generations": 4, "critic": critic, "per_device_train_batch_size": 8, "bf16": dtype == "bfloat16"}
    trainer = paths.ppo_trainer(folder, max_steps=4, joint_scoring=False, **options)
    assert paths.layouts_of(trainer) == {Layout.SEGMENTS}
    trainer.train()  # its check of the first rollout compares them
    paths.is_on(trainer, device)
    first, *_ = trainer.state.log_history
    assert first["val/ratio"] == pytest.approx(1.0, abs=1e-6 if dtype == "float32" else 1e-3)
    assert finite(paths.trained(trainer))
