"""The runs of `make bench-ppo`, each for a process of its own: `python benchmarks/ppo_runs.py NAME JOB`.

NAME is one of `RUNS`, JOB the file that `ppo.py` wrote. The last line of output is one JSON object: the mean seconds of
an update, of its stages, of the bare passes if they were run, and peak memory.
"""

import gc
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

TRL_PPO = "1.12.0"
"""The last release of TRL with PPO."""
INNER_EPOCHS, RATE, KL_COEF = 2, 1e-5, 0.05
STOP_TOKEN = 3
"""<repo_name>, which the model never generates: all completions have the same length."""
WINDOW, COMMON = 16, 2000
"""The reward is the fraction of the last `WINDOW` tokens whose id is below `COMMON`."""


@dataclass(frozen=True)
class Sizes:
    """What every update has.

    Attributes:
        prompts: prompts, each with `generations` completions.
        generations: K.
        new_tokens: tokens of a completion.
        micro_batch: completions per forward pass, for TRL and for the bare passes.
        max_tokens: `max_tokens_per_batch` of this library.
    """

    prompts: int = 8
    generations: int = 4
    new_tokens: int = 48
    micro_batch: int = 8
    max_tokens: int = 1000

    @property
    def completions(self) -> int:
        return self.prompts * self.generations


TINY = Sizes(prompts=2, generations=2, new_tokens=8, micro_batch=2, max_tokens=400)
"""For warming up, and for a look at whether everything runs."""


@dataclass(frozen=True)
class Run:
    """A measurement.

    Attributes:
        kind: trainer, a key of `TRAINERS`.
        critic: kind of critic, for this library.
        shares_prompts: whether it knows that K completions have one prompt.
        updates: updates that count.
        skips_prompts: whether TRL 1.16 computes the output head for completions only, as on devices with Triton.
            Elsewhere it does so for the tokens of prompts too, and drops the results.
        discarded: updates before them, as a warm-up. A run without one is long: another trainer of the same kind warms
            up with an update of the sizes of `TINY`.
    """

    kind: str
    critic: str | None = None
    shares_prompts: bool = True
    skips_prompts: bool = False
    updates: int = 1
    discarded: int = 0

    @property
    def all_updates(self) -> int:
        return self.updates + self.discarded


RUNS = {
    "trl": Run("trl ppo", shares_prompts=False),
    "trl grpo": Run("trl grpo"),
    "trl grpo, less head": Run("trl grpo", skips_prompts=True),
    "trl rloo": Run("trl rloo"),
    "ours, head": Run("ours", "head", shares_prompts=False),
    "ours, adapter": Run("ours", "adapter", shares_prompts=False),
    "ours, head, K = 4": Run("ours", "head", discarded=1),
    "ours, adapter, K = 4": Run("ours", "adapter", discarded=1),
    "ours, none, K = 4": Run("ours", "none", discarded=1),
}


@dataclass(frozen=True)
class Job:
    """What all runs share.

    Attributes:
        model: folder of the model and its tokenizer, SmolLM2-135M.
        dtype: name of the dtype of weights and autocast.
        sizes: sizes of an update.
        prompts: messages of each prompt. Every update has the same ones, so that all trainers, which shuffle in their
            own ways, process the same tokens.
        prompt_ids: their tokens.
    """

    model: str
    dtype: str
    sizes: Sizes
    prompts: list
    prompt_ids: list[list[int]]

    def rows(self, run: Run) -> list[int]:
        """Numbers of the prompts in the run's data: with K copies of each if it does not share them."""
        copies = 1 if run.shares_prompts else self.sizes.generations
        return [number for number in range(len(self.prompts)) for _ in range(copies)]

    def tiny(self) -> "Job":
        """The same with the sizes of `TINY`."""
        few = slice(TINY.prompts)
        return replace(self, sizes=TINY, prompts=self.prompts[few], prompt_ids=self.prompt_ids[few])

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> "Job":
        fields = json.loads(path.read_text())
        return cls(**(fields | {"sizes": Sizes(**fields["sizes"])}))


def dtype_of(job: Job):
    import torch

    return getattr(torch, job.dtype)


def autocast_of(job: Job):
    """The dtype of autocast, `None` in fp32."""
    return None if job.dtype == "float32" else dtype_of(job)


def lora():
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def common_options(job: Job, folder: str) -> dict[str, Any]:
    """The options of all trainers."""
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": job.dtype == "bfloat16",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "temperature": 1.0,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }


