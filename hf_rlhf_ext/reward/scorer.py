"""`RewardScorer`: a trained reward model as a function of prompts and completions."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.prompt_form import PromptForm
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
from ..modeling.adapters import active_adapter, bare_model, mixed_precision
from ..modeling.embeddings import n_rows
from ..modeling.heads import is_encoder, learned_positions
from ..modeling.layout_costs import ModelSizes, cheaper_layout
from ..modeling.layouts import Layout, find_layout
from ..modeling.loading import load_tokenizer
from ..modeling.probing import evaluating
from ..modeling.quantization import quantization_record
from ..modeling.source import public_name
from ..modeling.vocabulary import check_special_tokens, check_token_ids
from ..training.auto_batch import REWARD_TOKENS, FixedSizes
from ..training.bars import progress_bar
from .asked import FormOfTraining, as_lists, form_of_reward_model
from .normalization import NORMALIZATION_FILE, RewardNormalization, dtype_name, is_4bit
from .prefix_probe import log_plain_rows, shared_prefix_problem
from .saved_models import (
    is_adapter,
    load_reward_model,
    load_reward_weights,
    load_trainable_adapter,
    local_folder,
    quantization_options,
)
from .scores import check_one_output, score_batch, score_head, score_sequences
from .shared_prompts import ScoringPass, check_per_prompt, counts_of_groups, passes_of_groups, prompt_groups
from .sharing import Precision, precision_mismatch

__all__ = [
    "NORMALIZATION_FILE",
    "RewardNormalization",
    "RewardScorer",
    "dtype_name",
    "is_4bit",
    "is_adapter",
    "load_reward_weights",
    "load_trainable_adapter",
    "local_folder",
    "score_batch",
    "score_head",
    "score_sequences",
    "shared_prefix_problem",
]

logger = logging.getLogger(__name__)


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
        self._tested_layout: tuple[tuple[nn.Module, str] | None, Layout] = (None, Layout.PLAIN)
        self.passes_of_all: Callable[[int], int] = int
        """The number of forward passes that all processes run, where one that needs fewer must not stop earlier."""
        self.sizes = FixedSizes()
        """What bounds a pass besides `max_tokens`, see `hf_rlhf_ext.training.auto_batch`. A trainer replaces it."""
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
        options |= quantization_options(recorded, load_in_4bit)
        model = load_reward_model(folder, base, options)

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

    def __call__(self, prompts: list, completions: list, *, per_prompt: int = 1, **columns: Any) -> list[float]:
        """Rewards of completions.

        Args:
            prompts: N prompts, as text or as messages; or one, with one completion.
            completions: N completions, as text or as messages.
            per_prompt: number of completions of each prompt, see `raw`.
            columns: `tools` and `chat_template_kwargs` with N entries each, see `raw`. Others are not used; trainers
                pass all columns of the dataset.

        Returns:
            N rewards, (score - mean) / std.

        Raises:
            UserError: see `raw`.
        """
        columns = {name: values for name, values in columns.items() if name in TEMPLATE_COLUMNS}
        raw_scores = self.raw(prompts, completions, per_prompt=per_prompt, **columns)
        return [(score - self.mean) / self.std for score in raw_scores]

    def raw(
        self,
        prompts: list,
        completions: list,
        *,
        tools: list | None = None,
        chat_template_kwargs: list | None = None,
        per_prompt: int = 1,
    ) -> list[float]:
        """Raw scores of completions, without the normalization.

        Args:
            prompts: N prompts, as text or as messages; or one, with one completion.
            completions: N completions, as text or as messages. Text after a prompt that ends with a turn of the
                assistant continues this turn.
            tools: N lists of function schemas, or their JSON text, for the chat template; `None` means no tools.
            chat_template_kwargs: N dicts of arguments of the chat template, or their JSON text; `None` means none.
            per_prompt: number K of completions of each prompt: those of entries j·K … j·K+K-1 have the same prompt.
                Tokens that they share are computed once if the model supports it. The scores are the same up to
                rounding.

        Returns:
            N scores, in log-odds.

        Raises:
            UserError: if the numbers of entries differ or are not divisible by `per_prompt`, if an entry is not text or
                messages or cannot be rendered by the chat template, or if a sequence is longer than the model supports.
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
        return self.score_ids(sequences, per_prompt=per_prompt)

    def n_passes(self, sequences: list[list[int]], per_prompt: int = 1) -> int:
        """The number of forward passes in which `score_ids` scores these sequences."""
        return len(self._passes(sequences, per_prompt))

    @torch.no_grad()
    def score_ids(self, sequences: list[list[int]], *, at_least: int = 0, per_prompt: int = 1) -> list[float]:
        """Raw scores of tokenized sequences.

        Args:
            sequences: N lists of token ids: prompt, completion and stop token.
            at_least: smallest number of forward passes. Where the weights are spread over processes, all must run the
                same number. Missing passes score one token, and their result is not used.
            per_prompt: K, if each K sequences that follow each other start with the same tokens. These are computed
                once if the model supports it, which the first call with K > 1 tests: where the weights are spread over
                processes, all must make it.

        Returns:
            N scores, in log-odds.

        Raises:
            UserError: if a sequence is longer than the model supports, or if N is not divisible by K.
        """
        check_per_prompt(len(sequences), per_prompt)
        limit = learned_positions(bare_model(self.model))
        if limit:
            _check_lengths(sequences, limit)
        rows = n_rows(self.model)
        for index, ids in enumerate(sequences):
            check_token_ids(f"completion {index} with its prompt", ids, self.tokenizer, rows)
        return self.sizes.until_it_fits(lambda: self._score_all(sequences, at_least, per_prompt))

    def _score_all(self, sequences: list[list[int]], at_least: int, per_prompt: int) -> list[float]:
        scores = [0.0] * len(sequences)
        passes = self._passes(sequences, per_prompt)
        needed = self.passes_of_all(len(passes))
        bar = progress_bar(f"scoring {len(sequences)} completions", len(sequences))
        with evaluating(self.model), self._own_adapter(), bar as advance:
            for one in passes:
                with self._bounded(one):
                    scores_of_pass = self._score(one)
                for index, score in zip(one.indices, scores_of_pass, strict=True):
                    scores[index] = score
                advance(len(one.indices))
            one_token = ScoringPass.of_rows([0], [[self.tokenizer.pad_token_id]])
            for _ in range(max(at_least, needed) - len(passes)):
                self._score(one_token)
        return scores

    def _passes(self, sequences: list[list[int]], per_prompt: int) -> list[ScoringPass]:
        """The forward passes that score these sequences."""
        max_tokens = self.sizes.limit(REWARD_TOKENS, self.max_tokens)
        if per_prompt > 1:
            layout = self._shared_layout()
            groups = prompt_groups(sequences, per_prompt)
            if layout == Layout.MASK:  # it may be slower than plain rows
                layout = cheaper_layout(layout, ModelSizes.of(self.model), counts_of_groups(groups)).layout
            if layout != Layout.PLAIN:
                return list(passes_of_groups(groups, layout, self.batch_size, max_tokens))
        batches = self._batches([len(ids) for ids in sequences], max_tokens)
        return [ScoringPass.of_rows(indices, sequences) for indices in batches]

    def _bounded(self, one: ScoringPass) -> AbstractContextManager:
        """Around a forward pass, which may be split if it does not fit."""
        lengths = [group.n_tokens for group in one.groups]

        def n_parts(max_tokens: int) -> int:
            if one.layout == Layout.PLAIN:
                return len(list(self._batches(lengths, max_tokens)))
            return len(list(passes_of_groups(one.groups, one.layout, self.batch_size, max_tokens)))

        return self.sizes.one_pass(
            "scoring with a reward model", REWARD_TOKENS, rows=len(lengths), width=max(lengths), n_parts=n_parts
        )

    def _shared_layout(self) -> Layout:
        """The layout in which the model computes sequences with a shared prompt; tested once for each model.

        It is tested again if someone sets another attention.
        """
        config = self.model.config.get_text_config()
        tested, layout = self._tested_layout
        if tested != (self.model, config._attn_implementation):
            with self._own_adapter():
                choice = find_layout(self.model)
            layout = choice.layout
            self._tested_layout = ((self.model, config._attn_implementation), layout)  # the test may have set it
            if layout == Layout.PLAIN:
                log_plain_rows(self.model, f"per_prompt: plain rows are used, since {choice.reason}.")
        return layout

    def _batches(self, lengths: list[int], max_tokens: int | None) -> Iterator[list[int]]:
        """Indices of the sequences of each forward pass, longest first, so that a lack of memory shows early."""
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        start = 0
        while start < len(order):
            size = self.batch_size
            if max_tokens is not None:
                longest = lengths[order[start]]  # the others in the batch are padded to it
                size = min(size, max_tokens // longest)
            size = max(1, size)
            yield order[start : start + size]
            start += size

    def _score(self, one: ScoringPass) -> list[float]:
        """Scores of one forward pass."""
        device = next(self.model.parameters()).device
        batch = {name: values.to(device) for name, values in one.batch(self.tokenizer.pad_token_id).items()}
        # `None` looks at the attention of the model, which another trainer of the same model may have changed.
        layout = Layout.MASK if one.layout == Layout.MASK else None
        with mixed_precision(self.model, self.autocast):
            return score_batch(self.model, batch, self.head, layout=layout).tolist()

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


def _warn_of_mismatch(name: str | Path, trained: Precision, present: Precision, remedy: str) -> None:
    mismatch = precision_mismatch(trained, present)
    if mismatch is not None:
        logger.warning("%s was trained on %s: scores differ. %s.", name, mismatch, remedy)
