"""PPO-ptx: text whose language-model loss is mixed into the update, so that PPO forgets less of it."""

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data.text import encode_completion, encode_prompt, is_messages
from ..errors import UserError


def encode_texts(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_positions: int) -> list[tuple[list, list]]:
    """(context ids, target ids) of every row; longer ones are cut at `max_positions` tokens.

    Rows have `text` (all of it is learnt, but the first token), `prompt` and `completion`, or `messages` that end with
    an answer (only the answer is learnt). Raises `UserError` with the row.
    """
    columns = set(dataset.column_names)
    if not ({"text"} <= columns or {"prompt", "completion"} <= columns or {"messages"} <= columns):
        raise UserError(
            f"ptx_dataset has no 'text', no 'prompt' with 'completion', and no 'messages', only {sorted(columns)}."
        )
    encoded = []
    for row, example in enumerate(dataset):
        if "text" in columns:
            ids = tokenizer(example["text"] or "")["input_ids"]
            context, targets = ids[:1], ids[1:]
        else:
            if "messages" in columns:
                messages = example["messages"]
                if not is_messages(messages) or messages[-1]["role"] != "assistant":
                    raise UserError(f"ptx_dataset row {row}: `messages` must end with one of the assistant.")
                prompt, completion = messages[:-1], messages[-1:]
            else:
                prompt, completion = example["prompt"], example["completion"]
            context, targets = encode_prompt(tokenizer, prompt), encode_completion(tokenizer, prompt, completion)
        targets = targets[: max(0, max_positions - len(context))]
        if not context or not targets:
            raise UserError(f"ptx_dataset row {row}: nothing to learn in {max_positions} tokens: drop or shorten it.")
        encoded.append((context, targets))
    if not encoded:
        raise UserError("ptx_dataset is empty: give it rows, or leave it out.")
    return encoded
