"""Options that the recipes share, beside TRL's configs."""

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from transformers import TrainingArguments
from trl import ModelConfig, get_peft_config

from ..errors import UserError
from ..modeling.loading import EMBEDDED_MODEL, preferred_dtype


@dataclass
class DataArguments:
    """Which data set a recipe reads, and how much of it."""

    _argument_group_name = "data"

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
    train_rows: int | None = field(default=None, metadata={"help": "Rows to train on: the first ones. If `None`, all."})
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

    _argument_group_name = "comparisons"

    reliability: bool = field(
        default=False, metadata={"help": "Targets from single votes by each annotator's reliability (Dawid-Skene)."}
    )
    drop_contradictions: bool = field(default=False, metadata={"help": "Leave out pairs that were judged both ways."})
    max_length_gap: int | None = field(
        default=None,
        metadata={"help": "Leave out pairs whose sides differ by more words than this. If `None`, none."},
    )
    min_agreement: float | None = field(
        default=None,
        metadata={"help": "Leave out pairs of which a smaller share of the votes (0.5 to 1) agrees. If `None`, none."},
    )


@dataclass
class DemonstrationArguments:
    """Which demonstrations are trained on, by rating and by use case."""

    _argument_group_name = "demonstrations"

    every_turn: bool = field(
        default=True, metadata={"help": "Train on every answer of a conversation (false: on the last one)."}
    )
    min_rating: float | None = field(
        default=None,
        metadata={
            "help": "Leave out rows rated lower, on the source's scale; rows without a rating are demonstrations, they "
            "stay. If `None`, none is left out."
        },
    )
    mix: str | None = field(
        default=None,
        metadata={"help": "`instructgpt`, or a YAML file of category: share, to sample rows to. If `None`, all rows."},
    )
    mix_rows: int | None = field(
        default=None, metadata={"help": "Rows of the mix. If `None`, as many as the scarcest category allows."}
    )
    mix_seed: int = field(default=0, metadata={"help": "Seed of the draw."})
    category_column: str = field(
        default="category", metadata={"help": "Column of the source with the use case; Dolly's are translated."}
    )
    category_rules: str | None = field(
        default=None,
        metadata={
            "help": "YAML file of category: [expressions to find in a prompt], for rows without a category. If `None`, "
            "they are left out of a mix."
        },
    )


@dataclass
class ModelArguments(ModelConfig):
    """TRL's `ModelConfig` with defaults for one small card: the embedded model, LoRA on every linear layer.

    `dtype="auto"` is the dtype that the machine is fast in, and fp32 where all weights are trained (bf16 would round
    small updates away); 4-bit is NF4 with double quantization.
    """

    _argument_group_name = "model and adapter"

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
        # Weights that are trained themselves need the digits: an update is far smaller than a weight.
        dtype = self.dtype
        if dtype == "auto" and not self.use_peft:
            dtype = "float32"
        return {
            "dtype": dtype,
            "load_in_4bit": self.load_in_4bit,
            "attn_implementation": self.attn_implementation,
            "trust_remote_code": args.trust_remote_code,
        }

    @property
    def revision(self) -> str | None:
        """The model's revision; `main` is left out, so that local folders and the embedded model take it too."""
        if self.model_revision == "main":
            return None
        return self.model_revision

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
    # Trainer looks for an accelerator unless it is told not to.
    defaults = {"use_cpu": not torch.accelerator.is_available()}
    dtype = preferred_dtype()
    if dtype != torch.bfloat16:
        defaults["bf16"] = False
        defaults["fp16"] = dtype == torch.float16
    return defaults
