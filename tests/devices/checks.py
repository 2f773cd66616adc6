"""What the pretend device does as a real one does: `CHECKS`, functions of the device that fail where it does not.

They say first what is wrong when a new PyTorch changes something.
"""

import copy
import io
import tempfile
from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaModel

from hf_rlhf_ext.modeling.prefix import model_inputs
from hf_rlhf_ext.modeling.probing import unchanged_random_state
from tests.devices import pretend
from tests.devices.placement import trainers_use

CHECKS: dict[str, Callable] = {}


def check(function: Callable) -> Callable:
    CHECKS[function.__name__.replace("_", " ")] = function
    return function


def fails(error: type[Exception], text: str, function: Callable) -> None:
    try:
        function()
    except error as raised:
        assert text in str(raised), raised
    else:
        raise AssertionError(f"no {error.__name__}")


@check
def tensors_of_two_devices_do_not_meet(device):
    ours, other = torch.ones(2, 3, device=device), torch.ones(3)
    text = "all tensors to be on the same device"
    fails(RuntimeError, text, lambda: ours + other)
    fails(RuntimeError, text, lambda: other * ours)
    fails(RuntimeError, text, lambda: ours @ other)
    fails(RuntimeError, text, lambda: torch.where(ours > 0, ours, torch.zeros(2, 3)))
    fails(RuntimeError, text, lambda: torch.stack([ours.sum(), torch.ones(())]))
    fails(RuntimeError, text, lambda: torch.cat([ours, torch.ones(2, 3)]))
    fails(RuntimeError, text, lambda: torch.nn.Linear(3, 1)(ours))
    assert (ours + torch.ones(())).sum().item() == 12  # a single number may, as on CUDA
    assert ours.masked_fill(ours > 0, torch.tensor(0.5)).sum().item() == 3


@check
def generators_of_the_cpu_are_refused(device):
    weights = torch.ones(4, device=device)
    text = "device type for generator but found 'cpu'"
    fails(RuntimeError, text, lambda: torch.multinomial(weights, 2, generator=torch.Generator()))
    fails(RuntimeError, text, lambda: torch.randperm(4, generator=torch.Generator(), device=device))
    assert torch.multinomial(weights, 2).device == device


@check
def only_a_copy_gets_to_numpy(device):
    tensor = torch.ones(2, device=device)
    for convert in (tensor.numpy, lambda: np.asarray(tensor), lambda: np.array([tensor, tensor])):
        fails(TypeError, "to numpy", convert)
    assert tensor.cpu().numpy().sum() == 2


@check
def copies_are_seen(device):
    seen = []
    pretend.watch_copies(seen.append)
    try:
        tensor, target = torch.ones(3, device=device), torch.empty(3)
        for copied in (tensor.cpu, lambda: tensor.to("cpu"), tensor.tolist, lambda: target.copy_(tensor)):
            before = len(seen)
            copied()
            assert len(seen) == before + 1
        tensor.sum(), tensor.clone(), tensor.to(torch.float64), torch.ones(3).to(device)
        assert len(seen) == 4
    finally:
        pretend.forget(seen.append)


@check
def indexing(device):
    tensor = torch.arange(6.0, device=device).reshape(2, 3)
    assert tensor[[1, 0, 1]].shape == (3, 3) and tensor[:, [0, 2]].shape == (2, 2)
    assert tensor[tensor > 2].tolist() == [3, 4, 5] and tensor[torch.tensor([1])].shape == (1, 3)
    tensor[[0]] = 7
    tensor[tensor == 7] = torch.tensor([1.0, 2.0, 3.0], device=device)
    assert tensor.tolist() == [[1, 2, 3], [3, 4, 5]]


@check
def making_tensors(device):
    tensor = torch.ones(2, device=device)
    made = [torch.tensor([1, 2], device=device), torch.full((2,), 3.0, device=device), torch.arange(2, device=device)]
    made += [tensor.new_tensor([1, 2]), tensor.new_zeros(2), torch.rand_like(tensor), torch.randn(2, device=device)]
    made += [torch.as_tensor([1, 2], device=device), torch.from_numpy(np.ones(2)).to(device)]
    assert all(each.device == device and each.shape == (2,) for each in made)
    with torch.device("meta"):
        assert torch.tensor([]).device.type == "meta"


