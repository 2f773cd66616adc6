"""Built-in reward functions by name: in a YAML file, in the shell, in a pipeline, and in what is recorded."""

import json

import pytest
import yaml

from hf_rlhf_ext.cli.functions import reward_function
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.recipes.best_of_n_parts.options import ModelsArguments
from hf_rlhf_ext.recipes.pipeline_parts.options import split_names
from hf_rlhf_ext.recipes.pipeline_parts.rewards import sources_of
from hf_rlhf_ext.recipes.ppo import RewardArguments
from hf_rlhf_ext.study.judges import judge_from


@pytest.mark.slow
def test_ppo_with_functions_of_a_yaml_file(call, workspace, write_jsonl, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"{n} + 1?"}], "answer": n + 1} for n in range(12)]
    data = write_jsonl(tmp_path / "numbers.jsonl", rows)
    config = {
        "max_steps": 4,
        "num_ppo_epochs": 1,
        "logging_steps": 1,
        "reward_funcs": [
            {"regex": {"pattern": "[aeiou], ?", "ignore_case": True}},
            "number(column=answer, tolerance=2)",
        ],
        "eval_reward_funcs": ["exact_match"],
        "reward_weights": [1.0, 0.5],
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump(config, sort_keys=False))
    done = call("ppo", config=mine, dataset_name=data, output_dir=tmp_path / "out")
    assert done.code == 0, done.err
    assert "reward = 1 × regex + 0.5 × number" in done.out
    measured = json.loads((tmp_path / "out" / "report.json").read_text())["ppo"]
    assert measured["rewards"] == ["regex", "number"] and measured["eval_rewards"] == ["exact_match"]


@pytest.mark.parametrize(
    "given, words",
    [
        ("exact_match(column=lenght)", "needs 'lenght'"),
        ("exact_match(answer)", "reward_funcs: exact_match: 'answer' has no name"),
    ],
)
def test_mistakes_end_before_training(call, workspace, given, words):
    done = call("ppo", reward_funcs=given, output_dir="runs/never")
    assert done.code == 2 and words in done.err
    assert not list((workspace / "runs" / "never").glob("*.safetensors"))


def test_mappings_become_names_in_every_command():
    entry = {"exact_match": {"column": "answer"}}
    names = ["exact_match(column=answer)"]
    assert RewardArguments(reward_funcs=[entry], eval_reward_funcs=[entry]).eval_reward_funcs == names
    assert split_names([entry], "reward_funcs") == names
    assert split_names("a.py:f, number(column=x, tolerance=1)", "reward_funcs")[1] == "number(column=x, tolerance=1)"
    with pytest.raises(UserError, match="reward_funcs: .*names no reward function"):
        RewardArguments(reward_funcs=[{"a": 1, "b": 2}])
    assert ModelsArguments(reward_funcs=[entry]).reward_funcs == names
    assert ModelsArguments(reward_funcs=["a.py:f"], gold="number(column=x)").gold_is_function


def test_a_judge_of_compare_is_named_by_its_function():
    given = "judge(model=m, base_url=http://127.0.0.1:9/v1)"
    assert judge_from({"gold": given}, load=reward_function).name == "judge"


def test_what_a_pipeline_records_has_arguments_and_no_address():
    names = ["number(column=answer, tolerance=1)", "judge(model=m, base_url=http://10.1.2.3:8000/v1, highest=5)"]
    sources = sources_of({name: reward_function(name, "reward_funcs") for name in names})
    assert sources == {"number": names[0], "judge": "judge(model=m, highest=5)"}
