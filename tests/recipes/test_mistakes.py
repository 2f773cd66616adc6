"""The table of mistakes: each is one line that says where and what to do, before a model is loaded; exit status 2."""

import re

import pytest
import transformers
from datasets import Dataset

from hf_rlhf_ext import UserError

ALL = ("sft", "reward", "ppo")
ONE = ("reward",)  # what is checked in one place for all of them: how options are parsed, and the folder of the run
BEST = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "eval_rows": 2}
BEST |= {"load_best_model_at_end": "true"}

# Each row: the recipes, the options as they are typed, and words of the line. `{…}` are files of `mistakes`.
OPTIONS = [
    (ALL, {"num_train_epochs": 0, "max_steps": -1}, ["num_train_epochs must be positive", "max_steps"]),
    (ONE, {"num_train_epochs": -2, "max_steps": -1}, ["num_train_epochs must be positive"]),
    (ALL, {"learning_rate": 0}, ["learning_rate must be positive"]),
    (ONE, {"learning_rate": -1e-4}, ["learning_rate must not be negative"]),
    (ONE, {"learning_rate": "1e"}, ["learning_rate", "number"]),
    (ALL, {"max_steps": 0}, ["max_steps must be at least 1", "leave it out"]),
    (ONE, {"max_steps": "many"}, ["max_steps", "integer"]),
    (ALL, {"per_device_train_batch_size": 0}, ["per_device_train_batch_size must be at least 1"]),
    (ONE, {"per_device_eval_batch_size": 0}, ["per_device_eval_batch_size must be at least 1"]),
    (ONE, {"gradient_accumulation_steps": 0}, ["gradient_accumulation_steps must be at least 1"]),
    (ALL, {"metric_for_best_model": "accurcy"} | BEST, ["metric_for_best_model", "accurcy", "set it to|choose one of"]),
    (("reward",), {"metric_for_best_model": "accurcy"} | BEST, ["set it to accuracy"]),
    (("sft",), {"metric_for_best_model": "mean_token_accurcy"} | BEST, ["set it to mean_token_accuracy"]),
    (("ppo",), {"metric_for_best_model": "objective/score"} | BEST, ["set it to objective/scores"]),
    (ALL, {"report_to": "comet_ml"}, ["report_to", "comet_ml is not installed", "pip install comet"]),
    (ONE, {"report_to": "tensorbord"}, ["report_to", "did you mean tensorboard?"]),
    (("sft", "reward"), {"eval_strategy": "steps", "eval_steps": 1}, ["eval_strategy", "--eval_rows"]),
    (("ppo",), {"eval_strategy": "steps", "eval_steps": 1, "eval_rows": 0}, ["eval_strategy", "--eval_rows"]),
    (ALL, {"load_best_model_at_end": "true", "eval_strategy": "no"}, ["load_best_model_at_end", "eval"]),
    (ALL, {"eval_rows": 100}, ["eval_rows=100", "lower --eval_rows"]),
    (ONE, {"train_rows": 0}, ["train_rows must be at least 1"]),
    (ONE, {"bf16": "true", "fp16": "true"}, ["fp16", "bf16"]),
    (ONE, {"lora_r": 0}, ["lora_r"]),
    (ONE, {"dtype": "float23"}, ["dtype"]),
    (ONE, {"optim": "adamw_torhc"}, ["optim", "adamw_torch"]),
    (ONE, {"lr_scheduler_type": "cosin"}, ["lr_scheduler_type", "cosine"]),
    (ONE, {"seed": "abc"}, ["seed", "integer"]),
    (ONE, {"learning_rat": 1}, ["unknown option `--learning_rat`", "did you mean `--learning_rate`?"]),
    (ONE, {"config": "nope.yaml"}, ["nope.yaml"]),
    (ONE, {"output_dir": "{file}"}, ["output_dir", "choose another folder"]),
    (ONE, {"output_dir": "{file}/run"}, ["output_dir", "a part of the path is a file"]),
    (ONE, {"resume_from_checkpoint": "checkpoint-3"}, ["resume_from_checkpoint: no folder checkpoint-3"]),
    (ONE, {"resume_from_checkpoint": "true", "overwrite": "true"}, ["resume_from_checkpoint", "overwrite"]),
    (ALL, {"push_to_hub": "true"}, ["push_to_hub"]),
    (("ppo",), {"reward_funcs": None}, ["give a reward", "--reward_model", "--reward_funcs"]),
    (("ppo",), {"reward_funcs": "my_rewards.lenght"}, ["reward_funcs", "lenght", "length"]),
    (("ppo",), {"reward_funcs": "nope.length"}, ["reward_funcs", "nope"]),
    (("ppo",), {"eval_reward_funcs": "my_rewards.lenght"}, ["eval_reward_funcs", "lenght"]),
    (("ppo",), {"reward_weights": "1 2"}, ["reward_weights"]),
    (("ppo",), {"temperature": 0}, ["temperature must be positive"]),
    (("ppo",), {"max_completion_length": 0}, ["max_completion_length must be at least 1"]),
    (("ppo",), {"kl_coef": -1}, ["kl_coef must not be negative"]),
    (("ppo",), {"critic": "modelx"}, ["critic", "model"]),
    (("ppo",), {"critic": "model"}, ["critic", "value_model"]),
    (("ppo",), {"critic": "none"}, ["critic", "num_generations"]),
    (("ppo",), {"critic": "none", "num_generations": 2, "gamma": 0.9}, ["critic", "gamma"]),
    (("ppo",), {"critic": "none", "num_generations": 2, "value_model": "alice/v"}, ["value_model", "critic"]),
    (("ppo",), {"ptx_coef": 0.1}, ["ptx_coef", "ptx_dataset"]),
    (("ppo",), {"ptx_dataset": "nope.jsonl", "ptx_coef": 0.1}, ["nope.jsonl"]),
    (
        ("ppo",),
        {"early_stopping_patience": 2, "eval_strategy": "no"},
        ["early_stopping_patience|EarlyStopping", "eval_strategy"],
    ),
    (("reward",), {"members": 0}, ["members", "use 1 or more"]),
    (("reward",), {"min_agreement": 2}, ["min_agreement"]),
    (("sft",), {"mix_rows": 4}, ["mix_rows", "--mix"]),
]

