"""Recipes that end on the Hub: pushed to the stand-in, pulled by a new process with an empty cache, the same model."""

import hashlib
import json
import re

import pytest
from huggingface_hub import HfApi, ModelCard

from hf_rlhf_ext import RewardScorer, load_policy
from hf_rlhf_ext.hub.reports import trainer_report
from tests.hub.conftest import elsewhere, hub, naps  # noqa: F401

SIZES = {
    "sft": {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1},
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
    printed[name] = []
    for snippet in re.findall(r"```python\\n(.*?)```", ModelCard.load(name).text, re.DOTALL):
        with redirect_stdout(io.StringIO()) as out:
            exec(snippet, {})
        printed[name].append(out.getvalue())
print(json.dumps({"tokens": tokens, "scores": scores, "printed": printed}))
"""


@pytest.fixture
def base(hub, workspace):  # noqa: F811
    HfApi().create_repo("alice/base")
    HfApi().upload_folder(repo_id="alice/base", folder_path=workspace / "base")
    return "alice/base"


@pytest.fixture
def known(monkeypatch) -> dict[str, dict]:
    """What the trainer of each kind of model knew for its card, of the recipes that this test runs."""
    found = {}
    options_of = trainer_report.trainer_card_options

    def recorded(trainer):
        options = options_of(trainer)
        found[options["kind"]] = dict(options)
        return options

    monkeypatch.setattr(trainer_report, "trainer_card_options", recorded)
    return found


@pytest.mark.slow
def test_what_is_pushed_is_what_others_pull(base, hub, call, elsewhere, known, tmp_path):  # noqa: F811
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
    plain, *_, ours = (
        [float(n) for n in re.findall(r"-?\d+\.?[\de.-]*", out)] for out in pulled["printed"]["alice/reward"]
    )
    assert plain[0] == pytest.approx(ours[0], abs=5e-3)  # no autocast without this library
    for recipe in ("sft", "ppo"):
        assert all(out.strip() for out in pulled["printed"][f"alice/{recipe}"])

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
        states_what_its_trainer_knew(tmp_path / recipe, known, hub.repo("alice/base").at("main").oid)
        if recipe == "ppo":  # links what it was made from, as it was then
            assert f"[alice/sft@{revisions[0]}](" in card.text and "[alice/reward](" in card.text
        assert json.loads((tmp_path / recipe / "pushed.json").read_text())["repo_id"] == f"alice/{recipe}"


def states_what_its_trainer_knew(folder, known, commit_of_base):
    """A recipe states no less than a run from Python, and in addition what only the recipe knows."""
    report = json.loads((folder / "report.json").read_text())
    card = report["card"]
    assert card["base_revision"] == commit_of_base and card["prompt_form"] == "messages"
    assert card["adapter"]["type"] == "LORA" and card["chat_template"] == "base"
    same = known[card["kind"]].keys() - {"config", "data", "rows_read"}
    assert {name: card[name] for name in same} == {name: known[card["kind"]][name] for name in same}
    assert set(known[card["kind"]].get("rows_read", ())) <= set(card["rows_read"])
    section = report[{"policy": "ppo"}.get(card["kind"], card["kind"])]
    assert section["weights_step"] == section["total_steps"] > 0
    train, heldout = card["data"] if len(card["data"]) > 1 else (*card["data"], None)
    assert train["rows"] == report["rows"]["train"] and train["sha256"] in str(card["lineage"])
    assert heldout is None or (heldout["role"], heldout["rows"]) == ("evaluation", report["rows"]["heldout"])
    if card["kind"] == "sft":
        assert card["plot"] == "loss.png" and (folder / "loss.png").is_file()


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
    commit = "0123456789" * 4
    pinned = DataArguments(dataset_name="alice/prompts", dataset_revision=commit)
    assert hub_dataset(pinned)["dataset_revision"] == commit  # nothing to ask


def test_a_card_has_where_each_row_came_from_and_no_path(workspace):
    from hf_rlhf_ext.cli.lineage import data_records, with_commit_read
    from hf_rlhf_ext.cli.options import DataArguments

    of_hub = DataArguments(dataset_name="alice/pairs", dataset_config="short", dataset_test_split="test")
    known = {"data": [{"role": "comparisons", "rows": 9}, {"role": "texts for PPO-ptx", "rows": 5}]}
    found = data_records(of_hub, "comparisons", range(8), range(3), {"dataset_revision": "abc"}, known=known)
    same = {"name": "alice/pairs", "revision": "abc", "config": "short"}
    assert found == [
        {"role": "comparisons", "rows": 8, "split": "train"} | same,
        {"role": "evaluation", "rows": 3, "split": "test"} | same,
        {"role": "texts for PPO-ptx", "rows": 5},
    ]
    # The commit that was read, if the trainer knows it, not the newest one.
    read = {"data": [{"role": "comparisons", "name": "alice/pairs", "revision": "older", "rows": 8}]}
    newest = {"datasets": ["alice/pairs"], "dataset_revision": "newest"}
    assert with_commit_read(newest, read) == newest | {"dataset_revision": "older"}
    assert with_commit_read(newest, known) == newest and with_commit_read({}, read) == {}

    file, folder = workspace / "pairs.jsonl", workspace / "prompts"
    (record,) = data_records(DataArguments(dataset_name=str(file)), "comparisons", range(8), [], {})
    digest = record.pop("sha256")
    assert record == {"role": "comparisons", "rows": 8, "name": "pairs.jsonl"}  # a file has no splits
    assert hashlib.sha256(file.read_bytes()).hexdigest().startswith(digest) and len(digest) >= 16
    train, heldout = data_records(DataArguments(dataset_name=str(folder), eval_rows=2), "prompts", range(6), "ab", {})
    assert train["split"] == heldout["split"] == "train" and (train["rows"], heldout["rows"]) == (6, 2)
    assert train["name"] == "prompts" and str(workspace) not in str(train)


def test_a_start_is_named_by_its_report_and_else_by_its_name(workspace, tmp_path):
    from hf_rlhf_ext.cli.options import ModelArguments
    from hf_rlhf_ext.recipes.rounds_parts.report import first_policy, start_in_words

    def first(folder):
        return first_policy(ModelArguments(model_name_or_path=str(folder)))

    assert first(workspace / "base") == "the base model base"
    adapter = tmp_path / "polite"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(workspace / "base")}))
    assert first(adapter) == "the adapter polite"
    for kind, words in (("sft", "the SFT policy"), ("dpo", "the DPO policy"), ("reward_model", "the adapter polite")):
        (adapter / "report.json").write_text(json.dumps({"card": {"kind": kind}}))
        assert first(adapter) == words
    assert start_in_words({"start": "sft"}, "the adapter polite") == "the adapter polite"
    assert start_in_words({"start": "round-1"}, "the adapter polite") == "the policy of round 1"


def test_a_card_of_a_pipeline_names_the_files_of_the_user():
    from hf_rlhf_ext.recipes.pipeline_parts.report import data_of_card

    copies = [
        {"role": "demonstrations", "name": "demonstrations", "sha256": "aa", "split": "train", "rows": 8},
        {"role": "evaluation", "name": "demonstrations", "sha256": "aa", "split": "test", "rows": 2},
        {"role": "texts for PPO-ptx", "rows": 5},
    ]
    source = {"role": "demonstrations", "rows": 0, "name": "answers.csv", "sha256": "bb"}
    written = data_of_card({"data": copies}, "demonstrations", source)
    assert written == [
        {"role": "demonstrations", "rows": 8, "name": "answers.csv", "sha256": "bb"},
        {"role": "evaluation", "rows": 2, "name": "answers.csv", "sha256": "bb"},
        {"role": "texts for PPO-ptx", "rows": 5},
    ]
    assert data_of_card({"data": written}, "demonstrations", source) == written  # when it is written again


def test_options_of_a_run_are_a_config_that_gives_them_again(tmp_path):
    from hf_rlhf_ext.cli.options import machine_defaults
    from hf_rlhf_ext.cli.parsing import parse_recipe
    from hf_rlhf_ext.hub.reports.provenance import options_yaml
    from hf_rlhf_ext.recipes.reward import ARGUMENTS

    given = ["--dataset_name", "pairs.jsonl", "--learning_rate", "3e-4", "--lora_r", "4", "--hub_token", "hf_secret"]
    options = parse_recipe(ARGUMENTS, [*given, "--push_to_hub", "true"], defaults=machine_defaults())
    text = options_yaml(*options)
    assert "hf_secret" not in text and "push_to_hub" not in text and "learning_rate: 0.0003" in text
    (tmp_path / "again.yaml").write_text(text)
    again = parse_recipe(ARGUMENTS, ["--config", str(tmp_path / "again.yaml")], defaults=machine_defaults())
    assert options_yaml(*again) == text and again[-1].learning_rate == 3e-4 and again[-2].lora_r == 4
