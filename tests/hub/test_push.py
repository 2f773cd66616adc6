"""Pushing a finished run to the stand-in: what arrives, what never does, and what happens when the Hub fails."""

import json
import logging
import random

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from safetensors.torch import save_file

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub import push
from hf_rlhf_ext.hub.push import PushError, check_access, create_private_repo, push_run, try_push
from tests.hub.conftest import BOB

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
REPORT = {"ppo": {"kl": 3.0}, "versions": {"trl": "1.16.0"}, "command": "python recipes/ppo.py", "seconds": {"ppo": 60}}
CARD = {"kind": "policy", "base_model": BASE, "config": {"learning_rate": 1e-4}, "lineage": {"prompts": "a/prompts"}}
PUSHED = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "frontier.png",
    "report.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "training_config.yaml",
    "value/adapter_config.json",
    "value/adapter_model.safetensors",
    "value_head.safetensors",
    ".gitattributes",
}


@pytest.fixture
def run_folder(tmp_path):
    """What a PPO run leaves, and more than that."""
    folder = tmp_path / "polite"
    (folder / "value").mkdir(parents=True)
    (folder / "checkpoint-8" / "ref").mkdir(parents=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": "embedded:smollm2-135m-instruct"}
    for part in (folder, folder / "value"):
        (part / "adapter_config.json").write_text(json.dumps(config))
        save_file({"lora": torch.rand(600)}, part / "adapter_model.safetensors")
    save_file({"weight": torch.rand(600)}, folder / "value_head.safetensors")
    tokenizer = {"is_local": True, "local_files_only": True, "name_or_path": str(tmp_path), "chat_template": "{{ 1 }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "report.json").write_text(json.dumps(REPORT | {"card": CARD}))
    (folder / "training_config.yaml").write_text("learning_rate: 1.0e-4\n")
    (folder / "frontier.png").write_bytes(b"\x89PNG\0")
    (folder / "README.md").write_text("---\nbase_model: x\n---\n<!-- Provide a summary -->")
    for name in ("training_args.bin", "optimizer.pt", "rng.pth", "checkpoint-8/optimizer.pt", "checkpoint-8/x.json"):
        (folder / name).write_bytes(b"\0")
    for name in ("hf_rlhf_ext.json", "ppo_state.json", "checkpoint-8/ref/adapter.safetensors", ".hidden"):
        (folder / name).write_text("{}")
    (folder / "runs").mkdir()
    (folder / "runs" / "events.out.tfevents.1.host").write_text("")
    return folder


def test_one_private_commit_of_what_others_need(hub, run_folder):
    before = {p: p.read_bytes() for p in run_folder.rglob("*") if p.is_file()}
    url = push_run(run_folder)
    repo = hub.repo("alice/polite")
    assert repo.private and len(repo.history()) == 2 and url.endswith(repo.history()[0].oid)
    files = hub.files("alice/polite")
    assert set(files) == PUSHED
    for name in ("adapter_config.json", "value/adapter_config.json"):
        assert json.loads(files[name])["base_model_name_or_path"] == BASE
    assert json.loads(files["tokenizer_config.json"]) == {"name_or_path": None, "chat_template": "{{ 1 }}"}
    card = ModelCard.load("alice/polite")
    assert card.data.base_model == BASE and card.data.base_model_relation == "adapter"
    assert "alice/polite" in card.text or "polite" in card.text
    assert "prompts: [a/prompts](https://huggingface.co/a/prompts)" in card.text and "0.02 hours" in card.text
    known = json.loads((run_folder / "pushed.json").read_text())  # for the cards of what is made from it
    assert known == {"repo_id": "alice/polite", "commit": repo.history()[0].oid}
    (run_folder / "pushed.json").unlink()
    assert {p: p.read_bytes() for p in run_folder.rglob("*") if p.is_file()} == before  # nothing else has changed


def test_a_second_push_sends_only_what_changed_and_removes_stale_weights(hub, run_folder):
    push_run(run_folder, "acme/polite", private=False)
    assert not hub.repo("acme/polite").private
    (run_folder / "value_head.safetensors").unlink()
    (run_folder / "training_config.yaml").write_text("learning_rate: 2.0e-4\n")
    HfApi().create_commit("acme/polite", [CommitOperationAdd("LICENSE", b"mine")], commit_message="by hand")
    asked = len(hub.requests)
    push_run(run_folder, "acme/polite", private=False)
    assert set(hub.files("acme/polite")) == PUSHED - {"value_head.safetensors"} | {"LICENSE"}
    assert not [line for line in hub.requests[asked:] if line.startswith("PUT")]
    push_run(run_folder, "acme/polite", private=False)
    assert len(hub.repo("acme/polite").history()) == 4  # the third push had nothing to say


def test_another_branch_and_a_public_repository(hub, run_folder, caplog):
    HfApi().create_repo("alice/polite", private=False)
    with caplog.at_level(logging.WARNING):
        push_run(run_folder, "alice/polite", revision="round-2")
    assert "alice/polite exists and is public" in caplog.text
    assert set(hub.files("alice/polite", revision="round-2")) == PUSHED
    assert set(hub.files("alice/polite")) == {".gitattributes"}


def test_a_leak_is_refused_and_nothing_is_sent(hub, run_folder):
    (run_folder / "training_config.yaml").write_text("a: 1\ndataset_name: /mnt/disk/pairs.jsonl\n")
    with pytest.raises(UserError, match=r"path:training_config.yaml:2 \(/mnt/disk/pairs.jsonl\)") as error:
        push_run(run_folder)
    assert "\n" not in str(error.value) and hub.requests == []
    push_run(run_folder, allow=["path:training_config.yaml:2"])
    assert set(hub.files("alice/polite")) == PUSHED


def test_a_base_that_nobody_else_has(hub, run_folder, tmp_path):
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path)}
    for part in (run_folder, run_folder / "value"):
        (part / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="adapter_config.json names a local base, .* --base_model"):
        push_run(run_folder)
    push_run(run_folder, base_model="alice/base")
    found = hub.files("alice/polite")
    assert json.loads(found["adapter_config.json"])["base_model_name_or_path"] == "alice/base"
    assert ModelCard.load("alice/polite").data.base_model == "alice/base"


