"""Trains, is killed with -9 at random moments, resumes: `python kill_runs.py FOLDER KILLS` prints what happened.

Children are forked from a process that has imported everything but computed nothing, so each starts at once.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

OPTIONS = {"per_device_train_batch_size": 4, "max_steps": 80, "save_strategy": "steps", "save_steps": 4}
OPTIONS |= {"critic": "adapter", "save_total_limit": 3, "eval_strategy": "no", "kl_target": 0.5}
OPTIONS |= {"normalize_rewards": True, "top_k": 0}


def train(folder, name, resume):
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))
    from tiny_run import build, save_result

    trainer = build(folder, name, OPTIONS)
    steps = Path(folder) / f"{name}-steps"

    class Note(__import__("transformers").TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.began = state.global_step
            self.on_step_end(args, state, control)

        def on_step_end(self, args, state, control, **kwargs):
            new = steps.with_suffix(".new")
            new.write_text(json.dumps({"began": self.began, "at": state.global_step}))
            new.rename(steps)

    trainer.add_callback(Note())
    trainer.train(resume_from_checkpoint=resume)
    save_result(trainer, Path(folder) / name)


def child(folder, name, resume):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        sys.stdout = sys.stderr
        train(folder, name, resume)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def steps_made(note):
    seen = json.loads(note.read_text())
    return seen["at"] - seen["began"]


def is_running(pid):
    """Whether the child has not ended; it is not reaped."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def main():
    folder, kills = sys.argv[1], int(sys.argv[2])
    import hf_rlhf_ext.ppo.trainer  # noqa: F401
    from hf_rlhf_ext.checkpointing import last_complete_checkpoint

    rng, killed, out = random.Random(0), [], Path(folder) / "killed"
    straight = child(folder, "straight", None)
    assert os.waitpid(straight, 0)[1] == 0
    for _ in range(kills):
        note = Path(folder) / "killed-steps"
        note.unlink(missing_ok=True)
        pid = child(folder, "killed", True if last_complete_checkpoint(out) else None)
        while not note.exists():
            time.sleep(0.02)
            assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        # Counted in steps: in a fixed time, a busy machine may not reach a single checkpoint.
        n_steps = rng.randint(1, 12)
        while steps_made(note) < n_steps and is_running(pid):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))  # into the next step, or into a save
        os.kill(pid, signal.SIGKILL)
        finished = os.waitpid(pid, 0)[1] == 0
        seen, last = json.loads(note.read_text()), last_complete_checkpoint(out)
        partial = sorted(path.name for path in out.glob("checkpoint-*") if str(path) != last)
        at = int(last.rsplit("-", 1)[1]) if last else 0
        killed.append(seen | {"checkpoint": at, "finished": finished, "others": partial})
    assert os.waitpid(child(folder, "killed", True), 0)[1] == 0
    print(json.dumps(killed))


if __name__ == "__main__":
    main()
