"""`RewardScorer`: a trained reward model as a function of prompts and completions."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel, TaskType
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.collators import pad_right
from ..data.prompt_form import PromptForm, remember_form
from ..data.templates import TEMPLATE_COLUMNS, template_options
from ..data.text import (
    Messages,
    Unrenderable,
    check_tokenizer,
    completion_text,
    encode_completion,
    encode_prompt,
    prefill_of,
    render_prompt,
    with_prefill,
)
from ..errors import UserError
from ..modeling.adapter_files import adapter_weight_names, base_weight_names, refuse_lost_modules
from ..modeling.adapters import active_adapter, bare_model, mixed_precision
from ..modeling.checkpoint_files import is_head
from ..modeling.embeddings import n_rows
from ..modeling.heads import head_name, install_fp32_score, is_encoder, learned_positions
from ..modeling.loading import attach_adapter, base_and_revision, found_or_refused, load_base_model, load_tokenizer
from ..modeling.probing import evaluating
from ..modeling.quantization import keep_nf4_gradients_right, quantization_record
from ..modeling.source import public_name
from ..modeling.vocabulary import check_special_tokens, check_token_ids
from ..training.bars import progress_bar
from .asked import FormOfTraining, as_lists, form_of_reward_model
from .normalization import NORMALIZATION_FILE, RewardNormalization, dtype_name, is_4bit
from .prefix_probe import shared_prefix_problem
from .scores import check_one_output, score_batch, score_head, score_sequences
from .sharing import Precision, precision_mismatch

__all__ = [
    "NORMALIZATION_FILE",
    "RewardNormalization",
    "RewardScorer",
    "dtype_name",
    "is_4bit",
    "local_folder",
    "score_batch",
    "score_head",
    "score_sequences",
    "shared_prefix_problem",
]

logger = logging.getLogger(__name__)

_MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
"""The files that are downloaded for a reward model on the Hub. Pickle files are not among them."""


class RewardScorer:
    """A reward model as a reward function: `scorer(prompts, completions)` returns a list of rewards.

    Pass it in `reward_funcs` of `PPOTrainer` or of TRL's trainers. Scores are the same as in training. A model that was
    trained on messages puts text into its chat template, and says so once.

    Args:
        model: sequence-classification model with one label, or a `PeftModel` of one.
        tokenizer: its tokenizer. Texts are tokenized as in training.
        mean: mean of the raw scores. A reward is (score - mean) / std.
        std: standard deviation of the raw scores, positive.
        batch_size: maximum number of sequences per forward pass. Sequences of similar length are batched together.
        max_tokens: maximum number of tokens per forward pass, including padding; `None` means no limit. A longer
            sequence is a batch by itself.
        autocast: dtype to compute in; `None` means that of the weights.
        adapter: name of the adapter to use if a `PeftModel` has several; `None` means the active one.
        head: score head, if `model` is a causal LM without one.
        trained_on: form of the prompts in training; `None` means what `model` was trained on, if that is known.

    Raises:
        UserError: if `std` is not positive, if the tokenizer lacks a token that is needed, or if the model has no head.
    """

    __name__ = "reward_model"  # the name of the reward in TRL's trainers

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
        trained_on: PromptForm | None = None,
    ):
        if not std > 0:
            raise UserError(f"std: must be positive, got {std}.")
        check_tokenizer(tokenizer, needs_chat_template=False)
        if head is None:
            check_one_output(model)
        check_special_tokens("tokenizer of the reward model", tokenizer, model)
        self.model = model
        self.tokenizer = tokenizer
        self.mean = mean
        self.std = std
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.autocast = autocast
        self.adapter = adapter
        self.head = head
        if trained_on is None:  # with a head, `model` is the policy that shares its base
            trained_on = form_of_reward_model(model) if head is None else PromptForm()
        self.asked = FormOfTraining(trained_on)
        self.passes_of_all: Callable[[int], int] = int
        """The number of forward passes that all processes run, where one that needs fewer must not stop earlier."""
        self.loaded_from: str | None = None
        """Hub id, or name of the local folder, that it was loaded from; `None` for a model that was in memory."""
        text_config = model.config.get_text_config()
        if text_config.pad_token_id is None:  # Transformers refuses batches without one
            text_config.pad_token_id = tokenizer.pad_token_id

    @property
    def form(self) -> str | None:
        """What it was trained on: `"text"`, `"messages"`, or `"mixed"` for both; `None` if that is not known."""
        return self.asked.trained.prompt_form

    @classmethod
    def from_pretrained(
        cls,
        folder_or_repo: str | Path,
        *,
        base: str | Path | PreTrainedModel | None = None,
        dtype: str | torch.dtype = "auto",
        load_in_4bit: bool | None = None,
        revision: str | None = None,
        batch_size: int = 32,
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
    ) -> Self:
        """Loads a reward model that `BradleyTerryTrainer` saved: an adapter or a whole model.

        Args:
            folder_or_repo: local folder or Hub id.
            base: base model of an adapter, loaded or as a name; `None` means the one that the adapter names.
            dtype: dtype of the base. `"auto"` means the dtype of training; with another dtype scores differ.
            load_in_4bit: whether to load the base in 4 bits; `None` means quantized exactly as in training. After a
                training that was not in 4 bits, `True` means NF4 with double quantization.
            revision: branch, tag or commit of `folder_or_repo`.
            batch_size: see the class.
            device: device of the model; `None` means CUDA if available, else the CPU.
            trust_remote_code: whether to run Python code from the repository, as in Transformers.

        Returns:
            The scorer, with the normalization that was saved. Without one, it returns raw scores and logs a warning.

        Raises:
            UserError: if the folder does not exist, is not a reward model, lacks the score head or other weights, or
                names no base model.
        """
        folder = local_folder(folder_or_repo, revision, code=trust_remote_code)
        found = RewardNormalization.load(folder)
        recorded = found or RewardNormalization()
        if dtype == "auto":
            dtype = recorded.base_dtype
        options = {"dtype": dtype, "trust_remote_code": trust_remote_code}
        options |= _quantization_options(recorded, load_in_4bit)
        model = _load_reward_model(folder, base, options)

        # Raw scores are on another scale, but still usable: a warning is enough.
        if found is None:
            logger.warning("%s has no %s: rewards are the raw scores.", folder_or_repo, NORMALIZATION_FILE)
        elif not recorded.is_measured:
            logger.warning("%s was saved without a normalization: rewards are the raw scores.", folder_or_repo)
        if isinstance(base, PreTrainedModel):
            remedy = "Leave `base` out, or load it as in training"
            _warn_of_mismatch(folder_or_repo, Precision.recorded(recorded), Precision.of_model(model), remedy)
        elif load_in_4bit is None:
            # A base whose checkpoint is quantized itself may be quantized otherwise than in training.
            trained, present = Precision.recorded(recorded), Precision.of_model(model)
            remedy = "The checkpoint of the base is quantized itself: pass the one of training as `base`"
            _warn_of_mismatch(folder_or_repo, replace(trained, dtype=None), replace(present, dtype=None), remedy)
        if quantization_record(model) is None:  # quantized weights are already in their place
            model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        tokenizer = load_tokenizer(str(folder), trust_remote_code=trust_remote_code)
        scorer = cls(
            model.eval(),
            tokenizer,
            mean=recorded.mean,
            std=recorded.std,
            batch_size=batch_size,
            autocast=recorded.autocast_dtype,
            trained_on=PromptForm.load(folder),
        )
        scorer.set_source(folder_or_repo)
        return scorer

    def set_source(self, folder_or_repo: str | Path) -> None:
        """Sets what messages and reports call the reward model: what it was loaded from."""
        self.asked.name = str(folder_or_repo)
        self.loaded_from = public_name(folder_or_repo)

    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float]:
        """Rewards of completions.

        Args:
            prompts: N prompts, as text or as messages; or one, with one completion.
            completions: N completions, as text or as messages.
            columns: `tools` and `chat_template_kwargs` with N entries each, see `raw`. Others are not used; trainers
                pass all columns of the dataset.

        Returns:
            N rewards, (score - mean) / std.

        Raises:
            UserError: see `raw`.
        """
        columns = {name: values for name, values in columns.items() if name in TEMPLATE_COLUMNS}
        return [(score - self.mean) / self.std for score in self.raw(prompts, completions, **columns)]

    def raw(
        self,
        prompts: list,
        completions: list,
        *,
        tools: list | None = None,
        chat_template_kwargs: list | None = None,
    ) -> list[float]:
        """Raw scores of completions, without the normalization.

        Args:
            prompts: N prompts, as text or as messages; or one, with one completion.
            completions: N completions, as text or as messages. Text after a prompt that ends with a turn of the
                assistant continues this turn.
            tools: N lists of function schemas, or their JSON text, for the chat template; `None` means no tools.
            chat_template_kwargs: N dicts of arguments of the chat template, or their JSON text; `None` means none.

        Returns:
            N scores, in log-odds.

        Raises:
            UserError: if the numbers of entries differ, if an entry is not text or messages or cannot be rendered by
                the chat template, or if a sequence is longer than the model supports.
        """
        prompts, completions = as_lists(prompts, completions)
        options = _template_options(len(prompts), {"tools": tools, "chat_template_kwargs": chat_template_kwargs})
        sequences = []
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            try:
                prompt, completion = self._as_turns(prompt, completion, options[index])
                prompt_ids = encode_prompt(self.tokenizer, prompt, options[index])
                completion_ids = encode_completion(self.tokenizer, prompt, completion, options[index])
            except Unrenderable as error:
                raise UserError(f"completions[{index}]: {error}") from error
            sequences.append(prompt_ids + completion_ids)
        return self.score_ids(sequences)

    def n_passes(self, sequences: list[list[int]]) -> int:
        """The number of forward passes in which `score_ids` scores these sequences."""
        return sum(1 for _ in self._batches([len(ids) for ids in sequences]))

    @torch.no_grad()
    def score_ids(self, sequences: list[list[int]], *, at_least: int = 0) -> list[float]:
        """Raw scores of tokenized sequences.

        Args:
            sequences: N lists of token ids: prompt, completion and stop token.
            at_least: smallest number of forward passes. Where the weights are spread over processes, all must run the
                same number. Missing passes score one token, and their result is not used.

        Returns:
            N scores, in log-odds.

        Raises:
            UserError: if a sequence is longer than the model supports.
        """
        limit = learned_positions(bare_model(self.model))
        if limit:
            _check_lengths(sequences, limit)
        rows = n_rows(self.model)
        for index, ids in enumerate(sequences):
            check_token_ids(f"completion {index} with its prompt", ids, self.tokenizer, rows)
        scores = [0.0] * len(sequences)
        own_passes = self.n_passes(sequences)
        needed = self.passes_of_all(own_passes)
        bar = progress_bar(f"scoring {len(sequences)} completions", len(sequences))
        with evaluating(self.model), self._own_adapter(), bar as advance:
            for indices in self._batches([len(ids) for ids in sequences]):
                batch_scores = self._score([sequences[index] for index in indices])
                for index, score in zip(indices, batch_scores, strict=True):
                    scores[index] = score
                advance(len(indices))
            for _ in range(max(at_least, needed) - own_passes):
                self._score([[self.tokenizer.pad_token_id]])
        return scores

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Indices of the sequences of each forward pass, longest first, so that a lack of memory shows early."""
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        start = 0
        while start < len(order):
            size = self.batch_size
            if self.max_tokens is not None:
                longest = lengths[order[start]]  # the others in the batch are padded to it
                size = min(size, self.max_tokens // longest)
            size = max(1, size)
            yield order[start : start + size]
            start += size

    def _score(self, sequences: list[list[int]]) -> list[float]:
        """Scores of one forward pass."""
        device = next(self.model.parameters()).device
        batch = pad_right(sequences, self.tokenizer.pad_token_id)
        input_ids = batch["input_ids"].to(device)
        attention_mask = batch["attention_mask"].to(device)
        with mixed_precision(self.model, self.autocast):
            return score_sequences(self.model, input_ids, attention_mask, head=self.head).tolist()

    @contextmanager
    def _own_adapter(self) -> Iterator[None]:
        """Inside the context, the model computes with `adapter`."""
        if self.adapter is None:
            yield
        else:
            with active_adapter(self.model, self.adapter):
                yield

    def _as_turns(
        self, prompt: str | Messages, completion: str | Messages, options: dict[str, Any]
    ) -> tuple[str | Messages, str | Messages]:
        """Puts a pair into the form of training, and joins text with the turn of the assistant that it continues.

        Messages are turns of their own.
        """
        prompt, completion = self.asked.fit(prompt, completion, self.tokenizer)
        if isinstance(completion, str) and prefill_of(prompt) is not None:
            return with_prefill(self.tokenizer, prompt, completion, options)
        return prompt, completion

    def text(self, prompt: str | Messages, completion: str | Messages, **columns: Any) -> str:
        """The text that is scored, as one string, for `pipeline("text-classification")` with a merged model.

        Args:
            prompt: a prompt, as text or as messages.
            completion: a completion, as text or as messages.
            columns: `tools` and `chat_template_kwargs` of the row.
        """
        tokenizer = self.tokenizer
        options = template_options(columns)
        prompt, completion = self._as_turns(prompt, completion, options)
        before = render_prompt(tokenizer, prompt, options)
        after = completion_text(tokenizer, prompt, completion, options)
        if is_encoder(bare_model(self.model)):  # its tokenizer adds the first and the last special token
            before = before.removeprefix(tokenizer.cls_token)
            if isinstance(prompt, str):  # for messages, the chat template adds the separator
                before += tokenizer.sep_token
            return before + after
        adds_bos = tokenizer.bos_token and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        if adds_bos:
            before = before.removeprefix(tokenizer.bos_token)
        return before + after.removesuffix(tokenizer.eos_token) + tokenizer.eos_token


def _template_options(n: int, columns: dict[str, list | None]) -> list[dict[str, Any]]:
    """Arguments of the chat template for each of the `n` completions."""
    rows: list[dict[str, Any]] = [{} for _ in range(n)]
    for name, values in columns.items():
        if values is None:
            continue
        if len(values) != n:
            raise UserError(f"{name}: {len(values)} entries for {n} completions: give one for each.")
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    return list(map(template_options, rows))


def _check_lengths(sequences: list[list[int]], limit: int) -> None:
    for index, ids in enumerate(sequences):
        if len(ids) > limit:
            raise UserError(
                f"completion {index} with its prompt has {len(ids)} tokens, the reward model takes {limit}: shorten it."
            )


def local_folder(folder_or_repo: str | Path, revision: str | None, *, code: bool = False) -> Path:
    """Returns a local folder, or downloads a reward model from the Hub.

    Args:
        folder_or_repo: local folder or Hub id.
        revision: branch, tag or commit on the Hub; `None` means the default branch.
        code: whether to download Python files too.

    Returns:
        The local folder.

    Raises:
        UserError: if the folder does not exist, or if the download fails.
    """
    local = Path(folder_or_repo).expanduser()
    if local.is_dir():
        return local
    if isinstance(folder_or_repo, Path) or local.is_absolute() or str(folder_or_repo).startswith("."):
        raise UserError(f"reward model: no folder at {folder_or_repo}: check the path, or give a Hub id.")
    patterns = list(_MODEL_FILES)
    if code:
        patterns.append("*.py")
    with found_or_refused("reward model", str(folder_or_repo)):
        path = snapshot_download(
            str(folder_or_repo), revision=revision, allow_patterns=patterns, ignore_patterns=["checkpoint-*/*"]
        )
    return Path(path)


def _warn_of_mismatch(name: str | Path, trained: Precision, present: Precision, remedy: str) -> None:
    mismatch = precision_mismatch(trained, present)
    if mismatch is not None:
        logger.warning("%s was trained on %s: scores differ. %s.", name, mismatch, remedy)


def _quantization_options(recorded: RewardNormalization, load_in_4bit: bool | None) -> dict[str, Any]:
    """The options of `load_base_model` that quantize the base as in training, unless `load_in_4bit` says otherwise."""
    if load_in_4bit is None:
        as_trained = True
    else:
        as_trained = load_in_4bit and recorded.load_in_4bit
    if as_trained and recorded.quantization is not None:
        return {"quantization_config": recorded.quantization}
    if load_in_4bit is None:
        load_in_4bit = recorded.load_in_4bit
    return {"load_in_4bit": load_in_4bit}


def is_adapter(folder_or_repo: str, revision: str | None = None) -> bool:
    """Whether a local folder or a repository on the Hub holds an adapter."""
    if (Path(folder_or_repo).expanduser() / "adapter_config.json").is_file():  # it may name no base
        return True
    return base_and_revision(folder_or_repo, revision)[0] is not None


def load_trainable_adapter(folder_or_repo: str, *, revision: str | None = None, **options: Any) -> PeftModel:
    """Loads a reward adapter to train it further, on its base as it was trained.

    Args:
        folder_or_repo: local folder or Hub id of the adapter.
        revision: branch, tag or commit of the adapter.
        options: options of `load_base_model`. Without a dtype or a quantization, those of training are used.

    Raises:
        UserError: if it is the adapter of a policy, if it names no base, or if weights are missing.
    """
    folder = local_folder(folder_or_repo, revision, code=options.get("trust_remote_code", False))
    if PeftConfig.from_pretrained(str(folder)).task_type == TaskType.CAUSAL_LM:
        raise UserError(
            f"model: {folder_or_repo} is the adapter of a policy, without a score head: give its base and peft_config, "
            "or merge it first (hf-rlhf merge)."
        )
    recorded = RewardNormalization.load(folder) or RewardNormalization()
    options = {"dtype": recorded.base_dtype} | options
    if "load_in_4bit" not in options and options.get("quantization_config") is None:
        options |= _quantization_options(recorded, None)
    model = _load_reward_model(folder, None, options, is_trainable=True)
    remember_form(model, PromptForm.load(folder))
    return model


def _load_reward_model(
    folder: Path, base: str | PreTrainedModel | None, options: dict, *, is_trainable: bool = False
) -> PreTrainedModel | PeftModel:
    """Loads the model in `folder`, with its head in fp32. `options` are those of `load_base_model`."""
    base_id, base_revision = base_and_revision(str(folder))
    if not (folder / "adapter_config.json").is_file():
        model = load_base_model(str(folder), task="reward", may_lack=(), **options)
        _restore_fp32_head(model, folder)
        return model

    weights = adapter_weight_names(folder)
    _refuse_policy_adapter(folder, weights)
    if base is None:
        base = base_id
        options = options | {"revision": base_revision}
    if not base:
        raise UserError(f"{folder.name}: the adapter names no base model: pass base= with a model or its id.")
    if isinstance(base, str | Path):
        base = load_base_model(base, task="reward", may_lack=base_weight_names(weights), **options)
    else:
        keep_nf4_gradients_right(base)  # a user's own: repacked weights would round otherwise than in training
    install_fp32_score(base)  # before PEFT, which would copy the head in the dtype of the base
    return attach_adapter(base, folder, is_trainable=is_trainable)


def load_reward_weights(folder: Path, **options: Any) -> PreTrainedModel | PeftModel:
    """Loads the model in the folder of a reward model, with all checks but without tokenizer and normalization.

    Args:
        folder: local folder of the reward model.
        options: options of `load_base_model`, such as `dtype`.
    """
    return _load_reward_model(folder, None, options)


def _refuse_policy_adapter(folder: Path, weights: set[str]) -> None:
    """Raises `UserError` if an adapter has no score head, before its base is loaded."""
    config = PeftConfig.from_pretrained(str(folder))
    if config.task_type == TaskType.CAUSAL_LM:
        raise UserError(f"reward model: {folder} is a policy adapter, without a score head: give a reward model's.")
    refuse_lost_modules(folder, config, weights)
    if not any(is_head(name) for name in weights):
        raise UserError(
            f"reward model: {folder} has no score head in its adapter, so it is a policy adapter, or its head was not "
            "saved: give a reward model as BradleyTerryTrainer saves it."
        )


def _restore_fp32_head(model: PreTrainedModel, folder: Path) -> None:
    """Reads the head again in fp32, as loading a whole model in bf16 has rounded it."""
    head = head_name(model)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():
                if name in (f"{head}.weight", f"{head}.bias"):
                    model.get_parameter(name).data.copy_(weights.get_tensor(name))