@check
def gradients_and_optimizers_and_their_files(device):
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    twin = copy.deepcopy(layer)
    layer.to(device)
    inputs = torch.randn(4, 3)
    optimizers = [torch.optim.AdamW(module.parameters(), lr=0.1) for module in (layer, twin)]
    for _ in range(2):
        for module, optimizer, values in zip((layer, twin), optimizers, (inputs.to(device), inputs), strict=True):
            module(values).pow(2).sum().backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        file = io.BytesIO()
        torch.save(optimizers[0].state_dict(), file)
        file.seek(0)
        optimizers[0].load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        assert optimizers[0].state[layer.weight]["exp_avg"].device == device
    torch.testing.assert_close(layer.weight.detach().cpu(), twin.weight.detach())


@check
def pickles_and_copies(device):
    weights = {"tensor": torch.arange(3.0, device=device), "weight": torch.nn.Parameter(torch.ones(2, device=device))}
    for location, expected in ((None, device), ("cpu", torch.device("cpu")), (device, device)):
        file = io.BytesIO()
        torch.save(weights, file)
        file.seek(0)
        loaded = torch.load(file, map_location=location, weights_only=True)
        assert {value.device for value in loaded.values()} == {expected}
        assert loaded["tensor"].tolist() == [0, 1, 2] and loaded["weight"].requires_grad
    copied = copy.deepcopy(torch.nn.Linear(2, 2).to(device))
    assert isinstance(copied.weight, torch.nn.Parameter) and copied.state_dict()["weight"].device == device
    assert copied.to("cpu").weight.device.type == "cpu"


@check
def autocast(device):
    layer = torch.nn.Linear(4, 4).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        hidden = layer(torch.randn(2, 4, device=device))
        probabilities = hidden.softmax(-1)
        with torch.autocast(device.type, enabled=False):
            full = layer(torch.randn(2, 4, device=device))
    assert (hidden.dtype, probabilities.dtype, full.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    probabilities.sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@check
def gradient_scaler(device):
    layer, scaler = torch.nn.Linear(2, 1).to(device), torch.amp.GradScaler(device.type)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = layer.weight.detach().clone()
    for factor, moves in ((float("inf"), False), (1.0, True)):
        scaler.scale(layer(torch.ones(1, 2, device=device)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(layer.weight, before) != moves
    assert scaler.get_scale() == 65536 / 2


@check
def random_states(device):
    torch.manual_seed(0)
    with torch.random.fork_rng([device], device_type=device.type):
        first = torch.rand(2, device=device)
    assert torch.equal(torch.rand(2, device=device), first)


@check
def accelerate_and_data_loaders(device):
    with trainers_use(device):
        accelerator = Accelerator(cpu=True)
        layer, loader = accelerator.prepare(
            torch.nn.Linear(1, 1), DataLoader(torch.arange(4.0)[:, None], batch_size=2, pin_memory=True)
        )
        for batch in loader:
            assert batch.device == device
            accelerator.backward(layer(batch).sum())
        assert accelerator.clip_grad_norm_(layer.parameters(), 1.0).device == device
        assert accelerator.gather(batch).shape == (2, 1) and accelerator.reduce(batch).device == device
    assert torch.accelerator.current_accelerator().type == device.type


@check
def safetensors(device):
    with tempfile.TemporaryDirectory() as folder:
        save_file({"a": torch.arange(3.0, device=device)}, f"{folder}/device.safetensors")
        assert load_file(f"{folder}/device.safetensors")["a"].tolist() == [0, 1, 2]


# ---- The library, where only another device than the CPU and CUDA shows a mistake ----


@check
def the_library_restores_the_random_state_of_any_device(device):
    module = getattr(torch, device.type)
    with patch.object(module, "set_rng_state", wraps=module.set_rng_state) as restored:
        with unchanged_random_state(device):
            torch.rand(2, device=device)
    assert restored.called


@check
def masks_for_eager_attention_have_the_dtype_of_autocast(device):
    sizes = {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = LlamaModel(LlamaConfig(**sizes, attn_implementation="eager")).to(device)
    zeros = torch.zeros(1, 3, dtype=torch.long, device=device)
    batch = {"input_ids": zeros, "segments": zeros, "owners": zeros, "positions": torch.arange(3, device=device)[None]}
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert model_inputs(model, batch)["attention_mask"].dtype == torch.bfloat16
    assert model_inputs(model, batch)["attention_mask"].dtype == torch.float32
