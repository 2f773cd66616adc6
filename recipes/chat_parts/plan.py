"""Which models answer: found and checked before anything is loaded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peft import PeftConfig, TaskType

from hf_rlhf_ext.cli.run_folder import (
    RunFolder,
    completion_length,
    find_models,
    has_model,
    is_run_folder,
    system_of_card,
)
from hf_rlhf_ext.collect.sampling import PolicySpec
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.families import check_config
from hf_rlhf_ext.modeling.loading import base_and_revision, found_or_refused
from hf_rlhf_ext.modeling.locations import EMBEDDED_MODEL, resolve_location
from hf_rlhf_ext.recipes.chat_parts.options import CastArguments
from hf_rlhf_ext.recipes.chat_parts.rewards import load_functions, not_run, weights_of_run
from hf_rlhf_ext.recipes.collect_parts.sample import read_policy
from hf_rlhf_ext.reward.scorer import local_folder


@dataclass
class Plan:
    """What is to be loaded, checked as far as it can be without loading it.

    Attributes:
        specs: the models, in the order in which they answer.
        reward_model: folder or Hub id of the reward model; `None` for no scores.
        system: the system text of the run; `None` if it has none.
        notes: what of the run is left out, one line each.
        functions: functions that are added to the reward, by the names under which they were given.
        weights: weights of the reward model, if there is one, and of the functions.
        run: the run, if the models are those of one.
    """

    specs: list[PolicySpec]
    reward_model: str | None = None
    system: str | None = None
    notes: list[str] = field(default_factory=list)
    functions: dict[str, Callable] = field(default_factory=dict)
    weights: list[float] = field(default_factory=list)
    run: RunFolder | None = None

    def note_on_length(self, max_new_tokens: int) -> str | None:
        """Says how long completions were in training, if answers may have another length; `None` if not."""
        if self.run is not None:
            lengths = {self.run.completion_length} - {None}
        else:
            lengths = {completion_length(spec.location) for spec in self.specs} - {None}
        if not lengths - {max_new_tokens}:
            return None
        trained = " or ".join(map(str, sorted(lengths)))
        return f"answers have up to {max_new_tokens} tokens; in training they had up to {trained} (--max_new_tokens)"


def make_plan(args: CastArguments) -> Plan:
    """Finds the models that were asked for, and checks that they are there.

    Raises:
        UserError: a model or the reward model is not there, is no model of this kind, or has the name of another one.
    """
    words = args.model or [EMBEDDED_MODEL]
    for word in words:
        _refuse_question(word)
    plan = _plan_of_run(words[0]) if len(words) == 1 and is_run_folder(words[0]) else _plan_of_models(words)
    if args.reward_model is not None:
        plan.reward_model = args.reward_model
        plan.notes = [note for note in plan.notes if not note.startswith("reward")]
    if plan.reward_model is not None:
        _check_reward_model(plan.reward_model)
    for spec in plan.specs:
        _check_model(spec, args.trust_remote_code)
    _add_functions(plan, args.reward_funcs)
    return plan


def _add_functions(plan: Plan, names: Sequence[str]) -> None:
    """Adds the functions that the user names, and says which functions of the run are not run."""
    plan.functions = load_functions(names)
    plan.weights = [1.0] * (int(plan.reward_model is not None) + len(names))
    if plan.run is None:
        return
    if not names:
        if plan.run.reward_funcs:
            plan.notes.append(not_run(plan.run.reward_funcs, has_score=plan.reward_model is not None))
        return
    plan.weights, notes = weights_of_run(plan.run, plan.functions, plan.reward_model)
    plan.notes += notes


def _plan_of_run(folder: str) -> Plan:
    """Base, SFT policy, policy and reward model of a run."""
    run = find_models(folder)
    run.require_policy()
    specs = []
    for name, location, revision in (
        ("base", run.base, run.base_revision),
        ("sft", run.sft, None),
        ("policy", run.policy, None),
    ):
        if location is not None:
            specs.append(PolicySpec(name, location, revision))
    notes = [f"{name} left out: {reason}" for name, reason in run.left_out.items()]
    return Plan(specs, run.reward_model, run.system, notes, run=run)


def _plan_of_models(words: Sequence[str]) -> Plan:
    """Models of the command line, with the system text that their cards name, if it is the same one."""
    plan = Plan(_named_specs(words))
    texts = {system_of_card(spec.location) for spec in plan.specs} - {None}
    if len(texts) == 1:
        plan.system = texts.pop()
    elif texts:
        plan.notes.append("the cards of these models name different system texts: none is used (--system sets one)")
    return plan


def _refuse_question(word: str) -> None:
    """Raises `UserError` for a question where a model belongs."""
    if any(character.isspace() for character in word.strip()) and not Path(word.partition("=")[2] or word).exists():
        raise UserError(
            f"model: {word!r} is no model: type questions when the chat has begun, or send them through a pipe "
            "(generate: --prompts FILE)."
        )


def _named_specs(words: Sequence[str]) -> list[PolicySpec]:
    """The models of the command line. Two with the same last part of their path are called by the whole path."""
    specs = [read_policy(word) for word in words]
    names = [spec.name for spec in specs]
    named = []
    for spec in specs:
        name = spec.name if names.count(spec.name) == 1 else spec.location
        if any(other.name == name for other in named):
            raise UserError(f"model: {spec.location} is given twice: give each model once, or name it: NAME=MODEL.")
        named.append(PolicySpec(name, spec.location, spec.revision))
    return named


def _check_model(spec: PolicySpec, trust_remote_code: bool) -> None:
    """Refuses a model that is not there or that does not answer, before anything is loaded."""
    location = spec.location
    folder = Path(location).expanduser()
    if folder.is_dir():
        _refuse_folder_without_model(folder)
    try:
        base, revision = base_and_revision(location, spec.revision)
        if base is None:
            _check_whole_model(location, spec.revision, trust_remote_code)
            return
        adapter = str(folder) if folder.is_dir() else location
        if PeftConfig.from_pretrained(adapter, revision=spec.revision).task_type == TaskType.SEQ_CLS:
            raise UserError(f"{location} is a reward model, which does not answer: give it as --reward_model.")
        _check_whole_model(base, revision, trust_remote_code)
    except UserError as error:
        raise UserError(f"model: {str(error).removeprefix('model_name_or_path: ')}") from error


def _refuse_folder_without_model(folder: Path) -> None:
    """Raises `UserError` for a local folder that holds no single model, with what is in it instead."""
    if is_run_folder(folder):
        raise UserError(f"model: {folder} is the folder of a whole run: give it alone, or one of its models.")
    if has_model(folder):
        return
    inside = sorted(path.name for path in folder.iterdir() if path.is_dir() and has_model(path))
    remedy = f"give {folder / inside[-1]}, which is in it" if inside else "check the path"
    raise UserError(f"model: {folder} has no model (adapter_config.json or config.json, with weights): {remedy}.")


def _check_whole_model(name: str, revision: str | None, trust_remote_code: bool) -> None:
    path, location = resolve_location(name, revision)
    with found_or_refused("model_name_or_path", name):
        check_config(path, name=name, task="causal_lm", trust_remote_code=trust_remote_code, **location)


def _check_reward_model(location: str) -> None:
    folder = Path(location).expanduser()
    if folder.is_dir():
        if not has_model(folder):
            raise UserError(
                f"reward_model: {folder} has no model (adapter_config.json or config.json): check the path."
            )
        config = folder / "adapter_config.json"
        if config.is_file() and PeftConfig.from_pretrained(str(folder)).task_type == TaskType.CAUSAL_LM:
            raise UserError(f"reward_model: {folder} is a policy, without a score head: give a reward model.")
        return
    local_folder(location, None)  # downloads from the Hub, or says that there is no such folder
