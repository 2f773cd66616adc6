"""Training of reward models compared with TRL's RewardTrainer: pairs per second and peak memory.

make bench-reward       # about 30 minutes on two idle cores (40 without bf16); RLHF_SHARED is the shared data folder

It writes docs/study/reward_benchmark.json after each of the groups pairs, checkpointing, k4 and k9. Results for another
dtype are kept. ARGS="k4 k9" measures only these two groups. The last line of output has the results; a result is null
if a run did not fit into memory or was not measured yet. Each run has its own process.

`make bench-reward BASE=commit` compares this tree with that of a commit instead, see benchmarks/reward_layouts.py.

Both use SmolLM2-135M in the dtype in which the machine is fastest, LoRA r 16 on all linear layers, learning rate 2e-4,
rows of HH-RLHF helpful with at most 1,024 tokens in the order of the file (no grouping by length), and the same
allocator settings. TRL trains on padded pairs, and this library on the shared-prefix layout with micro-batches of at
most 2,400 tokens. K-wise rows have K replies of HH-RLHF harmless under one prompt; their prompts are conversations and
longer. TRL gets the pairs of these rows. If TRL trains on fewer pairs, as it is slower, they are spread evenly over the
same prompts. The first optimizer step is a warm-up and is not counted.

The limit: after each step of "ours, 16 prompts", a forward and backward pass of the same model on the same number of
tokens is timed, in full rows of about 400 tokens. `limit_fraction` is its time divided by the time of the step.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil

DATA = Path(os.environ.get("RLHF_SHARED", "../shared")) / "data"
PAIRS, K_WISE = "hh_helpful_train.jsonl", "hh_harmless_test.jsonl.gz"
REPORT = Path(__file__).parents[1] / "docs" / "study" / "reward_benchmark.json"
MAX_TOKENS = 2400
# name -> (group of runs that are compared, trainer, completions per prompt, prompts or pairs per step,
#          steps after the warm-up, micro-batch, gradient checkpointing)
RUNS = {
    "trl, micro-batch 16": ("pairs", "trl", 2, 16, 3, 16, False),
    "ours, 16 prompts": ("pairs", "ours", 2, 16, 6, 16, False),
    "trl, 16, checkpointing": ("checkpointing", "trl", 2, 16, 3, 16, True),
    "ours, 16, checkpointing": ("checkpointing", "ours", 2, 16, 6, 16, True),
    "trl, micro-batch 4": ("pairs", "trl", 2, 16, 4, 4, False),
    "trl, micro-batch 1": ("pairs", "trl", 2, 16, 4, 1, False),
    "trl, K = 4 as pairs": ("k4", "trl", 4, 24, 2, 4, False),
    "ours, K = 4": ("k4", "ours", 4, 8, 3, 8, False),
    "trl, K = 9 as pairs": ("k9", "trl", 9, 36, 2, 4, False),
    "ours, K = 9": ("k9", "ours", 9, 4, 3, 4, False),
}
GROUPS = list(dict.fromkeys(group for group, *_ in RUNS.values()))
PAD = 0  # a token that occurs in no text, as Transformers reads one token too early if the pad token is eos
LIMIT = "ours, 16 prompts"
"""The run that is compared with a minimal loop."""
TRL_BEST = ("trl, micro-batch 16", "trl, micro-batch 4", "trl, micro-batch 1")
"""The best setting of TRL is the fastest of these, as smaller micro-batches need less padding."""


def comparison_rows(n: int, k: int) -> list[dict]:
    """`n` rows of `PAIRS`. With k > 2, rows of `K_WISE` with replies of the following rows under the same prompt."""
    from hf_rlhf_ext import load_comparisons

    rows = load_comparisons(str(DATA / (PAIRS if k == 2 else K_WISE)), split="train[:600]", group=False)[0].to_list()
    if k == 2:
        return rows[:n]
    replies = [completion for row in rows for completion in row["completions"]]
    made = []
    for index in range(n):
        pairs = [list(pair) for pair in combinations(range(k), 2)]
        row = {"prompt": rows[index]["prompt"], "completions": replies[index * k : (index + 1) * k]}
        made.append(row | {"pairs": pairs, "targets": [1.0] * len(pairs), "weights": None, "margins": None})
    return made


def child(name: str) -> dict[str, Any]:
    """Trains and returns pairs and tokens per second, peak memory, the dtype, and the fraction of the limit."""
    from hf_rlhf_ext import load_base_model, load_tokenizer
    from hf_rlhf_ext.data.tokenization import tokenize_row
    from hf_rlhf_ext.reward.scorer import dtype_name

    group, kind, k, per_step, steps, micro, checkpointing = RUNS[name]
    prompts, its_steps = next(run[3:5] for run in RUNS.values() if run[:2] == (group, "ours"))
    rows = comparison_rows(prompts * (its_steps + 1), k)
    model, tokenizer = load_base_model(task="reward"), load_tokenizer()
    prompt_tokens = fmean(len(tokenize_row(row, tokenizer)["prompt_ids"]) for row in rows)
    with tempfile.TemporaryDirectory() as folder:
        options = common_options(folder, steps + 1, checkpointing)
        if kind == "trl":
            trainer = trl_trainer(model, tokenizer, rows, options, per_step, steps, micro)
            n_pairs = per_step * steps
        else:
            trainer = our_trainer(model, tokenizer, rows, options, per_step)
            n_pairs = per_step * steps * k * (k - 1) // 2
        clock = step_clock(with_bare_loop=name == LIMIT)
        trainer.add_callback(clock)
        trainer.train()
    seconds = sum(clock.seconds[1:])
    tokens_per_s = clock.tokens * steps / (steps + 1) / seconds
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result = {"pairs_per_s": n_pairs / seconds, "tokens_per_s": tokens_per_s, "peak_gb": peak}
    result |= {"prompt_tokens": prompt_tokens, "dtype": dtype_name(trainer.model)}
    if clock.bare_seconds:
        result["limit_fraction"] = sum(clock.bare_seconds[1:]) / seconds
    return result


def common_options(folder: str, max_steps: int, checkpointing: bool) -> dict[str, Any]:
    """The options of both trainers."""
    from hf_rlhf_ext.cli.options import machine_defaults

    return {
        "output_dir": folder,
        **machine_defaults(),
        "learning_rate": 2e-4,
        "activation_checkpointing": checkpointing,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,  # each log has the number of tokens so far
        "disable_tqdm": True,
        "max_steps": max_steps,
        "max_length": 1024,
        "seed": 0,
    }


def lora():
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS")


def trl_trainer(model, tokenizer, rows: list[dict], options: dict[str, Any], per_step: int, steps: int, micro: int):
    """TRL's trainer on pairs of the rows. If there are more pairs than it trains on, they are selected evenly."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    pairs = []
    for row in rows:
        for i, j in row["pairs"]:
            sides = {"chosen": row["completions"][i], "rejected": row["completions"][j]}
            pairs.append({name: row["prompt"] + side for name, side in sides.items()})
    n_trained = per_step * (steps + 1)
    data = [pairs[i * len(pairs) // n_trained] for i in range(n_trained)]
    args = RewardConfig(
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=per_step // micro,
        dataset_num_proc=None,
        **options,
    )
    return RewardTrainer(
        model, args, train_dataset=Dataset.from_list(data), processing_class=tokenizer, peft_config=lora()
    )


def our_trainer(model, tokenizer, rows: list[dict], options: dict[str, Any], per_step: int):
    from datasets import Dataset

    from hf_rlhf_ext import BradleyTerryConfig, BradleyTerryTrainer

    args = BradleyTerryConfig(
        per_device_train_batch_size=per_step,
        max_tokens_per_batch=MAX_TOKENS,
        normalize_rewards=False,
        overflow="drop",
        **options,
    )
    return BradleyTerryTrainer(model, args, Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora())


def step_clock(*, with_bare_loop: bool):
    """A callback that measures the seconds of each optimizer step, the tokens, and the seconds of a minimal loop."""
    from transformers import TrainerCallback

    from hf_rlhf_ext.modeling.adapters import autocast_dtype

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds: list[float] = []
            self.bare_seconds: list[float] = []
            self.tokens = 0

        def on_train_begin(self, args, state, control, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            self.seconds.append(time.perf_counter() - self.start)
            self.start = time.perf_counter()

        def on_log(self, args, state, control, model=None, logs=None, **kwargs):
            """Runs the minimal loop between two steps. Its time does not count as part of a step."""
            if "num_tokens" not in logs:  # the summary at the end
                return
            tokens = int(logs["num_tokens"])
            if with_bare_loop:
                pause = time.perf_counter()
                self.bare_seconds.append(bare_seconds(model, tokens - self.tokens, autocast_dtype(args)))
                self.start += time.perf_counter() - pause
            self.tokens = tokens

    return Clock()


def bare_seconds(model, n_tokens: int, autocast) -> float:
    """Seconds of forward and backward passes only, on `n_tokens` tokens in full rows, `MAX_TOKENS` per pass."""
    import torch

    from hf_rlhf_ext.modeling.adapters import mixed_precision

    n_passes = -(-n_tokens // MAX_TOKENS)
    n_rows = max(1, round(n_tokens / n_passes / 400))
    ids = torch.randint(5, 1000, (n_rows, round(n_tokens / n_passes / n_rows)), device=model.device)
    start = time.perf_counter()
    for _ in range(n_passes):
        with mixed_precision(model, autocast):
            model(input_ids=ids, use_cache=False).logits.float().sum().backward()
    seconds = time.perf_counter() - start
    model.zero_grad()
    return seconds


def score_difference() -> dict[str, float]:
    """Largest difference of scores in fp32 between padded rows, pooled as in TRL, and the shared-prefix layout."""
    import torch

    from hf_rlhf_ext import DataCollatorForComparisons, load_base_model, load_tokenizer
    from hf_rlhf_ext.data.collators import pad_right
    from hf_rlhf_ext.data.tokenization import tokenize_row
    from hf_rlhf_ext.reward.scorer import score_batch

    model, tokenizer = load_base_model(task="reward", dtype="float32").eval(), load_tokenizer()
    model.config.pad_token_id = PAD
    rows = [row | tokenize_row(row, tokenizer) for row in comparison_rows(8, 2)]
    with torch.no_grad():
        shared = score_batch(model, DataCollatorForComparisons(PAD, layout="shared_prefix")(rows))
        sequences = [row["prompt_ids"] + ids for row in rows for ids in row["completion_ids"]]
        pooled = model(**pad_right(sequences, PAD)).logits[:, 0]
    return {"max_score_diff": float((shared - pooled).abs().max())}


def in_a_process(command: list[str], **options: Any) -> dict[str, Any]:
    """Runs a command that prints a result; returns it, or only `available_gb` if the free memory was not enough.

    Args:
        command: the command. The last line of its output is JSON.
        options: options of `subprocess.run`, such as `env`.
    """
    available = psutil.virtual_memory().available

    def limit() -> None:  # a run that does not fit fails, instead of the system killing any process
        if sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_DATA, (available, available))

    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, **options)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if any(sign in done.stderr for sign in ("allocate memory", "not enough memory", "MemoryError", "bad_alloc")):
        return {"available_gb": round(available / 2**30, 1)}
    raise SystemExit(done.stderr[-3000:])


def child_command(name: str) -> list[str]:
    """The command of a run in a process of its own."""
    return [sys.executable, __file__, "--child", name]


def measure(group: str) -> dict[str, dict[str, Any]]:
    found = {}
    for name in (name for name, (its, *_) in RUNS.items() if its == group):
        found[name] = one = in_a_process(child_command(name))
        if "available_gb" in one:
            print(f"{name:26} does not fit in {one['available_gb']} GB", flush=True)
            continue
        one["rows"] = PAIRS if RUNS[name][2] == 2 else K_WISE
        numbers = f"{one['pairs_per_s']:7.2f}  {one['tokens_per_s']:8.0f}  {one['peak_gb']:7.2f}"
        print(f"{name:26} {numbers}  {one['rows']}", flush=True)
    return found


def ratios(runs: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    def ratio(ours: str, trl: str, what: str = "pairs_per_s") -> float | None:
        both = [runs.get(name, {}).get(what) for name in (ours, trl)]
        return None if None in both else round(both[0] / both[1], 3)

    best = [value for name in TRL_BEST if (value := ratio(LIMIT, name)) is not None]
    return {
        "pairs_ratio": ratio(LIMIT, "trl, micro-batch 16"),
        "pairs_ratio_checkpointing": ratio("ours, 16, checkpointing", "trl, 16, checkpointing"),
        "pairs_ratio_best": min(best, default=None),
        "memory_ratio": ratio(LIMIT, "trl, micro-batch 16", "peak_gb"),
        "k4_ratio": ratio("ours, K = 4", "trl, K = 4 as pairs"),
        "k9_ratio": ratio("ours, K = 9", "trl, K = 9 as pairs"),
        "limit_fraction": runs.get(LIMIT, {}).get("limit_fraction"),
    }


def write_report(group: str, found: dict[str, dict[str, Any]], minutes: int, difference: float) -> dict[str, Any]:
    """Adds the runs of a group to the committed file; returns the results for the dtype of this machine."""
    import_module("torch")  # `hardware` needs it to name a GPU
    from hf_rlhf_ext.hub.card import hardware

    digits = {"pairs_per_s": 3, "tokens_per_s": 1, "prompt_tokens": 0, "peak_gb": 2, "limit_fraction": 3}
    dtype = next(one["dtype"] for one in found.values() if "dtype" in one)
    new = {
        name: {key: round(value, digits[key] or None) if key in digits else value for key, value in one.items()}
        for name, one in found.items()
    }
    report = json.loads(REPORT.read_text(encoding="utf-8")) if REPORT.is_file() else {}
    report = {"command": "make bench-reward"} | report
    ours = report.setdefault(dtype, {"minutes": {}, "runs": {}})
    ours["hardware"], ours["minutes"][group] = hardware(), minutes
    ours["runs"] |= new
    ours["results"] = ratios(ours["runs"]) | {"max_score_diff": difference}
    scratch = REPORT.with_suffix(".tmp")
    scratch.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    scratch.replace(REPORT)
    return ours["results"]


def main(groups: list[str]) -> None:
    if unknown := set(groups) - set(GROUPS):
        raise SystemExit(f"{', '.join(unknown)}: no such group: choose from {', '.join(GROUPS)}.")
    difference, results = in_a_process(child_command("difference"))["max_score_diff"], {}
    print(f"{'':26} pairs/s  tokens/s  peak GB  rows", flush=True)
    for group in groups:
        start = time.perf_counter()
        found = measure(group)
        results = write_report(group, found, round((time.perf_counter() - start) / 60), difference)
    print(json.dumps(results))


if __name__ == "__main__":
    if "--child" in sys.argv:
        print(json.dumps(score_difference() if sys.argv[-1] == "difference" else child(sys.argv[-1])))
    else:
        main(sys.argv[1:] or GROUPS)
