"""Export of a reward model as an ordinary model folder, which plain Transformers can load."""

import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from ..data.prompt_form import PromptForm
from ..errors import UserError
from ..modeling.adapters import bare_model
from ..modeling.loading import resolve_dtype
from ..modeling.merging import merge_into_base
from ..modeling.quantization import describe_quantization, quantization_record
from .asked import FormOfTraining
from .scorer import RewardNormalization, RewardScorer, local_folder

PROBE_TEXTS = (("Tell me about rain.", "Rain waters the fields."), ("Tell me about rain.", ""), ("", "No."))
"""Prompts and completions whose scores are compared before and after the merge."""

_NAMED_FOR_PADDING = re.compile("pad|reserved|unused|extra|dummy", re.IGNORECASE)


def export_merged(
    folder_or_repo: str | Path,
    output_dir: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    pad_token: str | None = None,
    **options: Any,
) -> float:
    """Merges a reward adapter into its base and writes a folder for `AutoModelForSequenceClassification`.

    `pipeline("text-classification")` on this folder, called with `RewardScorer.text(prompt, completion)`, returns the
    raw score up to rounding. For this, the folder has a separate pad token (Transformers reads the score before the
    first pad token on the right) and `problem_type="regression"` (otherwise the pipeline applies a sigmoid). Prompt and
    completion are tokenized separately in training, so that a score may differ if one token spans both. Mean and
    standard deviation of the scores are in `reward_normalization.json`, and in `config.json` as `reward_mean` and
    `reward_std`; the merged model does not apply them.

    Args:
        folder_or_repo: local folder or Hub id of the reward model.
        output_dir: folder to write.
        dtype: dtype of the merged weights. bf16 changes scores by about 1e-2.
        pad_token: a token of the vocabulary that occurs in no text; `None` means one that the tokenizer does not use.
        options: options of `RewardScorer.from_pretrained`, such as `revision`, or `base` as a name.

    Returns:
        The largest difference between the raw scores of three short texts before and after the merge. It is rounding
        after training in fp32, up to about 1e-2 after training in bf16, and includes the effect of quantization after
        QLoRA.

    Raises:
        UserError: if `base` is a loaded model, if `pad_token` is not in the vocabulary, or if the adapter has no
            weights to merge (prompt learning), or if PEFT cannot merge its kind.
    """
    if not isinstance(options.get("base"), str | None):
        raise UserError(
            "export_merged: a loaded base is not supported, as the base is loaded twice: pass base= as a name."
        )
    options = {"device": "cpu"} | options  # two copies may not fit on a small GPU
    dtype = resolve_dtype(dtype)

    as_trained = _scorer_of_texts(folder_or_repo, options)
    padding = _check_padding(as_trained.tokenizer, pad_token)
    prompts = [prompt for prompt, _ in PROBE_TEXTS]
    completions = [completion for _, completion in PROBE_TEXTS]
    scores_before = as_trained.raw(prompts, completions)
    del as_trained  # before the second copy is loaded

    # Merging into quantized weights would quantize the sum again and lose the update.
    options |= {"dtype": dtype, "load_in_4bit": False}
    form = PromptForm.load(local_folder(folder_or_repo, options.get("revision")))
    scorer = _scorer_of_texts(folder_or_repo, options)
    _check_not_quantized(scorer.model)
    texts = [scorer.text(prompt, completion) for prompt, completion in PROBE_TEXTS]
    device = scorer.model.device
    token_ids = _save_merged(scorer, output_dir, dtype=dtype, pad_token=padding, texts=texts)
    form.save(output_dir)
    del scorer  # frees memory before the merged model is loaded
    scores_after = _plain_scores(output_dir, token_ids, device, options.get("trust_remote_code", False))
    differences = [abs(before - after) for before, after in zip(scores_before, scores_after, strict=True)]
    return max(differences)


def _scorer_of_texts(folder_or_repo: str | Path, options: dict[str, Any]) -> RewardScorer:
    """The reward model without the form of its training: the texts of the comparison go into no chat template."""
    scorer = RewardScorer.from_pretrained(folder_or_repo, **options)
    scorer.asked = FormOfTraining(PromptForm())
    return scorer


def _check_padding(tokenizer: PreTrainedTokenizerBase, pad_token: str | None) -> str:
    """The pad token of the merged model; raises `UserError` if it is not in the vocabulary."""
    pad_token = pad_token or own_pad_token(tokenizer)
    if pad_token not in tokenizer.get_vocab():
        raise UserError(
            f"pad_token: {pad_token!r} is not in the vocabulary: choose a token of the vocabulary that occurs in no "
            "text."
        )
    return pad_token


def _check_not_quantized(model: PreTrainedModel | PeftModel) -> None:
    record = quantization_record(model)
    if record is not None:
        raise UserError(
            f"export_merged: the checkpoint of the base is quantized ({describe_quantization(record)}), and a merge "
            "would quantize the sum again: pass base= with the name of the model that is not quantized."
        )


def _save_merged(
    scorer: RewardScorer, output_dir: str | Path, *, dtype: torch.dtype, pad_token: str, texts: list[str]
) -> list[list[int]]:
    """Writes model, tokenizer and normalization; returns the token ids of `texts` under the saved tokenizer."""
    if isinstance(scorer.model, PeftModel):
        model = merge_into_base(scorer.model, "export_merged", "load the adapter with RewardScorer.from_pretrained")
    else:
        model = bare_model(scorer.model)
    tokenizer = scorer.tokenizer
    tokenizer.pad_token = pad_token

    config = model.config
    config.pad_token_id = tokenizer.pad_token_id
    config.get_text_config().pad_token_id = tokenizer.pad_token_id
    config.problem_type = "regression"  # otherwise a pipeline applies a sigmoid to a single label
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
    """Scores of token lists by the model in `folder`, loaded with plain Transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype="auto", trust_remote_code=trust_remote_code
    )
    model.to(device).eval()
    scores = []
    for ids in token_ids:
        scores.append(model(torch.tensor([ids], device=device)).logits.item())
    return scores


def own_pad_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Finds a pad token that occurs in no text: that of the tokenizer, or else an unused special token.

    Args:
        tokenizer: tokenizer of the reward model.

    Raises:
        UserError: if every special token is in use.
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
        raise UserError(f"tokenizer {tokenizer.name_or_path!r}: no special token is free for padding: pass pad_token.")
    for token in free_tokens:
        if _NAMED_FOR_PADDING.search(token):  # its name suggests that it occurs in no text
            return token
    return free_tokens[0]
