"""Trains the stages of the pipeline, with what `amounts.py` chooses and the options of the user's sections."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase, set_seed

from hf_rlhf_ext.checkpointing import last_complete_checkpoint
from hf_rlhf_ext.cli.first_checks import check_policy_folder, check_reward_folder, check_training
from hf_rlhf_ext.cli.lineage import public_name
from hf_rlhf_ext.cli.options import ComparisonArguments, DataArguments, ModelArguments
from hf_rlhf_ext.cli.stage_options import model_options, trainer_options, warmup_steps
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.privacy import strip_local_paths
from hf_rlhf_ext.modeling.loading import base_and_revision, found_or_refused, load_tokenizer
from hf_rlhf_ext.modeling.locations import EMBEDDED_MODEL, resolve_location
from hf_rlhf_ext.quality.reward_check import RewardCheck
from hf_rlhf_ext.recipes.check_reward import CheckArguments, check
from hf_rlhf_ext.recipes.pipeline_parts.amounts import (
    LEARNING_RATES,
    LENGTHS,
    MAX_LENGTH,
    ROLLOUT,
    SMALL,
    batch_of,
    completion_length_of,
    epochs_of,
    say_what_is_chosen,
    updates_of,
)
from hf_rlhf_ext.recipes.pipeline_parts.options import PipelineArguments, naming_section, parse_section
from hf_rlhf_ext.recipes.ppo import train_ppo
from hf_rlhf_ext.recipes.reward import train_ensemble, train_reward
from hf_rlhf_ext.recipes.sft import check_metric, train_sft
from hf_rlhf_ext.reward.scorer import local_folder
from hf_rlhf_ext.training.optimizers import require_optimizer


class Training:
    """Trains with the options of a run. A stage that was stopped goes on from its last complete checkpoint.

    Args:
        args: options of the pipeline.
        model_args: the base, its precision, and the size of new adapters.
        verbose: whether to show all output of the trainers.
    """

    def __init__(self, args: PipelineArguments, model_args: ModelArguments, *, verbose: bool = False):
        self.args = args
        self.model_args = model_args
        self.verbose = verbose
        self.data = args.folder / "data"
        self.base, self.base_revision = self._base()

    def _base(self) -> tuple[str, str | None]:
        """Name and revision of the base, on which the reward model is trained.

        Raises:
            UserError: it is an adapter.
        """
        name, revision = self.model_args.model_name_or_path, self.model_args.revision
        given = self.args.sft_policy
        if given is None:
            if base_and_revision(name, revision)[0] is not None:
                raise UserError(f"model_name_or_path: {name} is an adapter: give it as sft_policy, or name its base.")
            return name, revision
        base, base_revision = base_and_revision(given)
        return base or given, base_revision  # without a base, it is a whole model

    def check_model(self) -> None:
        """Reads the configuration of the base.

        Raises:
            UserError: there is no such model, or `model_name_or_path` is another one than the base of `sft_policy`.
        """
        path, location = resolve_location(self.base, self.base_revision)
        option = "model_name_or_path" if self.args.sft_policy is None else "sft_policy"
        with found_or_refused(option, self.base):
            config = AutoConfig.from_pretrained(path, trust_remote_code=self.args.trust_remote_code, **location)
        name = self.model_args.model_name_or_path
        if name not in (EMBEDDED_MODEL, self.base) and not is_same_model(name, self.base):
            raise UserError(f"model_name_or_path: {name}, but the base of sft_policy is {self.base}: leave it out.")
        self.size = "small" if getattr(config.get_text_config(), "hidden_size", SMALL) < SMALL else "large"
        self.positions = getattr(config.get_text_config(), "max_position_embeddings", None)

    def check_sections(self) -> None:
        """Raises `UserError` for a mistake in a section, before anything is read."""
        for name in ("sft", "reward", "ppo"):
            options = self.options(name)
            with naming_section(name):
                check_options(name, options)

    def check_given_models(self) -> None:
        """Raises `UserError` if `sft_policy` or a reward model is not there, or is a model of another kind.

        Reward models on the Hub are downloaded, so that a misspelt name is found before training.
        """
        if self.args.sft_policy is not None:
            check_policy_folder(self.args.sft_policy, "sft_policy")
        for name in self.args.reward_model:
            check_reward_folder(name)
            local_folder(name, None, code=self.args.trust_remote_code)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        name = self.args.sft_policy or self.base
        revision = None if self.args.sft_policy else self.base_revision
        return load_tokenizer(name, revision=revision, trust_remote_code=self.args.trust_remote_code)

    def options(self, name: str, **defaults: Any) -> tuple[Any, ...]:
        """The dataclasses of options of a section: what the user gave, and else `defaults`."""
        placeholders = {"dataset_name": "data", "output_dir": str(self.args.folder / name)}
        if name == "ppo":
            models = self.args.reward_model
            # Without a reward, only the names of options are checked.
            if self.args.trains_reward_model or not self.args.has_reward:
                models = [str(self.args.folder / "reward_model")]
            placeholders |= {"reward_model": models, "reward_funcs": self.args.reward_funcs}
        return parse_section(name, getattr(self.args, name), self._common() | placeholders | defaults)

    def given(self, name: str) -> dict[str, Any]:
        """The trainer's options that the user's section has, with the values as the command reads them."""
        args = self.options(name)[-1]
        return {option: getattr(args, option) for option in getattr(self.args, name) if hasattr(args, option)}

    def _common(self) -> dict[str, Any]:
        """Options that all trainers share."""
        own = {"seed": self.args.seed, "trust_remote_code": self.args.trust_remote_code}
        return trainer_options(self.model_args) | own

    def _learning_rate(self, name: str) -> float:
        rate = LEARNING_RATES[self.size][name]
        return rate if self.model_args.use_peft else rate / 10

    def _stage_options(self, name: str, folder: Path, n_rows: int, **more: Any) -> tuple[Any, ...]:
        """The options of SFT or of the reward model."""
        given = self.given(name)
        batch = given.get("per_device_train_batch_size", batch_of(n_rows))
        epochs = given.get("num_train_epochs", epochs_of(n_rows))
        defaults: dict[str, Any] = {
            "output_dir": str(folder),
            "num_train_epochs": epochs,
            "per_device_train_batch_size": batch,
            "per_device_eval_batch_size": 8,
            "learning_rate": self._learning_rate(name),
            "warmup_steps": warmup_steps(n_rows, epochs, batch),
            "max_length": MAX_LENGTH,
            "logging_steps": 10,
            "save_strategy": "steps",
            "save_steps": 0.2,  # of all steps
            "save_total_limit": 1,
            "resume_from_checkpoint": last_complete_checkpoint(folder),
        }
        say_what_is_chosen(name, given, defaults)
        return self.options(name, **defaults, **more)

    def _rows(self, role: str, checkpoint: Any) -> DataArguments:
        """The rows of a stage, which the data stage has written: how the user's file is read is done with."""
        folder = self.data / role
        has_test = (folder / "test.jsonl").is_file()
        return DataArguments(
            dataset_name=str(folder), dataset_test_split="test" if has_test else None, overwrite=checkpoint is None
        )

    def sft(self, n_rows: int) -> dict[str, Any]:
        """Trains on the demonstrations. Returns what the stage measured."""
        folder = self.args.folder / "sft"
        _, demonstrations, _, _, args = self._stage_options("sft", folder, n_rows)
        # The data stage has made one row per answer, and its column of categories is `category`.
        demonstrations = replace(demonstrations, every_turn=False, category_column="category")
        set_seed(self.args.seed)  # a new adapter is initialized before the trainer sets the seed
        rows = self._rows("demonstrations", args.resume_from_checkpoint)
        model_args = model_options(self.model_args, self.base, self.base_revision)
        train_sft(rows, model_args, args, demonstrations=demonstrations, verbose=self.verbose, says_rows=False)
        return section_of_report(folder, "sft")

    def reward_model(self, n_rows: int) -> dict[str, Any]:
        """Trains a reward model, or an ensemble, from the base on the comparisons. Returns what the stage measured."""
        folder = self.args.folder / "reward_model"
        more = {"overflow": "drop", "unrenderable": "drop", "max_tokens_per_batch": 4096}
        _, comparisons, ensemble, _, _, args = self._stage_options("reward", folder, n_rows, **more)
        comparisons = replace(comparisons, category_column=None)
        set_seed(self.args.seed)  # the head is initialized when the model is loaded
        model_args = model_options(self.model_args, self.base, self.base_revision)
        if ensemble.members == 1:
            rows = self._rows("comparisons", args.resume_from_checkpoint)
            train_reward(rows, model_args, args, comparisons=comparisons, verbose=self.verbose, says_rows=False)
        else:
            # Finished members are kept, and each goes on from its own checkpoint.
            args.resume_from_checkpoint = True if (folder / "member-0").is_dir() else None
            rows = self._rows("comparisons", args.resume_from_checkpoint)
            train_ensemble(
                rows, model_args, args, ensemble, comparisons=comparisons, verbose=self.verbose, says_rows=False
            )
        return section_of_report(folder, "reward_model")

    def ppo(self, n_prompts: int, answers: list[str]) -> dict[str, Any]:
        """Trains the policy. Returns what the stage measured.

        Args:
            n_prompts: number of prompts to train on.
            answers: texts of the user's answers, from whose lengths that of completions is chosen.
        """
        folder = self.args.folder / "policy"
        checkpoint = last_complete_checkpoint(folder)
        _, rewards, _, _, args = self.options("ppo", **self._ppo_defaults(folder, n_prompts, answers, checkpoint))
        set_seed(self.args.seed)
        rows = self._rows("prompts", checkpoint)
        start, revision = self.start()
        train_ppo(
            rows, rewards, model_options(self.model_args, start, revision), args, verbose=self.verbose, says_rows=False
        )
        return section_of_report(folder, "ppo")

    def _ppo_defaults(self, folder: Path, n_prompts: int, answers: list[str], checkpoint: str | None) -> dict[str, Any]:
        given = self.given("ppo")
        batch = given.get("per_device_train_batch_size", ROLLOUT // 2)
        n_mini_batches = given.get("num_mini_batches", 2)
        rollout = batch * n_mini_batches * given.get("gradient_accumulation_steps", 1)
        steps_per_update = given.get("num_ppo_epochs", 2) * n_mini_batches
        defaults: dict[str, Any] = {
            "output_dir": str(folder),
            "reward_weights": self.args.reward_weights,
            "per_device_train_batch_size": batch,
            "per_device_eval_batch_size": 32,
            "num_mini_batches": n_mini_batches,
            "num_ppo_epochs": 2,
            "learning_rate": self._learning_rate("ppo"),
            "critic": "head",  # needs one forward pass less than an adapter
            "max_tokens_per_batch": 4096,
            "temperature": 0.8,  # at 1.0, a model of 135M parameters is often incoherent
            "kl_coef": 0.1,
            "logging_steps": steps_per_update,  # one log per update
            "save_strategy": "steps",
            "save_steps": 2 * steps_per_update,
            "save_total_limit": 2,  # a guard goes back to the last one
            "unrenderable": "drop",
            "resume_from_checkpoint": checkpoint,
        }
        if given.get("critic", "head") == "head":
            defaults["value_learning_rate"] = 1e-3  # the head has one layer and starts from zero
        if "num_train_epochs" not in given:  # max_steps would come first
            per_prompt = given.get("num_generations", 1)
            defaults["max_steps"] = updates_of(n_prompts, rollout // per_prompt) * steps_per_update
        if "max_completion_length" not in given:
            defaults["max_completion_length"] = completion_length_of(answers, self.tokenizer())
        say_what_is_chosen("ppo", given, defaults)
        return defaults

    def longest_prompt(self, role: str) -> tuple[int | None, str]:
        """Tokens that a prompt of a file may have, and what this follows from; None without a limit.

        The reward model's trainer drops long comparisons itself.
        """
        if role == "demonstrations":
            max_length = self.given("sft").get("max_length", MAX_LENGTH)
            most = None if max_length is None else max_length - 1
            return most, "max_length in the section sft, and at least one token of the answer"
        if role == "comparisons":
            return None, ""
        given = self.given("ppo")
        limits = {}
        if given.get("max_prompt_length") is not None:
            limits[given["max_prompt_length"]] = "max_prompt_length in the section ppo"
        if self.positions is not None and self.positions > 0:  # -1 stands for no limit
            # The length of completions is chosen later.
            completion = given.get("max_completion_length", LENGTHS[1])
            limits[self.positions - completion] = (
                f"the model has {self.positions} positions, and up to {completion} are for the completion"
            )
        most = min(limits, default=None)
        return most, limits.get(most, "")

    def start(self) -> tuple[str, str | None]:
        """The policy that PPO starts from, and its revision."""
        if self.args.demonstrations:
            return str(self.args.folder / "sft"), None
        if self.args.sft_policy:
            return self.args.sft_policy, None
        return self.base, self.base_revision

    def check(self) -> list[dict[str, Any]]:
        """Checks each reward model on comparisons that it was not trained on. Returns what was measured of each."""
        models = self.args.reward_model or [str(self.args.folder / "reward_model")]
        measured = []
        for number, name in enumerate(models, start=1):
            folder = self.args.folder / "check"
            if len(models) > 1:
                folder = folder / f"model-{number}"
            options = CheckArguments(
                reward_model=name, output_dir=str(folder), trust_remote_code=self.args.trust_remote_code
            )
            data, comparisons = self._rows_of_check()
            entry: dict[str, Any] = {"model": public_name(name)}
            try:
                entry |= summary_of_check(check(data, options, comparisons))
            except UserError as error:  # no row is left, or each is a tie
                entry["reason"] = strip_local_paths(str(error)).rstrip(".")  # it is in the reports of models
            measured.append(entry)
        return measured

    def _rows_of_check(self) -> tuple[DataArguments, ComparisonArguments]:
        """The held-out comparisons; of a reward model that was given, the user's file."""
        if not self.args.reward_model:
            folder = str(self.data / "comparisons")
            return DataArguments(dataset_name=folder, dataset_test_split="test", overwrite=True), ComparisonArguments()
        data, comparisons, *_ = self.options("reward")
        return replace(data, dataset_name=self.args.comparisons, overwrite=True), comparisons


def check_options(name: str, options: tuple[Any, ...]) -> None:
    """Raises `UserError` for options of a section that their command refuses before it loads anything."""
    args = options[-1]
    check_training(args)
    require_optimizer(args, warn=False)
    if name == "sft":
        check_metric(args)
    if name == "ppo":
        rewards = copy.copy(options[1])
        rewards.reward_model = []  # that of this run is not trained yet; given ones are no options of the section
        rewards.check(args)
        rewards.load_eval()


def is_same_model(name: str, other: str) -> bool:
    """Whether two names are the same folder or Hub id: an adapter records the absolute path of its base."""
    first, second = Path(name).expanduser(), Path(other).expanduser()
    if first.is_dir() and second.is_dir():
        return first.samefile(second)
    return name == other


def summary_of_check(checked: RewardCheck) -> dict[str, Any]:
    """The numbers of a check that the report shows."""
    metrics = checked.metrics
    summary = {name: metrics[name] for name in ("accuracy", "length_baseline", "pairs") if name in metrics}
    if "accuracy_low" in metrics:  # a single prompt has no interval
        summary["accuracy_ci95"] = [metrics["accuracy_low"], metrics["accuracy_high"]]
    return summary | {
        "decided_pairs": int((checked.judged.targets != 0.5).sum()),  # accuracy leaves ties out
        "better_than_chance": metrics.get("accuracy_low", 0.0) > 0.5,
        "ready": not checked.problems,
        "verdict": checked.verdict,
        "problems": checked.problems,
    }


def section_of_report(folder: Path, section: str) -> dict[str, Any]:
    """What a stage measured, from the report in its folder, and the number of rows that it trained on.

    The latter may be smaller than that of the data stage: a section may have filters, such as `min_rating`.
    """
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report[section] | {"trained_rows": report["rows"]["train"]}
