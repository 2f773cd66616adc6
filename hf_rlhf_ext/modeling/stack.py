"""One base, many roles: policy, reference, value and reward as adapters that share its weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import UserError
from .adapters import active_adapter, copy_adapter, load_adapter_weights, save_adapter
from .heads import ScalarHead
from .logprobs import completion_hidden_states

ADAPTER_NAMES = {"reference": "ref"}
"""Names of adapters that are not called like their role."""


@dataclass
class Role:
    """What computes a role: an adapter on the shared base (None: the bare base) or a model of its own, and its head."""

    adapter: str | None = None
    model: nn.Module | None = None
    head: ScalarHead | None = None


class AdapterStack:
    """Roles on one base model, which is loaded once.

    Args:
        model: a `PeftModel`, whose active adapter becomes the role "policy"; or a model without adapters, which is the
            policy itself and shares its base with no other role.

    Example:
        stack = AdapterStack(load_policy("runs/sft", is_trainable=True)[0])
        stack.attach("reference", "policy")      # a frozen copy of the SFT adapter; without a source: the bare base
        stack.attach("reward", "runs/reward")    # adapter and score head of a reward model on the same base
        with stack.activate("reward") as model:
            ...
    """

    def __init__(self, model: nn.Module):
        self.model = model
        adapter = None
        if isinstance(model, PeftModel):
            adapter = model.active_adapter
            model.set_adapter(adapter)  # an adapter loaded for inference comes frozen
        self.roles = {"policy": Role(adapter)}

    def attach(
        self,
        role: str,
        source: str | Path | PeftConfig | nn.Module | None = None,
        *,
        head: ScalarHead | None = None,
        trainable: bool = False,
    ) -> Role:
        """Adds a role; what is active stays so.

        Args:
            source: another role, whose adapter is copied; the folder of an adapter, with its score head where it has
                one; a PEFT configuration for a new adapter; a model of its own; None for the bare base.
            head: scalar head of the role, fp32; it becomes a module of the base, `<role>_head`.
            trainable: whether the role's weights get gradients.

        Raises:
            UserError: an adapter that does not fit the base, or one that cannot be held beside the others.
        """
        name = ADAPTER_NAMES.get(role, role)
        if source is None:
            found = Role()
        elif isinstance(source, nn.Module):
            found = Role(model=source.requires_grad_(trainable))
            if trainable:
                self.model.add_module(f"{role}_model", source)  # so that optimizers and devices see it
                source.to(next(self.model.parameters()).device)  # Trainer moves no model whose base is in 4 bits
        else:
            if not isinstance(self.model, PeftModel):
                raise UserError(f"role {role!r}: a model without adapters shares its base with no other role.")
            flags = {key: parameter.requires_grad for key, parameter in self.model.named_parameters()}
            found = Role(adapter=name)
            head = self._add_adapter(name, source) or head
            for key, parameter in self.model.named_parameters():
                parameter.requires_grad_(trainable if f".{name}." in key else flags.get(key, False))
        if head is not None:
            device = next(self.model.parameters()).device
            self.model.add_module(f"{role}_head", head.to(device).requires_grad_(trainable))
            found.head = head
        self.roles[role] = found
        return found

    def _add_adapter(self, name: str, source: str | Path | PeftConfig) -> ScalarHead | None:
        """Adds adapter `name`; returns the score head that its folder holds, None where there is none."""
        if isinstance(source, PeftConfig):
            self.model.add_adapter(name, source)
            return None
        if source in self.roles:
            if self.roles[source].adapter is None:
                raise UserError(f"role {source!r} is no adapter: it cannot be copied.")
            if name not in self.model.peft_config:
                copy_adapter(self.model, self.roles[source].adapter, name)
            return None
        config = PeftConfig.from_pretrained(str(source))
        kept = set(config.modules_to_save or ()) - {"score", "classifier"}  # the head is ours, not the base's
        config.modules_to_save = sorted(kept) or None
        weights = load_peft_weights(str(source), device="cpu")
        scores = {key.rsplit(".", 1)[1]: weights.pop(key) for key in list(weights) if ".score." in key}
        active = self.model.active_adapter
        self.model.add_adapter(name, config)
        self.model.set_adapter(active)
        try:
            unexpected = set_peft_model_state_dict(self.model, weights, adapter_name=name).unexpected_keys
        except RuntimeError as error:
            raise UserError(f"{source}: does not fit the base: {str(error).splitlines()[-1].strip()}") from error
        if unexpected:
            raise UserError(f"{source}: the adapter has weights that the base lacks, first {unexpected[0]!r}.")
        return _head_of(scores)

    @contextmanager
    def activate(self, role: str) -> Iterator[nn.Module]:
        """Yields the model that computes the role; restores what was active, and leaves every flag as it was.

        A role's backward pass belongs inside too: with gradient checkpointing it computes the adapter again.
        """
        found = self.roles[role]
        if found.model is not None or not isinstance(self.model, PeftModel):
            yield found.model if found.model is not None else self.model
        else:
            with active_adapter(self.model, found.adapter):
                yield self.model

    @property
    def mixes(self) -> bool:
        """Whether `hidden_states` can compute several roles in one pass: PEFT's mixed batches take plain LoRA only."""
        return isinstance(self.model, PeftModel) and all(
            isinstance(config, LoraConfig)
            and not (config.use_dora or config.modules_to_save or config.trainable_token_indices)
            for config in self.model.peft_config.values()
        )

    @torch.no_grad()
    def hidden_states(
        self, roles: Sequence[str], input_ids: Tensor, prompt_lengths: Tensor, mask: Tensor, *, mixed: bool = True
    ) -> dict[str, Tensor]:
        """What `completion_hidden_states` gives, (N, H), by role; in one pass where `mixed` and the adapters allow it.

        The model must be in eval mode. Roles that compute the same (a value head on the policy) share their states.
        """
        distinct: dict[tuple, list[str]] = {}
        for role in roles:
            found = self.roles[role]
            distinct.setdefault((found.adapter, id(found.model)), []).append(role)
        shared = [group for group in distinct.values() if self.roles[group[0]].model is None]
        states: dict[str, Tensor] = {}
        if mixed and self.mixes and len(shared) > 1:
            names = [self.roles[group[0]].adapter or "__base__" for group in shared]
            repeated = [x.repeat(len(names), *[1] * (x.ndim - 1)) for x in (input_ids, prompt_lengths, mask)]
            rows = [name for name in names for _ in range(len(input_ids))]
            hidden = completion_hidden_states(self.model, self.model, *repeated, adapter_names=rows)
            for group, part in zip(shared, hidden.chunk(len(names)), strict=True):
                states |= dict.fromkeys(group, part)
        for group in distinct.values():
            if group[0] not in states:
                with self.activate(group[0]) as model:
                    hidden = completion_hidden_states(model, model, input_ids, prompt_lengths, mask)
                states |= dict.fromkeys(group, hidden)
        return states

    def parameters(self, role: str) -> list[nn.Parameter]:
        """The trainable parameters of a role: those of its adapter or model, and its head's."""
        found = self.roles[role]
        attached = tuple(f"{other}_{kind}." for other in self.roles for kind in ("head", "model"))
        base = [(name, p) for name, p in self.model.named_parameters() if not name.startswith(attached)]
        if found.model is not None:
            own = list(found.model.parameters())
        elif isinstance(self.model, PeftModel):
            own = [p for name, p in base if f".{found.adapter}." in name]
        else:
            own = [p for _, p in base]
        own += found.head.parameters() if found.head is not None else []
        return [parameter for parameter in own if parameter.requires_grad]

    def save(self, role: str, folder: str | Path) -> None:
        """Writes a role as an ordinary PEFT (or model) folder, and its head as `<role>_head.safetensors` beside it."""
        found, folder = self.roles[role], Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if found.model is not None:
            found.model.save_pretrained(folder)
        elif found.adapter is not None:
            save_adapter(self.model, found.adapter, folder)
        if found.head is not None:
            save_file(found.head.state_dict(), folder / f"{role}_head.safetensors")

    @torch.no_grad()
    def load(self, role: str, folder: str | Path) -> None:
        """Reads what `save` wrote into the weights that the role has now, which optimizers may hold."""
        found, folder = self.roles[role], Path(folder)
        if found.model is not None:
            read_weights(found.model, folder)
        elif found.adapter is not None:
            load_adapter_weights(self.model, found.adapter, folder)
        if found.head is not None:
            found.head.load_state_dict(load_file(folder / f"{role}_head.safetensors"))


def read_weights(model: nn.Module, folder: str | Path) -> None:
    """Copies the weights of a saved model into `model`, in place."""
    saved = type(model).from_pretrained(folder, dtype="auto").state_dict()
    own = model.state_dict()
    with torch.no_grad():
        for name, value in saved.items():
            own[name].copy_(value)


def _head_of(scores: dict[str, Tensor]) -> ScalarHead | None:
    if "weight" not in scores:
        return None
    head = ScalarHead(scores["weight"].shape[1], bias="bias" in scores)
    head.load_state_dict(scores)
    return head
