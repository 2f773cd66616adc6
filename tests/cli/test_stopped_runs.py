"""Whether the same command goes on with a stopped run: what is compared, and what is never deleted."""

import json
import shlex
import sys

import pytest
from datasets import Dataset, load_from_disk
from transformers import TrainingArguments

from hf_rlhf_ext import UserError
from hf_rlhf_ext.cli.options import DataArguments, ModelArguments
from hf_rlhf_ext.cli.output import MARKER
from hf_rlhf_ext.cli.run_record import compared_options, difference, read_record, write_record
from hf_rlhf_ext.cli.stopping import (
    command_to_go_on,
    forget_checkpoints_of_stops,
    open_run,
    release_folders,
    stoppable,
)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data" / "rows.jsonl"
    path.parent.mkdir()
    path.write_text('{"prompt": "a"}\n')
    return path


@pytest.fixture
def start(tmp_path, data):
    """Opens the run in `tmp_path / "run"`; it does not finish."""

    def start(overwrite=False, dataset=data, model="base", **options):
        args = TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none", **options)
        parts = (DataArguments(dataset_name=str(dataset)), ModelArguments(model_name_or_path=str(model)), args)
        return open_run("sft", args, parts, overwrite=overwrite)

    yield start
    release_folders()


def compared(dataset, model="base"):
    parts = (DataArguments(dataset_name=str(dataset)), ModelArguments(model_name_or_path=str(model)))
    return compared_options("sft", parts, 1)


def test_an_option_of_another_version_is_no_difference():
    assert difference({"seed": 0, "of_the_old_one": 1}, {"seed": 0, "of_the_new_one": False}) == ""
    assert difference({"seed": 0}, {"seed": 1}) == "seed: 0 then, 1 now"


def test_the_content_of_data_and_models_counts_and_not_their_paths(tmp_path, data, monkeypatch):
    model = tmp_path / "policies" / "sft"
    (model / "checkpoint-3").mkdir(parents=True)
    (model / "adapter_config.json").write_text("{}")
    (model / "adapter_model.safetensors").write_bytes(b"weights")
    before = compared(data, model)
    monkeypatch.chdir(tmp_path)
    assert difference(before, compared("data/rows.jsonl", "policies/sft")) == ""
    monkeypatch.chdir(data.parent)
    assert difference(before, compared("rows.jsonl", "../policies/sft")) == ""
    (tmp_path / "policies").rename(tmp_path / "moved")
    (tmp_path / "moved" / "sft" / "checkpoint-3").rmdir()
    assert difference(before, compared(data, tmp_path / "moved" / "sft")) == ""
    (tmp_path / "moved" / "sft" / "adapter_model.safetensors").write_bytes(b"another")
    data.write_text('{"prompt": "b"}\n')
    differing = difference(before, compared(data, tmp_path / "moved" / "sft"))
    assert "dataset_name: rows.jsonl (content " in differing and "model_name_or_path: sft (content " in differing
    assert str(tmp_path) not in json.dumps(before)


def test_caches_of_a_saved_dataset_are_no_difference(tmp_path):
    Dataset.from_dict({"prompt": ["a", "b"]}).save_to_disk(tmp_path / "saved")
    before = compared(tmp_path / "saved")
    load_from_disk(tmp_path / "saved").map(lambda row: {"prompt": row["prompt"] * 2})
    assert difference(before, compared(tmp_path / "saved")) == ""


def test_a_run_that_starts_again_deletes_nothing_but_its_log(start, tmp_path, capsys):
    assert start() is None
    run = tmp_path / "run"
    (run / "log.jsonl").write_text("{}\n")
    (run / "checkpoint-2").mkdir()
    (run / "notes.md").write_text("mine")
    (run / "other_run").mkdir()
    (run / "other_run" / "adapter_model.safetensors").write_bytes(b"weights")
    assert start() is None
    assert "starts from the beginning" in capsys.readouterr().out
    left = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    assert left == [MARKER, "notes.md", "other_run/adapter_model.safetensors"]
    assert not (run / "checkpoint-2").exists()


@pytest.mark.parametrize(
    "file",
    [
        "adapter_model.safetensors",
        "checkpoint-2/model.safetensors",
        "checkpoint-2/pytorch_model_fsdp_0/__0_0.distcp",
        "checkpoint-2/optimizer.pt",
    ],
)
def test_weights_without_a_whole_checkpoint_are_not_deleted_unasked(start, tmp_path, file):
    start()
    path = tmp_path / "run" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"weights")
    with pytest.raises(UserError, match="stopped run with weights.*--overwrite true to start again"):
        start()
    assert path.is_file()
    assert start(overwrite=True) is None and not path.exists()


def test_a_checkpoint_without_an_optimizer_is_not_gone_on_from_unasked(start, tmp_path):
    start()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text("{}")
    with pytest.raises(UserError, match="no optimizer state .*--resume_from_checkpoint true"):
        start()
    assert start(resume_from_checkpoint="true") == str(checkpoint)


def test_overwrite_does_not_delete_what_the_run_needs(start, tmp_path, data):
    start()
    run = tmp_path / "run"
    (run / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="model_name_or_path: .* is in the output_dir .*another --output_dir"):
        start(overwrite=True, model=run)
    inside = data.rename(run / "rows.jsonl")
    with pytest.raises(UserError, match="dataset_name: "):
        start(overwrite=True, dataset=inside)
    assert inside.is_file() and (run / "adapter_config.json").is_file()


def test_only_the_checkpoints_of_stops_are_forgotten(start, tmp_path, data):
    start(save_strategy="no")
    run = tmp_path / "run"
    for name in ("checkpoint-2", "checkpoint-3", "checkpoint-5"):
        (run / name).mkdir()
    options = read_record(run)["options"]
    write_record(run, options, finished=False, stop="checkpoint-3")
    write_record(run, options, finished=False, stop="checkpoint-5")
    forget_checkpoints_of_stops(TrainingArguments(str(run), use_cpu=True, save_strategy="steps"))
    assert len(list(run.glob("checkpoint-*"))) == 3
    forget_checkpoints_of_stops(TrainingArguments(str(run), use_cpu=True, save_strategy="no"))
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_finished_run_is_not_trained_again_unasked(tmp_path, start):
    @stoppable
    def train():
        start()
        (tmp_path / "run" / "report.json").write_text("{}")
        return "trained"

    assert train() == "trained" and read_record(tmp_path / "run")["finished"]
    with pytest.raises(UserError, match="its run has finished"):
        train()


@pytest.mark.parametrize(
    "config, words, resumed, again",
    [
        ("seed: 1", "--overwrite true --seed 2", "--seed 2", "--seed 2"),
        ("seed: 1", "--overwrite=true --seed 2", "--seed 2", "--seed 2"),
        ("overwrite: true", "", "--overwrite false", "--overwrite false"),
        ("seed: 1", "--resume_from_checkpoint c-1", "", "--resume_from_checkpoint c-1"),
        ("resume_from_checkpoint: c-1", "", "--resume_from_checkpoint true", ""),
    ],
)
def test_the_command_that_goes_on_neither_deletes_nor_goes_back(tmp_path, monkeypatch, config, words, resumed, again):
    path = tmp_path / "mine.yaml"
    path.write_text(f"{config}\n")
    monkeypatch.setattr(sys, "argv", ["sft.py", "--config", str(path), *shlex.split(words)])
    first = f"python sft.py --config {path}"
    assert command_to_go_on() == f"{first} {resumed}".strip()
    assert command_to_go_on(from_start=True) == f"{first} {again}".strip()
