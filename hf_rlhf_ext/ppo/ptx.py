"""PPO-ptx: text whose language-model loss is mixed into the update, so that PPO forgets less of it."""

from dataclasses import dataclass

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.text import encode_completion, encode_prompt, is_messages
from ..errors import UserError
from .batching import budget_chunks
from .config import PPOConfig
from .prompts import prompt_indices
from .ranks import Ranks
from .rollout import Sequences, pack_sequences


@dataclass
class TextBatch:
    """Texts that go through the model together.

    `sequences`: contexts as prompts, targets as completions. `n_tokens`: targets of the whole step on all processes, by
    which the loss is divided. `share`: weight of this part in the step's mean.
    """

    sequences: Sequences
    n_tokens: int
    share: float


class PTXTexts:
    """The texts of PPO-ptx, encoded once.

    Args:
        dataset: rows of `text`, of `prompt` and `completion`, or of `messages`; None: there is no text.
        max_positions: longer texts are cut at so many tokens.
    """

    def __init__(
        self, dataset: Dataset | None, tokenizer: PreTrainedTokenizerBase, args: PPOConfig, *, max_positions: int
    ):
        if (dataset is None) != (args.ptx_coef == 0):
            raise UserError("PPO-ptx needs both ptx_dataset and a ptx_coef above 0: give the other one, or neither.")
        self._pad_token_id = tokenizer.pad_token_id
        self._texts: list[tuple[list[int], list[int]]] = []
        if dataset is not None:
            self._texts = encode_texts(dataset, tokenizer, max_positions)

    def batches(self, step: int, args: PPOConfig, ranks: Ranks) -> list[TextBatch]:
        """This process's texts of an optimizer step: a function of the step and the seed alone."""
        if not self._texts:
            return []
        size = (args.ptx_batch_size or args.minibatch_size) * ranks.count
        # Drawn as prompts are, so that a resumed run sees the texts of an uninterrupted one.
        texts = [self._texts[row] for row in prompt_indices(step, size, len(self._texts), args.seed)]
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


def text_loss(logprobs: Tensor, n_tokens: int) -> Tensor:
    """This part's share of the mean cross-entropy: −Σ log π / `n_tokens`, a scalar in nats per token."""
    return -logprobs.sum() / n_tokens


def encode_texts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_positions: int
) -> list[tuple[list[int], list[int]]]:
    """(context ids, target ids) of every row; longer ones are cut at `max_positions` tokens.

    Rows have `text` (all of it is learned, except the first token), `prompt` and `completion`, or `messages` that end
    with an answer (only the answer is learned). Raises `UserError` with the row.
    """
    columns = set(dataset.column_names)
    if not ({"text"} <= columns or {"prompt", "completion"} <= columns or {"messages"} <= columns):
        raise UserError(
            f"ptx_dataset has no 'text', no 'prompt' with 'completion', and no 'messages', only {sorted(columns)}."
        )
    encoded = []
    for row, example in enumerate(dataset):
        context, targets = _encode_row(example, row, tokenizer)
        targets = targets[: max(0, max_positions - len(context))]
        if not context or not targets:
            raise UserError(f"ptx_dataset row {row}: nothing to learn in {max_positions} tokens: drop or shorten it.")
        encoded.append((context, targets))
    if not encoded:
        raise UserError("ptx_dataset is empty: give it rows, or leave it out.")
    return encoded


def _encode_row(example: dict, row: int, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    if "text" in example:
        ids = tokenizer(example["text"] or "")["input_ids"]
        return ids[:1], ids[1:]  # the first token has nothing before it to be predicted from
    if "messages" in example:
        messages = example["messages"]
        if not is_messages(messages) or messages[-1]["role"] != "assistant":
            raise UserError(f"ptx_dataset row {row}: `messages` must end with one of the assistant.")
        prompt = messages[:-1]
        completion = messages[-1:]
    else:
        prompt = example["prompt"]
        completion = example["completion"]
    return encode_prompt(tokenizer, prompt), encode_completion(tokenizer, prompt, completion)
