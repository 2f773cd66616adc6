"""Options that the recipes share, in addition to TRL's configs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftConfig
from transformers import TrainingArguments
from trl import ModelConfig, get_peft_config

from ..errors import UserError, renamed_options
from ..modeling.loading import preferred_dtype
from ..modeling.locations import EMBEDDED_MODEL
from .config_file import read_config
from .precision import QUANT_TYPES, STORAGE_TYPES, check_quantization, quantization_config


def check_at_least(options: Any, **smallest: float) -> None:
    """Raises `UserError` for an option below its smallest value, or one that is NaN; None is always allowed."""
    for name, least in smallest.items():
        value = getattr(options, name)
        if value is not None and not value >= least:
            raise UserError(f"{name} must be at least {least}, got {value}.")


@dataclass
class DataArguments:
    """The dataset of a recipe, and how many of its rows are used."""

    _argument_group_name = "data"

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, file (json, jsonl, csv, parquet, or one of these as .gz), or folder."}
    )
    dataset_format: str | None = field(
        default=None, metadata={"help": "Name of the data format. If `None`, it is detected from the rows."}
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration (subset) of a dataset on the Hub, where it has several."}
    )
    columns: str | None = field(
        default=None,
        metadata={
            "help": "Which column has which role, as YAML or JSON text or a .yaml file, for data in no known format: "
            "'{prompt: query, answers: [a, b], verdict: label, verdict_is: 1 or 2}'. If `None`, the roles are found by "
            "the names of the columns."
        },
    )
    ignore: str | None = field(
        default=None,
        metadata={"help": "Columns that need not be read although they look as if they mattered, as a,b."},
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(
        default=None,
        metadata={"help": "Split to evaluate on. If `None`, `eval_rows` rows of the train split."},
    )
    train_rows: int | None = field(
        default=None, metadata={"help": "Number of rows to train on, from the first one. If `None`, all."}
    )
    eval_rows: int = field(
        default=0,
        metadata={
            "help": "Rows to evaluate on. Without a test split, they are held out from the train split, by prompt."
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Delete what an earlier run left in the output folder."})

    def __post_init__(self):
        if self.dataset_name is None:
            raise UserError("dataset_name is required: a Hub id, a file, or a folder (--dataset_name data.jsonl).")
        check_at_least(self, train_rows=1, eval_rows=0)

    @property
    def holds_rows_out(self) -> bool:
        """Whether there are rows to evaluate on."""
        return bool(self.eval_rows or self.dataset_test_split)

    def reading(self) -> dict[str, Any]:
        """Arguments of the readers, without name and split."""
        return {
            "format": self.dataset_format,
            "revision": self.dataset_revision,
            "config": self.dataset_config,
            "columns": self.column_roles(),
            "ignore": self.ignored_columns(),
        }

    def column_roles(self) -> dict[str, Any] | None:
        """The roles of the columns that `--columns` gives. Raises `UserError` if it is no mapping."""
        columns: Any = self.columns
        if columns is None or isinstance(columns, dict):  # a mapping in the config file
            return columns
        if Path(columns).suffix in (".yaml", ".yml", ".json"):
            return read_config(columns)
        try:
            mapping = yaml.safe_load(columns)
        except yaml.YAMLError:
            mapping = None
        if not isinstance(mapping, dict):
            raise UserError(f"--columns: {columns!r} is no mapping: write '{{prompt: query, completion: reply}}'.")
        return mapping

    def ignored_columns(self) -> list[str]:
        """The columns of `--ignore`."""
        ignore: Any = self.ignore
        if isinstance(ignore, list):  # a list in the config file
            return list(map(str, ignore))
        names = (ignore or "").split(",")
        return [name.strip() for name in names if name.strip()]


@dataclass
class ComparisonArguments:
    """How comparisons are filtered and weighted before they are used."""

    _argument_group_name = "comparisons"

    reliability: bool = field(
        default=False,
        metadata={"help": "Estimate each annotator's reliability and compute soft targets from it (Dawid-Skene)."},
    )
    drop_contradictions: bool = field(default=False, metadata={"help": "Leave out pairs that were judged both ways."})
    max_length_gap: int | None = field(
        default=None,
        metadata={"help": "Leave out pairs whose lengths differ by more words than this. If `None`, keep all."},
    )
    min_agreement: float | None = field(
        default=None,
        metadata={"help": "Leave out pairs with a smaller share of agreeing votes (0.5 to 1). If `None`, keep all."},
    )
    category_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the category of a row, by which accuracy is reported. If `None`, the one of the "
            "format, or `category`."
        },
    )

    def __post_init__(self):
        check_at_least(self, max_length_gap=0, min_agreement=0.5)
        if self.min_agreement is not None and self.min_agreement > 1:
            raise UserError(f"min_agreement must be at most 1, got {self.min_agreement}.")


@dataclass
class DemonstrationArguments:
    """Which demonstrations are used, by rating and by use case."""

    _argument_group_name = "demonstrations"

    every_turn: bool = field(
        default=True, metadata={"help": "Train on every answer of a conversation. If false, on the last one only."}
    )
    min_rating: float | None = field(
        default=None,
        metadata={
            "help": "Leave out rows with a lower rating, on the scale of the dataset. Rows without a rating are kept. "
            "If `None`, keep all."
        },
    )
    mix: str | None = field(
        default=None,
        metadata={
            "help": "Shares of the use cases to sample: `instructgpt`, or a YAML file of category: share. If `None`, "
            "all rows."
        },
    )
    mix_rows: int | None = field(
        default=None, metadata={"help": "Number of rows to sample. If `None`, as many as the scarcest category allows."}
    )
    mix_seed: int = field(default=0, metadata={"help": "Seed for sampling the mix."})
    category_column: str = field(
        default="category",
        metadata={"help": "Column with the use case. Dolly's category names are mapped to InstructGPT's."},
    )
    category_rules: str | None = field(
        default=None,
        metadata={
            "help": "YAML file of category: [regular expressions], which assigns a category to rows without one by "
            "their prompt. If `None`, a mix leaves these rows out."
        },
    )

    def __post_init__(self):
        check_at_least(self, mix_rows=1)
        for name in ("mix_rows", "category_rules"):
            if self.mix is None and getattr(self, name) is not None:
                raise UserError(f"{name} is a part of the mix, and there is none: add --mix, or leave it out.")


@dataclass
class TerminalArguments:
    """What a recipe shows while it runs."""

    _argument_group_name = "terminal"

    verbose: bool = field(
        default=False,
        metadata={
            "help": "Show Transformers' own progress bars and log dictionaries, and all messages of other libraries. "
            "If false, one progress bar and one short line per log; log.jsonl in output_dir has all metrics either way."
        },
    )


_TASK_TYPES = ("CAUSAL_LM", "SEQ_CLS")
"""Values of `lora_task_type`; the first one is TRL's default."""


