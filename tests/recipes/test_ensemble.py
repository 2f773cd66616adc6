"""recipes/reward.py --members, the check of what it trained, and PPO toward it."""

import json

import pytest

from hf_rlhf_ext.reward.ensemble import load_reward

pytestmark = pytest.mark.slow


def test_an_ensemble_is_trained_checked_and_used(call, tmp_path, workspace):
    chosen = {"members": 2, "combine": "conservative", "penalty": 0.5, "eval_rows": 4, "seed": 0}
    done = call("reward", output_dir=tmp_path / "reward", **chosen)
    assert done.code == 0, done.err
    assert "Member 2 of 2, seed 1" in done.out
    report = json.loads((tmp_path / "reward" / "report.json").read_text())["reward_model"]
    assert len(report["members"]) == 2 and report["heldout_pairs"] == report["members"][0]["heldout_pairs"]
    assert report["members"][0]["nll"] != report["members"][1]["nll"]  # their seeds differ
    seeds = [json.loads((tmp_path / "reward" / f"member-{k}" / "report.json").read_text())["seed"] for k in (0, 1)]
    assert seeds == [0, 1]
    assert (tmp_path / "reward" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "reward" / "member-1" / "README.md").is_file()
    card = (tmp_path / "reward" / "README.md").read_text()
    assert (
        f"standard deviation of their rewards | {report['disagreement']:.3f} |" in card and report["disagreement"] > 0
    )
    assert "ensemble of 2" in card and f"- member 1: accuracy {report['members'][1]['accuracy']:.3f}" in card
    stated, of_member = (
        json.loads((tmp_path / "reward" / name / "report.json").read_text())["card"] for name in (".", "member-0")
    )
    same = of_member.keys() - {"config", "rows_read"}
    assert {name: stated[name] for name in same} == {name: of_member[name] for name in same}
    assert "members: 2" in stated["config"] and stated["prompt_form"] == "messages"
    ensemble = load_reward(tmp_path / "reward", device="cpu")
    assert (ensemble.combine, ensemble.penalty) == ("conservative", 0.5)

    refused = call("reward", output_dir=tmp_path / "other", members=0)
    assert refused.code == 2 and "error: members: 0: use 1 or more" in refused.err
    rewarded = call("ppo", output_dir=tmp_path / "ppo", reward_model=tmp_path / "reward", train_rows=None)
    assert rewarded.code == 0, rewarded.err


def test_an_interrupted_ensemble_goes_on_where_it_was(call, tmp_path):
    chosen = {"members": 2, "eval_rows": 4, "seed": 0, "output_dir": tmp_path / "reward"}
    assert call("reward", **chosen).code == 0
    first, second = (tmp_path / "reward" / name for name in ("member-0", "member-1"))
    before = {folder: (folder / "adapter_model.safetensors").read_bytes() for folder in (first, second)}
    refused = call("reward", **chosen)
    assert refused.code == 2 and "is not empty: pass --resume_from_checkpoint" in refused.err
    for name in ("report.json", "adapter_model.safetensors"):
        (second / name).unlink()  # as after a stop in the second one
    done = call("reward", **chosen, resume_from_checkpoint="true")
    assert done.code == 0, done.err
    for folder, content in before.items():
        assert (folder / "adapter_model.safetensors").read_bytes() == content


def test_the_check_takes_the_rows_that_training_held_out(call, tmp_path):
    # Every second pair has a gap of more than five words: rows are counted after they are left out.
    options = {"train_rows": 3, "eval_rows": 3, "max_length_gap": 5}
    assert call("reward", output_dir=tmp_path / "reward", **options).code == 0
    keep = {"config": None, "model_name_or_path": None, "reward_model": tmp_path / "reward"}
    done = call("check_reward", **keep, output_dir=tmp_path / "check", **options)
    assert done.code == 0, done.err
    checked = json.loads((tmp_path / "check" / "report.json").read_text())
    trained = json.loads((tmp_path / "reward" / "report.json").read_text())["reward_model"]
    assert checked["rows"] == trained["heldout_pairs"] == 3 and checked["metrics"]["accuracy"] == trained["accuracy"]
    assert abs(checked["metrics"]["nll"] - trained["nll"]) < 1e-3


def test_an_ensemble_is_measured_on_the_rows_of_its_members(call, tmp_path):
    cut = {"max_length": 40, "overflow": "truncate_prompt_left"}  # the longer rejected answers do not fit
    done = call("reward", output_dir=tmp_path / "reward", members=2, eval_rows=4, **cut)
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "reward" / "report.json").read_text())["reward_model"]
    assert report["heldout_pairs"] == report["members"][0]["heldout_pairs"] == 4
    assert report["longer_wins_baseline"] == report["members"][0]["longer_wins_baseline"]
    assert report["disagreement"] > 0
