"""Options that the recipes share, beside TRL's configs, how they hold rows out, and what they leave at the end."""

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from datasets import Dataset
from huggingface_hub import HfApi
from peft import PeftConfig
from transformers import PreTrainedConfig, TrainingArguments
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from trl import ModelConfig, get_peft_config

from .compat import versions
from .data.mixture import categorise, filter_by_rating, load_mix, sample_mix
from .data.refine import filter_comparisons, weigh_by_reliability
from .errors import UserError
from .hub.card import hardware, write_card
from .hub.privacy import strip_local_paths
from .hub.push import PUSHED_FILE, check_access, content_digest, try_push
from .hub.trainer import push_options
from .modeling.loading import EMBEDDED_MODEL, adapter_base, preferred_dtype, resolve_location


@dataclass
class DataArguments:
    """Which data set a recipe reads, and how much of it."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, file (json, jsonl, csv, parquet, .gz of these), or folder."}
    )
    dataset_format: str | None = field(
        default=None, metadata={"help": "Format of the rows, by its name in the README. If `None`, it is detected."}
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration (subset) of a data set on the Hub that has several."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on. If `None`, `eval_rows` rows of the train split."}
    )
    train_rows: int | None = field(default=None, metadata={"help": "First rows to train on. If `None`, all."})
    eval_rows: int = field(
        default=0, metadata={"help": "Rows to evaluate on, held out by prompt from the train split if need be."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Empty an output folder that an earlier run made."})

    def __post_init__(self):
        if self.dataset_name is None:
            raise UserError("dataset_name is required: a Hub id, a file, or a folder (--dataset_name data.jsonl).")

    def reading(self) -> dict[str, Any]:
        """Arguments of the readers beside name and split."""
        return {"format": self.dataset_format, "revision": self.dataset_revision, "config": self.dataset_config}


@dataclass
class ComparisonArguments:
    """What is done with judgements before they are used."""

    reliability: bool = field(
        default=False, metadata={"help": "Targets from single votes by each annotator's reliability (Dawid-Skene)."}
    )
    drop_contradictions: bool = field(default=False, metadata={"help": "Leave out pairs that were judged both ways."})
    max_length_gap: int | None = field(
        default=None, metadata={"help": "Leave out pairs whose sides differ by more words than this."}
    )
    min_agreement: float | None = field(
        default=None, metadata={"help": "Leave out pairs of which a smaller share of the votes agrees."}
    )


@dataclass
class DemonstrationArguments:
    """Which demonstrations are trained on, by rating and by use case."""

    every_turn: bool = field(
        default=True, metadata={"help": "Train on every answer of a conversation (false: on the last one)."}
    )
    min_rating: float | None = field(
        default=None,
        metadata={"help": "Leave out rows rated lower; rows without a rating are demonstrations, they stay."},
    )
    mix: str | None = field(
        default=None, metadata={"help": "`instructgpt`, or a YAML file of category: share, to sample rows to."}
    )
    mix_rows: int | None = field(
        default=None, metadata={"help": "Rows of the mix. If `None`, as many as the scarcest category allows."}
    )
    mix_seed: int = field(default=0, metadata={"help": "Seed of the draw."})
    category_column: str = field(
        default="category", metadata={"help": "Column of the source with the use case; Dolly's are translated."}
    )
    category_rules: str | None = field(
        default=None, metadata={"help": "YAML file of category: [expressions to find in a prompt], for other rows."}
    )


def refine(rows: Dataset, options: ComparisonArguments) -> Dataset:
    """Comparisons after the filters and the reliability model that were asked for; says what they did."""
    if options.drop_contradictions or options.max_length_gap is not None or options.min_agreement is not None:
        rows, report = filter_comparisons(
            rows,
            drop_contradictions=options.drop_contradictions,
            max_length_gap=options.max_length_gap,
            min_agreement=options.min_agreement,
        )
        print(report.summary())
    if options.reliability:
        rows, accuracies = weigh_by_reliability(rows)
        print("annotators' accuracy: " + ", ".join(f"{name} {value:.2f}" for name, value in accuracies.items()))
    return rows


def choose_demonstrations(rows: Dataset, options: DemonstrationArguments) -> tuple[Dataset, dict[str, Any]]:
    """Demonstrations by rating and mix as asked for, and what that did, for the report."""
    done: dict[str, Any] = {}
    if options.min_rating is not None:
        rows, done["rating"] = filter_by_rating(rows, options.min_rating)
    if options.mix is not None:
        # The readers keep the source's column as `category`; plain text comes as it is.
        read = {"completion", "category"} <= set(rows.column_names)
        rows = categorise(rows, "category" if read else options.category_column, options.category_rules)
        rows, mixed = sample_mix(rows, load_mix(options.mix), rows=options.mix_rows, seed=options.mix_seed)
        done["mix"] = asdict(mixed)
        print(mixed.summary())
    return rows, done


@dataclass
class ModelArguments(ModelConfig):
    """TRL's `ModelConfig` with defaults for one small card: the embedded model, LoRA on every linear layer.

    `dtype="auto"` is the dtype that the machine is fast in, and fp32 where all weights are trained (bf16 would round
    small updates away); 4-bit is NF4 with double quantisation.
    """

    model_name_or_path: str | None = field(
        default=EMBEDDED_MODEL, metadata={"help": "Hub id, folder, `.gguf` file, or the embedded model."}
    )
    dtype: str | None = field(
        default="auto",
        metadata={
            "help": "Dtype of the base model's weights; `auto` is the one that this machine is fast in, and float32 "
            "without an adapter.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    use_peft: bool = field(default=True, metadata={"help": "Train an adapter (false: all weights)."})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout."})
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "LoRA target modules."}
    )

    def base_options(self, args: TrainingArguments) -> dict[str, Any]:
        """Arguments for `load_base_model` and `load_policy` beside the name.

        `args` is the trainer's config: TRL keeps `trust_remote_code` there.
        """
        return {
            "dtype": "float32" if self.dtype == "auto" and not self.use_peft else self.dtype,
            "load_in_4bit": self.load_in_4bit,
            "attn_implementation": self.attn_implementation,
            "trust_remote_code": args.trust_remote_code,
        }

    @property
    def revision(self) -> str | None:
        """The model's revision; `main` is left out, so that local folders and the embedded model take it too."""
        return None if self.model_revision == "main" else self.model_revision

    def peft_config(self, task_type: str) -> PeftConfig | None:
        """The adapter's configuration for `CAUSAL_LM` or `SEQ_CLS`, None where all weights are trained."""
        self.lora_task_type = task_type
        config = get_peft_config(self)
        if config is not None:
            config.revision = self.revision  # of the base: without it, a reload would take the newest weights
        return config


