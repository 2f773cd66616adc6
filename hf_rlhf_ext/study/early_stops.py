"""Where a finished PPO run would have been stopped: what each guard would have chosen from the evaluations of the run.

The run itself had no guard, so that its evaluations go on past the peak of the gold reward. Each function sees the
evaluations in order, as the guard would have, and returns the one whose checkpoint it keeps. None of them sees gold.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from ..ppo.diagnostics import diagnose
from ..ppo.guards import KLGuard


@dataclass(frozen=True)
class RunEvaluations:
    """The E evaluations of a PPO run on held-out prompts, in order; the first is of the policy at the start.

    Attributes:
        rollouts: (E,) number of rollouts that were trained on before each evaluation.
        kl: (E,) KL(policy ‖ reference), nats per completion.
        proxy: (E,) mean training reward.
        proxy_std: (E,) standard deviation of the training reward over completions; empty if unknown.
        heldout_proxy: (E,) mean reward of another reward model, which training does not use; empty without one.
        heldout_proxy_std: (E,) its standard deviation; empty if unknown.
        disagreement: (E,) mean standard deviation over the members of an ensemble; empty without one.
        rollout_kl: KL of each rollout of training, which `KLGuard` reads, nats per completion.
        completions: number of completions per evaluation.
    """

    rollouts: Sequence[int]
    kl: Sequence[float]
    proxy: Sequence[float]
    rollout_kl: Sequence[float]
    completions: int
    proxy_std: Sequence[float] = ()
    heldout_proxy: Sequence[float] = ()
    heldout_proxy_std: Sequence[float] = ()
    disagreement: Sequence[float] = ()


@dataclass(frozen=True)
class Stop:
    """What a guard would have done.

    Attributes:
        index: number of the evaluation whose checkpoint is kept.
        stopped_after: number of rollouts of the run; all of them if the guard did not stop it.
        stopped: whether the guard would have stopped the run.
    """

    index: int
    stopped_after: int
    stopped: bool = field(default=False)


def at_the_end(run: RunEvaluations) -> Stop:
    """No guard: the last evaluation."""
    return Stop(len(run.kl) - 1, run.rollouts[-1])


def at_best_proxy(run: RunEvaluations) -> Stop:
    """`load_best_model_at_end` with `metric_for_best_model="eval_objective/scores"`: the highest training reward."""
    return Stop(int(np.argmax(run.proxy)), run.rollouts[-1])


def at_max_kl(run: RunEvaluations, ceiling: float) -> Stop:
    """`max_kl` of `PPOConfig` with `max_kl_action="stop"`: the last evaluation before a rollout exceeds the limit.

    As in the trainer, a checkpoint whose own evaluation exceeds the limit is not gone back to.
    """
    guard = KLGuard(ceiling, "stop")
    for number, kl in enumerate(run.rollout_kl):
        below = [i for i, done in enumerate(run.rollouts) if done <= number and not guard.is_exceeded(run.kl[i])]
        checkpoint = Path(f"checkpoint-{below[-1]}") if below else None
        verdict = guard.judge({"objective/kl": kl}, kl_coef=0.0, rollbacks=0, checkpoint=checkpoint)
        if verdict.action == "stop":
            return Stop(below[-1] if below else 0, number, stopped=True)
    return at_the_end(run)


def by_patience(run: RunEvaluations, values: Sequence[float], patience: int) -> Stop:
    """`EarlyStoppingCallback` of Transformers on the evaluations, which keeps the best of those that it has seen.

    Args:
        run: the run.
        values: (E,) the metric that should rise, such as `run.proxy`.
        patience: number of evaluations without a new best after which training stops.
    """
    callback = EarlyStoppingCallback(early_stopping_patience=patience)
    args = TrainingArguments(
        use_cpu=True,
        report_to="none",
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_metric",
        greater_is_better=True,
    )
    state, control = TrainerState(), TrainerControl()
    best = 0
    for number, value in enumerate(values):
        callback.on_evaluate(args, state, control, metrics={"eval_metric": value})
        if state.best_metric is None or value > state.best_metric:
            state.best_metric = value  # the trainer does this after the callbacks
            best = number
        if control.should_training_stop:
            return Stop(best, run.rollouts[number], stopped=True)
    return Stop(best, run.rollouts[-1])


def at_warning(run: RunEvaluations) -> Stop:
    """The health warning of over-optimization, with the held-out reward model in `eval_reward_funcs`.

    At the first warning the run ends, and the evaluation with the best held-out reward so far is kept. Without a
    warning, it is the last one.
    """
    history = []
    for number, _ in enumerate(run.proxy):
        row = {"eval_objective/scores": run.proxy[number], "eval_rewards/heldout/mean": run.heldout_proxy[number]}
        if run.proxy_std:
            row["eval_objective/scores_std"] = run.proxy_std[number]
        if run.heldout_proxy_std:
            row["eval_rewards/heldout/std"] = run.heldout_proxy_std[number]
        history.append(row)
        if "overoptimization" in diagnose(history, eval_completions=run.completions):
            best = int(np.argmax(run.heldout_proxy[: number + 1]))
            return Stop(best, run.rollouts[number], stopped=True)
    return at_the_end(run)


def at_disagreement(run: RunEvaluations, factor: float) -> Stop:
    """Stops when the members of an ensemble disagree `factor` times as much as at the start; keeps the evaluation
    before. `RewardEnsemble` logs it as `reward_disagreement`; no option of the trainer stops at it."""
    for number, value in enumerate(run.disagreement):
        if value > factor * run.disagreement[0]:
            return Stop(number - 1, run.rollouts[number], stopped=True)
    return at_the_end(run)


def all_stops(
    run: RunEvaluations, *, ceilings: Sequence[float] = (10.0, 20.0, 40.0), patience: int = 3, factor: float = 1.5
) -> dict[str, Stop]:
    """What each guard would have chosen, by its name. Guards without their metrics are left out.

    Args:
        run: the run.
        ceilings: limits of `max_kl`, nats per completion.
        patience: evaluations without a new best.
        factor: multiple of the disagreement at the start.
    """
    stops = {"end": at_the_end(run)}
    for ceiling in ceilings:
        stops[f"max_kl={ceiling:g}"] = at_max_kl(run, ceiling)
    stops["best_proxy"] = at_best_proxy(run)
    stops["early_stopping"] = by_patience(run, run.proxy, patience)
    if len(run.heldout_proxy):
        stops["early_stopping_heldout_model"] = by_patience(run, run.heldout_proxy, patience)
        stops["warning"] = at_warning(run)
    if len(run.disagreement):
        stops["disagreement"] = at_disagreement(run, factor)
    return stops
