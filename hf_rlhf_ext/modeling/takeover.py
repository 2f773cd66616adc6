"""Several trainers on one model: a trainer takes the model back before it trains."""

from weakref import ReferenceType, WeakKeyDictionary, ref

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import UserError
from .adapters import bare_model
from .ownership import adapter_parameters, is_attached, remove_earlier_roles


class Hold:
    """What a trainer needs on its model: its heads and models there, the flags of its weights, and its adapter.

    A later trainer on the same model removes the heads and models of this one, and freezes its adapters. PEFT's
    `set_adapter` and `disable_adapter` freeze every adapter but the active one, and so the critic.

    Args:
        model: the policy of the trainer, with everything that the trainer attached to it.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._other_adapters = []
        self._adapter = _active_adapter(model)
        self.remember()
        _holders[bare_model(model)] = ref(self)

    def remember(self) -> None:
        """Stores how the model is now, unless PEFT has switched or frozen adapters since the trainer was made."""
        if self._was_switched():
            return
        self._other_adapters = []  # trained ones besides the active one, such as the critic
        names = self.model.peft_config if self._adapter is not None else ()
        for name in names:
            trained = [p for p in adapter_parameters(self.model, name).values() if p.requires_grad]
            if trained and name != self._adapter:
                self._other_adapters.append(trained)
        self._trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._attached = []
        for parent in dict.fromkeys((self.model, bare_model(self.model))):
            for name, child in parent.named_children():
                if is_attached(child):
                    self._attached.append((parent, name, child))

    def take(self) -> None:
        """Makes the model ready for its trainer again, with the weights as they are now.

        Nothing changes if no other trainer was made on the model or trained it, and if no adapter was switched.

        Raises:
            UserError: if another trainer changed the model in a way that cannot be undone.
        """
        holder = _holder_of(self.model)
        if holder is self and not self._was_switched():
            return
        if holder is not None and holder is not self:
            holder.remember()
        self._check_model()
        remove_earlier_roles(self.model)
        for parent, name, child in self._attached:
            parent.add_module(name, child)
        if self._adapter is not None:
            self.model.set_adapter(self._adapter)
        of_trainer = {id(parameter) for parameter in self._trained}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in of_trainer)
        _holders[bare_model(self.model)] = ref(self)

    def _was_switched(self) -> bool:
        """Whether another adapter is active than at first, or a trained adapter besides it is frozen as a whole."""
        if _active_adapter(self.model) != self._adapter:
            return True
        return any(not any(p.requires_grad for p in trained) for trained in self._other_adapters)

    def _check_model(self) -> None:
        """Raises `UserError` if a trained weight is gone, or if adapters were put between the layers of a base."""
        is_adapted = any(isinstance(module, BaseTunerLayer) for module in self.model.modules())
        if self._adapter is None and is_adapted:
            raise UserError(
                "model: another trainer has attached adapters to the layers of this model since this trainer was made: "
                "load the model again for each trainer."
            )
        present = {id(parameter) for parameter in self.model.parameters()}
        for _, _, child in self._attached:
            present.update(id(parameter) for parameter in child.parameters())
        n_lost = sum(id(parameter) not in present for parameter in self._trained)
        if n_lost:
            raise UserError(
                f"model: {n_lost} weights that this trainer trains were removed from the model, as by delete_adapter: "
                "make a new trainer."
            )


_holders: WeakKeyDictionary[nn.Module, ReferenceType[Hold]] = WeakKeyDictionary()
"""By base model: the trainer that was made on it last, or trained it last."""


def _active_adapter(model: nn.Module) -> str | None:
    return model.active_adapter if isinstance(model, PeftModel) else None


def _holder_of(model: nn.Module) -> Hold | None:
    held = _holders.get(bare_model(model))
    return None if held is None else held()


def remember_holder(model: nn.Module) -> None:
    """Stores what the present trainer of a model needs, before another one changes the model.

    Args:
        model: the model of the new trainer.
    """
    holder = _holder_of(model)
    if holder is not None:
        holder.remember()