DATA = [
    (ALL, {"dataset_name": None}, ["dataset_name is required", "--dataset_name"]),
    (ALL, {"dataset_name": "nope.jsonl"}, ["no file", "nope.jsonl", "check the path"]),
    (ALL, {"dataset_name": "{empty}", "dataset_test_split": None}, ["empty.jsonl", "it is empty"]),
    (ALL, {"dataset_name": "{file}"}, ["notes.docx", "unknown ending"]),
    (ALL, {"dataset_name": "{html}"}, ["page.jsonl", "cannot be read as json"]),
    (ALL, {"dataset_name": "{nothing}"}, ["nothing", "data files"]),
    (ALL, {"dataset_name": "{prompts}", "dataset_train_split": "tran"}, ["tran"]),
    (ALL, {"dataset_name": "{prompts}", "columns": "{{prompt: nope}}"}, ["nope", "prompt"]),
    (ALL, {"dataset_name": "{prompts}", "columns": "{{prompd: prompt}}"}, ["prompd", "prompt"]),
    (("sft",), {"dataset_name": "{prompts}"}, ["prompts.jsonl", "demonstrations"]),
    (("reward",), {"dataset_name": "{prompts}"}, ["prompts.jsonl", "comparisons"]),
    (("reward",), {"dataset_name": "demonstrations.jsonl"}, ["demonstrations.jsonl", "comparisons"]),
    (("sft",), {"dataset_name": "{scores}"}, ["scores.jsonl"]),
    (("ppo",), {"dataset_name": "{scores}"}, ["scores.jsonl|train_dataset", "prompt"]),
    (("sft", "reward"), {"dataset_format": "alpca"}, ["no format 'alpca'", "alpaca"]),
]

MODELS = [
    (ALL, {"model_name_or_path": "./nope"}, ["model_name_or_path", "no folder at ./nope", "Hub id"]),
    (ALL, {"model_name_or_path": "{nothing}"}, ["nothing", "config.json"]),
    (ALL, {"model_name_or_path": "{file}"}, ["notes.docx"]),
    (ALL, {"model_name_or_path": "{no_tokenizer}"}, ["no_tokenizer", "tokenizer"]),
    (("sft", "ppo"), {"model_name_or_path": "{classifier}"}, ["classifier|reward model", "language model"]),
    (("sft", "ppo"), {"model_name_or_path": "{reward_adapter}"}, ["reward model", "polic"]),
    (("ppo",), {"reward_funcs": None, "reward_model": "./nope"}, ["reward model: no folder at ./nope"]),
    (("ppo",), {"reward_funcs": None, "reward_model": "{policy_adapter}"}, ["policy adapter", "reward model's"]),
    (("ppo",), {"reward_funcs": None, "reward_model": "base"}, ["base", "reward model", "score"]),
    (("ppo",), {"reward_funcs": None, "reward_model": "my_rewards.py"}, ["my_rewards.py", "--reward_funcs"]),
    (("ppo",), {"reward_funcs": "{policy_adapter}"}, ["reward_funcs", "file.py:function"]),
    (("ppo",), {"value_model": "./nope", "critic": "model"}, ["value_model", "./nope"]),
    (ALL, {"model_name_or_path": "{too_few_rows}"}, ["row", "token", "'<think>'", "resize_token_embeddings|tokenizer"]),
]

