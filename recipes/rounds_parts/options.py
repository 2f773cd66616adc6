"""The options of `hf-rlhf rounds`."""

from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from hf_rlhf_ext.cli.functions import reward_function
from hf_rlhf_ext.cli.options import check_at_least
from hf_rlhf_ext.collect.simulated import GoldReward
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.recipes.rounds_parts.gold import CheckedGold

JUDGES = ("page", "simulated", "mixed", "file")
STARTS = ("last", "sft")
LEARNERS = ("ppo", "dpo")

NOT_SETTINGS = (
    "rounds",
    "stop_when_not_better",
    "output_dir",
    "overwrite",
    "judge",
    "people",
    "simulated_people",
    "host",
    "port",
    "url",
    "prompts",
    "heldout_prompts",
    "eval_judgments",
)
"""Options that may differ from one call to the next in the same folder. The content of the prompts may not."""

UNUSED = {
    "judge": {
        "page": ("simulated_people", "noise"),
        "simulated": ("host", "port", "url"),
        "file": ("simulated_people", "noise", "wanted", "host", "port", "url"),
    },
    "learner": {
        "ppo": ("dpo_epochs",),
        "dpo": (
            "heldout_share",
            "updates",
            "rollout",
            "value_learning_rate",
            "reward_epochs",
            "reward_learning_rate",
        ),
    },
}
"""Options without effect, by the option that decides it and its value."""


