"""What keeps a PPO run from ruining itself: skipped steps, a ceiling on the KL, warnings, and a save at SIGTERM."""

import logging
import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerCallback

from ..errors import UserError
from .diagnostics import diagnose, due
from .figures import reduced

logger = logging.getLogger(__name__)

MAX_ROLLBACKS = 3
FIRST, LAST = 5, 50  # rollouts of the history that diagnostics may read


class GuardMixin:
    """Guards for `PPOTrainer`. State that a resumed run needs is in `guard_state`."""

    def _init_guards(self) -> None:
        self.stopped_by: str | None = None  # then no further step may change the weights
        self._skipped_in_a_row = 0
        self._rollbacks = 0
        self._good_checkpoint: str | None = None
        self._new_checkpoint: str | None = None  # good once a rollout of its weights is
        self._history: list[dict[str, float]] = []
        self._last_said: dict[str, int] = {}
        self._last_rollout: dict[str, float] = {}
        self._clipped = [0.0, 0.0]  # sum and weight of the clip fraction since the last rollout

    @property
    def guard_state(self) -> dict:
        """JSON-able state of the guards."""
        names = ("_skipped_in_a_row", "_rollbacks", "_good_checkpoint", "_new_checkpoint", "_history", "_last_said")
        state = {name.removeprefix("_"): getattr(self, name) for name in names}
        return state | {"clipped": [float(x) for x in self._clipped]}

    @guard_state.setter
    def guard_state(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, f"_{name}", value)

    # ---- Gradients ----

    def _trained_parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]

    def _skip_step(self) -> None:
        """Makes the optimizer step to come change nothing, not even by momentum or weight decay."""
        parameters, scaler = self._trained_parameters(), self.accelerator.scaler
        for parameter in parameters:
            parameter.grad = None
        if scaler is not None:  # it refuses a step without gradients, and skips one where they are not finite
            scaler.scale(torch.zeros((), device=self.accelerator.device))  # its first use may be this one
            parameters[-1].grad = torch.full_like(parameters[-1], torch.inf)

    def _finish_gradients(self) -> None:
        """Before clipping: sums gradients over processes, and drops those that are not finite, on all processes.

        A skipped step leaves weights and the optimizer's state as they are; the learning-rate schedule goes on. After
        `max_skipped_steps` in a row training ends. With fp16 a skipped step also halves the loss scale, and only those
        at a scale of 1 or less count: above it, an overflow may be the scale's and no fault of the run.
        """
        parameters, scaler = self._trained_parameters(), self.accelerator.scaler
        if self.accelerator.num_processes > 1:
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            reduced([parameter.grad for parameter in parameters], self.accelerator)
        gradients = [p.grad for p in parameters if p.grad is not None]
        finite = all(bool(torch.isfinite(gradient).all()) for gradient in gradients)  # summed: the same on all
        self._observe("guards/skipped_steps", 0.0 if finite else 1.0)
        if finite:
            self._skipped_in_a_row = 0
            return
        self._skip_step()
        if scaler is not None and (scale := scaler.get_scale()) > 1:
            self._warn(f"gradients overflow at a loss scale of {scale:g}: this step is skipped and the scale halved")
            return
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self.args.max_skipped_steps:
            self._halt(
                f"{self._skipped_in_a_row} optimizer steps in a row had gradients that are not finite: lower "
                "learning_rate or clip rewards with reward_clip; the weights are those before the first of them"
            )
        else:
            self._warn("gradients are not finite: this step is skipped and the learning-rate schedule goes on")

    # ---- Rollouts ----

    def _next_rollout(self):
        """A rollout that may be trained on; rolls back and samples again where `max_kl_action` says so."""
        self._refuse_broken_weights()
        while True:
            rollout = self._make_rollout()
            self._remember_rollout()
            problem = self._rollout_problem()
            if problem is None:
                self._good_checkpoint = self._new_checkpoint or self._good_checkpoint
                return rollout
            self._new_checkpoint = None
            if not self._mend(problem):
                return rollout
            self._rollouts += 1  # the next one has prompts of its own

    def _refuse_broken_weights(self) -> None:
        """Weights that are not finite cannot sample: back to the last good checkpoint, and no further."""
        if all(bool(torch.isfinite(p).all()) for p in self.policy.parameters() if p.requires_grad):
            return
        good = self._checkpoint_to_go_back_to()
        if good is None:
            raise UserError(
                f"step {self.state.global_step}: the policy's weights are not finite, and there is no checkpoint to go "
                "back to: lower learning_rate, and set save_strategy='steps'."
            )
        self._restore(good)
        self._halt(f"weights are not finite, those of {good.name} are back: lower learning_rate")

    def _checkpoint_to_go_back_to(self) -> Path | None:
        """The last checkpoint whose policy kept below the ceiling in the rollout that followed, while it exists."""
        good = self._good_checkpoint and Path(self.args.output_dir) / self._good_checkpoint
        return good if good and (good / "trainer_state.json").is_file() else None

    def _rollout_problem(self) -> str | None:
        kl, ceiling = self._last_rollout.get("objective/kl"), self.args.max_kl
        if ceiling is not None and kl is not None and not kl <= ceiling:
            return f"KL is {kl:.1f} nats a completion, above max_kl = {ceiling:g}"
        return None

    def _mend(self, problem: str) -> bool:
        """Acts on a problem as `max_kl_action` says; True where the rollout must be sampled again."""
        action = self.args.max_kl_action
        if action == "raise_kl_coef":
            self.kl_coef *= 2
            self._warn(f"{problem}: kl_coef is now {self.kl_coef:g}")
            return False
        remedy = "raise kl_coef, set kl_target, or lower learning_rate"
        good = self._checkpoint_to_go_back_to()
        if good is None:
            problem += ", and there is no checkpoint below it to go back to"
        elif action == "rollback" and self._rollbacks < MAX_ROLLBACKS:
            self._rollbacks += 1
            self.kl_coef *= 2
            self._restore(good)
            self._warn(f"{problem}: back to {good.name} (no. {self._rollbacks}), with kl_coef {self.kl_coef:g}")
            return True
        else:
            self._restore(good)
            problem += f", the weights are those of {good.name} (to go on, resume from that one)"
        self._halt(f"{problem}: {remedy}")
        return False

    def _restore(self, checkpoint: Path) -> None:
        """Weights and optimizer of a checkpoint; counters, random states and the schedule go on from where they are."""
        self._load_weights(checkpoint)
        saved = checkpoint / "optimizer.pt"
        if saved.is_file():
            rates = [group["lr"] for group in self.optimizer.param_groups]
            self.optimizer.load_state_dict(torch.load(saved, map_location="cpu", weights_only=True))
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def _halt(self, reason: str) -> None:
        """Ends training: from here on no step changes a weight, is saved, or counts as the best."""
        if self.stopped_by is None:
            self.stopped_by = reason
            self._warn(f"training stops: {reason}")
        self.control.should_training_stop = True

    def _remember_rollout(self) -> None:
        """Keeps the rollout's figures, and says what they tell of the run's health."""
        if self._history and self._clipped[1]:
            clipped = torch.tensor([float(self._clipped[0])], device=self.accelerator.device)
            reduced([clipped], self.accelerator)  # each process has its share of every mini-batch
            self._history[-1]["policy/clipfrac_avg"] = float(clipped) / self._clipped[1]
        self._clipped = [0.0, 0.0]
        self._history.append(dict(self._last_rollout))
        kept = len(self._history) - LAST
        self._history = [row for i, row in enumerate(self._history) if i < FIRST or i >= kept or _evaluated(row)]
        args = self.args
        sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
        warnings = diagnose(self._history, **sampling, eval_completions=self._eval_completions())
        for line in due(warnings, self._last_said, self._rollouts, args.warn_every):
            self._warn(line)

    def _eval_completions(self) -> int | None:
        """Completions of one evaluation, of the smallest set where there are several."""
        sets = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        return min((len(part) for part in sets if part is not None), default=None)

    def _remember_evaluation(self, metrics: dict[str, float]) -> None:
        if not self._history:
            self._history.append({})  # before the first rollout: what over-optimisation is measured from
        self._history[-1] |= {name: value for name, value in metrics.items() if isinstance(value, float)}

    def _warn(self, line: str) -> None:
        if self.is_world_process_zero():
            logger.warning("step %d, rollout %d: %s.", self.state.global_step, self._rollouts, line)

    # ---- Checkpoints ----

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        if self.stopped_by is not None:
            self.control.should_save = False  # it would hold a rollout that no resumed run may train on
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        """Whether this is the best model so far; never after a guard has stopped the run or above `max_kl`."""
        chosen = self.args.metric_for_best_model
        if chosen is None:
            return False
        chosen = f"eval_{chosen.removeprefix('eval_')}"
        if chosen not in metrics:
            raise UserError(f"metric_for_best_model: evaluation has no {chosen!r}: take one of {', '.join(metrics)}.")
        ceiling = math.inf if self.args.max_kl is None else self.args.max_kl
        bad = [name for name, value in metrics.items() if name.endswith("objective/kl") and not value <= ceiling]
        bad += [] if math.isfinite(metrics[chosen]) else [chosen]
        if self.stopped_by is not None or bad:
            self._warn(f"not a candidate for the best model: {self.stopped_by or bad[0] + ' is out of bounds'}")
            return False
        return super()._determine_best_metric(metrics, trial)


