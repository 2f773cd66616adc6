"""Options that `hf-rlhf chat` and `hf-rlhf generate` share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_rlhf_ext.cli.main_options import MainOptions
from hf_rlhf_ext.cli.parsing import parse_recipe
from hf_rlhf_ext.cli.positionals import split_positionals
from hf_rlhf_ext.errors import UserError

LOWEST_TEMPERATURE = 1e-5
"""Below it, the most probable token is taken, as logits that are divided by so little overflow."""
HIGHEST_SEED = 2**63 - 1
"""Seeds are added to, and torch takes no larger ones than 2**64 - 1."""


@dataclass
class CastArguments:
    """The models that answer, and the reward model that scores their answers."""

    _argument_group_name = "models"

    model: list[str] | None = field(
        default=None,
        metadata={
            "help": "The folder of a run (pipeline, quickstart, rounds), or one or several models: folders of adapters "
            "or whole models, Hub ids, `.gguf` files, or embedded:smollm2-135m-instruct. NAME=MODEL names one. If "
            "`None`, the embedded model. The words before all options mean the same."
        },
    )
    reward_model: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of the reward model. If `None`, that of the run; without one, no score is shown."
        },
    )
    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Reward functions, as `rewards.py:short`, `path/rewards.py:short` or `my_package.rewards:short`. "
            "The reward is then the sum of the reward model and the functions, with the weights of the run if it was "
            "trained on the same ones, or else 1 each. Functions of a run are not run unless they are named here."
        },
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Dtype of the weights of the base. `auto`: as the first adapter was trained, or else the fastest "
            "one on this machine.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    load_in_4bit: bool | None = field(
        default=None, metadata={"help": "Quantize the base to NF4. If `None`, as the first adapter was trained."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention implementation, as in Transformers."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code of the models. Only use it if you have read the code."}
    )


@dataclass
class AnswerArguments:
    """How answers are sampled."""

    _argument_group_name = "answers"

    temperature: float = field(
        default=0.8,
        metadata={
            "help": "Sampling temperature, by which the logits of all tokens are divided. 0 takes the most probable "
            "token, as --greedy does."
        },
    )
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling; 1.0 samples from all tokens."})
    greedy: bool = field(default=False, metadata={"help": "Take the most probable token instead of sampling."})
    max_new_tokens: int = field(default=256, metadata={"help": "Largest number of tokens of an answer."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})
    system: str | None = field(
        default=None,
        metadata={
            "help": "System text before the conversation. If `None`, that of the run: of its card, or of its data. An "
            "empty text means none."
        },
    )

    def __post_init__(self):
        self.temperature = checked_temperature(self.temperature)
        self.max_new_tokens = checked_tokens(self.max_new_tokens)
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}.")
        self.seed = checked_seed(self.seed)

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.greedy or self.temperature < LOWEST_TEMPERATURE

    def distribution(self) -> dict[str, Any]:
        """The options of `Sampling` that say from what is sampled."""
        if self.is_greedy:
            return {"temperature": 1.0, "top_p": 1.0, "top_k": 1}
        return {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


def checked_temperature(value: float) -> float:
    """The temperature. Raises `UserError` if it is below 0 or no number."""
    if not 0 <= value < math.inf:
        raise UserError(f"temperature must be at least 0, got {value}.")
    return value


def checked_tokens(value: int) -> int:
    """The number of tokens. Raises `UserError` if it is below 1."""
    if value < 1:
        raise UserError(f"max_new_tokens must be at least 1, got {value}.")
    return value


def checked_seed(value: int) -> int:
    """The seed. Raises `UserError` if the random number generator does not take it."""
    if not 0 <= value <= HIGHEST_SEED:
        raise UserError(f"seed must be from 0 to {HIGHEST_SEED}, got {value}.")
    return value


def parse_with_models(
    types: Sequence[type], words: Sequence[str], description: str | None, main_options: MainOptions
) -> tuple[Any, ...]:
    """Parses the options of a command whose words outside of options are models.

    Args:
        types: dataclasses of the options, `CastArguments` among them.
        words: words of the command line.
        description: text of `--help` above the options.
        main_options: the options that `--help` shows.

    Raises:
        UserError: an option is wrong, or the models are given twice.
    """
    models, rest = split_positionals(types, words)
    if models and any(word.partition("=")[0] == "--model" for word in rest):
        raise UserError(f"model: `{models[0]}` and --model are both given: give all models in one place.")
    if models:
        rest = ["--model", *models, *rest]
    return parse_recipe(
        types, rest, description=description, main_options=main_options, usage="[RUN | MODEL ...] [options]"
    )
