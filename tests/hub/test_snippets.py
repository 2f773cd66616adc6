"""The code in model cards reproduces the model: each block runs by itself and gives the outputs of training."""

import re
from pathlib import Path

import pytest
import torch
import transformers as hf
from datasets import Dataset
from huggingface_hub import HfApi
from peft import LoraConfig, PeftConfig, PromptTuningConfig, VeraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing

from hf_rlhf_ext import BradleyTerryConfig, BradleyTerryTrainer, RewardScorer, load_base_model
from hf_rlhf_ext.hub.card import KINDS, card_from_report, render_card
from hf_rlhf_ext.hub.merge import merge_run
from hf_rlhf_ext.hub.report import base_precision
from hf_rlhf_ext.hub.reports.trainer_report import trainer_report

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
MESSAGES = [{"role": "user", "content": "Describe a harbor town in one sentence."}]
TEXT = "A harbor town, described in one sentence:"


def blocks_of(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def codes_of(card: str) -> list[str]:
    """The blocks of a card, and what the sentence after its first one says of `pipeline`, as one more block."""
    blocks = blocks_of(card)
    (call,) = re.findall(r"`(pipeline\(.*\))` from `transformers`", card)
    loading, prompt = blocks[0].split("inputs = ")[0], repr(MESSAGES if "messages = [" in blocks[0] else TEXT)
    options = "max_new_tokens=48, do_sample=False, eos_token_id=tokenizer.eos_token_id, return_full_text=False"
    made = f"{call}({prompt}, {options})[0]['generated_text']"
    return [*blocks, f"from transformers import pipeline\n{loading}\nprint({made})"]


def run(code: str, capsys) -> tuple[dict, str]:
    """Runs a block in a namespace of its own. Returns the names and what was printed."""
    names: dict = {"__name__": "__main__"}
    capsys.readouterr()
    exec(compile(code, "block", "exec"), names)
    return names, capsys.readouterr().out


def moved(model, scale=0.3):
    """Moves all trained weights, so that the adapter changes what is generated."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(scale * torch.randn_like(parameter))
    return model.eval()


def greedy(model, tokenizer, prompt) -> str:
    """The completion that the code of a card prints, computed without it."""
    if isinstance(prompt, str):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    else:
        rendered = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(rendered, add_special_tokens=False, return_tensors="pt")["input_ids"]
    mask = torch.ones_like(ids)
    stop = tokenizer.eos_token_id
    made = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=48, do_sample=False, eos_token_id=stop, pad_token_id=0
    )
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture
def base(tiny_llama, chat_tokenizer, tmp_path, monkeypatch):
    """Folder of a base, in the working folder."""
    for part in (tiny_llama, chat_tokenizer):
        part.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    return str(tmp_path / "base")


def save_policy(base, tokenizer, config, folder="policy", rows=None, **options):
    model = load_base_model(base, **{"dtype": "float32"} | options)
    if rows:
        model.resize_token_embeddings(rows)
    policy = moved(get_peft_model(model, config))
    policy.save_pretrained(folder, save_embedding_layers=True if rows else "auto")
    tokenizer.save_pretrained(folder)
    return policy


# --- policies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_policy_is_the_one_that_was_trained(dtype, base, chat_tokenizer, capsys):
    """The base is stored in fp32, and the machine may prefer either."""
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    policy = save_policy(base, chat_tokenizer, lora, dtype=dtype)
    options = {"base_model": base, "repo_id": "./policy", "adapter": {"type": "LORA"}, **base_precision(policy)}
    blocks = codes_of(render_card("policy", {"ppo": {}}, **options))
    assert ["hf_rlhf_ext" in block for block in blocks] == [False, True, False]
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    wanted = greedy(policy, chat_tokenizer, MESSAGES)
    assert wanted != greedy(load_base_model(base, dtype=dtype), chat_tokenizer, MESSAGES)
    for block in blocks:
        names, printed = run(block, capsys)
        assert torch.equal(names["model"].eval()(ids).logits, policy.eval()(ids).logits)
        assert printed.removesuffix("\n") == wanted


def test_a_policy_of_text_gets_text_although_its_base_has_a_chat_template(base, chat_tokenizer, capsys):
    policy = save_policy(base, chat_tokenizer, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    options = {"base_model": base, "repo_id": "./policy", "adapter": {"type": "LORA"}, "base_dtype": "float32"}
    wanted = greedy(policy, chat_tokenizer, TEXT)
    for block in codes_of(render_card("sft", {}, prompt_form="text", **options)):
        assert run(block, capsys)[1].removesuffix("\n") == wanted
    for form in ("messages", "mixed", None):
        assert all("messages = [" in block for block in blocks_of(render_card("sft", {}, prompt_form=form, **options)))


KINDS_OF_ADAPTERS = {
    "DoRA": (LoraConfig(target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"), {"use_dora": True}),
    "VeRA": (VeraConfig(target_modules=["q_proj"], r=8, task_type="CAUSAL_LM"), {}),
    "prompt tuning": (PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), {}),
    "layers trained as a whole": (
        LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM"),
        {"modules_to_save": ["embed_tokens"]},
    ),
}


@pytest.mark.parametrize("name", [*KINDS_OF_ADAPTERS, "new tokens"])
def test_every_kind_of_adapter_is_loaded_by_every_block(name, base, chat_tokenizer, capsys):
    """Given the repository alone, `pipeline` refuses some of them, and loads DoRA as something else without a word.

    Around the loaded model, it gives the same.
    """
    rows = None
    if name == "new tokens":
        rows = len(chat_tokenizer) + 5
        config, record = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), {"vocabulary": rows}
    else:
        config, record = KINDS_OF_ADAPTERS[name]
    policy = save_policy(base, chat_tokenizer, config, rows=rows)
    record = {"type": PeftConfig.from_pretrained("policy").peft_type.value, **record}
    options = {"base_model": base, "repo_id": "./policy", "adapter": record, "base_dtype": "float32"}
    blocks = codes_of(render_card("policy", {}, **options))
    assert len(blocks) == 3
    wanted = greedy(policy, chat_tokenizer, MESSAGES)
    for block in blocks:
        assert run(block, capsys)[1].removesuffix("\n") == wanted


def test_a_whole_model_and_an_adapter_without_a_known_base(base, chat_tokenizer, tiny_llama, capsys):
    blocks = blocks_of(render_card("model", {}, relation="finetune", repo_id="./base"))
    assert len(blocks) == 3
    wanted = greedy(tiny_llama, chat_tokenizer, MESSAGES)
    assert [run(block, capsys)[1].removesuffix("\n") for block in blocks] == [wanted] * 3
    policy = save_policy(base, chat_tokenizer, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    wanted = greedy(policy, chat_tokenizer, MESSAGES)
    for block in codes_of(render_card("policy", {}, repo_id="./policy", base_dtype="float32")):
        assert run(block, capsys)[1].removesuffix("\n") == wanted


def test_base_and_model_are_loaded_at_their_revisions(hub, base, chat_tokenizer, tiny_llama, capsys):
    """The main branches of both hold other weights than those of training."""
    api = HfApi()
    for name in ("alice/base", "alice/policy"):
        api.create_repo(name)
    api.upload_folder(repo_id="alice/base", folder_path=base)
    api.create_tag("alice/base", tag="v1")
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", revision="v1")
    policy = save_policy(base, chat_tokenizer, lora)
    config = PeftConfig.from_pretrained("policy")
    config.base_model_name_or_path, config.revision = "alice/base", "v1"
    config.save_pretrained("policy")
    Path("policy/README.md").unlink()  # PEFT's form names the local base
    api.create_branch("alice/policy", branch="round-2")
    api.upload_folder(repo_id="alice/policy", folder_path="policy", revision="round-2")
    moved(tiny_llama, 1.0).save_pretrained("newer")
    api.upload_folder(repo_id="alice/base", folder_path="newer")
    options = {"base_model": "alice/base", "repo_id": "alice/policy", "base_dtype": "float32", "revision": "round-2"}
    blocks = codes_of(render_card("policy", {}, base_revision="v1", adapter={"type": "LORA"}, **options))
    wanted = greedy(policy, chat_tokenizer, MESSAGES)
    assert [run(block, capsys)[1].removesuffix("\n") for block in blocks] == [wanted] * 3


# --- reward models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture, base_options, bf16",
    [
        ("llama", {"dtype": "float32"}, False),
        ("llama", {"dtype": "bfloat16"}, False),
        ("llama", {"dtype": "bfloat16"}, True),
        ("llama", {"dtype": "bfloat16", "load_in_4bit": True}, False),
        ("llama", {"dtype": "float32", "quantization_config": {"load_in_4bit": True}}, False),  # FP4
        ("llama", {"dtype": "float32", "quantization_config": {"load_in_8bit": True}}, False),
        ("gpt2", {"dtype": "float32"}, False),
        ("gpt2", {"dtype": "float32"}, True),
        ("gpt2", {"dtype": "bfloat16"}, False),
        ("bert", {"dtype": "float32"}, False),
        ("bert", {"dtype": "bfloat16"}, True),  # encoders are always fp32
    ],
    ids=str,
)
def test_the_plain_score_is_the_scorer_s(
    architecture, base_options, bf16, chat_tokenizer, tmp_path, capsys, monkeypatch
):
    """Adapters of decoders (with and without a chat template) and of an encoder: the card shows how to score them.

    The base is stored in fp32; the code loads it as it was in training, whatever dtype this machine prefers.
    """
    torch.manual_seed(0)
    quantized = not {"load_in_4bit", "quantization_config"}.isdisjoint(base_options)
    width = 128 if quantized else 32  # blocks of NF4 hold 64 weights
    small = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": len(chat_tokenizer)}
    small |= {"pad_token_id": chat_tokenizer.pad_token_id, "max_position_embeddings": 128}
    if architecture == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**small, intermediate_size=128))
    elif architecture == "gpt2":
        model, chat_tokenizer.chat_template = hf.GPT2LMHeadModel(hf.GPT2Config(**small)), None
    else:
        model = hf.BertModel(hf.BertConfig(**small, intermediate_size=48))
        chat_tokenizer.cls_token = chat_tokenizer.sep_token = chat_tokenizer.eos_token
        chat_tokenizer.chat_template = None  # the library has a default template for encoders
    for part in (model, chat_tokenizer):
        part.save_pretrained(tmp_path / "base")
    plain = [{"prompt": f"Tell {k}:", "chosen": "a happy day", "rejected": "no"} for k in range(4)]
    args = BradleyTerryConfig(str(tmp_path / "reward"), use_cpu=True, bf16=bf16, report_to="none", max_steps=2)
    args.model_init_kwargs = base_options
    peft_config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    trainer = BradleyTerryTrainer(str(tmp_path / "base"), args, Dataset.from_list(plain), peft_config=peft_config)
    trainer.train()
    trainer.save_model()
    report = trainer_report(trainer)
    trained = "float32" if architecture == "bert" else base_options["dtype"]
    assert report.card.base_dtype == trainer.normalization.base_dtype == trained
    assert report.card.load_in_4bit == trainer.normalization.load_in_4bit == ("load_in_4bit" in str(base_options))
    assert report.card.quantization == trainer.normalization.quantization
    monkeypatch.chdir(tmp_path)
    blocks = blocks_of(card_from_report(report, base_model=str(tmp_path / "base"), repo_id="./reward"))
    assert ("BitsAndBytesConfig" in blocks[0]) == quantized
    alone = float(run(blocks[0], capsys)[1])
    raw, reward = (float(line.strip("[]")) for line in run(blocks[-1], capsys)[1].splitlines())
    # bitsandbytes computes with other kernels on CPUs with bf16 instructions, which the library switches off.
    assert alone == pytest.approx(raw, abs=0.01 * abs(raw) if quantized else 1e-5) and abs(raw) > 1e-4
    normalization = trainer.normalization
    assert reward == pytest.approx((raw - normalization.mean) / normalization.std, abs=1e-5)


@pytest.fixture
def reward(base, chat_tokenizer):
    """Folder of a reward adapter whose score depends on it."""
    model = load_base_model(base, task="reward", dtype="float32")
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    args = BradleyTerryConfig("reward", use_cpu=True, bf16=False, report_to="none")
    trainer = BradleyTerryTrainer(model, args, rows, processing_class=chat_tokenizer, peft_config=lora)
    moved(trainer.model)
    trainer.save_model()
    return "reward"


@pytest.mark.parametrize("form", ["text", "messages"])
def test_a_merged_reward_model_scores_in_pipeline_too(form, reward, capsys):
    merge_run(reward, "merged", dtype="float32")
    options = {"relation": "merge", "repo_id": "./merged", "prompt_form": form, "encoder": False}
    merge = {"dtype": "float32", "base": "base", "max_score_difference": 1e-7}
    card = render_card("reward_model", {"merge": merge}, **options)
    blocks = blocks_of(card)
    assert len(blocks) == 3 and "differ from the adapter's by at most 1e-07" in card
    printed = [run(block, capsys)[1].splitlines() for block in blocks]
    if form == "text":
        example = (["How was your day?"], [" It was a good day, thank you."])
    else:
        prompt = [{"role": "user", "content": "How was your day?"}]
        example = ([prompt], [[{"role": "assistant", "content": "It was a good day, thank you."}]])
    (wanted,) = RewardScorer.from_pretrained(reward, dtype="float32").raw(*example)
    found = [float(lines[0].strip("[]")) for lines in printed]
    assert found == pytest.approx([wanted] * 3, abs=1e-4) and abs(wanted) > 1e-2
    unknown = options | {"encoder": None, "prompt_form": "text"}  # the end of an encoder's text would be doubled
    assert "pipeline" not in "".join(blocks_of(render_card("reward_model", {}, **unknown)))


def test_the_stop_token_may_be_the_pad_token(base, reward, chat_tokenizer, capsys):
    """Transformers would read the score at the last token that is no padding."""
    config = hf.AutoConfig.from_pretrained(base)
    config.pad_token_id = chat_tokenizer.eos_token_id
    config.save_pretrained(base)
    options = {"base_model": base, "repo_id": "./reward", "base_dtype": "float32", "adapter": {"type": "LORA"}}
    alone, library = blocks_of(render_card("reward_model", {}, **options))
    assert float(run(alone, capsys)[1]) == pytest.approx(
        float(run(library, capsys)[1].splitlines()[0].strip("[]")), abs=1e-5
    )


def test_the_tokenizer_may_add_the_stop_token(base, reward, chat_tokenizer, capsys):
    stop = (chat_tokenizer.eos_token, chat_tokenizer.eos_token_id)
    chat_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {stop[0]}", special_tokens=[stop])
    chat_tokenizer.save_pretrained(reward)
    options = {"base_model": base, "repo_id": "./reward", "base_dtype": "float32", "prompt_form": "text"}
    alone, library = blocks_of(render_card("reward_model", {}, encoder=False, **options))
    raw = float(run(library, capsys)[1].splitlines()[0].strip("[]"))
    assert float(run(alone, capsys)[1]) == pytest.approx(raw, abs=1e-5)


# --- what the code says ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_loaded_as_it_was_in_training(kind):
    def loading(**options):
        blocks = blocks_of(render_card(kind, {}, base_model=BASE, **options))
        for block in blocks:
            compile(block, kind, "exec")
        (call,) = re.findall(rf'from_pretrained\(\s*"{BASE}"([^)]*)\)', blocks[0])
        return " ".join(call.split())

    usual = loading()  # a report without this information
    assert "dtype" not in usual and "quantization" not in usual and "revision" not in usual
    assert 'dtype="bfloat16"' in loading(base_dtype="bfloat16")
    assert ', revision="abc"' in loading(base_revision="abc")
    assert 'dtype="bfloat16", quantization_config=four_bit' in loading(base_dtype="bfloat16", load_in_4bit=True)
    assert "quantization_config=four_bit" in loading(config={"load_in_4bit": True})  # from an older recipe
    eight = {"load_in_8bit": True, "llm_int8_threshold": 5.0}
    assert '"float16", quantization_config=eight_bit' in loading(base_dtype="float16", quantization=eight)
    made = render_card(kind, {}, base_model=BASE, quantization=eight)
    assert "llm_int8_threshold=5.0," in made and "8 bits" in made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("relation", ["adapter", "merge", "finetune"])
def test_transformers_come_first_then_pipeline_then_this_library(kind, relation):
    given = {"base_model": BASE, "repo_id": "someone/model", "adapter": {"type": "LORA"}, "relation": relation}
    card = render_card(kind, {}, **given)
    blocks = blocks_of(card)
    for block in blocks:
        compile(block, kind, "exec")
        assert '"someone/model"' in block
    assert "hf_rlhf_ext" not in "".join(blocks[:-1]) and "hf_rlhf_ext" in blocks[-1]
    assert ["pipeline" in block for block in blocks[1:-1]] == [True] * (len(blocks) - 2)
    assert "`pip install hf-rlhf-ext`" in card
    assert ("PeftModel" in blocks[0]) == (relation == "adapter")


def test_an_ensemble_is_loaded_by_this_library_alone():
    report = {"reward_model": {"members": [{"accuracy": 0.5}, {}], "combine": "min"}}
    card = render_card("reward_model", report, base_model=BASE, repo_id="alice/both", revision="b")
    assert "An ensemble of 2 reward models (combined by min), each of them an adapter of [" in card
    (block,) = blocks_of(card)
    compile(block, "block", "exec")
    assert 'RewardEnsemble.from_pretrained("alice/both", revision="b")' in block


def test_a_four_bit_policy_is_loaded_in_four_bits_by_every_block():
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    nf4["bnb_4bit_compute_dtype"] = "bfloat16"
    options = {"base_model": BASE, "repo_id": "a/b", "base_dtype": "bfloat16"}
    alone, library = blocks_of(render_card("policy", {}, quantization=nf4, **options))
    assert "BitsAndBytesConfig(\n    load_in_4bit=True,\n" in alone
    assert 'load_policy("a/b", dtype="bfloat16", load_in_4bit=True)' in library
    fp4 = nf4 | {"bnb_4bit_quant_type": "fp4"}
    for block in blocks_of(render_card("policy", {}, quantization=fp4, **options)):
        compile(block, "block", "exec")
        assert 'bnb_4bit_quant_type="fp4"' in block and "quantization_config=four_bit" in block
