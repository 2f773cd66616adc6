"""Merges the adapter of a run into its base, which gives a plain model for use without PEFT (for example in llama.cpp).

`hf_rlhf_ext.cli.merge` is the command.
"""

import json
import shutil
from pathlib import Path

import torch
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from ..checkpointing import require_writable
from ..compat import versions
from ..data.prompt_form import PromptForm
from ..errors import UserError
from ..modeling.adapter_kinds import refuse_lost_start
from ..modeling.loading import attach_adapter, load_base_model, load_tokenizer, resolve_dtype
from ..modeling.locations import resolve_location
from ..modeling.lookup import base_and_revision, found_or_refused, has_tokenizer
from ..modeling.merging import merge_into_base, merge_problem
from ..modeling.probing import LOGPROB_ROUNDING, mean_difference
from ..modeling.quantization import stored_quantization
from ..reward.ensemble import ENSEMBLE_FILE
from ..reward.export import export_merged
from ..reward.normalization import NORMALIZATION_FILE
from .merge_check import (
    PolicyProbe,
    check_merged,
    check_scores,
    measured_as_trained,
    warn_of_lost_update,
    warn_of_other_precision,
)
from .report import REPORT_FILE, MergeRecord, RunReport
from .reports.folder_report import report_of_folder

MARKER = "hf_rlhf_ext.json"
"""File in every folder of merged models, as in those of recipes: only a folder with it is ever emptied."""
_MADE_BY = "hf_rlhf_ext merge"


