"""PPO on a CUDA card with random models of true shapes: the peak of its memory beside the plan of `hf-rlhf plan`.

make bench-memory-card                      # all cases, at most 8 minutes; needs a CUDA card
make bench-memory-card ARGS="--only 12gb"   # cases whose names contain this
python benchmarks/memory_on_card.py --tiny  # the same code with tiny models, on a CPU, where it counts tensors

Each case is a configuration of recipes/configs/card-*: its model, its options, and a reward model of the same size,
which shares the base as it does there. It makes two PPO updates with a rollout each in a fresh process whose memory is
limited to that of the card. Weights are random, made on the device: nothing is downloaded. The last line is JSON.
Errors are relative to what was measured: positive where the plan says more.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for `benchmarks.card_plans`

CASES = ("card-8gb", "card-12gb", "card-24gb", "card-16gb", "card-6gb")
"""Folders of recipes/configs, in the order in which they run: 1B, 3B, 8B, 7B and 0.5B."""
BUDGET_S = 470
"""Seconds for all cases. Those that would start later are reported as not run."""
CASE_S = 180
"""Seconds after which a case is stopped."""
UPDATES = 2
GB = 10**9

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
"""Sizes of the models of `--tiny`; the vocabulary is that of the tokenizer."""


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        name: folder in recipes/configs.
        tiny: whether the model is tiny, and the run is on a CPU.
    """

    name: str
    tiny: bool = False

    @property
    def card(self) -> int:
        """Memory of the card in bytes."""
        return int(self.name.removeprefix("card-").removesuffix("gb")) * GB

    @property
    def device(self) -> str:
        return "cpu" if self.tiny else "cuda"

    @property
    def prompt_tokens(self) -> int:
        """Tokens of every prompt."""
        from benchmarks.card_plans import PROMPT_TOKENS

        return 16 if self.tiny else PROMPT_TOKENS

    def config(self, stage: str) -> Path:
        """The file with the options of a stage."""
        return ROOT / "recipes" / "configs" / self.name / f"{stage}.yaml"


# ---- One case, in its own process ----


def run_case(case: Case, folder: Path) -> dict[str, Any]:
    """Runs a case, and plans it.

    Args:
        case: the case.
        folder: a temporary folder for the tokenizer, the reward adapter and the run.
    """
    import torch

    torch.manual_seed(0)
    start = time.monotonic()
    config, tokenizer = model_config_of(case)
    base_folder = folder / "base"
    config.save_pretrained(base_folder)
    tokenizer.save_pretrained(base_folder)
    plan, planned = plan_of_case(case, config, folder)
    meter = TensorMeter() if case.tiny else CardMeter(case.card)
    base = random_base(config, planned.model_args.base_options(planned.args), case.device)
    base.name_or_path = base.config.name_or_path = str(base_folder)
    write_reward_adapter(case, base, folder / "reward")
    measured = measure(meter, case, base, tokenizer, planned, folder / "reward")
    return {
        "case": case.name,
        "model": model_name(case),
        "weights": n_weights(config),
        **measured,
        "planned_allocated": plan.peak.n_bytes,
        "planned_reserved": plan.n_bytes,
        "error_allocated": plan.peak.n_bytes / measured["allocated"] - 1,
        "error_reserved": plan.n_bytes / measured["reserved"] - 1,
        "peak_phase": plan.peak.name,
        "seconds": time.monotonic() - start,
    }


def model_name(case: Case) -> str:
    """Public name of the model that the case trains, whose config is in benchmarks/model_configs."""
    import yaml

    return yaml.safe_load(case.config("sft").read_text(encoding="utf-8"))["model_name_or_path"]


def model_config_of(case: Case) -> tuple[Any, Any]:
    """The config of the model that the case trains, and a tokenizer whose ids the model knows."""
    from benchmarks.card_plans import model_config
    from hf_rlhf_ext import load_tokenizer
    from hf_rlhf_ext.modeling.locations import EMBEDDED_MODEL

    tokenizer = load_tokenizer(EMBEDDED_MODEL)  # it needs no download
    config = model_config(model_name(case))
    if case.tiny:
        config.update(TINY | {"vocab_size": len(tokenizer)})
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    return config, tokenizer


