"""A pretend accelerator: it shows a tensor that was left on the CPU, on a machine that has no accelerator.

A tensor on `pretend:0` holds a tensor of the CPU, and every operator computes on that one, so that results are those of
the CPU to the bit. But the two kinds refuse to meet, with the message of CUDA. `install()` registers the device with
PyTorch's Python backend for `PrivateUse1`. That renames the backend for the rest of the process, so use it in a process
of its own.

    device = install()
    with placement.trainers_use(device):
        trainer = PPOTrainer(…)
        trainer.train()

What it does not have: streams, graphs, fused kernels, memory of its own, a random generator of its own (it draws from
the one of the CPU), and the cache of autocast. `tests/devices/test_cuda.py` is for these.
"""

import contextlib
import functools
import types
from collections.abc import Callable

import torch
import torch.utils._device
from torch.utils._pytree import tree_map

NAME = "pretend"

# Operators that take a tensor of the CPU beside tensors of the device on CUDA too: copies, and indexing.
MEETS_CPU = {
    "aten::copy_",
    "aten::index.Tensor",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
}

# On CUDA a single number on the CPU may meet tensors of the device in operators that go element by element. These do so
# without having the tag of such operators.
TAKES_CPU_NUMBERS = {
    "aten::fill_",
    "aten::index_fill",
    "aten::index_fill_",
    "aten::masked_fill",
    "aten::masked_fill_",
}

# What autocast computes in half precision and in fp32 on CUDA, as far as language models call it.
IN_HALF_PRECISION = (
    "addmm",
    "baddbmm",
    "bmm",
    "einsum",
    "linear",
    "matmul",
    "mm",
    "mv",
    "scaled_dot_product_attention",
)
IN_FP32 = (
    "exp",
    "layer_norm",
    "log",
    "log1p",
    "logsumexp",
    "mse_loss",
    "nll_loss",
    "linalg_vector_norm",
    "pow.Tensor_Scalar",
    "prod",
    "reciprocal",
    "rsqrt",
    "softplus",
    "sum",
    "sum.dim_IntList",
    "cumsum",
    "softmax.int",
    "log_softmax.int",
)

# PyTorch makes an empty tensor and resizes it in these, which is one step here.
IN_ONE_STEP = ("arange", "arange.start", "arange.start_step")

_copy_watchers: list[Callable[[torch.Tensor], None]] = []
_libraries: list[torch.library.Library] = []  # a registration ends with its library


def watch_copies(watcher: Callable[[torch.Tensor], None]) -> None:
    """Calls `watcher` with every tensor of the device that is copied to the CPU."""
    _copy_watchers.append(watcher)


def forget(watcher: Callable[[torch.Tensor], None]) -> None:
    """Ends `watch_copies`."""
    _copy_watchers.remove(watcher)


def _tell_of_copy(tensor: torch.Tensor) -> None:
    for watcher in _copy_watchers:
        watcher(tensor)


class PretendTensor(torch.Tensor):
    """A tensor on the device; `raw` holds its values on the CPU.

    PyTorch's own indexing, printing and pickling go past the dispatcher for some arguments. They are redefined here.
    """

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> "PretendTensor":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
        )
        tensor.raw = raw
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"{NAME}({self.raw})"

    def __array__(self, *args, **kwargs):
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
            "memory first."
        )

    numpy = __array__

    def __getitem__(self, index):
        return super().__getitem__(_with_tensors_for_lists(index))

    def __setitem__(self, index, value):
        super().__setitem__(_with_tensors_for_lists(index), value)

    def new_tensor(self, data, *, dtype=None, device=None, requires_grad=False):
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device, requires_grad=requires_grad)

    def tolist(self):
        _tell_of_copy(self)
        return self.raw.tolist()

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def untyped_storage(self):
        return self.raw.untyped_storage()

    def __deepcopy__(self, memo):
        copied = PretendTensor(self.raw.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol):
        # As PyTorch pickles tensors of devices without storages: `torch.load` with `weights_only=True` takes it, and
        # `map_location` decides about the device.
        values = self.raw.detach().clone()
        arguments = (values, self.dtype, str(self.device), self.requires_grad)
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, arguments


