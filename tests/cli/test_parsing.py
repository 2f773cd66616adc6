"""The recipes' command line: what is accepted, and every refusal by its text."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.metadata import version

import pytest

from hf_rlhf_ext.cli.output import MARKER, prepare_output_dir, print_metrics
from hf_rlhf_ext.cli.parsing import parse_recipe, run_recipe
from hf_rlhf_ext.cli.progress import LOG_FILE
from hf_rlhf_ext.compat import versions
from hf_rlhf_ext.errors import UserError


@dataclass
class Recipe:
    renamed_options = {"max_row_count": "max_rows"}

    dataset_name: str = field(metadata={"help": "a data set"})
    overwrite: bool = False
    max_rows: int | None = None
    splits: list[str] = field(default_factory=lambda: ["train"])
    kind: str = field(default="pairs", metadata={"help": "what rows are", "choices": ["pairs", "ranks"]})
    careful: bool = field(default=True, metadata={"help": "look twice"})

    def __post_init__(self):
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"max_rows must be positive,\ngot {self.max_rows}")


@dataclass
class Values:
    unused_options = {"speed": "nothing moves", "quiet": "nothing is said"}
    refused_options = {"refused": "only 4 works"}

    max_rows: int | None = None
    share: float = field(default=0.5, metadata={"help": "A share of the rows. Not shown in the short help."})
    kind: str = field(default="pairs", metadata={"help": "what rows are", "choices": ["pairs", "ranks"]})
    splits: list[str] = field(default_factory=lambda: ["train"])
    sure: bool | None = None
    overwrite: bool = False
    speed: int = 1
    quiet: bool = True
    refused: int = 4


@pytest.fixture
def config(tmp_path):
    """Writes a YAML file and returns its path as text."""

    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def refusal(types, argv) -> str:
    with pytest.raises(UserError) as caught:
        parse_recipe(types, argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_yaml_fills_and_the_command_line_wins(config):
    path = config("dataset_name: mine\nmax_rows: 5\nsplits: [train, test]\n")
    (recipe,) = parse_recipe(Recipe, ["--config", path, "--max_rows", "7", "--overwrite"])
    assert recipe == Recipe("mine", overwrite=True, max_rows=7, splits=["train", "test"])
    assert parse_recipe((Recipe,), [f"--config={path}", "--overwrite", "false"])[0].max_rows == 5


def test_two_dataclasses_with_a_real_trl_config(config, tmp_path):
    from trl import RewardConfig

    path = config(
        # 1e-4 is text to YAML 1.1, 1.0e-4 a number: both must arrive as floats
        f"dataset_name: mine\noutput_dir: {tmp_path}/out\nlearning_rate: 1e-3\nweight_decay: 1.0e-2\nuse_cpu: true\n"
        "bf16: false\nlr_scheduler_type: cosine\nmax_length: null\nreport_to: none\n"
        "gradient_checkpointing_kwargs: {use_reentrant: false}\n"
    )
    recipe, args = parse_recipe((Recipe, RewardConfig), ["--config", path, "--max_steps", "3"])
    assert recipe.dataset_name == "mine"
    assert (args.learning_rate, args.weight_decay, args.max_steps, args.max_length) == (1e-3, 1e-2, 3, None)
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_unknown_names_come_with_the_near_match(config):
    from trl import RewardConfig

    path = config("dataset_name: x\nlearning_rte: 1.0e-4\n")
    assert refusal((Recipe, RewardConfig), ["--config", path]) == (
        f"{path}: unknown key `learning_rte`: did you mean `learning_rate`?"
    )
    path = config("dataset_name: x\nzzzzzz: 1\n")
    assert refusal(Recipe, ["--config", path]) == f"{path}: unknown key `zzzzzz`: see --help for all"
    assert refusal(Recipe, ["--dataset_nam", "x"]) == "unknown option `--dataset_nam`: did you mean `--dataset_name`?"
    assert refusal(Recipe, ["--max-row=3"]) == "unknown option `--max-row`: did you mean `--max-rows`?"


def test_an_old_name_says_the_new_one(config):
    line = refusal(Recipe, ["--dataset_name", "x", "--max_row_count", "3"])
    assert "`--max_row_count`" in line and "`--max_rows`" in line
    assert "`--max_rows`" in refusal(Recipe, ["--dataset_name", "x", "--max-row-count=3"])
    path = config("dataset_name: x\nmax_row_count: 3\n")
    line = refusal(Recipe, ["--config", path])
    assert line.startswith(f"{path}: `max_row_count`") and "`max_rows`" in line


def test_options_that_start_processes_say_where_they_belong(config):
    assert "hf-rlhf" in refusal(Recipe, ["--dataset_name", "x", "--num_processes", "2"])
    path = config("dataset_name: x\nnum_processes: 2\n")
    line = refusal(Recipe, ["--config", path])
    assert line.startswith(f"{path}: `num_processes`") and "--num_processes 2" in line


def test_a_config_that_is_shipped_is_found_by_its_name():
    line = refusal(Recipe, ["--config", "smollm2-135m/sft.yaml", "--dataset_name", "x"])
    assert "configs/smollm2-135m/sft.yaml: unknown key `output_dir`" in line
    assert "smollm2-135m/sft.yaml" in refusal(Recipe, ["--config", "smollm-135m/sft.yaml", "--dataset_name", "x"])


def test_a_config_file_that_cannot_be_used(config, tmp_path):
    missing = str(tmp_path / "no.yaml")
    assert refusal(Recipe, ["--config", missing]) == (
        f"{missing}: cannot read the config file (No such file or directory)"
    )
    assert refusal(Recipe, ["--config", str(tmp_path)]).endswith("cannot read the config file (Is a directory)")
    path = config("dataset_name: [a, b\nmax_rows: 3\n")
    assert refusal(Recipe, ["--config", path]).startswith(f"{path}, line 2, column 9: not valid YAML: ")
    path = config("- a\n- b\n")
    assert (
        refusal(Recipe, ["--config", path]) == f"{path}: must be a mapping of options, such as `learning_rate: 1.0e-4`"
    )
    assert "must be a mapping" in refusal(Recipe, ["--config", config("")])
    path = config("max_rows: 1\ndataset_name: x\nmax_rows: 2\n")
    assert refusal(Recipe, ["--config", path]) == f"{path}, line 3: `max_rows` is given twice: keep one"
    (tmp_path / "latin.yaml").write_bytes(b"dataset_name: caf\xe9\n")
    assert refusal(Recipe, ["--config", str(tmp_path / "latin.yaml")]).endswith("the config file is not UTF-8 text")


@pytest.mark.parametrize("argv", [["--config"], ["--config="], ["--config", "--overwrite"]])
def test_config_without_a_file(argv):
    assert refusal(Recipe, argv) == "`--config` needs a file: --config path/to/recipe.yaml"


def test_two_config_files(config):
    path = config("dataset_name: x\n")
    assert refusal(Recipe, ["--config", path, f"--config={path}"]).startswith("`--config` is given twice")


@pytest.mark.parametrize(
    "line, expected",
    [
        ("max_rows: many", "`max_rows` needs an integer, got 'many'"),
        ("max_rows: 2.5", "`max_rows` needs an integer, got 2.5"),
        ("max_rows: true", "`max_rows` needs an integer, got True"),
        ("max_rows: [1]", "`max_rows` needs an integer, got [1]"),
        ("overwrite: perhaps", "`overwrite` needs true or false, got 'perhaps'"),
        ("splits: train", "`splits` needs a list, got 'train'"),
        ("learning_rate: fast", "`learning_rate` needs a number, got 'fast'"),
        ("lr_scheduler_type: cosin", "`lr_scheduler_type` needs one of linear, cosine, "),
    ],
)
def test_a_yaml_value_of_the_wrong_kind(config, line, expected):
    from trl import RewardConfig

    path = config(f"dataset_name: x\n{line}\n")
    assert refusal((Recipe, RewardConfig), ["--config", path]).startswith(f"{path}: {expected}")


def test_command_line_values_are_refused_in_one_line():
    assert refusal(Recipe, ["--dataset_name", "x", "--max_rows", "many"]) == (
        "`--max_rows` needs an integer, got 'many'"
    )
    assert refusal(Recipe, []) == ("the following arguments are required: --dataset_name/--dataset-name (see --help)")
    assert refusal(Recipe, ["--dataset_name", "x", "--max_rows", "0"]) == "max_rows must be positive, got 0"
    assert refusal(Recipe, ["--dataset_name", "x", "my.yaml"]) == (
        "unexpected argument `my.yaml`: did you mean `--config my.yaml`?"
    )
    assert refusal(Recipe, ["--dataset_name", "x", "stray"]) == "unexpected argument `stray`: see --help"


def test_an_abbreviated_option_is_not_guessed():
    assert refusal(Recipe, ["--dataset_name", "x", "--max", "3"]).startswith("unknown option `--max`")


def test_help_prints_and_exits_even_with_a_bad_config(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_recipe(Recipe, ["--config", "no.yaml", "--help"], description="Trains a thing.")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "Trains a thing." in text and "--dataset_name" in text and "--config FILE.yaml" in text


def test_help_shows_choices_kinds_and_defaults_once(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        parse_recipe(Recipe, ["--help"], description="Trains a thing.\n\nhf-rlhf thing --x 1", defaults={"max_rows": 9})
    text = capsys.readouterr().out
    assert "Trains a thing.\n\nhf-rlhf thing --x 1\n" in text  # as it is written
    assert re.search(r"--kind \{pairs,ranks\}\s+what rows are \(default: pairs\)", text)
    assert re.search(r"--careful \[true\|false\]\s+look twice \(default: True\)", text)
    assert "--dataset_name TEXT" in text and "--max_rows INTEGER" in text
    assert "--no_careful" not in text and "--dataset-name" not in text  # taken, not shown
    assert parse_recipe(Recipe, ["--dataset-name", "x", "--no_careful"])[0].careful is False


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--max_rows"], "`--max_rows` needs an integer"),
        (["--max_rows", "--overwrite"], "`--max_rows` needs an integer"),
        (["--max-rows", "2.5"], "`--max_rows` needs an integer, got '2.5'"),
        (["--kind"], "`--kind` needs one of pairs, ranks"),
        (["--kind", "pair"], "`--kind` needs one of pairs, ranks, got 'pair': did you mean pairs?"),
        (["--splits"], "`--splits` needs a value"),
        (["--sure"], "`--sure` needs true or false"),
        (["--sure", "perhaps"], "`--sure` needs true or false, got 'perhaps'"),
        (["--share", "half"], "`--share` needs a number, got 'half'"),
    ],
)
def test_a_missing_or_wrong_value_says_which_values_there_are(argv, expected):
    line = refusal(Values, argv)
    assert line.startswith(expected) and "argument" not in line


@pytest.mark.parametrize("word, value", [("yes", True), ("ON", True), ("1", True), ("no", False), ("off", False)])
def test_switches_take_the_words_of_yaml(word, value):
    assert parse_recipe(Values, ["--sure", word])[0].sure is value
    assert parse_recipe(Values, [f"--overwrite={word}"])[0].overwrite is value


def test_options_without_effect_are_neither_listed_nor_taken(config, capsys):
    for argv in (["--speed", "3"], ["--speed=3"]):
        line = refusal(Values, argv)
        assert "`--speed` has no effect" in line and "nothing moves" in line and "leave it out" in line
    path = config("speed: 3\n")
    assert refusal(Values, ["--config", path]).startswith(f"{path}: `speed` has no effect")
    assert "`--no_quiet` has no effect" in refusal(Values, ["--no_quiet"])
    with pytest.raises(SystemExit):
        parse_recipe(Values, ["--help-all"])
    text = capsys.readouterr().out
    assert "--share" in text and "--speed" not in text and "--quiet" not in text and "--refused" not in text
    assert parse_recipe(Values, ["--refused", "4"])[0].refused == 4  # the dataclass decides


def help_of(argv, main_options, capsys, **options) -> str:
    with pytest.raises(SystemExit) as stop:
        parse_recipe(Values, argv, main_options=main_options, **options)
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_shows_the_main_options_in_groups_and_help_all_the_rest(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    groups = {"size": {"max_rows": "Rows to use, 100 % of them without it.", "share": ""}, "other": {"sure": "Sure?"}}
    text = help_of(["--help"], groups, capsys, defaults={"share": 0.25})
    # It has no default.
    assert re.search(r"size:\n  --max_rows INTEGER +Rows to use, 100 % of them without it\.\n", text)
    assert "A share of the rows. (default: 0.25)" in text and "Not shown" not in text
    assert "--kind" not in text and text.index("size:") < text.index("--share") < text.index("other:")
    assert text.rstrip().endswith("--help-all shows the other 3 options.")
    for name in ("--help-all", "--help_all"):
        text = help_of([name], groups, capsys)
        assert "--kind" in text and "--max_rows" in text and "Not shown" in text
    assert help_of(["--help"], ("kind",), capsys).count("--kind") == 1  # names alone
    assert "--kind" in help_of(["--help"], (), capsys)  # no main options: all of them


def test_a_stray_word_is_the_option_that_it_looks_like(tmp_path):
    from hf_rlhf_ext.cli.options import DataArguments, ModelArguments
    from hf_rlhf_ext.recipes.check_reward import CheckArguments

    model = tmp_path / "model"
    model.mkdir()
    (model / "adapter_config.json").write_text("{}")
    check, train = (DataArguments, CheckArguments), (DataArguments, ModelArguments)
    assert refusal(check, ["runs/reward"]).endswith("did you mean `--reward_model runs/reward`?")
    assert refusal(check, [str(model)]).endswith(f"did you mean `--reward_model {model}`?")
    assert refusal(check, ["runs/pairs.jsonl"]).endswith("did you mean `--dataset_name runs/pairs.jsonl`?")
    assert refusal(train, [str(model)]).endswith(f"did you mean `--model_name_or_path {model}`?")
    assert refusal(train, ["alice/pairs"]).endswith("did you mean `--dataset_name alice/pairs`?")


SCRIPT = """
import sys
from hf_rlhf_ext.cli import run_recipe
from hf_rlhf_ext.errors import UserError

