"""A model that runs out of memory in passes that are too large, as a device does: in the forward or backward pass."""

import torch
from torch import nn


class SmallMemory:
    """Makes passes of a decoder fail that have more tokens, padding included, than `tokens`.

    Args:
        model: a Llama, also inside PEFT.
        tokens: largest number of tokens of a pass without a cache; `None` means that all fit.
        sampled: largest number of sequences of a pass with a cache; `None` means that all fit.
        backward: whether the forward pass fits, and the backward pass fails below the last layer, whose gradients are
            there then.
        after: number of passes that fit, whatever their size.
        then: what `tokens` becomes at the first failure; `None` means that it stays.
    """

    def __init__(self, model: nn.Module, tokens=None, *, sampled=None, backward=False, after=0, then=None):
        self.tokens = tokens
        self.then = then
        self.sampled = sampled
        self.backward = backward
        self.after = after
        self.passes = 0
        self.failures = 0
        layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
        layers[0].register_forward_pre_hook(self._enter, with_kwargs=True)
        layers[-1].register_forward_pre_hook(self._watch)

    def _enter(self, layer, inputs, options):
        self.passes += 1
        rows, width = inputs[0].shape[:2]
        if options.get("past_key_values") is not None:
            self.fail_if(self.sampled is not None and self.passes > self.after and rows > self.sampled)
        elif not self.backward:
            self.fail_if(self._is_too_large(inputs[0]))

    def _watch(self, layer, inputs):
        hidden = inputs[0]
        if self.backward and hidden.requires_grad and self._is_too_large(hidden):
            hidden.register_hook(lambda gradient: self.fail_if(True))

    def _is_too_large(self, hidden):
        return self.tokens is not None and self.passes > self.after and hidden.shape[:2].numel() > self.tokens

    def fail_if(self, is_too_large):
        if is_too_large:
            self.failures += 1
            if self.then is not None:
                self.tokens, self.then = self.then, None
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")


def said(caplog):
    """The lines that say a new size."""
    return [record.getMessage() for record in caplog.records if "is now" in record.getMessage()]
