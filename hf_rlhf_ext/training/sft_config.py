"""Options of `hf-rlhf sft`: TRL's, with the checks that the configs of this library have."""

from dataclasses import dataclass, field

from trl import SFTConfig

from ..errors import UserError
from .config_checks import checked_options
from .engines import ALL_ENGINES
from .refused_options import FOR_SCRIPTS, LOADED_MODEL

_FOR_METRICS = "it is about functions for metrics, and the command has none"
_COUNTED_TWICE = "TRL's SFTTrainer counts tokens and metrics in the pass itself, so that no pass can be repeated"


@dataclass
class CheckedSFTConfig(SFTConfig):
    """TRL's `SFTConfig`. What no run can use is refused in one line.

    Raises:
        UserError: if an option is outside of its range, or if an optimizer or a schedule cannot work.
    """

    auto_batch: bool = field(
        default=False,
        metadata={"help": "Not supported: TRL's SFTTrainer cannot repeat a pass that did not fit into memory."},
    )

    unused_options = FOR_SCRIPTS | {
        "auto_batch": _COUNTED_TWICE,
        "batch_eval_metrics": _FOR_METRICS,
        "eval_do_concat_batches": _FOR_METRICS,
        "eval_use_gather_object": _FOR_METRICS,
        "include_for_metrics": _FOR_METRICS,
        "label_names": "the labels are the tokens of the rows",
        "model_init_kwargs": LOADED_MODEL,
    }
    """Options that change nothing in `hf-rlhf sft`, each with the reason. It neither lists nor takes them."""

    def __post_init__(self):
        with checked_options(self, trainer="SFTTrainer", engines=ALL_ENGINES, best_metric="loss"):
            super().__post_init__()
        if self.auto_batch:
            raise UserError(
                f"auto_batch is not supported by SFTTrainer: {_COUNTED_TWICE}: set a smaller "
                "per_device_train_batch_size and more gradient_accumulation_steps."
            )
