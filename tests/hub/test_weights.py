"""What is published is what was trained: merges are measured, tokenizers are there, others find the base."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from peft import LilyConfig, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from hf_rlhf_ext import RewardScorer, load_base_model, load_policy, push_run
from hf_rlhf_ext.data.prompt_form import PromptForm
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub import merge
from hf_rlhf_ext.hub.card import card_from_report
from hf_rlhf_ext.hub.merge import merge_run
from hf_rlhf_ext.hub.merge_check import PolicyProbe, check_scores
from hf_rlhf_ext.hub.report import MergeRecord, RunReport
from hf_rlhf_ext.hub.reports.folder_report import report_of_folder
from hf_rlhf_ext.hub.run_files import run_files
from hf_rlhf_ext.modeling.adapters import save_adapter
from hf_rlhf_ext.modeling.base_record import BaseRecord
from hf_rlhf_ext.modeling.probing import mean_difference, probe_logprobs, token_logprobs
from hf_rlhf_ext.reward.ensemble import RewardEnsemble
from hf_rlhf_ext.reward.scorer import RewardNormalization


def config_with(**options):
    return LoraConfig(**({"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options))


@pytest.fixture
def make_base(tiny_config, chat_tokenizer, tmp_path):
    """Writes a random model, with its tokenizer unless `tokenizer=False`, and returns its folder."""

    def make(name: str = "base", tokenizer: bool = True, seed: int = 0, **options) -> str:
        for option, value in options.items():
            setattr(tiny_config, option, value)
        torch.manual_seed(seed)
        LlamaForCausalLM(tiny_config).save_pretrained(tmp_path / name)
        if tokenizer:
            chat_tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return make


@pytest.fixture
def make_run(chat_tokenizer, tmp_path):
    """Trains nothing: writes an adapter whose weights were moved, as `trainer.save_model` would."""

    def make(base: str, config=None, *, scale=0.05, tokenizer=True, name="run", record=True, revision=None, **options):
        options = {"dtype": "float32", "revision": revision} | options
        model = get_peft_model(load_base_model(base, **options), config or config_with())
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += scale * torch.randn_like(parameter)
        folder = tmp_path / name
        save_adapter(model, "default", folder)
        PromptForm("messages").save(folder)
        if record:
            BaseRecord.of_model(model).save(folder)
        if tokenizer:
            chat_tokenizer.save_pretrained(folder)
        return folder, model.eval()

    return make


def on_hub(folder, repo_id="alice/base", **options):
    HfApi().create_repo(repo_id, exist_ok=True)
    HfApi().upload_folder(repo_id=repo_id, folder_path=folder, **options)
    return repo_id


def merge_record(folder) -> MergeRecord:
    return MergeRecord(**json.loads((folder / "report.json").read_text())["merge"])


# Merges


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [5, 40]},
        {"target_modules": ["lm_head", "embed_tokens"], "use_dora": True},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=["head_and_tokens", "dora", "modules_to_save"],
)
def test_a_merge_into_tied_weights_is_measured_on_texts(make_base, make_run, tmp_path, options):
    folder, policy = make_run(make_base(tie_word_embeddings=True), config_with(**options))
    merged = merge_run(folder, tmp_path / "merged", dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(merged).eval()
    assert not plain.config.tie_word_embeddings
    torch.testing.assert_close(probe_logprobs(plain), probe_logprobs(policy), atol=1e-4, rtol=0)
    assert 0 < merge_record(merged).mean_logprob_difference < 1e-5


def test_the_probe_sees_a_single_token_that_was_trained(make_base, make_run, chat_tokenizer):
    token = chat_tokenizer.convert_tokens_to_ids("z")
    _, policy = make_run(make_base(tie_word_embeddings=True), config_with(trainable_token_indices=[token, 7]))
    probe = PolicyProbe.of(policy, chat_tokenizer)
    assert any(token in sequence for sequence in probe.sequences)
    texts = [chat_tokenizer.decode(sequence) for sequence in probe.sequences]
    assert any("<|im_start|>assistant" in text for text in texts)  # and a chat
    before = probe.measure(policy)
    for name, parameter in policy.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data[1] += 1.0  # the row of this token alone
    assert mean_difference(probe.measure(policy).texts, before.texts) > 1e-3
    assert probe.measure(policy).difference(before) > 1e-3


@pytest.mark.parametrize(
    "config, reason",
    [
        (PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "PROMPT_TUNING have no weights to merge"),
        (LilyConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), "LILY cannot be merged"),
        (config_with(alora_invocation_tokens=[5, 6]), "aLoRA .* cannot be merged"),
    ],
    ids=["virtual_tokens", "lily", "alora"],
)
def test_kinds_that_cannot_be_merged_are_refused_before_the_base_is_loaded(
    make_base, make_run, tmp_path, monkeypatch, config, reason
):
    folder, _ = make_run(make_base(), config)
    monkeypatch.setattr(merge, "load_base_model", lambda *args, **options: pytest.fail("loaded"))
    with pytest.raises(UserError, match=f"{reason}.*: load the adapter with load_policy") as refusal:
        merge_run(folder, tmp_path / "merged")
    assert "\n" not in str(refusal.value) and not (tmp_path / "merged").exists()


def test_an_update_that_rounding_loses_is_said(make_base, make_run, tmp_path, caplog):
    folder, _ = make_run(make_base(), scale=1e-3)
    merge_run(folder, tmp_path / "exact", dtype="float32")
    assert "merge" not in caplog.text and merge_record(tmp_path / "exact").mean_logprob_difference < 1e-5
    merge_run(folder, tmp_path / "rounded", dtype="bfloat16")
    assert "rounding to bfloat16 loses much of what was trained" in caplog.text and "--dtype float32" in caplog.text
    # Measured against fp32, in which it was trained.
    assert merge_record(tmp_path / "rounded").mean_logprob_difference > 1e-5


def test_a_merge_after_4_bits_is_compared_with_4_bits(make_base, make_run, tmp_path, caplog):
    base = make_base(initializer_range=0.5)  # so that quantization changes the outputs
    folder, policy = make_run(base, load_in_4bit=True)
    merged = merge_run(folder, tmp_path / "merged", dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(merged).eval()
    sequences = PolicyProbe.of(policy, AutoTokenizer.from_pretrained(folder)).sequences
    apart = mean_difference(token_logprobs(plain, sequences), token_logprobs(policy, sequences))
    assert merge_record(merged).mean_logprob_difference == pytest.approx(apart, rel=0.05) and apart > 0.01
    assert "trained on a base with 4-bit" in caplog.text and "push the adapter" in caplog.text


def test_scores_of_a_merged_reward_model_are_compared_at_their_scale(tmp_path, caplog):
    exact = RewardNormalization(std=2.0, base_dtype="float32")
    exact.save(tmp_path)
    check_scores(1e-3, tmp_path, tmp_path, "float32")
    with pytest.raises(UserError, match="scores differ by 0.1.*RewardScorer.from_pretrained"):
        check_scores(0.1, tmp_path, tmp_path, "float32")
    check_scores(0.1, tmp_path, tmp_path, "bfloat16")
    assert not caplog.records
    check_scores(0.9, tmp_path, tmp_path, "bfloat16")
    assert "standard deviation is 2" in caplog.text and "--dtype float32" in caplog.text


# Tokenizers


def test_an_adapter_without_a_tokenizer_gets_that_of_its_base(hub, make_base, make_run, tmp_path, caplog):
    base = on_hub(make_base())
    HfApi().create_tag(base, tag="v1")
    newer = make_base("newer", seed=5)
    (tmp_path / "newer" / "chat_template.jinja").write_text("{{ 'newer' }}")
    on_hub(newer)
    folder, policy = make_run(base, tokenizer=False, revision="v1")
    assert json.loads((folder / "adapter_config.json").read_text())["revision"] == "v1"
    push_run(folder, "alice/mute")
    assert "holds no tokenizer: that of the base alice/base is pushed with it" in caplog.text
    files = hub.files("alice/mute")
    assert b"im_start" in files["chat_template.jinja"]  # of v1
    assert not {"is_local", "local_files_only"} & json.loads(files["tokenizer_config.json"]).keys()
    assert not (folder / "tokenizer_config.json").exists()
    for place in (folder, "alice/mute"):
        loaded, tokenizer = load_policy(place, dtype="float32")
        assert "im_start" in tokenizer.chat_template
        torch.testing.assert_close(probe_logprobs(loaded), probe_logprobs(policy), atol=1e-5, rtol=0)
    merged = merge_run(folder, tmp_path / "merged", dtype="float32")
    assert "im_start" in AutoTokenizer.from_pretrained(merged).chat_template
    card = report_of_folder(folder).card
    assert (card.base_model, card.base_revision) == ("alice/base", "v1")


def test_a_repository_without_a_tokenizer_is_loaded_with_that_of_its_base(hub, make_base, make_run):
    folder, _ = make_run(on_hub(make_base()), tokenizer=False)
    on_hub(folder, "alice/theirs")  # as PEFT alone pushes it
    assert load_policy("alice/theirs", dtype="float32")[1].pad_token == "<|pad|>"


def test_weights_in_a_pickle_are_refused_with_what_to_do(make_base, make_run):
    folder, _ = make_run(make_base())
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"pickle \(adapter_model.bin\).*save_pretrained"):
        run_files(folder, base_model="alice/base")


def test_where_there_is_no_tokenizer_a_push_says_so(hub, make_base, make_run, tmp_path, caplog):
    base = on_hub(make_base(tokenizer=False))
    folder, _ = make_run(base, tokenizer=False)
    with pytest.raises(UserError, match="nor its base alice/base holds a tokenizer.*tokenizer.save_pretrained"):
        push_run(folder, "alice/mute")
    with pytest.raises(UserError, match="holds no tokenizer, and no base to take it from.*save_pretrained"):
        push_run(tmp_path / "base", "alice/mute")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "alice/gone"}))
    files = run_files(folder)  # others may have this base: pushed, and said
    assert "tokenizer.json" not in files and "alice/gone cannot be read now: pushed without one" in caplog.text


def test_a_reward_adapter_without_a_tokenizer_scores(make_base, make_run, tmp_path):
    config = config_with(task_type="SEQ_CLS")
    folder, model = make_run(make_base(), config, tokenizer=False, task="reward")
    RewardNormalization(base_dtype="float32").save(folder)
    scorer = RewardScorer.from_pretrained(folder, device="cpu")
    ids = torch.tensor([[5, 6, 7]])
    assert scorer.score_ids(ids.tolist())[0] == pytest.approx(model(ids).logits.item(), abs=1e-5)
    merge_run(folder, tmp_path / "merged", dtype="float32")
    assert merge_record(tmp_path / "merged").max_score_difference < 1e-5


# Names


def test_a_whole_model_of_a_local_base_names_no_base(hub, make_base, chat_tokenizer, tmp_path):
    model = load_base_model(make_base("my base v1"), dtype="float32")
    folder = tmp_path / "whole"
    model.save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": str(tmp_path / "my base v1")}))
    card = {"kind": "sft", "base_model": "my base v1", "relation": "finetune"}
    (folder / "report.json").write_text(json.dumps({"versions": {}, "sft": {"eval_loss": 1.0}, "card": card}))
    push_run(folder, "alice/whole")
    files = hub.files("alice/whole")
    for name in ("README.md", "config.json", "report.json", "tokenizer_config.json"):
        assert b"my base" not in files[name] and str(tmp_path).encode() not in files[name], name
    assert ModelCard.load("alice/whole").data.base_model is None
    push_run(folder, "alice/whole", base_model="alice/named")
    assert ModelCard.load("alice/whole").data.base_model == "alice/named"
    assert json.loads(hub.files("alice/whole")["report.json"])["card"]["base_model"] == "alice/named"


def test_another_base_than_the_recorded_one_is_refused(hub, make_base, make_run):
    folder, _ = make_run(on_hub(make_base()))
    with pytest.raises(UserError, match="names the base alice/base, and --base_model is alice/other: leave it out"):
        push_run(folder, base_model="alice/other")
    assert run_files(folder, base_model="alice/base")


def test_what_an_old_report_leaves_out_is_read_from_the_adapter(hub, make_base, make_run):
    base = on_hub(make_base())
    folder, _ = make_run(base, load_in_4bit=True, revision="main")
    card = {"kind": "policy", "base_model": base}
    (folder / "report.json").write_text(json.dumps({"versions": {}, "ppo": {"kl": 1.0}, "card": card}))
    text = run_files(folder, "alice/run", revision="round-2")["README.md"].decode()
    for words in ('revision="main"', 'revision="round-2"', "BitsAndBytesConfig", "q_proj"):
        assert words in text, words
    other = run_files(folder, "alice/run", license="other", license_name="mine", license_link="https://example.org/l")
    assert "license_name: mine" in other["README.md"].decode()


def test_a_card_form_that_the_owner_filled_in_stays(make_base, make_run):
    folder, _ = make_run(make_base())
    options = {"base_model": "alice/base"}
    (folder / "emissions.csv").write_text("country\n")
    assert "README.md" not in run_files(folder, **options)
    (folder / "README.md").write_text("# Mine\n\nI wrote this.\n\n<!-- Provide a summary of what the model is. -->\n")
    files = run_files(folder, report=report_of_folder(folder), **options)
    assert files["README.md"] == folder / "README.md" and "emissions.csv" not in files
    (folder / "README.md").write_text(f"{ModelCard.from_template(ModelCardData()).text}\nI wrote this.\n")
    files = run_files(folder, report=report_of_folder(folder), **options)  # the line goes into the card that is made
    assert isinstance(files["README.md"], bytes) and b"More Information Needed" not in files["README.md"]


# Reports of folders without one


def test_a_folder_alone_tells_what_its_files_record(make_base, make_run, chat_tokenizer, tmp_path):
    folder, _ = make_run(make_base(), load_in_4bit=True)
    report = report_of_folder(folder)
    assert report.command is None and report.hardware is None and set(report.versions) == {"peft"}
    card = report.card
    assert (card.kind, card.relation, card.base_model, card.chat) == ("model", "adapter", None, True)
    assert (card.prompt_form, card.base_dtype, card.load_in_4bit) == ("messages", "float32", True)
    assert card.adapter["r"] == 4 and card.quantization["bnb_4bit_quant_type"] == "nf4"
    whole = report_of_folder(make_base("whole")).card
    assert (whole.kind, whole.relation, whole.base_model, whole.adapter) == ("model", "finetune", None, None)
    assert whole.base_dtype == "float32"  # `load_policy` has another default
    text = card_from_report(report_of_folder(make_base("whole")))
    assert "**Precision:** weights in float32\n" in text and text.count('dtype="float32"') == 3
    assert report_of_folder(tmp_path) is None
    config = json.loads((folder / "adapter_config.json").read_text()) | {"task_type": "SEQ_CLS"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert report_of_folder(folder) is None  # a classifier of an unknown kind
    RewardNormalization(base_dtype="bfloat16", autocast="bfloat16").save(folder)
    scores = report_of_folder(folder).card
    assert (scores.kind, scores.base_dtype, scores.autocast) == ("reward_model", "bfloat16", "bfloat16")


OF_TRAINING = (
    "- trl",
    "- rlhf",
    "like those in training",
    "Made with",
    "command",
    "It was trained",
    "Research",
    "Citations",
)


def test_the_card_of_a_model_of_another_library_says_nothing_of_training(make_base, tmp_path):
    folder = make_base("whole")
    text = card_from_report(report_of_folder(folder))
    assert not [words for words in OF_TRAINING if words in text] and "- hf_rlhf_ext" not in text
    assert "What it is meant for is not recorded" in text
    report = report_of_folder(folder)
    report.save(tmp_path)
    assert RunReport.load(tmp_path).card.is_foreign  # as `merge` writes it
    for name in ("base_record.json", "prompt_form.json"):  # of this library's trainers
        (Path(folder) / name).write_text("{}")
        assert "- hf_rlhf_ext" in card_from_report(report_of_folder(folder)), name
        (Path(folder) / name).unlink()


def test_the_card_of_a_reward_model_of_another_library_says_nothing_of_training(make_base):
    folder = make_base("whole")
    RewardNormalization(mean=1.0, std=2.0).save(folder)
    text = card_from_report(report_of_folder(folder))
    assert not [words for words in OF_TRAINING if words in text] and "- hf_rlhf_ext" not in text
    assert "- reward-model" in text and "its accuracy is not recorded" in text.lower()
    RewardNormalization(base_dtype="float32").save(folder)
    text = card_from_report(report_of_folder(folder))
    assert "- hf_rlhf_ext" in text and "trained on comparisons" in text and "like those in training" in text


def test_an_ensemble_alone_tells_what_all_members_record(tmp_path):
    for number, (accuracy, base) in enumerate(((0.7, "alice/base"), (0.8, "alice/base"))):
        folder = tmp_path / f"member-{number}"
        folder.mkdir()
        card = {"kind": "reward_model", "base_model": base, "max_length": 64, "config": f"seed: {number}\n"}
        report = {"versions": {"trl": "1.16.0"}, "reward_model": {"accuracy": accuracy}, "card": card}
        (folder / "report.json").write_text(json.dumps(report))
    RewardEnsemble.save(tmp_path, ["member-0", "member-1"], combine="min")
    report = report_of_folder(tmp_path)
    assert [member["accuracy"] for member in report.reward_model.members] == [0.7, 0.8]
    assert report.reward_model.combine == "min" and report.versions == {"trl": "1.16.0"}
    assert (report.card.base_model, report.card.max_length, report.card.config) == ("alice/base", 64, None)


def test_a_merge_of_a_folder_without_a_report_names_its_base(hub, make_base, make_run, tmp_path):
    folder, _ = make_run(on_hub(make_base()))
    merged = merge_run(folder, tmp_path / "merged", dtype="float32")
    push_run(merged, "alice/merged")
    card = ModelCard.load("alice/merged")
    assert (card.data.base_model, card.data.base_model_relation) == ("alice/base", "merge")
