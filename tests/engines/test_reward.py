"""Reward training on two processes, under each engine: equal to one process with twice the batch, also resumed."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForSequenceClassification

from tests.engines.launch import launch
from tests.engines.reward_run import run
from tests.reward.examples import comparisons

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.slow]

# 13 rows of 2 to 4 completions: the last of the four batches of an epoch has one row, and three that are repeated.
# A step of two batches has other numbers of micro-batches on each process.
ADAPTER = {
    "name": "adapter", "adapter": True,
    "options": {"max_tokens_per_batch": 60, "gradient_accumulation_steps": 2, "max_steps": 3, "save_strategy": "steps",
                "save_steps": 1},
}  # fmt: skip
RESUMED = ADAPTER | {"name": "resumed", "resume": "adapter/checkpoint-1"}
WHOLE = {"name": "whole", "adapter": False, "options": {"layout": "plain", "max_steps": 4, "learning_rate": 1e-3}}
EARLY = ADAPTER | {"name": "early", "evaluates_first": True}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, chat_tokenizer_factory):
    """A folder with a base model, 13 rows, and 7 rows for evaluation."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = chat_tokenizer_factory()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, num_labels=1,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    comparisons(13).save_to_disk(folder / "rows")
    comparisons(7, seed=1).save_to_disk(folder / "heldout")
    return folder


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    """One process with twice the batch, without a token budget."""
    folder = shutil.copytree(inputs, tmp_path_factory.mktemp("alone"), dirs_exist_ok=True)
    found = {}
    for case in (ADAPTER, WHOLE):
        options = case["options"] | {"per_device_train_batch_size": 4, "max_tokens_per_batch": None}
        found[case["name"]] = run(folder, case | {"options": options | {"save_strategy": "no"}})
    return SimpleNamespace(folder=folder, found=found)


@pytest.fixture(scope="module")
def run_cases(inputs, tmp_path_factory):
    def run_cases(engine, *cases):
        folder = shutil.copytree(inputs, tmp_path_factory.mktemp(engine), dirs_exist_ok=True)
        (folder / "cases.json").write_text(json.dumps(cases))
        done = launch(engine, "tests/engines/reward_run.py", folder, folder / "cases.json", timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        found = {}
        for case in cases:
            ranks = [json.loads((folder / f"{case['name']}-{rank}.json").read_text()) for rank in (0, 1)]
            found[case["name"]] = ranks[0]
            found[case["name"]]["passes_of_all"] = [rank.get("passes") for rank in ranks]
        return SimpleNamespace(folder=folder, found=found)

    return run_cases


@pytest.fixture(scope="module")
def ddp(run_cases):
    return run_cases("ddp", EARLY, WHOLE)


def weights(run, name):
    (path,) = (run.folder / f"{name}-saved").glob("*.safetensors")
    return load_file(path)


def assert_equal(run, name, expected, expected_name=None, tolerance=1e-6):
    """Weights, logged metrics, evaluation, predictions, normalization, and the scores of the saved model."""
    found, reference = run.found[name], expected.found[expected_name or name]
    assert "error" not in found, found["traceback"]
    ours, theirs = weights(run, name), weights(expected, expected_name or name)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=tolerance)
    for part in ("history", "evaluated", "predicted", "loaded", "normalization"):
        for key, value in _numbers(reference[part]).items():
            if "total_flos" not in key:  # counts padding
                assert math.isclose(_numbers(found[part])[key], value, abs_tol=10 * tolerance), (part, key)
    assert found["files"] == reference["files"]
    for predicted, loaded in zip(found["predicted"], found["loaded"], strict=True):
        assert predicted[: len(loaded)] == pytest.approx(loaded, abs=1e-6)


def _numbers(values, prefix=""):
    if isinstance(values, dict | list):
        items = values.items() if isinstance(values, dict) else enumerate(values)
        return {key: value for name, part in items for key, value in _numbers(part, f"{prefix}/{name}").items()}
    return {prefix: values} if isinstance(values, int | float) else {}


def assert_resumes_to_the_bit(run):
    assert "error" not in run.found["resumed"], run.found["resumed"]["traceback"]
    whole, resumed = weights(run, "adapter"), weights(run, "resumed")
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())
    assert run.found["resumed"]["predicted"] == run.found["adapter"]["predicted"]


def test_ddp_equals_one_process_also_after_an_evaluation(ddp, alone):
    assert ddp.found["early"]["passes_of_all"][0] != ddp.found["early"]["passes_of_all"][1]
    assert_equal(ddp, "early", alone, "adapter")
    assert_equal(ddp, "whole", alone)


def test_fsdp2_equals_ddp(run_cases, ddp, alone):
    fsdp2 = run_cases("fsdp2", ADAPTER, RESUMED, WHOLE, EARLY)
    first, second = fsdp2.found["adapter"]["passes_of_all"]
    assert first == second
    assert_equal(fsdp2, "adapter", alone)
    assert_equal(fsdp2, "adapter", ddp, "early")
    assert_equal(fsdp2, "whole", ddp)
    assert_resumes_to_the_bit(fsdp2)
    assert fsdp2.found["early"]["error"].startswith(
        "UserError: evaluate: fsdp2 prepares the model when training starts"
    )


def test_zero2_equals_one_process(run_cases, alone):
    zero2 = run_cases("zero2", ADAPTER, RESUMED)
    assert_equal(zero2, "adapter", alone)
    assert_resumes_to_the_bit(zero2)


def test_zero3_equals_one_process(run_cases, alone):
    zero3 = run_cases("zero3", ADAPTER, WHOLE)
    assert_equal(zero3, "adapter", alone)
    assert_equal(zero3, "whole", alone)