CHECK = [
    ({"reward_model": None}, ["reward_model is required", "--reward_model"]),
    ({"reward_model": "./nope"}, ["./nope", "check the path"]),
    ({"reward_model": "{policy_adapter}"}, ["policy adapter", "reward model"]),
    ({"reward_model": "base"}, ["base", "score"]),
    ({"reward_model": "{nothing}"}, ["nothing"]),
    ({"dataset_name": None}, ["dataset_name is required"]),
    ({"dataset_name": "nope.jsonl"}, ["nope.jsonl", "check the path"]),
    ({"dataset_name": "{prompts}"}, ["prompts.jsonl", "comparisons"]),
    ({"dataset_name": "{empty}"}, ["empty.jsonl", "it is empty"]),
    ({"batch_size": 0}, ["batch_size must be at least 1"]),
    ({"eval_rows": -1}, ["eval_rows must be at least 0"]),
    ({"output_dir": "{file}"}, ["output_dir", "choose another folder"]),
    ({"reward_modle": "x"}, ["`--reward_modle`", "did you mean `--reward_model`?"]),
]

INSPECT = [
    ({"dataset_name": None}, ["dataset_name is required"]),
    ({"dataset_name": "nope.jsonl"}, ["nope.jsonl", "check the path"]),
    ({"dataset_name": "{prompts}"}, ["prompts.jsonl", "comparisons"]),
    ({"dataset_name": "{empty}"}, ["empty.jsonl", "it is empty"]),
    ({"dataset_name": "{html}"}, ["page.jsonl", "HTML"]),
    ({"max_length_gap": -3}, ["max_length_gap"]),
    ({"output_dir": "{file}"}, ["output_dir", "choose another folder"]),
    ({"seed": -1}, ["seed must be at least 0"]),
    ({"dataset_test_split": "tset"}, ["tset"]),
]

ROUNDS = [
    ({"prompts": None}, ["prompts is required", "--prompts"]),
    ({"prompts": "nope.jsonl"}, ["nope.jsonl", "check the path"]),
    ({"prompts": "{empty}"}, ["empty.jsonl", "it is empty"]),
    ({"prompts": "{scores}"}, ["scores.jsonl", "prompt"]),
    ({"rounds": 0}, ["rounds must be at least 1"]),
    ({"learner": "pop"}, ["learner", "ppo"]),
    ({"judge": "page"}, ["people", "--people"]),
    ({"judge": "pages"}, ["judge", "page"]),
    ({"rollout": 5}, ["rollout must be an even number"]),
    ({"temperature": 0}, ["temperature must be above 0"]),
    ({"learning_rate": 0}, ["learning_rate must be positive"]),
    ({"gold": "nope.gold"}, ["gold", "nope"]),
    ({"model_name_or_path": "./nope"}, ["model_name_or_path", "./nope"]),
    ({"model_name_or_path": "{classifier}"}, ["classifier|reward model", "language model"]),
    ({"model_name_or_path": "{reward_adapter}"}, ["reward model", "polic"]),
    ({"output_dir": "{file}"}, ["output_dir", "choose another folder"]),
    ({"seed": -1}, ["seed must be at least 0"]),
]

PLAIN = {"config": None, "model_name_or_path": None}
TABLE = []
for rows in (OPTIONS, DATA, MODELS):
    TABLE += [(recipe, changes, words) for recipes, changes, words in rows for recipe in recipes]
TABLE += [("check_reward", PLAIN | {"reward_model": "{reward_adapter}"} | changes, words) for changes, words in CHECK]
TABLE += [("inspect_data", PLAIN | changes, words) for changes, words in INSPECT]
OF_ROUNDS = PLAIN | {"dataset_name": None, "prompts": "{prompts}", "model_name_or_path": "base", "judge": "simulated"}
TABLE += [
    ("rounds", OF_ROUNDS | {"eval_prompts": 2, "prompts_per_round": 4} | changes, words) for changes, words in ROUNDS
]

MAY_LOAD = ("{too_few_rows}",)
"""What only the shape of the embeddings shows. Metrics of PPO are those of its rewards too, which must be loaded."""


def name_of(row):
    recipe, changes, _ = row
    own = {name: value for name, value in changes.items() if name not in PLAIN or value is not None}
    return f"{recipe} " + " ".join(f"{name}={value}" for name, value in list(own.items())[-2:])


