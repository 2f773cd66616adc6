"""Every mistake of a newcomer: exit status 2 and one line on stderr that says what, where and how to fix it."""

import os
import re
from importlib.util import find_spec

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
        "give a reward: --reward_model FOLDER, or --reward_funcs rewards.py:function."
    )
    assert refusal("ppo", temperature=0).startswith("temperature must be positive, got 0.0")
    for recipe in ("sft", "reward"):
        assert refusal(recipe, eval_strategy="steps", eval_steps=1) == (
            "eval_strategy: steps needs held-out rows: pass --eval_rows or --dataset_test_split, or --eval_strategy no."
        )
    assert refusal("reward", overflow="cut").startswith("`--overflow` needs one of error, drop,")


NOT_THERE = "nobody/nothing"
"""A Hub id, which is only looked for when the model is loaded. A folder would be looked for with the options."""

# The option as it is typed -> values that no run can use, for `sft`, `reward` and `ppo` alike.
IMPOSSIBLE = {
    "per_device_train_batch_size": (0, -1),
    "per_device_eval_batch_size": (0,),
    "gradient_accumulation_steps": (0,),
    "max_steps": (-5, 0),
    "learning_rate": (-1, "nan", "inf"),
    "weight_decay": (-1,),
    "max_grad_norm": (-1,),
    "warmup_steps": (-1,),
    "adam_beta1": (2,),
    "adam_epsilon": ("nan",),
    "neftune_noise_alpha": (-1,),
    "label_smoothing_factor": (2,),
    "seed": (-1, 2**32),
    "data_seed": (-1,),
    "save_total_limit": (0, -1),
    "logging_steps": (0, -1),
    "dataloader_num_workers": (-1,),
    "activation_checkpointing_kwargs": ("nope",),
    "lora_r": (0, -1),
    "lora_alpha": (0,),
    "lora_dropout": (-1, 2),
    "train_rows": (0, -1),
    "eval_rows": (-1,),
    "report_to": ("nope",),
    "deepspeed": ("nope.json",),
    "dtype": ("int8",),
    "optim": ("nope",),
    "lr_scheduler_type": ("nope",),
    "resume_from_checkpoint": ("nope/checkpoint-3",),
}
OF_REWARD = {
    "max_length": (0, -1),
    "dataset_num_proc": (0, -1),
    "center_rewards_coefficient": (-1,),
    "pad_to_multiple_of": (0,),
    "margin_scale": ("nan",),
    "members": (0,),
    "penalty": (-1,),
    "min_agreement": (0.2, 7),
    "max_length_gap": (-3,),
    "unrenderable": ("nope",),
}
OF_PPO = {
    "temperature": (0, "nan"),
    "num_ppo_epochs": (0,),
    "num_mini_batches": (0,),
    "kl_coef": (-1, "nan"),
    "gamma": (2,),
    "top_p": (0,),
    "top_k": (-1,),
    "max_completion_length": (0,),
    "max_prompt_length": (0, -1),
    "value_learning_rate": (-1,),
    "reward_scale": ("nan",),
    "length_penalty": ("nan",),
    "final_rows": (-1,),
    "early_stopping_patience": (0, -1),
    "num_completions_to_print": (-1,),
    "unrenderable": ("nope",),
}
OF_SFT = {"max_length": (0, -1), "dataset_num_proc": (0,), "mix_rows": (-1,)}


@pytest.mark.parametrize("recipe, own", [("sft", OF_SFT), ("reward", OF_REWARD), ("ppo", OF_PPO)])
def test_values_that_no_run_can_use_are_refused_before_a_model_is_loaded(refusal, recipe, own):
    for option, values in (IMPOSSIBLE | own).items():
        for value in values:
            # A model that is not there: the mistake in the option is found first.
            line = refusal(recipe, model_name_or_path=NOT_THERE, overwrite="true", **{option: value})
            assert option in line and "\n" not in line, (option, value, line)


@pytest.mark.parametrize("recipe", ["sft", "reward", "ppo"])
def test_steps_and_epochs_that_no_run_can_have(refusal, recipe):
    for event in ("save", "eval"):
        changes = {f"{event}_strategy": "steps", f"{event}_steps": -1, "eval_rows": 2}
        assert refusal(recipe, **changes).startswith(f"{event}_steps must be positive, got -1")
    line = refusal(recipe, max_steps=-1, num_train_epochs=0)
    assert line.startswith("num_train_epochs must be positive, got 0")


@pytest.mark.parametrize("recipe", ["sft", "reward", "ppo"])
def test_options_are_refused_by_all_commands_alike(refusal, recipe):
    says = {
        "logging_steps=0": "logging_steps must be positive, got 0",
        "max_grad_norm=inf": "max_grad_norm must not be infinite, got inf: set it to 0 for no limit",
        "deepspeed=x.json": "deepspeed: there is no file x.json",
        "optim=lomo": "optim='lomo' is not supported, as it updates the weights inside the backward pass",
        "optim=galore_adamw": "optim='galore_adamw' needs optim_target_modules",
        "lr_scheduler_kwargs={min_lr: 1}": "lr_scheduler_kwargs: '{min_lr: 1}' is not valid JSON",
        "accelerator_config=x.json": "accelerator_config: x.json cannot be read",
        "lora_task_type=SEQ_CLS": "`--lora_task_type` has no effect in",
        "optim_args=bogus=1": "optim_args='bogus=1' with optim=",
        "torch_dtype=float32": "`--torch_dtype` has a new name: use `--dtype`",
    }
    for typed, start in says.items():
        option, _, value = typed.partition("=")
        line = refusal(recipe, model_name_or_path=NOT_THERE, overwrite="true", **{option: value})
        assert line.startswith(start), (typed, line)


