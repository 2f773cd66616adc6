"""Virtual tokens of PEFT beside Transformers 5.24, which calls the cache of a model `cache`, no more `past_key_values`.

PEFT 0.21 knows the old name only. Without what is here, it would put its virtual tokens before every single token that
`generate` samples, or not at all, and it would refuse models for classification. Transformers 5.23 needs none of it.
`tests/test_compat.py` says when PEFT knows the new name, so that this module can go.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import Parameter, Signature, signature
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn

OLD, NEW = "past_key_values", "cache"


@contextmanager
def virtual_tokens_in_generate(model: nn.Module) -> Iterator[None]:
    """Lets `model.generate` see the virtual tokens of the active adapter inside the context.

    Args:
        model: a causal LM. Nothing changes if it has no virtual tokens, or an older name of the cache.
    """
    has_virtual_tokens = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    if not has_virtual_tokens or NEW not in signature(model.base_model.forward).parameters:
        yield
        return
    of_base, of_peft = model.base_model_prepare_inputs_for_generation, model.prepare_inputs_for_generation

    def inputs_for_peft(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return _renamed(of_base(*args, **kwargs), NEW, OLD)

    def inputs_for_model(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return _renamed(of_peft(*args, **kwargs), OLD, NEW)

    # `PeftModel.generate` gives the base the second one, which calls the first.
    model.base_model_prepare_inputs_for_generation = inputs_for_peft
    model.prepare_inputs_for_generation = inputs_for_model
    try:
        yield
    finally:
        del model.prepare_inputs_for_generation  # the method of the class
        model.base_model_prepare_inputs_for_generation = of_base
        model.base_model.prepare_inputs_for_generation = of_base  # as PEFT leaves it after `generate`


def accept_old_cache_name(model: nn.Module, config: PeftConfig | None) -> None:
    """Lets PEFT hand virtual tokens to a model for classification through the old name of the cache.

    PEFT looks for the name in the signature of `forward`. Transformers takes it there until 5.40, but its decorator
    (`deprecate_kwarg`) does not show it: the signature of the class gets it.

    Args:
        model: a model for classification, with or without an adapter; its class is changed.
        config: configuration of a new adapter; `None` without one.
    """
    if isinstance(model, PeftModel):
        config, model = config or model.active_peft_config, model.get_base_model()
    if config is None or not config.is_prompt_learning:
        return
    # PEFT calls the inner model if the outer one takes no cache, as in encoders.
    for module in (model, getattr(model, getattr(model, "base_model_prefix", ""), None)):
        if module is None:
            continue
        forward = type(module).forward
        shown = signature(forward)
        if NEW in shown.parameters and OLD not in shown.parameters:
            forward.__signature__ = _with_old_name(shown)


def _with_old_name(shown: Signature) -> Signature:
    *first, last = shown.parameters.values()
    old = Parameter(OLD, Parameter.KEYWORD_ONLY, default=None)
    ordered = [*first, old, last] if last.kind is Parameter.VAR_KEYWORD else [*first, last, old]
    return shown.replace(parameters=ordered)


def _renamed(inputs: dict[str, Any], name: str, other: str) -> dict[str, Any]:
    if name in inputs:
        inputs[other] = inputs.pop(name)
    return inputs