@pytest.fixture(scope="session")
def mistakes(tmp_path_factory, workspace, save_base, write_jsonl, chat_tokenizer_factory):
    """Files and models that do not fit, by the names in the table."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    from hf_rlhf_ext.modeling.loading import load_base_model

    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "notes.docx").write_text("x")
    (folder / "empty.jsonl").write_text("")
    (folder / "page.jsonl").write_text("<!DOCTYPE html>\n<html><body>Not found</body></html>\n")
    (folder / "nothing").mkdir()
    write_jsonl(folder / "prompts.jsonl", [{"prompt": f"What is {k}?"} for k in range(12)])
    write_jsonl(folder / "scores.jsonl", [{"score": k, "id": str(k)} for k in range(12)])
    base = str(workspace / "base")

    for name, task in (("policy_adapter", "causal_lm"), ("reward_adapter", "reward")):
        model = load_base_model(base, task=task, dtype="float32")
        task_type, saved = ("SEQ_CLS", ["score"]) if task == "reward" else ("CAUSAL_LM", None)
        config = LoraConfig(task_type=task_type, target_modules=["q_proj"], modules_to_save=saved)
        get_peft_model(model, config).save_pretrained(folder / name)
        chat_tokenizer_factory().save_pretrained(folder / name)

    config = LlamaConfig.from_pretrained(base, num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(folder / "classifier")
    chat_tokenizer_factory().save_pretrained(folder / "classifier")
    LlamaForCausalLM.from_pretrained(base).save_pretrained(folder / "no_tokenizer")

    tokenizer = chat_tokenizer_factory()
    save_base(folder / "too_few_rows", tokenizer)
    tokenizer.add_tokens(["<think>"])
    tokenizer.chat_template = tokenizer.chat_template.replace("{% for", "<think>{% for", 1)
    tokenizer.save_pretrained(folder / "too_few_rows")
    torch.manual_seed(0)
    names = {path.name.split(".")[0]: path for path in folder.iterdir()}
    return names | {"file": folder / "notes.docx", "html": folder / "page.jsonl"}


@pytest.fixture
def no_model(monkeypatch):
    """Fails the test where the weights of a model are read."""

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", load)


@pytest.mark.parametrize("row", TABLE, ids=name_of)
def test_a_mistake_is_one_line_before_a_model_is_loaded(call, mistakes, request, tmp_path, row):
    recipe, changes, words = row
    is_metric_of_ppo = recipe == "ppo" and "metric_for_best_model" in changes
    if not is_metric_of_ppo and not any(value in MAY_LOAD for value in changes.values()):
        request.getfixturevalue("no_model")
    options = {"output_dir": tmp_path / "out"}
    if recipe == "ppo":
        options |= {"reward_funcs": "my_rewards.length"}
    for name, value in changes.items():
        options[name] = value.format(**mistakes) if isinstance(value, str) else value
    done = call(recipe, **(options))
    assert done.code == 2, done.err
    assert "Traceback" not in done.err
    lines = [line for line in done.said if not line.startswith("warning")]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.err
    for word in words:
        assert any(part in lines[0] for part in word.split("|")), (word, lines[0])
    assert re.search(r"[:(] ?\S", lines[0])


# The same in Python


@pytest.mark.parametrize("trainer", ["sft", "reward", "ppo"])
@pytest.mark.parametrize("config", ["SFTConfig", "BradleyTerryConfig", "PPOConfig", "TrainingArguments"])
def test_a_configuration_of_another_trainer_is_refused(no_model, workspace, tmp_path, trainer, config):
    import trl

    import hf_rlhf_ext
    from hf_rlhf_ext.hub.sft import PublishingSFTTrainer

    homes = {"SFTConfig": trl, "TrainingArguments": transformers}
    args = getattr(homes.get(config, hf_rlhf_ext), config)(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    rows = Dataset.from_list([{"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c"}])
    base = str(workspace / "base")
    own = {"sft": "SFTConfig", "reward": "BradleyTerryConfig", "ppo": "PPOConfig"}[trainer]
    with pytest.raises(UserError if config != own else AssertionError) as caught:
        if trainer == "sft":
            PublishingSFTTrainer(base, args=args, train_dataset=rows)
        elif trainer == "reward":
            hf_rlhf_ext.BradleyTerryTrainer(base, args=args, train_dataset=rows)
        else:
            hf_rlhf_ext.PPOTrainer(base, lambda completions, **columns: [0.0], args=args, train_dataset=rows)
    if config != own:
        assert f"args: got {config}: pass a" in str(caught.value) and own in str(caught.value)


def test_a_folder_without_a_tokenizer_is_no_mistake_if_one_is_given(mistakes, chat_tokenizer):
    from hf_rlhf_ext import load_policy

    with pytest.raises(UserError, match="tokenizer"):
        load_policy(mistakes["no_tokenizer"])
    model, tokenizer = load_policy(mistakes["no_tokenizer"], tokenizer=chat_tokenizer)
    assert tokenizer is chat_tokenizer and model.config.vocab_size == len(chat_tokenizer)
