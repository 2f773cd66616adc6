"""Merging the adapter of a run into the full-precision weights of its base, and opening it without this library."""

import json
import logging
import shutil

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline

from hf_rlhf_ext import RewardScorer, load_base_model, load_policy
from hf_rlhf_ext.cli import merge
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.merge import merge_run
from hf_rlhf_ext.hub.push import push_run
from hf_rlhf_ext.modeling import adapters
from hf_rlhf_ext.modeling.locations import EMBEDDED_MODEL
from hf_rlhf_ext.reward.scorer import RewardNormalization

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture
def base(tiny_llama, chat_tokenizer, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def make_run(base, chat_tokenizer, tmp_path):
    """Makes the folder of an adapter with a report, like a recipe."""

    def make(kind: str, load_in_4bit: bool = False):
        task = "reward" if kind == "reward_model" else "causal_lm"
        model = load_base_model(base, task=task, dtype="float32", load_in_4bit=load_in_4bit)
        config = LoraConfig(
            r=4,
            target_modules=["q_proj", "v_proj"],
            init_lora_weights=False,
            task_type="SEQ_CLS" if task == "reward" else "CAUSAL_LM",
        )
        torch.manual_seed(1)
        folder = tmp_path / kind
        get_peft_model(model, config).save_pretrained(folder)
        chat_tokenizer.save_pretrained(folder)
        if task == "reward":
            RewardNormalization(mean=0.5, std=2.0, base_dtype="float32").save(folder)
        measured = {"ppo": {"kl": 3.0}, "reward_model": {"accuracy": 0.7}, "versions": {}, "hardware": "one CPU"}
        card = {"kind": kind, "base_model": "alice/base"}
        (folder / "report.json").write_text(json.dumps(measured | {"card": card}))
        return folder

    return make


@pytest.mark.parametrize("quantized", [False, True])
def test_a_merged_policy_is_the_adapter_on_the_full_weights(make_run, base, tmp_path, quantized):
    # The full weights are loaded again, even if the adapter was trained on 4 bits.
    folder = make_run("policy", load_in_4bit=quantized)
    merged = merge_run(folder, tmp_path / "merged", dtype="float32")
    full, _ = load_policy(folder, dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(merged)
    torch.testing.assert_close(plain.eval()(IDS).logits, full.eval()(IDS).logits, atol=1e-5, rtol=1e-5)
    assert (
        not (merged / "adapter_config.json").exists()
        and "quantization_config" not in (merged / "config.json").read_text()
    )


def test_bf16_is_rounded_once(make_run, tmp_path):
    merged = merge_run(make_run("policy"), tmp_path / "merged", dtype="bfloat16")
    weights = load_file(merged / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    report = json.loads((merged / "report.json").read_text())  # names the base without a local path
    measured = report["merge"].pop("mean_logprob_difference")
    assert report["merge"] == {"dtype": "bfloat16", "base": "base", "max_score_difference": None}
    assert 0 < measured < 0.15  # against the adapter on the base in the precision of training


def test_a_merged_reward_model_is_pushed_and_read_without_this_library(hub, make_run, base, tmp_path):
    HfApi().create_repo("alice/base")
    HfApi().upload_folder(repo_id="alice/base", folder_path=base)
    folder = make_run("reward_model")
    merge_run(folder, tmp_path / "merged", dtype="float32", base_model="alice/base")
    push_run(tmp_path / "merged")
    found = hub.files("alice/merged")
    assert "model.safetensors" in found and "adapter_config.json" not in found
    card = ModelCard.load("alice/merged")
    assert card.data.base_model_relation == "merge" and card.data.library_name == "transformers"
    assert "[alice/base](" in card.text and "AutoModelForSequenceClassification" in card.text
    scorer = RewardScorer.from_pretrained(folder, dtype="float32")
    text = scorer.text("Hello?", "Yes.")
    plain = AutoModelForSequenceClassification.from_pretrained("alice/merged")
    ids = torch.tensor([scorer.tokenizer(text)["input_ids"]])
    assert plain(ids).logits.item() == pytest.approx(scorer.score_ids(ids.tolist())[0], abs=1e-5)
    again = RewardScorer.from_pretrained("alice/merged", dtype="float32")
    merge = json.loads(found["report.json"])["merge"]
    assert merge.pop("max_score_difference") < 1e-5 and merge.pop("mean_logprob_difference") is None
    assert merge == {"dtype": "float32", "base": "alice/base"}
    assert again(["Hello?"], ["Yes."]) == pytest.approx(scorer(["Hello?"], ["Yes."]), abs=1e-5)
    assert not (folder / "pushed.json").exists()  # the adapter itself was not pushed


def test_what_cannot_be_merged_is_one_line(make_run, base, tmp_path):
    with pytest.raises(UserError, match="holds no adapter"):
        merge_run(base, tmp_path / "merged")
    quantized = tmp_path / "quantized"
    load_base_model(base, dtype="float32", load_in_4bit=True).save_pretrained(quantized)
    folder = make_run("policy")
    with pytest.raises(UserError, match="quantized is itself quantized: .*base_model"):
        merge_run(folder, tmp_path / "merged", base_model=str(quantized))
    for dtype in ("float64", "float8_e4m3fn", "int8"):  # refused before anything is written
        with pytest.raises(UserError, match="dtype.*float16"):
            merge_run(folder, tmp_path / "merged", dtype=dtype)
    assert not (tmp_path / "merged").exists()
    with pytest.raises(UserError, match="the adapter's own folder: give another one"):
        merge_run(folder, folder)
    (folder / "report.json").write_text('{"card": {"hue": "red"}}')
    with pytest.raises(UserError, match="report.json is not a report .*hue.*: remove it"):
        merge_run(folder, tmp_path / "merged")


def test_a_merge_of_a_local_base_is_pushed_with_its_options(hub, make_run, base, tmp_path):
    merged = merge_run(make_run("policy"), tmp_path / "merged", dtype="float32")
    push_run(merged, base_model="alice/named", license="mit")
    card = ModelCard.load("alice/merged")
    assert (card.data.base_model, card.data.license, card.data.base_model_relation) == ("alice/named", "mit", "merge")
    config = json.loads(hub.files("alice/merged")["config.json"])
    assert config.get("_name_or_path") in (None, "alice/named") and base not in json.dumps(config)
    assert (merged / "pushed.json").is_file()


def test_the_command_merges_and_says_what_is_next(make_run, base, tmp_path, capfd):
    folder = make_run("policy")
    capfd.readouterr()
    merge.main([str(folder), str(tmp_path / "out"), "--dtype", "float32"])
    done = capfd.readouterr()
    assert f"hf-rlhf push {tmp_path / 'out'}" in done.out and "AutoModelForCausalLM" in done.out
    assert "%|" not in done.err  # no bars where nobody looks
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    with pytest.raises(SystemExit) as stopped:
        merge.main([base, str(tmp_path / "other")])
    error = capfd.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and error.startswith("error: merge: ") and "no adapter" in error


def test_transformers_alone_opens_what_was_merged_and_peft_the_adapter_on_its_base(make_run, base, tmp_path):
    folder = make_run("policy")
    merged = merge_run(folder, tmp_path / "merged", dtype="float32")
    generator = pipeline("text-generation", model=str(merged))
    (answer,) = generator([{"role": "user", "content": "Hello?"}], max_new_tokens=4, do_sample=False)
    assert answer["generated_text"][-1]["role"] == "assistant"
    on_base = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    torch.testing.assert_close(generator.model(IDS).logits, on_base.eval()(IDS).logits, atol=1e-5, rtol=1e-5)


def test_the_folder_of_a_run_gives_its_policy_or_another_stage(make_run, tmp_path, capsys):
    run = tmp_path / "mine"
    for kind, stage in (("policy", "policy"), ("policy", "sft"), ("reward_model", "reward_model")):
        shutil.copytree(make_run(kind), run / stage)
    for stage, written in (
        (None, "mine-merged"),
        ("sft", "mine-sft-merged"),
        ("reward_model", "mine-reward_model-merged"),
    ):
        merge.main([str(run), *([] if stage is None else ["--stage", stage])])
        assert (tmp_path / written / "model.safetensors").is_file()
    assert "AutoModelForSequenceClassification" in capsys.readouterr().out
    shutil.rmtree(run / "sft")
    for words, said in (
        ([str(run), "--stage", "sft"], "it has reward_model, policy"),
        ([str(run / "policy"), "--stage", "sft"], "leave --stage out"),
        ([str(run / "nope")], "no folder"),
        ([str(run), "out", "--output_dir", "out"], "given twice"),
    ):
        with pytest.raises(SystemExit):
            merge.main(words)
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line


def test_a_run_that_was_given_its_models_or_has_no_policy_yet(make_run, tmp_path):
    run = tmp_path / "mine"
    shutil.copytree(make_run("reward_model"), run / "reward_model")
    assert merge.model_to_merge(str(run), "reward_model")[0] == str(run / "reward_model")
    with pytest.raises(UserError, match="has no policy: .* it has reward_model"):
        merge.model_to_merge(str(run), None)
    (run / "pipeline.yaml").write_text("sft_policy: alice/sft\n")
    with pytest.raises(UserError, match="the sft of .* is alice/sft.*download it first"):
        merge.model_to_merge(str(run), "sft")
    (run / "reward_model" / "adapter_config.json").rename(run / "reward_model" / "ensemble.json")
    with pytest.raises(UserError, match="an ensemble, whose members are merged one by one"):
        merge_run(run / "reward_model", tmp_path / "out")


def test_only_a_merged_model_is_replaced_and_only_if_asked(make_run, tmp_path):
    folder = make_run("policy")
    thesis = tmp_path / "papers" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is not empty, and is no merged model"):
            merge_run(folder, thesis.parent, overwrite=overwrite)
    assert [path.name for path in thesis.parent.iterdir()] == ["thesis.tex"]
    merged = merge_run(folder, tmp_path / "merged", dtype="float32")
    (merged / "old.bin").write_text("of the first merge")
    with pytest.raises(UserError, match="--overwrite"):
        merge_run(folder, merged)
    merge_run(folder, merged, dtype="float32", overwrite=True)
    assert not (merged / "old.bin").exists() and (merged / "model.safetensors").is_file()


def test_saving_an_adapter_of_the_embedded_base_says_once_how_others_open_it(tiny_llama, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(adapters, "_said_only_here", set())
    model = get_peft_model(tiny_llama, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    hidden = logging.getLogger("hf_rlhf_ext.modeling.adapters")  # the recipes say it at their end
    monkeypatch.setattr(hidden, "filters", [])
    for base, n_said in (("some/base", 0), (EMBEDDED_MODEL, 1)):
        model.peft_config["default"].base_model_name_or_path = base
        for name in ("run/checkpoint-8", "run", "run-2"):
            adapters.save_adapter(model, "default", tmp_path / name)
        said = [record.getMessage() for record in caplog.records if "hf-rlhf merge" in record.getMessage()]
        assert len(said) == n_said
    assert f"hf-rlhf merge {tmp_path / 'run'}`" in said[0]
