"""What the library does on the CPU while a run is on another device: copies to the CPU, and modules that compute there.

Copying to the CPU and computing there gives the right numbers, only slowly. So each place where the library does it is
noted, and one that is in none of the two lists fails the test.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

import hf_rlhf_ext

LIBRARY = str(Path(hf_rlhf_ext.__file__).parent) + "/"

# A place is a file of the library and a function in it. When the test names a new place, the first question is whether
# the numbers have to leave the device: a mean, a mask or an index need not. If they have to, add the place and the
# reason.
COPIES: dict[str, str] = {
    "modeling/adapters.py:save_adapter": "safetensors are written from the CPU",
    "modeling/base_record.py:_sample": "a few numbers of each weight, for the record of the base",
    "modeling/packing.py:packed_groups": "lengths, as shapes depend on them, once per forward pass",
    "modeling/segment_plans.py:SegmentPlan.of": "places of prompts and completions, as shapes depend on them",
    "modeling/stack.py:AdapterStack.save": "safetensors are written from the CPU",
    "ppo/advantages.py:_discounted_sums": "rewards and values of a rollout, for LAPACK, once per rollout",
    "ppo/generation.py:generate_completions": "tokens as lists, cut at the stop token, for the tokenizer",
    "ppo/evaluation.py:Evaluator._evaluate_batch": "metrics per completion, for the table",
    "ppo/experience.py:ExperienceMaker._sample.<locals>.<dictcomp>": "rewards per completion, for the callbacks",
    "ppo/offload.py:ModelsOnCall.on_device": "the option offload_reward_model asks for it",
    "ppo/offload.py:StatesOnCall.put_away": "the option offload_optimizer asks for it",
    "ppo/ranks.py:Ranks.sum_of": "a handful of metrics at once",
    "ppo/reference_file.py:digest_of": "the digest is computed on the CPU, once per run",
    "ppo/roles.py:Roles.save": "safetensors are written from the CPU",
    "ppo/roles.py:Roles.chunks": "lengths, to put rows into batches",
    "ppo/rollout.py:Sequences.select": "two numbers at once: the length, and whether all rows of a prompt are there",
    "ppo/rollout.py:Rollout.save": "safetensors are written from the CPU",
    "reward/export.py:_save_merged": "safetensors are written from the CPU",
    "reward/labels.py:pad_by_prompt": "numbers of completions, to split the scores of an evaluation",
    "reward/losses.py:rank_prompts": "numbers of pairs, to split the losses",
    "reward/meter.py:TrainMeter.reduce": "eight sums, once for each log, in fp64, which not every device has",
    "reward/scorer.py:RewardScorer._score": "the result: scores as a list",
    "reward/trainer.py:BradleyTerryTrainer._save": "safetensors are written from the CPU",
    "reward/trainer.py:BradleyTerryTrainer.evaluate": "Trainer gathers scores and labels, for the metrics",
    "reward/trainer.py:BradleyTerryTrainer.predict": "the result: scores as an array",
}

# The same for modules that compute on the CPU, where the function itself or one that called it is named.
FORWARD_PASSES: dict[str, str] = {
    "hub/merge.py:merge_run": "merges on the CPU: two models may not fit on a card",
    "modeling/families.py:reads_later_tokens": "a few tokens, before the trainer moves a value model",
    "modeling/layouts.py:find_layout": "a few tokens, before the trainer moves the model",
}


def places() -> Iterator[str]:
    """The functions of the library that are running, as `file:function`, from the innermost one outward."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(LIBRARY):
            yield f"{code.co_filename.removeprefix(LIBRARY)}:{code.co_qualname}"
        frame = frame.f_back


class Watch:
    """Counts copies to the CPU, and forward passes of modules on the CPU, by place. Only while it is `on`."""

    def __init__(self):
        self.on = False
        self.copies: Counter[str] = Counter()
        self.forward_passes: Counter[str] = Counter()
        self.used: set[str] = set()
        torch.nn.modules.module.register_module_forward_pre_hook(self._note_forward)

    def start(self) -> None:
        self.on = True
        self.copies.clear()
        self.forward_passes.clear()

    def note_copy(self, tensor: torch.Tensor) -> None:
        """Notes a copy of more than one number: a single one is a condition or a metric."""
        where = next(places(), None) if self.on and tensor.numel() > 1 else None
        if where is None:
            return
        if where in COPIES:
            self.used.add(where)
        else:
            self.copies[where] += 1

    def _note_forward(self, module: torch.nn.Module, args: tuple) -> None:
        weight = next(module.parameters(recurse=False), None)
        if not self.on or weight is None or weight.device.type != "cpu":
            return
        running = list(places())
        allowed = FORWARD_PASSES.keys() & running
        if allowed:
            self.used |= allowed
        elif running:
            self.forward_passes[running[0]] += 1
