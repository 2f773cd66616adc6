"""PPO compared with TRL's PPO, GRPO and RLOO, and with bare passes over the same tokens: seconds and peak memory.

make bench-ppo          # 25 to 35 minutes on two idle cores; RLHF_SHARED is the folder with the shared data

Each run has its own process and is written to docs/study/ppo_benchmark.json when it is finished. Started again, it
keeps finished runs of the same sources, dtype, machine and versions, unless ARGS=--again is given. ARGS='--only "trl
grpo"' does one run, and ARGS=--tiny shows within minutes, with a model of two layers, whether all of them work; it
writes no file.

All train SmolLM2-135M in the dtype in which the machine is fastest, with LoRA r 16 on all linear layers, learning rate
1e-5, and two passes of one optimizer step over a rollout. A rollout is 8 prompts of HH-RLHF (125 to 185 tokens) with 4
completions each of 48 new tokens, the same prompts in every update; there is no stop token, so that all do the same
work. Trainers that know no completions of one prompt (TRL 1.12's PPO, and this library with `num_generations=1`) get
each prompt four times. The reward is the fraction of common tokens in the last 16, as a function; for TRL's PPO, which
accepts only models, it is a module without weights. TRL's PPO trains a full value model; GRPO and RLOO have none, and
this library has a head on the policy, an adapter, or none. GRPO and RLOO compute the reference too (beta 0.05). TRL
runs without gradient checkpointing, which is on by default and slower, in micro-batches of 8 completions: others are
not faster. Without Triton, that is on a CPU, TRL 1.16 computes the output head for the tokens of prompts too; "trl
grpo, less head" leaves them out, as on a GPU. The wheel of TRL 1.12.0 is downloaded with pip into a separate folder;
all other packages are the same. A warm-up comes before the update that counts: an update of two prompts by a trainer of
the same kind, or for this library with four completions per prompt, whose updates are short, one of the same size.

The bound: after each update with four completions per prompt, the same process runs bare passes of the same model over
the same tokens (`ppo_bound.py`). `bound_fraction` is their time, divided by the time of the update.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ppo_runs import RUNS, TINY, TRL_PPO, Job, Run, Sizes

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("RLHF_SHARED", "../shared"))
OUT = ROOT / "docs" / "study" / "ppo_benchmark.json"
STAGES = ("generate", "score", "update")
# name in the results -> (run that is compared with, ours)
RATIOS = {
    "head_ratio": ("trl", "ours, head"),
    "adapter_ratio": ("trl", "ours, adapter"),
    "head_ratio_k4": ("trl", "ours, head, K = 4"),
    "adapter_ratio_k4": ("trl", "ours, adapter, K = 4"),
    "none_ratio_k4": ("trl", "ours, none, K = 4"),
    "grpo_ratio_k4": ("trl grpo", "ours, none, K = 4"),
    "grpo_less_head_ratio_k4": ("trl grpo, less head", "ours, none, K = 4"),
    "rloo_ratio_k4": ("trl rloo", "ours, none, K = 4"),
}

Runs = dict[str, dict[str, Any]]


# ---- What is measured ----


def trl_folder() -> Path:
    """A folder with the wheel of TRL only, downloaded once into the Hugging Face cache."""
    from huggingface_hub.constants import HF_HOME

    folder = Path(HF_HOME) / "hf_rlhf_ext" / f"trl-{TRL_PPO}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:  # renamed when complete
        command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--target", f"{scratch}/trl", f"trl=={TRL_PPO}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise SystemExit(
                f"error: pip could not download the wheel of trl {TRL_PPO}, which the comparison needs: {reason}"
            )
        (Path(scratch) / "trl").rename(folder)
    return folder


def small_model(folder: Path) -> Path:
    """Writes a model of two layers with random weights, and SmolLM2's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_rlhf_ext import load_tokenizer

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tokenizer = load_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=1024, **sizes, **heads)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_job(sizes: Sizes, model: Path | None = None) -> Job:
    """The prompts, whose lengths spread evenly over 125 to 185 tokens, and the model, by default SmolLM2-135M."""
    from hf_rlhf_ext import load_comparisons, load_tokenizer
    from hf_rlhf_ext.data.text import encode_prompt
    from hf_rlhf_ext.modeling.loading import preferred_dtype
    from hf_rlhf_ext.modeling.locations import EMBEDDED_MODEL, resolve_location

    tokenizer = load_tokenizer()
    rows = load_comparisons(str(SHARED / "data" / "hh_harmless_test.jsonl.gz"), split="train[:500]", group=False)[0]
    prompts = [row["prompt"] for row in rows.to_list()]
    fitting = [(ids, prompt) for prompt in prompts if 125 <= len(ids := encode_prompt(tokenizer, prompt)) <= 185]
    candidates = sorted(fitting[: 4 * sizes.prompts], key=lambda one: len(one[0]))
    ids, messages = zip(*candidates[1::4], strict=True)
    return Job(
        model=str(model or resolve_location(EMBEDDED_MODEL, None)[0]),
        dtype=str(preferred_dtype()).removeprefix("torch."),
        sizes=sizes,
        prompts=list(messages),
        prompt_ids=list(ids),
    )


