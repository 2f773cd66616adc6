"""The model that a critic starts from: a reward model in any form starts with its raw scores; others are refused."""

import pytest
import torch
from datasets import Dataset
from peft import LilyConfig, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)

from hf_rlhf_ext import BradleyTerryConfig, BradleyTerryTrainer, RewardScorer
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.adapters import save_adapter
from hf_rlhf_ext.modeling.loading import load_base_model, load_tokenizer
from hf_rlhf_ext.modeling.logprobs import completion_hidden_states
from hf_rlhf_ext.ppo.value_model import load_value_model, prepare_value_model
from hf_rlhf_ext.reward.export import export_merged

TEXT = "Tell me about a sunny day"


def reward_lora(**more):
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS", **more)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, chat_tokenizer_factory):
    """A base, a reward adapter, the reward model merged, and a copy of that without our record."""
    root = tmp_path_factory.mktemp("value")
    tokenizer = chat_tokenizer_factory()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    rows = [{"prompt": "Tell", "chosen": " me" * k, "rejected": " fox"} for k in range(1, 5)]
    args = BradleyTerryConfig(
        str(root / "adapter"), max_steps=3, learning_rate=3e-2, use_cpu=True, bf16=False, report_to="none",
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    model = load_base_model(str(root / "base"), task="reward", dtype="float32")
    trainer = BradleyTerryTrainer(
        model, args, Dataset.from_list(rows), processing_class=tokenizer, peft_config=reward_lora()
    )
    trainer.train()
    trainer.save_model()
    export_merged(root / "adapter", root / "merged")
    model = LlamaForSequenceClassification.from_pretrained(root / "merged")
    model.save_pretrained(root / "plain")
    load_tokenizer(str(root / "base")).save_pretrained(root / "plain")
    return root


@pytest.fixture
def run(make_trainer, folders, chat_tokenizer):
    def make(value_model, **options):
        options = {"model": load_base_model(str(folders / "base"), dtype="float32")} | options
        options = {"max_steps": 2, "num_mini_batches": 1, "num_ppo_epochs": 1, "learning_rate": 1e-2} | options
        return make_trainer(
            value_model=value_model, **{"critic": "model", "processing_class": chat_tokenizer} | options
        )

    return make


@torch.no_grad()
def value_after(trainer, tokenizer):
    """The value of the critic after the last token of a text, which is where a reward model reads its score."""
    ids = torch.tensor([[*tokenizer(TEXT)["input_ids"], tokenizer.eos_token_id, 0]])
    trainer.model.eval()
    with trainer.stack.activate("value") as model:
        hidden = completion_hidden_states(
            model, model, ids, torch.tensor([ids.shape[1] - 1]), torch.ones(1, 1, dtype=torch.bool)
        )
    return float(trainer.value_head(hidden))


@pytest.mark.parametrize("kind", ["adapter", "merged", "plain", "loaded adapter", "loaded model"])
def test_a_critic_starts_with_the_raw_scores_of_a_reward_model(run, folders, chat_tokenizer, kind):
    scorer = RewardScorer.from_pretrained(folders / "adapter")
    (expected,) = scorer.raw([""], [TEXT])
    value_model = str(folders / kind)
    if kind == "loaded adapter":
        value_model = scorer.model
    elif kind == "loaded model":
        value_model = LlamaForSequenceClassification.from_pretrained(folders / "merged")
    trainer = run(value_model, reward_funcs=value_model if kind == "loaded model" else str(folders / "adapter"))
    assert value_after(trainer, chat_tokenizer) == pytest.approx(expected, abs=1e-5) and abs(expected) > 1e-2
    # Training the critic changes neither the rewards nor the model of the user.
    trainer.train()
    assert value_after(trainer, chat_tokenizer) != pytest.approx(expected, abs=1e-4)
    assert trainer.rewards.funcs[0].raw([""], [TEXT]) == pytest.approx([expected], abs=1e-5)
    assert scorer.raw([""], [TEXT]) == pytest.approx([expected], abs=1e-6)


def test_a_run_with_the_critic_of_an_adapter_resumes(run, folders, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    whole = run(str(folders / "adapter"), folder="whole", **options)
    whole.train()
    resumed = run(str(folders / "adapter"), folder="resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    for mine, wanted in zip(resumed.stack.parameters("value"), whole.stack.parameters("value"), strict=True):
        assert torch.equal(mine, wanted)


def test_an_adapter_of_a_language_model_starts_with_zeros(run, folders, tmp_path):
    model = get_peft_model(load_base_model(str(folders / "base"), dtype="float32"), LoraConfig(task_type="CAUSAL_LM"))
    save_adapter(model, "default", tmp_path / "policy")
    trainer = run(str(tmp_path / "policy"))
    assert torch.count_nonzero(trainer.value_head.weight) == 0
    assert type(trainer.stack.roles["value"].model) is LlamaForCausalLM


def test_an_adapter_on_a_tied_head_does_not_change_the_embedding(folders, tmp_path):
    base = LlamaForCausalLM(tiny(tie_word_embeddings=True))
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    before = base.get_input_embeddings().weight.detach().clone()
    model = get_peft_model(base, LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.ones_(parameter)
    save_adapter(model, "default", tmp_path / "policy")
    load_tokenizer(str(folders / "base")).save_pretrained(tmp_path / "policy")
    merged = load_value_model(str(tmp_path / "policy"))
    assert torch.equal(merged.get_input_embeddings().weight, before)
    assert not torch.equal(merged.get_output_embeddings().weight, before)


def test_an_adapter_that_peft_cannot_merge_is_one_line(folders, tmp_path):
    lily = LilyConfig(r=2, target_modules=["q_proj"], num_B=2, stride_A=1, task_type="SEQ_CLS")
    model = get_peft_model(load_base_model(str(folders / "base"), task="reward", dtype="float32"), lily)
    with pytest.raises(UserError, match="value_model: .* LILY cannot be merged.*use a reward model") as refused:
        prepare_value_model(model, LlamaForCausalLM(tiny()))
    assert "\n" not in str(refused.value)
    save_adapter(model, "default", tmp_path)
    load_tokenizer(str(folders / "base")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="export_merged: .* LILY cannot be merged.*RewardScorer.from_pretrained"):
        export_merged(tmp_path, tmp_path / "merged")


def tiny(**more):
    sizes = dict(vocab_size=384, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    return LlamaConfig(**sizes | dict(num_key_value_heads=2, pad_token_id=0) | more)


def bert():
    sizes = dict(vocab_size=384, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    return BertForSequenceClassification(BertConfig(**sizes, num_labels=1, pad_token_id=0))


def looking_ahead():
    model = LlamaForCausalLM(tiny(attn_implementation="eager"))
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"attention_mask": None}), with_kwargs=True
    )
    return model


def t5():
    sizes = dict(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, num_labels=1)
    return T5ForSequenceClassification(T5Config(**sizes))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LlamaForCausalLM(tiny(vocab_size=100)), "has rows for 100 tokens, but the policy's tokenizer has"),
        (bert, "BertForSequenceClassification reads later tokens"),
        (looking_ahead, "LlamaForCausalLM reads later tokens"),
        (t5, "T5ForSequenceClassification is an encoder-decoder"),
    ],
)
def test_a_critic_that_does_not_fit_is_one_line(run, make, message):
    torch.manual_seed(0)
    with pytest.raises(UserError, match=f"value_model: .*{message}") as error:
        run(make())
    assert "\n" not in str(error.value)


