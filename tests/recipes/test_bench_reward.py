"""`hf-rlhf bench-reward` on files of each published shape and on own comparisons, with tiny reward models."""

import json
import shutil
import sys

import pytest

from hf_rlhf_ext.errors import UserError
from recipes import bench_reward
from tests.study.test_reward_benchmarks import PUBLISHED

pytestmark = pytest.mark.xdist_group("bench_reward")


@pytest.fixture(scope="module")
def models(workspace, tmp_path_factory, recipes_path):
    """Two copies of a reward model that was trained for one step, with its report."""
    from recipes.reward import main
    from tests.recipes.conftest import command

    folder = tmp_path_factory.mktemp("models")
    words = command(workspace, "reward", {"max_steps": 1, "output_dir": folder / "first", "eval_rows": 4})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        patch.setattr(sys, "argv", ["reward.py", *words])
        main()
    shutil.copytree(folder / "first", folder / "second")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory, write_jsonl):
    folder = tmp_path_factory.mktemp("files")
    for name, record in PUBLISHED.items():
        rows = [record] * 3
        if name == "judgebench":
            rows = [record, record | {"question": "a long day " * 400}, record | {"label": "A>B"}]
        write_jsonl(folder / f"{name}.jsonl", rows)
    pairs = [{"prompt": f"Day {i}?", "chosen": "A sunny day.", "rejected": "No." * i} for i in range(8)]
    pairs += [{"prompt": "Tell me about day 1.", "chosen": "Good.", "rejected": "Bad."}]
    write_jsonl(folder / "own.jsonl", [row | {"category": "ab"[i % 2]} for i, row in enumerate(pairs)])
    return folder


@pytest.fixture
def run(monkeypatch, capfd):
    def start(*words):
        monkeypatch.setattr(sys, "argv", ["bench_reward.py", *map(str, words)])
        capfd.readouterr()
        bench_reward.main()
        return capfd.readouterr().out

    return start


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def test_all_benchmarks_side_by_side(run, models, files, tmp_path):
    public = [f"{name}={files / name}.jsonl" for name in PUBLISHED]
    names = [f"a={models / 'first'}", models / "second"]
    options = ["--reward_model", *names, "--benchmark", *public, files / "own.jsonl", "--output_dir", tmp_path / "out"]
    out = run(*options)
    report = report_of(tmp_path / "out")
    assert list(report["reward_models"]) == ["a", "second"]
    entries = report["reward_models"]["a"]["benchmarks"]
    assert list(entries) == [*PUBLISHED, "own.jsonl"]
    assert report["reward_models"]["second"]["benchmarks"] == entries  # the same weights
    for name, entry in entries.items():
        assert entry["scored"] + sum(entry["left_out"].values()) == entry["rows"] and entry["measures"], name
        assert len(entry["sha256"]) == 64 and entry["dataset"] == f"{name.removesuffix('.jsonl')}.jsonl"
    assert entries["judgebench"]["left_out"] == {"over 512 tokens": 1} and entries["judgebench"]["scored"] == 2
    # A pair whose answers are exchanged by its label: exactly one of both is right.
    assert entries["judgebench"]["measures"]["score"]["value"] == 0.5
    assert entries["own.jsonl"]["measures"]["accuracy"]["ci95"] and "category a" in entries["own.jsonl"]["measures"]
    assert "JudgeBench, a: 2 of 3 rows scored; left out: 1 over 512 tokens" in out and "RM-Bench (95 % interval)" in out

    # The card of each model has all of it, with what it was measured on.
    card = (models / "first" / "README.md").read_text()
    assert "| RM-Bench | easy |" in card and "2 of 3 rows scored, without 1 over 512 tokens" in card
    assert f"SHA-256 of its rows `{entries['judgebench']['sha256'][:16]}`" in card and "ScalerLab/JudgeBench" in card
    assert "name: RM-Bench" in card and "type: THU-KEG/RM-Bench" in card  # the model index


def test_scores_are_used_again_unless_the_model_changes(run, models, files, tmp_path, monkeypatch):
    from hf_rlhf_ext.reward.scorer import RewardScorer

    calls = []
    raw = RewardScorer.raw
    monkeypatch.setattr(RewardScorer, "raw", lambda self, *args, **kw: calls.append(1) or raw(self, *args, **kw))
    model = tmp_path / "model"
    shutil.copytree(models / "first", model)
    options = ["--benchmark", f"rm-bench={files}/rm-bench.jsonl", "--output_dir", tmp_path / "out", "--limit", 2]
    said = run("--reward_model", model, *options)
    assert len(calls) == 1 and "2 of 2 rows scored, which are a random sample of 3" in said
    assert "not written to its card, as only all rows" in said
    first = report_of(tmp_path / "out")
    run("--reward_model", model, *options)
    again = report_of(tmp_path / "out")
    assert len(calls) == 1 and again["reward_models"] == first["reward_models"]
    run("--reward_model", model, *options[:-2])
    assert len(calls) == 2  # only the row that was not in the sample
    path = model / "reward_normalization.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mean": 7.0}))
    run("--reward_model", model, *options)
    assert len(calls) == 3