def measurement(run: Run, job: Job) -> str:
    """A digest of everything that a run depends on: sources, versions, machine, dtype and sizes."""
    here = Path(__file__).parent
    sources = [here / "ppo_runs.py"]
    packages = ["torch", "transformers", "peft", "accelerate"]
    if run.kind == "ours":
        sources += [here / "ppo_bound.py", *sorted((ROOT / "hf_rlhf_ext").rglob("*.py"))]
    else:
        packages.append("trl")
    digest = hashlib.sha256(repr((job.dtype, job.sizes, machine(), [*map(version, packages)])).encode())
    for path in sources:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def machine() -> str:
    return f"{len(os.sched_getaffinity(0))} CPU cores, no GPU"


def commit() -> str:
    """The commit of the sources, and whether they differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=ROOT).stdout.strip()

    changed = git("status", "--porcelain", "hf_rlhf_ext", "benchmarks")
    return git("rev-parse", "--short=12", "HEAD") + (", changed" if changed else "")


# ---- Running ----


def in_a_process(name: str, job: Path, folder_of_trl: Path) -> dict[str, Any]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    if RUNS[name].kind == "trl ppo":
        environment["PYTHONPATH"] = str(folder_of_trl)
    command = [sys.executable, str(Path(__file__).with_name("ppo_runs.py")), name, str(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        killed = ", killed: out of memory?" if done.returncode == -9 else ""
        raise SystemExit(f"error: {name} ended with status {done.returncode}{killed}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def finished_runs(job: Job) -> Runs:
    """Runs of the file that would be measured in the same way now."""
    written = json.loads(OUT.read_text(encoding="utf-8"))["runs"] if OUT.is_file() else {}
    return {
        name: written[name]
        for name, run in RUNS.items()
        if name in written and written[name].get("of") == measurement(run, job)
    }


def write(runs: Runs, job: Job) -> None:
    """Writes the results so far, so that they are kept if the benchmark is stopped."""
    OUT.parent.mkdir(parents=True, exist_ok=True)
    written = {"command": "make bench-ppo", "commit": commit(), "hardware": machine(), "dtype": job.dtype}
    written |= {"prompt_tokens": [len(ids) for ids in job.prompt_ids], "runs": runs, "results": summary(runs)}
    scratch = OUT.with_suffix(".tmp")
    scratch.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    scratch.replace(OUT)


def rounded(found: dict[str, Any]) -> dict[str, Any]:
    """Two digits, also inside."""
    digits: dict[str, Any] = {}
    for key, value in found.items():
        if isinstance(value, dict):
            digits[key] = rounded(value)
        else:
            digits[key] = round(value, 2) if isinstance(value, float) else value
    return digits


# ---- Results ----


def summary(runs: Runs) -> dict[str, Any]:
    """Ratios of speed (seconds of TRL over ours) and memory (ours over TRL); `None` where a run is missing."""
    results: dict[str, Any] = {}
    for name, (theirs, ours) in RATIOS.items():
        both = theirs in runs and ours in runs
        results[name] = round(runs[theirs]["seconds"] / runs[ours]["seconds"], 3) if both else None
    peaks = [run["peak_gb"] for name, run in runs.items() if name.startswith("ours")]
    results["memory_ratio"] = round(max(peaks) / runs["trl"]["peak_gb"], 3) if peaks and "trl" in runs else None
    results["bound_fraction"], results["stages"] = {}, {}
    for name, run in runs.items():
        if "bare" not in run:
            continue
        critic, bare = RUNS[name].critic, run["bare"]
        results["bound_fraction"][critic] = round(sum(bare.values()) / run["seconds"], 3)
        results["stages"][critic] = {
            stage: {"ours": run[stage], "bare": bare[stage], "ratio": round(run[stage] / bare[stage], 3)}
            for stage in STAGES
        }
    return results


def row_of(name: str, run: dict[str, Any]) -> str:
    """A row of the table: the seconds of an update and of its stages, peak memory, and the bare passes."""
    cells = [f"{name:22}", f"{run['seconds']:8.1f}", *(f"{run[stage]:9.1f}" for stage in STAGES)]
    cells.append(f"{run['peak_gb']:8.2f}")
    if "bare" in run:
        cells += [f"{run['bare'][stage]:9.1f}" for stage in STAGES]
        cells.append(f"{sum(run['bare'].values()) / run['seconds']:9.1%}")
    return "".join(cells)


HEADER = "".join(
    [f"{'seconds per update':22}", f"{'all':>8}", *(f"{stage:>9}" for stage in STAGES), f"{'peak GB':>8}"]
    + [f"{'bare ' + stage[:4]:>9}" for stage in STAGES]
    + [f"{'of bound':>9}"]
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="measure finished runs again")
    parser.add_argument("--only", action="append", choices=list(RUNS), metavar="RUN", help=f"one of: {'; '.join(RUNS)}")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and two prompts; writes no file")
    return parser.parse_args()


def main() -> None:
    asked = parse()
    chosen = asked.only or list(RUNS)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        job = make_job(TINY, small_model(folder / "model")) if asked.tiny else make_job(Sizes())
        path = folder / "job.json"
        job.write(path)
        runs = {} if asked.tiny else finished_runs(job)
        print(HEADER, flush=True)
        for name, run in RUNS.items():
            if name in chosen and (asked.again or name not in runs):
                found = in_a_process(name, path, trl_folder())
                runs[name] = rounded(found) | {"of": measurement(run, job)}
                if not asked.tiny:
                    write(runs, job)
            if name in runs:
                print(row_of(name, runs[name]), flush=True)
    print(json.dumps(summary(runs)))


if __name__ == "__main__":
    main()