def micro_batches(job: Job) -> dict[str, Any]:
    """Options of TRL's trainers: one optimizer step for all completions, in micro-batches, whose activations stay."""
    micro = job.sizes.micro_batch
    return {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": job.sizes.completions // micro,
        "gradient_checkpointing": False,  # it is on by default, and slower
    }


def last_tokens(completion_ids, **columns) -> list[float]:
    """The reward as a function."""
    lengths = {len(ids) for ids in completion_ids}
    if len(lengths) > 1:
        raise SystemExit(f"error: completions have {sorted(lengths)} tokens, but all runs must do the same work")
    return [sum(token < COMMON for token in ids[-WINDOW:]) / WINDOW for ids in completion_ids]


# ---- Clocks ----


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Clock:
    """Seconds of each update, from the first optimizer step's preparation to the end of the last one.

    Args:
        steps: optimizer steps of an update.
        after: runs between two updates, and is not counted.
    """

    def __init__(self, steps: int, after: Callable[[], None] | None = None):
        self.steps = steps
        self.after = after
        self.seconds: list[float] = []
        self.generated: list[float] = []
        self.rollouts: list[float] = []
        self.peaks: list[float] = []

    def callback(self):
        """The clock as a callback of `Trainer`."""
        from transformers import TrainerCallback

        clock = self

        class Ticks(TrainerCallback):
            def on_train_begin(self, args, state, control, **kwargs):
                clock.start = time.perf_counter()

            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step % clock.steps == 0:
                    clock.update_ends()

        return Ticks()

    def update_ends(self) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        self.peaks.append(peak_gb())
        if self.after is not None:
            self.after()
        self.start = time.perf_counter()

    def generates(self, function: Callable) -> Callable:
        """The function that samples, with its seconds noted."""

        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            while len(self.generated) <= len(self.seconds):
                self.generated.append(0.0)
            self.generated[-1] += time.perf_counter() - start
            return result

        return timed

    def trains(self, function: Callable) -> Callable:
        """A function whose first call in each update comes when its rollout is complete."""

        def noted(*args, **kwargs):
            if len(self.rollouts) == len(self.seconds):
                self.rollouts.append(time.perf_counter() - self.start)
            return function(*args, **kwargs)

        return noted

    def result(self, discarded: int) -> dict[str, float]:
        """Means over the updates after the discarded ones."""
        measured = (self.seconds, self.rollouts, self.generated)
        whole, rollout, generate = (fmean(values[discarded:]) for values in measured)
        # What `after` runs takes memory of its own: the first update was before it.
        peak = self.peaks[-1] if self.after is None else self.peaks[0]
        stages = {"generate": generate, "score": rollout - generate, "update": whole - rollout}
        return {"seconds": whole, **stages, "peak_gb": peak}


# ---- Trainers ----


def run_trl_ppo(job: Job, run: Run) -> dict[str, Any]:
    """TRL's last PPO, set up as in its example script."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    if trl.__version__ != TRL_PPO:
        raise SystemExit(f"error: trl {trl.__version__} was imported from {trl.__file__} instead of {TRL_PPO}")

    class LastTokens(torch.nn.Module):
        """The reward as a model: at each position, the fraction of common ids in the window that ends there."""

        base_model_prefix = "backbone"

        def __init__(self):
            super().__init__()
            self.score, self.backbone = torch.nn.Identity(), self.shares

        def shares(self, input_ids, **kwargs):
            seen = (input_ids < COMMON).float().cumsum(1)
            seen[:, WINDOW:] -= seen[:, :-WINDOW].clone()
            return SimpleNamespace(hidden_states=[seen[..., None] / WINDOW])

    tokenizer = AutoTokenizer.from_pretrained(job.model, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # as in TRL's script, which recognizes padding by its id
    policy = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype_of(job))
    value = AutoModelForSequenceClassification.from_pretrained(job.model, num_labels=1, dtype=dtype_of(job))
    clock = Clock(1)
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(
            **common_options(job, folder),
            **micro_batches(job),
            num_ppo_epochs=INNER_EPOCHS,
            kl_coef=KL_COEF,
            local_rollout_forward_batch_size=job.sizes.completions,
            response_length=job.sizes.new_tokens,
            total_episodes=job.sizes.completions * run.all_updates,
            num_sample_generations=0,
        )
        data = Dataset.from_dict({"input_ids": [job.prompt_ids[number] for number in job.rows(run)]})
        trainer = PPOTrainer(
            args, tokenizer, policy, None, LastTokens(), data, value, callbacks=[clock.callback()], peft_config=lora()
        )
        trainer.model.policy.generate = clock.generates(trainer.model.policy.generate)
        trainer.accelerator.accumulate = clock.trains(trainer.accelerator.accumulate)
        trainer.train()
    return clock.result(run.discarded)


def run_trl(job: Job, run: Run) -> dict[str, Any]:
    """TRL's GRPO or RLOO, with the reward as a function."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
    from trl.trainer import utils

    if run.skips_prompts:
        utils._use_triton = lambda device: True  # here, it only says which tokens the head gets
    config, make = {"trl grpo": (GRPOConfig, GRPOTrainer), "trl rloo": (RLOOConfig, RLOOTrainer)}[run.kind]
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(STOP_TOKEN)
    if tokenizer.apply_chat_template(job.prompts, add_generation_prompt=True)["input_ids"] != job.prompt_ids:
        raise SystemExit("error: TRL's prompts have other tokens")
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype_of(job))
    model.generation_config.eos_token_id = STOP_TOKEN
    clock = Clock(INNER_EPOCHS)
    with tempfile.TemporaryDirectory() as folder:
        args = config(
            **common_options(job, folder),
            **micro_batches(job),
            num_generations=job.sizes.generations,
            max_completion_length=job.sizes.new_tokens,
            num_iterations=INNER_EPOCHS,
            beta=KL_COEF,
            max_steps=INNER_EPOCHS * run.all_updates,
        )
        data = Dataset.from_dict({"prompt": [job.prompts[number] for number in job.rows(run)]})
        trainer = make(
            model,
            last_tokens,
            args=args,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[clock.callback()],
            peft_config=lora(),
        )
        trainer.model.generate = clock.generates(trainer.model.generate)
        trainer.compute_loss = clock.trains(trainer.compute_loss)
        trainer.train()
    return clock.result(run.discarded)


