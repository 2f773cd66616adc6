"""Merges the adapter of a run into its base, which gives a plain model for use without PEFT (for example in llama.cpp).

`hf_rlhf_ext.cli.merge` is the command.
"""

import json
import shutil
from pathlib import Path

from torch import Tensor

from ..checkpointing import require_writable
from ..compat import versions
from ..data.prompt_form import PromptForm
from ..errors import UserError
from ..modeling.loading import attach_adapter, base_and_revision, load_base_model, load_tokenizer, resolve_dtype
from ..modeling.merging import merge_into_base
from ..modeling.probing import LOGPROB_ROUNDING, mean_difference, probe_logprobs
from ..reward.ensemble import ENSEMBLE_FILE
from ..reward.export import export_merged
from ..reward.normalization import NORMALIZATION_FILE
from .report import REPORT_FILE, MergeRecord, RunReport

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
        UserError: `folder` has no adapter, the base is quantized, or `output_dir` is not empty or cannot be written.
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
    _read_report(folder)  # a wrong one is refused before anything is loaded
    _make_output_dir(output_dir, overwrite=overwrite)
    difference = None
    if (folder / NORMALIZATION_FILE).is_file():  # a reward model, whose head is merged too
        difference = export_merged(folder, output_dir, dtype=dtype, base=base_model)
    else:
        _merge_policy(folder, output_dir, base_id, revision, dtype)
    if (folder / REPORT_FILE).is_file():
        merge = MergeRecord(dtype, _public_name(base_id, revision), difference)
        _write_report(folder, output_dir, merge, base_model)
    return output_dir


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


def _merge_policy(folder: Path, output_dir: Path, base_id: str, revision: str | None, dtype: str) -> None:
    base = load_base_model(base_id, dtype=dtype, load_in_4bit=False, revision=revision)
    if getattr(base, "is_quantized", False):
        raise UserError(f"merge: {base_id} is itself quantized: give the unquantized model as base_model.")
    policy = attach_adapter(base, folder)
    before = probe_logprobs(policy)
    merge_into_base(policy, "merge", "load the adapter with load_policy").save_pretrained(output_dir)
    load_tokenizer(str(folder)).save_pretrained(output_dir)
    PromptForm.load(folder).save(output_dir)
    del base, policy  # frees memory before the merged model is loaded
    _check_merged(before, output_dir, dtype)


def _check_merged(before: Tensor, output_dir: Path, dtype: str) -> None:
    """Raises `UserError` if the model that was written computes something else than the adapter on its base."""
    merged = load_base_model(str(output_dir), dtype=dtype)
    difference = mean_difference(probe_logprobs(merged), before)
    limit = LOGPROB_ROUNDING[resolve_dtype(dtype)]
    if not difference <= limit:
        raise UserError(
            f"merge: the model in {output_dir} is not the adapter on its base: log-probabilities differ by "
            f"{difference:.2g} nats on average, where {dtype} explains {limit:g}: remove it, and load the adapter with "
            "load_policy."
        )


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


def _write_report(folder: Path, output_dir: Path, merge: MergeRecord, base_model: str | None) -> None:
    """Writes the report of the adapter with card options for a merged model, and copies the plot of the card."""
    report = _read_report(folder)
    report.merge = merge
    if report.card is not None:
        report.card.relation = "merge"
        # The card names the base that was merged, if it is on the Hub. A local path is of no use to others.
        if base_model is not None and not Path(base_model).expanduser().exists():
            report.card.base_model = base_model
        plot = report.card.plot
        if plot and (folder / plot).is_file():
            shutil.copyfile(folder / plot, output_dir / plot)
    report.save(output_dir)
