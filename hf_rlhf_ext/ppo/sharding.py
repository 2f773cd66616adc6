"""How the weights of a run lie on its processes: whole in each (one process, or DDP), or in shards (FSDP2).

What PPO does differently with shards is in this module. Two facts are behind most of it:

- Every forward and backward pass gathers shards from all processes. So all processes must run equally many passes, and
  one that has fewer of its own joins the others with passes that count nothing (`most`, `in_step`).
- A weight is a `DTensor` between passes and a plain tensor during a pass. Some weights stay gathered after a pass
  without gradients, until `inference` ends.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import load_fsdp_optimizer
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import FSDP_MODEL_NAME, OPTIMIZER_NAME, OPTIMIZER_NAME_BIN

from ..errors import UserError
from ..modeling.adapters import bare_model
from ..modeling.shards import is_sharded, takes_whole_weights, whole
from ..training.engines import Engine, active_engine, asked_engine
from .config import PPOConfig
from .ranks import Ranks

Item = TypeVar("Item")


class Whole:
    """Each process has all weights: a run of one process, or DDP."""

    is_sharded = False

    def most(self, number: int) -> int:
        """The largest of the numbers of all processes, if all must run equally many passes; else the number itself."""
        return number

    def in_step(self, items: Sequence[Item]) -> list[tuple[Item, bool]]:
        """The items of this process, each with True. All processes get equally many, if they must.

        Missing ones are copies of the last item, with False: they must not count.

        Args:
            items: what this process passes through the model, one after the other; none only if no process has any.
        """
        copies = list(items[-1:]) * (self.most(len(items)) - len(items))
        return [(item, True) for item in items] + [(item, False) for item in copies]

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Around passes without gradients: afterward, all weights are as an optimizer and files need them."""
        yield

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Around the loading of weights from files."""
        yield

    def head(self, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        """What computes an output head after the forward pass that its input is from."""
        return layer

    @property
    def is_ready(self) -> bool:
        """Whether the weights are where passes need them. `Trainer` sees to it when it trains."""
        return True

    def prepare(self, optimizer: torch.optim.Optimizer) -> Any:
        """Puts the weights where passes need them, also those in an optimizer, which is returned prepared."""
        return optimizer

    def join_engine(self, engine: Any) -> None:
        """Tells a rollout engine how the weights lie.

        Raises:
            UserError: if the engine cannot sample from weights that lie like this.
        """

    def way_to_save(self, trainer: Trainer, save_model: Callable[..., None]) -> Callable[..., None]:
        """What saves the model of a trainer, with the arguments of `Trainer.save_model`, which `save_model` is."""
        return save_model

    def tidy(self, checkpoint: Path) -> None:
        """Removes what `Trainer` has written to a checkpoint and nobody reads. In the process that writes it."""

    # ---- Optimizer steps ----

    def sum_gradients(self, parameters: list[nn.Parameter], ranks: Ranks) -> None:
        """Sums gradients over processes, in place. A missing gradient counts as zeros."""
        if ranks.alone:
            return
        # All processes must send tensors of the same shapes. Otherwise they would wait for each other forever.
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        ranks.sum_([parameter.grad for parameter in parameters])

    def are_all(self, verdict: bool) -> bool:
        """Whether a verdict about the weights of this process is true on all processes that have other weights."""
        return verdict

    def clip(self, parameters: list[nn.Parameter], max_norm: float) -> Tensor:
        """Clips gradients to a norm. Returns the norm before, a scalar."""
        return nn.utils.clip_grad_norm_(parameters, max_norm)

    def complete_state(self, optimizer: Any) -> None:
        """Before a checkpoint: gives weights that no step has changed yet the optimizer state that files need.

        Raises:
            UserError: if it is not known which state an optimizer of this kind begins with.
        """

    def restore_optimizer(self, optimizer: Any, checkpoint: Path) -> None:
        """Loads the optimizer state of a checkpoint, if it has one, but keeps the current learning rates."""
        saved = checkpoint / OPTIMIZER_NAME
        if saved.is_file():
            with _same_learning_rates(optimizer):
                optimizer.load_state_dict(torch.load(saved, map_location="cpu", weights_only=True))


class Sharded(Whole):
    """Each process has a part of every weight: FSDP2. Heads stay whole in each process, in fp32.

    Args:
        accelerator: the accelerator of the trainer.
        ranks: the processes.
        model: the policy with all adapters and heads. It is sharded later, when `Trainer` prepares it.
        heads: the scalar heads among its modules.
    """

    is_sharded = True

    def __init__(self, accelerator: Accelerator, ranks: Ranks, model: nn.Module, heads: Sequence[nn.Module]):
        self._accelerator = accelerator
        self._ranks = ranks
        self._model = model
        _check_plugin(accelerator)
        plugin = accelerator.state.fsdp_plugin
        # Autocast computes in bf16, as without shards. The policy of FSDP would also round what must stay fp32: the
        # heads, and the sums of gradients.
        plugin.mixed_precision_policy = None
        # A head is called after the forward pass of the model, when shards are not gathered. It is a few kilobytes.
        plugin.ignored_modules = [head.to(ranks.device) for head in heads]

    def most(self, number: int) -> int:
        return max(self._ranks.gather(number))

    @contextmanager
    def inference(self) -> Iterator[None]:
        self._reshard()
        try:
            yield
        finally:
            self._reshard()

    def _reshard(self) -> None:
        from torch.distributed.fsdp import FSDPModule  # slow to import

        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @contextmanager
    def loading(self) -> Iterator[None]:
        with self.inference(), takes_whole_weights(self._model):
            yield

    def head(self, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        # The weights of the head stay gathered from the forward pass to the end of the backward pass. Its hooks belong
        # to a forward pass of the whole model: they would shard it again after the first chunk of tokens.
        return layer.forward

    @property
    def is_ready(self) -> bool:
        return any(is_sharded(parameter) for parameter in self._model.parameters())

    def prepare(self, optimizer: torch.optim.Optimizer) -> Any:
        from torch.distributed.fsdp import register_fsdp_forward_method

        _, optimizer = self._accelerator.prepare(self._model, optimizer)  # the model stays the same object
        register_fsdp_forward_method(self._model, "generate")  # as `Trainer` does
        return optimizer

    def join_engine(self, engine: Any) -> None:
        if not hasattr(engine, "sharding"):
            raise UserError(
                f"engine: {type(engine).__name__} gets the policy in shards with FSDP2, of which only "
                "TransformersEngine samples: leave engine out, or use --accelerate_config ddp."
            )
        engine.sharding = self

    def way_to_save(self, trainer: Trainer, save_model: Callable[..., None]) -> Callable[..., None]:
        # `Trainer` would first gather the whole base, which is not saved.
        def save(output_dir: str | None, is_internal: bool) -> None:
            trainer._save(output_dir)
            if trainer.args.push_to_hub and not is_internal:
                trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)

        return save

    def tidy(self, checkpoint: Path) -> None:
        # A pickle of the adapters, which are in safetensors too.
        (checkpoint / f"{FSDP_MODEL_NAME}.bin").unlink(missing_ok=True)

    # ---- Optimizer steps ----

    def sum_gradients(self, parameters: list[nn.Parameter], ranks: Ranks) -> None:
        super().sum_gradients([parameter for parameter in parameters if not is_sharded(parameter)], ranks)
        for parameter in filter(is_sharded, parameters):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.mul_(ranks.count)  # FSDP has averaged them

    def are_all(self, verdict: bool) -> bool:
        (objections,) = self._ranks.sum_of(not verdict)
        return objections == 0

    def clip(self, parameters: list[nn.Parameter], max_norm: float) -> Tensor:
        # That of accelerate takes sharded and whole weights together.
        return whole(self._accelerator.clip_grad_norm_(parameters, max_norm))

    def complete_state(self, optimizer: Any) -> None:
        # In a warm-up of the critic, weights of the policy have no state. A file with the states of some weights only
        # would not be read back (torch 2.13: "Missing optimizer state").
        weights = [weight for group in optimizer.param_groups for weight in group["params"] if weight.requires_grad]
        missing = [weight for weight in weights if not optimizer.state.get(weight)]
        like = next((weight for weight in weights if weight not in set(missing) and weight.ndim > 1), None)
        if not missing or like is None:
            return
        for weight in missing:
            optimizer.state[weight] = {
                name: _first_value(value, like, weight) for name, value in optimizer.state[like].items()
            }

    def restore_optimizer(self, optimizer: Any, checkpoint: Path) -> None:
        if not has_sharded_optimizer(checkpoint):
            return
        plugin = self._accelerator.state.fsdp_plugin
        with _same_learning_rates(optimizer):
            load_fsdp_optimizer(plugin, self._accelerator, optimizer, self._model, str(checkpoint))


def _first_value(value: Any, like: Tensor, weight: Tensor) -> Any:
    """What a weight has before its first step, where the optimizer state of another weight, `like`, has `value`.

    Momentum, mean squares and the number of steps begin at zero.
    """
    if isinstance(value, Tensor) and value.shape == like.shape:
        return torch.zeros_like(weight, dtype=value.dtype)
    if isinstance(value, Tensor) and value.numel() == 1:
        return torch.zeros_like(value)
    if isinstance(value, int | float):
        return type(value)()
    raise UserError(
        f"critic_warmup_steps: with {Engine.FSDP2}, a checkpoint in the warm-up needs an optimizer whose state begins "
        "at zero, such as AdamW: set optim=adamw_torch, or save no checkpoint until the warm-up has ended (save_steps)."
    )


def sharding_of(accelerator: Accelerator, ranks: Ranks, model: nn.Module, heads: Sequence[nn.Module]) -> Whole:
    """How the weights of a run lie on its processes. The arguments are those of `Sharded`."""
    if active_engine(accelerator) is Engine.FSDP2:
        return Sharded(accelerator, ranks, model, heads)
    return Whole()


def check_base(args: PPOConfig, model: nn.Module) -> None:
    """Refuses a quantized base where it would be sharded.

    Args:
        args: options of the run.
        model: the policy.

    Raises:
        UserError: if it is quantized and the engine shards it.
    """
    if asked_engine(args) is Engine.FSDP2 and getattr(bare_model(model), "is_quantized", False):
        raise UserError(
            f"{Engine.FSDP2}: PPOTrainer does not support it for a quantized base: load the base in bf16, or use "
            f"--accelerate_config {Engine.DDP}."
        )


def has_sharded_optimizer(checkpoint: Path) -> bool:
    """Whether a checkpoint has the optimizer state of a run with FSDP, in one file or in shards."""
    return (checkpoint / OPTIMIZER_NAME_BIN).is_file() or (checkpoint / "optimizer_0").is_dir()


def check_same_sharding(checkpoint: Path, *, is_sharded: bool) -> None:
    """Refuses to resume under another engine than that of a checkpoint, as its optimizer state has another form.

    Args:
        checkpoint: folder of the checkpoint. One without an optimizer state is not refused.
        is_sharded: whether this run is.

    Raises:
        UserError: if only one of the two is sharded.
    """
    if is_sharded and (checkpoint / OPTIMIZER_NAME).is_file():
        was, now = Engine.DDP, Engine.FSDP2
    elif not is_sharded and has_sharded_optimizer(checkpoint):
        was, now = Engine.FSDP2, Engine.DDP
    else:
        return
    raise UserError(
        f"resume_from_checkpoint: {checkpoint} has the optimizer state of a run with {was}, which a run with {now} "
        f"does not read: resume with --accelerate_config {was}, or start from its policy as the model."
    )


@contextmanager
def _same_learning_rates(optimizer: Any) -> Iterator[None]:
    """After the context, in which a state is loaded, the learning rates are as before: the schedule continues."""
    rates = [group["lr"] for group in optimizer.param_groups]
    yield
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _check_plugin(accelerator: Accelerator) -> None:
    """Refuses settings of FSDP that PPO does not support, all in one message."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    plugin = accelerator.state.fsdp_plugin
    problems = []
    if plugin.cpu_ram_efficient_loading:
        problems.append("fsdp_cpu_ram_efficient_loading: set it to false, as every process needs the weights")
    if plugin.activation_checkpointing:
        problems.append("fsdp_activation_checkpointing: set it to false, and activation_checkpointing of PPOConfig")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        problems.append("fsdp_offload_params: set it to false, as weights are trained on the device")
    if "FULL" not in str(plugin.state_dict_type):
        # Optimizers with several groups are not read back from shards (torch 2.13, accelerate 1.15: KeyError 'betas').
        problems.append("fsdp_state_dict_type: set it to FULL_STATE_DICT, which holds the states of adapters only")
    if accelerator.mixed_precision == "fp16":
        problems.append("fp16: use bf16")
    if problems:
        raise UserError(f"PPOTrainer does not support this FSDP2: {'; '.join(problems)}.")
