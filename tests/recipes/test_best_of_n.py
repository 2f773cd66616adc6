"""`hf-rlhf best-of-n`: rows for SFT and DPO, a report with reward and KL for every n, and runs that go on."""

import json
import math
import shutil
from pathlib import Path

import pytest
from trl import SFTConfig

from hf_rlhf_ext import RewardScorer, load_comparisons
from hf_rlhf_ext.cli.options import DataArguments, ModelArguments
from hf_rlhf_ext.cli.parsing import parse_recipe
from hf_rlhf_ext.cli.stopping import Interrupted
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.recipes import best_of_n as recipe
from hf_rlhf_ext.recipes import sft
from hf_rlhf_ext.recipes.best_of_n_parts.report import lines_of, print_report, sizes_of
from hf_rlhf_ext.study.best_of_n import kl_of_best_of_n
from tests.recipes.chat_models import save_run

QUESTIONS = ["What is rain?", "Name a color.", "Who sings?", "Why?", "Count."]
REWARDS = """
def letters(completions, **columns):
    return [float(sum(map(str.islower, answer[0]["content"]))) for answer in completions]

def length(completions, completion_ids, **columns):
    return [None if len(ids) == 2 else float(len(ids)) for ids in completion_ids]

def same(completions, **columns):
    return [1.0] * len(completions)

def silent(completions, **columns):
    return [None] * len(completions)

def of_text(prompts, completions, **columns):
    assert all(isinstance(text, str) for text in [*prompts, *completions])
    return [float(len(text)) for text in completions]

def by_answer(completions, answer, **columns):
    return [1.0] * len(completions)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory, save_base, chat_tokenizer_factory) -> Path:
    folder = tmp_path_factory.mktemp("best_of_n")
    tokenizer = chat_tokenizer_factory()
    base = save_base(folder / "base", tokenizer)
    return save_run(base, folder / "run", tokenizer)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "prompts.txt").write_text("\n".join(QUESTIONS) + "\n")
    return tmp_path


@pytest.fixture
def run(models, place):
    """Runs the command in this process. Returns its report."""

    def call(*words: str, policy: str = "sft") -> dict:
        usual = ["--model_name_or_path", str(models / policy), "--dataset_name", "prompts.txt", "--n", "4"]
        usual += ["--max_completion_length", "6", "--batch_size", "8", "--output_dir", "out"]
        return recipe.run_best_of_n(*parse_recipe(recipe.ARGUMENTS, [*usual, *words]))

    return call


def rows_of(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_rows_and_report_with_a_reward_model_on_the_base_of_the_policy(run, models, capsys):
    words = ["--write", "demonstrations", "comparisons", "answers"]
    report = run("--reward_model", str(models / "reward_model"), "--gold", "rewards.py:length", *words)
    assert "each is a turn of the user" in capsys.readouterr().out  # the policy has a chat template
    answers = rows_of("out/answers.jsonl")
    assert len(answers) == 20 and [row["row"] for row in answers] == [n for n in range(5) for _ in range(4)]
    scorer = RewardScorer.from_pretrained(models / "reward_model", dtype="float32")
    for row in answers:
        assert row["reward"] == pytest.approx(scorer([row["prompt"]], [row["completion"]])[0], abs=1e-4)
    best = [max(row["reward"] for row in answers if row["row"] == number) for number in range(5)]
    demonstrations = rows_of("out/demonstrations.jsonl")
    assert [row["rating"] for row in demonstrations] == best
    assert [row["completion"] for row in demonstrations] == [row["completion"] for row in answers if row["best"]]

    pairs, _ = load_comparisons("out/comparisons.jsonl")
    assert len(pairs) == report["comparisons"]["rows"] >= 4
    assert report == json.loads(Path("out/report.json").read_text())
    assert [entry["n"] for entry in report["by_n"]] == [1, 2, 4]
    last = report["by_n"][-1]
    assert last["reward"]["mean"] == pytest.approx(sum(best) / 5) and last["kl_bound"] == kl_of_best_of_n(4)
    mean_of_all = sum(row["reward"] for row in answers) / 20
    assert report["by_n"][0]["reward"]["mean"] == pytest.approx(mean_of_all)
    assert last["reward_gain"]["mean"] == pytest.approx(sum(best) / 5 - mean_of_all)
    low, high = last["reward"]["ci95"]
    assert low < last["reward"]["mean"] < high and report["every_n"]["reward"][3] == last["reward"]["mean"]
    known = [row["tokens"] for row in answers if row["tokens"] != 2]
    assert report["gold_missing"] == 20 - len(known)
    assert report["kl_estimate"] == pytest.approx(kl_of_best_of_n(4), abs=0.2) and report["n"] == 4

    print_report(report)
    shown = capsys.readouterr().out
    assert "log n - (n - 1)/n" in shown and f"{kl_of_best_of_n(4):.2f}" in shown


def test_the_winners_train_sft(run, models, place):
    run("--reward_funcs", "rewards.py:letters")
    options = {"max_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no"}
    sft.train_sft(
        DataArguments(dataset_name="out/demonstrations.jsonl"),
        ModelArguments(model_name_or_path=str(models.parent / "base"), dtype="float32"),
        SFTConfig("sft", **options),
    )
    assert (place / "sft" / "adapter_model.safetensors").is_file()


def test_the_same_command_goes_on_and_other_files_use_the_same_samples(run, capsys, monkeypatch):
    first = run("--reward_funcs", "rewards.py:letters")
    whole = Path("out/samples.jsonl").read_bytes()
    Path("out/samples.jsonl").write_bytes(whole[: len(whole) // 2])
    assert run("--reward_funcs", "rewards.py:letters") == first
    assert Path("out/samples.jsonl").read_bytes() == whole
    assert "goes on with out/samples.jsonl" in capsys.readouterr().out

    monkeypatch.setattr("hf_rlhf_ext.study.best_of_n._Run._sample", lambda *args: pytest.fail("sampled again"))
    again = run("--reward_funcs", "rewards.py:letters", "--write", "comparisons")
    assert again["by_n"] == first["by_n"] and again["demonstrations"] == 5  # its file is written again
    with pytest.raises(UserError, match="samples with n 4, now it is 8: .* --overwrite true"):
        run("--reward_funcs", "rewards.py:letters", "--n", "8")
    monkeypatch.undo()


def test_overwrite_samples_again(run, place, monkeypatch):
    monkeypatch.chdir(place)
    run("--reward_funcs", "rewards.py:letters")
    report = run("--reward_funcs", "rewards.py:letters", "--n", "2", "--overwrite", "true")
    assert report["n"] == 2 and report["completions"] == 10


def test_text_is_continued_where_the_user_wants_it_or_the_policy_was_trained_on_it(run, models, place):
    report = run("--reward_funcs", "rewards.py:of_text", "--prompt_form", "text")
    rows = rows_of("out/demonstrations.jsonl")
    assert [row["prompt"] for row in rows] == QUESTIONS and report["demonstrations"] == 5

    shutil.copytree(models / "sft", place / "on_text")
    (place / "on_text" / "prompt_form.json").write_text('{"prompt_form": "text"}')
    run("--model_name_or_path", "on_text", "--reward_funcs", "rewards.py:of_text", "--output_dir", "other")
    assert rows_of("other/demonstrations.jsonl")[0]["prompt"] == QUESTIONS[0]


def test_a_sum_of_rewards_and_a_run_of_chat_prompts(run, models, place):
    prompts = [{"prompt": [{"role": "user", "content": text}], "category": "qa"} for text in QUESTIONS[:3]]
    (place / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    rewards = ["--reward_model", str(models / "reward_model"), "--reward_funcs", "rewards.py:letters"]
    report = run("--dataset_name", "chat.jsonl", *rewards, "--reward_weights", "2", "0.5", "--write", "answers")
    assert report["reward"] == "2 × reward_model + 0.5 × letters"
    scorer = RewardScorer.from_pretrained(models / "reward_model", dtype="float32")
    for row in rows_of("out/answers.jsonl"):
        text = row["completion"][0]["content"]
        expected = 2 * scorer([row["prompt"]], [row["completion"]])[0] + 0.5 * sum(map(str.islower, text))
        assert row["reward"] == pytest.approx(expected, abs=1e-3) and row["category"] == "qa"


def test_what_was_dropped_is_said(run):
    with pytest.raises(UserError, match="no comparisons .0 same text, 5 same reward, 0 empty.: raise --n"):
        run("--reward_funcs", "rewards.py:same", "--write", "demonstrations", "comparisons")
    report = json.loads(Path("out/report.json").read_text())
    assert report["demonstrations"] == 5
    assert any(
        "5 prompts left out: best and worst completion have the same reward" in line for line in lines_of(report)
    )
    report["dropped"] = [{"row": 3, "reason": "too long"}, {"row": 7, "reason": "too long"}]
    report |= {"unscored": 2, "comparisons": {"rows": 1, "same_text": 2, "same_reward": 0, "empty": 0}}
    assert lines_of(report)[:2] == [
        "2 prompts dropped (rows 3, 7): too long",
        "2 completions without a reward, which cannot win",
    ]
    assert any("2 prompts left out: best and worst completion have the same text" in line for line in lines_of(report))


def test_files_of_an_earlier_reward_are_written_again(run, capsys):
    run("--reward_funcs", "rewards.py:letters", "--write", "answers", "demonstrations")
    capsys.readouterr()
    report = run("--reward_funcs", "rewards.py:same", "--write", "answers")
    assert "also written again, with this reward: demonstrations.jsonl" in capsys.readouterr().out
    assert report["demonstrations"] == 5 and {row["rating"] for row in rows_of("out/demonstrations.jsonl")} == {1.0}


def test_a_gold_model_that_does_not_load_is_refused_before_sampling(run, models, place, monkeypatch):
    monkeypatch.setattr(recipe, "best_of_n", lambda *args, **options: pytest.fail("it was sampled"))
    shutil.copytree(models / "reward_model", place / "gold")
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        path = place / "gold" / name
        if name.endswith("json"):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": None}))
        else:
            path.unlink(missing_ok=True)
    with pytest.raises(UserError, match="gold: .*no chat template"):
        run("--reward_funcs", "rewards.py:letters", "--gold", "gold")


def test_overwrite_does_not_delete_the_policy(run, models, place):
    shutil.copytree(models / "sft", place / "out" / "sft")
    with pytest.raises(UserError, match="--overwrite true would delete"):
        run("--reward_funcs", "rewards.py:letters", "--overwrite", "true", "--model_name_or_path", "out/sft")
    assert (place / "out" / "sft" / "adapter_config.json").is_file()


def test_the_sizes_of_the_table():
    assert [sizes_of(n) for n in (1, 2, 6, 16)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8, 16]]
    assert math.isclose(kl_of_best_of_n(6), math.log(6) - 5 / 6)


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "give a reward: --reward_model"),
        (["--reward_funcs", "rewards.py:letters", "--dataset_name", "nope.txt"], "dataset_name: no file nope.txt"),
        (["--reward_funcs", "rewards.py:lettrs"], "did you mean letters"),
        (["--reward_funcs", "rewards.py:by_answer"], "needs 'answer'"),
        (["--reward_funcs", "rewards.py:letters", "--gold", "./nope"], "gold: no folder at ./nope"),
        (["--reward_funcs", "rewards.py:letters", "--reward_weights", "1", "2"], "reward_weights: 2 for 1 rewards"),
        (["--reward_funcs", "rewards.py:letters", "--temperature", "0"], "temperature must be above 0"),
        (["--reward_funcs", "rewards.py:letters", "--n", "0"], "n must be at least 1"),
        (["--reward_funcs", "rewards.py:letters", "--write", "pairs"], "write.*demonstrations"),
        (["--reward_funcs", "rewards.py:letters", "--model_name_or_path", "./nope"], "no folder at ./nope"),
        (["--reward_funcs", "rewards.py:letters", "--output_dir", "used"], "used is not empty"),
        (["--reward_model", "./nope"], "reward model: no folder at ./nope"),
        (["--reward_funcs", "rewards.py:letters", "--n", "1", "--write", "comparisons"], "raise --n, which is 1"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_loaded(words, said, run, place, monkeypatch):
    monkeypatch.setattr(recipe, "load_cast", lambda *args: pytest.fail("a model was loaded"))
    (place / "used").mkdir()
    (place / "used" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=said) as caught:
        run(*words)
    assert "\n" not in str(caught.value)


def test_a_run_folder_and_a_reward_that_scores_nothing_are_refused(run, models):
    with pytest.raises(UserError, match="folder of a whole run: give one of its models"):
        run("--reward_funcs", "rewards.py:letters", "--model_name_or_path", str(models))
    with pytest.raises(UserError, match="none of them has a winner"):
        run("--reward_funcs", "rewards.py:silent")


@pytest.mark.parametrize("stops_in", ["_score", "_sample"])
def test_ctrl_c_says_what_is_kept_and_how_to_go_on(run, monkeypatch, stops_in):
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(f"hf_rlhf_ext.study.best_of_n._Run.{stops_in}", stop)
        with pytest.raises(Interrupted) as stopped:
            run("--reward_funcs", "rewards.py:letters")
    is_kept = stops_in == "_score"
    assert stopped.value.then == ("go on" if is_kept else "start again")
    assert ("out/samples.jsonl is kept" in stopped.value.what) == is_kept
    assert run("--reward_funcs", "rewards.py:letters")["demonstrations"] == 5
