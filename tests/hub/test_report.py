"""`report.json` as dataclasses: files are unchanged after reading and writing, and older files can be read."""

import json
from pathlib import Path

import pytest

from hf_rlhf_ext.hub.report import CardOptions, MergeRecord, PPOSection, RunReport, as_report

SHIPPED = sorted((Path(__file__).parents[2] / "model_cards").glob("*/report.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.parent.name)
def test_a_report_comes_out_as_it_went_in(path, tmp_path):
    written = json.loads(path.read_text(encoding="utf-8"))
    written["card"] = {"relation": "adapter", "chat": True} | written["card"]  # always written now
    report = RunReport.load(path.parent)
    assert report.to_dict() == written
    report.save(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == written
    assert report.other == {name: written[name] for name in ("size", "peak_memory_gb")}
    assert report.reward_model.metrics["accuracy"] == written["reward_model"]["accuracy"]
    assert report.ppo.rewards == ["reward_model"] and report.ppo.metrics["kl"] == written["ppo"]["kl"]


def test_structure_and_numbers_of_a_section_are_told_apart():
    section = {"kl": 3.0, "kl_ci95": [2.0, 4.0], "start": "the SFT policy", "eval_rewards": ["judge"], "judge_n": 3}
    ppo = PPOSection.from_dict(section)
    assert ppo.metrics == {"kl": 3.0, "kl_ci95": [2.0, 4.0], "judge_n": 3} and ppo.eval_rewards == ["judge"]
    assert ppo.to_dict() == section
    assert PPOSection.from_dict({"stopped_by": "KL"}).to_dict() == {"stop_reason": "KL"}  # from an older report
    assert PPOSection.from_dict({"stopped_by": "KL", "stop_reason": "length"}).stop_reason == "length"


def test_what_is_not_known_is_not_written():
    assert RunReport().to_dict() == {}
    report = RunReport(seed=0, card=CardOptions("sft", limits=["one"]), merge=MergeRecord("float32", "alice/base"))
    written = report.to_dict()
    assert written["seed"] == 0 and written["merge"]["max_score_difference"] is None
    assert set(written["card"]) == {"kind", "base_model", "relation", "chat", "limits"}
    assert RunReport.from_dict(written) == report


def test_a_mapping_or_a_report_will_do():
    report = RunReport(command="make")
    assert as_report(report) is report and as_report({"command": "make"}) == report
    with pytest.raises(TypeError, match="hue"):  # not an option of cards
        as_report({"card": {"kind": "sft", "hue": "red"}})
