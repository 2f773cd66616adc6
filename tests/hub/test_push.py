"""Pushing a finished run to the stand-in: which files arrive, which never do, and what happens if the Hub fails."""

import json
import logging
import random
import re
import shlex

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData
from peft import LoraConfig, get_peft_model
from safetensors.torch import save, save_file

from hf_rlhf_ext.data.prompt_form import PromptForm
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub import client, push
from hf_rlhf_ext.hub.push import (
    PushError,
    check_access,
    content_digest,
    create_private_repo,
    main,
    push_files,
    push_run,
    try_push,
)
from hf_rlhf_ext.modeling.adapters import save_adapter
from hf_rlhf_ext.modeling.base_record import BaseRecord
from hf_rlhf_ext.modeling.loading import load_base_model
from tests.hub.conftest import ALICE, BOB

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
REPORT = {"ppo": {"kl": 3.0}, "versions": {"trl": "1.16.0"}, "command": "python recipes/ppo.py", "seconds": {"ppo": 60}}
CARD = {"kind": "policy", "base_model": BASE, "config": {"learning_rate": 1e-4}, "lineage": {"prompts": "a/prompts"}}
PUSHED = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "base_record.json",
    "frontier.png",
    "prompt_form.json",
    "report.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "training_config.yaml",
    "value/adapter_config.json",
    "value/adapter_model.safetensors",
    "value_head.safetensors",
    ".gitattributes",
    ".hf_rlhf_ext.json",
}


