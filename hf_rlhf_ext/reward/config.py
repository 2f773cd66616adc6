"""Options of `BradleyTerryTrainer`."""

from dataclasses import dataclass, field

from trl import RewardConfig

from ..data.collators import LAYOUTS
from ..data.tokenization import OVERFLOWS, UNRENDERABLES
from ..errors import UserError
from ..training.config_checks import checked_options
from ..training.engines import refuse_loading_in_one_process
from ..training.option_values import check_ranges
from .losses import TIE_MODELS
from .trainer_options import ENGINES, REFUSED_OPTIONS, UNUSED_OPTIONS, check_reward_options

RANKING_LOSSES = ("bradley_terry", "plackett_luce")


@dataclass
class BradleyTerryConfig(RewardConfig):
    """Options of `BradleyTerryTrainer`, in addition to those of TRL's `RewardConfig`, whose defaults are kept.

    Two options of `RewardConfig` differ in meaning. `max_length` is a limit, and `overflow` determines what happens to
    longer rows (TRL drops them without a count). `center_rewards_coefficient` weights each pair as the loss does. Each
    option is described in its field's `help`, which `hf-rlhf reward --help-all` prints.

    Raises:
        UserError: if an option is outside of its range or has an unknown value.
    """

    unused_options = UNUSED_OPTIONS
    refused_options = REFUSED_OPTIONS

    # The default of TRL. Its help says that longer rows are dropped, which here depends on `overflow`.
    max_length: int | None = field(
        default=1024,
        metadata={
            "help": "Largest number of tokens of a prompt with its longest completion. Longer rows are handled as "
            "`overflow` says. If `None`, there is no limit."
        },
    )
    overflow: str = field(
        default="error",
        metadata={
            "help": "What to do with a comparison whose prompt and longest completion together exceed `max_length` "
            "tokens. `error`: stop with an error that names the row. `drop`: leave the row out. "
            "`truncate_prompt_left`: cut the first tokens of the prompt. `truncate_completion`: cut the last tokens of "
            "a completion, but keep its stop token. The affected rows of training and evaluation data are counted and "
            "logged.",
            "choices": list(OVERFLOWS),
        },
    )
    unrenderable: str = field(
        default="error",
        metadata={
            "help": "What to do with a row that the chat template cannot render, such as one with a system message for "
            "a template that takes none. `error`: stop with an error that names the row. `drop`: leave the row out; "
            "such rows are counted and logged.",
            "choices": list(UNRENDERABLES),
        },
    )
    tie_model: str = field(
        default="soft",
        metadata={
            "help": "How the loss treats ties, which have a target of 0.5. `soft`: half a win for each side. "
            "`rao_kupper` and `davidson`: a separate probability of a tie, which `tie_threshold` determines. This "
            "option does not change the metrics of evaluation: they are those of the plain Bradley-Terry model, which "
            "predicts a tie if the probability of the better side is below 3/4.",
            "choices": list(TIE_MODELS),
        },
    )
    tie_threshold: float = field(
        default=1.0,
        metadata={
            "help": "How common ties are with `tie_model='rao_kupper'` (log θ, in units of reward) or `davidson` (ν). "
            "A larger value makes ties more likely."
        },
    )
    margin_scale: float = field(
        default=1.0,
        metadata={
            "help": "Factor on the margins of the data. A margin is the difference of scores, in units of reward, that "
            "the loss asks for between the better and the worse completion. If margins are differences of ratings, "
            "choose a factor below 1 so that they are at most a few units. 0 ignores all margins, which calibrated "
            "probabilities require."
        },
    )
    ranking_loss: str = field(
        default="bradley_terry",
        metadata={
            "help": "Loss of prompts whose completions are fully ranked without ties. `bradley_terry`: over all pairs, "
            "as in InstructGPT. `plackett_luce`: over the ranking, without margins and label smoothing. Other prompts "
            "use the pairs in both cases.",
            "choices": list(RANKING_LOSSES),
        },
    )
    layout: str = field(
        default="auto",
        metadata={
            "help": "Layout of completions in a batch. `plain`: one row per completion. `shared_prefix`: the "
            "completions of a prompt share its tokens in one row; each completion attends only to the prompt and "
            "itself, so that scores are the same with fewer tokens. `auto`: `shared_prefix` if a test before training "
            "gives the same results in both layouts and if it is not slower, else `plain`. With sdpa attention it is "
            "not slower. Other models need a mask over the whole row, and an estimate from the lengths of the training "
            "set decides.",
            "choices": ["auto", *LAYOUTS],
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of tokens per forward pass, including padding. The prompts of a batch are sorted "
            "by length and split. This changes memory and speed, but not the loss. If `None`, a batch is one forward "
            "pass."
        },
    )
    auto_batch: bool = field(
        default=False,
        metadata={
            "help": "Begin with the largest `max_tokens_per_batch` that fits by the plan of the run, on a GPU. When "
            "memory runs out, halve it and repeat what did not fit. Optimizer steps are the same as with the smaller "
            "number set by hand; batch sizes per step stay as they are. A line says each new number, and checkpoints "
            "keep it. Not for FSDP2 and DeepSpeed."
        },
    )
    normalize_rewards: bool = field(
        default=True,
        metadata={
            "help": "Measure mean and standard deviation of the scores after training, on the normalization set, and "
            "save them in `reward_normalization.json`. `RewardScorer` then returns (score - mean) / std. InstructGPT "
            "shifts rewards to mean zero (arXiv:2203.02155, sec. 3.5); the unit standard deviation is an addition. If "
            "`False`, or if the measurement fails (with a warning), mean 0 and standard deviation 1 are saved."
        },
    )
    normalization_max_rows: int = field(
        default=512,
        metadata={"help": "Maximum number of rows of the normalization set to score; they are drawn with `seed`."},
    )

    def __post_init__(self):
        with checked_options(self, trainer="BradleyTerryTrainer", engines=ENGINES, best_metric="loss"):
            super().__post_init__()
            refuse_loading_in_one_process(self)
        _check_choice("overflow", self.overflow, OVERFLOWS)
        _check_choice("unrenderable", self.unrenderable, UNRENDERABLES)
        _check_choice("tie_model", self.tie_model, TIE_MODELS)
        _check_choice("ranking_loss", self.ranking_loss, RANKING_LOSSES)
        _check_choice("layout", self.layout, ("auto", *LAYOUTS))
        check_reward_options(self)
        check_ranges(self, not_negative=("margin_scale",), positive={"tie_threshold": ""})
        if self.normalization_max_rows < 2:
            raise UserError(f"normalization_max_rows: at least 2 rows are needed, got {self.normalization_max_rows}.")


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{option}: {value!r} is not supported: choose one of {', '.join(choices)}.")