def test_a_folder_that_is_no_run(hub, tmp_path):
    with pytest.raises(UserError, match="no folder"):
        push_run(tmp_path / "nope")
    with pytest.raises(UserError, match="holds no weights"):
        push_run(tmp_path)


# Who may push


def test_tokens_and_namespaces_are_checked_in_one_line(hub, monkeypatch):
    assert check_access("mine") == "alice/mine" and check_access("acme/x") == "acme/x"
    cases = {"bob/x": (None, r"bob/x is not yours to write: you are alice, in \['acme'\]")}
    cases |= {"x": ("hf_wrong", "does not know this token"), "alice/x": (BOB, "you are bob, in no one")}
    for name, (token, message) in cases.items():
        with pytest.raises(UserError, match=message) as error:
            check_access(name, token)
        assert "\n" not in str(error.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="no token: run `hf auth login`, or set HF_TOKEN"):
        check_access("x")


def test_a_hub_that_is_down_at_the_start_stops_nobody(hub, caplog, naps):
    hub.fault(500, times=100)
    with caplog.at_level(logging.WARNING):
        assert create_private_repo("alice/x") == "alice/x"
    assert "cannot be reached now" in caplog.text and "cannot be made now" in caplog.text
    hub.faults.clear()
    assert create_private_repo("x") == "alice/x" and hub.repo("alice/x").private
    assert create_private_repo("y", private=False) == "alice/y" and not hub.repo("alice/y").private


# When the Hub fails


def test_waits_as_long_as_the_hub_asks(hub, run_folder, naps):
    hub.fault(429, match="/commit/", headers={"Retry-After": "30"})
    hub.fault(429, match="repos/create", headers={"RateLimit": '"api";r=0;t=12'})
    hub.fault(500, match="/commit/")
    push_run(run_folder)
    assert [s for s in naps if s] == [13, 31, 8] and set(hub.files("alice/polite")) == PUSHED


def test_a_failure_is_one_line_with_the_command_that_pushes_later(hub, run_folder, naps, capsys):

    def warnings():  # without progress bars
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]

    hub.fault(503, match="/commit/", times=100)
    with pytest.raises(PushError) as error:
        push_run(run_folder, revision="a b")
    command = f"python -m hf_rlhf_ext.hub.push {run_folder} --repo polite --revision 'a b'"
    assert str(error.value).endswith(f"It is kept in {run_folder}; later: {command}") and "503" in str(error.value)
    assert try_push(run_folder) is None
    (line,) = warnings()
    assert line.startswith("warning: not pushed to alice/polite: ") and "hf_rlhf_ext.hub.push" in line
    (run_folder / "report.json").write_text('{"path": "/mnt/disk/x"}')
    assert try_push(run_folder, private=False) is None
    (line,) = warnings()
    assert "path:report.json:1" in line and line.endswith(
        f"later: python -m hf_rlhf_ext.hub.push {run_folder} --public"
    )


def test_what_the_hub_refuses_for_good_is_not_tried_again(hub, run_folder, naps):
    hub.fault(413, match="/commit/", times=100)
    with pytest.raises(PushError, match="413"):
        push_run(run_folder)
    assert len([line for line in hub.requests if "/commit/" in line]) == 1


def test_interrupted_at_every_point_main_is_the_old_or_the_new_and_the_next_push_completes(
    hub, run_folder, naps, monkeypatch
):
    monkeypatch.setattr(push, "_ATTEMPTS", 1)
    push_run(run_folder, "alice/polite")
    rng = random.Random(0)
    faults = [{}, {"read": 1000}, {"done": True}, {"status": 500}, {"status": 429, "headers": {"Retry-After": "1"}}]
    points = sorted(rng.sample(range(1, 12), 10))  # of the twelve requests of a push with two new files
    stopped = 0
    for round_, after in enumerate(points):
        old = hub.files("alice/polite")
        for sign, part in ((1, run_folder / "value"), (-1, run_folder)):
            save_file({"lora": torch.full((600,), sign * (round_ + 1.0))}, part / "adapter_model.safetensors")
        (run_folder / "training_config.yaml").write_text(f"round: {round_}\n")
        hub.fault(**faults[round_ % len(faults)], after=after, times=100)
        try:
            push_run(run_folder, "alice/polite")
        except UserError:
            stopped += 1
        hub.faults.clear()
        now = hub.files("alice/polite")
        new = {name: (run_folder / name).read_bytes() for name in now if name.endswith((".safetensors", ".yaml"))}
        assert now == old or {name: now[name] for name in new} == new  # the whole of one or of the other
        push_run(run_folder, "alice/polite")
        assert {name: hub.files("alice/polite")[name] for name in new} == new
    assert stopped >= 8


def test_the_command_that_pushes_later_works(hub, run_folder, elsewhere):
    done = elsewhere("", "-m", "hf_rlhf_ext.hub.push", run_folder, "--repo", "polite", "--revision", "try")
    assert done.stdout.startswith(f"Pushed: {hub.url}/alice/polite/commit/") and "Traceback" not in done.stderr
    assert set(hub.files("alice/polite", revision="try")) == PUSHED
    done = elsewhere("", "-m", "hf_rlhf_ext.hub.push", run_folder, "--repo", "bob/polite", check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: push_to_hub: bob/")