def test_rows_that_the_model_was_trained_on_are_left_out(run, models, files, tmp_path):
    own = tmp_path / "own.jsonl"
    # The twelve prompts of the workspace, of which training held out four.
    prompts = [{"role": "user", "content": f"Tell me about day {i}."} for i in range(12)]
    answers = {"chosen": [{"role": "assistant", "content": "x"}], "rejected": [{"role": "assistant", "content": "y"}]}
    own.write_text("".join(json.dumps({"prompt": [prompt], **answers}) + "\n" for prompt in prompts))
    options = ["--reward_model", models / "first", "--benchmark", own, "--write_card", "false"]
    run(*options, "--output_dir", tmp_path / "new")
    entry = report_of(tmp_path / "new")["reward_models"]["first"]["benchmarks"]["own.jsonl"]
    assert entry["scored"] == 4
    assert entry["left_out"] == {"with a prompt that the reward model was trained on": 8} and entry["rows"] == 12
    run(*options, "--output_dir", tmp_path / "all", "--include_trained", "true")
    assert report_of(tmp_path / "all")["reward_models"]["first"]["benchmarks"]["own.jsonl"]["scored"] == 12


def test_options_that_are_not_used_are_said(run, models, files, tmp_path):
    options = ["--reward_model", models / "first", "--benchmark", f"judgebench={files}/judgebench.jsonl"]
    out = run(*options, "--output_dir", tmp_path / "out", "--prior_sets", "true", "--category_column", "c")
    assert "not used without --benchmark reward-bench, from the Hub: prior_sets" in out
    assert "not used without comparisons of your own: category_column" in out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--benchmark", "rm-bench"], "reward_model is required"),
        (["--reward_model", "x/y"], "benchmark is required"),
        (["--reward_model", "x/y", "--benchmark", "rm-bench", "rm-bench"], "twice"),
        (["--reward_model", "a=", "--benchmark", "rm-bench"], "a= names no model"),
        (["--reward_model", "x/y", "x/y", "--benchmark", "rm-bench"], "--reward_model a=FOLDER"),
        (["--reward_model", "./nowhere", "--benchmark", "rm-bench"], "nowhere"),
        (["--reward_model", "x/y", "--benchmark", "rm-bensch"], "did you mean `rm-bench`"),
        (["--reward_model", "x/y", "--benchmark", "rm-bench", "--limit", "0"], "limit must be at least 1"),
    ],
)
def test_mistakes_are_refused_before_a_model_is_loaded(words, message, run, tmp_path):
    with pytest.raises(UserError, match=message):
        run(*words, "--output_dir", tmp_path / "out")


def test_a_model_from_elsewhere_is_asked_through_its_chat_template(run, models, files, tmp_path):
    """As the published scripts do, where it is not known that the reward model was trained on text."""
    from hf_rlhf_ext import RewardScorer

    model = tmp_path / "model"
    shutil.copytree(models / "first", model)
    options = ["--reward_model", model, "--benchmark", f"rm-bench={files}/rm-bench.jsonl", "--write_card", "false"]
    (model / "prompt_form.json").write_text('{"prompt_form": "text"}')
    run(*options, "--output_dir", tmp_path / "out")
    (model / "prompt_form.json").unlink()
    said = run(*options, "--output_dir", tmp_path / "out")
    assert "RM-Bench: prompts were turns of the user" in said
    found = [json.loads(line)["scores"] for path in (tmp_path / "out" / "scores").iterdir() for line in path.open()]
    scorer = RewardScorer.from_pretrained(model)
    answers = ["a", "b", "c", "d", "e", "f"]
    turns = scorer.raw(
        [[{"role": "user", "content": "p"}]] * 6, [[{"role": "assistant", "content": text}] for text in answers]
    )
    plain = scorer.raw(["p"] * 6, answers)
    assert plain != pytest.approx(turns, abs=1e-3)
    for scores in (turns, plain):
        assert sum(one == pytest.approx(scores, abs=1e-4) for one in found) == 3  # each of the three rows


def test_a_part_of_a_benchmark_does_not_replace_its_score_on_the_card(run, models, files, tmp_path, write_jsonl):
    model = tmp_path / "model"
    shutil.copytree(models / "first", model)
    rows = [PUBLISHED["rm-bench"] | {"domain": domain} for domain in ("chat", "math", "code", "safety-refuse")]
    write_jsonl(tmp_path / "whole.jsonl", rows)
    options = ["--reward_model", model, "--output_dir", tmp_path / "out", "--benchmark"]
    run(*options, f"rm-bench={tmp_path}/whole.jsonl")
    card = (model / "README.md").read_text()
    said = run(*options, f"rm-bench={files}/rm-bench.jsonl")
    assert "its card keeps its complete score of rm-bench" in said and (model / "README.md").read_text() == card


def test_the_folder_of_the_reward_model_is_no_output_folder(run, models, files, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(models / "first", model)
    options = ["--reward_model", f"a={model}", "--benchmark", f"rm-bench={files}/rm-bench.jsonl", "--output_dir", model]
    before = (model / "report.json").read_text()
    with pytest.raises(UserError, match="output_dir: .* is not empty"):
        run(*options)
    with pytest.raises(UserError, match="--overwrite true would delete"):
        run(*options, "--overwrite", "true")
    assert (model / "report.json").read_text() == before


def test_nothing_that_fits_is_refused(run, models, files, tmp_path):
    options = ["--reward_model", models / "first", "--benchmark", f"rm-bench={files}/rm-bench.jsonl"]
    with pytest.raises(UserError, match="raise --max_length"):
        run(*options, "--output_dir", tmp_path / "out", "--max_length", 2)
