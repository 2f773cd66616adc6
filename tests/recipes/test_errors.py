"""Every mistake of a newcomer: exit status 2 and one line on stderr that says what, where and how to fix it."""

import os

import pytest

HTML = "<!DOCTYPE html>\n<html><body>Not found</body></html>\n"

# Imported by every Python that starts with its folder on PYTHONPATH: bitsandbytes then looks as if never installed.
WITHOUT_BITSANDBYTES = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] == "bitsandbytes" else find(name, path, target)

PathFinder.find_spec = staticmethod(find_spec)
"""


def line_of(finished) -> str:
    """The one line after `error: `."""
    assert finished.code == 2, finished.err
    assert "Traceback" not in finished.err
    (line,) = finished.said
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.fixture
def refusal(call, tmp_path):
    def run(recipe: str, **changes) -> str:
        rewards = {"reward_funcs": "my_rewards.length"} if recipe == "ppo" else {}
        return line_of(call(recipe, **({"output_dir": tmp_path / "out"} | rewards | changes)))

    return run


@pytest.fixture
def file(tmp_path):
    """Writes a file and returns its path."""

    def write(name: str, text: str):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


# As processes: stderr is what a user sees


@pytest.mark.slow
def test_a_stale_yaml_key_is_all_that_stderr_says(start, file):
    config = file("mine.yaml", "output_dir: runs/x\nlearning_rte: 1.0e-4\n")
    done = start("reward", config=config)
    assert done.code == 2
    assert done.err == f"error: {config}: unknown key `learning_rte`: did you mean `learning_rate`?\n"


@pytest.mark.slow
def test_four_bit_without_bitsandbytes(start, tmp_path, file):
    file("sitecustomize.py", WITHOUT_BITSANDBYTES)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = start("sft", env={"PYTHONPATH": path}, load_in_4bit="true", output_dir=tmp_path / "out")
    line = line_of(done)
    assert line.startswith("load_in_4bit") and "pip install bitsandbytes" in line


# Options


def test_unknown_options(refusal):
    assert refusal("sft", learning_rte=1) == "unknown option `--learning_rte`: did you mean `--learning_rate`?"
    assert refusal("ppo", kl_coeff=1) == "unknown option `--kl_coeff`: did you mean `--kl_coef`?"


def test_options_that_are_missing_or_impossible(refusal):
    assert refusal("sft", dataset_name=None) == (
        "dataset_name is required: a Hub id, a file, or a folder (--dataset_name data.jsonl)."
    )
    assert refusal("ppo", reward_funcs=None) == (
        "give a reward: --reward_model FOLDER, or --reward_funcs package.module.function."
    )
    assert refusal("ppo", temperature=0).startswith("temperature must be positive, got 0.0")
    for recipe in ("sft", "reward"):
        assert refusal(recipe, eval_strategy="steps", eval_steps=1) == (
            "eval_strategy: steps needs held-out rows: pass --eval_rows or --dataset_test_split, or --eval_strategy no."
        )
    assert refusal("reward", overflow="cut").startswith(
        "argument --overflow: invalid choice: 'cut' (choose from 'error'"
    )


@pytest.mark.parametrize("recipe", ["sft", "reward", "ppo"])
def test_an_output_folder_that_is_not_empty(refusal, tmp_path, recipe):
    (tmp_path / "thesis.tex").write_text("precious")
    out = tmp_path
    not_empty = refusal(recipe, output_dir=out)
    assert not_empty.startswith(f"{out} is not empty: pass --resume_from_checkpoint true")
    assert "--overwrite true" in not_empty
    assert refusal(recipe, output_dir=out, overwrite="true").startswith(f"{out} was not made by hf_rlhf_ext")
    assert refusal(recipe, output_dir=out, resume_from_checkpoint="false").startswith(f"{out} is not empty")
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("recipe", ["sft", "reward", "ppo"])
def test_nothing_to_resume(refusal, tmp_path, recipe):
    assert refusal(recipe, resume_from_checkpoint="true") == (
        f"resume_from_checkpoint: no complete checkpoint in {tmp_path / 'out'}: start without it, or name a checkpoint."
    )


# Data


@pytest.mark.parametrize("recipe", ["sft", "reward", "ppo"])
def test_files_that_cannot_be_read(refusal, file, recipe):
    assert refusal(recipe, dataset_name="nope.jsonl") == (
        "dataset: no file or saved data set at nope.jsonl: check the path."
    )
    page = file("page.jsonl", HTML)
    reason = "JSON parse error" if recipe == "ppo" else "line 1 is not JSON, it looks like HTML"
    assert refusal(recipe, dataset_name=page).startswith(f"page.jsonl: cannot be read as json: {reason}")
    broken = file("broken.jsonl", '{"prompt": "a"\n')
    reason = "JSON parse error" if recipe == "ppo" else "line 1 is not JSON: "
    assert refusal(recipe, dataset_name=broken).startswith(f"broken.jsonl: cannot be read as json: {reason}")
    assert refusal(recipe, dataset_name=file("rows.docx", "x")).startswith("rows.docx: unknown ending; known are .json")


@pytest.mark.parametrize("recipe", ["sft", "reward", "ppo"])
def test_an_empty_data_set(refusal, file, recipe):
    empty = refusal(recipe, dataset_name=file("empty.jsonl", ""), dataset_test_split=None)
    assert empty == "empty.jsonl: cannot be read as json: it is empty"


def test_columns_that_are_missing(refusal, write_jsonl, file, tmp_path):
    questions = write_jsonl(tmp_path / "questions.jsonl", [{"question": f"What is {i}?"} for i in range(8)])
    for recipe, kind in {"sft": "demonstrations", "reward": "comparisons"}.items():
        line = refusal(recipe, dataset_name=questions)
        assert line.startswith(f"questions.jsonl: found columns question, no known {kind}: did you mean columns=")
        assert '"prompt": "question"' in line and line.endswith("(--columns)?")
    unknown = refusal("sft", dataset_name=questions, dataset_format="alpca")
    assert unknown.startswith("questions.jsonl: no format 'alpca'; known are orca, dolly, alpaca, ")
    assert refusal("ppo", dataset_name=questions, config=None) == (
        "train_dataset has no column 'prompt', only ['question']: rename yours to 'prompt'."
    )
    page = file("page.csv", HTML)  # to a csv reader a web page is a table
    assert refusal("sft", dataset_name=page).endswith("it looks like HTML: download the file again.")


def test_more_held_out_rows_than_there_are(refusal):
    sft = refusal("sft", eval_rows=12)
    assert sft.startswith("demonstrations.jsonl: 12 rows, none left to train on at eval_rows=12")
    reward = refusal("reward", train_rows=10, eval_rows=5)
    assert reward.startswith("pairs.jsonl: 2 held-out rows for eval_rows=5")
    ppo = refusal("ppo", eval_rows=9, dataset_test_split="validation")
    assert ppo.startswith("prompts: 4 held-out rows for eval_rows=9")
    assert all("lower --eval_rows" in line for line in (sft, reward, ppo))


def test_a_split_that_is_not_there(refusal):
    assert refusal("ppo", dataset_name="prompts/train.jsonl", dataset_test_split="validation") == (
        "train.jsonl: a file has no split 'validation': leave it out, or pass 'train[:500]'."
    )
    assert "'tset'" in refusal("ppo", dataset_name="prompts", dataset_test_split="tset")


# Models


@pytest.mark.parametrize("recipe", ["sft", "reward", "ppo"])
def test_a_model_that_is_not_there(refusal, recipe):
    assert refusal(recipe, model_name_or_path="./runs/nope") == (
        "model_name_or_path: no folder at ./runs/nope: check the path, or give a Hub id."
    )
    expected = "runs/nope is no folder here, and as a Hub id it cannot be loaded: We couldn't connect to"
    assert expected in refusal(recipe, model_name_or_path="runs/nope", overwrite="true")
    expected = "my/runs/nope is no folder here, and as a Hub id it cannot be loaded: Repo id must be"
    assert expected in refusal(recipe, model_name_or_path="my/runs/nope", overwrite="true")


def test_a_reward_model_that_is_not_there(refusal):
    assert refusal("ppo", reward_model="./nope").startswith("reward model: no folder at ./nope: check the path")
    expected = "reward model: runs/nope is no folder here, and as a Hub id it cannot be loaded: "
    assert refusal("ppo", reward_model="runs/nope").startswith(expected)


@pytest.fixture
def adapter(workspace, tmp_path, save_base, chat_tokenizer):
    """Saves a policy adapter that was trained on a base of another width than the one it names."""
    from peft import LoraConfig, get_peft_model

    from hf_rlhf_ext.modeling.loading import load_base_model

    def make(hidden_size: int) -> str:
        base = load_base_model(str(save_base(tmp_path / "other", chat_tokenizer, hidden_size)), dtype="float32")
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
        model.peft_config["default"].base_model_name_or_path = str(workspace / "base")
        model.save_pretrained(tmp_path / "adapter")
        return str(tmp_path / "adapter")

    return make


def test_an_adapter_of_another_base(refusal, adapter, workspace):
    folder = adapter(hidden_size=48)
    line = refusal("ppo", model_name_or_path=folder)
    assert line.startswith(f"{folder}: this adapter does not fit the base model {workspace / 'base'}: ")
    assert "48" in line and "32" in line


def test_a_policy_is_no_reward_model(refusal, adapter):
    folder = adapter(hidden_size=32)
    assert refusal("ppo", reward_model=folder) == (
        f"reward model: {folder} is a policy adapter, without a score head: give a reward model's."
    )


@pytest.fixture
def base_with(tmp_path, save_base, chat_tokenizer):
    """Saves a base whose tokenizer lacks something."""

    def make(**lacking):
        for name, value in lacking.items():
            setattr(chat_tokenizer, name, value)
        return save_base(tmp_path / "base", chat_tokenizer)

    return make


@pytest.mark.parametrize("recipe", ["sft", "reward", "ppo"])
def test_messages_without_a_chat_template(refusal, base_with, recipe):
    base = base_with(chat_template=None)
    assert refusal(recipe, model_name_or_path=base) == (
        f"the prompts are messages, but tokenizer '{base}' has no chat template: set `tokenizer.chat_template`, "
        "use an instruction-tuned model, or give prompts and completions as plain text."
    )


@pytest.mark.parametrize("recipe", ["sft", "reward", "ppo"])
def test_no_pad_token_is_no_mistake(call, base_with, tmp_path, recipe):
    """Padding is found by length everywhere, so that the stop token can stand in."""
    rewards = {"reward_funcs": "my_rewards.length"} if recipe == "ppo" else {}
    sizes = {"max_steps": 1} if recipe != "ppo" else {}
    base = base_with(pad_token=None)
    done = call(recipe, model_name_or_path=base, output_dir=tmp_path / "out", **sizes, **rewards)
    assert done.code == 0, done.err
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


# Reward functions


@pytest.mark.parametrize(
    "name, expected",
    [
        ("too_few", "reward function 'too_few' returned 1 scores for 2 completions: return one score each."),
        (
            "silent",
            "reward function 'silent' returned None for completion 0 of 2: at least one function must score every "
            "completion.",
        ),
        (
            "undefined",
            "reward function 'undefined' returned nan for completion 0: return a finite number, or None where another "
            "function scores the completion.",
        ),
    ],
)
def test_what_a_reward_function_must_not_return(refusal, name, expected):
    assert refusal("ppo", reward_funcs=f"my_rewards.{name}") == expected


@pytest.mark.parametrize(
    "path, reason",
    [
        ("my_rewards.lenght", "module 'my_rewards' has no attribute 'lenght'"),
        ("your_rewards.length", "No module named 'your_rewards'"),
        ("length", "Empty module name"),
    ],
)
def test_a_reward_function_that_cannot_be_imported(refusal, path, reason):
    assert refusal("ppo", reward_funcs=path) == (
        f"reward_funcs: cannot import '{path}' ({reason}): give package.module.function."
    )
