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

_BARE_BASE = "__base__"  # PEFT's name for "no adapter" in a batch that mixes adapters
_HEAD_MODULES = {"score", "classifier"}  # what a reward model's folder calls its head


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
        """Adds a role; the active adapter stays active.

        Args:
            source: another role, whose adapter is copied; the folder of an adapter, with its score head if it has one;
                a PEFT configuration for a new adapter; a model of its own; None for the bare base.
            head: scalar head of the role, fp32; it becomes a module of the base, `<role>_head`. The head in an
                adapter's folder takes precedence.
            trainable: whether the role's weights get gradients.

        Raises:
            UserError: an adapter that does not fit the base, or one that cannot be held beside the others.
        """
        if source is None:
            attached = Role()  # the bare base
        elif isinstance(source, nn.Module):
            attached = self._attach_own_model(role, source, trainable)
        else:
            attached = self._attach_adapter(role, source, trainable)

        if attached.head is None:
            attached.head = head
        if attached.head is not None:
            device = next(self.model.parameters()).device
            attached.head.to(device).requires_grad_(trainable)
            self.model.add_module(f"{role}_head", attached.head)

        self.roles[role] = attached
        return attached

    def _attach_own_model(self, role: str, model: nn.Module, trainable: bool) -> Role:
        model.requires_grad_(trainable)
        if trainable:
            # A module of the base, so that optimizers and devices see it.
            self.model.add_module(f"{role}_model", model)
            # Trainer does not move a model whose base is in 4 bits, so its device is set here.
            model.to(next(self.model.parameters()).device)
        return Role(model=model)

    def _attach_adapter(self, role: str, source: str | Path | PeftConfig, trainable: bool) -> Role:
        if not isinstance(self.model, PeftModel):
            raise UserError(f"role {role!r}: a model without adapters shares its base with no other role.")
        adapter = ADAPTER_NAMES.get(role, role)
        # PEFT switches flags of other adapters while it adds one: they are put back below.
        flags_before = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}

        head = None
        if isinstance(source, PeftConfig):
            self.model.add_adapter(adapter, source)
        elif source in self.roles:
            self._copy_adapter_of(source, adapter)
        else:
            head = self._load_adapter(adapter, source)

        for name, parameter in self.model.named_parameters():
            if f".{adapter}." in name:
                parameter.requires_grad_(trainable)
            else:
                parameter.requires_grad_(flags_before.get(name, False))
        return Role(adapter=adapter, head=head)

    def _copy_adapter_of(self, role: str, adapter: str) -> None:
        """Adds `adapter` as a copy of another role's; one that is there already is kept as it is."""
        copied = self.roles[role].adapter
        if copied is None:
            raise UserError(f"role {role!r} is no adapter: it cannot be copied.")
        if adapter not in self.model.peft_config:
            copy_adapter(self.model, copied, adapter)

    def _load_adapter(self, adapter: str, folder: str | Path) -> ScalarHead | None:
        """Adds `adapter` from a folder; returns the score head that the folder holds, None without one."""
        config = PeftConfig.from_pretrained(str(folder))
        # PEFT would look for these modules in the base, which has none: the head is ours.
        modules_to_save = set(config.modules_to_save or ()) - _HEAD_MODULES
        config.modules_to_save = sorted(modules_to_save) or None

        # The score head lies among the adapter's weights, under a key that the base does not have.
        adapter_weights = load_peft_weights(str(folder), device="cpu")
        head_weights = {}
        for key in list(adapter_weights):
            if ".score." in key:
                head_weights[key.rsplit(".", 1)[1]] = adapter_weights.pop(key)

        active = self.model.active_adapter
        self.model.add_adapter(adapter, config)
        self.model.set_adapter(active)
        try:
            result = set_peft_model_state_dict(self.model, adapter_weights, adapter_name=adapter)
        except RuntimeError as error:
            raise UserError(f"{folder}: does not fit the base: {str(error).splitlines()[-1].strip()}") from error
        if result.unexpected_keys:
            first = result.unexpected_keys[0]
            raise UserError(f"{folder}: the adapter has weights that the base lacks, first {first!r}.")
        return _head_from(head_weights)

    @contextmanager
    def activate(self, role: str) -> Iterator[nn.Module]:
        """Yields the model that computes the role; restores what was active, and leaves every flag as it was.

        A role's backward pass belongs inside too: with gradient checkpointing it computes the adapter again.
        """
        active_role = self.roles[role]
        if active_role.model is not None:
            yield active_role.model
        elif not isinstance(self.model, PeftModel):
            yield self.model
        else:
            with active_adapter(self.model, active_role.adapter):
                yield self.model

    @property
    def can_score_jointly(self) -> bool:
        """Whether `hidden_states` can compute several roles in one pass.

        PEFT's batches of several adapters take plain LoRA only.
        """
        if not isinstance(self.model, PeftModel):
            return False
        for config in self.model.peft_config.values():
            if not isinstance(config, LoraConfig):
                return False
            if config.use_dora or config.modules_to_save or config.trainable_token_indices:
                return False
        return True

    @torch.no_grad()
    def hidden_states(
        self,
        roles: Sequence[str],
        input_ids: Tensor,
        prompt_lengths: Tensor,
        mask: Tensor,
        *,
        joint: bool = True,
    ) -> dict[str, Tensor]:
        """What `completion_hidden_states` returns, (N, H), by role.

        The model must be in eval mode. Roles that compute the same (a value head on the policy) share their states.

        Args:
            roles: the roles to compute.
            input_ids, prompt_lengths, mask: (B, L), (B,) and (B, T), as in `completion_hidden_states`.
            joint: one forward pass for all roles on the shared base where `can_score_jointly`, else one for each.
        """
        # Roles with the same adapter and model are computed once.
        same_computation: dict[tuple[str | None, int], list[str]] = {}
        for role in roles:
            key = (self.roles[role].adapter, id(self.roles[role].model))
            same_computation.setdefault(key, []).append(role)
        groups = list(same_computation.values())
        on_base = [group for group in groups if self.roles[group[0]].model is None]

        states: dict[str, Tensor] = {}
        if joint and self.can_score_jointly and len(on_base) > 1:
            states = self._joint_hidden_states(on_base, input_ids, prompt_lengths, mask)
        for group in groups:
            if group[0] in states:
                continue
            with self.activate(group[0]) as model:
                hidden = completion_hidden_states(model, model, input_ids, prompt_lengths, mask)
            for role in group:
                states[role] = hidden
        return states

    def _joint_hidden_states(
        self,
        groups: list[list[str]],
        input_ids: Tensor,
        prompt_lengths: Tensor,
        mask: Tensor,
    ) -> dict[str, Tensor]:
        """One pass over the batch repeated for each group, whose rows PEFT computes with that group's adapter."""
        # PEFT's mixed batches: every row names its adapter.
        row_adapters = []
        for group in groups:
            adapter = self.roles[group[0]].adapter or _BARE_BASE
            row_adapters += [adapter] * len(input_ids)
        copies = len(groups)
        hidden = completion_hidden_states(
            self.model,
            self.model,
            input_ids.repeat(copies, 1),
            prompt_lengths.repeat(copies),
            mask.repeat(copies, 1),
            adapter_names=row_adapters,
        )
        states = {}
        for group, group_hidden in zip(groups, hidden.chunk(copies), strict=True):
            for role in group:
                states[role] = group_hidden
        return states

    def parameters(self, role: str) -> list[nn.Parameter]:
        """The trainable parameters of a role: those of its adapter or model, and its head's."""
        wanted = self.roles[role]
        # In the order in which they are registered: saved optimizer states depend on it.
        if wanted.model is not None:
            parameters = list(wanted.model.parameters())
        elif not isinstance(self.model, PeftModel):
            parameters = list(self._base_parameters().values())
        else:
            parameters = []
            for name, parameter in self._base_parameters().items():
                if f".{wanted.adapter}." in name:
                    parameters.append(parameter)
        if wanted.head is not None:
            parameters += wanted.head.parameters()
        return [parameter for parameter in parameters if parameter.requires_grad]

    def _base_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of base and adapters by name, without the heads and models that `attach` hung on the base."""
        attached = []
        for role in self.roles:
            attached.append(f"{role}_head.")
            attached.append(f"{role}_model.")
        parameters = {}
        for name, parameter in self.model.named_parameters():
            if not name.startswith(tuple(attached)):
                parameters[name] = parameter
        return parameters

    def save(self, role: str, folder: str | Path) -> None:
        """Writes a role as an ordinary PEFT (or model) folder, and its head as `<role>_head.safetensors` beside it."""
        saved = self.roles[role]
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if saved.model is not None:
            saved.model.save_pretrained(folder)
        elif saved.adapter is not None:
            save_adapter(self.model, saved.adapter, folder)
        if saved.head is not None:
            save_file(saved.head.state_dict(), folder / f"{role}_head.safetensors")

    @torch.no_grad()
    def load(self, role: str, folder: str | Path) -> None:
        """Reads what `save` wrote into the weights that the role has now, which optimizers may hold."""
        loaded = self.roles[role]
        folder = Path(folder)
        if loaded.model is not None:
            read_weights(loaded.model, folder)
        elif loaded.adapter is not None:
            load_adapter_weights(self.model, loaded.adapter, folder)
        if loaded.head is not None:
            loaded.head.load_state_dict(load_file(folder / f"{role}_head.safetensors"))


def read_weights(model: nn.Module, folder: str | Path) -> None:
    """Copies the weights of a saved model into `model`, in place."""
    saved_weights = type(model).from_pretrained(folder, dtype="auto").state_dict()
    own_weights = model.state_dict()
    with torch.no_grad():
        for name, value in saved_weights.items():
            own_weights[name].copy_(value)


def _head_from(weights: dict[str, Tensor]) -> ScalarHead | None:
    if "weight" not in weights:
        return None
    head = ScalarHead(weights["weight"].shape[1], bias="bias" in weights)
    head.load_state_dict(weights)
    return head
