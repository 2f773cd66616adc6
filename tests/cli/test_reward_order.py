"""Weights belong to rewards in the order in which the rewards were given."""

import pytest

from hf_rlhf_ext.cli.reward_order import functions_come_first, sum_of_rewards, weights_of_models_first
from hf_rlhf_ext.errors import UserError

FUNCS, MODEL, WEIGHTS = ["--reward_funcs", "f"], ["--reward_model", "rm"], ["--reward_weights", "1", "0"]
BOTH = {
    "models first": "reward_model: [rm]\nreward_funcs: [f]\n",
    "functions first": "reward_funcs: [f]\nreward_model: [rm]\n",
}


@pytest.mark.parametrize(
    ("words", "yaml", "first"),
    [
        (FUNCS + MODEL + WEIGHTS, None, True),
        (WEIGHTS + FUNCS + MODEL, None, True),
        (MODEL + FUNCS + WEIGHTS, None, False),
        (["--reward-funcs=f", "--reward-model=rm"], None, True),
        (FUNCS, None, False),
        (MODEL, None, False),
        ([], BOTH["functions first"], True),
        ([], BOTH["models first"], False),
        # What the file has comes before the rest of the command.
        (MODEL, "reward_funcs: [f]\n", True),
        (FUNCS, "reward_model: [rm]\n", False),
        (FUNCS, "reward_model: []\nreward_funcs: [g]\n", False),
        # A value that is replaced keeps its place in the file, as the weights there do.
        (MODEL, BOTH["models first"], False),
        (MODEL + WEIGHTS, BOTH["functions first"], True),
        # Both are on the command line: the order there, unless the weights are in the file.
        (FUNCS + MODEL, BOTH["models first"], True),
        (FUNCS + MODEL + WEIGHTS, BOTH["models first"] + "reward_weights: [1, 0]\n", True),
        (FUNCS + MODEL, BOTH["models first"] + "reward_weights: [1, 0]\n", False),
    ],
)
@pytest.mark.parametrize("equals", [False, True])
def test_the_order_in_which_rewards_were_given(tmp_path, words, yaml, first, equals):
    if yaml is not None:
        config = tmp_path / "mine.yaml"
        config.write_text(yaml)
        words = [*([f"--config={config}"] if equals else ["--config", str(config)]), *words]
    assert functions_come_first(words) is first


def test_weights_are_put_in_the_order_of_models_then_functions():
    words = ["--reward_funcs", "f", "g", "--reward_model", "rm"]
    assert weights_of_models_first(words, ["rm"], ["f", "g"], [1.0, 0.5, 0.0]) == [0.0, 1.0, 0.5]
    assert weights_of_models_first(MODEL + FUNCS, ["rm"], ["f"], [1.0, 0.5]) == [1.0, 0.5]
    assert weights_of_models_first(words, ["rm"], ["f", "g"], None) is None
    with pytest.raises(UserError, match="reward_weights has 2 entries for 3 rewards.*in the order f, g, rm"):
        weights_of_models_first(words, ["rm"], ["f", "g"], [1.0, 0.5])


def test_the_sum_is_said_with_the_weight_of_each_reward():
    def short(completions):
        return [1.0]

    assert sum_of_rewards(["runs/rm", short], [1, 0.5]) == "1 × runs/rm + 0.5 × short"
    assert sum_of_rewards([short, "a/b"], [-1.0, -0.25]) == "-1 × short - 0.25 × a/b"
    assert sum_of_rewards([short, "a/b"], None) == "1 × short + 1 × a/b"
    assert sum_of_rewards([short], None) is sum_of_rewards([short], [1.0]) is None
    assert sum_of_rewards([short], [2.0]) == "2 × short"
    assert sum_of_rewards([short], None, "par") == "PAR(short)"
    assert sum_of_rewards(["runs/rm", short], [1, 0.5], "par") == "PAR(1 × runs/rm + 0.5 × short)"
    with pytest.raises(UserError, match="1 entries for 2 rewards.*runs/rm, short"):
        sum_of_rewards(["runs/rm", short], [1.0])