@pytest.fixture
def run_folder(tmp_path):
    """The folder of a PPO run, with additional files that must not be pushed."""
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
    BaseRecord("bfloat16", weights={"model.norm.weight": {"shape": [2], "values": [1.0, -0.5]}}).save(folder)
    PromptForm("text").save(folder)
    (folder / "report.json").write_text(json.dumps(REPORT | {"card": CARD}))
    (folder / "training_config.yaml").write_text("learning_rate: 1.0e-4\n")
    (folder / "frontier.png").write_bytes(b"\x89PNG\0")
    (folder / "README.md").write_text("---\nbase_model: x\n---\n<!-- Provide a summary -->")
    for name in ("training_args.bin", "optimizer.pt", "rng.pth", "checkpoint-8/optimizer.pt", "checkpoint-8/x.json"):
        (folder / name).write_bytes(b"\0")
    for name in ("hf_rlhf_ext.json", "log.jsonl", "ppo_state.json", "checkpoint-8/ref/adapter.safetensors", ".hidden"):
        (folder / name).write_text("{}")
    # What FSDP and DeepSpeed write into checkpoints, which `every_save` pushes.
    for name in (
        "pytorch_model_fsdp.bin",
        "optimizer_0/__0_0.distcp",
        "global_step8/x.json",
        "zero_to_fp32.py",
        "latest",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
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
    assert 'from_pretrained(base, "alice/polite")' in card.text  # although only "polite" was given
    assert "prompts: [a/prompts](https://huggingface.co/a/prompts)" in card.text and "in 1 minute." in card.text
    known = json.loads((run_folder / "pushed.json").read_text())  # for the cards of models made from it
    digest = content_digest(run_folder)
    assert known == {"repo_id": "alice/polite", "commit": repo.history()[0].oid, "weights": digest}
    (run_folder / "pushed.json").unlink()
    assert {p: p.read_bytes() for p in run_folder.rglob("*") if p.is_file()} == before  # nothing else changed


def test_a_second_push_sends_only_what_changed_and_removes_stale_weights(hub, run_folder):
    push_run(run_folder, "acme/polite", private=False)
    assert not hub.repo("acme/polite").private
    (run_folder / "value_head.safetensors").unlink()
    (run_folder / "training_config.yaml").write_text("learning_rate: 2.0e-4\n")
    by_hand = {"LICENSE": b"mine", "fp16/model.safetensors": b"weights of mine" * 100}
    HfApi().create_commit("acme/polite", [CommitOperationAdd(*file) for file in by_hand.items()], commit_message="mine")
    asked = len(hub.requests)
    push_run(run_folder, "acme/polite", private=False)
    assert set(hub.files("acme/polite")) == PUSHED - {"value_head.safetensors"} | set(by_hand)
    assert not [line for line in hub.requests[asked:] if line.startswith("PUT")]
    push_run(run_folder, "acme/polite", private=False)
    assert len(hub.repo("acme/polite").history()) == 4  # the third push made no commit


def test_weights_without_a_card_take_the_old_card_away(hub, run_folder):
    push_run(run_folder, "alice/polite")
    changed = {"adapter_model.safetensors": save({"lora": torch.rand(8)})}  # like a checkpoint
    push_files(changed, "alice/polite")
    assert set(hub.files("alice/polite")) == {".gitattributes", ".hf_rlhf_ext.json", *changed}


def test_a_push_that_another_one_overtook_starts_from_that(hub, run_folder, naps, monkeypatch):
    others = {"ensemble.json": b"{}", "member-0/adapter_config.json": b"{}"}
    commit, first = HfApi.create_commit, [True]

    def overtaken(self, *args, **options):
        if first and first.pop():
            push_files(others, "alice/polite")
        return commit(self, *args, **options)

    monkeypatch.setattr(HfApi, "create_commit", overtaken)
    push_run(run_folder, "alice/polite")
    assert set(hub.files("alice/polite")) == PUSHED and len(hub.repo("alice/polite").history()) == 3


def test_a_user_who_is_called_the_same_here_and_there(hub, run_folder, monkeypatch):
    monkeypatch.setenv("LOGNAME", "alice")
    lineage = {"SFT": "alice/sft@main", "prompts": "local x"}
    report = REPORT | {"card": CARD | {"lineage": lineage}, "command": "python recipes/ppo.py --sft alice/sft"}
    (run_folder / "report.json").write_text(json.dumps(report))
    push_run(run_folder)
    card = ModelCard.load("alice/polite").text
    assert "[alice/sft@main](" in card and "--sft alice/sft" in card and 'from_pretrained(base, "alice/polite")' in card
    (run_folder / "training_config.yaml").write_text("value_model: alice/value\nreward_model:\n- alice/reward\n")
    push_run(run_folder, "acme/polite")
    (run_folder / "training_config.yaml").write_text("run_name: of alice\n")
    (run_folder / "report.json").write_text(json.dumps(REPORT))
    with pytest.raises(UserError, match="user:training_config.yaml:1"):
        push_run(run_folder, "acme/polite")


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
    assert "\n" not in str(error.value) and hub.repos == {}
    push_run(run_folder, allow=["path:training_config.yaml:2"])
    assert set(hub.files("alice/polite")) == PUSHED


def test_a_finding_in_the_card_names_the_line_in_the_folder_and_all_are_allowed_at_once(hub, run_folder, capsys):
    secret = "hf_" + "Ab3Cd4Ef5Gh6Ij7K" * 2
    card = run_folder / "README.md"
    card.write_text(f"{ModelCard.from_template(ModelCardData()).text}\nMy token is {secret}.\nSee /mnt/disk/x.\n")
    line = card.read_text().split("\n").index("See /mnt/disk/x.") + 1
    with pytest.raises(SystemExit):
        main([str(run_folder)])
    said = capsys.readouterr().err
    pushed = int(re.search(r"path:README.md:(\d+) ", said)[1])
    assert f"/mnt/disk/x., line {line} of {card})" in said or f"/mnt/disk/x, line {line} of {card})" in said
    assert f"line {line - 1} of {card})" in said and pushed != line
    allowed = re.search(r"--allow (path:\S+ token:\S+) \(", said)[1].split()  # the secret is the last
    with pytest.raises(SystemExit):
        main(["--allow", *allowed, str(run_folder)])
    assert "give the folder before --allow" in capsys.readouterr().err and hub.repos == {}
    main([str(run_folder), "--allow", *allowed[:1], "--allow", *allowed[1:]])
    text = hub.files("alice/polite")["README.md"].decode()
    assert secret in text and "More Information Needed" not in text
    assert text.split("\n")[pushed - 1] == "See /mnt/disk/x."


def test_a_finding_in_the_generated_part_says_that_it_is_of_the_card_that_is_made(hub, run_folder):
    report = json.loads((run_folder / "report.json").read_text())
    report["card"]["data"] = [{"role": "prompts", "name": "rows of jane@corp-of-jane.com"}]
    (run_folder / "report.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match=r"email:README.md:\d+ \([^)]*, a line of the README.md that this push makes\)"):
        push_run(run_folder)


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


def test_a_base_in_a_folder_beside_the_run_is_local_from_everywhere(hub, tiny_llama, tmp_path, monkeypatch):
    tiny_llama.save_pretrained(tmp_path / "models" / "llama")
    monkeypatch.chdir(tmp_path)
    model = get_peft_model(load_base_model("models/llama"), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "run")
    save_adapter(model, "default", tmp_path / "run" / "value")
    monkeypatch.chdir("/")
    with pytest.raises(UserError, match="names a local base, .*models/llama, which others do not have"):
        push_run(tmp_path / "run")


def test_a_folder_that_is_no_run(hub, tmp_path):
    with pytest.raises(UserError, match="no folder"):
        push_run(tmp_path / "nope")
    with pytest.raises(UserError, match="holds no weights"):
        push_run(tmp_path)


# Permissions


def test_tokens_and_namespaces_are_checked_in_one_line(hub, monkeypatch):
    assert check_access("mine") == "alice/mine" and check_access("acme/x") == "acme/x"
    cases = {"bob/x": (None, r"bob/x is not yours: you are alice, a member of \['acme'\]")}
    cases |= {
        "x": ("hf_wrong", "does not know this token"),
        "alice/x": (BOB, "you are bob, a member of no organization: use one of these namespaces"),
    }
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
    assert "cannot be reached now" in caplog.text and "cannot create alice/x now" in caplog.text
    hub.faults.clear()
    assert create_private_repo("x") == "alice/x" and hub.repo("alice/x").private
    assert create_private_repo("y", private=False) == "alice/y" and not hub.repo("alice/y").private


# Failures of the Hub


def test_waits_as_long_as_the_hub_asks(hub, run_folder, naps):
    hub.fault(429, match="/commit/", headers={"Retry-After": "30"})
    hub.fault(429, match="repos/create", headers={"RateLimit": '"api";r=0;t=12'})
    hub.fault(500, match="/commit/")
    push_run(run_folder)
    assert [s for s in naps if s] == [13, 31, 8] and set(hub.files("alice/polite")) == PUSHED


def test_a_failure_is_one_line_with_the_command_that_pushes_later(hub, run_folder, naps, capsys):

    def warnings():  # lines of stderr without progress bars
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]

    hub.fault(503, match="/commit/", times=100)
    with pytest.raises(PushError) as error:
        push_run(run_folder, revision="a b")
    command = f"hf-rlhf push {run_folder} --repo polite --revision 'a b'"
    assert str(error.value).endswith(f"The run is kept in {run_folder}; later: {command}") and "503" in str(error.value)
    assert try_push(run_folder) is None
    (line,) = warnings()
    assert line.startswith("warning: not pushed to alice/polite: ") and "later: hf-rlhf push" in line
    (run_folder / "report.json").write_text('{"path": "/mnt/disk/x"}')
    assert try_push(run_folder, private=False) is None
    (line,) = warnings()
    assert "path:report.json:1" in line and line.endswith(f"later: hf-rlhf push {run_folder} --public")