def _with_tensors_for_lists(index):
    """PyTorch makes tensors of lists in C++, where they do not become tensors of this device."""
    if isinstance(index, list):
        return torch.tensor(index)
    if isinstance(index, tuple):
        return tuple(torch.tensor(part) if isinstance(part, list) else part for part in index)
    return index


def _raw(value):
    return value.raw if isinstance(value, PretendTensor) else value


def _is_ours(device) -> bool:
    return device is not None and torch.device(device).type == NAME


def compute(func, args: tuple, kwargs: dict):
    """One operator: refuses tensors of two devices, computes on the tensors inside, and wraps the results."""
    name = func._schema.name
    if name in ("aten::_to_copy", "aten::to"):
        return _copied_to(args[0], kwargs)
    if name in ("aten::copy_", "aten::_copy_from"):
        return _copied_into(name, args)
    if name == "aten::_local_scalar_dense":
        return _raw(args[0]).item()
    if name == "aten::_fused_sdp_choice":
        return 0  # the plain mathematics: there is no fused kernel

    met = Met()
    raw_args = _unwrapped(args, met)
    raw_kwargs = {key: _unwrapped(value, met) for key, value in kwargs.items() if key != "pin_memory"}
    makes_ours = bool(met.ours) or _is_ours(kwargs.get("device"))
    if makes_ours:
        _refuse_to_meet(func, met)
    if raw_kwargs.get("device") is not None:
        raw_kwargs["device"] = "cpu"
    result = func(*raw_args, **raw_kwargs)
    if func._schema.is_mutable:
        _refuse_new_sizes(func, met)
    return _wrapped(result, met) if makes_ours else result


class Met:
    """What an operator was called with."""

    def __init__(self):
        self.ours: dict[int, PretendTensor] = {}  # by the identity of the tensor inside
        self.of_the_cpu: list[torch.Tensor] = []
        self.generators: list[torch.Generator] = []


def _unwrapped(value, met: Met):
    """The value with the tensors inside; notes in `met` what was there."""
    if isinstance(value, PretendTensor):
        met.ours[id(value.raw)] = value
        return value.raw
    if isinstance(value, torch.Tensor):
        met.of_the_cpu.append(value)
    elif isinstance(value, torch.Generator):
        met.generators.append(value)
    elif isinstance(value, list | tuple):
        return type(value)([_unwrapped(part, met) for part in value])
    return value


def _wrapped(value, met: Met):
    if isinstance(value, torch.Tensor):
        # In-place operators return what they were given.
        given = met.ours.get(id(value))
        return PretendTensor(value) if given is None else given
    if isinstance(value, list | tuple):
        return type(value)([_wrapped(part, met) for part in value])
    return value


def _copied_to(tensor: torch.Tensor, options: dict) -> torch.Tensor:
    """`Tensor.to`: the only way from one device to the other, with `copy_`."""
    device = options.get("device")
    target = tensor.device if device is None else torch.device(device)
    if isinstance(tensor, PretendTensor) and target.type == "cpu":
        _tell_of_copy(tensor)
    options = {key: value for key, value in options.items() if key not in ("device", "pin_memory")}
    copy = torch.ops.aten._to_copy.default(_raw(tensor), **options)
    return PretendTensor(copy) if target.type == NAME else copy


def _copied_into(name: str, args: tuple) -> torch.Tensor:
    target, source = args[:2]
    if name == "aten::_copy_from":
        source, target = target, source
    if isinstance(source, PretendTensor) and not isinstance(target, PretendTensor):
        _tell_of_copy(source)
    _raw(target).copy_(_raw(source))
    return target


def _refuse_new_sizes(func, met: Met) -> None:
    """A tensor keeps the size that it was made with: an operator that changes it needs an entry in `IN_ONE_STEP`."""
    for tensor in met.ours.values():
        if tensor.shape != tensor.raw.shape:
            raise NotImplementedError(f"{func} changes the size of a tensor, which the device {NAME} does not do.")


def _refuse_to_meet(func, met: Met) -> None:
    """The errors of CUDA for a tensor or a generator of the CPU."""
    for generator in met.generators:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{generator.device.type}'")
    name = func._schema.name
    if not met.ours or not met.of_the_cpu or name in MEETS_CPU or f"{name}.{func._overloadname}" in MEETS_CPU:
        return
    takes_numbers = torch.Tag.pointwise in func.tags or name in TAKES_CPU_NUMBERS
    for tensor in met.of_the_cpu:
        if tensor.dim() == 0 and takes_numbers:
            continue
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and "
            f"{tensor.device}! ({func}, a tensor of shape {tuple(tensor.shape)})"
        )


