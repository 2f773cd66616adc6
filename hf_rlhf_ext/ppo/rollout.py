"""Rollouts: which prompts, how completions are generated and where they stop, and how a rollout is stored."""

from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from ..modeling.logprobs import contiguous_head_inputs
from .advantages import completion_mask


@dataclass
class Rollout:
    """B completions with everything that PPO's update needs; T and L are the longest completion and sequence.

    `input_ids` (B, L) int64: prompt and completion, padded right. `prompt_lengths`, `completion_lengths` (B,) int64:
    the stop token counts. `old_logprobs`, `ref_logprobs`, `values`, `advantages`, `returns` (B, T) fp32, zero in the
    padding. `order` (epochs, B) int64: the permutation of each inner epoch. `sampling_weights` (B, T) fp32: of the
    tokens' losses, None for 1.
    """

    input_ids: Tensor
    prompt_lengths: Tensor
    completion_lengths: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    order: Tensor
    sampling_weights: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """(B, T) bool, True on emitted tokens."""
        return completion_mask(self.completion_lengths, self.old_logprobs.shape[1])

    def select(self, rows: Tensor) -> dict[str, Tensor]:
        """Those rows as a micro-batch, trimmed to its own longest sequence and completion."""
        width = int(self.completion_lengths[rows].max())
        length = int((self.prompt_lengths + self.completion_lengths)[rows].max())
        names = ("old_logprobs", "ref_logprobs", "values", "advantages", "returns", "sampling_weights")
        per_token = {name: getattr(self, name) for name in names}
        batch = {name: tensor[rows, :width] for name, tensor in per_token.items() if tensor is not None}
        return batch | {
            "input_ids": self.input_ids[rows, :length],
            "prompt_lengths": self.prompt_lengths[rows],
            "mask": self.mask[rows, :width],
        }

    def save(self, path: str | Path) -> None:
        """Writes the rollout as safetensors, so that a run can resume in its middle."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        save_file({name: x.cpu().contiguous() for name, x in tensors.items() if x is not None}, path)

    @classmethod
    def load(cls, path: str | Path, device: torch.device) -> "Rollout":
        return cls(**{name: tensor.to(device) for name, tensor in load_file(path).items()})


def prompt_indices(rollout: int, size: int, n_prompts: int, seed: int) -> list[int]:
    """Rows of the prompts of one rollout: a function of its number and the seed alone, so that resuming is exact.

    Every pass over the `n_prompts` rows has its own permutation; a data set smaller than a rollout wraps around.
    """
    rows = []
    permutations: dict[int, list[int]] = {}
    for position in range(rollout * size, (rollout + 1) * size):
        epoch, offset = divmod(position, n_prompts)
        if epoch not in permutations:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            permutations[epoch] = torch.randperm(n_prompts, generator=generator).tolist()
        rows.append(permutations[epoch][offset])
    return rows


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, override: list[int] | None) -> list[int]:
    """Ids that end a completion: `override`, or the tokenizer's eos and every eos of the model's generation config.

    Both matter: some models stop on a token that the tokenizer does not call eos.
    """
    if override is not None:
        return sorted(set(override))
    configured = getattr(model.generation_config, "eos_token_id", None)
    configured = [configured] if isinstance(configured, int) else list(configured or [])
    return sorted({tokenizer.eos_token_id, *configured} - {None})


def sampling_config(
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    stop_ids: list[int],
    pad_token_id: int,
    **extra,
) -> GenerationConfig:
    """A complete sampling configuration: no field is left for the model's own generation config to fill in."""
    neutral = {"repetition_penalty": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
    neutral |= {"num_beams": 1, "num_return_sequences": 1, "no_repeat_ngram_size": 0, "length_penalty": 1.0}
    neutral |= {"do_sample": True, "use_cache": True, "bos_token_id": None}
    for name in ("do_sample", "num_beams", "num_return_sequences"):
        if extra.get(name, neutral[name]) != neutral[name]:
            raise UserError(f"generation_kwargs: {name}={extra[name]} cannot be: PPO samples one completion a prompt.")
    given = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    return GenerationConfig(**(neutral | given | extra), eos_token_id=stop_ids, pad_token_id=pad_token_id)


@contextmanager
def generation_config_of(model, config: GenerationConfig):
    """Puts `config` in the place of the model's own inside: `generate` fills unset fields from there."""
    owners = [model.get_base_model(), model] if hasattr(model, "get_base_model") else [model]
    before = [owner.__dict__.get("generation_config") for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = config
        yield
    finally:
        for owner, old in zip(owners, before, strict=True):
            if old is None:
                del owner.generation_config
            else:
                owner.generation_config = old


class SampledLogprobs(LogitsProcessor):
    """Notes the log-probability under which each token is drawn. It must come last, after temperature and top-k/top-p.

    Of the scores (B, V), only those of the last step are kept: the token that they led to shows at the next call.
    """

    def __init__(self):
        self._scores: Tensor | None = None
        self._columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._scores is not None:
            self._take(input_ids[:, -1:])
        self._scores = scores
        return scores

    def _take(self, tokens: Tensor) -> None:
        self._columns.append(self._scores.gather(1, tokens) - self._scores.logsumexp(1, keepdim=True))

    def logprobs(self, completions: Tensor) -> Tensor:
        """(B, T) fp32, nats, of the tokens that `generate` returned; what stands after a stop means nothing."""
        self._take(completions[:, -1:])
        return torch.cat(self._columns[: completions.shape[1]], dim=1)  # `generate` may take its last step back


@torch.no_grad()
def generate_completions(
    model, prompt_ids: list[list[int]], config: GenerationConfig, device: torch.device
) -> tuple[list[list[int]], list[list[float]]]:
    """Samples one completion a prompt; each ends with its first stop token, or at `max_new_tokens`.

    Prompts are padded left. Stops are found by position, never by looking for the pad id, so pad == eos is safe.
    Returns the completions, and for each of their tokens the log-probability (nats) under which it was really drawn:
    after temperature, top-k and top-p, in the arithmetic of generation.
    """
    width = max(len(ids) for ids in prompt_ids)
    input_ids = torch.full((len(prompt_ids), width), config.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompt_ids):
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        attention_mask[row, width - len(ids) :] = 1
    recorder = SampledLogprobs()

    def sample(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        # Processors given to `generate` run before top-k and top-p: here, where its list is complete, ours is the last.
        logits_processor.append(recorder)
        return model._sample(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)

    with generation_config_of(model, config), contiguous_head_inputs(model):
        output = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            generation_config=config,
            custom_generate=sample,
        )
    stops = set(config.eos_token_id)
    completions = [cut_at_stop(row, stops) for row in output[:, width:].tolist()]
    logprobs = recorder.logprobs(output[:, width:]).tolist()
    return completions, [row[: len(ids)] for row, ids in zip(logprobs, completions, strict=True)]


def cut_at_stop(ids: list[int], stops: set[int]) -> list[int]:
    """`ids` up to and with the first stop token; all of them where there is none."""
    for position, token in enumerate(ids):
        if token in stops:
            return ids[: position + 1]
    return ids


def pack_sequences(
    prompt_ids: list[list[int]], completion_ids: list[list[int]], pad_token_id: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Prompt and completion side by side, padded right: `input_ids` (B, L), prompt and completion lengths (B,)."""
    sequences = [torch.tensor(p + c) for p, c in zip(prompt_ids, completion_ids, strict=True)]
    input_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad_token_id)
    prompt_lengths = torch.tensor([len(ids) for ids in prompt_ids])
    completion_lengths = torch.tensor([len(ids) for ids in completion_ids])
    return input_ids.to(device), prompt_lengths.to(device), completion_lengths.to(device)
