import re
from pathlib import Path

import pytest

import hf_rlhf_ext
from hf_rlhf_ext.metrics.names import METRICS, describe, find_metric


def test_every_metric_has_a_unit_and_a_meaning_on_one_line():
    for key, metric in METRICS.items():
        assert metric.unit and metric.meaning and "\n" not in metric.meaning, key
        assert not metric.meaning.endswith("."), key


@pytest.mark.parametrize(
    "logged, key",
    [
        ("objective/kl", "objective/kl"),
        ("eval_accuracy", "accuracy"),
        ("eval_objective/kl", "objective/kl"),
        ("train_loss", "loss"),
        ("rewards/my_reward/mean", "rewards/<name>/mean"),
        ("eval_rewards/a/b/std", "rewards/<name>/std"),
        ("eval_hard_accuracy", "accuracy"),
        ("eval_my_set_accuracy_low", "accuracy_low"),
        ("eval_hard_objective/kl", "objective/kl"),
    ],
)
def test_logged_keys_are_found_with_their_prefix(logged, key):
    assert find_metric(logged) == METRICS[key]


def test_describe_is_a_markdown_table_in_the_order_asked_for():
    lines = describe(["eval_nll", "objective/kl"]).splitlines()
    assert lines[0] == "| metric | unit | meaning |"
    assert lines[2].startswith("| `eval_nll` | nats/pair |")
    assert lines[3].startswith("| `objective/kl` | nats/completion |")
    assert all(line.count("|") == 4 for line in describe().splitlines())  # "KL(policy || reference)" does not add cells
    assert len(describe().splitlines()) == len(METRICS) + 2


def test_a_key_without_an_entry_is_refused_by_name():
    with pytest.raises(KeyError, match="objective/klll"):
        describe(["loss", "objective/klll"])
    assert find_metric("rewards/gold") is None
    assert find_metric("val/ratio_var") is None  # TRL's, which nothing here logs
    assert find_metric("hard_accuracy") is None  # no prefix of Trainer's: nobody's key


def test_every_name_that_the_trainers_spell_is_explained():
    root = Path(hf_rlhf_ext.__file__).parent
    source = "".join(path.read_text() for folder in ("ppo", "reward") for path in (root / folder).glob("*.py"))
    names = set(re.findall(r'"((?:objective|policy|loss|val|completions|sampling)/\w+)"', source))
    assert len(names) > 10
    assert not [name for name in sorted(names) if find_metric(name) is None]
