"""Two processes in which one gets SIGTERM: `accelerate launch left_runs.py FOLDER`, FOLDER holding a model.

Trains straight through, and in parts that a signal in a rollout and in an evaluation ends and that are resumed. The
first process writes `FOLDER/found.json`.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

OPTIONS = {"per_device_train_batch_size": 2, "max_steps": 6, "num_ppo_epochs": 1, "critic": "head", "save_steps": 100}
OPTIONS |= {"save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 1}
OPTIONS |= {"normalize_rewards": True, "kl_target": 0.5, "max_completion_length": 6}


def build(folder, name):
    from tiny_run import build

    trainer = build(folder, name, OPTIONS)
    del trainer.experience._orders  # those of the library, from the random state
    return trainer


class Sender:
    """Sends SIGTERM to one process at the n-th forward pass of sampling after an optimizer step."""

    def __init__(self, trainer, *, rank, step, at):
        self.trainer, self.rank, self.step, self.left = trainer, rank, step, at
        trainer.model.get_output_embeddings().register_forward_pre_hook(self)

    def __call__(self, module, args):
        trainer = self.trainer
        if trainer.model.training or trainer.state.global_step != self.step:
            return
        self.left -= 1
        if self.left == 0 and trainer.accelerator.process_index == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)


def train_in_parts(folder, parts):
    """The last trainer, and for each part the step and exit status at which it ended."""
    ends = []
    for number, part in enumerate([*parts, None]):
        random.seed(number)
        trainer = build(folder, "parts")
        if part is not None:
            Sender(trainer, **part)
        try:
            trainer.train(resume_from_checkpoint=number > 0)
            status = 0
        except SystemExit as ended:
            status = ended.code
        ends.append([trainer.state.global_step, status])
    return trainer, ends


def main():
    import torch

    torch.set_num_threads(1)
    folder = sys.argv[1]
    random.seed(0)
    straight = build(folder, "straight")
    straight.train()
    # The second process alone is signaled in the second rollout, and the first one in the evaluation after step 3, of
    # which it has one batch more.
    parts = [{"rank": 1, "step": 2, "at": 3}, {"rank": 0, "step": 3, "at": 14}]
    trainer, ends = train_in_parts(folder, parts)
    same = [torch.equal(a, b) for a, b in zip(straight.model.parameters(), trainer.model.parameters(), strict=True)]
    state = [(run.ppo.kl_coef, run.ppo.moments.to_dict()) for run in (straight, trainer)]
    found = {"ends": ends, "same": all(same), "same_state": state[0] == state[1]}
    found["moved"] = straight.state.log_history[-1].get("step") == 6
    everywhere = trainer.ranks.gather(found)
    if trainer.accelerator.process_index == 0:
        (Path(folder) / "found.json").write_text(json.dumps(everywhere))


if __name__ == "__main__":
    main()