@pytest.mark.skipif(find_spec("wandb") is not None, reason="needs an environment without wandb")
@pytest.mark.parametrize("recipe", ["sft", "reward", "ppo"])
def test_a_tracker_that_is_not_installed(refusal, recipe):
    line = refusal(recipe, model_name_or_path=NOT_THERE, report_to="wandb")
    assert line.startswith("report_to: the package of wandb is not installed: pip install wandb")


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="needs an environment without deepspeed")
@pytest.mark.parametrize("recipe", ["sft", "reward"])  # ppo does not support it: tests/engines/test_refused.py
def test_deepspeed_that_is_not_installed(refusal, file, recipe):
    line = refusal(recipe, deepspeed=file("zero.json", "{}"))
    assert line.startswith("deepspeed: the package is not installed: pip install deepspeed")


@pytest.mark.parametrize("recipe", ["sft", "reward", "ppo"])
def test_layers_that_the_model_does_not_have(refusal, recipe):
    line = refusal(recipe, lora_target_modules="q_pro")
    assert line.startswith("peft_config: ") and "arget" in line
    assert "q_proj" in line  # a name that there is


@pytest.mark.parametrize("kernel", ["flash_attention_2", "nope"])
@pytest.mark.parametrize("recipe", ["sft", "reward", "ppo"])
def test_a_kernel_that_is_not_installed(refusal, recipe, kernel):
    line = refusal(recipe, attn_implementation=kernel)
    assert "attn_implementation" in line


@pytest.mark.parametrize("recipe", ["sft", "reward", "ppo"])
def test_an_output_folder_that_cannot_be_written(refusal, workspace, recipe):
    model = {"model_name_or_path": NOT_THERE}
    under_a_file = refusal(recipe, output_dir=workspace / "base" / "config.json" / "run", **model)
    assert under_a_file.startswith("output_dir: ") and "a part of the path is a file" in under_a_file
    is_a_file = refusal(recipe, output_dir=workspace / "pairs.jsonl", **model)
    assert is_a_file.startswith("output_dir: ") and "choose another folder" in is_a_file
    if os.path.isdir("/proc"):
        assert refusal(recipe, output_dir="/proc/run", **model).startswith("output_dir: /proc/run cannot be written")


def test_files_of_the_other_commands(call, workspace, tmp_path):
    for recipe in ("inspect_data", "check_reward"):
        changes = {"config": None, "model_name_or_path": None, "output_dir": workspace / "pairs.jsonl" / "run"}
        rewards = {"reward_model": NOT_THERE} if recipe == "check_reward" else {}
        assert line_of(call(recipe, **changes, **rewards)).startswith("output_dir: ")
    nothing = {"config": None, "model_name_or_path": None, "dataset_name": None}
    assert line_of(call("quickstart", **nothing, output_dir=workspace / "pairs.jsonl" / "run")).startswith(
        "output_dir: "
    )
    assert line_of(call("quickstart", **nothing, noise=-1)).startswith("noise must be at least 0")
    changes = {"config": None, "model_name_or_path": None, "output_dir": tmp_path, "reward_model": "x", "batch_size": 0}
    assert line_of(call("check_reward", **changes)).startswith("batch_size must be at least 1")


def test_options_of_a_mix_without_a_mix(refusal):
    for option, value in (("mix_rows", 4), ("category_rules", "rules.yaml")):
        assert refusal("sft", **{option: value}).startswith(f"{option} is a part of the mix, and there is none")


def test_what_trl_refuses_about_the_tokenizer(refusal):
    for recipe in ("sft", "reward"):
        for option in ("eos_token", "pad_token"):
            assert option in refusal(recipe, overwrite="true", **{option: "<nope>"})
        assert refusal(recipe, overwrite="true", chat_template_path="./nope.jinja")
    assert refusal("sft", assistant_only_loss="true", overwrite="true")
    assert refusal("sft", metric_for_best_model="nope", overwrite="true").startswith(
        "metric_for_best_model: evaluations have no 'nope': choose one of loss"
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
    assert '--columns "{prompt: question}"' in refusal("ppo", dataset_name=questions, config=None)
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
            "completion. Return a number there (the built-in judge has otherwise=0.0 for it).",
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
        ("my_rewards.lenght", "did you mean length"),
        ("./my_rewards.py:lenght", "did you mean length"),
        ("your_rewards.length", "no module 'your_rewards'"),
        ("length", "names no module or file"),
        ("my_rewards.__name__", "is a str, not a function"),
        ("broken_rewards.length", "broken_rewards.py, line 2: ZeroDivisionError: division by zero"),
        ("unreadable_rewards.py:length", "unreadable_rewards.py, line 1: SyntaxError"),
    ],
)
def test_a_reward_function_that_cannot_be_imported(refusal, workspace, path, reason):
    (workspace / "broken_rewards.py").write_text("SCALE = 1\nSCALE / 0\n")
    (workspace / "unreadable_rewards.py").write_text("def length(:\n")
    line = refusal("ppo", reward_funcs=path)
    assert re.search(rf"^reward_funcs: .*'{path}'.*{reason}", line)
