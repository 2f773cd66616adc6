"""`hf-rlhf generate`: one row per prompt and model, with rewards, the same rows for the same options."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_rlhf_ext import RewardScorer, load_demonstrations
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.readers.formats import load_rows
from hf_rlhf_ext.recipes import generate
from hf_rlhf_ext.recipes.chat_parts.answers import Answer
from hf_rlhf_ext.recipes.chat_parts.batches import Job, rewards_of
from hf_rlhf_ext.recipes.chat_parts.prompts import PromptRow
from hf_rlhf_ext.recipes.chat_parts.rewards import Reward
from tests.recipes.chat_models import save_run

MESSAGES = [{"role": "user", "content": "What is rain?"}]


@pytest.fixture(scope="module")
def run(tmp_path_factory, save_base, chat_tokenizer_factory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    tokenizer = chat_tokenizer_factory()
    base = save_base(folder / "base", tokenizer)
    return save_run(base, folder / "run", tokenizer)


@pytest.fixture
def write(run, tmp_path, monkeypatch):
    """Runs the command on a file of prompts. Returns the rows that it wrote."""
    monkeypatch.chdir(tmp_path)

    def call(content: str, name: str, *words: str) -> list[dict]:
        (tmp_path / name).write_text(content, encoding="utf-8")
        options = ["--prompts", name, "--output", "answers.jsonl", "--max_new_tokens", "6", *words]
        parsed = generate.parse([str(run), *options])
        generate.generate(*parsed)
        return [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]

    return call


def test_every_model_answers_every_prompt_and_the_rows_are_read_again(write, run):
    rows = write("What is rain?\n\nName a color.\n", "prompts.txt")
    assert [(row["row"], row["model"]) for row in rows] == [
        (number, name) for number in (0, 1) for name in ("base", "sft", "policy")
    ]
    assert rows[0]["prompt"] == "What is rain?" and isinstance(rows[0]["completion"], str)
    assert all(1 <= row["tokens"] <= 6 for row in rows) and len({row["completion"] for row in rows}) > 2
    # A model with a chat template got the text as a turn of the user, and so did the reward model.
    scorer = RewardScorer.from_pretrained(run / "reward_model", dtype="float32")
    for row in rows:
        question = [{"role": "user", "content": row["prompt"]}]
        answer = [{"role": "assistant", "content": row["completion"]}]
        assert row["reward"] == pytest.approx(scorer([question], [answer])[0], abs=1e-4)
    assert load_rows("answers.jsonl").num_rows == 6
    roles = {"prompt": "prompt", "completion": "completion", "rating": "reward"}  # for SFT on the best ones
    read, _ = load_demonstrations("answers.jsonl", columns=roles)
    assert len(read) == 6 and read[0]["rating"] == pytest.approx(rows[0]["reward"])

    again = write("What is rain?\n\nName a color.\n", "prompts.txt", "--overwrite")
    assert again == rows
    other = write("What is rain?\n\nName a color.\n", "prompts.txt", "--overwrite", "--seed", "1")
    assert other != rows


def test_messages_get_messages_and_too_long_prompts_are_said(write, capsys):
    long = [[{"role": "user", "content": "day " * n}] for n in (600, 700)]
    content = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in (MESSAGES, *long))
    rows = write(content, "prompts.jsonl")
    assert {row["row"] for row in rows} == {0} and rows[0]["prompt"] == MESSAGES
    assert rows[0]["completion"][0]["role"] == "assistant"
    assert capsys.readouterr().err.count("2 prompts without an answer") == 3


def test_answers_that_the_reward_model_refuses_are_counted_and_the_others_have_rewards(capsys):
    speaker = SimpleNamespace(name="policy", uses_messages=False)
    jobs = [Job(speaker, PromptRow(number, f"question {number}", {}), None) for number in range(9)]
    answers = [Answer(str(number), str(number), 1, True) for number in range(9)]
    answers[4] = None

    def scorer(prompts, completions):
        if any(text in ("2", "7") for text in completions):
            raise UserError("too long")
        return [float(text) for text in completions]

    rewards = rewards_of(scorer, jobs, answers)
    assert rewards == [None if number in (2, 4, 7) else Reward(float(number)) for number in range(9)]
    assert capsys.readouterr().err == "policy: 2 answers without a reward, the first: too long\n"


@pytest.mark.parametrize(
    "words, said",
    [
        (["--output", "a.jsonl"], "prompts is required"),
        (["--prompts", "nope.txt", "--output", "a.jsonl"], "prompts: no file nope.txt"),
        (["--prompts", "p.txt", "--output", "p.txt"], "output: p.txt is the file of --prompts"),
        (["--prompts", "p.txt", "--output", "there.jsonl"], "--overwrite"),
        (["--prompts", "p.csv", "--output", "a.jsonl"], "--columns"),
        (["--prompts", "p.txt", "--output", "a.jsonl", "--batch_size", "0"], "batch_size must be at least 1"),
        (["--prompts", "p.txt", "--output", "a.jsonl", "--columns", "x"], "--columns"),
        (["--prompts", "p.txt", "--output", "a.jsonl", "./nope"], "model: no folder at ./nope"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_loaded(words, said, monkeypatch, tmp_path, run):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "load_cast", lambda *args: pytest.fail("a model was loaded"))
    (tmp_path / "p.txt").write_text("What is rain?\n")
    (tmp_path / "p.csv").write_text("question,other\nWhat is rain?,1\n")
    (tmp_path / "there.jsonl").write_text("{}\n")
    with pytest.raises(UserError) as caught:
        models = [] if words[-1] == "./nope" else [str(run)]
        generate.generate(*generate.parse([*words, *models]))
    assert said in str(caught.value) and "\n" not in str(caught.value)


REWARDS = """
def short(prompts, completions, trainer_state, completion_ids, **columns):
    assert all(type(prompt) is list and type(completion) is list for prompt, completion in zip(prompts, completions))
    return [-float(len(completion[0]["content"])) for completion in completions]