def main():
    raise {raised}

if __name__ == "__main__":
    run_recipe(main)
    print("after")
"""


@pytest.mark.parametrize(
    "raised, status, stderr",
    [("UserError('row 3: no text')", 2, "error: row 3: no text\n"), ("KeyboardInterrupt", 130, "interrupted\n")],
)
def test_run_recipe_says_one_line(tmp_path, raised, status, stderr):
    script = tmp_path / "recipe.py"
    script.write_text(SCRIPT.format(raised=raised))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", stderr)


def test_run_recipe_lets_a_bug_keep_its_traceback():
    def main():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_recipe(main)


def files(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_new_or_empty_folder_gets_the_marker(tmp_path):
    new = tmp_path / "a" / "b"
    prepare_output_dir(new, resume=None, overwrite=False)
    assert files(new) == {MARKER}
    text = (new / MARKER).read_text()
    assert version("trl") in text and str(tmp_path) not in text
    prepare_output_dir(new, resume=None, overwrite=False)  # a run that died before it wrote anything may start again
    assert files(new) == {MARKER}


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_text("x")
    with pytest.raises(UserError) as caught:
        prepare_output_dir(tmp_path, resume=None, overwrite=False)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path} is not empty: pass --resume_from_checkpoint true")
    assert "--overwrite true" in message
    assert files(tmp_path) == {"model.safetensors"}


def test_overwrite_empties_only_what_we_made(tmp_path):
    ours, theirs, outside = tmp_path / "ours", tmp_path / "theirs", tmp_path / "outside"
    for folder in (theirs, outside):
        folder.mkdir()
        (folder / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"was not made by hf_rlhf_ext \(no hf_rlhf_ext.json\): .* --output_dir"):
        prepare_output_dir(theirs, resume=None, overwrite=True)
    prepare_output_dir(ours, resume=None, overwrite=False)
    (ours / "checkpoint-2").mkdir()
    (ours / "checkpoint-2" / "state").write_text("x")
    (ours / LOG_FILE).write_text("{}")
    (ours / "link").symlink_to(outside)  # the link goes, what it points to stays
    prepare_output_dir(ours, resume=None, overwrite=True)
    assert files(ours) == {MARKER}
    assert files(theirs) == files(outside) == {"thesis.tex"}


def test_resume_leaves_the_folder_as_it_is_and_never_claims_it(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    prepare_output_dir(tmp_path, resume=True, overwrite=False)
    assert files(tmp_path) == {"checkpoint-2"}  # no marker: a later overwrite must refuse it
    with pytest.raises(UserError, match="contradict each other"):
        prepare_output_dir(tmp_path, resume=True, overwrite=True)


def test_a_file_is_no_output_folder(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(UserError, match="output_dir: .*out cannot be written .a part of the path is a file.: choose"):
        prepare_output_dir(tmp_path / "out", resume=None, overwrite=True)


def test_only_rank_zero_prepares(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    prepare_output_dir(tmp_path / "out", resume=None, overwrite=False)
    assert not (tmp_path / "out").exists()


def test_versions_are_those_installed():
    found = versions()
    assert {name: found[name] for name in ("trl", "torch", "peft")} == {
        name: version(name) for name in ("trl", "torch", "peft")
    }
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert all(os.sep not in value for value in found.values())


def test_metrics_are_printed_one_per_line(capsys):
    print_metrics({"updates": 2, "kl": 0.12345, "kl_ci95": [-0.0714, 0.0331], "eval_rewards": [], "start": "a model"})
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["updates: 2", "kl: 0.123", "kl_ci95: -0.071, 0.033", "eval_rewards: none", "start: a model"]
