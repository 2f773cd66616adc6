"""PPO compared with TRL 1.12.0, the last release with PPO: seconds per update and peak memory.

make bench-ppo          # about 30 minutes on two idle cores; RLHF_SHARED is the folder with the shared data

Both use SmolLM2-135M in bf16, LoRA r 16 on all linear layers, 32 prompts of HH-RLHF (125 to 185 tokens) with 48 new
tokens each, two passes of one optimizer step, and learning rate 1e-5. There is no stop token, so that both do the same
work. The reward is the fraction of common tokens in the last 16; for TRL, which accepts only models, it is a module
without weights. TRL trains a full value model, and this library a head on the policy or an adapter. Each run has its
own process. The wheel of TRL 1.12.0 is downloaded with pip into a separate folder; all other packages are the same. The
first update is a warm-up and is not counted.

A second run of this library also times, after each update, a minimal loop over the same tokens: generation from merged
weights, and forward and backward passes of the same roles with the output head at the positions of completions only.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

TRL = "1.12.0"
SHARED = Path(os.environ.get("RLHF_SHARED", "../shared"))
OUT = Path("docs/study/ppo_benchmark.json")
PROMPTS, NEW_TOKENS, INNER_EPOCHS, RATE = 32, 48, 2, 1e-5
MICRO_BATCH = 8  # completions per forward pass, here about 1,600 tokens
MAX_TOKENS = 1000
WINDOW, COMMON = 16, 2000
"""The reward is the fraction of the last `WINDOW` tokens whose id is below `COMMON`."""

# name -> (trainer, critic or micro-batch, updates after the warm-up)
RUNS = {
    "trl": ("trl", MICRO_BATCH, 1),
    "ours, head": ("ours", "head", 2),
    "ours, adapter": ("ours", "adapter", 2),
    "stages, head": ("stages", "head", 1),
    "stages, adapter": ("stages", "adapter", 1),
    "trl, micro-batch 4": ("trl", 4, 1),
}


def trl_folder() -> Path:
    """A folder with the wheel of TRL only, downloaded once into the Hugging Face cache."""
    from huggingface_hub.constants import HF_HOME

    folder = Path(HF_HOME) / "hf_rlhf_ext" / f"trl-{TRL}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:  # renamed when complete
        command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--target", f"{scratch}/trl", f"trl=={TRL}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise SystemExit(
                f"error: pip could not download the wheel of trl {TRL}, which the comparison needs: {reason}"
            )
        (Path(scratch) / "trl").rename(folder)
    return folder


def write_job(path: Path) -> None:
    """Writes the folder of the model and the prompts, as messages and as token ids, for every process."""
    from hf_rlhf_ext import load_comparisons, load_tokenizer
    from hf_rlhf_ext.data.text import encode_prompt
    from hf_rlhf_ext.modeling.locations import EMBEDDED_MODEL, resolve_location

    tokenizer = load_tokenizer()
    rows = load_comparisons(str(SHARED / "data" / "hh_harmless_test.jsonl.gz"), split="train", group=False)[0]
    prompts = [row["prompt"] for row in rows.to_list()]
    chosen = [(prompt, ids) for prompt in prompts if 125 <= len(ids := encode_prompt(tokenizer, prompt)) <= 185]
    updates = 1 + max(n for _, _, n in RUNS.values())
    messages, ids = zip(*chosen[: updates * PROMPTS], strict=True)
    job = {"model": str(resolve_location(EMBEDDED_MODEL, None)[0]), "prompts": messages, "prompt_ids": ids}
    path.write_text(json.dumps(job))


def common_options(folder: str) -> dict:
    """The options of both trainers."""
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": True,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "num_ppo_epochs": INNER_EPOCHS,
        "kl_coef": 0.05,
        "temperature": 1.0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }


def lora():
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def update_clock(steps_per_update: int, after=None):
    """A callback that measures the `seconds` of each update. `after()` runs between two updates and is not counted."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds = []

        def on_train_begin(self, args, state, control, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % steps_per_update:
                return
            self.seconds.append(time.perf_counter() - self.start)
            if after is not None:
                after()
            self.start = time.perf_counter()

    return Clock()


def run_trl(job: dict, micro_batch: int, updates: int) -> dict[str, float]:
    """Trains with TRL as its example script does, on the same prompts."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    if trl.__version__ != TRL:
        raise SystemExit(f"error: trl {trl.__version__} was imported from {trl.__file__} instead of {TRL}")

    class LastTokens(torch.nn.Module):
        """The reward as a model for TRL: at each position, the fraction of common ids in the window that ends there."""

        base_model_prefix = "backbone"

        def __init__(self):
            super().__init__()
            self.score, self.backbone = torch.nn.Identity(), self.shares

        def shares(self, input_ids, **kwargs):
            seen = (input_ids < COMMON).float().cumsum(1)
            seen[:, WINDOW:] -= seen[:, :-WINDOW].clone()
            return SimpleNamespace(hidden_states=[seen[..., None] / WINDOW])

    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # as in TRL's script, which recognizes padding by its id
    policy = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16)
    value = AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=1, dtype=torch.bfloat16)
    clock = update_clock(1)
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(
            **common_options(folder),
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=PROMPTS // micro_batch,
            local_rollout_forward_batch_size=PROMPTS if micro_batch == MICRO_BATCH else micro_batch,
            response_length=NEW_TOKENS,
            total_episodes=PROMPTS * (updates + 1),
            num_sample_generations=0,
            logging_strategy="no",
        )
        data = Dataset.from_dict({"input_ids": job["prompt_ids"]})
        PPOTrainer(
            args, tokenizer, policy, None, LastTokens(), data, value, callbacks=[clock], peft_config=lora()
        ).train()
    return {"seconds": sum(clock.seconds[1:]) / updates, "peak_gb": peak_gb()}


def last_tokens(completion_ids, **columns) -> list[float]:
    """The same reward as a function."""
    return [sum(token < COMMON for token in ids[-WINDOW:]) / WINDOW for ids in completion_ids]


def make_trainer(job: dict, folder: str, critic: str, updates: int, engine=None):
    from datasets import Dataset

    from hf_rlhf_ext import PPOConfig, PPOTrainer, load_base_model, load_tokenizer

    args = PPOConfig(
        **common_options(folder),
        critic=critic,
        per_device_train_batch_size=PROMPTS,
        max_tokens_per_batch=MAX_TOKENS,
        max_completion_length=NEW_TOKENS,
        stop_token_ids=[3],  # <repo_name>, which the model never generates
        activation_checkpointing=False,
        max_steps=INNER_EPOCHS * (updates + 1),
        logging_strategy="no",
    )
    return PPOTrainer(
        load_base_model(dtype="bfloat16"),
        last_tokens,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": job["prompts"]}),
        processing_class=load_tokenizer(),
        peft_config=lora(),
        engine=engine,
    )


def run_ours(job: dict, critic: str, updates: int) -> dict[str, float]:
    clock = update_clock(INNER_EPOCHS)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(job, folder, critic, updates)
        trainer.add_callback(clock)
        trainer.train()
    return {"seconds": sum(clock.seconds[1:]) / updates, "peak_gb": peak_gb()}


def run_stages(job: dict, critic: str, updates: int) -> dict[str, dict[str, float]]:
    """Seconds of each stage of an update, and of a minimal loop over the same tokens."""
    import torch

    from hf_rlhf_ext.ppo.engine import TransformersEngine

    class TimedEngine(TransformersEngine):
        """Keeps the seconds of each call and the tokens of the last one."""

        def __init__(self):
            super().__init__(autocast=torch.bfloat16)
            self.seconds = []

        def generate(self, prompt_ids, sampling, n=1):
            start = time.perf_counter()
            samples = super().generate(prompt_ids, sampling, n)
            self.seconds.append(time.perf_counter() - start)
            self.last = (prompt_ids, samples.ids)
            return samples

    engine = TimedEngine()
    rollout_seconds = []
    bare = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(job, folder, critic, updates, engine)
        make_rollout = trainer.experience.make

        def timed_rollout(*args):
            start = time.perf_counter()
            rollout = make_rollout(*args)
            rollout_seconds.append(time.perf_counter() - start)
            return rollout

        trainer.experience.make = timed_rollout
        clock = update_clock(INNER_EPOCHS, lambda: bare.append(bare_stages(trainer, *engine.last, critic)))
        trainer.add_callback(clock)
        trainer.train()
    # The first update is a warm-up.
    generate = sum(engine.seconds[1:]) / updates
    rollout = sum(rollout_seconds[1:]) / updates
    total = sum(clock.seconds[1:]) / updates
    ours = {"generate": generate, "score": rollout - generate, "update": total - rollout}
    found = {}
    for name, seconds in ours.items():
        least = sum(one[name] for one in bare[1:]) / updates
        found[name] = {"ours": round(seconds, 2), "bare": round(least, 2), "ratio": round(seconds / least, 3)}
    return found


def bare_stages(trainer, prompt_ids, completion_ids, critic: str) -> dict[str, float]:
    """Seconds of a minimal loop over these tokens, without rewards, advantages, PPO loss and optimizer."""
    import torch

    from hf_rlhf_ext.modeling.adapters import active_adapter, bare_model, merged_adapter, mixed_precision
    from hf_rlhf_ext.modeling.probing import evaluating

    model, dtype = trainer.model, torch.bfloat16
    batches = padded_batches(prompt_ids, completion_ids)

    def passes(with_head: bool = True, backward: bool = False) -> float:
        start = time.perf_counter()
        for batch in batches:
            with mixed_precision(model, dtype):
                loss = plain_loss(bare_model(model), *batch, with_head)
            if backward:
                loss.backward()
        return time.perf_counter() - start

    seconds = {}
    with torch.no_grad(), evaluating(model):
        with merged_adapter(model, enabled=True):
            seconds["generate"] = bare_generation(bare_model(model), prompt_ids)
        seconds["score"] = passes()
        with active_adapter(model, None):
            seconds["score"] += passes()
        if critic == "adapter":  # another adapter takes as long as that of the policy
            seconds["score"] += passes(with_head=False)
    seconds["update"] = 0.0
    for _ in range(INNER_EPOCHS):
        seconds["update"] += passes(backward=True)
        if critic == "adapter":
            seconds["update"] += passes(with_head=False, backward=True)
    model.zero_grad()
    return seconds


def padded_batches(prompt_ids, completion_ids) -> list[tuple]:
    """Batches of `MICRO_BATCH` rows, padded on the right: ids, mask, and row and position of each predicted token."""
    import torch

    batches = []
    for start in range(0, len(prompt_ids), MICRO_BATCH):
        prompts, completions = prompt_ids[start : start + MICRO_BATCH], completion_ids[start : start + MICRO_BATCH]
        rows = [torch.tensor(p + c) for p, c in zip(prompts, completions, strict=True)]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        scored = [
            (row, len(p) + t)
            for row, (p, c) in enumerate(zip(prompts, completions, strict=True))
            for t in range(len(c))
        ]
        batches.append((ids, mask, *torch.tensor(scored).T))
    return batches


def plain_loss(model, ids, mask, rows, positions, with_head: bool):
    """Cross-entropy of the completion tokens, or the mean of the hidden states without the head."""
    import torch

    hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[rows, positions - 1]
    if not with_head:
        return hidden.float().mean()
    return torch.nn.functional.cross_entropy(model.lm_head(hidden).float(), ids[rows, positions])


def bare_generation(model, prompt_ids) -> float:
    """Seconds of `model.generate` for all prompts in one batch, with the same number of new tokens."""
    import torch
    from transformers import GenerationConfig

    width = max(map(len, prompt_ids))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompt_ids])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompt_ids])
    # Token 3 is the stop token of the run and is never generated. Setting `min_new_tokens` would mask it at every step.
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=True, top_k=0, eos_token_id=3, pad_token_id=0)
    start = time.perf_counter()
    model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return time.perf_counter() - start


def in_a_process(name: str, job: Path, path: Path) -> dict:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    if RUNS[name][0] == "trl":
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, __file__, name, str(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        killed = ", killed: out of memory?" if done.returncode == -9 else ""
        raise SystemExit(f"error: {name} ended with status {done.returncode}{killed}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def show(name: str, found: dict) -> None:
    if "seconds" in found:
        print(f"{name:20} {found['seconds']:7.1f} s per update, peak {found['peak_gb']:5.2f} GB", flush=True)
        return
    for stage, one in found.items():
        print(
            f"{name:20} {stage:9} {one['ours']:6.2f} s, minimal {one['bare']:6.2f} s, {one['ratio']:5.2f}×", flush=True
        )


def summary(found: dict) -> dict:
    """Ratios of speed (seconds of TRL over ours) and of memory (ours over TRL), for the runs that are finished."""
    ratios: dict = {}
    ours = {critic: found[f"ours, {critic}"] for critic in ("head", "adapter") if f"ours, {critic}" in found}
    for critic, one in ours.items():
        ratios[f"{critic}_ratio"] = round(found["trl"]["seconds"] / one["seconds"], 3)
    peak = max((one["peak_gb"] for one in ours.values()), default=0.0)
    for name, key in (("trl", "memory_ratio"), ("trl, micro-batch 4", "memory_ratio_micro_batch_4")):
        if peak and name in found:
            ratios[key] = round(peak / found[name]["peak_gb"], 3)
    ratios["stages"] = {name.removeprefix("stages, "): one for name, one in found.items() if name.startswith("stages")}
    return ratios


def main() -> None:
    path, found = trl_folder(), {}
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        write_job(job)
        for name in RUNS:
            found[name] = in_a_process(name, job, path)
            show(name, found[name])
            write(found)
    print(json.dumps(summary(found)))


def write(found: dict) -> None:
    """Writes the results so far, so that they are kept if the benchmark is stopped."""
    hardware = f"{len(os.sched_getaffinity(0))} CPU cores, no GPU"
    runs = {
        name: {key: round(value, 2) for key, value in one.items()} for name, one in found.items() if "seconds" in one
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    written = {"command": "make bench-ppo", "hardware": hardware, "runs": runs, "results": summary(found)}
    OUT.write_text(json.dumps(written, indent=1) + "\n")


def child(name: str, job: dict) -> dict:
    kind, how, updates = RUNS[name]
    return {"trl": run_trl, "ours": run_ours, "stages": run_stages}[kind](job, how, updates)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        print(json.dumps(child(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))))
