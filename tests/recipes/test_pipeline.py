"""The pipeline on a tiny model: what is given and what is missing, splits, stops, settings, report and cards."""

import csv
import datetime
import importlib
import io
import json
import operator
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers.trainer_callback import CallbackHandler

from hf_rlhf_ext.cli.functions import reward_function
from hf_rlhf_ext.cli.locking import only_process
from hf_rlhf_ext.cli.options import ModelArguments
from hf_rlhf_ext.cli.parsing import parse_recipe
from hf_rlhf_ext.errors import UserError

# Several tests share one finished run.
pytestmark = pytest.mark.xdist_group("recipes")

THINGS = ("rain", "snow", "fog", "hail", "wind", "dew", "frost", "mist", "ice", "sun")

REWARDS = '''
def short(completions, **kwargs):
    """Short answers are better."""
    return [-float(len(answer[0]["content"])) for answer in completions]


def broken(completions, **kwargs):
    return [answer["content"] for answer in completions]
'''

SECTIONS = {
    "sft": {"max_steps": 3, "per_device_train_batch_size": 2, "save_steps": 1},
    "reward": {"max_steps": 3, "per_device_train_batch_size": 2, "save_steps": 1},
    "ppo": {"max_steps": 8, "per_device_train_batch_size": 2, "max_completion_length": 4, "save_steps": 4},
}


def module(name: str):
    return importlib.import_module(f"hf_rlhf_ext.recipes.{name}")


@pytest.fixture(scope="module")
def pipeline():
    return module("pipeline")


@pytest.fixture(scope="module")
def data():
    return module("pipeline_parts.data")


@pytest.fixture(scope="module")
def training():
    return module("pipeline_parts.training")


