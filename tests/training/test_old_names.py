"""`gradient_checkpointing`, the old name of `activation_checkpointing`: taken everywhere, and nobody is warned."""

import json
import subprocess
import sys
import warnings

import pytest
from trl import SFTConfig

from hf_rlhf_ext.cli.parsing import parse_recipe
from hf_rlhf_ext.compat import OLD_NAME_WARNINGS
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.memory.planner import plan_memory
from hf_rlhf_ext.ppo.config import PPOConfig
from hf_rlhf_ext.reward.config import BradleyTerryConfig
from hf_rlhf_ext.training.activation_checkpointing import with_possible_checkpointing
from hf_rlhf_ext.training.sft_config import CheckedSFTConfig

pytestmark = pytest.mark.xdist_group("processes")

CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}
KWARGS = {"use_reentrant": False}

# What a user runs: both trainers with the old name, and the recipe of SFT with the old name in its file. The messages
# about checkpointing would be errors; what else is deprecated in our own code is printed.
RUN = """
import sys, warnings

for category in (FutureWarning, DeprecationWarning):
    warnings.filterwarnings("always", category=category)
    warnings.filterwarnings("error", ".*checkpointing", category)
shown = []
warnings.showwarning = lambda text, kind, path, line, *rest: shown.append((kind, str(text), path))

from hf_rlhf_ext import BradleyTerryConfig, BradleyTerryTrainer, PPOConfig, PPOTrainer, load_policy
from peft import LoraConfig, PrefixTuningConfig

cpu = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "max_steps": 1}
cpu |= {"per_device_train_batch_size": 2, "disable_tqdm": True}
policy, tokenizer = load_policy("base", dtype="float32")
rows = [{"prompt": "a fox", "chosen": " happy", "rejected": " sad"}] * 2
args = BradleyTerryConfig("reward", gradient_checkpointing=True, **cpu)
assert args.activation_checkpointing
BradleyTerryTrainer("base", args, rows, peft_config=LoraConfig(task_type="SEQ_CLS", r=2)).train()
sizes = {"max_completion_length": 2, "num_mini_batches": 1, "num_ppo_epochs": 1, "critic": "head"}
prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
for on, adapter in ((True, LoraConfig(task_type="CAUSAL_LM", r=2)), (False, prefix)):
    policy, tokenizer = load_policy("base", dtype="float32")
    args = PPOConfig("ppo", gradient_checkpointing=on, **sizes, **cpu)
    assert args.activation_checkpointing is on
    score = lambda completions, **_: [float(len(text)) for text in completions]
    rows = [{"prompt": "a fox"}, {"prompt": "happy"}]
    PPOTrainer(policy, score, args, rows, processing_class=tokenizer, peft_config=adapter).train()

from hf_rlhf_ext.cli.main import main

sys.argv = ["hf-rlhf", "sft", "--config", "sft.yaml", "--gradient_checkpointing_kwargs", '{"use_reentrant": false}']
main()
for kind, text, path in shown:
    if "hf_rlhf_ext" in path or "recipes" in path:
        print("deprecated in our code:", kind.__name__, text, path)
"""


@pytest.mark.parametrize("stage, kind", [("ppo", PPOConfig), ("reward", BradleyTerryConfig)])
def test_a_plan_turns_checkpointing_on_by_its_new_name(tiny_config, tmp_path, stage, kind):
    args = kind(str(tmp_path), per_device_train_batch_size=2, **CPU)
    assert args.activation_checkpointing
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*checkpointing_enable", FutureWarning)
        plan_memory(tiny_config, stage, args, prompt_tokens=8, completion_tokens=8)


@pytest.mark.parametrize("kind", [PPOConfig, BradleyTerryConfig, CheckedSFTConfig])
@pytest.mark.parametrize(
    "options, on",
    [
        ({}, True),  # TRL's default
        ({"gradient_checkpointing": False}, False),
        ({"activation_checkpointing": False}, False),
        ({"gradient_checkpointing": False, "activation_checkpointing": True}, True),  # the new name counts, as upstream
    ],
)
def test_a_config_takes_both_names_without_a_warning(tmp_path, kind, options, on):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        args = kind(str(tmp_path), gradient_checkpointing_kwargs=KWARGS, **options, **CPU)
    assert args.activation_checkpointing is args.gradient_checkpointing is on
    assert args.activation_checkpointing_kwargs == args.gradient_checkpointing_kwargs == KWARGS


def test_a_config_of_trl_still_warns_its_own_user(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for beginning, category in OLD_NAME_WARNINGS:  # as at the import of the library
            warnings.filterwarnings("ignore", beginning, category)
        with pytest.warns(FutureWarning, match="`gradient_checkpointing` is deprecated"):
            SFTConfig(str(tmp_path), gradient_checkpointing=True, **CPU)


def test_an_old_name_that_is_set_too_late_is_refused(tmp_path, tiny_llama):
    args = PPOConfig(str(tmp_path), **CPU)
    args.gradient_checkpointing = False
    with pytest.raises(UserError, match=r"^activation_checkpointing is True.*: pass activation_checkpointing when"):
        with_possible_checkpointing(args, tiny_llama, None)


@pytest.mark.parametrize(
    "content, words, on",
    [
        ("activation_checkpointing: true", "--gradient_checkpointing false", False),
        ("activation_checkpointing: true", "--gradient-checkpointing=false", False),
        ("activation_checkpointing: true", "--no_gradient_checkpointing", False),
        ("activation_checkpointing: false", "--gradient_checkpointing", True),
        ("gradient_checkpointing: false", "--activation_checkpointing true", True),
        ("gradient_checkpointing: true", "--gradient_checkpointing false", False),
        ("gradient_checkpointing: false", "", False),
        ("logging_steps: 1", "", True),
    ],
)
def test_the_command_line_overrides_the_file_under_either_name(tmp_path, content, words, on):
    file = tmp_path / "x.yaml"
    file.write_text(f"{content}\nuse_cpu: true\nbf16: false\noutput_dir: {tmp_path}\n")
    (args,) = parse_recipe(PPOConfig, ["--config", str(file), *words.split()])
    assert args.activation_checkpointing is args.gradient_checkpointing is on


def test_a_file_with_both_names_is_refused(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("gradient_checkpointing: true\nactivation_checkpointing: false\n")
    with pytest.raises(UserError, match="`gradient_checkpointing` is the old name of .*: keep one of them"):
        parse_recipe(PPOConfig, ["--config", str(file)])


def test_the_help_lists_the_new_name_only(capsys):
    with pytest.raises(SystemExit):
        parse_recipe(PPOConfig, ["--help-all"])
    words = capsys.readouterr().out
    assert "--activation_checkpointing" in words and "--gradient_checkpointing" not in words


def test_no_warning_about_checkpointing_reaches_a_user(tmp_path, tiny_llama, chat_tokenizer):
    tiny_llama.save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a fox", "completion": " jumps"}) + "\n")
    options = "use_cpu bf16 report_to max_steps model_name_or_path dataset_name output_dir".split()
    values = ["true", "false", "none", "1", "base", "rows.jsonl", "sft"]
    lines = [f"{name}: {value}" for name, value in zip(options, values, strict=True)]
    (tmp_path / "sft.yaml").write_text("\n".join([*lines, "gradient_checkpointing: true", "dtype: float32"]) + "\n")
    done = subprocess.run([sys.executable, "-c", RUN], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    said = (done.stdout + done.stderr).splitlines()
    assert [line for line in said if "deprecated" in line] == []
