"""Recipes that end on the Hub: pushed to the stand-in, pulled by a new process with an empty cache, the same model."""

import json
import re

import pytest
from huggingface_hub import HfApi, ModelCard

from hf_rlhf_ext import RewardScorer, load_policy
from tests.hub.conftest import elsewhere, hub, naps  # noqa: F401

SIZES = {
    "sft": {"max_steps": 4, "save_strategy": "steps", "save_steps": 2},
    "reward": {"train_rows": 8, "eval_rows": 4},
    "ppo": {"save_steps": 2, "reward_model": "alice/reward"},  # from the SFT policy
}
ASK, ANSWERS = [{"role": "user", "content": "How was day 3?"}], ["A sunny day.", "No."]

PULLED = """
import io, json, re, sys
from contextlib import redirect_stdout

from huggingface_hub import ModelCard
from hf_rlhf_ext import RewardScorer, load_policy

ask, answers, sft, reward, ppo = json.loads(sys.argv[1])
tokens = {}
for name, revision in {"sft": sft, "ppo": ppo}.items():
    model, tokenizer = load_policy(f"alice/{name}", revision=revision)
    ids = tokenizer.apply_chat_template(ask, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens[name] = model.generate(**ids, max_new_tokens=8, do_sample=False)[0].tolist()
scorer = RewardScorer.from_pretrained("alice/reward", revision=reward)
scores = scorer([ask] * 2, [[{"role": "assistant", "content": answer}] for answer in answers])
printed = {}
for name in ("alice/sft", "alice/reward", "alice/ppo"):
    (snippet,) = re.findall(r"```python\\n(.*?)```", ModelCard.load(name).text, re.DOTALL)
    with redirect_stdout(io.StringIO()) as out:
        exec(snippet)
    printed[name] = out.getvalue()
print(json.dumps({"tokens": tokens, "scores": scores, "printed": printed}))
"""


@pytest.fixture
def base(hub, workspace):  # noqa: F811
    HfApi().create_repo("alice/base")
    HfApi().upload_folder(repo_id="alice/base", folder_path=workspace / "base")
    return "alice/base"


@pytest.mark.slow
def test_what_is_pushed_is_what_others_pull(base, hub, call, elsewhere, tmp_path):  # noqa: F811
    for recipe, sizes in SIZES.items():
        options = {"model_name_or_path": base, "output_dir": tmp_path / recipe, "push_to_hub": "true"} | sizes
        options |= {"model_name_or_path": tmp_path / "sft"} if recipe == "ppo" else {}
        done = call(recipe, **options, hub_model_id=f"alice/{recipe}")
        assert done.code == 0, done.err
        assert f"Pushed: {hub.url}/alice/{recipe}/commit/" in done.out and "warning" not in done.err
    tokens = {}
    for recipe in ("sft", "ppo"):
        model, tokenizer = load_policy(tmp_path / recipe)
        ids = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        tokens[recipe] = model.generate(**ids, max_new_tokens=8, do_sample=False)[0].tolist()
    completions = [[{"role": "assistant", "content": answer}] for answer in ANSWERS]
    scores = RewardScorer.from_pretrained(tmp_path / "reward")([ASK] * 2, completions)

    revisions = [hub.repo(f"alice/{recipe}").at("main").oid for recipe in SIZES]
    pulled = json.loads(elsewhere(PULLED, json.dumps([ASK, ANSWERS, *revisions])).stdout.splitlines()[-1])
    assert pulled["tokens"] == tokens and pulled["scores"] == scores
    scored, plain = pulled["printed"]["alice/reward"].splitlines()
    assert float(plain) == pytest.approx(float(re.findall(r"-?[\d.e-]+", scored)[1]), abs=5e-3)  # no autocast there

    titles = [commit.title for commit in hub.repo("alice/sft").history()]
    assert titles[0] == "Upload of a finished run" and "Training in progress, step 2" in titles  # every_save
    for recipe in SIZES:
        repo = hub.repo(f"alice/{recipe}")
        assert repo.private
        names = {name for commit in repo.history() for name in commit.files}
        assert not [n for n in names if n.endswith((".bin", ".pt", ".pth")) or "checkpoint" in n or "state" in n]
        assert ("value_head.safetensors" in names or "value/adapter_model.safetensors" in names) is (recipe == "ppo")
        assert {"adapter_config.json", "tokenizer_config.json", "training_config.yaml", "report.json"} <= names
        card = ModelCard.load(f"alice/{recipe}")
        assert card.data.base_model == base and "(sha256 " in card.text.replace("\\", "")
        if recipe == "ppo":  # links what it was made from, as it was then
            assert f"[alice/sft@{revisions[0]}](" in card.text and "[alice/reward](" in card.text
        assert json.loads((tmp_path / recipe / "pushed.json").read_text())["repo_id"] == f"alice/{recipe}"