@pytest.fixture(scope="module")
def place(tmp_path_factory, save_base, chat_tokenizer_factory, write_jsonl):
    """A folder with a tiny model, and files as a user has them."""
    folder = tmp_path_factory.mktemp("pipeline")
    save_base(folder / "base", chat_tokenizer_factory())
    with (folder / "pairs.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["question", "answer_a", "answer_b", "winner"])
        for number, thing in enumerate(THINGS * 2):
            question = f"What is {thing}?" if number < 10 else f"Who likes {thing}?"
            table.writerow([question, f"It is {thing}.", "No.", ("a", "b", "tie", "a")[number % 4]])
    (folder / "prompts.txt").write_text("".join(f"Explain {thing}.\n" for thing in THINGS) + "What is rain?\n")
    (folder / "rewards.py").write_text(REWARDS)
    turns = [
        [{"role": "user", "content": f"What is {thing}?"}, {"role": "assistant", "content": "Weather."}]
        for thing in THINGS
    ]
    write_jsonl(folder / "demos.jsonl", [{"messages": turn} for turn in turns])
    write_jsonl(
        folder / "text.jsonl", [{"prompt": f"Say {thing}", "chosen": " yes", "rejected": " no"} for thing in THINGS]
    )
    return folder


@pytest.fixture(scope="module")
def options(place):
    """The options of a run in the folder, with small sections."""
    kinds = module("pipeline_parts.options")

    def make(name: str, **changes):
        sections = {section: dict(small) | changes.pop(section, {}) for section, small in SECTIONS.items()}
        return kinds.PipelineArguments(output_dir=str(name), **sections, **changes)

    return make


@pytest.fixture(scope="module")
def run(place, options, pipeline):
    """Runs a pipeline in the folder; returns the report and what was printed: run("name", comparisons="pairs.csv")."""

    def start(name: str, *, kind=None, model="base", use_peft=True, **changes):
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.chdir(place)
            model_args = ModelArguments(model_name_or_path=model, lora_r=2, dtype="float32", use_peft=use_peft)
            report = pipeline.run_pipeline(options(name, **changes), model_args, kind=kind or pipeline.Pipeline)
        return report, out.getvalue() + err.getvalue()

    start.options = options
    return start


ALL = {
    "demonstrations": "demos.jsonl",
    "comparisons": "pairs.csv",
    "prompts": "prompts.txt",
    "reward_funcs": ["rewards.short"],
    "reward_weights": [1.0, 0.5],
}


@pytest.fixture(scope="module")
def whole(run):
    """A finished run on all files, and what it printed."""
    return run("whole", **ALL)


def rows_in(path):
    return [json.loads(line) for line in path.open()] if path.is_file() else []


# --- a whole run -----------------------------------------------------------------------------------------------------


def test_the_report_has_what_the_stages_measured(whole, place):
    report, printed = whole
    folder = place / "whole"
    assert json.loads((folder / "report.json").read_text()) == report
    for section, part in (("sft", "sft"), ("reward_model", "reward_model"), ("ppo", "policy")):
        own = json.loads((folder / part / "report.json").read_text())
        assert report[section] == own[section] | {"trained_rows": own["rows"]["train"]}
    checked = json.loads((folder / "check" / "report.json").read_text())
    assert report["check"][0]["verdict"] == checked["verdict"]
    assert report["check"][0]["accuracy"] == checked["metrics"]["accuracy"]
    table = (folder / "report.md").read_text()
    assert f"{report['sft']['eval_loss']:.3f}" in table
    for number in (report["reward_model"]["accuracy"], report["ppo"]["proxy_after"]):
        assert f"{number:.2f}" in table
    assert report["ppo"]["n"] == report["data"]["prompts"]["heldout"] > 0
    assert report["seconds"].keys() == {"data", "sft", "reward_model", "check", "ppo"}
    assert report["reward"] == "reward = 1 × reward model + 0.5 × short"
    # What became of each file, and that a model which knows nothing is no good reward.
    assert "demos.jsonl: 10 of 10 rows kept" in printed and "5 ties" in printed and "1 held out" in printed
    assert "warning: on held-out comparisons" in printed and "Not ready for PPO" in table
    assert "PPO runs anyway; require_ready: true would stop here." in printed
    assert "each prompt is asked as a user's message, like the prompts in demos.jsonl" in printed
    assert "to change it, set it under `reward:` in the config" in printed
    assert "heldout.jsonl" not in printed  # the data stage has said what is held out
    # One pair and two prompts say nothing, and an interval of equal values has no width.
    measured = table.split("## Completions")[0]
    assert "too few to tell" in printed and "too few to tell" in measured and "[" not in measured
    assert "below 0" in table
    assert "hf-rlhf chat whole" in table and "hf-rlhf push whole/policy" in table


def test_no_prompt_of_a_held_out_row_is_trained_on(whole, place, data):
    trained, heldout = set(), set()
    for role in ("demonstrations", "comparisons", "prompts"):
        folder = place / "whole" / "data" / role
        counts = whole[0]["data"][role]
        for name, keys, count in (("train", trained, counts["train"]), ("test", heldout, counts["heldout"])):
            rows = rows_in(folder / f"{name}.jsonl")
            assert len(rows) == count > 0
            keys |= {data.prompt_key(row["prompt"]) for row in rows}
    assert heldout and not trained & heldout


def test_cards_name_the_files_of_the_user_and_the_reward(whole, place):
    policy = (place / "whole/policy/README.md").read_text()
    assert "reward = 1 × reward model + 0.5 × short" in policy and "Not ready for PPO" in policy
    assert "local prompts.txt" in policy and "local rewards.py" in policy
    assert "local demos.jsonl" in (place / "whole/sft/README.md").read_text()
    reward = (place / "whole/reward_model/README.md").read_text()
    assert "local pairs.csv" in reward and "Check of the reward model" in reward
    assert str(place) not in policy + reward


def test_a_finished_run_is_kept_and_its_config_starts_it_again(whole, run, place, pipeline, monkeypatch):
    report, printed = run("whole", **ALL)
    assert printed.count("finished earlier, kept") == 5
    for name in ("sft", "reward_model", "check", "ppo", "data", "seconds"):
        assert report[name] == whole[0][name]
    monkeypatch.chdir(place)
    args, _, model_args = parse_recipe(pipeline.ARGUMENTS, ["--config", "whole/pipeline.yaml"])
    assert vars(args) == vars(run.options("whole", **ALL))
    assert (model_args.lora_r, model_args.dtype, model_args.model_name_or_path) == (2, "float32", "base")


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"seed": 1}, "seed: 0 then, 1 now"),
        ({"ppo": {"kl_coef": 0.2}}, "ppo.kl_coef: None then, 0.2 now"),
        ({"reward": {"ignore": "x"}}, "reward.ignore"),
        ({"prompts": "pairs.jsonl"}, "prompts: local prompts.txt"),
        ({"reward_weights": [1.0, 1.0]}, "ppo.reward_weights"),
        ({"demonstrations": None}, "demonstrations: local demos.jsonl"),
        ({"model": "base-2"}, "model: local base"),
        ({"ppo": {"ptx_dataset": "demos.jsonl"}}, r"ppo.ptx_dataset: None then, local demos.jsonl (sha256"),
    ],
)
def test_other_settings_of_a_begun_stage_are_refused(whole, run, place, changes, named, write_jsonl):
    write_jsonl(place / "pairs.jsonl", [{"prompt": "other"}])
    if not (place / "base-2").exists():
        shutil.copytree(place / "base", place / "base-2")
    with pytest.raises(UserError, match="holds a run with other settings") as caught:
        run("whole", **ALL | changes)
    assert named in str(caught.value) and "--overwrite true" in str(caught.value)


