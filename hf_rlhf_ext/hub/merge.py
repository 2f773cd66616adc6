"""A run's adapter merged into its base: one plain model, for people and engines without PEFT (llama.cpp among them)."""

import json
from pathlib import Path

from ..errors import UserError
from ..modeling.loading import adapter_base, attach_adapter, load_base_model, load_tokenizer


def merge_run(
    folder: str | Path, output_dir: str | Path, *, dtype: str = "bfloat16", base_model: str | None = None
) -> Path:
    """Writes the merged model, its tokenizer and its report (with a card that says so) to `output_dir`.

    The base is loaded again, unquantised: merging into 4-bit weights would round the update away. `base_model` names it
    where the adapter's own name for it does not serve.
    """
    folder, output_dir = Path(folder), Path(output_dir)
    base_id = base_model or adapter_base(str(folder))
    if base_id is None:
        raise UserError(f"merge: {folder} holds no adapter: there is nothing to merge.")
    if (folder / "reward_normalization.json").is_file():
        from ..reward.export import export_merged

        export_merged(folder, output_dir, dtype=dtype, base=base_id)
    else:
        base = load_base_model(base_id, dtype=dtype, load_in_4bit=False)
        if getattr(base, "is_quantized", False):
            raise UserError(f"merge: {base_id} is itself quantised: give the full weights' id with base_model.")
        attach_adapter(base, folder).merge_and_unload().save_pretrained(output_dir)
        load_tokenizer(str(folder)).save_pretrained(output_dir)
    if (folder / "report.json").is_file():
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        if "card" in report:
            report["card"]["relation"] = "merge"
            if plot := report["card"].get("plot"):
                (output_dir / plot).write_bytes((folder / plot).read_bytes())
        (output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return output_dir