def refused(done) -> str:
    assert done.code == 2 and "Traceback" not in done.err
    return done.err.splitlines()[-1]


@pytest.mark.parametrize("recipe", SIZES)
def test_what_fails_at_the_end_is_refused_at_the_start(base, hub, call, workspace, tmp_path, monkeypatch, recipe):  # noqa: F811
    options = {"model_name_or_path": base, "output_dir": tmp_path / "out", "push_to_hub": "true"} | SIZES[recipe]
    options |= {"reward_model": None, "reward_funcs": "my_rewards.length"} if recipe == "ppo" else {}
    assert refused(call(recipe, **options, hub_model_id="bob/x")).startswith("error: push_to_hub: bob/x is not yours")
    local = refused(call(recipe, **options | {"model_name_or_path": workspace / "base"}))
    assert local.startswith(f"error: push_to_hub: the base model {workspace / 'base'} is a local folder, ")
    strategy = refused(call(recipe, **options, hub_strategy="checkpoint", overwrite="true"))
    assert strategy.startswith("error: hub_strategy: checkpoint") and "every_save" in strategy
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert refused(call(recipe, **options)) == (
        "error: push_to_hub: the Hub does not know this token: run `hf auth login --force`."
    )
    monkeypatch.delenv("HF_TOKEN")
    assert refused(call(recipe, **options)) == ("error: push_to_hub: no token: run `hf auth login`, or set HF_TOKEN.")
    assert ("models", "alice/out") not in hub.repos or not hub.repo("alice/out").history()[1:]


@pytest.mark.slow
def test_a_hub_that_fails_costs_one_line_and_no_training(base, hub, call, naps, tmp_path):  # noqa: F811
    options = {"model_name_or_path": base, "output_dir": tmp_path / "out", "push_to_hub": "true", "max_steps": 1}
    hub.fault(503, match="/commit/", times=1000)
    done = call("sft", **options)
    assert done.code == 0
    (line,) = [line for line in done.err.splitlines() if line.startswith("warning: not pushed to alice/out: ")]
    assert line.endswith(f"later: hf-rlhf push {tmp_path / 'out'} --repo alice/out")
    load_policy(tmp_path / "out")
    hub.faults.clear()
    from hf_rlhf_ext.hub import push

    push.main([str(tmp_path / "out"), "--repo", "out"])
    assert "adapter_model.safetensors" in hub.files("alice/out")


@pytest.mark.slow
def test_a_run_that_a_guard_stopped_stays_here(base, hub, call, tmp_path):  # noqa: F811
    options = {"model_name_or_path": base, "output_dir": tmp_path / "out", "push_to_hub": "true", "max_steps": 12}
    done = call("ppo", **options, reward_funcs="my_rewards.length", max_kl=1e-3, learning_rate=0.05)
    assert done.code == 0, done.err
    (line,) = [line for line in done.err.splitlines() if line.startswith("warning: a guard stopped the run")]
    assert line.endswith(f": hf-rlhf push {tmp_path / 'out'} --repo alice/out")
    assert "Pushed" not in done.out and not any("safetensors" in name for name in hub.files("alice/out"))


def test_the_commit_of_a_data_set_is_asked_and_no_hub_is_no_error(hub, monkeypatch):  # noqa: F811
    from hf_rlhf_ext.cli.lineage import hub_dataset
    from hf_rlhf_ext.cli.options import DataArguments

    HfApi().create_repo("alice/prompts", repo_type="dataset")
    found = hub_dataset(DataArguments(dataset_name="alice/prompts"))
    assert found == {"datasets": ["alice/prompts"], "dataset_revision": HfApi().dataset_info("alice/prompts").sha}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub_dataset(DataArguments(dataset_name="alice/prompts"))["dataset_revision"] is None
    assert hub_dataset(DataArguments(dataset_name=__file__)) == {}


def test_options_of_a_run_are_a_config_that_gives_them_again(tmp_path):
    from hf_rlhf_ext.cli.finish import training_config
    from hf_rlhf_ext.cli.options import machine_defaults
    from hf_rlhf_ext.cli.parsing import parse_recipe
    from hf_rlhf_ext.recipes.reward import ARGUMENTS

    given = ["--dataset_name", "pairs.jsonl", "--learning_rate", "3e-4", "--lora_r", "4", "--hub_token", "hf_secret"]
    options = parse_recipe(ARGUMENTS, [*given, "--push_to_hub", "true"], defaults=machine_defaults())
    text = training_config(*options)
    assert "hf_secret" not in text and "push_to_hub" not in text and "learning_rate: 0.0003" in text
    (tmp_path / "again.yaml").write_text(text)
    again = parse_recipe(ARGUMENTS, ["--config", str(tmp_path / "again.yaml")], defaults=machine_defaults())
    assert training_config(*again) == text and again[-1].learning_rate == 3e-4 and again[-2].lora_r == 4
