"""The options that quantize the base: what is loaded is what they say, in the run, in its records and in the card."""

import json
from importlib import import_module

import pytest
import trl

from hf_rlhf_ext.cli.options import ModelArguments
from hf_rlhf_ext.cli.parsing import parse_recipe
from hf_rlhf_ext.cli.precision import quantization_config
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.loading import four_bit_config
from hf_rlhf_ext.modeling.quantization import as_record

pytest.importorskip("bitsandbytes")

SHORT = {"max_steps": 1, "eval_rows": 2, "num_train_epochs": 1, "overwrite": "true", "save_strategy": "no"}
FP4 = {"load_in_4bit": "true", "bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": "false"}


@pytest.fixture
def run(call, workspace):
    """Runs a recipe; returns what it printed, the quantization in its report, and its card."""

    def train(recipe, **options):
        folder = workspace / "quantized" / recipe
        done = call(recipe, **(SHORT | {"output_dir": folder} | options))
        assert done.code == 0, done.err
        report = json.loads((folder / "report.json").read_text())
        return done.out, report, (folder / "README.md").read_text(encoding="utf-8")

    return train


@pytest.mark.slow
def test_8_bits_in_every_stage_and_one_base_for_policy_and_reward(run, workspace):
    eight = {"load_in_8bit": "true"}
    for recipe, changes in (
        ("sft", {}),
        ("reward", {}),
        (
            "ppo",
            {
                "model_name_or_path": workspace / "quantized" / "sft",
                "reward_model": workspace / "quantized" / "reward",
                "kl_coef": 0.1,
            },
        ),
    ):
        out, report, card = run(recipe, **eight, **changes)
        assert "The base is in 8-bit" in out
        assert "in 8 bits (LLM.int8)" in card and "QLoRA" not in card
        recorded = report["card"].get("quantization")
        if recipe == "reward":
            folder = workspace / "quantized" / recipe
            recorded = json.loads((folder / "reward_normalization.json").read_text())["quantization"]
        assert recorded["load_in_8bit"] is True and recorded["load_in_4bit"] is False


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sft", "reward", "ppo"])
def test_fp4_without_double_quantization(run, recipe):
    rewards = {"reward_funcs": "my_rewards.length"} if recipe == "ppo" else {}
    out, report, card = run(recipe, **FP4, **rewards)
    assert "4-bit FP4 (computed in" in out
    assert 'bnb_4bit_quant_type="fp4"' in card and "bnb_4bit_use_double_quant=True" not in card


def test_4_bits_are_nf4_with_double_quantization_unless_asked_otherwise():
    record = as_record(quantization_config(ModelArguments(load_in_4bit=True)))
    assert record == as_record(four_bit_config())
    assert (record["bnb_4bit_quant_type"], record["bnb_4bit_use_double_quant"]) == ("nf4", True)
    asked = ModelArguments(
        load_in_4bit=True,
        bnb_4bit_quant_type="fp4",
        use_bnb_nested_quant=False,
        bnb_4bit_quant_storage="bfloat16",
    )
    record = as_record(quantization_config(asked))
    assert (record["bnb_4bit_quant_type"], record["bnb_4bit_use_double_quant"]) == ("fp4", False)
    assert record["bnb_4bit_quant_storage"] == "bfloat16"
    assert quantization_config(ModelArguments()) is None


def test_help_states_our_default_where_that_of_trl_is_another(capsys):
    assert trl.ModelConfig().use_bnb_nested_quant is False
    with pytest.raises(SystemExit):
        parse_recipe(import_module("recipes.sft").ARGUMENTS, ["--help-all"])
    text = " ".join(capsys.readouterr().out.split())
    assert "NF4 with double quantization" in text and "the scales are quantized too. If `None`, true" in text


@pytest.mark.parametrize(
    "options, words",
    [
        ({"load_in_8bit": True, "load_in_4bit": True}, ["load_in_8bit and load_in_4bit", "leave one"]),
        ({"bnb_4bit_quant_type": "fp4"}, ["bnb_4bit_quant_type", "--load_in_4bit true"]),
        ({"use_bnb_nested_quant": True, "load_in_8bit": True}, ["use_bnb_nested_quant", "--load_in_4bit true"]),
        ({"bnb_4bit_quant_storage": "bfloat16"}, ["bnb_4bit_quant_storage", "--load_in_4bit true"]),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}, ["bnb_4bit_quant_type", "nf4, fp4"]),
        ({"load_in_8bit": True, "use_peft": False}, ["load_in_8bit", "--use_peft false"]),
    ],
)
def test_what_contradicts_itself_is_one_line(options, words):
    with pytest.raises(UserError) as error:
        ModelArguments(**options)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words)