def test_a_changed_file_is_refused_by_name(whole, run, place):
    path = place / "pairs.csv"
    before = path.read_text()
    try:
        path.write_text(before + "What is new?,This.,That.,a\n")
        with pytest.raises(UserError, match=r"comparisons: local pairs\.csv \(sha256 \w+\) then, local pairs\.csv"):
            run("whole", **ALL)
    finally:
        path.write_text(before)


def test_a_second_process_is_kept_out(whole, run, place, monkeypatch):
    monkeypatch.chdir(place)
    with only_process("whole"), pytest.raises(UserError, match="another process"):
        run("whole", **ALL)


# --- stops -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_is_stopped_in_every_stage_ends_as_one_that_is_not(whole, run, place, monkeypatch):
    stopped = set()
    on_save = CallbackHandler.on_save

    def stop_once(self, args, *rest):
        control = on_save(self, args, *rest)
        if args.output_dir not in stopped:
            stopped.add(args.output_dir)
            raise KeyboardInterrupt
        return control

    monkeypatch.setattr(CallbackHandler, "on_save", stop_once)
    stops = 0
    while True:
        try:
            report, _ = run("stopped", **ALL)
            break
        except KeyboardInterrupt:
            stops += 1
            assert not (place / "stopped" / "report.json").exists()
    assert stops == 3
    straight = whole[0]
    assert report["sft"]["eval_loss"] == straight["sft"]["eval_loss"]
    for name in ("accuracy", "nll", "pairs"):
        assert report["reward_model"][name] == straight["reward_model"][name]
    assert report["check"][0]["accuracy"] == straight["check"][0]["accuracy"]
    for name in ("kl", "proxy_before", "proxy_after", "updates"):
        assert report["ppo"][name] == straight["ppo"][name], name
    weights = [load_file(place / name / "policy" / "adapter_model.safetensors") for name in ("whole", "stopped")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_options_of_a_stage_that_has_not_begun_may_be_corrected(run, place, pipeline):
    class Stops(pipeline.Pipeline):
        def check_reward(self):
            raise KeyboardInterrupt

    given = {"comparisons": "pairs.csv", "reward": {"max_steps": 1}}
    with pytest.raises(KeyboardInterrupt):
        run("corrected", kind=Stops, **given)
    with pytest.raises(UserError, match="reward.learning_rate"):  # it is finished
        run("corrected", comparisons="pairs.csv", reward={"max_steps": 1, "learning_rate": 0.5})
    report, printed = run("corrected", **given, ppo={"max_steps": 4})
    assert report["ppo"]["updates"] == 1
    # Comparisons only: from the base, on their prompts.
    assert "from the base model base" in printed
    assert "the 20 distinct prompts of the comparisons" in report["data"]["prompts"]["read"][0]
    prompts = rows_in(place / "corrected/data/prompts/train.jsonl")
    pairs = rows_in(place / "corrected/data/comparisons/train.jsonl")
    assert [row["prompt"] for row in prompts] == [row["prompt"] for row in pairs]
    assert (place / "corrected/policy/README.md").is_file() and not (place / "corrected/sft").exists()


@pytest.mark.slow
def test_a_reward_model_that_is_not_ready_stops_the_run_if_asked_to(run, place, pipeline):
    given = {"comparisons": "pairs.csv", "reward": {"max_steps": 1}}
    with pytest.raises(UserError, match="require_ready.*--require_ready false"):
        run("ready", require_ready=True, **given)
    report = json.loads((place / "ready/report.json").read_text())
    assert "ppo" not in report and not report["check"][0]["ready"]
    assert (place / "ready/reward_model/README.md").is_file()


def test_a_function_that_was_changed_is_tried_again(run, place, pipeline):
    class Stops(pipeline.Pipeline):
        def first_policy(self):
            raise KeyboardInterrupt

    path = place / "changing.py"
    path.write_text("def score(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    given = {"prompts": "prompts.txt", "reward_funcs": "changing.py:score"}
    with pytest.raises(KeyboardInterrupt):
        run("changing", kind=Stops, **given)
    manifest = json.loads((place / "changing/manifest.json").read_text())
    assert manifest["stages"].keys() == {"data"}
    path.write_text("def score(completions, **kwargs):\n    return [1.0]\n\n\n# It is too short.\n")
    with pytest.raises(UserError, match="reward_funcs: .*score"):
        run("changing", **given)
    path.write_text(
        "class Score:\n    def __call__(self, completions, **kwargs):\n        return [2.0] * len(completions)\n\n\n"
        "score = Score()\n"
    )
    with pytest.raises(KeyboardInterrupt):  # corrected, as PPO has not begun
        run("changing", kind=Stops, **given)
    now = json.loads((place / "changing/manifest.json").read_text())["settings"]["ppo.reward_funcs"]
    assert now != manifest["settings"]["ppo.reward_funcs"]
    assert list(now.values())[0].startswith("local changing.py (sha256")  # of an object, too, and without its folder


# --- unusual data and models -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_ensemble_of_whole_models(run, place):
    report, _ = run("ensemble", comparisons="pairs.csv", reward={"members": 2, "max_steps": 1}, use_peft=False)
    assert len(report["reward_model"]["members"]) == 2 and "verdict" in report["check"][0]
    assert (place / "ensemble/policy/config.json").is_file() and "proxy_after" in report["ppo"]
    assert "ensemble of 2" in (place / "ensemble/reward_model/README.md").read_text()


@pytest.mark.slow
def test_ties_only_are_trained_on_and_not_checked(run, place, write_jsonl):
    columns = {"prompt": "ask", "answers": ["a", "b"], "verdict": "label", "verdict_is": {"=": "tie", "x": "first"}}
    write_jsonl(place / "ties.jsonl", [{"ask": f"Name {n}", "a": "Yes", "b": "No", "label": "="} for n in range(9)])
    report, _ = run("ties", comparisons="ties.jsonl", reward={"columns": columns, "max_steps": 1}, ppo={"max_steps": 4})
    assert report["check"] == [{"model": "reward_model", "reason": "every held-out judgment is a tie"}]
    table = (place / "ties/report.md").read_text()
    assert "a tie, so its accuracy is not known" in table and "not checked: every held-out judgment is a tie" in table
    assert "nan" not in table.lower()
    assert "not done: every held-out judgment is a tie" in (place / "ties/policy/README.md").read_text()


@pytest.mark.slow
def test_long_and_few_rows(run, place, write_jsonl):
    """Prompts that leave no room for an answer are dropped before training. One prompt is enough for PPO."""
    turns = [{"role": "user", "content": "What? " + "word " * length} for length in (1, 3000, 1, 3000)]
    write_jsonl(place / "long.jsonl", [{"prompt": [turn]} for turn in turns[:2]])
    answer = {"role": "assistant", "content": "Yes."}
    write_jsonl(place / "long-demos.jsonl", [{"messages": [turn, answer], "rating": n} for n, turn in enumerate(turns)])
    given = {"demonstrations": "long-demos.jsonl", "prompts": "long.jsonl", "reward_funcs": "rewards.py:short"}
    report, printed = run("long", **given, sft={"min_rating": 1.0}, ppo={"max_steps": 4})
    assert "rows dropped: 2, as the prompt has more than 1023 tokens (max_length" in printed
    assert "rows dropped: 1, as the prompt has more than" in printed and "positions" in printed
    assert report["data"]["demonstrations"]["train"] == 2 and report["data"]["prompts"]["train"] == 1
    assert report["sft"]["trained_rows"] == 1 and "1 demonstrations" in (place / "long/report.md").read_text()
    assert report["ppo"]["updates"] == 1 and "proxy_before" not in report["ppo"]


def test_what_json_cannot_hold_and_what_is_too_long_is_refused(data, chat_tokenizer, tmp_path):
    path = tmp_path / "dates.parquet"
    Dataset.from_list([{"prompt": "a", "when": datetime.datetime(2026, 1, 1)}]).to_parquet(str(path))
    with pytest.raises(UserError, match="prompts: column when .*datetime in row 0"):
        data.read_prompts(str(path), module("pipeline_parts.data").DataArguments(dataset_name="x"))
    file = data.UserFile("prompts", "p.txt", [{"prompt": "word " * 50}])
    with pytest.raises(UserError, match="prompts: every row of p.txt .*8 tokens .the limit"):
        data.drop_long_prompts(file, chat_tokenizer, 8, "the limit")


# --- what is missing -------------------------------------------------------------------------------------------------


def test_demonstrations_only(run, place):
    report, printed = run("demos", demonstrations="demos.jsonl", sft={"max_steps": 1})
    assert "sft" in report and "ppo" not in report and "check" not in report
    assert "No PPO" in printed and "comparisons" in printed and "reward_funcs" in printed
    assert "hf-rlhf" in printed and "merge demos/sft" in printed
    assert (place / "demos/sft/README.md").is_file() and not (place / "demos/policy").exists()
    with pytest.raises(UserError, match="stages: data → sft → report then, data → sft → ppo → report now"):
        run("demos", demonstrations="demos.jsonl", sft={"max_steps": 1}, reward_funcs="rewards.py:short")


def test_a_function_and_prompts_only(run, place):
    report, printed = run("function", prompts="prompts.txt", reward_funcs="rewards.py:short", ppo={"max_steps": 4})
    assert report["reward"] == "reward = 1 × short" and "check" not in report and "reward_model" not in report
    assert "as the policy is asked in conversations" in printed
    assert rows_in(place / "function/data/prompts/train.jsonl")[0]["prompt"][0]["role"] == "user"


@pytest.mark.slow
def test_given_models_are_used_and_checked(whole, run, place):
    given = {"sft_policy": "whole/sft", "reward_model": "whole/reward_model", "comparisons": "pairs.csv"}
    report, printed = run("given", prompts="prompts.txt", ppo={"max_steps": 4}, **given)
    assert report["first_policy"] == "sft" and "sft" not in report and "reward_model" not in report
    assert "verdict" in report["check"][0] and "all of them check the reward model" in printed
    assert "comparisons" not in {path.name for path in (place / "given/data").iterdir()}
    assert "SFT policy: local sft" in (place / "given/policy/README.md").read_text()


# --- mistakes --------------------------------------------------------------------------------------------------------

MISTAKES = [
    ({}, "nothing to train on"),
    ({"demonstrations": "nothing.jsonl"}, "demonstrations: no file"),
    ({"demonstrations": "pairs.csv"}, "demonstrations: pairs.csv has comparisons"),
    ({"comparisons": "demos.jsonl"}, "comparisons: demos.jsonl has demonstrations"),
    ({"comparisons": "pairs.csv", "prompts": "demos.jsonl"}, "prompts: .*no column prompt"),
    ({"demonstrations": "demos.jsonl", "sft_policy": "whole/sft"}, "sft_policy: .*one of the two"),
    ({"reward_funcs": "rewards.short"}, "prompts: PPO needs prompts"),
    ({"reward_funcs": "rewards.long", "prompts": "prompts.txt"}, "reward_funcs: .*long"),
    ({"reward_funcs": "rewards.broken", "prompts": "prompts.txt"}, "reward_funcs: .*broken"),
    ({"comparisons": "pairs.csv", "reward_weights": [1.0, 2.0]}, r"reward_weights: 2 for 1 rewards"),
    ({"prompts": "prompts.txt", "reward_funcs": "rewards.short,rewards.short"}, "reward_funcs: .* given twice"),
    ({"prompts": "prompts.txt", "reward_model": "runs/wrong"}, "reward model: runs/wrong is no folder here"),
    ({"prompts": "prompts.txt", "reward_model": "whole/sft"}, "reward model: .*policy adapter"),
    ({"comparisons": "pairs.csv", "sft_policy": "whole/reward_model"}, "sft_policy: .*reward model"),
    ({"comparisons": "pairs.csv", "sft_policy": "runs/wrong"}, "sft_policy: runs/wrong is no folder here"),
    ({"comparisons": "pairs.csv", "sft_policy": "whole/sft", "model": "base-2"}, "the base of sft_policy is"),
    ({"comparisons": "pairs.csv", "ppo": {"eval_reward_funcs": ["rewards.py:no"]}}, "^ppo: eval_reward_funcs: .*no"),
    ({"comparisons": "pairs.csv", "ppo": {"eval_reward_model": ["./no"]}}, "^ppo: eval reward model: no folder"),
    ({"comparisons": "pairs.csv", "ppo": {"learning_rate": 0}}, "^ppo: learning_rate must be positive"),
    ({"demonstrations": "demos.jsonl", "sft": {"metric_for_best_model": "acc"}}, "^sft: metric_for_best_model"),
    ({"demonstrations": "demos.jsonl", "require_ready": True}, "require_ready"),
    ({"comparisons": "pairs.csv", "heldout_share": 0.6}, "heldout_share"),
    ({"comparisons": "pairs.csv", "model": "./nowhere"}, "no folder at ./nowhere"),
    ({"comparisons": "pairs.csv", "model": "whole/sft"}, "model_name_or_path: .*sft_policy"),
    ({"comparisons": "pairs.csv", "ppo": {"max_step": 1}}, "^ppo: unknown key `max_step`: did you mean `max_steps`"),
    ({"comparisons": "pairs.csv", "ppo": {"kl_coef": "much"}}, "^ppo: `kl_coef` needs a number"),
    ({"comparisons": "pairs.csv", "ppo": {"temperature": 0}}, "^ppo: temperature"),
    ({"comparisons": "pairs.csv", "ppo": {"output_dir": "x"}}, "^ppo: `output_dir` .*outside of the sections"),
    ({"comparisons": "pairs.csv", "reward": {"eval_rows": 3}}, "^reward: `eval_rows` .*heldout_share"),
    ({"comparisons": "pairs.csv", "reward": {"lora_r": 3}}, "^reward: `lora_r` .*outside of the sections"),
    ({"comparisons": "pairs.csv", "ppo": {"push_to_hub": True}}, "^ppo: `push_to_hub` .*hf-rlhf push x/policy"),
]


@pytest.mark.parametrize("changes, message", MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_mistake_is_one_line_and_leaves_nothing_behind(whole, run, place, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        run("x", **changes)
    assert "\n" not in str(caught.value)
    assert not (place / "x").exists()


def test_a_folder_with_other_files_is_refused(run, place):
    (place / "mine").mkdir()
    (place / "mine" / "thesis.txt").write_text("x")
    for changes in ({}, {"overwrite": True}):
        with pytest.raises(UserError, match="output_dir|not made by"):
            run("mine", comparisons="pairs.csv", **changes)
    assert (place / "mine" / "thesis.txt").is_file()


def test_the_command_line_and_sections(pipeline, tmp_path, monkeypatch, capsys):
    config = tmp_path / "mine.yaml"
    config.write_text("comparisons: a.csv\nreward_model: one\nppo: {max_steps: 4}\nprompts: p.txt\n")
    words = ["--config", str(config), "--reward_funcs", "r.py:a,r.py:b", "--reward_weights", "1,-0.5,2"]
    args, _, _ = parse_recipe(pipeline.ARGUMENTS, [*words, "--sft", "{learning_rate: 0.1}"])
    assert args.reward_model == ["one"] and args.reward_funcs == ["r.py:a", "r.py:b"]
    assert args.reward_weights == [1.0, -0.5, 2.0] and args.ppo == {"max_steps": 4}
    assert args.sft == {"learning_rate": 0.1} and args.stages() == ["data", "check", "ppo", "report"]
    monkeypatch.setattr(sys, "argv", ["pipeline", "--comparisons", "a.csv", "--kl_coef", "0.1"])
    with pytest.raises(UserError, match=r"`kl_coef` is an option of a stage: .*section \(ppo\)"):
        pipeline.main()
    args, _, _ = parse_recipe(pipeline.ARGUMENTS, ["--demonstrations", "d.csv", "--ppo", "{max_steps: 4}"])
    assert any("ppo" in line for line in args.unused()) is False  # the end of the run says what PPO needs
    args, _, _ = parse_recipe(pipeline.ARGUMENTS, ["--comparisons", "d.csv", "--sft", "{max_steps: 4}"])
    assert args.unused() == ["not used: the section sft, as there are no demonstrations"]


# --- rules -----------------------------------------------------------------------------------------------------------


def test_held_out_prompts_are_the_same_in_files_with_the_same_prompts(data):
    keys = [f"prompt {number}" for number in range(100)]
    drawn = data.drawn_prompts(keys, 0.1, seed=0)
    assert len(drawn) == 10 and drawn == data.drawn_prompts(list(reversed(keys)), 0.1, seed=0)
    assert drawn != data.drawn_prompts(keys, 0.1, seed=1)
    assert len(data.drawn_prompts(keys * 1, 0.5, seed=0)) == 50 and data.drawn_prompts(keys, 0, seed=0) == set()
    assert len(data.drawn_prompts(keys[:8], 0.1, seed=0)) == 1 and not data.drawn_prompts(keys[:7], 0.1, seed=0)
    many = [f"prompt {number}" for number in range(5000)]
    assert len(data.drawn_prompts(many, 0.1, seed=0)) == data.MOST_HELD_OUT
    # 30 rows of each of 3 prompts: one prompt, the smallest part that can be held out by prompt.
    assert len(data.drawn_prompts([f"prompt {number % 3}" for number in range(90)], 0.1, seed=0)) == 1
    assert data.drawn_prompts(["same"] * 90, 0.1, seed=0) == set()


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=40), min_size=1, max_size=3),
    st.floats(0, 0.5),
    st.integers(0, 3),
)
def test_no_split_leaks_or_loses_a_row(data, prompts, share, seed):
    files = []
    for role, numbers in zip(("demonstrations", "comparisons", "prompts"), prompts, strict=False):
        files.append(data.UserFile(role, role, [{"prompt": f"p{number}"} for number in numbers]))
    before = [list(file.train) for file in files]
    try:
        data.split_rows(files, share, seed)
    except UserError as error:
        assert "heldout_share" in str(error)
        return
    trained = {row["prompt"] for file in files for row in file.train}
    heldout = {row["prompt"] for file in files for row in file.heldout}
    assert not trained & heldout
    for rows, file in zip(before, files, strict=True):
        key = operator.itemgetter("prompt")
        assert sorted(file.train + file.heldout, key=key) == sorted(rows, key=key) and file.train


def test_turns_of_one_conversation_stay_on_one_side(data):
    first = [{"role": "user", "content": "Hi  there"}]
    second = [*first, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "More"}]
    system = [{"role": "system", "content": "Be kind."}, *first]
    assert {data.prompt_key(prompt) for prompt in (first, second, system, "Hi there ")} == {"Hi there"}


