"""`StopWithCheckpoint`: the user's options after a stop, and processes that are copies of the one that trains."""

import os
import signal
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from hf_rlhf_ext.training.stopping import SignalReceived, StopWithCheckpoint


@pytest.fixture
def listening():
    """A callback after the first step of training, with its options."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    callback = StopWithCheckpoint()
    args = SimpleNamespace(save_strategy="steps", save_only_model=True, save_total_limit=1, load_best_model_at_end=True)
    state = TrainerState(global_step=1, epoch=0.5)
    control = TrainerControl()
    callback.on_train_begin(args, state, control)
    callback.on_step_end(args, state, control)
    yield SimpleNamespace(callback=callback, args=args, state=state, control=control)
    callback.give_back()
    signal.signal(signal.SIGINT, before)


def test_a_stop_leaves_the_options_of_the_user_as_they_were(listening, tmp_path):
    args, before = listening.args, dict(vars(listening.args))
    args.output_dir = str(tmp_path)
    os.kill(os.getpid(), signal.SIGINT)
    listening.callback.on_step_end(args, listening.state, listening.control)
    assert listening.control.should_save and listening.control.should_training_stop
    listening.callback.on_epoch_end(args, listening.state, listening.control)
    # What Trainer reads until the end: a whole checkpoint, which no limit deletes.
    assert (args.save_only_model, args.save_total_limit, args.load_best_model_at_end) == (False, None, False)
    with pytest.raises(KeyboardInterrupt):  # there is no checkpoint here
        listening.callback.on_train_end(args, listening.state, listening.control)
    assert vars(args) == before | {"output_dir": str(tmp_path)}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_signal_leaves_them_too(listening):
    os.kill(os.getpid(), signal.SIGINT)
    listening.callback.on_step_end(listening.args, listening.state, listening.control)
    with pytest.raises(SignalReceived):
        os.kill(os.getpid(), signal.SIGINT)
    assert listening.args.save_total_limit == 1 and listening.args.save_only_model


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_worker_that_was_forked_goes_on_at_ctrl_c_and_ends_at_sigterm(listening, number):
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        os._exit(3)  # still there
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (3 if number == signal.SIGINT else -signal.SIGTERM)
    assert not listening.callback.received