def plan_of_case(case: Case, config: Any, folder: Path) -> tuple[Any, Any]:
    """The plan of the case, and its options."""
    from hf_rlhf_ext.recipes.plan_parts.options import parse
    from hf_rlhf_ext.recipes.plan_parts.planning import Plans

    _, planned = parse(["--config", str(case.config("ppo")), *options_of(case, folder)])
    planned.args.generation_kwargs = {"min_new_tokens": planned.args.max_completion_length}
    plans = Plans(planned, case.device, prompt_tokens=case.prompt_tokens, base_config=config)
    return plans.plan(), planned


def options_of(case: Case, folder: Path) -> list[str]:
    """Changes to the options of the config on which the peak does not depend: as few completions as it samples at once.

    Two updates need two rollouts, so that the second one is made while the optimizer has its state.
    """
    import yaml

    given = yaml.safe_load(case.config("ppo").read_text(encoding="utf-8"))
    batch, sampled = given["per_device_train_batch_size"], given["generation_batch_size"]
    options: dict[str, Any] = {
        "output_dir": folder / "run",
        "max_steps": UPDATES,
        "num_ppo_epochs": 1,
        "num_mini_batches": 1,
        "eval_strategy": "no",
        "eval_rows": 0,
        "save_strategy": "no",
        "warmup_steps": 0,
    }
    if case.tiny:
        batch, sampled = 2, 4
        options |= {
            "per_device_train_batch_size": batch,
            "generation_batch_size": sampled,
            "max_completion_length": 8,
            "use_cpu": "true",
            "bf16": "false",
        }
    options["gradient_accumulation_steps"] = sampled // batch
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


# ---- Random models ----


def n_weights(config: Any) -> int:
    """Number of weights of the model of a config."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def random_base(config: Any, options: dict[str, Any], device: str) -> Any:
    """A causal language model with random weights, made on the device layer by layer.

    A base in 4 bits is quantized by bitsandbytes, one layer after the other, so that the whole model is never there in
    16 bits.

    Args:
        config: its config.
        options: options of `load_base_model`, of which `dtype` and `quantization_config` are used.
        device: `cuda` or `cpu`.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.quantizers import AutoHfQuantizer

    from hf_rlhf_ext.modeling.loading import resolve_dtype
    from hf_rlhf_ext.modeling.quantization import keep_nf4_gradients_right

    dtype = resolve_dtype(options["dtype"])
    with init_empty_weights(include_buffers=False):  # buffers, such as rotary frequencies, have their real values
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    quantization = options.get("quantization_config")
    if quantization is not None:
        # As `from_pretrained`, with weights that are made here in place of those of a file.
        quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
        quantizer.preprocess_model(model, dtype=dtype, device_map=None)
        quantizer.postprocess_model(model)
        model.hf_quantizer = quantizer
    model.tie_weights()
    fill(model, dtype, device)
    keep_nf4_gradients_right(model)
    return model.eval()


def fill(model: Any, dtype: Any, device: str) -> None:
    """Gives all parameters random values on the device. Tied ones stay tied."""
    import torch
    from torch import nn

    made: dict[int, nn.Parameter] = {}
    kept = []  # so that no id is used twice
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                kept.append(parameter)
                made[id(parameter)] = random_values(module, name, parameter, dtype, device)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if isinstance(buffer, torch.Tensor):
                module._buffers[name] = buffer.to(device)


def random_values(module: Any, name: str, parameter: Any, dtype: Any, device: str) -> Any:
    """A parameter with values as after initialization; one of a layer in 4 bits is quantized."""
    import torch
    from torch import nn

    if hasattr(module, "compute_dtype") and name == "weight":  # a layer of bitsandbytes
        shape = (module.out_features, module.in_features)
        weight = 0.02 * torch.randn(shape, dtype=torch.bfloat16, device=device)
        empty = module.weight
        return type(empty)(
            weight,
            requires_grad=False,
            compress_statistics=empty.compress_statistics,
            quant_type=empty.quant_type,
            quant_storage=empty.quant_storage,
            blocksize=empty.blocksize,
            module=module,
        ).to(device)
    if parameter.dim() > 1:
        return nn.Parameter(0.02 * torch.randn(parameter.shape, dtype=dtype, device=device))
    make = torch.ones if name == "weight" else torch.zeros  # norms and biases
    return nn.Parameter(make(parameter.shape, dtype=dtype, device=device))


