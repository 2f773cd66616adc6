"""The options of `hf-rlhf best-of-n`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_rlhf_ext.cli.first_checks import check_policy_folder, check_reward_folder
from hf_rlhf_ext.cli.functions import reward_function
from hf_rlhf_ext.cli.options import DataArguments, check_at_least
from hf_rlhf_ext.cli.run_folder import is_run_folder
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.locations import EMBEDDED_MODEL
from hf_rlhf_ext.recipes.chat_parts.options import CastArguments, checked_seed
from hf_rlhf_ext.recipes.collect_parts.options import check_file_exists
from hf_rlhf_ext.reward_functions.named import is_call, texts_of

WRITTEN = ("demonstrations", "comparisons", "answers")
FORMS = ("auto", "text", "messages")


@dataclass
class PromptArguments:
    """The prompts, and how completions of them are sampled."""

    _argument_group_name = "prompts and sampling"

    dataset_name: str | None = field(
        default=None, metadata={"help": "Prompts: a file (jsonl, csv, txt, …), a folder, or a Hub id."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of the prompts."})
    columns: str | None = field(
        default=None,
        metadata={
            "help": "Which column has which role, as YAML or JSON text: '{prompt: question, system: instruction}'. If "
            "`None`, the column `prompt`."
        },
    )
    n_prompts: int | None = field(default=None, metadata={"help": "Number of prompts, from the first. `None`: all."})
    prompt_form: str = field(
        default="auto",
        metadata={
            "help": "What becomes of prompts that are text. `messages`: a turn of the user, which the chat template "
            "renders. `text`: the policy continues them. `auto`: messages if the policy has a chat template, unless it "
            "was trained on text.",
            "choices": list(FORMS),
        },
    )
    n: int = field(default=16, metadata={"help": "Number of completions of each prompt."})
    temperature: float = field(
        default=1.0,
        metadata={
            "help": "Scale that logits are divided by, above 0. KL in the report is to the policy at this scale."
        },
    )
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling; 1.0 samples from all tokens."})
    top_k: int = field(default=0, metadata={"help": "Number of most probable tokens to sample from; 0: all."})
    max_completion_length: int = field(
        default=256, metadata={"help": "Maximum length of a completion in tokens, including the stop token."}
    )
    batch_size: int = field(
        default=64,
        metadata={
            "help": "Number of completions that are sampled, scored and saved together. A stopped run loses at most so "
            "many."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})

    def __post_init__(self):
        if self.dataset_name is None:
            raise UserError("dataset_name is required: a file or a Hub id with prompts (--dataset_name prompts.jsonl).")
        check_at_least(self, n=1, n_prompts=1, max_completion_length=1, batch_size=1, top_k=0)
        if not self.temperature > 0:
            raise UserError(
                f"temperature must be above 0, got {self.temperature}: else all completions of a prompt are the same."
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}.")
        self.seed = checked_seed(self.seed)

    def check(self) -> None:
        """Raises `UserError` for a local file that is not there."""
        check_file_exists(self.dataset_name, "dataset_name")

    def column_roles(self) -> dict[str, Any] | None:
        """The roles of the columns that `--columns` gives."""
        return DataArguments(dataset_name=self.dataset_name, columns=self.columns).column_roles()

    def sampling(self) -> dict[str, Any]:
        """The options of `best_of_n` that say how completions are sampled."""
        return {
            "max_new_tokens": self.max_completion_length,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "seed": self.seed,
            "batch_size": self.batch_size,
        }


@dataclass
class ModelsArguments:
    """The policy that is sampled from, and the rewards."""

    _argument_group_name = "policy and rewards"

    model_name_or_path: str = field(
        default=EMBEDDED_MODEL,
        metadata={
            "help": "The policy: folder or Hub id of an adapter or a model, `.gguf` file, or the embedded model."
        },
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a policy on the Hub."})
    reward_model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the reward model or ensemble by which the best is chosen."}
    )
    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Reward functions, as `rewards.py:short`, `path/rewards.py:short` or `my_package.rewards:short`. "
            "Also built-in ones, as `'exact_match(column=answer)'`. With a reward model, the reward is the weighted "
            "sum."
        },
    )
    reward_weights: list[float] | None = field(
        default=None,
        metadata={"help": "One factor for each reward, that of the reward model first. If `None`, 1 each."},
    )
    gold: str | None = field(
        default=None,
        metadata={
            "help": "A reward that chooses nothing and only measures the best: a function, as `gold.py:score`, or the "
            "folder of a reward model. The report has its mean for every n."
        },
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Dtype of the weights of the policy's base. `auto`: as the adapter was trained, or else the "
            "fastest one on this machine.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    load_in_4bit: bool | None = field(
        default=None, metadata={"help": "Quantize the policy's base to NF4. If `None`, as the adapter was trained."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention implementation, as in Transformers."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code of the models. Only use it if you have read the code."}
    )

    def __post_init__(self):
        self.reward_funcs = texts_of(self.reward_funcs, "reward_funcs")
        if self.reward_model is None and not self.reward_funcs:
            raise UserError("give a reward: --reward_model FOLDER, or --reward_funcs rewards.py:function.")
        n_rewards = int(self.reward_model is not None) + len(self.reward_funcs)
        if self.reward_weights is not None and len(self.reward_weights) != n_rewards:
            raise UserError(
                f"reward_weights: {len(self.reward_weights)} for {n_rewards} rewards: give one for each, that of the "
                "reward model first."
            )

    def check(self) -> None:
        """Raises `UserError` for what local folders show, before anything is loaded."""
        if is_run_folder(self.model_name_or_path):
            raise UserError(
                f"model_name_or_path: {self.model_name_or_path} is the folder of a whole run: give one of its models, "
                f"such as {Path(self.model_name_or_path) / 'policy'}."
            )
        check_policy_folder(self.model_name_or_path)
        if self.reward_model is not None:
            check_reward_folder(self.reward_model)
        if self.gold is not None and not self.gold_is_function:
            check_reward_folder(self.gold, "gold")

    @property
    def gold_is_function(self) -> bool:
        """Whether `gold` names a function, and not a reward model."""
        return is_call(self.gold) or ".py" in self.gold or (":" in self.gold and not Path(self.gold).exists())

    def load_functions(self) -> list[Callable]:
        """The functions of `reward_funcs`."""
        return [reward_function(name, "reward_funcs") for name in self.reward_funcs]

    def load_gold(self) -> Callable | str | None:
        """The gold reward: a function, or the place of a reward model; `None` without one."""
        if self.gold is not None and self.gold_is_function:
            return reward_function(self.gold, "gold")
        return self.gold

    def cast(self) -> CastArguments:
        """How the models are loaded, for `load_cast`."""
        return CastArguments(
            dtype=self.dtype,
            load_in_4bit=self.load_in_4bit,
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass
class OutputArguments:
    """What is written, and where."""

    _argument_group_name = "output"

    write: list[str] = field(
        default_factory=lambda: ["demonstrations"],
        metadata={
            "help": "Files to write. `demonstrations`: the best completion of each prompt, for SFT (rejection-sampling "
            "fine-tuning). `comparisons`: the best and the worst one, for DPO or a reward model. `answers`: all "
            "completions with their rewards.",
            "choices": list(WRITTEN),
        },
    )
    output_dir: str = field(
        default="runs/best_of_n",
        metadata={"help": "Folder of samples, rows and report. The same command goes on where a run stopped."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Delete samples of an earlier run, and sample again."})