# ---- What surrounds the tensors: the device's module, autocast, and what PyTorch does in C++ ----


def _device_module() -> types.SimpleNamespace:
    """What `torch.cuda` is for CUDA, as far as PyTorch and the libraries ask for it."""

    def nothing(*args, **kwargs) -> None:
        return None

    def set_rng_state(state, device=None) -> None:
        torch.set_rng_state(state)

    return types.SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        _is_in_bad_fork=lambda: False,
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=nothing,
        device=lambda index: contextlib.nullcontext(),
        manual_seed=nothing,  # the generator of the CPU has its seed already
        manual_seed_all=nothing,
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=set_rng_state,
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
        empty_cache=nothing,
        synchronize=nothing,
    )


def _register_autocast() -> None:
    library = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    _libraries.append(library)
    for name in IN_HALF_PRECISION:
        library.impl(name, _casting(_operator(name), half_precision=True))
    for name in IN_FP32:
        library.impl(name, _casting(_operator(name), half_precision=False))
    everything_else = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    _libraries.append(everything_else)
    everything_else.fallback(torch.library.fallthrough_kernel)


def _called(func, *args, **kwargs):
    return compute(func, args, kwargs)


def _operator(name: str):
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _casting(func, *, half_precision: bool) -> Callable:
    """The operator under autocast: casts its tensors and computes without autocast."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def kernel(*args, **kwargs):
        dtype = torch.get_autocast_dtype(NAME) if half_precision else torch.float32

        def cast(value):
            is_cast = isinstance(value, PretendTensor) and value.is_floating_point() and value.dtype != torch.float64
            return value.to(dtype) if is_cast else value

        with torch._C._ExcludeDispatchKeyGuard(key):
            return func(*tree_map(cast, args), **tree_map(cast, kwargs))

    return kernel


def _redirect_constructors() -> None:
    """`torch.tensor` and `torch.as_tensor` move their values in C++, past the fallback: they move in Python here."""
    torch.utils._device._device_constructors()  # `with torch.device("meta")` has to know the functions of PyTorch
    tensor, as_tensor = torch.tensor, torch.as_tensor

    def new_tensor(data, *, device=None, requires_grad=False, **options):
        options.pop("pin_memory", None)
        if isinstance(data, (list, tuple)):
            data = tree_map(_number, data)
        made = tensor(data, **options)
        if device is not None:
            made = made.to(device)
        return made.requires_grad_() if requires_grad else made

    def existing_tensor(data, dtype=None, device=None):
        made = data if isinstance(data, torch.Tensor) else as_tensor(data)
        return made.to(device=device or made.device, dtype=dtype or made.dtype)

    torch.tensor, torch.as_tensor = new_tensor, existing_tensor
    torch.Tensor.pin_memory = lambda self, device=None: self
    torch.Tensor.is_pinned = lambda self, device=None: False


def _number(value):
    return value.item() if isinstance(value, PretendTensor) else value


_installed = False


def install() -> torch.device:
    """Registers the device with PyTorch, for the rest of the process; returns it.

    Before the first backward pass, when PyTorch counts the devices.
    """
    global _installed
    if not _installed:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

        _setup_privateuseone_for_python_backend(NAME, backend_module=_device_module())
        # `Module.to` otherwise writes into the parameters it has, which cannot change their class.
        torch.__future__.set_swap_module_params_on_conversion(True)
        fallback, operators = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
        _libraries.extend([fallback, operators])
        fallback.fallback(_called, "PrivateUse1")
        for name in IN_ONE_STEP:
            operators.impl(name, functools.partial(_called, _operator(name)), "PrivateUse1")
        # `torch.load(…, map_location=device)`: storages stay on the CPU, the tensors made of them are moved.
        torch.serialization.register_package(
            0, lambda storage: None, lambda storage, location: storage if location.startswith(NAME) else None
        )
        _register_autocast()
        _redirect_constructors()
        _installed = True
    return torch.device(NAME, 0)