def machine_defaults() -> dict[str, bool]:
    """Defaults of a trainer's config that depend on the machine: TRL's are those of a card with bf16.

    Without an accelerator Trainer must be told `use_cpu`; where bf16 would be slow or unknown, fp16 or fp32 is better.
    """
    dtype = preferred_dtype()
    defaults = {} if dtype == torch.bfloat16 else {"bf16": False, "fp16": dtype == torch.float16}
    return defaults | {"use_cpu": not torch.accelerator.is_available()}


def train_and_heldout(train: Dataset, data: DataArguments, test: Dataset | None = None) -> tuple[Dataset, Dataset]:
    """Train rows, and `eval_rows` held-out ones whose prompt is new: of `test`, else the next ones of `train`.

    Raises:
        UserError: no rows to train on, or fewer held-out rows than asked for.
    """
    rows = len(train) if data.train_rows is None else min(data.train_rows, len(train))
    if test is None and data.train_rows is None:
        rows -= data.eval_rows  # the last ones are held out
    if rows < 1:
        raise UserError(f"{data.dataset_name}: {len(train)} rows, none left to train on at eval_rows={data.eval_rows}.")
    heldout = test
    if heldout is None:
        seen = {_prompt(row) for row in train.select(range(rows))}
        new = (i for i in range(rows, len(train)) if _prompt(train[i]) not in seen)
        heldout = train.select([i for i, _ in zip(new, range(data.eval_rows), strict=False)])
    else:
        seen = {_prompt(row) for row in train.select(range(rows))}
        new = [i for i, row in enumerate(heldout) if _prompt(row) not in seen]
        if len(new) < len(heldout):
            print(f"{len(heldout) - len(new)} of {len(heldout)} test rows left out: their prompts are trained on")
        heldout = heldout.select(new[: data.eval_rows or None])
    if len(heldout) < data.eval_rows:
        raise UserError(f"{data.dataset_name}: {len(heldout)} held-out rows for eval_rows={data.eval_rows}: lower it.")
    return train.select(range(rows)), heldout


