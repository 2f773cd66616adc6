"""`AdapterStack`: policy, reference, value and reward as adapters that share one base model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import UserError, last_line
from .adapter_files import refuse_lost_weights
from .adapter_kinds import base_sharing_problem, can_mix
from .adapter_start import attach_copy
from .adapters import active_adapter, load_adapter_weights, save_adapter
from .checkpoint_files import load_complete
from .embeddings import embedding_mismatch, read_embeddings
from .heads import ScalarHead
from .logprobs import completion_hidden_states
from .ownership import adapter_parameters, free_adapter_name, is_attached, mark_as_attached
from .packing import Layout

ADAPTER_NAMES = {"reference": "ref"}
"""Names of adapters that differ from the name of their role."""

_BARE_BASE = "__base__"  # PEFT's name for "no adapter" in a batch with several adapters
_HEAD_MODULES = {"score", "classifier"}  # names of the head in the folder of a reward model


@dataclass
class Role:
    """What computes a role.

    Attributes:
        adapter: name of its adapter on the shared base; `None` means the base without an adapter.
        model: a separate model; `None` if the role uses the shared base.
        head: its scalar head; `None` without one.
        layout: how several completions of a prompt pass through the model. Roles on the shared base have the same one.
    """

    adapter: str | None = None
    model: nn.Module | None = None
    head: ScalarHead | None = None
    layout: Layout = Layout.PLAIN


class AdapterStack:
    """Several roles on one base model, which is loaded once.

    Args:
        model: a `PeftModel`, whose active adapter becomes the role `policy`; or a model without adapters, which becomes
            the policy and does not share its weights with other roles.

    Attributes:
        model: the same model.
        roles: the `Role` of each name.
        start: name of the adapter that the initialization of the policy (PiSSA and others) took out of the base; `None`
            if the base is as it was loaded. Saved adapters fit the base as it was loaded.

    Example:
        ```python
        stack = AdapterStack(load_policy("runs/sft", is_trainable=True)[0])
        # A frozen copy of the SFT adapter. Without a source, the base would be the reference.
        stack.attach("reference", "policy")
        # The adapter and the score head of a reward model on the same base.
        stack.attach("reward", "runs/reward")
        with stack.activate("reward") as model:
            ...
        ```
    """

    def __init__(self, model: nn.Module):
        self.model = model
        adapter = None
        if isinstance(model, PeftModel):
            adapter = model.active_adapter
            model.set_adapter(adapter)  # an adapter that was loaded for inference is frozen
        self.roles = {"policy": Role(adapter)}
        self.start: str | None = None

    def attach(
        self,
        role: str,
        source: str | Path | PeftConfig | nn.Module | None = None,
        *,
        head: ScalarHead | None = None,
        trainable: bool = False,
    ) -> Role:
        """Adds a role. The active adapter stays active.

        Args:
            role: name of the role.
            source: another role, whose adapter is copied; the folder of an adapter, with its score head if it has one;
                a PEFT configuration for a new adapter; a separate model; or `None` for the base without an adapter.
            head: fp32 scalar head of the role. It becomes the module `<role>_head` of the base. A head in the folder of
                an adapter takes precedence.
            trainable: whether the weights of the role get gradients.

        Returns:
            The role.

        Raises:
            UserError: if an adapter does not fit the base, or if PEFT does not support it beside the others.
        """
        if source is None:
            attached = Role()  # the base without an adapter
        elif isinstance(source, nn.Module):
            attached = self._attach_own_model(role, source, trainable)
        else:
            attached = self._attach_adapter(role, source, trainable)

        if attached.head is None:
            attached.head = head
        if attached.head is not None:
            device = next(self.model.parameters()).device
            attached.head.to(device).requires_grad_(trainable)
            self.model.add_module(f"{role}_head", mark_as_attached(attached.head))

        self.roles[role] = attached
        return attached

    def _attach_own_model(self, role: str, model: nn.Module, trainable: bool) -> Role:
        model.requires_grad_(trainable)
        if trainable:
            # As a module of the base, it is included in optimizers and device moves.
            self.model.add_module(f"{role}_model", mark_as_attached(model))
            # `Trainer` does not move a model whose base is in 4 bits, so the device is set here.
            model.to(next(self.model.parameters()).device)
        return Role(model=model)

    def _attach_adapter(self, role: str, source: str | Path | PeftConfig, trainable: bool) -> Role:
        if not isinstance(self.model, PeftModel):
            raise UserError(
                f"role {role!r}: a model without adapters does not share its base: pass a PeftModel, or a separate "
                "model."
            )
        # The name may be taken by an adapter of the user, or by one of an earlier trainer.
        adapter = free_adapter_name(self.model, ADAPTER_NAMES.get(role, role))
        # PEFT changes the flags of other adapters when it adds one. They are restored below.
        flags_before = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}

        head = None
        if isinstance(source, PeftConfig):
            self.model.add_adapter(adapter, source)
        elif source in self.roles:
            self._copy_adapter_of(source, adapter)
        else:
            head = self._load_adapter(adapter, source)

        own = adapter_parameters(self.model, adapter)
        for name, parameter in self.model.named_parameters():
            if name in own:
                parameter.requires_grad_(trainable)
            else:
                parameter.requires_grad_(flags_before.get(name, False))
        return Role(adapter=adapter, head=head)

    def _copy_adapter_of(self, role: str, adapter: str) -> None:
        """Adds `adapter` as a copy of the adapter of another role."""
        copied = self.roles[role].adapter
        if copied is None:
            raise UserError(f"role {role!r} has no adapter to copy: choose another role, or leave source out.")
        attach_copy(self.model, copied, adapter)

    def _load_adapter(self, adapter: str, folder: str | Path) -> ScalarHead | None:
        """Adds `adapter` from a folder; returns the score head in the folder, or `None`."""
        config = PeftConfig.from_pretrained(str(folder))
        problem = base_sharing_problem(config, self.model.peft_config.values())
        if problem is not None:
            raise UserError(f"{folder}: {problem}, which the other roles share: load it as a model of its own.")
        # PEFT would look for these modules in the base, which does not have them: the head is loaded separately.
        modules_to_save = set(config.modules_to_save or ()) - _HEAD_MODULES
        config.modules_to_save = sorted(modules_to_save) or None

        mismatch = embedding_mismatch(folder, self.model)
        if mismatch is not None:
            raise UserError(
                f"{folder}: the adapter does not fit the embeddings of the shared base, as {mismatch}: load it as a "
                "model of its own, such as RewardScorer.from_pretrained."
            )

        # The weights of the score head are among those of the adapter, under a key that the base does not have.
        adapter_weights = load_peft_weights(str(folder), device="cpu")
        for key in read_embeddings(folder, self.model).keys:
            del adapter_weights[key]  # the base has the same ones
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
            raise UserError(f"{folder}: the adapter does not fit the base: {last_line(error)}.") from error
        if result.unexpected_keys:
            first = result.unexpected_keys[0]
            raise UserError(f"{folder}: the adapter has weights that the base lacks, first {first!r}.")
        refuse_lost_weights(folder, self.model, adapter, adapter_weights)
        return _head_from(head_weights)

    @contextmanager
    def activate(self, role: str) -> Iterator[nn.Module]:
        """Inside the context, the model computes with the adapter of the role.

        Afterward the previous adapter is active again. All `requires_grad` flags stay the same. The backward pass must
        be inside the context too, as gradient checkpointing computes the adapter again.

        Args:
            role: name of the role.

        Yields:
            The model that computes the role.
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
        """Whether `hidden_states` can compute several roles in one forward pass, which PEFT supports for LoRA only."""
        return isinstance(self.model, PeftModel) and can_mix(self.model)

    @torch.no_grad()
    def hidden_states(
        self,
        roles: Sequence[str],
        input_ids: Tensor,
        prompt_lengths: Tensor,
        mask: Tensor,
        *,
        joint: bool = True,
        per_prompt: int = 1,
    ) -> dict[str, Tensor]:
        """Computes the hidden states from which the emitted tokens are predicted, for several roles.

        The model must be in eval mode. Roles that compute the same, such as a value head on the policy, share the
        hidden states.

        Args:
            roles: names of the roles.
            input_ids: (B, L) int64, prompt and completion, padded on the right.
            prompt_lengths: (B,) int64, number of tokens of each prompt.
            mask: (B, T) bool, True for emitted tokens.
            joint: whether to use one forward pass for all roles on the shared base, if `can_score_jointly`.
            per_prompt: number of consecutive rows that have the same prompt, which passes through the model once where
                the layout of the role shares it.

        Returns:
            (N, H) hidden states of each role, see `completion_hidden_states`.
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
            states = self._joint_hidden_states(on_base, input_ids, prompt_lengths, mask, per_prompt)
        for group in groups:
            if group[0] in states:
                continue
            with self.activate(group[0]) as model:
                layout = self.roles[group[0]].layout
                hidden = completion_hidden_states(
                    model, model, input_ids, prompt_lengths, mask, per_prompt=per_prompt, layout=layout
                )
            for role in group:
                states[role] = hidden
        return states

    def _joint_hidden_states(
        self,
        groups: list[list[str]],
        input_ids: Tensor,
        prompt_lengths: Tensor,
        mask: Tensor,
        per_prompt: int,
    ) -> dict[str, Tensor]:
        """One forward pass over a batch that contains the rows once for each group, with the adapter of the group."""
        # In such a batch, PEFT needs the name of the adapter of every row.
        row_adapters = []
        for group in groups:
            adapter = self.roles[group[0]].adapter or _BARE_BASE
            row_adapters += [adapter] * len(input_ids)
        copies = len(groups)
        with _own_hooks_removed(self.model):
            hidden = completion_hidden_states(
                self.model,
                self.model,
                input_ids.repeat(copies, 1),
                prompt_lengths.repeat(copies),
                mask.repeat(copies, 1),
                per_prompt=per_prompt,
                layout=self.roles[groups[0][0]].layout,
                adapter_names=row_adapters,
            )
        states = {}
        for group, group_hidden in zip(groups, hidden.chunk(copies), strict=True):
            for role in group:
                states[role] = group_hidden
        return states

    @property
    def heads(self) -> list[ScalarHead]:
        """The scalar heads of all roles."""
        return [role.head for role in self.roles.values() if role.head is not None]

    def parameters(self, role: str) -> list[nn.Parameter]:
        """The trainable parameters of a role: those of its adapter or model, and of its head."""
        wanted = self.roles[role]
        # In the order in which they are registered, as saved optimizer states depend on it.
        if wanted.model is not None:
            parameters = list(wanted.model.parameters())
        elif not isinstance(self.model, PeftModel):
            parameters = list(self._base_parameters().values())
        else:
            parameters = []
            if wanted.adapter is not None:
                parameters += adapter_parameters(self.model, wanted.adapter).values()
        if wanted.head is not None:
            parameters += wanted.head.parameters()
        return [parameter for parameter in parameters if parameter.requires_grad]

    def _base_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of base and adapters by name, without the heads and models that `attach` added to the base."""
        attached = [f"{name}." for name, child in self.model.named_children() if is_attached(child)]
        parameters = {}
        for name, parameter in self.model.named_parameters():
            if not name.startswith(tuple(attached)):
                parameters[name] = parameter
        return parameters

    def save(self, role: str, folder: str | Path, *, writes: bool = True) -> None:
        """Writes a role as an ordinary PEFT or model folder, and its head as `<role>_head.safetensors`.

        Args:
            role: name of the role.
            folder: folder to write; it is created if missing.
            writes: whether this process writes the files. If adapters are in shards, every process must call this.
        """
        saved = self.roles[role]
        folder = Path(folder)
        if saved.adapter is not None:
            save_adapter(self.model, saved.adapter, folder, start=self.start, writes=writes)
        if not writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if saved.model is not None:
            saved.model.save_pretrained(folder)
        if saved.head is not None:
            save_file(saved.head.state_dict(), folder / f"{role}_head.safetensors")

    @torch.no_grad()
    def load(self, role: str, folder: str | Path) -> None:
        """Reads a role that `save` wrote, into its existing weights.

        Args:
            role: name of the role.
            folder: folder that `save` wrote.

        Raises:
            UserError: if names or shapes of the weights of an adapter do not match.
        """
        loaded = self.roles[role]
        folder = Path(folder)
        if loaded.model is not None:
            read_weights(loaded.model, folder)
        elif loaded.adapter is not None:
            load_adapter_weights(self.model, loaded.adapter, folder, start=self.start)
        if loaded.head is not None:
            loaded.head.load_state_dict(load_file(folder / f"{role}_head.safetensors"))