def our_trainer(job: Job, run: Run, folder: str):
    """The `PPOTrainer` of a run."""
    from datasets import Dataset

    from hf_rlhf_ext import PPOConfig, PPOTrainer, load_base_model, load_tokenizer

    args = PPOConfig(
        **common_options(job, folder),
        critic=run.critic,
        num_generations=job.sizes.generations if run.shares_prompts else 1,
        per_device_train_batch_size=job.sizes.completions,
        max_tokens_per_batch=job.sizes.max_tokens,
        max_completion_length=job.sizes.new_tokens,
        num_ppo_epochs=INNER_EPOCHS,
        kl_coef=KL_COEF,
        stop_token_ids=[STOP_TOKEN],
        activation_checkpointing=False,
        max_steps=INNER_EPOCHS * run.all_updates,
    )
    return PPOTrainer(
        load_base_model(job.model, dtype=job.dtype),
        last_tokens,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [job.prompts[number] for number in job.rows(run)]}),
        processing_class=load_tokenizer(job.model),
        peft_config=lora(),
    )


def run_ours(job: Job, run: Run) -> dict[str, Any]:
    """This library's PPO. Where it shares prompts, bare passes over the same tokens follow each update."""
    from ppo_bound import BareLoop

    drawn, bare = {}, []
    clock = Clock(INNER_EPOCHS)
    with tempfile.TemporaryDirectory() as folder:
        trainer = our_trainer(job, run, folder)
        engine = trainer.tools.engine
        generate = clock.generates(engine.generate)

        def kept(prompt_ids, sampling, **further):
            samples = generate(prompt_ids, sampling, **further)
            drawn.update(prompts=prompt_ids, completions=samples.ids)
            return samples

        engine.generate = kept
        trainer.compute_loss = clock.trains(trainer.compute_loss)
        if run.shares_prompts:
            loop = BareLoop(
                trainer.policy,
                run.critic,
                inner_epochs=INNER_EPOCHS,
                micro_batch=job.sizes.micro_batch,
                dtype=autocast_of(job),
            )
            clock.after = lambda: bare.append(loop(**drawn))
        trainer.add_callback(clock.callback())
        trainer.train()
    result = clock.result(run.discarded)
    if bare:
        result["bare"] = {stage: fmean(one[stage] for one in bare[run.discarded :]) for stage in bare[0]}
        result["generates_by"] = loop.ways[0].__name__
    return result


TRAINERS = {"trl ppo": run_trl_ppo, "trl grpo": run_trl, "trl rloo": run_trl, "ours": run_ours}


def main(name: str, path: Path) -> None:
    job, run = Job.read(path), RUNS[name]
    train = TRAINERS[run.kind]
    if run.discarded == 0 and job.sizes != TINY:
        train(job.tiny(), run)
        gc.collect()
    print(json.dumps(train(job, run)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
