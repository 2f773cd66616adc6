"""`hf-rlhf init`: which role a file has, what is said about it, and a config that the pipeline takes."""

import csv
import json
import re
import runpy
import sys
from types import SimpleNamespace

import pytest
import yaml

from hf_rlhf_ext.cli.options import machine_defaults
from hf_rlhf_ext.cli.parsing import parse_recipe
from hf_rlhf_ext.modeling.locations import EMBEDDED_MODEL
from hf_rlhf_ext.recipes.init_parts import machine
from hf_rlhf_ext.recipes.init_parts.files import look_at, quoted

SYSTEM = {"role": "system", "content": "Be kind."}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a user's files, in which commands run."""
    monkeypatch.chdir(tmp_path)
    with open("pairs.csv", "w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["question", "answer_a", "answer_b", "winner"])
        for k in range(30):
            writer.writerow(
                [f"What is {k} plus 1?", f"It is {k + 1}.", "I do not know, sorry.", ("a", "b", "tie")[k % 3]]
            )
    talks = []
    for k in range(12):
        turns = [SYSTEM, {"role": "user", "content": f"Hi {k}!"}, {"role": "assistant", "content": f"Hello, {k}!"}]
        talks.append(json.dumps({"messages": turns}) + "\n")
    (tmp_path / "talks.jsonl").write_text("".join(talks))
    (tmp_path / "prompts.txt").write_text("".join(f"Name number {k}.\n\n" for k in range(200)))
    (tmp_path / "rewards.py").write_text(
        "import not_installed\n\ndef short(completions, **columns):\n    return [-len(text) for text in completions]\n"
    )
    (tmp_path / "requirements.txt").write_text("torch\n")
    return tmp_path


@pytest.fixture
def init(folder, recipes_path, monkeypatch, capsys):
    """Runs the command; returns exit status, stdout and stderr."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["init.py", *words])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(recipes_path / "init.py"), run_name="__main__")
        except SystemExit as stopped:
            code = stopped.code
        shown = capsys.readouterr()
        return SimpleNamespace(code=code, out=shown.out, err=shown.err)

    return run


def stages(config):
    """The stages that the pipeline would run, with every option of the config parsed by the command that it is for."""
    from hf_rlhf_ext.recipes.pipeline import ARGUMENTS
    from hf_rlhf_ext.recipes.pipeline_parts.options import parse_section

    args, *_ = parse_recipe(ARGUMENTS, ["--config", str(config)])
    for name in ("sft", "reward", "ppo"):
        defaults = machine_defaults() | {"dataset_name": "data"}
        if name == "ppo":
            defaults["reward_model"] = ["runs/reward"]
        parse_section(name, getattr(args, name), defaults)
    return args.stages()


def test_pairs_prompts_and_a_function_become_a_config_that_the_pipeline_takes(init, folder):
    done = init("pairs.csv", "prompts.txt", "rewards.py", "--output", "mine.yaml", "--output_dir", "runs/mine")
    assert done.code == 0, done.err
    assert "30 of 30 rows kept; 30 pairs of 30 prompts, 10 ties" in done.out
    assert "verdict = winner (A or B)" in done.out and "blank line" in done.out and "short" in done.out
    assert '"It is 1." is better than "I do not know, sorry."' in done.out
    assert "pipeline --config mine.yaml" in done.out
    config = yaml.safe_load((folder / "mine.yaml").read_text())
    assert config["comparisons"] == "pairs.csv" and config["prompts"] == "prompts.txt"
    assert config["reward"]["columns"]["answers"] == ["answer_a", "answer_b"]
    assert config["reward_funcs"] == ["rewards.py:short"] and config["reward_weights"] == [1.0, 1.0]
    assert config["heldout_share"] == 0.2  # fewer than 100 rows
    text = (folder / "mine.yaml").read_text()
    assert re.search(r"# require_ready: true +# stop before PPO", text)
    # There are no demonstrations, so no number of passes over them.
    assert (
        re.search(r"#   num_train_epochs: passes .* 3 of under 100 rows", text)
        and "#   num_train_epochs: 1" not in text
    )
    assert re.search(r"max_steps: 32 +# optimizer steps, 4 for an update of 32 completions: 8 updates", text)
    assert stages("mine.yaml") == ["data", "reward_model", "check", "ppo", "report"]
    again = init("pairs.csv", "--output", "mine.yaml")
    assert again.code == 2 and "mine.yaml exists" in again.err and "--overwrite true" in again.err
    assert init("pairs.csv", "--output", "mine.yaml", "--overwrite", "true").code == 0
    assert "reward_funcs" not in yaml.safe_load((folder / "mine.yaml").read_text())


def test_the_roles_that_are_written_read_the_file_as_it_was_read(folder):
    found = look_at("pairs.csv")
    again = look_at("pairs.csv", columns=found.columns)
    assert again.lines == found.lines and again.columns == found.columns


def test_demonstrations_alone_and_a_folder(init, folder):
    done = init("--files", "talks.jsonl", "--output", "a.yaml")
    assert done.code == 0 and "PPO needs a reward" in done.out, done.err
    assert 'first: "system: Be kind. / user: Hi 0!" -> "Hello, 0!"' in done.out
    assert "read by the column messages (format messages)" in done.out
    assert stages("a.yaml") == ["data", "sft", "report"]
    done = init(".", "--output", "b.yaml")
    assert done.code == 0 and "requirements.txt" not in done.out, done.err
    assert stages("b.yaml") == ["data", "sft", "reward_model", "check", "ppo", "report"]


def test_without_files_the_current_folder_is_looked_at(init, folder, monkeypatch):
    (folder / "broken.json").write_text("{")
    done = init()
    assert done.code == 0, done.err
    assert "broken.json: not used: " in done.out
    assert stages("pipeline.yaml") == ["data", "sft", "reward_model", "check", "ppo", "report"]
    (folder / "empty").mkdir()
    monkeypatch.chdir(folder / "empty")
    done = init()
    assert done.code == 0 and "no data found" in done.out
    template = (folder / "empty" / "pipeline.yaml").read_text()
    assert "# comparisons: pairs.csv" in template and "comparisons" not in yaml.safe_load(template)


@pytest.mark.parametrize(
    "words, message",
    [
        (["nothere.csv"], r"nothere.csv: there is no such file \(found .*pairs.csv, "),
        (["someone/something"], "cannot read someone/something"),
        (["talks.jsonl", "more.jsonl"], "both demonstrations: .*cat talks.jsonl more.jsonl > all.jsonl"),
        (["pairs.csv", "votes.csv", "--columns", "{prompt: nothing}"], "columns: no file has these columns"),
        (["unclear.csv"], "did you mean columns=.*--columns"),
        (["nothing.py"], "no function that takes `completions`"),
        (["pairs.csv", "--output", "mine.txt"], "mine.txt is no .yaml file"),
        (["pairs.csv", "--ouput", "a.yaml"], "did you mean `--output`"),
    ],
)
def test_what_is_not_clear_is_one_line(init, folder, words, message):
    (folder / "more.jsonl").write_text((folder / "talks.jsonl").read_text())
    (folder / "votes.csv").write_text((folder / "prompts.txt").read_text().replace("Name", "prompt\nName", 1))
    (folder / "unclear.csv").write_text("color,note\nblue is a nice one for all,I like this one a lot\n" * 3)
    (folder / "nothing.py").write_text("WORDS = 3\n")
    done = init(*words)
    assert done.code == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1
    assert re.search(message, done.err), done.err
    assert not (folder / "pipeline.yaml").exists()


def test_roles_that_the_user_says(init, folder):
    """0 and 1 may mean the first answer or true: the file is not read without a word on it."""
    rows = ["query,answer_a,answer_b,label", *(f"Is {k} odd?,Yes.,No.,{k % 2}" for k in range(12))]
    (folder / "votes.csv").write_text("\n".join(rows))
    refused = init("votes.csv")
    assert refused.code == 2 and "verdict_is" in refused.err
    roles = "{prompt: query, answers: [answer_a, answer_b], verdict: label, verdict_is: 0 or 1}"
    assert init("votes.csv", "prompts.txt", "--columns", roles).code == 0
    config = yaml.safe_load((folder / "pipeline.yaml").read_text())
    assert config["reward"]["columns"]["verdict_is"] == "0 or 1" and "columns" not in config["ppo"]
    done = init("--prompts", "votes.csv", "--columns", "{prompt: query}", "rewards.py", "--overwrite", "true")
    assert done.code == 0, done.err
    config = yaml.safe_load((folder / "pipeline.yaml").read_text())
    assert config["prompts"] == "votes.csv" and config["ppo"]["columns"] == {"prompt": "query"}


def test_a_model_folder_is_given_instead_of_rows(init, folder):
    for name, kind in (("rm", "reward_model"), ("sft", "sft")):
        (folder / name).mkdir()
        (folder / name / "report.json").write_text(json.dumps({"card": {"kind": kind}}))
    done = init("rm", "sft", "prompts.txt")
    assert done.code == 0, done.err
    config = yaml.safe_load((folder / "pipeline.yaml").read_text())
    assert config["reward_model"] == "rm" and config["sft_policy"] == "sft"
    assert stages("pipeline.yaml") == ["data", "ppo", "report"]


@pytest.mark.parametrize(
    "gib, offline, name",
    [
        (23.6, False, "Qwen/Qwen2.5-7B-Instruct"),
        (7.8, False, "Qwen/Qwen2.5-1.5B"),
        (3.9, False, EMBEDDED_MODEL),
        (23.6, True, EMBEDDED_MODEL),
        (None, False, EMBEDDED_MODEL),
    ],
)
def test_the_base_goes_by_the_memory_of_the_gpu(monkeypatch, gib, offline, name):
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: gib is not None)
    monkeypatch.setattr(machine.torch.cuda, "mem_get_info", lambda: (int(gib * 2**30) // 2, int(gib * 2**30)))
    monkeypatch.setattr(machine.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(machine, "try_to_load_from_cache", lambda *_: None)
    base = machine.choose_base()
    assert base.name == name and base.in_4bit == (name != EMBEDDED_MODEL)
    assert base.name not in "".join(base.others)


@pytest.mark.parametrize(
    "names",
    [("yes", "on", "null"), ("a b", "c: d", "e #f"), ("x\ny", "\u2028é", "1"), ("C:\\new", "'q'", '"r", [s]')],
    ids=["words of YAML", "spaces", "line breaks", "quotes"],
)
def test_names_of_columns_and_files_survive_the_config(init, folder, names):
    prompt, better, worse = names
    rows = [{prompt: f"\x85Day {k}\u2028?\x80", better: f"Sunny, {k}.", worse: "No."} for k in range(12)]
    file = folder / "it's #1 – ümlaut: pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    roles = {"prompt": prompt, "chosen": better, "rejected": worse}
    done = init("--comparisons", file.name, "--columns", json.dumps(roles), "--output", "my config.yaml")
    assert done.code == 0, done.err
    config = yaml.safe_load((folder / "my config.yaml").read_text(encoding="utf-8"))
    assert config["comparisons"] == file.name and config["reward"]["columns"] == roles
    assert "--config 'my config.yaml'" in done.out


def test_a_conversation_is_shown_with_roles():
    user = {"role": "user", "content": "Hi"}
    assert quoted([user]) == '"Hi"' and quoted([SYSTEM, user]) == '"system: Be kind. / user: Hi"'
    assert quoted([SYSTEM, user, {"role": "assistant", "content": "Yes"}, user]) == '"system: Be kind. / … / user: Hi"'


def test_a_text_without_spaces_is_shown_from_its_beginning():
    assert quoted("天" * 100) == '"' + "天" * 60 + ' …"'
