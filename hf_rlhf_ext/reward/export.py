"""A reward model as one ordinary model folder, for people who have only Transformers."""

import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from ..errors import UserError
from ..modeling.adapters import bare_model
from ..modeling.loading import resolve_dtype
from .scorer import RewardNormalization, RewardScorer

_TRIED = (("Tell me about rain.", "Rain waters the fields."), ("Tell me about rain.", ""), ("", "No."))


def export_merged(
    folder_or_repo: str | Path,
    output_dir: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    pad_token: str | None = None,
    **options: Any,
) -> float:
    """Merges a reward adapter into an unquantised base and writes a folder for `AutoModelForSequenceClassification`.

    `pipeline("text-classification")` on it gives the raw scores of `RewardScorer.text(prompt, completion)`, as the
    folder has a pad token of its own (Transformers reads the score before the first pad token on the right) and
    `problem_type="regression"` (which keeps the pipeline from a sigmoid): to rounding, wherever no token spans the
    border of prompt and completion, which are tokenised apart in training. Mean and deviation are in
    `reward_normalization.json` and, as `reward_mean` and `reward_std`, in `config.json`: a decoder's head has no bias
    that could hold them.

    Args:
        folder_or_repo: what `RewardScorer.from_pretrained` loads, with `options` (`base` by its name, `revision`, …).
        output_dir: folder to write.
        dtype: of the merged weights; bf16 moves scores by about 1e-2.
        pad_token: a token of the vocabulary that no text holds; by default one that the tokenizer does not use
            otherwise.

    Returns:
        The largest difference of the scores on three short texts, unmerged as trained and merged as a pipeline reads
        them, in units of the raw score: rounding where the model was trained in fp32, up to some 1e-2 after training in
        bf16, and what the quantisation of the base did after QLoRA.

    Raises:
        UserError: a loaded `base`, a `pad_token` that is no token, or an adapter that has no weights to merge.
    """
    if not isinstance(options.get("base"), str | None):
        raise UserError("export_merged: it loads the base twice, unquantised the second time: pass base= by its name.")
    options = {"device": "cpu"} | options  # two copies, one of them in `dtype`: not for a small card
    found = RewardScorer.from_pretrained(folder_or_repo, **options)
    prompts, completions = map(list, zip(*_TRIED, strict=True))
    before = found.raw(prompts, completions)
    padding = pad_token or own_pad_token(found.tokenizer)
    if padding not in found.tokenizer.get_vocab():
        raise UserError(f"pad_token: {padding!r} is not in the vocabulary: name a token of it that no text holds.")
    if isinstance(found.model, PeftModel) and found.model.active_peft_config.is_prompt_learning:
        raise UserError("export_merged: virtual tokens of a prompt-learning adapter cannot be merged into weights.")
    del found
    options |= {"dtype": resolve_dtype(dtype), "load_in_4bit": False}
    scorer = RewardScorer.from_pretrained(folder_or_repo, **options)
    model = scorer.model.merge_and_unload() if isinstance(scorer.model, PeftModel) else bare_model(scorer.model)
    texts = [scorer.text(prompt, completion) for prompt, completion in _TRIED]
    scorer.tokenizer.pad_token = padding
    config = model.config
    config.get_text_config().pad_token_id = config.pad_token_id = scorer.tokenizer.pad_token_id
    config.problem_type, config.id2label, config.label2id = "regression", {0: "reward"}, {"reward": 0}
    config.reward_mean, config.reward_std = scorer.mean, scorer.std
    model.save_pretrained(output_dir)
    scorer.tokenizer.save_pretrained(output_dir)
    stored = str(options["dtype"]).removeprefix("torch.")
    RewardNormalization(mean=scorer.mean, std=scorer.std, base_dtype=stored).save(output_dir)
    device, sequences = model.device, [scorer.tokenizer(text)["input_ids"] for text in texts]
    del model, scorer  # room for the one that others will load, its head rounded
    remote = options.get("trust_remote_code", False)
    plain = AutoModelForSequenceClassification.from_pretrained(output_dir, dtype="auto", trust_remote_code=remote)
    with torch.no_grad():
        after = [plain.to(device).eval()(torch.tensor([ids], device=device)).logits.item() for ids in sequences]
    return max(abs(a - b) for a, b in zip(before, after, strict=True))


def own_pad_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """A pad token that no text holds: the tokenizer's own, else a special token that nothing uses.

    Raises:
        UserError: every special token is in use.
    """
    used = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.cls_token, tokenizer.sep_token}
    if tokenizer.pad_token is not None and tokenizer.pad_token not in used:
        return tokenizer.pad_token
    template = str(tokenizer.chat_template or "")
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    free = [token for token in special if token not in used and token not in template]
    telling = [token for token in free if re.search("pad|reserved|unused|extra|dummy", token, re.IGNORECASE)]
    if not free:
        raise UserError(f"tokenizer {tokenizer.name_or_path!r}: no special token is free for padding: pass pad_token=.")
    return (telling or free)[0]
