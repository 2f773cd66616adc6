"""The bound of `make bench-ppo`: bare passes over the tokens of an update, with nothing else around them.

K completions share their prompt: linear layers see the prompt once, attention is one causal call for a prompt and one
for its completions, and the output head sees the positions of completions only. Everything is written here again, from
the layers of a Llama, so that nothing of what is measured is part of its own bound.

Letters: G prompts of a pass, K completions of each, P tokens of a prompt, T of a completion but for its last one, L
tokens of the pass, H units, N completion tokens that are predicted.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import DynamicCache, GenerationConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

STOP_TOKEN = 3
"""<repo_name>, which the model never generates."""


@dataclass(frozen=True)
class Group:
    """A prompt and its completions, one after the other.

    Attributes:
        start: position of its first token in the row.
        prompt: P.
        completions: K.
        length: T, the same for all of its completions.
        mask: (T, P + T) bool, what each token of a completion attends to.
    """

    start: int
    prompt: int
    completions: int
    length: int
    mask: Tensor

    @property
    def end(self) -> int:
        return self.start + self.prompt + self.completions * self.length


@dataclass(frozen=True)
class Packed:
    """G prompts with their completions in one row.

    Attributes:
        ids: (1, L) int64.
        positions: (1, L) int64; each completion continues the positions of its prompt.
        groups: where each prompt and its completions are.
        before: (N,) int64, for each completion token the place in the row that predicts it.
        targets: (N,) int64, the completion tokens.
    """

    ids: Tensor
    positions: Tensor
    groups: list[Group]
    before: Tensor
    targets: Tensor


def pack(prompts: list[list[int]], completions: list[list[int]]) -> Packed:
    """Puts prompts and completions into one row; completions j·K … j·K + K − 1 belong to prompt j.

    The last token of a completion is left out, as nothing is predicted from it.
    """
    k = len(completions) // len(prompts)
    ids, positions, before, targets, groups = [], [], [], [], []
    for number, prompt in enumerate(prompts):
        own = completions[number * k : (number + 1) * k]
        n_prompt, length = len(prompt), len(own[0]) - 1
        mask = torch.ones(length, n_prompt + length, dtype=torch.bool).tril(n_prompt)
        groups.append(Group(len(ids), n_prompt, k, length, mask))
        ids += prompt
        positions += range(n_prompt)
        last = len(ids) - 1
        for completion in own:
            if len(completion) != length + 1:
                raise ValueError("the completions of a prompt must have equal lengths")
            before += [last, *range(len(ids), len(ids) + length)]
            targets += completion
            ids += completion[:-1]
            positions += range(n_prompt, n_prompt + length)
    return Packed(torch.tensor([ids]), torch.tensor([positions]), groups, torch.tensor(before), torch.tensor(targets))


def packed_states(backbone: nn.Module, packed: Packed) -> Tensor:
    """(N, H) states of a Llama's backbone that predict the completion tokens."""
    hidden = backbone.embed_tokens(packed.ids)
    rotation = backbone.rotary_emb(hidden, packed.positions)
    for layer in backbone.layers:
        hidden = hidden + attention(layer.self_attn, layer.input_layernorm(hidden), rotation, packed.groups)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return backbone.norm(hidden)[0, packed.before]


def attention(layer: nn.Module, hidden: Tensor, rotation: tuple[Tensor, Tensor], groups: list[Group]) -> Tensor:
    """The attention layer of a Llama: causal in a prompt, and from completions to their prompt and to themselves."""

    def heads(projection: nn.Module) -> Tensor:  # (1, heads, L, size)
        return projection(hidden).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)

    queries, keys = apply_rotary_pos_emb(heads(layer.q_proj), heads(layer.k_proj), *rotation)
    values = heads(layer.v_proj)
    repeated = queries.shape[1] // keys.shape[1]
    keys, values = (tensor.repeat_interleave(repeated, 1) for tensor in (keys, values))
    outputs = []
    for group in groups:
        of_prompt = [tensor[:, :, group.start : group.start + group.prompt] for tensor in (queries, keys, values)]
        outputs.append(scaled_dot_product_attention(*of_prompt, is_causal=True))
        outputs.append(_completions(group, of_prompt, (queries, keys, values)))
    return layer.o_proj(torch.cat(outputs, 2).transpose(1, 2).flatten(2))