def write_reward_adapter(case: Case, base: Any, folder: Path) -> None:
    """Writes a reward adapter with random weights, as `hf-rlhf reward` with the config of the case would save it.

    Args:
        case: the case.
        base: the base that the adapter names, in its precision.
        folder: folder to write.
    """
    import torch
    from peft import get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers import AutoModelForSequenceClassification

    from hf_rlhf_ext.modeling.heads import install_fp32_score
    from hf_rlhf_ext.modeling.quantization import quantization_record
    from hf_rlhf_ext.recipes.plan_parts.options import parse
    from hf_rlhf_ext.reward.normalization import RewardNormalization, dtype_name

    _, planned = parse(["--config", str(case.config("reward"))])
    config = copy.deepcopy(base.config)
    config.num_labels = 1
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config)
    model = get_peft_model(
        install_fp32_score(classifier), planned.model_args.peft_config("SEQ_CLS"), low_cpu_mem_usage=True
    )
    shapes = get_peft_model_state_dict(model)
    values = {name: 0.01 * torch.randn(shape.shape, dtype=shape.dtype) for name, shape in shapes.items()}
    adapter_config = model.peft_config["default"]
    adapter_config.base_model_name_or_path = base.name_or_path
    adapter_config.inference_mode = True
    adapter_config.save_pretrained(folder)
    save_file(values, folder / "adapter_model.safetensors")
    # Without a record of this precision, PPO would load the adapter on a base of its own.
    RewardNormalization(base_dtype=dtype_name(base), quantization=quantization_record(base)).save(folder)


# ---- The measurement ----


class CardMeter:
    """Measures the memory of this process on the CUDA card, and limits it.

    Args:
        card: Memory of the card that is stood for, in bytes: what CUDA itself takes of it is not left to tensors.
    """

    def __init__(self, card: int):
        import torch

        torch.zeros(1, device="cuda")  # from now on, CUDA has its own memory
        free, total = torch.cuda.mem_get_info()
        self.context = total - free - torch.cuda.memory_reserved()
        torch.cuda.set_per_process_memory_fraction(min(1.0, (card - self.context) / total))

    def __enter__(self):
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *error):
        return None

    def know(self, model: Any) -> None:
        """Nothing to do: the allocator knows the weights of the model."""

    def peaks(self) -> dict[str, int]:
        """Bytes of tensors and of the allocator's blocks with CUDA's own at the peak, and CUDA's own."""
        import torch

        return {
            "allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved() + self.context,
            "context": self.context,
        }


class TensorMeter:
    """Counts tensors on a CPU, in place of the card."""

    def __init__(self):
        from hf_rlhf_ext.modeling.memory.live_bytes import LiveBytes

        self.live = LiveBytes()

    def __enter__(self):
        self.live.__enter__()
        return self

    def __exit__(self, *error):
        return self.live.__exit__(*error)

    def know(self, model: Any) -> None:
        """Counts the weights of a model that exists already."""
        from hf_rlhf_ext.modeling.memory.live_bytes import state_tensors

        self.live.track((tensor for _, tensor in state_tensors(model)), "base weights")

    def peaks(self) -> dict[str, int]:
        """Bytes of tensors at the peak. There is no allocator to ask on a CPU, and no CUDA."""
        return {"allocated": self.live.peak, "reserved": self.live.peak, "context": 0}


def measure(meter: Any, case: Case, base: Any, tokenizer: Any, planned: Any, reward: Path) -> dict[str, Any]:
    """Trains PPO from an adapter on the base, as the config of the case does, and returns the peaks."""
    from datasets import Dataset
    from peft import get_peft_model

    from hf_rlhf_ext import PPOTrainer

    args = planned.args
    n_prompts = UPDATES * args.per_device_train_batch_size * args.gradient_accumulation_steps
    prompt = "a" + " a" * (case.prompt_tokens - 1)  # one token a letter
    meter.know(base)
    with meter:
        policy = get_peft_model(base, planned.model_args.peft_config("CAUSAL_LM"))
        trainer = PPOTrainer(
            policy,
            str(reward),
            args=args,
            train_dataset=Dataset.from_list([{"prompt": prompt}] * n_prompts),
            processing_class=tokenizer,
        )
        trainer.train()
        peaks = meter.peaks()
    shares = [scorer.model is trainer.model for scorer in trainer.rewards.scorers()]
    if shares != [True]:
        raise RuntimeError("the reward adapter was loaded on a base of its own, which is not what was planned")
    return {**peaks, "updates": trainer.state.global_step}


