"""A model or adapter without its head, or without any other weight, is refused in one line on every path."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.loading import attach_adapter, load_base_model, load_policy
from hf_rlhf_ext.modeling.stack import AdapterStack
from hf_rlhf_ext.ppo.assembly import shared_reward
from hf_rlhf_ext.ppo.rewards import RewardFunctions
from hf_rlhf_ext.reward.config import BradleyTerryConfig
from hf_rlhf_ext.reward.ensemble import RewardEnsemble, load_reward
from hf_rlhf_ext.reward.scorer import RewardScorer
from hf_rlhf_ext.reward.trainer import BradleyTerryTrainer
from tests.reward.examples import comparisons

TEXTS = (["Tell me:", "Tell a story:"], ["a sunny day", "happy"])
WHOLE_MODELS = {
    "RewardScorer": lambda folder: RewardScorer.from_pretrained(folder),
    "load_reward": lambda folder: load_reward(folder),
    "ensemble": lambda folder: RewardEnsemble.from_pretrained([folder, folder]),
    "reward_funcs": lambda folder: RewardFunctions(str(folder)),
}


@pytest.fixture(autouse=True)
def _reports_of_transformers(monkeypatch):
    """`caplog` gets what Transformers logs, too, which its own handler prints."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)


@pytest.fixture(scope="module")
def tokenizer(chat_tokenizer_factory):
    tokenizer = chat_tokenizer_factory()
    tokenizer.cls_token = tokenizer.sep_token = tokenizer.eos_token  # for encoders
    return tokenizer


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """Complete checkpoints: language models, reward models, and encoders."""
    root = tmp_path_factory.mktemp("checkpoints")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    models = {
        "lm": LlamaForCausalLM(LlamaConfig(**sizes)),
        "tied_lm": LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)),
        "reward": LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=1)),
        "tied_reward": LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=1, tie_word_embeddings=True)),
        "two_labels": LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=2)),
        "mlm": BertForMaskedLM(BertConfig(**sizes)),
        "encoder": BertForSequenceClassification(BertConfig(**sizes, num_labels=1)),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def adapters(folders, tokenizer):
    """Complete adapters: two reward adapters and a policy adapter on the same base."""
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        model = load_base_model(str(folders / "lm"), task="reward", dtype="float32")
        lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS", init_lora_weights=False)
        args = BradleyTerryConfig(str(folders / name), use_cpu=True, bf16=False, report_to="none")
        trainer = BradleyTerryTrainer(model, args, comparisons(2), processing_class=tokenizer, peft_config=lora)
        trainer.save_model()
    for name, task_type in (("policy", "CAUSAL_LM"), ("untyped_policy", None)):
        lora = LoraConfig(r=2, target_modules=["q_proj"], task_type=task_type)
        get_peft_model(load_base_model(str(folders / "lm"), dtype="float32"), lora).save_pretrained(folders / name)
        tokenizer.save_pretrained(folders / name)
    return folders


def changed(source: Path, folder: Path, change) -> Path:
    """A copy of a folder in which `change` was applied to the dict of weights."""
    shutil.copytree(source, folder)
    (file,) = folder.glob("*.safetensors")
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def without(*parts):
    def change(weights):
        return {key: value for key, value in weights.items() if not any(part in key for part in parts)}

    return change


def renamed(old, new):
    return lambda weights: {key.replace(old, new): value for key, value in weights.items()}


def refusal(call, caplog=None) -> str:
    """The one line with which `call` is refused; nothing else is said."""
    if caplog is not None:
        caplog.clear()
    with pytest.raises(UserError) as error:
        call()
    if caplog is not None:
        assert caplog.text == ""
    assert "\n" not in str(error.value)
    return str(error.value)


# Whole models as a reward


@pytest.mark.parametrize("path", WHOLE_MODELS)
def test_a_language_model_is_no_reward_model_on_any_path(path, folders, caplog):
    said = refusal(lambda: WHOLE_MODELS[path](folders / "lm"), caplog)
    assert str(folders / "lm") in said and "'score.weight'" in said and "give a trained reward model" in said


@pytest.mark.parametrize(
    "source, change, named",
    [
        ("tied_lm", without(), "'score.weight'"),
        ("reward", without("score"), "'score.weight'"),
        ("reward", renamed("score", "v_head.summary"), "it has 'v_head.summary.weight' instead"),
        ("reward", renamed("score", "value_head"), "it has 'value_head.weight' instead"),
        ("reward", without("layers.1.mlp.up_proj"), "'model.layers.1.mlp.up_proj.weight'"),
        ("two_labels", without(), "num_labels=1"),
        ("mlm", without(), "'classifier.bias', 'classifier.weight' and 2 more"),
        ("reward", lambda weights: weights | {"score.bias": torch.ones(1)}, "'score.bias'"),
        ("encoder", without("classifier"), "'classifier.bias', 'classifier.weight'"),
        ("encoder", without("pooler"), "'bert.pooler.dense.bias', 'bert.pooler.dense.weight'"),
        ("encoder", without("classifier.bias"), "'classifier.bias'"),
    ],
)
def test_a_reward_model_without_any_of_its_weights_is_refused(source, change, named, folders, tmp_path, caplog):
    folder = changed(folders / source, tmp_path / "model", change)
    assert named in refusal(lambda: RewardScorer.from_pretrained(folder), caplog)


