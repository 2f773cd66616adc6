"""What both trainers change in the loop of `Trainer`: its end, its last log, and what an interruption leaves."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from transformers import Trainer, TrainerControl, TrainingArguments

from .engines import Engine, active_engine
from .optimizers import use_evaluation_weights


@contextmanager
def end_of_training(trainer: Trainer) -> Iterator[None]:
    """Around `Trainer.train`: afterward the trainer is not in training, however it ended, and its weights are final."""
    was_trained_before(trainer)
    forget_evaluated_model(trainer)
    try:
        yield
    finally:
        trainer.is_in_train = False  # `Trainer` sets it at the regular end only
        use_evaluation_weights(trainer.optimizer)


def forget_evaluated_model(trainer: Trainer) -> None:
    """Makes accelerate wrap a model for training that it has prepared for an evaluation only.

    `evaluate` before `train` marks the model as prepared, and `train` would leave it without DDP: each process would
    train a model of its own, without a word.
    """
    is_wrapped = trainer.model_wrapped is not trainer.model or active_engine(trainer.accelerator) is not Engine.DDP
    if not is_wrapped and getattr(trainer.model, "_is_accelerate_prepared", False):
        trainer.accelerator.free_memory()
        trainer.model._is_accelerate_prepared = False


def log_last_steps(args: TrainingArguments, control: TrainerControl) -> None:
    """Asks for a log at the end of training: of the steps since the last log, or of all steps of a short run."""
    if control.should_training_stop and args.logging_strategy == "steps":
        control.should_log = True


def all_steps_are_done(trainer: Trainer) -> bool:
    """Whether a resumed run has no step left; then it asks for the end of training.

    `Trainer` looks at the number of steps only after a step, so that a finished run whose last epoch is not complete
    would take one more.
    """
    was_trained_before(trainer)
    is_done = trainer.state.global_step >= trainer.state.max_steps
    if is_done:
        trainer.control.should_training_stop = True
    return is_done


def was_trained_before(trainer: Trainer) -> bool:
    """Whether a trainer that has trained was told to train again from the start, so that its log lacks earlier steps.

    `Trainer` replaces its state in each call of `train`, so this must be asked in each call. A resumed run has the
    steps of the earlier call in its state.
    """
    last = getattr(trainer, "_last_state", None)
    is_new = last is not None and last is not trainer.state
    if is_new and last.global_step > 0 and getattr(trainer, "_initial_global_step", 0) == 0:
        trainer._was_trained_before = True
    trainer._last_state = trainer.state
    return getattr(trainer, "_was_trained_before", False)


def forget_unscaled_gradients(accelerator: Accelerator) -> None:
    """Makes the gradient scaler of fp16 ready for a new optimizer step; the loss scale stays the same.

    A scaler refuses to unscale gradients twice before one step. Ctrl-C between the two would therefore end the next
    training too.

    Args:
        accelerator: the accelerator of the trainer. Without a scaler, nothing happens.
    """
    scaler = accelerator.scaler
    if scaler is None:
        return
    try:
        scaler.update(scaler.get_scale())  # a given scale needs no gradients
    except AssertionError:
        return  # the scaler was never used
