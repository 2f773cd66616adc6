"""Reward models on encoders: plain rows, one score per row, and every new layer saved with the adapter."""

import pytest
import torch
import transformers as hf
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.heads import head_name, install_fp32_score, is_encoder
from hf_rlhf_ext.modeling.loading import load_base_model, load_tokenizer
from hf_rlhf_ext.reward.config import BradleyTerryConfig
from hf_rlhf_ext.reward.export import export_merged
from hf_rlhf_ext.reward.scorer import RewardScorer
from hf_rlhf_ext.reward.trainer import BradleyTerryTrainer

WORDS = ["sunny", "garden", "happy", "lazy", "fox", "words", "day", "quick", "user", "assistant", ":"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SIZES = {"vocab_size": len(SPECIAL + WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 40, "pad_token_id": 0}
ENCODERS = {
    "bert": (hf.BertConfig, SIZES, "classifier"),
    "roberta": (hf.RobertaConfig, SIZES | {"max_position_embeddings": 41}, "classifier.out_proj"),  # pad id 0: 40
    "deberta-v2": (hf.DebertaV2Config, SIZES | {"pooler_hidden_size": 32}, "classifier"),
    "distilbert": (
        hf.DistilBertConfig,
        {"vocab_size": SIZES["vocab_size"], "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "pad_token_id": 0}
        | {"max_position_embeddings": 40},
        "classifier",
    ),
    "modernbert": (
        hf.ModernBertConfig,
        SIZES | {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3},
        "classifier",
    ),
}


@pytest.fixture
def base(tmp_path):
    """Makes a folder with an encoder without a classification head, like published ones, and its tokenizer."""

    def make(name):
        folder = tmp_path / name
        config, sizes, _ = ENCODERS[name]
        torch.manual_seed(0)
        hf.AutoModel.from_config(config(**sizes)).save_pretrained(folder)
        tokenizer = hf.BertTokenizer(vocab={word: k for k, word in enumerate(SPECIAL + WORDS)})
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


def rows(kind="text"):
    """Pairs in which the happy answer is preferred."""
    made = []
    for k in range(48):
        other, prompt = WORDS[k % 8], WORDS[(k // 8) % 8]
        if other != "happy":
            chosen, rejected = f"{other} happy day", f"{other} lazy day"
            if kind == "messages":
                prompt = [{"role": "user", "content": prompt}]
                chosen, rejected = ([{"role": "assistant", "content": side}] for side in (chosen, rejected))
            made.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return made


@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_learns_and_reloads_to_the_bit(base, tmp_path, name, peft):
    folder = base(name)
    args = BradleyTerryConfig(
        str(tmp_path / "reward"), use_cpu=True, bf16=False, report_to="none", learning_rate=1e-2, num_train_epochs=3,
        save_strategy="no", disable_tqdm=True, activation_checkpointing=name in ("bert", "roberta"),
    )  # fmt: skip
    config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS") if peft else None
    model = load_base_model(folder, task="reward")
    assert is_encoder(model) and head_name(model) == ENCODERS[name][2] and model.dtype == torch.float32
    trainer = BradleyTerryTrainer(model, args, Dataset.from_list(rows()), peft_config=config)
    assert trainer.layout == "plain" and trainer.max_length == (1024 if name == "modernbert" else 40)  # rotary
    trainer.train()
    trainer.save_model()
    prompts, completions = ["sunny", "fox", "garden day"], ["happy day", "lazy day " * 18, ""]  # 40 tokens
    scorer = RewardScorer.from_pretrained(args.output_dir, device="cpu")
    trained = RewardScorer(trainer.model, trainer.processing_class).raw(prompts, completions)
    torch.manual_seed(7)  # whatever a load draws anew would differ
    assert RewardScorer.from_pretrained(args.output_dir, device="cpu").raw(prompts, completions) == trained
    assert scorer.raw(prompts, completions) == trained
    good, bad = scorer(["quick"] * 2, ["words happy day", "words lazy day"])
    assert good > bad


def test_text_is_closed_and_parted_by_separators_and_conversations_have_a_template(base):
    tokenizer = load_tokenizer(base("bert"))
    model = install_fp32_score(hf.AutoModelForSequenceClassification.from_pretrained(base("bert"), num_labels=1))
    seen = []
    scorer = RewardScorer(model, tokenizer)
    scorer.score_ids = lambda ids, per_prompt: seen.extend(tokenizer.convert_ids_to_tokens(one) for one in ids)
    scorer.raw(["sunny day"], ["happy"])
    scorer.raw([[{"role": "user", "content": "sunny day"}]], [[{"role": "assistant", "content": "happy"}]])
    assert seen[0] == ["[CLS]", "sunny", "day", "[SEP]", "happy", "[SEP]"]
    assert seen[1] == ["[CLS]", "user", ":", "sunny", "day", "[SEP]", "happy", "[SEP]"]


def test_limits_are_one_line(base, tmp_path):
    folder = base("bert")
    with pytest.raises(UserError, match="^completion 0 .*53 tokens.* 40"):
        RewardScorer(load_base_model(folder, task="reward"), load_tokenizer(folder)).raw(["sunny"], ["day " * 49])
    args = BradleyTerryConfig(str(tmp_path / "reward"), use_cpu=True, report_to="none")
    long = rows() + [{"prompt": "day " * 50, "chosen": "happy", "rejected": "lazy"}]
    with pytest.raises(UserError, match="over max_length=40"):
        BradleyTerryTrainer(folder, args, Dataset.from_list(long))
    with pytest.raises(UserError, match="`score` or `classifier`.*num_labels=1"):
        install_fp32_score(hf.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3))


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_plain_pipeline_gives_an_encoders_scores(base, tmp_path, name):
    folder = base(name)
    load_base_model(folder, task="reward").save_pretrained(tmp_path / "reward")
    load_tokenizer(folder).save_pretrained(tmp_path / "reward")
    assert export_merged(tmp_path / "reward", tmp_path / "merged", dtype="float32", device="cpu") < 1e-6
    scorer = RewardScorer.from_pretrained(tmp_path / "reward", dtype="float32", device="cpu")
    prompts = ["sunny day", [{"role": "user", "content": "sunny day"}]]
    completions = ["happy fox", [{"role": "assistant", "content": "lazy fox"}]]
    pipe = hf.pipeline("text-classification", model=str(tmp_path / "merged"), device="cpu")
    texts = [scorer.text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
    assert [one["score"] for one in pipe(texts)] == pytest.approx(scorer.raw(prompts, completions), abs=1e-6)


def test_a_ready_peft_model_that_would_lose_a_new_layer_is_refused(base, tmp_path):
    folder = base("deberta-v2")
    args = BradleyTerryConfig(str(tmp_path / "reward"), use_cpu=True, report_to="none")
    config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(load_base_model(folder, task="reward"), config)
    with pytest.raises(UserError, match="^model: layers pooler .*peft_config=.*modules_to_save="):
        BradleyTerryTrainer(model, args, Dataset.from_list(rows()), processing_class=load_tokenizer(folder))
