"""A reward model as one ordinary model folder, for people who have only Transformers."""

import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from ..modeling.adapters import bare_model
from ..modeling.loading import resolve_dtype
from .scorer import RewardNormalization, RewardScorer

PROBE_TEXTS = (("Tell me about rain.", "Rain waters the fields."), ("Tell me about rain.", ""), ("", "No."))
"""(prompt, completion) whose scores are compared before and after the merge."""

_NAMED_FOR_PADDING = re.compile("pad|reserved|unused|extra|dummy", re.IGNORECASE)


def export_merged(
    folder_or_repo: str | Path,
    output_dir: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    pad_token: str | None = None,
    **options: Any,
) -> float:
    """Merges a reward adapter into an unquantized base and writes a folder for `AutoModelForSequenceClassification`.

    `pipeline("text-classification")` on it gives the raw scores of `RewardScorer.text(prompt, completion)`, as the
    folder has a pad token of its own (Transformers reads the score before the first pad token on the right) and
    `problem_type="regression"` (which keeps the pipeline from a sigmoid): to rounding, wherever no token spans the
    border of prompt and completion, which are tokenized apart in training. Mean and deviation are in
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
        bf16, and what the quantization of the base did after QLoRA.

    Raises:
        UserError: a loaded `base`, a `pad_token` that is no token, or an adapter that has no weights to merge.
    """
    if not isinstance(options.get("base"), str | None):
        raise UserError("export_merged: it loads the base twice, unquantized the second time: pass base= by its name.")
    options = {"device": "cpu"} | options  # two copies, one of them in `dtype`: not for a small card
    dtype = resolve_dtype(dtype)

    as_trained = RewardScorer.from_pretrained(folder_or_repo, **options)
    padding = _check_padding(as_trained.tokenizer, pad_token)
    _check_can_merge(as_trained.model)
    prompts = [prompt for prompt, _ in PROBE_TEXTS]
    completions = [completion for _, completion in PROBE_TEXTS]
    scores_before = as_trained.raw(prompts, completions)
    del as_trained  # before the second copy is loaded

    # Merging into quantized weights would quantize the sum again, and lose the update.
    options |= {"dtype": dtype, "load_in_4bit": False}
    scorer = RewardScorer.from_pretrained(folder_or_repo, **options)
    texts = [scorer.text(prompt, completion) for prompt, completion in PROBE_TEXTS]
    device = scorer.model.device
    token_ids = _save_merged(scorer, output_dir, dtype=dtype, pad_token=padding, texts=texts)
    del scorer  # room for the one that others will load, its head rounded
    scores_after = _plain_scores(output_dir, token_ids, device, options.get("trust_remote_code", False))
    differences = [abs(before - after) for before, after in zip(scores_before, scores_after, strict=True)]
    return max(differences)


def _check_padding(tokenizer: PreTrainedTokenizerBase, pad_token: str | None) -> str:
    """The pad token of the merged model; raises `UserError` where it is no token."""
    pad_token = pad_token or own_pad_token(tokenizer)
    if pad_token not in tokenizer.get_vocab():
        raise UserError(f"pad_token: {pad_token!r} is not in the vocabulary: name a token of it that no text holds.")
    return pad_token


def _check_can_merge(model: PreTrainedModel | PeftModel) -> None:
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise UserError("export_merged: virtual tokens of a prompt-learning adapter cannot be merged into weights.")


def _save_merged(
    scorer: RewardScorer, output_dir: str | Path, *, dtype: torch.dtype, pad_token: str, texts: list[str]
) -> list[list[int]]:
    """Writes model, tokenizer and normalization; returns the tokens of `texts` as the saved tokenizer makes them."""
    if isinstance(scorer.model, PeftModel):
        model = scorer.model.merge_and_unload()
    else:
        model = bare_model(scorer.model)
    tokenizer = scorer.tokenizer
    tokenizer.pad_token = pad_token

    config = model.config
    config.pad_token_id = tokenizer.pad_token_id
    config.get_text_config().pad_token_id = tokenizer.pad_token_id
    config.problem_type = "regression"  # a pipeline puts a sigmoid on a single label otherwise
    config.id2label = {0: "reward"}
    config.label2id = {"reward": 0}
    config.reward_mean = scorer.mean
    config.reward_std = scorer.std

    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    base_dtype = str(dtype).removeprefix("torch.")
    RewardNormalization(mean=scorer.mean, std=scorer.std, base_dtype=base_dtype).save(output_dir)
    return [tokenizer(text)["input_ids"] for text in texts]


@torch.no_grad()
def _plain_scores(
    folder: str | Path, token_ids: list[list[int]], device: torch.device, trust_remote_code: bool
) -> list[float]:
    """Scores of token lists by the model in `folder` as Transformers alone loads it."""
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype="auto", trust_remote_code=trust_remote_code
    )
    model.to(device).eval()
    scores = []
    for ids in token_ids:
        scores.append(model(torch.tensor([ids], device=device)).logits.item())
    return scores


def own_pad_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """A pad token that no text holds: the tokenizer's own, else a special token that nothing uses.

    Raises:
        UserError: every special token is in use.
    """
    used = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.cls_token, tokenizer.sep_token}
    if tokenizer.pad_token is not None and tokenizer.pad_token not in used:
        return tokenizer.pad_token

    template = str(tokenizer.chat_template or "")
    free_tokens = []
    for token in tokenizer.added_tokens_decoder.values():
        if token.special and token.content not in used and token.content not in template:
            free_tokens.append(token.content)
    if not free_tokens:
        raise UserError(f"tokenizer {tokenizer.name_or_path!r}: no special token is free for padding: pass pad_token=.")
    for token in free_tokens:
        if _NAMED_FOR_PADDING.search(token):  # by its name, it is in no text either
            return token
    return free_tokens[0]