def test_text_becomes_messages_where_other_rows_are(data, place, monkeypatch):
    monkeypatch.chdir(place)
    _, _, prompts = files = [
        data.UserFile("demonstrations", "d", [{"prompt": [{"role": "user", "content": "a"}], "completion": []}]),
        data.UserFile("comparisons", "c", [{"prompt": "b", "completions": [" yes", " no"]}]),
        data.UserFile("prompts", "p.jsonl", [{"prompt": "c", "topic": "x"}]),
    ]
    data.in_one_form(files, asks_in_chat=lambda: pytest.fail("the rows decide"))
    assert files[1].train[0]["completions"][0] == [{"role": "assistant", "content": "yes"}]
    assert prompts.train == [{"prompt": [{"role": "user", "content": "c"}], "topic": "x"}] and prompts.lines
    # Text everywhere stays text; without other rows, a list of questions follows the model.
    text = data.UserFile("comparisons", "c", [{"prompt": "b", "completions": [" yes", " no"]}])
    lines = data.UserFile("prompts", "p.txt", [{"prompt": "c"}])
    data.in_one_form([text, lines], asks_in_chat=lambda: pytest.fail("the rows decide"))
    assert lines.train == [{"prompt": "c"}]
    # Questions and answers that would run on as one word are for the model to decide.
    question = data.UserFile("demonstrations", "q", [{"prompt": "Why?", "completion": "So."}])
    data.in_one_form([question], asks_in_chat=lambda: False)
    assert question.train == [{"prompt": "Why?", "completion": "So."}]
    data.in_one_form([question], asks_in_chat=lambda: True)
    assert question.train[0]["completion"] == [{"role": "assistant", "content": "So."}]
    assert "each answer is the assistant's" in question.lines[0]
    data.in_one_form([lines], asks_in_chat=lambda: False)
    assert lines.train == [{"prompt": "c"}]
    data.in_one_form([lines], asks_in_chat=lambda: True)
    assert lines.train == [{"prompt": [{"role": "user", "content": "c"}]}]