def check_heldout(args: TrainingArguments, heldout: Dataset) -> None:
    """Refuses evaluation in training without rows, before a model is loaded: Trainer would say so after that."""
    if (strategy := args.eval_strategy.value) != "no" and not len(heldout):
        raise UserError(
            f"eval_strategy: {strategy} needs held-out rows: pass --eval_rows or --dataset_test_split, or "
            "--eval_strategy no."
        )


def _prompt(row: dict[str, Any]) -> str:
    """What tells two prompts apart: the prompt, a conversation without its last turn, or all of a row of plain text."""
    return str(row["prompt"] if "prompt" in row else row["messages"][:-1] if "messages" in row else row)


def public_name(model_name_or_path: str) -> str:
    """What a card may call a model: its id on the Hub, of a local folder or file only the last component."""
    path = Path(model_name_or_path).expanduser()
    return path.resolve().name if path.exists() else model_name_or_path


def hub_dataset(data: DataArguments) -> dict[str, Any]:
    """What a card says of a data set on the Hub: its id, and its commit if the Hub tells; nothing of a local one."""
    if Path(data.dataset_name).expanduser().exists():
        return {}
    try:
        sha = HfApi().dataset_info(data.dataset_name, revision=data.dataset_revision, timeout=10).sha
    except Exception:  # no network, no right, offline: a card can do without
        sha = None
    return {"datasets": [data.dataset_name], "dataset_revision": sha}


_NOT_OF_THE_RUN = ("push_to_hub", "hub_token", "hub_model_id", "overwrite", "resume_from_checkpoint", "lora_task_type")
"""Options that say nothing about what was trained."""


def check_push(args: TrainingArguments, model_args: ModelArguments) -> None:
    """Refuses `--push_to_hub` before anything is loaded where it could only fail at the end.

    `args.hub_model_id` becomes the full id.

    Raises:
        UserError: no right to write there, a local base model, with which nobody could load the adapter, or one that
            brings code of its own.
    """
    if not args.push_to_hub:
        return
    name, revision = model_args.model_name_or_path, model_args.revision
    adapter = adapter_base(name, revision)
    base, whole = adapter or name, not adapter and not model_args.use_peft
    if not whole and Path(base).expanduser().exists():
        raise UserError(
            f"push_to_hub: the base model {base} is a local folder, with which nobody could load the adapter: push it "
            "first, and train from its Hub id."
        )
    args.hub_model_id = check_access(args.hub_model_id or Path(args.output_dir).absolute().name, args.hub_token)
    path, location = resolve_location(name, revision)
    saved = get_tokenizer_config(path, **location) | (
        PreTrainedConfig.get_config_dict(path, **location)[0] if whole else {}
    )
    if args.trust_remote_code or "auto_map" in saved:
        raise UserError(
            f"push_to_hub: {name} brings code of its own (trust_remote_code, auto_map), which is not published "
            "unasked: train without push_to_hub, then `python -m hf_rlhf_ext.hub.push` says what to --allow."
        )