def _completions(group: Group, of_prompt: list[Tensor], everything: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """(1, heads, K·T, size) outputs for the completions of a prompt."""
    k, length = group.completions, group.length
    # (1, heads, K·T, size) → (K, heads, T, size)
    own = [
        tensor[0, :, group.start + group.prompt : group.end].unflatten(1, (k, length)).transpose(0, 1)
        for tensor in everything
    ]
    query = own[0]
    key, value = (torch.cat([of_prompt[i].expand(k, -1, -1, -1), own[i]], 2) for i in (1, 2))
    out = scaled_dot_product_attention(query, key, value, attn_mask=group.mask)
    return out.transpose(0, 1).flatten(1, 2)[None]


def packed_loss(model: nn.Module, packed: Packed, *, with_head: bool) -> Tensor:
    """Cross-entropy of the completion tokens, or the mean of the states without the output head."""
    states = packed_states(model.model, packed)
    if not with_head:
        return states.float().mean()
    return cross_entropy(model.lm_head(states).float(), packed.targets)


# ---- Generation ----


def left_padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask of prompts, both (B, P) int64."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    return ids, torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])


def generate_plainly(model: nn.Module, prompts: list[list[int]], k: int, new_tokens: int) -> None:
    """`model.generate` for K copies of each prompt, all in one batch."""
    ids, mask = left_padded([prompt for prompt in prompts for _ in range(k)])
    # Setting `min_new_tokens` would mask the stop token at every step.
    config = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=True, top_k=0, eos_token_id=STOP_TOKEN, pad_token_id=0
    )
    model.generate(input_ids=ids, attention_mask=mask, generation_config=config)


def generate_from_shared_prompts(model: nn.Module, prompts: list[list[int]], k: int, new_tokens: int) -> None:
    """Each prompt goes through the model once; then its cache is repeated for its K completions."""
    ids, mask = left_padded(prompts)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache()
    options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, **options).logits
    cache.batch_repeat_interleave(k)
    mask, position = mask.repeat_interleave(k, 0), positions[:, -1:].repeat_interleave(k, 0)
    logits = logits.repeat_interleave(k, 0)
    for step in range(new_tokens):
        tokens = torch.multinomial(logits[:, -1].float().softmax(-1), 1)
        if step == new_tokens - 1:
            return
        mask = torch.cat([mask, torch.ones_like(tokens)], 1)
        position = position + 1
        logits = model(input_ids=tokens, attention_mask=mask, position_ids=position, **options).logits


WAYS_TO_GENERATE: tuple[Callable[[nn.Module, list[list[int]], int, int], None], ...] = (
    generate_plainly,
    generate_from_shared_prompts,
)


class BareLoop:
    """Seconds of the bare passes of an update. The first call finds out which way to generate is faster.

    Args:
        model: the policy of the trainer, a Llama with an adapter.
        critic: kind of critic, which says how many passes there are.
        inner_epochs: passes over a rollout.
        micro_batch: completions per pass.
        dtype: dtype of autocast; `None` for none.
    """

    def __init__(self, model, critic: str, *, inner_epochs: int, micro_batch: int, dtype: torch.dtype | None):
        self.model = model
        self.critic = critic
        self.inner_epochs = inner_epochs
        self.micro_batch = micro_batch
        self.dtype = dtype
        self.ways = list(WAYS_TO_GENERATE)

    def __call__(self, prompts: list[list[int]], completions: list[list[int]]) -> dict[str, float]:
        """Seconds to generate, to score and to update, without rewards, advantages, PPO's loss and the optimizer."""
        from hf_rlhf_ext.modeling.adapters import active_adapter, bare_model, merged_adapter
        from hf_rlhf_ext.modeling.probing import evaluating

        model, has_own_trunk = self.model, self.critic == "adapter"
        k = len(completions) // len(prompts)
        per_pass = max(1, self.micro_batch // k)
        batches = [
            pack(prompts[start : start + per_pass], completions[start * k : (start + per_pass) * k])
            for start in range(0, len(prompts), per_pass)
        ]
        seconds = {}
        with torch.no_grad(), evaluating(model):
            with merged_adapter(model, enabled=True):
                seconds["generate"] = self._generate(bare_model(model), prompts, k, len(completions[0]))
            seconds["score"] = self._passes(batches)
            with active_adapter(model, None):
                seconds["score"] += self._passes(batches)
            if has_own_trunk:  # another adapter takes as long as that of the policy
                seconds["score"] += self._passes(batches, with_head=False)
        seconds["update"] = 0.0
        for _ in range(self.inner_epochs):
            seconds["update"] += self._passes(batches, backward=True)
            if has_own_trunk:
                seconds["update"] += self._passes(batches, with_head=False, backward=True)
        model.zero_grad()
        return seconds

    def _passes(self, batches: list[Packed], *, with_head: bool = True, backward: bool = False) -> float:
        from hf_rlhf_ext.modeling.adapters import bare_model, mixed_precision

        start = time.perf_counter()
        for packed in batches:
            with mixed_precision(self.model, self.dtype):
                loss = packed_loss(bare_model(self.model), packed, with_head=with_head)
            if backward:
                loss.backward()
        return time.perf_counter() - start

    def _generate(self, model: nn.Module, prompts: list[list[int]], k: int, new_tokens: int) -> float:
        """Seconds of the fastest way, which alone is left after the first call."""
        from hf_rlhf_ext.modeling.adapters import mixed_precision

        seconds = {}
        for way in self.ways:
            start = time.perf_counter()
            with mixed_precision(self.model, self.dtype):
                way(model, prompts, k, new_tokens)
            seconds[way] = time.perf_counter() - start
        self.ways = [min(seconds, key=seconds.get)]
        return min(seconds.values())
