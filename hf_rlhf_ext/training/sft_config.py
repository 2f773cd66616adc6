"""Options of `hf-rlhf sft`: TRL's, with the checks that the configs of this library have."""

from dataclasses import dataclass

from trl import SFTConfig

from .config_checks import checked_options
from .refused_options import refuse_fsdp_alone


@dataclass
class CheckedSFTConfig(SFTConfig):
    """TRL's `SFTConfig`. What no run can use is refused in one line.

    Raises:
        UserError: if an option is outside of its range, or if an optimizer or a schedule cannot work.
    """

    def __post_init__(self):
        with checked_options(self, best_metric="loss"):
            super().__post_init__()
            refuse_fsdp_alone(self)