def test_numbers_in_quotes_are_numbers(training, options, place, monkeypatch):
    monkeypatch.chdir(place)
    args = options("x", demonstrations="demos.jsonl", sft={"num_train_epochs": "2", "learning_rate": "1e-4"})
    given = training.Training(args, ModelArguments(model_name_or_path="base")).given("sft")
    assert (given["num_train_epochs"], given["learning_rate"]) == (2.0, 1e-4)


def test_two_functions_of_one_name_have_two_sources(tmp_path):
    rewards = module("pipeline_parts.rewards")
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text(f"def short(completions):  # {name}\n    return []\n")
    names = [f"{tmp_path}/{name}.py:short" for name in ("a", "b")]
    sources = rewards.sources_of({name: reward_function(name, "reward_funcs") for name in names})
    assert list(sources) == ["short", "short 2"] and "local a.py" in sources["short"] and "b.py" in sources["short 2"]


def test_intervals_are_shown_from_twenty_on():
    report = module("pipeline_parts.report")
    assert report.with_interval(0.5, [0.4, 0.6], "+", n=20, unit="pair") == "+0.50 [+0.40, +0.60]"
    assert report.with_interval(1.0, [1.0, 1.0], n=19, unit="pair") == "1.00 (only 19 pairs: too few to tell)"
    assert report.with_interval(1.0, None, n=1, unit="prompt") == "1.00 (only 1 prompt: too few to tell)"