def exact(completions, answer, **columns):
    return [None if not wanted else float(len(wanted)) for wanted in answer]
"""


@pytest.fixture
def trained_on(run, tmp_path):
    """Makes a copy of the run whose pipeline had these options."""

    def call(**options) -> str:
        folder = shutil.copytree(run, tmp_path / "mine")
        (folder / "pipeline.yaml").write_text(json.dumps(options))
        (folder / "policy" / "training_config.yaml").write_text("max_completion_length: 16\n")
        return str(folder)

    return call


def answer_all(folder: str, *words: str) -> list[dict]:
    files = ["--prompts", "prompts.jsonl", "--output", "answers.jsonl", "--max_new_tokens", "6"]
    return generate.generate(*generate.parse([folder, *files, *words]))


def test_functions_of_a_run_are_run_only_when_they_are_named_with_its_weights(
    trained_on, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text("raise RuntimeError('it was run')\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "What is rain?", "answer": "water"}\n{"prompt": "Sun?"}\n')
    folder = trained_on(reward_funcs=["<path>/rewards.py:short", "rewards.py:exact"], reward_weights=[2, 0.5, -1])
    plain = answer_all(folder)
    said = capsys.readouterr().out
    assert "rewards.py:exact are not run" in said and "add --reward_funcs" in said and "not the reward that PPO" in said
    assert "up to 6 tokens" in said and "up to 16 (--max_new_tokens)" in said
    assert all("rewards" not in row for row in plain)

    (tmp_path / "rewards.py").write_text(REWARDS)
    rows = answer_all(folder, "--overwrite", "--reward_funcs", "rewards.py:exact", "rewards:short")
    said = capsys.readouterr().out
    assert "reward = 2 × reward model - 1 × exact + 0.5 × short" in said and "1 each" not in said
    assert [row["completion"] for row in rows] == [row["completion"] for row in plain]
    for row, before in zip(rows, plain, strict=True):
        parts = row["rewards"]
        assert list(parts) == ["reward_model", "exact", "short"]
        assert parts["reward_model"] == pytest.approx(before["reward"], abs=1e-4)
        assert parts["exact"] == (5.0 if row["row"] == 0 else None)
        expected = 2 * parts["reward_model"] - (parts["exact"] or 0.0) + 0.5 * parts["short"]
        assert parts["short"] == -len(row["completion"]) and row["reward"] == pytest.approx(expected, abs=1e-4)
    generate.print_summary(rows)
    assert "exact +5.00" in capsys.readouterr().out

    rows = answer_all(folder, "--overwrite", "--reward_funcs", "rewards.py:short")
    said = capsys.readouterr().out
    assert "weights of 1 each" in said and "reward = 1 × reward model + 1 × short" in said


@pytest.mark.parametrize(
    "words, said",
    [
        (["rewards.py:exact"], "reward function 'exact' needs 'answer'"),
        (["rewards.py:shrt"], "did you mean short"),
        (["rewards.py:short", "rewards.py:short"], "given twice"),
    ],
)
def test_a_function_that_cannot_be_called_is_one_line_before_anything_is_loaded(
    words, said, run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "load_cast", lambda *args: pytest.fail("a model was loaded"))
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "What is rain?"}\n')
    with pytest.raises(UserError) as caught:
        answer_all(str(run), "--reward_funcs", *words)
    assert said in str(caught.value) and "reward_funcs" in str(caught.value) and "\n" not in str(caught.value)