def test_the_later_command_says_all_that_was_asked_for(hub, run_folder, naps, capsys):
    hub.fault(503, match="/commit/", times=100)
    options = {"private": False, "revision": "x", "base_model": "alice/base", "allow": ["a:b:1", "c"]}
    options |= {"license": "other", "license_name": "mine-1.0", "license_link": "https://me.org", "language": "en"}
    options |= {"model_name": "A title", "tags": ["a", "b"], "datasets": ["alice/x"]}
    assert try_push(run_folder, "polite", token=ALICE, **options) is None
    line = capsys.readouterr().err.splitlines()[-1]
    hub.faults.clear()
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(push, "push_run", lambda *args, **given: asked.append((args, given)))
        push.main(shlex.split(line.partition("later: hf-rlhf push ")[2]))
    assert asked == [((str(run_folder), "polite"), options | {"merge": None})]
    command = push.later_command(run_folder, "polite", base_model=None)
    assert command == f"hf-rlhf push {run_folder} --repo polite"


def test_a_merge_in_a_push_names_the_commands_that_do_it(hub, run_folder, capsys):
    merged = f"{run_folder}-merged"
    commands = f"`hf-rlhf merge {run_folder} {merged} --dtype float16`, then `hf-rlhf push {merged}`"
    with pytest.raises(UserError, match="merge") as error:
        push_run(run_folder, merge="float16")
    assert commands in str(error.value) and "\n" not in str(error.value) and hub.requests == []
    with pytest.raises(SystemExit):
        push.main([str(run_folder), "--merge", "float16"])
    assert commands in capsys.readouterr().err
    assert try_push(run_folder, merge="float16") is None
    assert commands in capsys.readouterr().err


def test_a_hub_that_asks_for_a_day_is_for_later(hub, run_folder, naps):
    hub.fault(429, match="/commit/", headers={"Retry-After": "86400"})
    with pytest.raises(PushError, match="429 .*; later: hf-rlhf push"):
        push_run(run_folder)
    assert not [s for s in naps if s > 1]


