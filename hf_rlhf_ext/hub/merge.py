"""A run's adapter merged into its base: one plain model, for people and engines without PEFT (llama.cpp among them)."""

import json
import shutil
from pathlib import Path

from ..errors import UserError
from ..modeling.loading import attach_adapter, base_and_revision, load_base_model, load_tokenizer


def merge_run(
    folder: str | Path, output_dir: str | Path, *, dtype: str = "bfloat16", base_model: str | None = None
) -> Path:
    """Writes the merged model, its tokenizer and its report (with a card that says so) to `output_dir`.

    The base is loaded again, unquantised: merging into 4-bit weights would round the update away. `base_model` names it
    where the adapter's own name for it does not serve.
    """
    folder, output_dir = Path(folder), Path(output_dir)
    base_id, revision = (base_model, None) if base_model else base_and_revision(str(folder))
    difference = None
    if base_id is None:
        raise UserError(f"merge: {folder} holds no adapter: there is nothing to merge.")
    if (folder / "reward_normalization.json").is_file():
        from ..reward.export import export_merged

        difference = export_merged(folder, output_dir, dtype=dtype, base=base_model)
    else:
        base = load_base_model(base_id, dtype=dtype, load_in_4bit=False, revision=revision)
        if getattr(base, "is_quantized", False):
            raise UserError(f"merge: {base_id} is itself quantised: give the full weights' id with base_model.")
        attach_adapter(base, folder).merge_and_unload().save_pretrained(output_dir)
        load_tokenizer(str(folder)).save_pretrained(output_dir)
    if (folder / "report.json").is_file():
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        # What was merged into, which may be other weights than those that the card's `base_model` names: a GGUF file's.
        local = Path(base_id).expanduser()
        named = local.name if local.exists() else base_id + (f"@{revision}" if revision else "")
        report["merge"] = {"dtype": dtype, "base": named, "max_score_difference": difference}
        if "card" in report:
            report["card"]["relation"] = "merge"
            if (plot := report["card"].get("plot")) and (folder / plot).is_file():
                shutil.copyfile(folder / plot, output_dir / plot)
        (output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return output_dir
