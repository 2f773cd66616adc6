"""Options of `hf-rlhf sft`: TRL's, with the checks that the configs of this library have."""

from dataclasses import dataclass

from trl import SFTConfig

from .config_checks import checked_options
from .engines import ALL_ENGINES
from .refused_options import FOR_SCRIPTS, LOADED_MODEL

_FOR_METRICS = "it is about functions for metrics, and the command has none"


@dataclass
class CheckedSFTConfig(SFTConfig):
    """TRL's `SFTConfig`. What no run can use is refused in one line.

    Raises:
        UserError: if an option is outside of its range, or if an optimizer or a schedule cannot work.
    """

    unused_options = FOR_SCRIPTS | {
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
