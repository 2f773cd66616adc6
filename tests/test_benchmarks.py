"""The scripts in benchmarks/, which CI never runs: what they import is there, and so is the command that they name."""

import ast
import json
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))
OF_THIS_CHECKOUT = [path for path in SCRIPTS if not path.stem.startswith("golden")]
"""The golden run knows the names of earlier commits too."""


def test_there_are_scripts():
    assert {"bench_data", "label_noise", "ppo", "ppo_memory", "ppo_study", "reward_model", "reward_study"} <= {
        path.stem for path in SCRIPTS
    }


@pytest.mark.parametrize("path", OF_THIS_CHECKOUT, ids=lambda path: path.stem)
def test_what_it_imports_of_the_library_exists(path):
    """Imports inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_rlhf_ext":
            module = import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{path.name}:{node.lineno}: {node.module}.{alias.name}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_the_command_in_its_docstring_runs_it(path):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([a-z-]+)", ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), re.M):
        (recipe,) = re.findall(rf"^{target}: .*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
        assert f"benchmarks/{path.name}" in recipe


def test_pytest_collects_none_of_them_by_itself():
    assert not any(path.stem.startswith("test_") or path.stem.endswith("_test") for path in SCRIPTS)


# Seconds and peak GB that give round ratios; with K = 4 the bare passes take 9 of 10 s, 9 of 12 s and 8 of 8 s.
PPO_RUNS = {
    "trl": (60.0, 8.0, None),
    "trl grpo": (16.0, 4.0, None),
    "trl grpo, less head": (14.0, 4.0, None),
    "trl rloo": (12.0, 4.0, None),
    "ours, head": (30.0, 2.0, None),
    "ours, adapter": (40.0, 2.4, None),
    "ours, head, K = 4": (10.0, 2.0, 9.0),
    "ours, adapter, K = 4": (12.0, 2.2, 9.0),
    "ours, none, K = 4": (8.0, 1.8, 8.0),
}


def ppo_run(seconds: float, peak: float, bare: float | None) -> dict:
    """A measurement of `bench-ppo`: a quarter of the time samples, a quarter scores, and half of it trains."""

    def stages(whole: float) -> dict[str, float]:
        return {"generate": whole / 4, "score": whole / 4, "update": whole / 2}

    run = {"seconds": seconds, **stages(seconds), "peak_gb": peak}
    return run if bare is None else run | {"bare": stages(bare)}


def test_the_results_of_the_ppo_benchmark(script):
    ppo = script("ppo")
    assert list(PPO_RUNS) == list(ppo.RUNS)
    found = ppo.summary({name: ppo_run(*numbers) for name, numbers in PPO_RUNS.items()})
    stages = found.pop("stages")
    assert found == {
        "head_ratio": 2.0,
        "adapter_ratio": 1.5,
        "head_ratio_k4": 6.0,
        "adapter_ratio_k4": 5.0,
        "none_ratio_k4": 7.5,
        "grpo_ratio_k4": 2.0,
        "grpo_less_head_ratio_k4": 1.75,
        "rloo_ratio_k4": 1.5,
        "memory_ratio": 0.3,
        "bound_fraction": {"head": 0.9, "adapter": 0.75, "none": 1.0},
    }
    assert stages["adapter"]["update"] == {"ours": 6.0, "bare": 4.5, "ratio": 1.333} and len(stages["adapter"]) == 3


def test_results_of_a_part_of_the_ppo_benchmark(script):
    """A run that is missing leaves a gap, no wrong number."""
    found = script("ppo").summary({"ours, none, K = 4": ppo_run(8.0, 2.0, 6.0), "trl grpo": ppo_run(12.0, 4.0, None)})
    assert found["grpo_ratio_k4"] == 1.5 and found["bound_fraction"] == {"none": 0.75}
    assert all(found[name] is None for name in ("none_ratio_k4", "rloo_ratio_k4", "head_ratio", "memory_ratio"))


def test_the_tables_of_the_ppo_benchmark(script, monkeypatch):
    tables, runs = script("tables"), {name: ppo_run(*numbers) for name, numbers in PPO_RUNS.items()}
    measured = {"runs": runs, "results": script("ppo").summary(runs)}
    monkeypatch.setattr(tables, "study", lambda name: measured)
    shown = tables.ppo_benchmark(ROOT / "README.md").splitlines()
    assert len(shown) == 2 + len(PPO_RUNS) and "| TRL 1.16 GRPO | 16.0 | 4.0 | 4.0 | 8.0 | 3.75 | 4.00 |" in shown
    assert "| `adapter` | 1.33 | 1.33 | 1.33 | 1.33 |" in tables.ppo_benchmark_stages(ROOT / "README.md")
    (row,) = tables.ppo_with_shared_prompts(measured["results"], "link")
    assert row[1] == "6.0×, 5.0×, 7.5×; 2.0×, 1.8×"
    assert tables.ppo_with_shared_prompts({"head_ratio": 2.0}, "link") == []


def test_finished_runs_of_the_ppo_benchmark_are_kept(script, monkeypatch, tmp_path):
    ppo, runs = script("ppo"), script("ppo_runs")
    monkeypatch.setattr(ppo, "OUT", tmp_path / "ppo_benchmark.json")
    job = runs.Job("model", "float32", runs.Sizes(), [], [])
    names = ("trl grpo", "ours, none, K = 4")
    done = {name: ppo_run(*PPO_RUNS[name]) | {"of": ppo.measurement(ppo.RUNS[name], job)} for name in names}
    ppo.write(done, job)
    assert ppo.finished_runs(job) == done
    assert ppo.finished_runs(runs.Job("model", "bfloat16", runs.Sizes(), [], [])) == {}
    # TRL's runs do not depend on the sources of this library.
    written = json.loads(ppo.OUT.read_text())
    written["runs"]["ours, none, K = 4"]["of"] = "another tree"
    ppo.OUT.write_text(json.dumps(written))
    assert list(ppo.finished_runs(job)) == ["trl grpo"]


def test_the_bare_passes_of_the_ppo_benchmark_compute_the_states_of_separate_rows(script):
    bound = script("ppo_bound")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=64, num_attention_heads=4, num_key_value_heads=2, **sizes)
    model = LlamaForCausalLM(config).double()
    prompts = [torch.randint(64, (n,)).tolist() for n in (3, 7)]
    completions = [torch.randint(64, (5,)).tolist() for _ in range(6)]
    packed = bound.pack(prompts, completions)
    assert packed.ids.shape == (1, 3 + 7 + 6 * 4) and packed.targets.tolist() == sum(completions, [])
    expected = []
    for number, completion in enumerate(completions):
        prompt = prompts[number // 3]
        hidden = model.model(input_ids=torch.tensor([prompt + completion])).last_hidden_state[0]
        expected.append(hidden[len(prompt) - 1 : -1])
    torch.testing.assert_close(bound.packed_states(model.model, packed), torch.cat(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", ["generate_plainly", "generate_from_shared_prompts"])
def test_the_bare_passes_generate_as_many_tokens(script, way):
    """The same number of tokens goes through the model, but for the copies of the prompt."""
    bound, seen = script("ppo_bound"), []
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=16, num_hidden_layers=1))
    model.lm_head.weight.data[bound.STOP_TOKEN] = 0.0
    model.model.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    with torch.no_grad():
        getattr(bound, way)(model, [[5, 6, 7], [8]], 3, 4)
    copies = 1 if way == "generate_from_shared_prompts" else 3
    assert seen == [2 * 3 * copies, 6, 6, 6]