def test_an_owner_that_cannot_be_asked_for_is_not_guessed(hub, run_folder, naps):
    hub.fault(503, match="whoami", times=100)
    with pytest.raises(PushError, match="cannot be reached, so the owner of polite is not known.*later"):
        push_run(run_folder)
    push_run(run_folder, "alice/polite")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("adapter_config.json", "{", "adapter_config.json is not valid JSON (Expecting"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json is not a JSON object"),
        ("report.json", "", "report.json is not valid JSON (Expecting"),
        (
            "report.json",
            json.dumps(REPORT | {"card": CARD | {"hue": "red"}}),
            "unexpected keyword argument 'hue'",
        ),
        ("report.json", json.dumps(REPORT | {"card": "none"}), "cannot make a card from"),
    ],
)
def test_a_broken_file_is_one_line(hub, run_folder, capsys, name, content, message):
    (run_folder / name).write_text(content)
    assert try_push(run_folder) is None
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert message in line and "; later: hf-rlhf push" in line and "Traceback" not in line
    with pytest.raises(UserError):
        push_run(run_folder)


def test_the_license_is_the_base_s_or_the_one_given(hub, run_folder):
    config = {"peft_type": "LORA", "base_model_name_or_path": "alice/base"}
    for part in (run_folder, run_folder / "value"):
        (part / "adapter_config.json").write_text(json.dumps(config))
    (run_folder / "report.json").write_text(json.dumps(REPORT | {"card": CARD | {"base_model": "alice/base"}}))
    push_run(run_folder)
    assert ModelCard.load("alice/polite").data.license is None
    HfApi().create_repo("alice/base")
    HfApi().upload_file(
        repo_id="alice/base", path_in_repo="README.md", path_or_fileobj=b"---\nlicense: llama3.2\n---\nA base."
    )
    push_run(run_folder)
    assert ModelCard.load("alice/polite").data.license == "llama3.2"
    push_run(run_folder, license="mit")
    assert ModelCard.load("alice/polite").data.license == "mit"


def test_an_error_of_the_program_is_not_tried_again(naps):
    for error in (TypeError("x"), KeyError("x"), ValueError("x")):
        with pytest.raises(type(error)):
            client.retried(lambda error=error: (_ for _ in ()).throw(error))
    assert naps == []


def test_a_broken_list_of_pushed_files_and_a_broken_note_of_the_last_push_stop_nothing(hub, run_folder, naps, caplog):
    (run_folder / "pushed.json").write_text(json.dumps({"repo_id": "alice/polite", "owner_text": 5}))
    push_run(run_folder, "alice/polite")
    HfApi().upload_file(repo_id="alice/polite", path_or_fileobj=b"[]", path_in_repo=client.MANIFEST)
    push_run(run_folder, "alice/polite", tags="one", datasets=None, allow="path:none", message="")
    assert "cannot be read" in caplog.text and naps == []
    assert "one" in ModelCard(hub.files("alice/polite")["README.md"].decode()).data.tags
    with pytest.raises(UserError, match="tags"):
        push_run(run_folder, "alice/polite", tags=[""])


def test_what_the_hub_refuses_for_good_is_not_tried_again(hub, run_folder, naps):
    hub.fault(413, match="/commit/", times=100)
    with pytest.raises(PushError, match="413"):
        push_run(run_folder)
    assert len([line for line in hub.requests if "/commit/" in line]) == 1


def test_interrupted_at_every_point_main_is_the_old_or_the_new_and_the_next_push_completes(
    hub, run_folder, naps, monkeypatch
):
    monkeypatch.setattr(client, "ATTEMPTS", 1)
    push_run(run_folder, "alice/polite")
    rng = random.Random(0)
    faults = [{}, {"read": 1000}, {"done": True}, {"status": 500}, {"status": 429, "headers": {"Retry-After": "1"}}]
    points = sorted(rng.sample(range(1, 14), 10))  # of the fourteen requests of a push with two new files
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
        assert now == old or {name: now[name] for name in new} == new  # all old files or all new files
        push_run(run_folder, "alice/polite")
        assert {name: hub.files("alice/polite")[name] for name in new} == new
    assert stopped >= 8


def test_the_command_that_pushes_later_works(hub, run_folder, elsewhere):
    done = elsewhere("", "-m", "hf_rlhf_ext.hub.push", run_folder, "--repo", "polite", "--revision", "try")
    assert done.stdout.startswith(f"Pushed: {hub.url}/alice/polite/commit/") and "Traceback" not in done.stderr
    assert set(hub.files("alice/polite", revision="try")) == PUSHED
    done = elsewhere("", "-m", "hf_rlhf_ext.hub.push", run_folder, "--repo", "bob/polite", check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: push_to_hub: bob/")