def test_a_verdict_on_few_pairs_says_so(capsys):
    entry = {"verdict": "…", "ready": True, "problems": [], "pairs": 30, "decided_pairs": 4, "better_than_chance": True}
    module("pipeline_parts.report").print_verdict(entry)
    assert capsys.readouterr().out == "Ready for PPO: no problem found, but in only 4 pairs: too few to tell.\n"
    module("pipeline_parts.report").print_verdict(entry | {"ready": False, "problems": ["its accuracy"]})
    assert capsys.readouterr().out.splitlines()[1:] == ["  - its accuracy", "  - only 4 pairs: too few to tell"]


def test_amounts_follow_from_the_rows(training, chat_tokenizer):
    assert [training.epochs_of(n) for n in (5, 99, 100, 299, 300, 9000)] == [3, 3, 2, 2, 1, 1]
    assert [training.updates_of(n) for n in (5, 256, 320, 5000)] == [8, 8, 10, 32]
    assert [training.batch_of(n) for n in (5, 64)] == [4, 8]
    assert training.warmup_steps(20, 1, 4) == 0 and training.warmup_steps(4000, 1, 8) == 5
    assert training.completion_length_of([], chat_tokenizer) == 64
    assert training.completion_length_of(["No."], chat_tokenizer) == 32
    assert training.completion_length_of(["x9" * 30] * 20, chat_tokenizer) == 64  # 60 tokens and the stop token
    assert training.completion_length_of(["x9" * 300], chat_tokenizer) == 256