# ---- All cases ----


def run_in_process(case: Case, timeout: float) -> dict[str, Any]:
    """Runs a case in a fresh process. One that fails has `failed`: the last line of its messages."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--case", case.name, "--result", str(result)]
        devices = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # on several, Trainer would copy the model
        if case.tiny:
            command.append("--tiny")
            devices = ""
        env = os.environ | {"CUDA_VISIBLE_DEVICES": devices}
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return {"case": case.name, "failed": f"stopped after {timeout:.0f} s"}
        if done.returncode == 0:
            return json.loads(result.read_text(encoding="utf-8"))
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return {"case": case.name, "failed": (lines or [f"exit status {done.returncode}"])[-1][:300]}


def run_all(cases: list[Case], *, card: int | None, budget: float = BUDGET_S) -> list[dict[str, Any]]:
    """Runs cases one after the other, and prints a line for each.

    Args:
        cases: the cases.
        card: memory of the card in bytes; `None` on a CPU.
        budget: seconds for all of them.
    """
    end = time.monotonic() + budget
    results = []
    for case in cases:
        left = end - time.monotonic()
        if card is not None and case.card > 1.1 * card:
            result = {"case": case.name, "failed": f"not run: this card has {card / GB:.1f} GB"}
        elif left < 30:
            result = {"case": case.name, "failed": f"not run: the {budget:.0f} s for all cases are over"}
        else:
            result = run_in_process(case, min(CASE_S, left))
        print(line_of(result), flush=True)
        results.append(result)
    return results


def line_of(result: dict[str, Any]) -> str:
    """One result in a line."""
    if "failed" in result:
        return f"{result['case']}: failed: {result['failed']}"
    return f"{result['case']}: {result['error_reserved']:+.1%}, {result['seconds']:.0f} s"


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown: bytes of tensors, and of all that the process took of the card."""
    lines = [
        "| card | model | tensors, GB | planned | error | of the card, GB | planned | error | planned peak |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for result in results:
        if "failed" in result:
            lines.append(f"| {result['case']} | {result['failed']} |" + " |" * 7)
            continue
        cells = [result["case"], f"{result['model']}, {result['weights'] / 1e9:.2f}B"]
        for kind in ("allocated", "reserved"):
            error = f"{result[f'error_{kind}']:+.1%}".replace("-", "−")
            cells += [f"{result[kind] / GB:.2f}", f"{result[f'planned_{kind}'] / GB:.2f}", error]
        lines.append(f"| {' | '.join([*cells, result['peak_phase']])} |")
    return "\n".join(lines) + "\n"


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Errors over all cases that ran, as fractions; `None` where none did."""
    ran = [result for result in results if "failed" not in result]
    found: dict[str, Any] = {
        "cases": [result["case"] for result in ran],
        "failed": {result["case"]: result["failed"] for result in results if "failed" in result},
        "seconds": round(sum(result["seconds"] for result in ran)),
    }
    for kind in ("allocated", "reserved"):
        errors = [result[f"error_{kind}"] for result in ran]
        found[f"worst_error_{kind}"] = round(max(map(abs, errors)), 4) if errors else None
        found[f"worst_underestimate_{kind}"] = round(max(0.0, -min(errors)), 4) if errors else None
    return found


def memory_of_the_card() -> int | None:
    """Bytes of the CUDA card; `None` without one."""
    import torch

    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None


def main() -> int:
    """Runs all cases, or one in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--tiny", action="store_true", help="tiny models on a CPU, counting tensors")
    parser.add_argument("--case", help="run this case in this process")
    parser.add_argument("--result", type=Path, help="file for the result of --case")
    options = parser.parse_args()
    if options.case:
        with tempfile.TemporaryDirectory() as folder:
            result = run_case(Case(options.case, options.tiny), Path(folder))
        options.result.write_text(json.dumps(result), encoding="utf-8")
        return 0
    card = None if options.tiny else memory_of_the_card()
    if card is None and not options.tiny:
        print("error: this machine has no CUDA card: run it on one, or try it with --tiny on the CPU", file=sys.stderr)
        return 1
    cases = [Case(name, options.tiny) for name in CASES if options.only in name]
    results = run_all(cases, card=card)
    print(table(results), end="")
    print(json.dumps(summary(results)))
    return 1 if not results or any("failed" in result for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
