"""Options that the recipes share, beside TRL's configs, and how they hold rows out."""

from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from peft import PeftConfig
from trl import ModelConfig, get_peft_config

from .errors import UserError
from .modeling.loading import EMBEDDED_MODEL


@dataclass
class DataArguments:
    """Which data set a recipe reads, and how much of it."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, file (json, jsonl, csv, parquet, .gz of these), or folder."}
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
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


@dataclass
class ModelArguments(ModelConfig):
    """TRL's `ModelConfig` with defaults for one small card: the embedded model, LoRA on every linear layer.

    `dtype="auto"` is the dtype that the machine is fast in; 4-bit is NF4 with double quantisation.
    """

    model_name_or_path: str | None = field(
        default=EMBEDDED_MODEL, metadata={"help": "Hub id, folder, `.gguf` file, or the embedded model."}
    )
    dtype: str | None = field(
        default="auto",
        metadata={
            "help": "Dtype of the base model's weights; `auto` is the one that this machine is fast in.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    use_peft: bool = field(default=True, metadata={"help": "Train an adapter (false: all weights)."})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout."})
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "LoRA target modules."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run Python code that comes with a model."})

    def base_options(self) -> dict[str, Any]:
        """Arguments for `load_base_model` and `load_policy` beside the name."""
        return {
            "dtype": self.dtype,
            "load_in_4bit": self.load_in_4bit,
            "attn_implementation": self.attn_implementation,
            "trust_remote_code": self.trust_remote_code,
        }

    @property
    def revision(self) -> str | None:
        """The model's revision; `main` is left out, so that local folders and the embedded model take it too."""
        return None if self.model_revision == "main" else self.model_revision

    def peft_config(self, task_type: str) -> PeftConfig | None:
        """The adapter's configuration for `CAUSAL_LM` or `SEQ_CLS`, None where all weights are trained."""
        self.lora_task_type = task_type
        return get_peft_config(self)


def train_and_heldout(train: Dataset, data: DataArguments, test: Dataset | None = None) -> tuple[Dataset, Dataset]:
    """Train rows, and `eval_rows` held-out ones: of `test`, else the next rows of `train` whose prompt is new.

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
        seen = {str(prompt) for prompt in train.select(range(rows))["prompt"]}
        new = (i for i in range(rows, len(train)) if str(train[i]["prompt"]) not in seen)
        heldout = train.select([i for i, _ in zip(new, range(data.eval_rows), strict=False)])
    elif data.eval_rows:
        heldout = heldout.select(range(min(data.eval_rows, len(heldout))))
    if len(heldout) < data.eval_rows:
        raise UserError(f"{data.dataset_name}: {len(heldout)} held-out rows for eval_rows={data.eval_rows}: lower it.")
    return train.select(range(rows)), heldout
