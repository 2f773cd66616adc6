"""The list "Model details" of a card: base, adapter, precision, prompts, data and license, as far as they are known."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..privacy import strip_local_paths
from ..report import CardOptions, RunReport
from .kinds import adapter_type, bits, quantization, quantization_name
from .markdown import code_span, escape_markdown, joined_words, linked

_ADAPTER_NAMES = {"LORA": "LoRA", "IA3": "IA³", "LOHA": "LoHa", "LOKR": "LoKr", "VERA": "VeRA", "MISS": "MiSS"}
"""Type in PEFT -> how it is written."""
_HEADS = {"classifier", "score"}
"""Names of scalar heads, of which PEFT lists both."""
_SHOWN_DIGITS = 7
_SHOWN_MODULES = 12


def model_details(
    options: CardOptions,
    report: RunReport,
    base_model: str | None,
    *,
    license: str | None,
    language: str | Sequence[str] | None,
) -> list[tuple[str, str]]:
    """Returns labels and their Markdown texts, without what is not known.

    Args:
        options: Options of the card.
        report: What was measured, with how an adapter was merged.
        base_model: Hub id of the base.
        license: Id of the license.
        language: Code of the language, or several.
    """
    details = {
        "Base model": _base(options, base_model),
        "Adapter": _adapter(options),
        "Merged": _merged(report),
        "Precision": _precision(options),
        "Prompt format": _prompts(options),
        "Longest sequence in training": f"{options.max_length} tokens" if options.max_length else "",
        **_data(_named_rows(options), options.datasets),
        "Language": escape_markdown(joined_words(_as_list(language))) if language else "",
        "License": _license(options, license),
    }
    return [(label, text) for label, text in details.items() if text]


def adapter_name(options: CardOptions) -> str:
    """Returns the name of the kind of adapter, such as "LoRA adapter" or "adapter" if that is not known."""
    kind = adapter_type(options)
    if kind is None:
        return "adapter"
    name = _ADAPTER_NAMES.get(kind, kind.replace("_", " "))
    if (options.adapter or {}).get("use_dora"):
        name = "DoRA"
    return f"{name} adapter"


def _base(options: CardOptions, base_model: str | None) -> str:
    if base_model is None:
        return ""
    text = linked(base_model)
    revision = options.base_revision
    if not revision:
        return text
    return f"{text} at revision {_revision(f'https://huggingface.co/{base_model}', revision, is_linked=text[0] == '[')}"


def _revision(address: str, revision: str, *, is_linked: bool = True) -> str:
    """Formats a commit (shortened) or branch, linked to its files."""
    is_commit = len(revision) == 40 and revision.isalnum()
    shown = code_span(revision[:_SHOWN_DIGITS] if is_commit else revision)
    if not is_linked or not revision.replace("/", "").replace(".", "").replace("-", "").replace("_", "").isalnum():
        return shown
    return f"[{shown}]({address}/tree/{revision})"


def _adapter(options: CardOptions) -> str:
    if options.adapter is None or adapter_type(options) is None:
        return ""
    known = dict(options.adapter)
    parts = [escape_markdown(adapter_name(options).removesuffix(" adapter"))]
    known.pop("type")
    for key, label in (("r", "rank"), ("lora_alpha", "α ="), ("lora_dropout", "dropout")):
        value = known.pop(key, None)
        if value not in (None, 0, 0.0):
            parts.append(f"{label} {value}")
    known.pop("use_dora", None)
    if known.pop("use_rslora", None):
        parts.append("rank-stabilized")
    target = known.pop("target_modules", None)
    if target:
        parts.append(f"on {_modules(target)}")
    saved = [name for name in known.pop("modules_to_save", None) or () if name not in _HEADS]
    if saved:
        parts.append(f"{_modules(saved)} trained as a whole")
    rows = known.pop("vocabulary", None)
    if rows:
        parts.append(f"vocabulary resized to {rows} tokens")
    for key, value in known.items():
        if value not in (None, False, [], {}, ""):
            shown = _modules(value) if isinstance(value, list | tuple) else code_span(strip_local_paths(str(value)))
            parts.append(f"{code_span(key)} = {shown}")
    return ", ".join(parts)


def _modules(names: Any) -> str:
    """Formats names of layers, or the expression that selects them."""
    names = [names] if isinstance(names, str) else list(dict.fromkeys(str(name) for name in names))
    if len(names) > _SHOWN_MODULES:  # such as every linear layer by its full name
        names = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    shown = [code_span(name) for name in names[:_SHOWN_MODULES]]
    if len(names) > _SHOWN_MODULES:
        shown.append(f"{len(names) - _SHOWN_MODULES} more")
    return joined_words(shown)


def _merged(report: RunReport) -> str:
    merge = report.merge
    if merge is None:
        return ""
    text = f"in {escape_markdown(merge.dtype)}"
    if merge.mean_logprob_difference is not None:
        text += (
            f"; log-probabilities on probe texts differ from the adapter's by {merge.mean_logprob_difference:.2g} nats "
            "per token on average"
        )
    if merge.max_score_difference is not None:
        text += f"; scores on probe texts differ from the adapter's by at most {merge.max_score_difference:.2g}"
    return text


def _precision(options: CardOptions) -> str:
    trained = "weights" if options.relation == "finetune" else "base"
    parts = []
    if bits(options) is not None:
        text = f"{trained} in {bits(options)} bits ({quantization_name(options)})"
        if bits(options) == 4:
            text += f", computed in {quantization(options).get('bnb_4bit_compute_dtype', 'float32')}"
        parts.append(text)
    elif options.base_dtype:
        parts.append(f"{trained} in {options.base_dtype}")
    if options.autocast:
        parts.append(f"autocast to {options.autocast}")
    is_of_training = not (options.kind == "model" and options.relation == "finetune")
    if parts and is_of_training:
        parts.append("in training")
    return ", ".join(parts)


def _prompts(options: CardOptions) -> str:
    whose = {"base": "the base's chat template", "own": "its own chat template, which is saved with the tokenizer"}
    template = whose.get(options.chat_template or "", "the tokenizer's chat template")
    if options.prompt_form == "text":
        return "plain text, without a chat template"
    if options.prompt_form == "messages":
        return f"messages, in {template}"
    if options.prompt_form == "mixed":
        return f"plain text, and messages in {template}"
    return ""


def _named_rows(options: CardOptions) -> list[Mapping[str, Any]]:
    """The records of the data. Rows of SFT without prompts are called texts."""
    roles = {"demonstrations": "texts"} if options.only_text else {}
    return [{**record, "role": roles.get(record.get("role"), record.get("role"))} for record in options.data]


def _data(records: Sequence[Mapping[str, Any]], on_hub: Collection[str]) -> dict[str, str]:
    """Returns the datasets by what they were for, in the order of the report."""
    lines: dict[str, list[str]] = {}
    for record in records:
        role = record.get("role")
        if role == "evaluation":
            lines.setdefault("Evaluation data", []).append(_dataset(record, on_hub))
        else:
            lines.setdefault("Training data", []).append(_dataset(record, on_hub, escape_markdown(str(role or ""))))
    return {label: "; ".join(filter(None, texts)) for label, texts in lines.items()}


def _dataset(record: Mapping[str, Any], on_hub: Collection[str], role: str = "") -> str:
    """Formats a dataset, such as "comparisons: [alice/pairs](…) (900 rows)", or "comparisons (900 rows)"."""
    name, revision = record.get("name"), record.get("revision")
    facts = []
    if record.get("set"):
        facts.append(f"set {code_span(str(record['set']))}")
    for key in ("config", "split"):
        if record.get(key):
            facts.append(f"{key} {code_span(str(record[key]))}")
    if record.get("rows") is not None:
        facts.append(f"{record['rows']} row{'s' if record['rows'] != 1 else ''}")
    if revision:
        facts.append(f"revision {_revision(f'https://huggingface.co/datasets/{name}', str(revision))}")
    if record.get("sha256"):
        facts.append(f"SHA-256 {code_span(str(record['sha256'])[:16])}…")
    # Data of the Hub have a commit, or are named in the header: the name of a file may look like an id.
    shown = ""
    if name and (revision or name in on_hub):
        shown = linked(f"datasets/{name}").replace("[datasets/", "[", 1)
    elif name:
        shown = code_span(strip_local_paths(str(name)))
    if record.get("title"):
        title = escape_markdown(strip_local_paths(str(record["title"])))
        shown = f"{title}, {shown}" if shown else title
    shown = ": ".join(filter(None, (role, shown)))
    if not facts:
        return shown
    return f"{shown} ({', '.join(facts)})" if shown else ", ".join(facts)


def _license(options: CardOptions, license: str | None) -> str:
    name = options.license_name or license
    if not name or name == "other":
        return f"[other]({options.license_link})" if _is_address(options.license_link) else ""
    if _is_address(options.license_link):
        return f"[{escape_markdown(name)}]({options.license_link})"
    return escape_markdown(name)


def _is_address(link: str | None) -> bool:
    return bool(link) and link.startswith("https://") and not set(link) & set(" ()<>\n\"'`")


def _as_list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(entry) for entry in value]