@dataclass
class RoundsArguments:
    """Rounds of sampling, judging and training, all in one folder."""

    _argument_group_name = "rounds"

    prompts: str | None = field(
        default=None,
        metadata={"help": "Prompts to sample and to train on: file, folder or Hub id with a column `prompt`."},
    )
    heldout_prompts: str | None = field(
        default=None,
        metadata={"help": "Prompts to evaluate on. If `None`, `eval_prompts` of `prompts` are held out."},
    )
    rounds: int = field(
        default=3, metadata={"help": "Number of rounds in all. A larger number on the same folder goes on."}
    )
    prompts_per_round: int = field(default=160, metadata={"help": "Number of prompts that are judged in each round."})
    completions: int = field(default=2, metadata={"help": "Number of completions for each judged prompt."})
    heldout_share: float = field(
        default=0.1,
        metadata={
            "help": "Share of the judged prompts, from 0 to 0.5, that the reward model does not train on: its accuracy "
            "is measured on them. A prompt is on the same side in every round."
        },
    )
    eval_prompts: int = field(
        default=80, metadata={"help": "Number of held-out prompts on which policies are compared."}
    )
    eval_judgments: int | None = field(
        default=None,
        metadata={
            "help": "Number of pairs that are judged in the evaluation of a round, spread over the earlier policies. "
            "If `None`, every held-out prompt against every earlier policy with `--judge simulated`, else 60. 0 "
            "measures no win rate."
        },
    )
    judge: str = field(
        default="page",
        metadata={
            "help": "Who judges. `page`: people in a browser. `simulated`: simulated annotators. `mixed`: both. "
            "`file`: a file that you put into the folder.",
            "choices": list(JUDGES),
        },
    )
    people: list[str] = field(
        default_factory=list,
        metadata={"help": "Names of the people, who each get a link of their own: `anna tom`, or `anna,tom`."},
    )
    simulated_people: list[str] = field(
        default_factory=lambda: ["simulated"],
        metadata={
            "help": "Names of the simulated annotators. With several, it depends on their speed who judges which "
            "prompt, so that two runs with the same seed differ."
        },
    )
    wanted: int = field(default=1, metadata={"help": "Number of people who judge each prompt."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address at which the page is served."})
    port: int = field(
        default=0,
        metadata={"help": "Port number of the page. 0 is 8347 while it is free, so that links stay valid; else any."},
    )
    url: str | None = field(
        default=None,
        metadata={"help": "Address of the page in links, if people reach it by another one, such as a proxy's."},
    )
    gold: str | None = field(
        default=None,
        metadata={
            "help": "Gold reward of the evaluation and of simulated annotators, as `file.py:function` or "
            "`module:function`, of prompts and completions, which returns a number for each, or None where it does not "
            "apply. If `None`, the sentiment of VADER where annotators are simulated, else no gold reward."
        },
    )
    noise: float = field(
        default=0.1, metadata={"help": "Noise of simulated annotators, in units of the gold reward. 0: no errors."}
    )
    start_from: str = field(
        default="last",
        metadata={
            "help": "Policy that training starts from, to which the KL penalty refers too: the one of the `last` "
            "round, or the `sft` policy in every round.",
            "choices": list(STARTS),
        },
    )
    learner: str = field(
        default="ppo",
        metadata={"help": "`ppo` with a reward model, or `dpo` on the judged pairs.", "choices": list(LEARNERS)},
    )
    round_weight: float = field(
        default=1.0,
        metadata={
            "help": "A judgment has the weight `round_weight ** age` in the reward model, with its age in rounds. "
            "Below 1, older judgments count less than newer ones of the same batch. Not supported by `dpo`."
        },
    )
    stop_when_not_better: bool = field(
        default=False,
        metadata={
            "help": "Stop after a round whose policy does not win against the last one: the 95%% interval of its win "
            "rate is not above 0.5."
        },
    )
    updates: int = field(default=4, metadata={"help": "Number of PPO updates in each round."})
    rollout: int = field(default=32, metadata={"help": "Number of completions of each PPO update."})
    kl_coef: float = field(
        default=0.1, metadata={"help": "Reward per nat of KL to the start of the round; β of `dpo`."}
    )
    learning_rate: float = field(default=3e-4, metadata={"help": "Learning rate of the policy: scale of its steps."})
    value_learning_rate: float = field(
        default=1e-3, metadata={"help": "Learning rate of PPO's value head: scale of its steps."}
    )
    dpo_epochs: int = field(default=1, metadata={"help": "Number of passes of `dpo` over all judged pairs."})
    reward_epochs: int = field(
        default=1, metadata={"help": "Number of passes of the reward model over all judgments so far."}
    )
    reward_learning_rate: float = field(
        default=3e-4, metadata={"help": "Learning rate of the reward model: scale of its steps."}
    )
    reward_batch: int = field(
        default=8, metadata={"help": "Number of prompts in a batch of the reward model; of `dpo`, number of pairs."}
    )
    temperature: float = field(
        default=0.8, metadata={"help": "Temperature of all sampling: the scale that logits are divided by."}
    )
    max_completion_length: int = field(
        default=64, metadata={"help": "Maximum length of a completion in tokens, including the stop token."}
    )
    max_tokens_per_batch: int = field(
        default=4096, metadata={"help": "Maximum number of tokens in a forward pass, including padding."}
    )
    seed: int = field(default=0, metadata={"help": "Seed for prompts, sampling, judging and training."})
    output_dir: str = field(default="runs/rounds", metadata={"help": "Folder of the run."})
    overwrite: bool = field(
        default=False, metadata={"help": "Start from the beginning, and delete finished stages and judgments."}
    )

    def __post_init__(self):
        if self.prompts is None:
            raise UserError("prompts is required: a file, folder or Hub id with a column prompt (--prompts FILE).")
        check_at_least(
            self, rounds=1, prompts_per_round=1, completions=2, heldout_share=0, eval_prompts=2, eval_judgments=0
        )
        check_at_least(self, wanted=1, port=0, noise=0, round_weight=0, updates=1, rollout=2, kl_coef=0, seed=0)
        check_at_least(self, reward_epochs=1, reward_batch=1, dpo_epochs=1, max_completion_length=1)
        check_at_least(self, learning_rate=0, value_learning_rate=0, reward_learning_rate=0, max_tokens_per_batch=1)
        if not self.temperature > 0:
            raise UserError(f"temperature must be above 0, got {self.temperature}: 0 always gives the same completion.")
        for option in ("learning_rate", "value_learning_rate", "reward_learning_rate"):
            if getattr(self, option) == 0:
                raise UserError(f"{option} must be positive, got 0: nothing would be trained.")
        if self.heldout_share > 0.5:
            raise UserError(
                f"heldout_share must be at most 0.5, got {self.heldout_share}: it is a share of the prompts."
            )
        if self.rollout % 2:
            raise UserError(f"rollout must be an even number, got {self.rollout}: it is split into two mini-batches.")
        self._check_judge()
        self._check_learner()

    def _check_judge(self) -> None:
        for option in ("people", "simulated_people"):
            names = split_names(getattr(self, option))
            setattr(self, option, names)
            if len(set(names)) < len(names):
                raise UserError(f"{option}: {', '.join(names)} has a name twice: give each name once.")
        if self.judge in ("page", "mixed") and not self.people:
            raise UserError(f"people: --judge {self.judge} needs the names of the people: --people anna tom.")
        if self.judge not in ("page", "mixed") and self.people:
            raise UserError(f"people: --judge {self.judge} has no people: leave it out, or pass --judge mixed.")
        if self.judge in ("simulated", "mixed") and not self.simulated_people:
            raise UserError(f"simulated_people: --judge {self.judge} needs at least one name.")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise UserError(f"url: {self.url} is no address of a page: it must begin with https:// or http://.")
        both = set(self.people) & set(self.simulated_people)
        if self.judge == "mixed" and both:
            raise UserError(f"people: {', '.join(sorted(both))} is in simulated_people too: give other names.")
        n_judges = len(self.judges())
        if n_judges and self.wanted > n_judges:
            raise UserError(f"wanted: {self.wanted} judgments per prompt from {n_judges} people: name more people.")
        if self.stop_when_not_better and self.eval_judgments == 0:
            raise UserError("stop_when_not_better: eval_judgments is 0, so no win rate is measured: raise it.")

    def _check_learner(self) -> None:
        if self.learner == "dpo" and self.round_weight != 1.0:
            raise UserError("round_weight: TRL's DPOTrainer has no weights of rows: leave it out with --learner dpo.")
        if self.reward_batch == 1 and self.round_weight != 1.0:
            # The loss of a batch is divided by its sum of weights.
            raise UserError("round_weight: weights count within a batch, and reward_batch is 1: raise --reward_batch.")

    def judges(self) -> list[str]:
        """Names of all who judge in a store: people, simulated annotators, or both; none with `--judge file`."""
        names = []
        if self.judge in ("page", "mixed"):
            names += self.people
        if self.judge in ("simulated", "mixed"):
            names += self.simulated_people
        return names

    def unused(self) -> list[str]:
        """Lines that name options which were given, but have no effect with the chosen judge and learner."""
        lines = []
        for option, of_choice in UNUSED.items():
            choice = getattr(self, option)
            changed = [name for name in of_choice.get(choice, ()) if getattr(self, name) != _default_of(name)]
            if changed:
                lines.append(f"not used with --{option} {choice}: {', '.join(changed)}")
        return lines

    def settings(self) -> dict[str, Any]:
        """The options that finished stages depend on."""
        return {name: value for name, value in vars(self).items() if name not in NOT_SETTINGS}

    def load_gold(self) -> Callable[..., list[float | None]] | None:
        """The gold reward, or None if there is none.

        Raises:
            UserError: the function cannot be imported.
        """
        is_simulated = self.judge in ("simulated", "mixed")
        if self.gold is not None:
            return CheckedGold(reward_function(self.gold, "gold"), self.gold, needs_all=is_simulated)
        return GoldReward() if is_simulated else None

    def pairs_to_judge(self, n_prompts: int, n_policies: int) -> int:
        """Number of pairs that are judged in the evaluation of a round, over all earlier policies."""
        if self.eval_judgments is not None:
            return min(self.eval_judgments, n_prompts * n_policies)
        if self.judge == "simulated":
            return n_prompts * n_policies
        return min(60, n_prompts * n_policies)

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)


def split_names(words: Sequence[str]) -> list[str]:
    """Names that are given as words (`anna tom`), with commas (`anna,tom`), or both."""
    names = []
    for word in words:
        names += [name.strip() for name in word.split(",") if name.strip()]
    return names


def _default_of(option: str) -> Any:
    """The default of an option of `RoundsArguments`."""
    (spec,) = [spec for spec in fields(RoundsArguments) if spec.name == option]
    return spec.default if spec.default is not MISSING else spec.default_factory()