@pytest.mark.parametrize("source", ["reward", "tied_reward", "encoder"])
def test_a_complete_reward_model_scores_the_same_at_every_load(source, folders, caplog):
    scores = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        scores.append(RewardScorer.from_pretrained(folders / source, dtype="float32")(*TEXTS))
    assert scores[0] == scores[1]
    assert "LOAD REPORT" not in caplog.text


def test_a_model_with_two_labels_is_refused_as_an_object_too(folders, tokenizer):
    model = LlamaForSequenceClassification.from_pretrained(folders / "two_labels")
    assert "num_labels=1" in refusal(lambda: RewardScorer(model, tokenizer))


# Training of new reward models


@pytest.mark.parametrize("source", ["lm", "tied_lm", "mlm", "reward", "encoder"])
def test_a_new_reward_model_is_trained_from_a_base_without_a_word(source, folders, caplog):
    model = load_base_model(str(folders / source), task="reward", dtype="float32")
    assert model.config.num_labels == 1
    assert caplog.text == ""


def test_a_head_with_another_name_is_not_dropped_in_silence_in_training(folders, tmp_path, caplog):
    folder = changed(folders / "reward", tmp_path / "model", renamed("score", "v_head.summary"))
    load_base_model(str(folder), task="reward")
    assert "'v_head.summary.weight', which this model does not use" in caplog.text


def test_a_base_with_missing_layers_is_refused_in_training_too(folders, tmp_path, caplog):
    folder = changed(folders / "lm", tmp_path / "model", without("layers.1."))
    said = refusal(lambda: load_base_model(str(folder), task="reward"), caplog)
    assert "'model.layers.1." in said and "more" in said and "not complete" in said


# Policies


@pytest.mark.parametrize(
    "source, change, named",
    [
        ("reward", without(), "does not generate text"),
        ("tied_reward", without(), "does not generate text"),  # with tied embeddings, no weight is missing
        ("two_labels", without(), "does not generate text"),
        ("lm", without("lm_head"), "'lm_head.weight'"),
        ("lm", without("layers.0.self_attn.q_proj"), "'model.layers.0.self_attn.q_proj.weight'"),
        ("tied_lm", without("norm"), "norm.weight'"),
    ],
)
def test_a_policy_without_any_of_its_weights_is_refused(source, change, named, folders, tmp_path, caplog):
    folder = changed(folders / source, tmp_path / "model", change)
    assert named in refusal(lambda: load_policy(folder), caplog)


def test_complete_policies_load_without_a_word(folders, caplog):
    for name in ("lm", "tied_lm"):
        load_policy(folders / name)
    assert caplog.text == ""


@pytest.mark.parametrize("kept", [50, 2000])
def test_a_file_that_was_cut_off_is_one_line(kept, folders, tmp_path):
    folder = changed(folders / "lm", tmp_path / "model", without())
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:kept])
    assert "damaged or incomplete" in refusal(lambda: load_policy(folder))


def test_parts_that_the_model_does_not_use_are_still_reported(folders, tmp_path, caplog):
    def with_another_layer(weights):
        more = {key.replace("layers.1.", "layers.2."): value.clone() for key, value in weights.items()}
        return weights | more

    folder = changed(folders / "lm", tmp_path / "model", with_another_layer)
    load_policy(folder)
    assert "layers.2" in caplog.text


# Adapters


def as_scorer(folder, folders):
    return RewardScorer.from_pretrained(folder)


def on_a_given_base(folder, folders):
    return RewardScorer.from_pretrained(folder, base=load_base_model(str(folders / "lm"), task="reward"))


def as_first_member(folder, folders):
    return RewardEnsemble.from_pretrained([folder, folders / "second"])


def as_second_member(folder, folders):
    return RewardEnsemble.from_pretrained([folders / "second", folder])


def beside_a_policy(folder, folders):
    """As `PPOTrainer` does: on the base of the policy."""
    stack = AdapterStack(load_policy(folders / "policy", dtype="float32")[0])
    return RewardFunctions(str(folder), share=lambda name: shared_reward(stack, name)).funcs[0]


ADAPTER_PATHS = [beside_a_policy, as_scorer, on_a_given_base, as_first_member, as_second_member]


@pytest.mark.parametrize("path", ADAPTER_PATHS)
@pytest.mark.parametrize(
    "change, named",
    [
        (without("score"), "the score head, which its configuration saves, is not in the adapter's file"),
        (renamed("score", "v_head"), "it has 'base_model.model.v_head.weight' instead"),
        (without("layers.1.self_attn.q_proj.lora_B"), "layers.1.self_attn.q_proj.lora_B.weight'"),
    ],
    ids=["head", "renamed", "lora"],
)
def test_a_reward_adapter_without_any_of_its_weights_is_refused(path, change, named, adapters, tmp_path):
    folder = changed(adapters / "first", tmp_path / "adapter", change)
    assert named in refusal(lambda: path(folder, adapters))


