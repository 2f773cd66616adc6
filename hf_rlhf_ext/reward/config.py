"""Options of the reward trainer."""

from dataclasses import dataclass, field

from trl import RewardConfig

from ..data.collators import LAYOUTS
from ..data.tokenization import OVERFLOWS
from ..errors import UserError
from .losses import TIE_MODELS

RANKING_LOSSES = ("bradley_terry", "plackett_luce")


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
    tie_model: str = field(
        default="soft",
        metadata={
            "help": "What a target of 0.5 says: `soft` is half a win for each side; `rao_kupper` and `davidson` give "
            "ties a probability of their own, with `tie_threshold`. Of the loss only: evaluation's metrics are those "
            "of the plain Bradley-Terry model, which calls a tie where the better side's probability is below 3/4.",
            "choices": list(TIE_MODELS),
        },
    )
    tie_threshold: float = field(
        default=1.0, metadata={"help": "Rao-Kupper's log θ or Davidson's ν, in units of reward: how common ties are."}
    )
    margin_scale: float = field(
        default=1.0,
        metadata={
            "help": "Factor of the data's margins in the loss, where they are how much higher, in units of reward, the "
            "better completion must score. Differences of ratings are margins too: a factor below 1 brings them to a "
            "few units, 0 leaves all margins out, as calibrated probabilities need."
        },
    )
    ranking_loss: str = field(
        default="bradley_terry",
        metadata={
            "help": "Loss of a prompt whose completions are ranked in full, without ties: `bradley_terry` over all its "
            "pairs as in InstructGPT, or `plackett_luce`, which knows no margins and no label smoothing. Other prompts "
            "keep their pairs.",
            "choices": list(RANKING_LOSSES),
        },
    )
    layout: str = field(
        default="auto",
        metadata={
            "help": "How completions are laid out in a batch: `plain` is one row per completion, `shared_prefix` is "
            "one row per prompt, in which its completions see the prompt and themselves: the same scores for fewer "
            "tokens. `auto` takes the latter where a probe shows that the model's scores are the same.",
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
            "normalization set, and to save them in `reward_normalization.json`. `RewardScorer` then returns "
            "(score - mean) / std: mean zero as in InstructGPT (arXiv:2203.02155, sec. 3.5), unit deviation is ours. "
            "Without, or where it fails (which is said), the file has 0 and 1; base dtype, 4 bits and autocast always."
        },
    )
    normalization_max_rows: int = field(
        default=512,
        metadata={"help": "Largest number of rows of the normalization set to score, drawn with `seed`."},
    )

    def __post_init__(self):
        super().__post_init__()
        _check_choice("overflow", self.overflow, OVERFLOWS)
        _check_choice("tie_model", self.tie_model, TIE_MODELS)
        _check_choice("ranking_loss", self.ranking_loss, RANKING_LOSSES)
        _check_choice("layout", self.layout, ("auto", *LAYOUTS))
        self._check_numbers()
        self._check_evaluation()

    def _check_numbers(self) -> None:
        # `not >`, not `<=`: NaN is refused too.
        if not self.tie_threshold > 0:
            raise UserError(f"tie_threshold: must be positive, got {self.tie_threshold}.")
        if not self.margin_scale >= 0:
            raise UserError(f"margin_scale: must be 0 or positive, got {self.margin_scale}.")
        if self.max_tokens_per_batch is not None and self.max_tokens_per_batch < 1:
            raise UserError(f"max_tokens_per_batch: must be positive, got {self.max_tokens_per_batch}.")
        if self.normalization_max_rows < 2:
            raise UserError(f"normalization_max_rows: at least 2 rows are needed, got {self.normalization_max_rows}.")

    def _check_evaluation(self) -> None:
        if self.prediction_loss_only:
            raise UserError("prediction_loss_only: the loss over the set is computed from its scores: leave it false.")
        if self.batch_eval_metrics:
            raise UserError("batch_eval_metrics: metrics are computed over the whole evaluation set: leave it false.")


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{option}: {value!r} does not exist; choose one of {', '.join(choices)}.")
