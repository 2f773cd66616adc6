"""How long a training takes to its first step when all that counts is its data: 200,000 short rows, once and again.

    make bench-startup                  # this tree; ARGS="--rows 20000" is shorter, ARGS="reward --ranks 1" a part
    make bench-startup BASE=commit      # and, beside it, the tree of that commit, run by run in turns

A model of a few thousand weights is trained for one step by the reward trainer (comparisons with `load_comparisons`)
and by PPO (prompts with `load_prompts`), from a JSON Lines file, in one process and in two. The second start finds what
the first one has left in the cache of `datasets`. Figures: seconds from the first row read to the end of the first
step, how many of them are CPU seconds of all processes, peak memory of the largest process, and how much of it came
after the imports. The machine should be idle. The last line is JSON.
"""

import argparse
import json
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KINDS = ("reward", "ppo")
STARTS = ("first", "again")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# ---- The parent: data, starts, table ----


def write_data(folder: Path, rows: int) -> None:
    """Writes the rows, a tiny model and its tokenizer."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(4000)]

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    with (folder / "rows.jsonl").open("w") as file:
        for number in range(rows):
            row = {"prompt": [{"role": "user", "content": f"{number} {text(6, 16)}?"}]}
            for side in ("chosen", "rejected"):
                row[side] = [{"role": "assistant", "content": text(8, 24)}]
            file.write(json.dumps(row) + "\n")
    with (folder / "prompts.jsonl").open("w") as file:
        for number in range(rows):
            prompt = [{"role": "user", "content": f"{number} {text(6, 16)}?"}]
            file.write(json.dumps({"prompt": prompt}) + "\n")
    _write_model(folder / "model", [text(50, 60) for _ in range(200)])


def _write_model(folder: Path, texts: list[str]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=4000, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def start(tree: Path, kind: str, ranks: int, data: Path, cache: Path) -> dict[str, float]:
    """Starts one training in a process group of its own, and returns its figures."""
    out = Path(tempfile.mkdtemp(dir=data))
    command = [sys.executable]
    if ranks > 1:  # --multi_gpu is accelerate's way to start several processes, on CPUs too
        command += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(ranks)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--main_process_port", str(_free_port())]
    command += [str(Path(__file__).resolve()), "--child", kind, str(data), str(out)]
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "HF_DATASETS_CACHE": str(cache),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("TOKENIZERS_PARALLELISM", None)  # as a user has it
    done = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{kind}, {ranks} ranks in {tree}:\n{done.stderr[-4000:]}")
    of_ranks = [json.loads(file.read_text()) for file in sorted(out.glob("rank-*.json"))]
    shutil.rmtree(out)
    return {
        "seconds": max(figures["seconds"] for figures in of_ranks),
        "reading": max(figures["reading"] for figures in of_ranks),
        "cpu_seconds": sum(figures["cpu_seconds"] for figures in of_ranks),
        "peak_mb": max(figures["peak_mb"] for figures in of_ranks),
        "grown_mb": max(figures["grown_mb"] for figures in of_ranks),
    }


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def tree_of(commit: str, folder: Path) -> Path:
    """The files of a commit."""
    archive = folder / "tree.tar"
    subprocess.run(["git", "archive", "-o", str(archive), commit], cwd=ROOT, check=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "tree", filter="data")
    return folder / "tree"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(KINDS)}; all of them if left out")
    parser.add_argument("--base", help="commit whose tree is measured beside this one")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, args.rows)
        trees = {"now": ROOT}
        if args.base:
            trees = {"before": tree_of(args.base, folder)} | trees
        print(f"{args.rows} rows")
        print(f"{'':24}{'start':>7}{'seconds':>9}{'reading':>9}{'CPU s':>8}{'peak MB':>9}{'grown MB':>10}")
        for kind in args.kinds or KINDS:
            for ranks in args.ranks:
                caches = {tree: Path(tempfile.mkdtemp(dir=folder)) for tree in trees}
                for which in STARTS:
                    for tree, path in trees.items():
                        figures = start(path, kind, ranks, folder, caches[tree])
                        results.append({"tree": tree, "kind": kind, "ranks": ranks, "start": which, **figures})
                        _print(results[-1])
                for cache in caches.values():
                    shutil.rmtree(cache)
    print(json.dumps({"rows": args.rows, "starts": results}))


def _print(result: dict[str, Any]) -> None:
    name = f"{result['tree']} {result['kind']}, {result['ranks']} rank{'s' if result['ranks'] > 1 else ''}"
    numbers = f"{result['seconds']:9.1f}{result['reading']:9.1f}{result['cpu_seconds']:8.1f}"
    print(f"{name:24}{result['start']:>7}{numbers}{result['peak_mb']:9.0f}{result['grown_mb']:10.0f}", flush=True)


# ---- The child: one training with one step ----


def train(kind: str, data: Path, out: Path) -> None:
    """Trains one step and writes `rank-N.json` into `out`."""
    import bitsandbytes  # noqa: F401 - as peft and trl below, imported here so that it is not measured
    import peft
    import torch
    import trl.trainer.reward_trainer  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from hf_rlhf_ext import BradleyTerryConfig, BradleyTerryTrainer, PPOConfig, PPOTrainer, load_base_model
    from hf_rlhf_ext.readers.formats import load_comparisons
    from hf_rlhf_ext.readers.prompts import load_prompts

    torch.set_num_threads(1)
    model_folder = str(data / "model")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    options = {"use_cpu": True, "bf16": False, "max_steps": 1, "save_strategy": "no", "report_to": "none"}
    options |= {"per_device_train_batch_size": 2, "disable_tqdm": True, "activation_checkpointing": False}
    imported_mb, imported_cpu = _rss_mb(), _cpu_seconds()
    peak = PeakMemory()
    began = time.monotonic()
    figures: dict[str, float] = {}

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            figures["seconds"] = time.monotonic() - began
            figures["cpu_seconds"] = _cpu_seconds() - imported_cpu
            figures["peak_mb"] = peak.mb()
            figures["grown_mb"] = peak.mb() - imported_mb

    common = {"processing_class": tokenizer, "callbacks": [Stop()]}
    if kind == "reward":
        rows, _ = load_comparisons(str(data / "rows.jsonl"))
        figures["reading"] = time.monotonic() - began
        model = load_base_model(model_folder, task="reward", dtype="float32")
        config = BradleyTerryConfig(str(out / "run"), normalize_rewards=False, max_length=256, **options)
        trainer = BradleyTerryTrainer(model, config, rows, **common)
    else:
        rows, _ = load_prompts(str(data / "prompts.jsonl"))
        figures["reading"] = time.monotonic() - began
        config = PPOConfig(str(out / "run"), max_completion_length=4, num_mini_batches=1, num_ppo_epochs=1, **options)
        policy = AutoModelForCausalLM.from_pretrained(model_folder)
        lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = PPOTrainer(policy, _reward, args=config, train_dataset=rows, peft_config=lora, **common)
    trainer.train()
    (out / f"rank-{trainer.args.process_index}.json").write_text(json.dumps(figures))


def _reward(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(len(str(completion))) for completion in completions]


class PeakMemory:
    """Peak of the memory of this process that no file backs, in MB, looked at ten times a second.

    Pages of memory-mapped Arrow files are not counted: the kernel drops them when memory gets short.
    """

    def __init__(self):
        self._most = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self._most = max(self._most, _rss_mb())
            time.sleep(0.1)

    def mb(self) -> float:
        return max(self._most, _rss_mb())


def _rss_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # not Linux's /proc


def _cpu_seconds() -> float:
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    return total


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        train(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