def _evaluated(row: dict[str, float]) -> bool:
    return any(name.startswith("eval_") for name in row)


class SaveOnSignal(TrainerCallback):
    """At SIGTERM, saves at the end of the optimizer step and ends training: so batch systems take a machine back.

    `received` is set by the signal, on this process; `agreed` by the trainer, at the same step on all of them.
    """

    def __init__(self):
        self.received = self.agreed = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes SIGTERM while training runs, in the main thread only; the process then exits with 128 + 15."""
        self.received = self.agreed = False
        here = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, self._receive) if here else None
        try:
            yield
        finally:
            if here:
                signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
        if self.agreed:
            raise SystemExit(128 + signal.SIGTERM)
        if self.received:  # after the last step: as if it came now
            signal.raise_signal(signal.SIGTERM)

    def _receive(self, number, frame):
        self.received = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.agreed:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        if self.agreed:
            logger.warning("SIGTERM: saved at step %d; go on with resume_from_checkpoint=True.", state.global_step)


def check_setup(args) -> None:
    """Raises `UserError` for set-ups that PPO's own gradient reduction, or its KL controller, does not cover."""
    if args.n_gpu > 1:
        raise UserError("PPOTrainer uses one device a process: start it with `accelerate launch`, or hide all but one.")
    if getattr(args, "deepspeed", None) or getattr(args, "fsdp", None):
        raise UserError("PPOTrainer runs with plain data parallelism: leave deepspeed and fsdp out.")
    completions = args.rollout_size * args.world_size
    if args.kl_target is not None and args.kl_horizon is not None and completions >= 5 * args.kl_horizon:
        raise UserError(
            f"kl_horizon={args.kl_horizon} is a fifth or less of a rollout's {completions} completions: kl_coef could "
            "become zero or negative; set it to several rollouts, or leave it out."
        )
