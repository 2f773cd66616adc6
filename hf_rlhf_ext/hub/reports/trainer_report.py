"""The report of a run that was started from Python: everything that the trainer knows, and nothing else."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel

from ...compat import versions
from ...modeling.adapters import bare_model
from ...modeling.source import source_of
from ...ppo.config import PPOConfig
from ...ppo.reward_calls import distinct_names, formula_of
from ...ppo.rewards import RewardFunctions
from ...reward.ensemble import RewardEnsemble
from ...reward.preference_metrics import JudgedPairs, preference_nll
from ...reward.scorer import RewardScorer
from ...training.loop import was_trained_before
from ..privacy import strip_local_paths
from ..report import (
    FROM_PYTHON,
    CardOptions,
    PPOSection,
    RewardModelSection,
    RunReport,
    Section,
    SFTSection,
    hardware,
)
from .evaluations import UNNAMED, Evaluated, evaluated_weights, training_seconds
from .provenance import base_source
from .trainer_card import kind_of, trainer_card_options

__all__ = [
    "critic_facts",
    "curves_caption",
    "draw_plot",
    "evaluated_weights",
    "kind_of",
    "public_reward_names",
    "section_steps",
    "start_of",
    "trainer_card_options",
    "trainer_report",
    "write_trainer_report",
]

PLOT = "evaluation.png"
"""Plot of the judged pairs of a reward model."""
CURVES = "curves.png"
"""Plot of a PPO run."""

_SECTIONS: dict[str, tuple[str, type[Section]]] = {
    "policy": ("ppo", PPOSection),
    "reward_model": ("reward_model", RewardModelSection),
    "sft": ("sft", SFTSection),
}
"""Kind of model -> name and class of its section in the report."""

_OTHER_MEASURES = ("proxy", "mean_length")
"""What a report of PPO has before and after too: the keys of a reward must differ from theirs."""

_LOGGED: dict[str, dict[str, str]] = {
    "policy": {
        "objective/kl": "kl",
        "objective/scores": "proxy_after",
        "completions/mean_length": "mean_length_after",
    },
    "reward_model": {
        "pairs": "heldout_pairs",
        "accuracy": "accuracy",
        "nll": "nll",
        "brier": "brier",
        "ece": "ece",
        "longer_wins_baseline": "longer_wins_baseline",
        "gain": "gain",
    },
    "sft": {"loss": "eval_loss", "mean_token_accuracy": "eval_mean_token_accuracy"},
}
"""Kind of model -> logged name of each evaluation metric, without prefix -> name in the report."""

# The report


def trainer_report(trainer: Any, known: Mapping[str, Any] | None = None) -> RunReport:
    """Makes the report of a run without a recipe. It has the metrics of the weights that the trainer has now.

    Args:
        trainer: A trainer of this library, also before training.
        known: Options of the card that the trainer does not know, such as `tags`, or that replace what it knows.
    """
    kind = kind_of(trainer)
    evaluated = evaluated_weights(trainer)
    name, section_class = _SECTIONS[kind]
    section = section_class(**section_steps(trainer))
    _add_metrics(section, evaluated, trainer, kind)
    if kind == "reward_model":
        section.metrics |= _training_pairs(trainer)
        _add_judged(section, evaluated, trainer)
    elif kind == "policy":
        _add_ppo(section, trainer)
    options = trainer_card_options(trainer) | _notes(trainer, evaluated, kind)
    options["data"] = _data_of(options.get("data", ()), evaluated, trainer)
    options |= dict(known or {})
    seconds = training_seconds(trainer)
    return RunReport(
        seed=trainer.args.seed,
        command=FROM_PYTHON,
        seconds={} if seconds is None else {kind: round(seconds, 1)},
        hardware=hardware(),
        versions=versions(),
        card=CardOptions(**options),
        **{name: section},
    )


def write_trainer_report(trainer: Any, folder: str | Path, known: Mapping[str, Any] | None = None) -> RunReport:
    """Writes `report.json` and the plot of its card into `folder`. Returns the report.

    Args:
        trainer: A trainer of this library.
        folder: The folder of the model.
        known: As in `trainer_report`.
    """
    folder = Path(folder)
    report = trainer_report(trainer, known)
    plot = draw_plot(trainer, folder)
    if plot is not None and report.card.plot is None:
        report.card.plot, report.card.caption = plot
    report.save(folder)
    return report


def draw_plot(trainer: Any, folder: Path) -> tuple[str, str | None] | None:
    """Draws the usual plot for this kind of model. Returns its file name and caption; None if there is nothing to draw.

    A caption of None stands for the usual one of the card.
    """
    from ...metrics import plots  # imports matplotlib, which other pushes do not need

    kind = kind_of(trainer)
    if kind == "sft":
        path = plots.plot_loss(
            trainer.state.log_history,
            folder / plots.LOSS_PLOT,
            weights_step=evaluated_weights(trainer).step,
        )
        return None if path is None else (path.name, plots.loss_caption(trainer.state.log_history))
    if kind == "policy":
        if not any("objective/kl" in log or "eval_objective/kl" in log for log in trainer.state.log_history):
            return None
        return plots.plot_ppo_run(trainer.state.log_history, folder / CURVES).name, curves_caption(trainer.args)
    judged = _judged(evaluated_weights(trainer), trainer)
    if judged is None:
        (folder / PLOT).unlink(missing_ok=True)  # of an earlier push, with other weights
        return None
    return plots.plot_judged(judged, folder / PLOT).name, None


def curves_caption(args: PPOConfig) -> str:
    """Caption of the plot of a PPO run with these options."""
    panel = "clipping" if args.critic == "none" else "critic"
    return f"reward, KL, entropy, length, {panel} and β over optimizer steps"


def section_steps(trainer: Any) -> dict[str, int]:
    """Returns `weights_step` and `total_steps` of a section of the report, as far as they are known."""
    evaluated = evaluated_weights(trainer)
    if not evaluated.total_steps or was_trained_before(trainer):  # not trained, or the log has a part of it only
        return {}
    steps = {"weights_step": evaluated.step, "total_steps": evaluated.total_steps}
    return {name: value for name, value in steps.items() if value is not None}


# Metrics


def _add_metrics(section: Section, evaluated: Evaluated, trainer: Any, kind: str) -> None:
    """Adds the metrics of the evaluations of these weights: one set without a name, and several with theirs."""
    sets = {}
    for name, logged in evaluated.sets.items():
        metrics = _reported(kind, logged)
        if kind == "policy":
            metrics |= _rewards_after(trainer, logged)
            metrics |= _before(metrics, _rewards_before(trainer, evaluated.start.get(name, {})))
        sets[name] = metrics | _count(trainer, name, logged, kind)
    section.metrics |= sets.pop(UNNAMED, {})
    section.evaluation_sets = sets or None


def _reported(kind: str, logged: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of an evaluation under their names in the report, with intervals."""
    metrics: dict[str, Any] = {}
    for name, reported in _LOGGED[kind].items():
        if name not in logged:
            continue
        metrics[reported] = logged[name]
        low = logged.get(f"{reported}_low")
        high = logged.get(f"{reported}_high")
        if low is not None:
            metrics[f"{reported}_ci95"] = [low, high]
    return metrics