@renamed_options({"torch_dtype": "dtype"})
@dataclass
class ModelArguments(ModelConfig):
    """TRL's `ModelConfig` with defaults for one small GPU: the embedded model, LoRA on every linear layer.

    `dtype="auto"` is the fastest dtype of this machine. Without an adapter it is fp32, because bf16 would round small
    updates to zero. 4-bit is NF4 with double quantization, unless the options that belong to it say otherwise; TRL's
    own default is without double quantization.
    """

    _argument_group_name = "model and adapter"
    unused_options = {"lora_task_type": "the command sets it"}

    model_name_or_path: str | None = field(
        default=EMBEDDED_MODEL, metadata={"help": "Hub id, folder, `.gguf` file, or the embedded model."}
    )
    dtype: str | None = field(
        default="auto",
        metadata={
            "help": "Dtype of the base model's weights. `auto`: the fastest one on this machine, and float32 without "
            "an adapter.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    use_peft: bool = field(default=True, metadata={"help": "Train an adapter. If false, all weights are trained."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout probability in the LoRA layers."})
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Names of the modules that get LoRA."}
    )
    load_in_8bit: bool = field(
        default=False,
        metadata={"help": "Quantize the base model to 8 bits (LLM.int8), under an adapter. Needs bitsandbytes."},
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "Quantize the base model to 4 bits, under an adapter: NF4 with double quantization, unless the "
            "next three options say otherwise. Needs bitsandbytes."
        },
    )
    # None, so that a value without `load_in_4bit` is noticed.
    bnb_4bit_quant_type: str | None = field(
        default=None,
        metadata={"help": "Data type of `load_in_4bit`. If `None`, nf4.", "choices": list(QUANT_TYPES)},
    )
    use_bnb_nested_quant: bool | None = field(
        default=None,
        metadata={
            "help": "Double (nested) quantization with `load_in_4bit`: the scales are quantized too. If `None`, true."
        },
    )
    bnb_4bit_quant_storage: str | None = field(
        default=None,
        metadata={
            "help": "Dtype in which the packed weights of `load_in_4bit` are stored. It changes no result. If `None`, "
            "uint8.",
            "choices": list(STORAGE_TYPES),
        },
    )

    def __post_init__(self):
        check_quantization(self)
        super().__post_init__()
        check_at_least(self, lora_r=1, lora_alpha=1, lora_dropout=0)
        if self.lora_task_type not in _TASK_TYPES:
            raise UserError(f"lora_task_type: {self.lora_task_type!r} is not known: leave it out: the command sets it.")
        if self.lora_dropout > 1:
            raise UserError(f"lora_dropout must be at most 1, got {self.lora_dropout}.")

    @property
    def is_quantized(self) -> bool:
        """Whether the options ask for a quantized base."""
        return self.load_in_8bit or self.load_in_4bit

    def base_options(self, args: TrainingArguments) -> dict[str, Any]:
        """Arguments for `load_base_model` and `load_policy`, without the name.

        `args` is the trainer's config, which has TRL's option `trust_remote_code`.
        """
        # An update is far smaller than a weight: bf16 would lose it.
        dtype = self.dtype
        if dtype == "auto" and not self.use_peft:
            dtype = "float32"
        return {
            "dtype": dtype,
            "quantization_config": quantization_config(self),
            "attn_implementation": self.attn_implementation,
            "trust_remote_code": args.trust_remote_code,
            "trains_weights": not self.use_peft,
        }

    @property
    def revision(self) -> str | None:
        """The model's revision. `main` becomes None, which local folders and the embedded model accept too."""
        if self.model_revision == "main":
            return None
        return self.model_revision

    def check_task_type(self, task_type: str) -> None:
        """Raises `UserError` if `lora_task_type` is set to another one than that of the recipe."""
        if self.lora_task_type not in (_TASK_TYPES[0], task_type):
            raise UserError(f"lora_task_type={self.lora_task_type!r}: this command trains {task_type}: leave it out.")

    def peft_config(self, task_type: str) -> PeftConfig | None:
        """The adapter's configuration for `CAUSAL_LM` or `SEQ_CLS`; None if all weights are trained."""
        self.check_task_type(task_type)
        self.lora_task_type = task_type
        config = get_peft_config(self)
        if config is not None:
            config.revision = self.revision  # of the base model: without it, a reload would load the newest weights
        return config


def machine_defaults() -> dict[str, bool]:
    """Defaults of a trainer's config that depend on the machine. TRL's own defaults need a GPU with bf16.

    Without an accelerator, Trainer needs `use_cpu`. Where bf16 is slow or not supported, fp16 or fp32 is the default.
    """
    defaults = {"use_cpu": not torch.accelerator.is_available()}
    dtype = preferred_dtype()
    if dtype != torch.bfloat16:
        defaults["bf16"] = False
        defaults["fp16"] = dtype == torch.float16
    return defaults
