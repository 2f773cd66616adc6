# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-rlhf-ext==0.1.*"]
# ///
"""Own data to a policy in one command: SFT on demonstrations, a reward model on comparisons, a check of it, and PPO.

hf-rlhf pipeline --config mine.yaml
hf-rlhf pipeline --comparisons pairs.csv --prompts prompts.txt --reward_funcs rewards.py:short --output_dir runs/mine

Any part may be missing. `hf-rlhf init FILES… --output mine.yaml` writes a config for your files.
Finished stages are kept: the same command goes on where the run stopped.
"""

# First, because it hides messages of other libraries that appear when they are imported.
from hf_rlhf_ext.cli.output import prepare_output_dir, refuse_used_folder
from hf_rlhf_ext.cli.parsing import parse_recipe, run_recipe

# isort: split
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from hf_rlhf_ext.checkpointing import last_complete_checkpoint
from hf_rlhf_ext.cli import main_options
from hf_rlhf_ext.cli.functions import reward_function
from hf_rlhf_ext.cli.lineage import lineage_of, public_name
from hf_rlhf_ext.cli.locking import only_process
from hf_rlhf_ext.cli.options import DataArguments, ModelArguments, TerminalArguments
from hf_rlhf_ext.cli.quiet import library_output
from hf_rlhf_ext.cli.run_folder import PIPELINE_FILE
from hf_rlhf_ext.cli.stages import MANIFEST, StageRunner, has_manifest
from hf_rlhf_ext.compat import get_callable_name
from hf_rlhf_ext.data.prompt_form import MESSAGES, TEXT, PromptForm
from hf_rlhf_ext.data.text import plain_text
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.readers.formats import load_rows
from hf_rlhf_ext.recipes.pipeline_parts import data as user_data
from hf_rlhf_ext.recipes.pipeline_parts.data import Row, UserFile
from hf_rlhf_ext.recipes.pipeline_parts.options import (
    PipelineArguments,
    section_named_by,
    settings_of,
    split_names,
    with_digest,
)
from hf_rlhf_ext.recipes.pipeline_parts.report import print_results, print_verdict, write_results
from hf_rlhf_ext.recipes.pipeline_parts.rewards import reward_in_words, sources_of, try_function
from hf_rlhf_ext.recipes.pipeline_parts.training import Training

ARGUMENTS = (PipelineArguments, TerminalArguments, ModelArguments)

OF_READING = ("every_turn", "category_column", *DataArguments.__dataclass_fields__)
"""Options of sections that the data stage depends on, not the training."""
SECTION_OF_ROLE = {"demonstrations": "sft", "comparisons": "reward", "prompts": "ppo"}
PROMPTS = Path("data", "prompts", "train.jsonl")
"""The prompts of PPO in the folder of a run."""
STAGES_WITH_MODELS = {"sft": ("sft", "sft"), "reward": ("reward_model", "reward_model"), "ppo": ("ppo", "policy")}
"""Stage and folder of the model whose options a section has."""