def read_weights(model: nn.Module, folder: str | Path) -> None:
    """Copies the weights of a saved model into `model`, in place.

    Args:
        model: a whole model. Heads and models of roles that are attached to it keep their weights.
        folder: folder that `save_pretrained` wrote, in one file or in several.

    Raises:
        UserError: if weights are missing in the folder, or if it is of a model with other weights or shapes.
    """
    attached = tuple(f"{name}." for name, child in model.named_children() if is_attached(child))
    own_weights = {name: value for name, value in model.state_dict().items() if not name.startswith(attached)}
    dtypes = {value.dtype for value in own_weights.values() if value.is_floating_point()}
    dtype = torch.float32  # a model in several dtypes, such as one with an fp32 head
    if len(dtypes) == 1:
        (dtype,) = dtypes
    saved_weights = load_complete(type(model), str(folder), name=str(folder), dtype=dtype).state_dict()
    for name in sorted(own_weights.keys() | saved_weights.keys()):
        own, saved = own_weights.get(name), saved_weights.get(name)
        if own is None or saved is None or own.shape != saved.shape:
            raise UserError(
                f"{folder} is of another model: the weight {name} has another shape, or only one of the two has it: "
                "give a checkpoint of this model, or start without one."
            )
    with torch.no_grad():
        for name, value in saved_weights.items():
            own_weights[name].copy_(value)


def _head_from(weights: dict[str, Tensor]) -> ScalarHead | None:
    if "weight" not in weights:
        return None
    head = ScalarHead(weights["weight"].shape[1], bias="bias" in weights)
    head.load_state_dict(weights)
    return head


@contextmanager
def _own_hooks_removed(model: nn.Module) -> Iterator[None]:
    """Around a pass with `adapter_names`: after an error, the hooks that PEFT has added for it are gone.

    PEFT 0.21 removes them after a pass without an error only. The next pass would have the names of both.
    """
    before = {module: set(module._forward_pre_hooks) for module in model.modules()}
    try:
        yield
    except BaseException:  # also Ctrl-C
        for module, known in before.items():
            for added in set(module._forward_pre_hooks) - known:
                del module._forward_pre_hooks[added]
                module._forward_pre_hooks_with_kwargs.pop(added, None)
        raise