def test_another_vocabulary_and_other_mistakes_are_one_line(run, folders, chat_tokenizer, tmp_path):
    # The same tokens, two of them with each other's ids.
    swapped = (
        chat_tokenizer.backend_tokenizer.to_str().replace('"Q"', '"R*"').replace('"R"', '"Q"').replace('"R*"', '"R"')
    )
    backend = type(chat_tokenizer.backend_tokenizer).from_str(swapped)
    names = {"eos_token": chat_tokenizer.eos_token, "pad_token": chat_tokenizer.pad_token}
    other = type(chat_tokenizer)(tokenizer_object=backend, **names)
    LlamaForCausalLM(tiny()).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="value_model: its vocabulary is not that of the policy"):
        run(str(tmp_path / "other"))
    model = load_base_model(str(folders / "base"), dtype="float32")
    with pytest.raises(UserError, match="value_model: is the policy itself"):
        run(model, model=model, peft_config=None)
    prompt_tuning = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    base = load_base_model(str(folders / "base"), task="reward", dtype="float32")
    save_adapter(get_peft_model(base, prompt_tuning), "default", tmp_path / "prompt")
    with pytest.raises(UserError, match="value_model: .*PROMPT_TUNING have no weights to merge.*use a reward model"):
        run(str(tmp_path / "prompt"))