def merge_run(
    folder: str | Path,
    output_dir: str | Path,
    *,
    dtype: str = "bfloat16",
    base_model: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Merges the adapter of a policy or reward model into its base.

    Writes the merged model, its tokenizer and its report to `output_dir`, which `push_run` can push. The base is loaded
    again without quantization, since merging into 4-bit weights would lose most of the update to rounding.

    Args:
        folder: Folder of the adapter, written by a recipe or by `trainer.save_model`.
        output_dir: Folder to write.
        dtype: Data type of the merged weights: `"bfloat16"`, `"float16"` or `"float32"`.
        base_model: Path or Hub id of the base; the default is the base recorded in the adapter.
        overwrite: Whether to replace a merged model in `output_dir`. Other files are never replaced.

    Returns:
        `output_dir`.

    Raises:
        UserError: `folder` has no adapter, an adapter of its kind cannot be merged, the base is quantized, `output_dir`
            is not empty or cannot be written, or what was written is another model than the adapter on its base.
    """
    folder = Path(folder)
    output_dir = Path(output_dir)
    if not folder.is_dir():
        raise UserError(f"merge: no folder {folder}: give the folder of an adapter.")
    revision = None
    base_id = base_model
    if base_id is None:  # recorded in the adapter, perhaps with a revision
        base_id, revision = base_and_revision(str(folder))
    if base_id is None:
        what = "check the path"
        if (folder / "config.json").is_file():
            what = "it is a whole model, which opens as it is"
        if (folder / ENSEMBLE_FILE).is_file():
            what = "it is an ensemble, whose members are merged one by one"
        raise UserError(f"merge: {folder} holds no adapter, so there is nothing to merge: {what}.")
    if output_dir.resolve() == folder.resolve():
        raise UserError(f"merge: {output_dir} is the adapter's own folder: give another one for the merged model.")
    dtype = _dtype_name(dtype)
    report = _read_report(folder)  # a wrong one is refused before anything is loaded
    _refuse_early(folder, base_id, revision)
    _make_output_dir(output_dir, overwrite=overwrite)
    merge = MergeRecord(dtype, _public_name(base_id, revision))
    if (folder / NORMALIZATION_FILE).is_file():  # a reward model, whose head is merged too
        merge.max_score_difference = export_merged(folder, output_dir, dtype=dtype, base=base_model)
        check_scores(merge.max_score_difference, folder, output_dir, dtype)
    else:
        merge.mean_logprob_difference = _merge_policy(folder, output_dir, base_id, revision, dtype)
    report = report or report_of_folder(folder)  # the merged folder alone does not know its base
    if report is not None:
        _write_report(report, folder, output_dir, merge, base_model)
    return output_dir


def _dtype_name(dtype: str | torch.dtype) -> str:
    """The name of a dtype that merged weights may have."""
    resolved = resolve_dtype(dtype)
    if resolved not in LOGPROB_ROUNDING:  # others are not computed in, so that the result could not be checked
        raise UserError(f"dtype: merged weights are bfloat16, float16 or float32, not {dtype}: choose one of these.")
    return str(resolved).removeprefix("torch.")


def _make_output_dir(folder: Path, *, overwrite: bool) -> None:
    """Makes the folder, and empties it if it holds an earlier merged model that may be replaced.

    Raises:
        UserError: The folder holds something else, or an earlier merged model without `overwrite`.
    """
    require_writable(folder)
    content = [path for path in folder.iterdir() if path.name != MARKER]
    if content and not _is_merged(folder):
        raise UserError(f"merge: {folder} is not empty, and is no merged model: give another output_dir.")
    if content and not overwrite:
        raise UserError(f"merge: {folder} holds a merged model: give another output_dir, or pass --overwrite.")
    for path in content:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    marker = {"made_by": _MADE_BY, "versions": versions()}
    (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


def _is_merged(folder: Path) -> bool:
    """True for a folder that `merge_run` made."""
    try:
        return json.loads((folder / MARKER).read_text(encoding="utf-8")).get("made_by") == _MADE_BY
    except (OSError, ValueError, AttributeError):
        return False


def _refuse_early(folder: Path, base_id: str, revision: str | None) -> None:
    """Raises `UserError` for adapters and bases of which it is known, without any weights, that they do not merge."""
    config = PeftConfig.from_pretrained(str(folder))
    problem = merge_problem(config)
    if problem is not None:
        raise UserError(f"merge: {problem}: load the adapter with {_loader(folder)}.")
    refuse_lost_start(folder, config, is_trainable=False)
    path, location = resolve_location(base_id, revision)
    with found_or_refused("base_model", base_id):
        stored = stored_quantization(path, **location)
    if stored is not None:
        raise UserError(f"merge: {base_id} is itself quantized: give the unquantized model as base_model.")


def _loader(folder: Path) -> str:
    """The function that loads an adapter without a merge."""
    is_reward_model = (folder / NORMALIZATION_FILE).is_file()
    return "RewardScorer.from_pretrained" if is_reward_model else "load_policy"


def _merge_policy(folder: Path, output_dir: Path, base_id: str, revision: str | None, dtype: str) -> float:
    """Writes the merged policy.

    Returns:
        The mean difference between its log-probabilities and those of the adapter as it was trained, in nats per token.
    """
    tokenizer = _tokenizer(folder, base_id, revision)
    policy = attach_adapter(load_base_model(base_id, dtype=dtype, revision=revision), folder)
    probe = PolicyProbe.of(policy, tokenizer)
    before, effect = probe.measure(policy), probe.effect(policy)
    merge_into_base(policy, "merge", "load the adapter with load_policy").save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    PromptForm.load(folder).save(output_dir)
    del policy  # frees memory before the merged model is loaded
    after = probe.measure(load_base_model(str(output_dir), dtype=dtype))
    check_merged(before, after, output_dir, dtype)
    difference = mean_difference(after.texts, before.texts)
    warn_of_lost_update(difference, effect, dtype)
    trained = measured_as_trained(probe, folder, base_id, revision, dtype)
    if trained is not None:
        difference = mean_difference(after.texts, trained.texts)
        warn_of_other_precision(difference, folder, dtype)
    return difference


def _tokenizer(folder: Path, base_id: str, revision: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder of an adapter, or that of the base that it is merged into."""
    if has_tokenizer(str(folder)):
        return load_tokenizer(str(folder))
    return load_tokenizer(base_id, revision=revision)


def _public_name(base_id: str, revision: str | None) -> str:
    """Returns the name of the merged base for the report. It may differ from `base_model` in the card (a GGUF file)."""
    local = Path(base_id).expanduser()
    if local.exists():
        return local.name
    return f"{base_id}@{revision}" if revision else base_id


def _read_report(folder: Path) -> RunReport | None:
    """The report of the adapter; None if it has none. Raises `UserError` if the file is something else."""
    if not (folder / REPORT_FILE).is_file():
        return None
    try:
        return RunReport.load(folder)
    except (ValueError, TypeError, AttributeError) as error:  # from another version, or edited by hand
        raise UserError(
            f"merge: {folder / REPORT_FILE} is not a report of this library ({error}): remove it."
        ) from error


def _write_report(
    report: RunReport, folder: Path, output_dir: Path, merge: MergeRecord, base_model: str | None
) -> None:
    """Writes the report of the adapter with card options for a merged model, and copies the plot of the card."""
    report.merge = merge
    if report.card is not None:
        report.card.relation = "merge"
        # The card names the base that was merged, if it is on the Hub. A local path is of no use to others.
        if base_model is not None and not Path(base_model).expanduser().exists():
            report.card.base_model = base_model
            report.card.base_revision = None  # of the recorded base
        plot = report.card.plot
        if plot and (folder / plot).is_file():
            shutil.copyfile(folder / plot, output_dir / plot)
    report.save(output_dir)
