"""PPO-ptx (InstructGPT): adds the language-model loss of texts to the update, so that the policy forgets less."""

import logging
from dataclasses import dataclass

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.json_columns import without_arrow_fill
from ..data.schema import LoadReport
from ..data.templates import template_options
from ..data.text import (
    Unrenderable,
    encode_completion,
    encode_prompt,
    is_messages,
    refused_row,
    without_second_start,
)
from ..errors import UserError
from ..modeling.vocabulary import check_token_ids
from .batching import budget_chunks
from .config import PPOConfig
from .prompts import rows_from
from .ranks import Ranks
from .rollout import Sequences, pack_sequences

logger = logging.getLogger(__name__)


@dataclass
class TextBatch:
    """Texts that pass through the model together.

    Attributes:
        sequences: contexts as prompts, targets as completions.
        n_tokens: number of target tokens of the whole optimizer step on all processes. The loss is divided by it.
        share: weight of this batch in the mean of a metric over the optimizer step.
    """

    sequences: Sequences
    n_tokens: int
    share: float

    def n_parts(self, max_tokens: int) -> int:
        """The number of batches of at most `max_tokens` tokens that these texts make."""
        lengths = self.sequences.lengths.tolist()
        return len(budget_chunks(lengths, max_rows=len(lengths), max_tokens=max_tokens))


class PTXTexts:
    """The texts of PPO-ptx, tokenized once.

    Args:
        dataset: rows with `text`, with `prompt` and `completion`, or with `messages`; `None` means no texts.
        tokenizer: tokenizer of the policy.
        args: options of the run.
        token_rows: number of tokens for which the policy has an embedding.
        max_positions: longer texts are cut to this number of tokens.

    Raises:
        UserError: if only one of `ptx_dataset` and `ptx_coef` is given, or if a row is not usable.
    """

    def __init__(
        self,
        dataset: Dataset | None,
        tokenizer: PreTrainedTokenizerBase,
        args: PPOConfig,
        *,
        token_rows: int,
        max_positions: int,
    ):
        if (dataset is None) != (args.ptx_coef == 0):
            raise UserError("PPO-ptx needs both ptx_dataset and ptx_coef above 0: set both, or neither.")
        self._pad_token_id = tokenizer.pad_token_id
        self._texts: list[tuple[list[int], list[int]]] = []
        if dataset is not None:
            self._texts = encode_texts(dataset, tokenizer, max_positions, unrenderable=args.unrenderable)
        for context, targets in self._texts:
            check_token_ids("ptx_dataset: a text", [*context, *targets], tokenizer, token_rows)

    def batches(self, position: int, args: PPOConfig, ranks: Ranks) -> list[TextBatch]:
        """The texts of this process for an optimizer step.

        Args:
            position: position of the first text of the step, over all processes. Like that of a prompt, it counts pass
                after pass, so that a resumed run gets the same texts as an uninterrupted one.
            args: options of the run.
            ranks: the processes.
        """
        if not self._texts:
            return []
        size = texts_per_step(args, ranks)
        texts = [self._texts[row] for row in rows_from(position, size, len(self._texts), args.prompt_seed)]
        n_tokens = sum(len(targets) for _, targets in texts)
        own = ranks.share(texts)
        chunks = budget_chunks(
            [len(context) + len(targets) for context, targets in own],
            max_rows=args.per_device_train_batch_size,
            max_tokens=args.max_tokens_per_batch,
        )
        batches = []
        for chunk in chunks:
            contexts = [own[i][0] for i in chunk]
            targets = [own[i][1] for i in chunk]
            sequences = pack_sequences(contexts, targets, self._pad_token_id, ranks.device)
            batches.append(TextBatch(sequences, n_tokens, share=1 / len(chunks)))
        return batches


def texts_per_step(args: PPOConfig, ranks: Ranks) -> int:
    """Number of texts of an optimizer step, over all processes."""
    return (args.ptx_batch_size or args.minibatch_size) * ranks.count


def text_loss(logprobs: Tensor, n_tokens: int) -> Tensor:
    """Share of a batch in the mean cross-entropy: −Σ log π / `n_tokens`.

    Args:
        logprobs: (N,) log-probabilities of the target tokens of the batch, in nats.
        n_tokens: number of target tokens of the whole optimizer step.

    Returns:
        A scalar, in nats per token.
    """
    return -logprobs.sum() / n_tokens


def encode_texts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_positions: int, *, unrenderable: str = "drop"
) -> list[tuple[list[int], list[int]]]:
    """Tokenizes texts.

    Args:
        dataset: rows with `text` (all tokens except the first are targets), with `prompt` and `completion`, or with
            `messages` that end with a message of the assistant (the tokens of the completion are targets).
        tokenizer: tokenizer of the policy.
        max_positions: longer texts are cut to this number of tokens.
        unrenderable: `error` refuses a row that the chat template cannot render, `drop` leaves it out with a warning.

    Returns:
        The context ids and target ids of each row.

    Raises:
        UserError: if the columns are missing or a row has no targets; the message names the row.
    """
    columns = set(dataset.column_names)
    if not ({"text"} <= columns or {"prompt", "completion"} <= columns or {"messages"} <= columns):
        raise UserError(
            f"ptx_dataset has only the columns {sorted(columns)}: rename yours to 'text', to 'prompt' and "
            "'completion', or to 'messages'."
        )
    encoded = []
    report = LoadReport(source="ptx_dataset", rows_in=len(dataset), kept=len(dataset))
    for row, example in enumerate(without_arrow_fill(dataset)):
        try:
            context, targets = _encode_row(example, row, tokenizer)
        except Unrenderable as error:
            if unrenderable == "error":
                raise refused_row(f"ptx_dataset row {row}", error.reason) from error
            report.drop(error.reason, row)
            report.kept -= 1
            continue
        targets = targets[: max(0, max_positions - len(context))]
        if not context or not targets:
            raise UserError(
                f"ptx_dataset row {row}: there is nothing to learn within {max_positions} tokens: drop or shorten the "
                "row."
            )
        encoded.append((context, targets))
    if report.dropped:
        if not encoded:
            raise UserError(f"{report.summary()}: no text is left: use a policy whose chat template renders them.")
        logger.warning(report.summary())
    if not encoded:
        raise UserError("ptx_dataset is empty: give it rows, or leave it out.")
    return encoded


def _encode_row(example: dict, row: int, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    if "text" in example:
        ids = without_second_start(tokenizer, tokenizer(example["text"] or "")["input_ids"])
        return ids[:1], ids[1:]  # the first token has no context to be predicted from
    if "messages" in example:
        messages = example["messages"]
        if not is_messages(messages) or messages[-1]["role"] != "assistant":
            raise UserError(
                f"ptx_dataset row {row}: `messages` must end with a message of the assistant: fix or drop the row."
            )
        prompt = messages[:-1]
        completion = messages[-1:]
    else:
        prompt = example["prompt"]
        completion = example["completion"]
    options = template_options(example)
    return encode_prompt(tokenizer, prompt, options), encode_completion(tokenizer, prompt, completion, options)