def _count(trainer: Any, name: str, logged: Mapping[str, Any], kind: str) -> dict[str, int]:
    """The number of samples of an evaluation set, if it is known."""
    if kind == "reward_model":  # `pairs` is in the log, and a tie has a metric of its own
        has_ties = "accuracy_ties" in logged
        return {} if has_ties or "pairs" not in logged else {"decided_pairs": int(logged["pairs"])}
    dataset = _evaluation_set(trainer, name)
    if not hasattr(dataset, "__len__") or _is_of_other_rows(trainer, name, logged):
        return {}
    return {"n" if kind == "policy" else "heldout_rows": len(dataset)}


def _evaluation_set(trainer: Any, name: str) -> Any:
    """The evaluation set of this name; None if the trainer does not have it."""
    sets = trainer.eval_dataset
    if isinstance(sets, Mapping):
        return sets.get(name)
    return sets if name == UNNAMED else None


def _is_of_other_rows(trainer: Any, name: str, logged: Mapping[str, Any]) -> bool:
    """Whether an evaluation was of other rows than those of the trainer, as `evaluate` may be called with any."""
    dataset = _evaluation_set(trainer, name)
    if not hasattr(dataset, "__len__"):
        return False
    ppo_state = getattr(trainer, "ppo", None)
    counted = {} if ppo_state is None else ppo_state.evaluated_rows
    evaluated = counted.get(f"eval_{name}" if name else "eval")
    if evaluated is not None:
        return evaluated != len(dataset)
    rate = logged.get("samples_per_second")
    if rate is None or not logged.get("runtime"):
        return False
    # Both are rounded, to 4 and 3 digits.
    error = 5e-4 * logged["runtime"] + 5e-5 * rate + 0.5
    return abs(logged["runtime"] * rate - len(dataset)) > error


def _data_of(records: Sequence[Mapping[str, Any]], evaluated: Evaluated, trainer: Any) -> list[Mapping[str, Any]]:
    """The records of the data without evaluation sets in whose place others were evaluated."""
    other = {name for name, logged in evaluated.sets.items() if _is_of_other_rows(trainer, name, logged)}
    return [record for record in records if record["role"] != "evaluation" or record.get("set", UNNAMED) not in other]


def _training_pairs(trainer: Any) -> dict[str, int]:
    """The number of pairs of training."""
    rows = trainer.train_dataset
    if not hasattr(rows, "column_names") or "pairs" not in rows.column_names:
        return {}
    return {"pairs": sum(len(pairs) for pairs in rows["pairs"])}


def _judged(evaluated: Evaluated, trainer: Any) -> JudgedPairs | None:
    """The judged pairs that the metrics of the evaluation set without a name are of. None if they are not kept."""
    logged = evaluated.sets.get(UNNAMED, {})
    # The last ones may be of other weights, of another set, or of `predict`.
    for judged in (trainer.judged, trainer.judged_by_best):
        if judged is not None and "nll" in logged:
            nll = preference_nll(judged.deltas, judged.targets, judged.weights)
            if len(judged.targets) == logged.get("pairs") and math.isclose(nll, logged["nll"], rel_tol=1e-9):
                return judged
    return None


