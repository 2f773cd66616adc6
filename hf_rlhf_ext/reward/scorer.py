"""Scores of a trained reward model: the same numbers in training, after a reload, and inside someone else's trainer."""

import json
import logging
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel, TaskType
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.collators import LAYOUTS, DataCollatorForComparisons, pad_right
from ..data.text import (
    Messages,
    check_tokenizer,
    completion_text,
    encode_completion,
    encode_prompt,
    is_messages,
    render_prompt,
)
from ..errors import UserError
from ..modeling.adapters import active_adapter, bare_model, evaluating, mixed_precision
from ..modeling.heads import head_name, install_fp32_score, is_encoder, position_limit
from ..modeling.loading import attach_adapter, base_and_revision, found_or_refused, load_base_model, load_tokenizer
from ..modeling.logprobs import captured_hidden_states, contiguous_head_inputs
from ..modeling.prefix import model_inputs, why_not

logger = logging.getLogger(__name__)

NORMALIZATION_FILE = "reward_normalization.json"


@dataclass(frozen=True)
class RewardNormalization:
    """What turns raw scores into rewards, and what a reload must repeat to get the same scores.

    `mean` and `std` (population) of `n` raw scores, 0 and 1 where none were measured; `base_dtype` of the trunk's
    weights; `autocast` dtype or None; `load_in_4bit`; the `layout` of the batches; `base_model` as a Hub id, None where
    it was a local folder.
    """

    mean: float = 0.0
    std: float = 1.0
    n: int = 0
    base_dtype: str = "auto"
    autocast: str | None = None
    load_in_4bit: bool = False
    layout: str = "plain"
    base_model: str | None = None

    def save(self, folder: str | Path) -> None:
        (Path(folder) / NORMALIZATION_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Self | None:
        """The file in `folder`, None where there is none; keys of later versions are ignored."""
        path = Path(folder) / NORMALIZATION_FILE
        if not path.is_file():
            return None
        found = json.loads(path.read_text())
        return cls(**{name: found[name] for name in cls.__dataclass_fields__ if name in found})


def dtype_name(model: nn.Module) -> str:
    """Dtype of the trunk's weights as `RewardNormalization.base_dtype` has it."""
    return str(bare_model(model).dtype).removeprefix("torch.")


def is_4bit(model: nn.Module) -> bool:
    return bool(getattr(bare_model(model), "is_loaded_in_4bit", False))


def score_head(model: nn.Module) -> nn.Module:
    """The module named `score` (decoders) or `classifier` (encoders) of a sequence-classification model."""
    base = bare_model(model)
    head = getattr(base, "classifier" if is_encoder(base) else "score", None)
    if not isinstance(head, nn.Module):
        raise UserError(
            f"model: {type(base).__name__} has no `score` head: load it with load_base_model(..., task='reward'), or "
            "pass a sequence-classification model with num_labels=1."
        )
    return head


def score_batch(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """fp32 scores (N,) of a batch of `DataCollatorForComparisons`, in either layout."""
    if "segments" not in batch:
        return score_sequences(model, batch["input_ids"], batch["attention_mask"])
    scores = _scores_by_position(model, model_inputs(model, batch))
    row, column = batch["score_at"].unbind(1)
    return scores[row, column]


def score_sequences(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, head: nn.Module | None = None
) -> Tensor:
    """fp32 scores (N,) of N sequences (N, L), padded on the right, read at each one's last real token.

    Transformers' own pooling takes the right-most token that is not `pad_token_id` and ignores the mask: with
    pad == eos it reads one token early. So a hook takes the score of every position, inside `model(...)` (a call of the
    backbone would bypass DDP), and the mask's length says where to read. An encoder gives one score a row itself.
    `head` scores the hidden states of a causal LM, whose base a reward adapter shares with a policy.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if head is not None:
        with captured_hidden_states(model) as captured, contiguous_head_inputs(model):
            model(**inputs, use_cache=False, logits_to_keep=1)
        scores = head(captured[-1]).squeeze(-1)
    elif is_encoder(bare_model(model)):
        return model(**inputs).logits.float().squeeze(-1)
    else:
        scores = _scores_by_position(model, inputs)
    # (N, L), or (N, virtual + L) under prompt tuning
    last = attention_mask.sum(1) - 1 + scores.shape[1] - input_ids.shape[1]
    return scores.gather(1, last[:, None]).squeeze(1)


def _scores_by_position(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    seen: list[Tensor] = []
    hook = score_head(model).register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        model(**inputs, use_cache=False)
    finally:
        hook.remove()
    return seen[-1].squeeze(-1)


@torch.no_grad()
def shared_prefix_problem(model: nn.Module, device: torch.device | None = None) -> str | None:
    """Why the shared-prefix layout does not give this model's scores of plain rows; None where it does.

    First what `modeling.prefix.why_not` knows; then a probe: completions of three random prompts, two of which share a
    row of 12 tokens, in both layouts, must agree to 1e-3 of the largest score in fp32 and to 5 % in bf16 or 4 bits.
    """
    if problem := why_not(model, device):
        return problem
    generator = torch.Generator().manual_seed(0)
    config = model.config.get_text_config()
    ids = torch.randint(min(config.vocab_size, 1000), (12,), generator=generator).tolist()
    texts = (
        (ids[:4], [ids[4:7], ids[7:8], ids[8:]]),
        (ids[:3], [ids[3:5], ids[5:7]]),
        (ids[7:8], [ids[8:10], ids[10:]]),
    )
    judged = {"pairs": [[0, 1]], "targets": [1.0], "weights": [1.0]}
    rows = [{"prompt_ids": prompt, "completion_ids": completions} | judged for prompt, completions in texts]
    here, was_training, pad = next(model.parameters()).device, model.training, config.pad_token_id
    config.pad_token_id = 0 if pad is None else pad
    window = getattr(config, "sliding_window", None)
    if window:  # one that such short texts notice
        config.sliding_window = min(window, 3)
    model.eval()
    found = []
    try:
        for layout in LAYOUTS:
            batch = DataCollatorForComparisons(0, layout=layout)(rows)
            found.append(score_batch(model, {name: value.to(here) for name, value in batch.items()}))
    except (
        TypeError,
        ValueError,
        RuntimeError,
        LookupError,
        AttributeError,
        AssertionError,
    ) as error:  # whatever an architecture makes of such a mask
        return f"it refuses the layout: {(str(error) or type(error).__name__).splitlines()[0]}"
    finally:
        config.pad_token_id = pad
        if window:
            config.sliding_window = window
        model.train(was_training)
    shared, plain = found
    exact = next(p for p in model.parameters() if p.is_floating_point()).dtype == torch.float32
    tolerance = (1e-3 if exact else 0.05) * float(plain.abs().max())
    difference = float((shared - plain).abs().max())
    return None if difference <= tolerance else f"a probe scores {difference:.2g} apart from plain rows"


class RewardScorer:
    """Callable (prompts, completions, **columns) -> list of rewards: a `reward_funcs` entry of TRL's trainers and ours.

    Args:
        model: sequence-classification model with one label, or a `PeftModel` of one.
        tokenizer: its tokenizer; text is tokenised as in training (`data.text`).
        mean, std: a reward is (score - mean) / std.
        batch_size: sequences per forward pass; sequences of similar length go together.
        max_tokens: tokens per forward pass, padding included; a longer sequence goes alone. None: no limit.
        autocast: dtype to compute in, None for that of the weights.
        adapter: name of the adapter to score with, where a `PeftModel` holds several; None is the active one.
        head: the score head, where `model` is a causal LM that has none of its own.
    """

    __name__ = "reward_model"  # TRL's trainers name a reward by this

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        mean: float = 0.0,
        std: float = 1.0,
        batch_size: int = 32,
        max_tokens: int | None = None,
        autocast: torch.dtype | None = None,
        adapter: str | None = None,
        head: nn.Module | None = None,
    ):
        if not std > 0:
            raise UserError(f"std: must be positive, got {std}.")
        check_tokenizer(tokenizer, needs_chat_template=False)
        if head is None:
            score_head(model)  # refuses other models early
        self.head = head
        self.model, self.tokenizer, self.mean, self.std = model, tokenizer, mean, std
        self.batch_size, self.max_tokens, self.autocast, self.adapter = batch_size, max_tokens, autocast, adapter
        text_config = model.config.get_text_config()
        if text_config.pad_token_id is None:  # without one, Transformers refuses batches
            text_config.pad_token_id = tokenizer.pad_token_id

    @classmethod
    def from_pretrained(
        cls,
        folder_or_repo: str | Path,
        *,
        base: str | PreTrainedModel | None = None,
        dtype: str | torch.dtype = "auto",
        load_in_4bit: bool | None = None,
        revision: str | None = None,
        batch_size: int = 32,
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
    ) -> Self:
        """Loads what `BradleyTerryTrainer` saved: an adapter or a whole model, its head and its normalisation.

        Args:
            folder_or_repo: local folder or Hub id.
            base: base model, loaded or by name, where it is not the one that the adapter names.
            dtype: of the base; `"auto"` is the dtype recorded in training, without which scores differ.
            load_in_4bit: None is as recorded in training.
            revision: branch, tag or commit of `folder_or_repo`.
            batch_size: see the class.
            device: default is CUDA where there is any.
            trust_remote_code: as in Transformers.
        """
        folder = local_folder(folder_or_repo, revision, code=trust_remote_code)
        recorded = RewardNormalization.load(folder)
        if recorded is None:
            logger.warning("%s has no %s: scores are raw.", folder_or_repo, NORMALIZATION_FILE)
            recorded = RewardNormalization()
        elif (recorded.mean, recorded.std) == (0.0, 1.0):
            logger.warning("%s was saved without a normalisation: scores are raw.", folder_or_repo)
        options = {
            "dtype": recorded.base_dtype if dtype == "auto" else dtype,
            "load_in_4bit": recorded.load_in_4bit if load_in_4bit is None else load_in_4bit,
            "trust_remote_code": trust_remote_code,
        }
        model = _load_reward_model(folder, base, options)
        found = {"base_dtype": dtype_name(model), "load_in_4bit": is_4bit(model)}
        trained = {name: getattr(recorded, name) for name in found}
        if base is not None and not isinstance(base, str) and trained not in (found, found | {"base_dtype": "auto"}):
            logger.warning("%s: trained on a base with %s, given %s: scores differ.", folder_or_repo, trained, found)
        if not options["load_in_4bit"]:
            model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        autocast = getattr(torch, recorded.autocast) if recorded.autocast else None
        tokenizer = load_tokenizer(str(folder), trust_remote_code=trust_remote_code)
        return cls(
            model.eval(), tokenizer, mean=recorded.mean, std=recorded.std, batch_size=batch_size, autocast=autocast
        )

    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float]:
        """Normalised rewards of completions (str or messages) given their prompts; further columns are ignored."""
        return [(score - self.mean) / self.std for score in self.raw(prompts, completions)]

    def raw(self, prompts: list, completions: list) -> list[float]:
        """Scores as the head gives them."""
        if len(prompts) != len(completions):
            raise UserError(f"completions: {len(completions)} for {len(prompts)} prompts: give one a prompt.")
        for k, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            for name, value in (("prompts", prompt), ("completions", completion)):
                if not isinstance(value, str) and not is_messages(value):
                    raise UserError(f"{name}[{k}] is a {type(value).__name__}: give a string or a list of messages.")
        return self.score_ids(
            [
                encode_prompt(self.tokenizer, prompt) + encode_completion(self.tokenizer, prompt, completion)
                for prompt, completion in zip(prompts, completions, strict=True)
            ]
        )

    @torch.no_grad()
    def score_ids(self, sequences: list[list[int]]) -> list[float]:
        """Raw scores of token lists (prompt, completion, stop token), in their order."""
        limit = position_limit(bare_model(self.model))
        for k, ids in enumerate(sequences):
            if limit and len(ids) > limit:
                raise UserError(f"completion {k} with its prompt: {len(ids)} tokens, the reward model takes {limit}.")
        order = sorted(range(len(sequences)), key=lambda k: -len(sequences[k]))  # longest first: out of memory at once
        scores = [0.0] * len(sequences)
        device = next(self.model.parameters()).device
        with evaluating(self.model), active_adapter(self.model, self.adapter) if self.adapter else nullcontext():
            while order:
                most = self.max_tokens // len(sequences[order[0]]) if self.max_tokens else self.batch_size
                n = max(1, min(self.batch_size, most))
                chunk, order = order[:n], order[n:]
                batch = pad_right([sequences[k] for k in chunk], self.tokenizer.pad_token_id)
                batch = {name: tensor.to(device) for name, tensor in batch.items()}
                with mixed_precision(self.model, self.autocast):
                    found = score_sequences(self.model, **batch, head=self.head)
                for k, score in zip(chunk, found.tolist(), strict=True):
                    scores[k] = score
        return scores

    def text(self, prompt: str | Messages, completion: str | Messages) -> str:
        """What is scored, as one string: what `pipeline("text-classification")` takes for a merged model."""
        tokenizer = self.tokenizer
        before, after = render_prompt(tokenizer, prompt), completion_text(tokenizer, prompt, completion)
        if is_encoder(bare_model(self.model)):  # its tokenizer opens and closes the text itself
            return before.removeprefix(tokenizer.cls_token) + tokenizer.sep_token * isinstance(prompt, str) + after
        if tokenizer.bos_token and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
            before = before.removeprefix(tokenizer.bos_token)  # the tokenizer adds it itself
        return before + after.removesuffix(tokenizer.eos_token) + tokenizer.eos_token


def local_folder(folder_or_repo: str | Path, revision: str | None, *, code: bool = False) -> Path:
    """The folder, or what is fetched of the Hub repository; its Python files only with `code`."""
    local = Path(folder_or_repo).expanduser()
    if local.is_dir():
        return local
    if isinstance(folder_or_repo, Path) or local.is_absolute() or str(folder_or_repo).startswith("."):
        raise UserError(f"reward model: no folder at {folder_or_repo}: check the path, or give a Hub id.")
    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", *(["*.py"] if code else [])]
    with found_or_refused("reward model", str(folder_or_repo)):
        return Path(
            snapshot_download(
                str(folder_or_repo), revision=revision, allow_patterns=patterns, ignore_patterns=["checkpoint-*/*"]
            )
        )


def _load_reward_model(folder: Path, base: str | PreTrainedModel | None, options: dict) -> PreTrainedModel | PeftModel:
    base_id, base_revision = base_and_revision(str(folder))
    if not (folder / "adapter_config.json").is_file():
        model = load_base_model(str(folder), task="reward", **options)
        _restore_fp32_head(model, folder)
        return model
    if PeftConfig.from_pretrained(str(folder)).task_type == TaskType.CAUSAL_LM:
        raise UserError(f"reward model: {folder} is a policy adapter, without a score head: give a reward model's.")
    if base is None:
        base, options = base_id, options | {"revision": base_revision}
    if not base:
        raise UserError(f"{folder.name}: the adapter names no base model: pass base= a model or its id.")
    model = load_base_model(base, task="reward", **options) if isinstance(base, str) else base
    install_fp32_score(model)  # before PEFT: it copies the head as it is, in the base's dtype otherwise
    return attach_adapter(model, folder)


def _restore_fp32_head(model: PreTrainedModel, folder: Path) -> None:
    """Reads the head again as saved: loading a whole model in bf16 has rounded it."""
    head = head_name(model)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():
                if name in (f"{head}.weight", f"{head}.bias"):
                    model.get_parameter(name).data.copy_(weights.get_tensor(name))
