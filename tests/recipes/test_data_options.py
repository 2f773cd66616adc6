"""What recipes do with data beyond reading them: formats, ratings, mixes, filters, reliability, and the report."""

import json

import pytest
from datasets import Dataset

from hf_rlhf_ext.cli.options import ComparisonArguments, DataArguments
from hf_rlhf_ext.recipes.check_reward import read_heldout


def report(folder):
    return json.loads((folder / "report.json").read_text())


def inspect(call, **changes):
    options = {"config": None, "model_name_or_path": None, "max_steps": None}
    return call("inspect_data", **(options | changes))


@pytest.fixture
def judged(tmp_path, write_jsonl):
    """Comparisons by three annotators, the last of whom is contrary; one prompt is judged both ways."""
    rows = [
        {
            "instruction": f"Tell me about day {k}.",
            "input": "",
            "response1": "A sunny day.",
            "response2": "No.",
            "annotator1": 1,
            "annotator2": 1 if k else 2,
            "annotator3": 2,
        }
        for k in range(12)
    ]
    return write_jsonl(tmp_path / "judged.jsonl", rows)


def test_inspect_writes_table_page_and_report(call, judged, tmp_path):
    done = inspect(call, dataset_name=judged, eval_rows=2, output_dir=tmp_path / "out")
    assert done.code == 0, done.err
    assert "judged.jsonl: 12 of 12 rows kept" in done.out and "krippendorff alpha" in done.out
    written = report(tmp_path / "out")
    assert written["metrics"]["prompts"] == 10 and written["metrics"]["leaked_prompts"] is not None
    assert written["reliability"]["annotator3"] < written["reliability"]["annotator1"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Doubtful: 10 prompts are few" in page and str(tmp_path) not in page
    refused = inspect(call, dataset_name=judged, output_dir=tmp_path / "out")
    assert refused.code == 2 and "is not empty" in refused.err


def test_reward_takes_reliability_and_filters(call, judged, tmp_path):
    filters = {"reliability": "true", "drop_contradictions": "true", "max_length_gap": 5, "min_agreement": 0.6}
    done = call("reward", dataset_name=judged, max_steps=1, output_dir=tmp_path / "reward", **filters)
    assert done.code == 0, done.err
    assert "annotators' accuracy: annotator1" in done.out and "filter: 12 of 12 rows kept" in done.out
    strict = call("reward", dataset_name=judged, output_dir=tmp_path / "none", min_agreement=0.9)
    assert strict.code == 2 and "the filters leave nothing, loosen them" in strict.err


def test_sft_takes_public_formats_ratings_and_a_mix(call, tmp_path, write_jsonl):
    kinds = ["brainstorming", "creative_writing", "open_qa", "summarization"]
    rows = [
        {"instruction": f"Day {k}?", "response": "Sunny!", "category": kinds[k % 4], "rating": 7 if k % 5 else 3}
        for k in range(80)
    ]
    data = write_jsonl(tmp_path / "dolly.jsonl", rows)
    options = {"min_rating": 7, "mix": "instructgpt", "mix_rows": 24}
    done = call("sft", dataset_name=data, max_steps=1, output_dir=tmp_path / "sft", **options)
    assert done.code == 0, done.err
    chosen = report(tmp_path / "sft")["sft"]
    assert chosen["rating"] == {"rated_kept": 64, "rated_dropped": 16, "unrated_kept": 0}
    assert chosen["mix"]["obtained"]["generation"] == 11 and chosen["mix"]["obtained"]["chat"] == 0
    assert "generation 0.611 of 0.456" in done.out  # 11 of the 18 rows that Dolly's categories give
    wrong = call("sft", dataset_name=data, output_dir=tmp_path / "x", mix=tmp_path / "nope.yaml")
    assert wrong.code == 2 and "error: mix: cannot read" in wrong.err


def test_sft_mixes_by_any_column_of_the_source(call, tmp_path, write_jsonl):
    topics = ["weather", "weather", "news"]
    rows = [{"instruction": f"Day {k}?", "response": "Sunny!", "topic": topics[k % 3]} for k in range(30)]
    data, mix = write_jsonl(tmp_path / "topics.jsonl", rows), tmp_path / "mix.yaml"
    mix.write_text("weather: 0.5\nnews: 0.5\n")
    options = {"dataset_name": data, "mix": mix, "mix_rows": 12, "max_steps": 1}
    done = call("sft", output_dir=tmp_path / "sft", category_column="topic", **options)
    assert done.code == 0, done.err
    assert report(tmp_path / "sft")["sft"]["mix"]["obtained"] == {"weather": 6, "news": 6}
    wrong = call("sft", output_dir=tmp_path / "x", category_column="subject", **options)
    assert wrong.code == 2 and "error: category_column: no column 'subject'" in wrong.err


def test_a_saved_data_set_and_a_configuration_are_read(call, judged, tmp_path):
    Dataset.from_json(str(judged)).save_to_disk(tmp_path / "saved")
    done = inspect(call, dataset_name=tmp_path / "saved", output_dir=tmp_path / "out")  # dataset_train_split is "train"
    assert done.code == 0 and "saved: 12 of 12 rows kept" in done.out, done.err
    assert report(tmp_path / "out")["load"]["order_known"] is True
    (tmp_path / "several").mkdir()
    judged.rename(tmp_path / "several" / "b.jsonl")
    (tmp_path / "several" / "a.jsonl").write_text('{"text": "a"}\n')
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in "ab")
    (tmp_path / "several" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    options = {"dataset_name": tmp_path / "several", "output_dir": tmp_path / "config"}
    done = inspect(call, dataset_config="b", **options)
    assert done.code == 0 and "several: 12 of 12 rows kept" in done.out, done.err
    refused = inspect(call, overwrite="true", **options)
    assert refused.code == 2 and "available configs: ['a', 'b']" in refused.err


def test_every_answer_of_a_conversation_is_trained_on(call, tmp_path, write_jsonl):
    talk = ["Day 1?", "Sunny!", "And day 2?", "A sad day."]
    data = write_jsonl(tmp_path / "talks.jsonl", [{"conversations": [*talk[:2], f"{k}?", "Sunny!"]} for k in range(8)])
    for every_turn, rows in (("true", 16), ("false", 8)):
        folder = tmp_path / every_turn
        options = {"every_turn": every_turn, "num_train_epochs": 1, "per_device_train_batch_size": 1}
        done = call("sft", dataset_name=data, output_dir=folder, save_strategy="no", **options)
        assert done.code == 0, done.err
        assert f"trained {rows} steps in " in done.out  # optimizer steps of one row each


@pytest.mark.slow
def test_check_reward_says_that_train_rows_alone_are_not_used(judged, capsys):
    read_heldout(DataArguments(dataset_name=str(judged), train_rows=1), ComparisonArguments())
    assert "not used without --eval_rows" in capsys.readouterr().out
    read_heldout(DataArguments(dataset_name=str(judged), train_rows=1, eval_rows=1), ComparisonArguments())
    assert "not used" not in capsys.readouterr().out


def test_check_reward_reports_on_a_trained_model(call, tmp_path):
    trained = call("reward", max_steps=1, output_dir=tmp_path / "reward")
    assert trained.code == 0, trained.err
    options = {"config": None, "model_name_or_path": None, "reward_model": tmp_path / "reward", "eval_rows": 6}
    done = call("check_reward", output_dir=tmp_path / "check", **options)
    assert done.code == 0, done.err
    written = report(tmp_path / "check")
    assert written["metrics"]["pairs"] == 6 and set(written["probes"]) >= {"empty", "flattery", "refusal"}
    assert "probe 'refusal' beats the chosen answer" in done.out and written["verdict"].split()[0] in ("Not", "Nothing")
    assert (tmp_path / "check" / "evaluation.png").read_bytes()[:4] == b"\x89PNG"
    missing = call("check_reward", output_dir=tmp_path / "x", **(options | {"reward_model": None}))
    assert missing.code == 2 and "reward_model is required" in missing.err