def _add_judged(section: RewardModelSection, evaluated: Evaluated, trainer: Any) -> None:
    """Adds the number of decided pairs and the groups."""
    judged = _judged(evaluated, trainer)
    if judged is None:
        return
    # Ties have no winner, so accuracy only counts the other pairs.
    section.metrics["decided_pairs"] = int((judged.targets != 0.5).sum())
    section.groups = judged.groups()


# PPO


def public_reward_names(trainer: Any) -> tuple[list[str], list[str]]:
    """Names of the rewards of training and of evaluation only: those of functions, and of models their Hub ids.

    Of a model in a local folder, it is the name of the folder. A model that was passed in memory is called as in the
    logs.
    """
    trained = _public_names(trainer.rewards)
    if trainer.eval_rewards is None:
        return trained, []
    names = [f"{name}_reward" if name in _OTHER_MEASURES else name for name in _public_names(trainer.eval_rewards)]
    return trained, distinct_names(names)


def _public_names(rewards: RewardFunctions) -> list[str]:
    names = []
    for func, name in zip(rewards.funcs, rewards.names, strict=True):
        is_model = isinstance(func, RewardScorer | RewardEnsemble)
        names.append(strip_local_paths((is_model and func.loaded_from) or name))
    return distinct_names(names)


def _add_ppo(section: PPOSection, trainer: Any) -> None:
    """Adds start, rewards, critic, the number of updates, the KL coefficient, and why a guard stopped the run."""
    section.start = start_of(trainer)
    section.rewards, eval_rewards = public_reward_names(trainer)
    section.eval_rewards = eval_rewards or None
    weights = trainer.rewards.weights.tolist()
    section.reward_formula = formula_of(section.rewards, weights, trainer.args.reward_shaping)
    section.reward_warnings = trainer.reward_warnings or None
    section.stop_reason = trainer.stop_reason
    for name, value in critic_facts(trainer).items():
        setattr(section, name, value)
    if trainer.updates:
        section.metrics |= {"updates": trainer.updates, "kl_coef": trainer.kl_coef}


def critic_facts(trainer: Any) -> dict[str, Any]:
    """`critic`, and `num_generations` if a prompt has several completions, of PPO's section of the report."""
    facts = {"critic": trainer.critic}
    if trainer.args.num_generations > 1:
        facts["num_generations"] = trainer.args.num_generations
    return facts


def start_of(trainer: Any) -> str | None:
    """What PPO started from, such as "the base model alice/base" or "the adapter sft". None if it has no name."""
    reference = trainer.stack.roles["reference"]
    policy = trainer.policy
    is_new_adapter = reference.adapter is None or trainer.stack.start is not None
    base = bare_model(policy)
    source = base_source(base)["base_model"]
    if isinstance(policy, PeftModel) and not is_new_adapter:
        name = source_of(policy)
        if name is not None:
            return f"the adapter {name}"
        return None if source is None else f"an adapter on {source}"
    if source is not None:
        return f"the base model {source}"
    name = Path(base.config.name_or_path or "").name
    return f"the model {name}" if name else None


def _rewards_after(trainer: Any, logged: Mapping[str, Any]) -> dict[str, float]:
    """Means of the rewards that only evaluation uses. NaN, of a reward that applies to no prompt, is left out."""
    metrics = {}
    if trainer.eval_rewards is None:
        return metrics
    _, public = public_reward_names(trainer)
    for name, shown in zip(trainer.eval_rewards.names, public, strict=True):
        mean = logged.get(f"rewards/{name}/mean")
        if mean is not None and math.isfinite(mean):
            metrics[f"{shown}_after"] = mean
    return metrics


def _rewards_before(trainer: Any, logged: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of an evaluation before the first step, with the names of those after it."""
    metrics = _reported("policy", logged) | _rewards_after(trainer, logged)
    return {name: value for name, value in metrics.items() if name.endswith("_after")}


def _before(after: Mapping[str, Any], start: Mapping[str, float]) -> dict[str, float]:
    """What was measured before and after: the first values, and the gains in reward."""
    metrics = {}
    for name, value in start.items():
        if name not in after:
            continue
        stem = name.removesuffix("_after")
        metrics[f"{stem}_before"] = value
        if stem != "mean_length":
            metrics[f"{stem}_gain"] = after[name] - value
    return metrics


def _notes(trainer: Any, evaluated: Evaluated, kind: str) -> dict[str, Any]:
    """How the completions of an evaluation of PPO were sampled."""
    if kind != "policy" or not evaluated.sets:
        return {}
    args = trainer.args
    note = (
        f"One completion for each prompt, at temperature {args.temperature:g}, seed {args.seed}, cut at "
        f"{args.max_completion_length} tokens."
    )
    return {"notes": [note]}
