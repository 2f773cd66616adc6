"""Options of the reward trainer."""

from dataclasses import dataclass, field

from trl import RewardConfig

from ..data.collators import LAYOUTS
from ..data.tokenization import OVERFLOWS
from ..errors import UserError


@dataclass
class BradleyTerryConfig(RewardConfig):
    """Options of `BradleyTerryTrainer`: those of TRL's `RewardConfig`, with its defaults, and the fields below.

    What means something else here: `max_length` is a limit and `overflow` says what happens beyond it (TRL drops such
    rows without a count); `center_rewards_coefficient` weighs each pair as the loss does.
    """

    overflow: str = field(
        default="error",
        metadata={
            "help": "What to do with a comparison whose prompt and longest completion exceed `max_length` tokens: "
            "`error` names the row and stops; `drop` leaves the row out; `truncate_prompt_left` cuts the prompt's "
            "first tokens; `truncate_completion` cuts a completion's last tokens before its stop token. Counted and "
            "logged, for training and evaluation data alike.",
            "choices": list(OVERFLOWS),
        },
    )
    layout: str = field(
        default="auto",
        metadata={
            "help": "How completions are laid out in a batch: `plain` is one row a completion, `shared_prefix` one row "
            "a prompt, in which its completions see the prompt and themselves: the same scores for fewer tokens. "
            "`auto` takes the latter where a probe shows that the model's scores are the same.",
            "choices": ["auto", *LAYOUTS],
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Tokens, padding included, that one forward pass holds at most: the prompts of a batch are sorted "
            "by length and split accordingly. Changes memory and speed, never the loss. If `None`, one pass."
        },
    )
    normalize_rewards: bool = field(
        default=True,
        metadata={
            "help": "Whether to measure mean and standard deviation of the scores after training, on the "
            "normalisation set, and to save them in `reward_normalization.json`. `RewardScorer` then returns "
            "(score - mean) / std: mean zero as in InstructGPT (arXiv:2203.02155, sec. 3.5), unit deviation is ours."
        },
    )
    normalization_max_rows: int = field(
        default=512,
        metadata={"help": "Largest number of rows of the normalisation set to score, drawn with `seed`."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.overflow not in OVERFLOWS:
            raise UserError(f"overflow: {self.overflow!r} does not exist; choose one of {', '.join(OVERFLOWS)}.")
        if self.layout not in ("auto", *LAYOUTS):
            raise UserError(f"layout: {self.layout!r} does not exist; there is auto, {', '.join(LAYOUTS)}.")
        if self.max_tokens_per_batch is not None and self.max_tokens_per_batch < 1:
            raise UserError(f"max_tokens_per_batch: must be positive, got {self.max_tokens_per_batch}.")
        if self.normalization_max_rows < 2:
            raise UserError(f"normalization_max_rows: at least 2 rows are needed, got {self.normalization_max_rows}.")
        if self.batch_eval_metrics:
            raise UserError("batch_eval_metrics: metrics are computed over the whole evaluation set: leave it false.")