@pytest.mark.parametrize("path", ADAPTER_PATHS)
@pytest.mark.parametrize("name", ["policy", "untyped_policy"])
def test_a_policy_adapter_is_no_reward_model(path, name, adapters):
    said = refusal(lambda: path(adapters / name, adapters))
    assert str(adapters / name) in said and ("policy adapter" in said or "has no score head" in said)


@pytest.mark.parametrize("path", ADAPTER_PATHS)
def test_complete_reward_adapters_score(path, adapters):
    assert all(torch.tensor(path(adapters / "first", adapters)(*TEXTS)).isfinite())


@pytest.mark.parametrize("path", [as_scorer, beside_a_policy])
@pytest.mark.parametrize("lost", ["file", "half of the file"])
def test_an_adapter_without_its_file_is_one_line(lost, path, adapters, tmp_path):
    folder = changed(adapters / "first", tmp_path / "adapter", without())
    file = folder / "adapter_model.safetensors"
    content = file.read_bytes()
    file.unlink()
    if lost == "half of the file":
        file.write_bytes(content[: len(content) // 2])
    assert "adapter_model.safetensors" in refusal(lambda: path(folder, adapters))


def test_a_shared_reward_adapter_without_its_weights_is_refused(adapters, tmp_path):
    folder = changed(adapters / "first", tmp_path / "adapter", without("layers.1.self_attn.q_proj.lora_A"))
    stack = AdapterStack(load_policy(adapters / "policy", dtype="float32")[0])
    assert "lora_A.weight'" in refusal(lambda: stack.attach("reward", folder))


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_a_policy_adapter_without_a_module_that_it_saves_is_refused(module, folders, tmp_path):
    base = load_base_model(str(folders / "lm"), dtype="float32")
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[module], task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(tmp_path / "whole")
    folder = changed(tmp_path / "whole", tmp_path / "adapter", without(module))
    base = load_base_model(str(folders / "lm"), dtype="float32")
    said = refusal(lambda: attach_adapter(base, folder))
    assert module in said and "modules_to_save" in said
    assert not any("lora" in name for name, _ in base.named_parameters())  # refused before the base is changed


def test_a_policy_adapter_without_its_weights_is_refused(adapters, tmp_path):
    folder = changed(adapters / "policy", tmp_path / "adapter", without("layers.0.self_attn.q_proj.lora_B"))
    assert "lora_B.weight'" in refusal(lambda: load_policy(folder))


def test_a_reward_adapter_is_no_policy(adapters):
    said = refusal(lambda: load_policy(adapters / "first"))
    assert "is a reward adapter" in said and "SEQ_CLS" in said


# Task types


def adapter_config(task_type, **options):
    return LoraConfig(r=2, target_modules=["q_proj"], task_type=task_type, **options)


@pytest.fixture
def train(folders, tokenizer, tmp_path):
    def start(peft_config, model=None):
        args = BradleyTerryConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", max_steps=1)
        if model is None:
            model = load_base_model(str(folders / "lm"), task="reward", dtype="float32")
        return BradleyTerryTrainer(model, args, comparisons(2), processing_class=tokenizer, peft_config=peft_config)

    return start


OTHER_TASKS = ["CAUSAL_LM", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]


@pytest.mark.parametrize("task_type", [*OTHER_TASKS, None])
def test_a_task_type_that_freezes_the_head_is_refused(train, task_type):
    assert "task_type='SEQ_CLS'" in refusal(lambda: train(adapter_config(task_type)))


@pytest.mark.parametrize("task_type", OTHER_TASKS)
def test_a_head_to_save_makes_it_sequence_classification_with_a_word(train, task_type, caplog):
    config = adapter_config(task_type, modules_to_save=["score"])
    trainer = train(config)
    assert f"task_type is {task_type}, and a reward model needs SEQ_CLS" in caplog.text
    assert config.task_type == task_type  # the caller's own is unchanged
    trainer.train()
    trainer.save_model()
    live = RewardScorer(trainer.model, trainer.processing_class).raw(*TEXTS)
    assert RewardScorer.from_pretrained(trainer.args.output_dir).raw(*TEXTS) == live


def test_no_task_type_needs_only_the_head(train, caplog):
    trainer = train(adapter_config(None, modules_to_save=["score"]))
    trainer.save_model()
    assert "task_type" not in caplog.text
    live = RewardScorer(trainer.model, trainer.processing_class).raw(*TEXTS)
    assert RewardScorer.from_pretrained(trainer.args.output_dir).raw(*TEXTS) == live


def test_a_peft_model_that_answers_questions_is_refused(train, folders):
    base = load_base_model(str(folders / "lm"), task="reward", dtype="float32")
    model = get_peft_model(base, adapter_config("QUESTION_ANS", modules_to_save=["score"]))
    assert "task_type='SEQ_CLS'" in refusal(lambda: train(None, model))