class Pipeline:
    """The stages in their order. Each reads the files of the stages before it.

    Args:
        args: options of the pipeline.
        model_args: the base, its precision, and the size of new adapters.
        verbose: whether to show all output of the trainers.
    """

    def __init__(self, args: PipelineArguments, model_args: ModelArguments, *, verbose: bool = False):
        self.args = args
        self.model_args = model_args
        self.folder = args.folder
        self.training = Training(args, model_args, verbose=verbose)

    # ---- Before the first stage ----

    def check(self) -> None:
        """Refuses what would fail later, before anything is written or a model is loaded, and says what is not used."""
        for line in self.args.unused():
            print(line)
        self.training.check_sections()
        _ = self.functions
        if len(self.args.reward_names()) > 1:
            print(self.reward_in_words())  # the order of the weights is seen before anything is trained
        self.training.check_given_models()
        self.training.check_model()
        finished = set() if self.args.overwrite else finished_stages(self.folder)
        if "data" not in finished:
            self.try_functions(self.files[-1].train)
        elif "ppo" not in finished and (self.folder / PROMPTS).is_file():
            self.try_functions(list(load_rows(str(self.folder / PROMPTS))))  # they may be others than at the first call

    @cached_property
    def functions(self) -> dict[str, Callable]:
        """The reward functions by the names under which they were given."""
        return {name: reward_function(name, "reward_funcs") for name in self.args.reward_funcs}

    @cached_property
    def files(self) -> list[UserFile]:
        """The user's files, read and split."""
        args = self.args
        files = []
        if args.demonstrations:
            data, options, *_ = self.training.options("sft")
            files.append(user_data.read_demonstrations(args.demonstrations, data, options))
        if args.comparisons:
            data, options, *_ = self.training.options("reward")
            files.append(user_data.read_comparisons(args.comparisons, data, options))
        if args.has_reward and args.prompts:
            data, *_ = self.training.options("ppo")
            files.append(user_data.read_prompts(args.prompts, data))
        user_data.in_one_form(files, asks_in_chat=self.asks_in_chat)
        if args.has_reward and not args.prompts:
            source = next(file for role in ("comparisons", "demonstrations") for file in files if file.role == role)
            files.append(user_data.prompts_of(source))
        for file in files:
            limit, why = self.training.longest_prompt(file.role)
            if limit is not None:
                user_data.drop_long_prompts(file, self.training.tokenizer(), limit, why)
        for file in files:
            if file.role == "comparisons" and not args.trains_reward_model:
                file.is_trained_on = False
                file.lines.append("  all of them check the reward model that is given")
        user_data.split_rows([file for file in files if file.is_trained_on], args.heldout_share, args.seed)
        return files

    def asks_in_chat(self) -> bool:
        """Whether the policy is asked in messages, where no training data decide: from how it was trained, if known."""
        for name in (self.args.sft_policy, *self.args.reward_model):
            form = PromptForm.load(name).prompt_form if name else None
            if form in (TEXT, MESSAGES):
                return form == MESSAGES
        return self.training.tokenizer().chat_template is not None

    def try_functions(self, prompts: list[Row]) -> None:
        """Calls each reward function with two of the prompts, so that its mistakes are found before training."""
        if self.functions:
            tokenizer = self.training.tokenizer()
            for name, function in self.functions.items():
                where = self.args.prompts or "the prompts"
                try_function(name, function, prompts, tokenizer, where=where)

    # ---- The folder ----

    def given_for(self, role: str) -> tuple[str, str | None]:
        """The file, folder or Hub id that has the rows of a role, and its revision on the Hub."""
        data = self.data_of(role)
        return data.dataset_name, data.dataset_revision

    def data_of(self, role: str) -> DataArguments:
        """Which rows of a role were read: the file, folder or Hub id, its revision, configuration and split."""
        given = {
            "demonstrations": self.args.demonstrations,
            "comparisons": self.args.comparisons,
            "prompts": self.args.prompts or self.args.comparisons or self.args.demonstrations,
        }[role]
        named = [role, *SECTION_OF_ROLE]  # two roles may have one file, each read with the options of its own section
        source = next(name for name in named if getattr(self.args, name) == given)
        section = getattr(self.args, SECTION_OF_ROLE[source])
        where = ("dataset_revision", "dataset_config", "dataset_train_split")
        return DataArguments(dataset_name=given, **{name: section[name] for name in where if name in section})

    def settings(self) -> dict[str, Any]:
        """What finished stages depend on. Files are named with a digest, so that changed ones are refused."""
        defaults = vars(ModelArguments())
        changed = {name: value for name, value in vars(self.model_args).items() if value != defaults[name]}
        settings = changed | {"seed": self.args.seed, "heldout_share": self.args.heldout_share}
        settings["model"] = with_digest(settings.pop("model_name_or_path", self.model_args.model_name_or_path))
        # Files may be given and not used, until a reward is added.
        settings["stages"] = " → ".join(self.args.stages())
        for role in SECTION_OF_ROLE:
            if getattr(self.args, role):
                name, revision = self.given_for(role)
                settings[role] = lineage_of(name, revision, dataset=True)
        if self.args.sft_policy:
            settings["sft_policy"] = lineage_of(self.args.sft_policy)
        if self.args.reward_model:
            settings["reward_model"] = [lineage_of(name) for name in self.args.reward_model]
        settings |= settings_of(self.args)
        if self.functions:
            settings["ppo.reward_funcs"] = self.sources_of_functions()
        if "eval_reward_funcs" in self.args.ppo:
            names = split_names(self.args.ppo["eval_reward_funcs"], "eval_reward_funcs")
            functions = {name: reward_function(name, "eval_reward_funcs") for name in names}
            settings["ppo.eval_reward_funcs"] = sources_of(functions)
        return json.loads(json.dumps(settings, default=str))  # as the manifest has them

    def open_stages(self) -> StageRunner:
        """The stages in the folder of the run.

        Options of a stage that has trained nothing yet may differ from those of an earlier call: they were corrected.
        """
        settings = self.settings()
        finished = finished_stages(self.folder)
        changeable = []
        for name in settings.keys() | settings_in(self.folder).keys():
            section, dot, option = name.partition(".")
            if not dot or option in OF_READING:
                continue
            stage, folder = STAGES_WITH_MODELS[section]
            has_begun = last_complete_checkpoint(self.folder / folder) or (self.folder / folder / "member-0").is_dir()
            if stage not in finished and not has_begun:
                changeable.append(name)
        return StageRunner(self.folder, settings, self.args.stages(), changeable=changeable)

    def write_config(self) -> None:
        """Writes the options as they were run, for `--config`."""
        defaults = vars(ModelArguments())
        config = self.args.as_config()
        config["model_name_or_path"] = self.model_args.model_name_or_path
        for name, value in vars(self.model_args).items():
            if value != defaults[name]:
                config[name] = value
        text = yaml.safe_dump(json.loads(json.dumps(config, default=str)), sort_keys=False)
        (self.folder / PIPELINE_FILE).write_text(text, encoding="utf-8")

    # ---- The stages ----

    def run(self, stages: StageRunner) -> None:
        """Runs the stages that are not finished.

        Raises:
            UserError: the reward model is not ready, and `require_ready` is set.
        """
        names = self.args.stages()
        data = stages.run("data", self.describe_data(), self.make_data)
        if "sft" in names:
            n_rows = data["demonstrations"]["train"]
            what = f"on {n_rows} demonstrations, from {self.training.base}"
            stages.run("sft", what, lambda: self.training.sft(n_rows))
        if "reward_model" in names:
            n_rows = data["comparisons"]["train"]
            what = f"trained on the comparisons of {n_rows} prompts"
            stages.run("reward_model", what, lambda: self.training.reward_model(n_rows))
        if "check" in names:
            checked = stages.run("check", "whether the reward model is ready for PPO", self.check_reward)
            self.judge_check(checked, is_over=stages.is_finished("ppo"))
        if "ppo" in names:
            n_prompts = data["prompts"]["train"]
            what = f"from {self.first_policy()}, on {n_prompts} prompts"
            stages.run("ppo", what, lambda: self.training.ppo(n_prompts, self.answers()))

    def describe_data(self) -> str:
        given = [getattr(self.args, role) for role in SECTION_OF_ROLE]
        return f"reads {', '.join(name for name in given if name)}, and holds rows out"

    def make_data(self) -> dict[str, Any]:
        """Writes the rows to train on and the held-out ones, and says what was read."""
        for file in self.files:
            if file.is_trained_on:
                file.write(self.folder / "data")
            print("\n".join(file.lines))
        return dict(user_data.all_counts(self.files))

    def check_reward(self) -> list[dict[str, Any]]:
        """Checks the reward model, if there are comparisons for it."""
        if self.args.trains_reward_model:
            path = self.folder / "data" / "comparisons" / "test.jsonl"
            if not path.is_file():
                return [self.not_checked("no comparison is held out")]
            if all(target == 0.5 for row in load_rows(str(path)) for target in row["targets"]):
                return [self.not_checked("every held-out judgment is a tie")]
        return self.training.check()

    def not_checked(self, reason: str) -> dict[str, Any]:
        return {"model": "reward_model", "reason": reason}

    def judge_check(self, checked: list[dict[str, Any]], *, is_over: bool) -> None:
        """Says what the check found, and refuses to go on if the options ask for it and PPO is not over."""
        for entry in checked:
            print_verdict(entry)
        if not (self.args.require_ready or is_over) and not all(entry.get("ready", True) for entry in checked):
            print("PPO runs anyway; require_ready: true would stop here.")
        if self.args.require_ready and not is_over and not all(entry.get("ready") for entry in checked):
            raise NotReady(
                "require_ready: the reward model is not ready, so PPO was not run (report.md says why): give more "
                "comparisons, or go on with the same command and --require_ready false."
            )

    def answers(self) -> list[str]:
        """Texts of the user's answers, from whose lengths that of completions is chosen."""
        for role, column in (("demonstrations", "completion"), ("comparisons", "completions")):
            path = self.folder / "data" / role / "train.jsonl"
            if path.is_file():
                found = load_rows(str(path))[column]
                texts = [text for texts in found for text in texts] if column == "completions" else found
                return [plain_text(text) for text in texts[:MOST_ANSWERS]]
        return []

    # ---- In words ----

    def first_policy(self) -> str:
        """What PPO starts from."""
        if self.args.demonstrations:
            return "the SFT policy"
        if self.args.sft_policy:
            return public_name(self.args.sft_policy)
        return f"the base model {public_name(self.training.base)}, as no demonstrations are given"

    def reward_in_words(self) -> str:
        """The reward of PPO, such as `reward = 1 × reward model + 0.5 × short`."""
        n_models = len(self.args.reward_model) or int(self.args.trains_reward_model)
        names = [get_callable_name(function) for function in self.functions.values()]
        return reward_in_words(n_models, names, self.args.reward_weights)

    def sources_of_functions(self) -> dict[str, str]:
        """Name of each reward function -> the file that it is in, with a digest."""
        return sources_of(self.functions)