def finish_run(
    args: TrainingArguments,
    kind: str,
    report: Mapping[str, Any],
    options: tuple[Any, ...],
    *,
    seconds: float,
    card: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Writes `training_config.yaml`, `report.json` and the card into `args.output_dir`, and pushes it where asked.

    Call it on every process: that of rank 0 writes and pushes.

    Args:
        kind: of the card, see `hub.card.KINDS`.
        report: what was measured, by section.
        options: the dataclasses that the recipe was given.
        seconds: how long it took.
        card: arguments of `write_card`, plots as names of files in the folder; None writes no card.
    """
    folder, config = Path(args.output_dir), training_config(*options)
    about = {"seed": args.seed, "seconds": {kind: round(seconds, 1)}, "hardware": hardware(), "versions": versions()}
    report = {**report, **about, "command": strip_local_paths("python " + shlex.join(sys.argv))}
    if args.process_index == 0:
        (folder / "training_config.yaml").write_text(config, encoding="utf-8")
        report = write_report(folder, report, card and {"kind": kind, "config": config, **card})
    PartialState().wait_for_everyone()  # before the push, which may take longer than they would wait
    if args.process_index == 0 and args.push_to_hub:
        try_push(folder, args.hub_model_id, **push_options(args))
    return report


def write_report(folder: str | Path, report: dict[str, Any], card: Mapping[str, Any] | None) -> dict[str, Any]:
    """Writes `report.json`, which holds all that its card needs, and the card; returns the report.

    `card` are arguments of `write_card` with the `kind`, plots as names of files in the folder; None writes no card.
    """
    folder = Path(folder)
    if card is not None:
        config = strip_local_paths(card.get("config", ""))
        report = {**report, "card": {**card, "config": config}}
        plot = {"plot": folder / card["plot"]} if card.get("plot") else {}
        write_card(folder, report=report, **report["card"] | plot)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def training_config(*options: Any) -> str:
    """The options that differ from their defaults, as YAML that `--config` takes; without tokens and local paths."""
    given: dict[str, Any] = {}
    for option in options:
        if isinstance(option, TrainingArguments):
            same = {name: getattr(option, name) for name in ("output_dir", "use_cpu", "bf16", "fp16")}
            found, default = option.to_dict(), type(option)(**same).to_dict()  # both after __post_init__
        else:
            found, default = vars(option), {f.name: _default(f) for f in fields(option)}
        for name, usual in default.items():
            value = [found[name]] if isinstance(usual, list) and isinstance(found[name], str) else found[name]
            given |= {name: value} if value != usual else {}
    given = {k: v.value if isinstance(v, Enum) else v for k, v in given.items() if k not in _NOT_OF_THE_RUN}
    return strip_local_paths(yaml.safe_dump(json.loads(json.dumps(given, default=str)), sort_keys=False))


def _default(option: Any) -> Any:
    return option.default if option.default_factory is MISSING else option.default_factory()


def lineage_of(name: str, revision: str | None = None, *, dataset: bool = False, rows: int | None = None) -> str:
    """What a card says that a model was made from: an id on the Hub with its revision, or a local name and a sha256.

    A local folder that was pushed is named by where it went.
    """
    path = Path(name).expanduser()
    counted = f", {rows} rows" if rows is not None else ""
    if not path.exists():
        return f"{'datasets/' if dataset else ''}{name}" + (f"@{revision}" if revision else "")
    kinds = (".json", ".jsonl", ".csv", ".parquet", ".gz", ".arrow") if dataset else (".safetensors",)
    digest = content_digest(path, kinds)
    if (path / PUSHED_FILE).is_file():
        pushed = json.loads((path / PUSHED_FILE).read_text(encoding="utf-8"))
        if pushed.get("weights") == digest:  # not trained on since then
            return f"{pushed['repo_id']}@{pushed['commit']}"
    return f"local {path.resolve().name} (sha256 {digest}{counted})"
