"""Options of `hf-rlhf sft`: TRL's, with the checks that the configs of this library have."""

from dataclasses import dataclass

from trl import SFTConfig

from .best_model import complete_best_metric
from .optimizers import check_optimizer_names, check_optimizer_options
from .option_values import check_option_values
from .refused_options import in_one_line, refuse_fsdp_alone


@dataclass
class CheckedSFTConfig(SFTConfig):
    """TRL's `SFTConfig`. What no run can use is refused in one line.

    Raises:
        UserError: if an option is outside of its range, or if an optimizer or a schedule cannot work.
    """

    def __post_init__(self):
        check_option_values(self)
        check_optimizer_names(self)
        complete_best_metric(self, default="loss")
        with in_one_line():
            super().__post_init__()
        refuse_fsdp_alone(self)
        check_optimizer_options(self)