MOST_ANSWERS = 1000
"""Answers whose lengths are measured: more change nothing."""


class NotReady(UserError):
    """The reward model is not ready, and PPO was not run."""


def finished_stages(folder: Path) -> set[str]:
    """Names of the finished stages in a folder."""
    return set(_manifest(folder).get("stages", ()))


def settings_in(folder: Path) -> dict[str, Any]:
    """The settings of the run in a folder; empty without one."""
    return _manifest(folder).get("settings", {})


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def run_pipeline(
    args: PipelineArguments, model_args: ModelArguments, *, verbose: bool = False, kind: type[Pipeline] = Pipeline
) -> dict[str, Any]:
    """Runs the stages that are not finished, and writes the report.

    Args:
        args: options of the pipeline.
        model_args: the base, its precision, and the size of new adapters.
        verbose: whether to show all output of the trainers.
        kind: the class of the stages.

    Returns:
        The content of `report.json`.

    Raises:
        UserError: a mistake in the options or files; or the reward model is not ready and `require_ready` is set, after
            the report is written.
    """
    folder = args.folder
    is_resumed = has_manifest(folder) and not args.overwrite
    if not (is_resumed or args.overwrite):
        refuse_used_folder(folder, "pipeline")
    pipeline = kind(args, model_args, verbose=verbose)
    pipeline.check()
    with only_process(folder):
        prepare_output_dir(folder, resume=is_resumed, overwrite=args.overwrite)
        stages = pipeline.open_stages()
        pipeline.write_config()
        try:
            pipeline.run(stages)
        except NotReady:
            write_results(pipeline, stages)
            raise
        stages.announce("report", "report.md, report.json and model cards")
        report = write_results(pipeline, stages)
    print_results(report, pipeline)
    return report


def main() -> None:
    try:
        args, terminal, model_args = parse_recipe(ARGUMENTS, description=__doc__, main_options=main_options.PIPELINE)
    except UserError as error:
        raise UserError(section_named_by(str(error)) or str(error)) from None
    with library_output(verbose=terminal.verbose):
        run_pipeline(args, model_args, verbose=terminal.verbose)


if __name__ == "__main__":
    run_recipe(main)
