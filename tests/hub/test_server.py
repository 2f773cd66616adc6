"""The Hub stand-in, tested with its clients: huggingface_hub, datasets, peft and transformers."""

import base64
import json
import re
import subprocess
import sys
import time

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

from tests.hub.conftest import ALICE, BOB, ROOT

WEIGHTS = bytes(range(256)) * 40


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run" / "value").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}\n")
    (tmp_path / "run" / "empty.txt").touch()
    (tmp_path / "run" / "model.safetensors").write_bytes(WEIGHTS)
    (tmp_path / "run" / "value" / "head.safetensors").write_bytes(WEIGHTS[:-1])
    return tmp_path / "run"


def test_upload_then_download_gives_the_same_bytes(hub, folder, tmp_path):
    api = HfApi()
    assert api.create_repo("alice/a", private=True).repo_id == "alice/a"
    first = api.upload_folder(repo_id="alice/a", folder_path=folder)
    assert {line for line in hub.requests if line.startswith("PUT")}  # two files went by LFS
    assert hub.repo("alice/a").at("main").files["model.safetensors"].lfs
    got = snapshot_download("alice/a", local_dir=tmp_path / "got")
    for path in folder.rglob("*"):
        if path.is_file():
            assert (tmp_path / "got" / path.relative_to(folder)).read_bytes() == path.read_bytes()
    assert got == str(tmp_path / "got")
    names = {"config.json", "empty.txt", "model.safetensors", "value/head.safetensors", ".gitattributes"}
    assert set(api.list_repo_files("alice/a")) == names
    assert {entry.path for entry in api.list_repo_tree("alice/a")} == names - {"value/head.safetensors"} | {"value"}
    assert [entry.path for entry in api.list_repo_tree("alice/a", "value")] == ["value/head.safetensors"]
    info = api.model_info("alice/a")
    assert info.sha == first.oid and info.private


def test_the_same_files_again_are_no_commit_and_no_upload(hub, folder):
    api = HfApi()
    api.create_repo("alice/a")
    first = api.upload_folder(repo_id="alice/a", folder_path=folder)
    asked = len(hub.requests)
    assert api.upload_folder(repo_id="alice/a", folder_path=folder).oid == first.oid
    assert not [line for line in hub.requests[asked:] if line.startswith("PUT") or "/commit/" in line]
    assert len(hub.repo("alice/a").history()) == 2


def test_revisions_branches_tags_and_deletions(hub, folder):
    api = HfApi()
    api.create_repo("acme/a")
    first = api.upload_folder(repo_id="acme/a", folder_path=folder)
    api.create_tag("acme/a", tag="v1")
    api.create_branch("acme/a", branch="try/out")
    (folder / "config.json").write_text('{"a": 1}\n')
    (folder / "empty.txt").unlink()
    api.upload_folder(repo_id="acme/a", folder_path=folder, delete_patterns="*.txt")
    read = {r: open(hf_hub_download("acme/a", "config.json", revision=r)).read() for r in (first.oid, "v1", "try/out")}
    assert set(read.values()) == {"{}\n"}
    assert open(hf_hub_download("acme/a", "config.json")).read() == '{"a": 1}\n'
    refs = api.list_repo_refs("acme/a")
    assert [b.name for b in refs.branches] == ["main", "try/out"] and refs.tags[0].target_commit == first.oid
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("acme/a", "empty.txt")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("acme/a", "config.json", revision="v2")
    assert [c.title for c in api.list_repo_commits("acme/a")][-1] == "initial commit"
    api.delete_repo("acme/a")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("acme/a")


def test_a_half_downloaded_file_goes_on_where_it_stopped(hub, folder):
    api = HfApi()
    api.create_repo("alice/a")
    api.upload_folder(repo_id="alice/a", folder_path=folder)
    url = f"{hub.url}/alice/a/resolve/main/model.safetensors"
    part = get_session().get(url, headers={"Range": "bytes=10000-", "Authorization": f"Bearer {ALICE}"})
    assert part.status_code == 206 and part.content == WEIGHTS[10000:]
    assert get_session().head(url).headers["X-Linked-Size"] == str(len(WEIGHTS))


def test_private_is_hidden_and_other_peoples_names_are_refused(hub, folder):
    api = HfApi()
    api.create_repo("alice/secret", private=True)
    api.upload_folder(repo_id="alice/secret", folder_path=folder)
    api.create_repo("alice/open")
    for token in (False, BOB):
        with pytest.raises(RepositoryNotFoundError):
            HfApi().model_info("alice/secret", token=token)
        with pytest.raises(RepositoryNotFoundError):
            snapshot_download("alice/secret", token=token)
    assert HfApi().model_info("alice/open", token=False).id == "alice/open"
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(token=BOB).create_repo("alice/mine")
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(token=BOB).upload_folder(repo_id="alice/open", folder_path=folder)
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(token="hf_wrong").create_repo("alice/mine")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("alice/open")
    api.create_repo("alice/open", exist_ok=True)
    assert api.whoami()["name"] == "alice" and [org["name"] for org in api.whoami()["orgs"]] == ["acme"]
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token="hf_wrong").whoami()


def test_content_that_is_not_its_sha256_and_a_commit_without_it_are_refused(hub):
    api = HfApi()
    api.create_repo("alice/a")
    put = get_session().put(f"{hub.url}/lfs/upload/{'0' * 64}", content=b"x")
    assert put.status_code == 400 and not hub.uploaded
    line = {"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": "0" * 64, "size": 1}}
    body = "\n".join(map(json.dumps, [{"key": "header", "value": {"summary": "x"}}, line]))
    headers = {"Authorization": f"Bearer {ALICE}"}
    refused = get_session().post(f"{hub.url}/api/models/alice/a/commit/main", content=body, headers=headers)
    assert refused.status_code == 400 and len(hub.repo("alice/a").history()) == 1
    old = hub.repo("alice/a").at("main").oid
    add = [CommitOperationAdd("a.txt", b"a")]
    api.create_commit("alice/a", add, commit_message="a", parent_commit=old)
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("alice/a", [CommitOperationAdd("a.txt", b"b")], commit_message="b", parent_commit=old)


def test_a_readme_is_validated_on_every_commit(hub):
    HfApi().create_repo("alice/a")
    with pytest.raises(ValueError, match="Invalid metadata"):
        HfApi().create_commit(
            "alice/a", [CommitOperationAdd("README.md", b"---\na: [\n---\n# A")], commit_message="card"
        )
    ModelCard("---\nlicense: mit\n---\n# A").push_to_hub("alice/a")
    assert ModelCard.load("alice/a").data.license == "mit"


@pytest.mark.parametrize(
    "header, refused",
    [
        ("license: [mit, cc-by-4.0]\nbase_model: [alice/a, gpt2]\nlanguage: [en, deu]\ntags: [a]", None),
        ("license: other\nlicense_name: a-1.0\nmodel-index: [{name: a, results: []}]", None),
        ("license: Apache 2.0", r'"license" must be one of \[apache-2.0, mit'),
        ("base_model: /runs/base", r'"base_model" with value "/runs/base" is not valid'),
        ("datasets: [my rows]", r'"datasets\[0\]" with value "my rows" is not valid'),
        ("language: english", r'"language\[0\]" with value "english" is not valid'),
        ("tags: a", '"tags" must be an array'),
        ("model-index: [{name: a}]", r'"model-index\[0\].results" is required'),
        ("model-index: [{name: a, results: [{}]}]", r'"model-index\[0\].results\[0\].task" is required'),
    ],
)
def test_a_header_that_the_hub_refuses_is_refused_by_the_check_and_by_the_commit(hub, header, refused):
    HfApi().create_repo("alice/a")
    card = f"---\n{header}\n---\n# A\n"
    line = {"key": "file", "value": {"path": "README.md", "content": base64.b64encode(card.encode()).decode()}}
    body = "\n".join(map(json.dumps, [{"key": "header", "value": {"summary": "x"}}, line]))
    url, headers = f"{hub.url}/api/models/alice/a/commit/main", {"Authorization": f"Bearer {ALICE}"}
    check = get_session().post(f"{hub.url}/api/validate-yaml", json={"content": card, "repoType": "model"}).json()
    commit = get_session().post(url, content=body, headers=headers)
    if refused is None:
        assert check == {"errors": [], "warnings": []} and commit.status_code == 200
        return
    assert re.match(refused, check["errors"][0]["message"])
    assert commit.status_code == 400 and re.match(refused, commit.json()["error"])
    assert len(hub.repo("alice/a").history()) == 1


def test_a_name_that_no_repository_can_have_is_refused(hub):
    headers = {"Authorization": f"Bearer {ALICE}"}
    answer = get_session().post(f"{hub.url}/api/repos/create", json={"name": "a--b", "type": "model"}, headers=headers)
    assert answer.status_code == 400 and hub.repos == {}


def test_the_header_of_a_card_is_what_the_hub_knows_of_a_model(hub):
    header = "library_name: peft\npipeline_tag: text-generation\nbase_model: alice/base\ntags: [rlhf]"
    HfApi().create_repo("alice/a")
    ModelCard(f"---\n{header}\n---\n# A").push_to_hub("alice/a")
    info = HfApi().model_info("alice/a")
    assert (info.library_name, info.pipeline_tag) == ("peft", "text-generation")
    assert set(info.tags) == {"rlhf", "base_model:alice/base", "base_model:adapter:alice/base"}


def test_the_server_starts_before_the_client_is_imported(tmp_path):
    # Programs start it, and set HF_ENDPOINT to its address, which the client reads when it is imported.
    code = "import sys, tests.hub.server; print(sorted({'huggingface_hub', 'hf_rlhf_ext'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_faults_happen_when_and_where_they_are_asked_for(hub, folder, naps):
    api = HfApi()
    api.create_repo("alice/a")
    hub.fault(429, match="preupload", headers={"Retry-After": "7"})
    hub.fault(500, match="lfs/objects/batch", times=2)
    hub.fault(match="PUT", read=100)  # the connection is cut in the middle of a file
    api.upload_folder(repo_id="alice/a", folder_path=folder)
    assert naps == [8.0, 1, 2, 1] and len(hub.files("alice/a")) == 5
    (folder / "config.json").write_text("{1}")
    hub.fault(match="/commit/", done=True)  # the commit arrived, but its answer was lost
    with pytest.raises(Exception, match="disconnected"):
        api.upload_folder(repo_id="alice/a", folder_path=folder)
    assert len(hub.repo("alice/a").history()) == 3 and hub.files("alice/a")["config.json"] == b"{1}"
    hub.fault(403, match="whoami", after=1)
    assert api.whoami()["name"] == "alice"
    with pytest.raises(HfHubHTTPError, match="403"):
        api.whoami()


def test_stopping_does_not_wait_for_clients_that_keep_their_connection(hub):
    HfApi().whoami()
    start = time.monotonic()
    hub.stop()
    assert time.monotonic() - start < 1
    with pytest.raises(Exception, match="refused"):
        HfApi().whoami()


LIBRARIES = """
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
import sys

rows = Dataset.from_list([{"a": i, "b": str(i)} for i in range(20)])
info = rows.push_to_hub("alice/rows", private=True)
assert load_dataset("alice/rows", split="train").to_list() == rows.to_list()
Dataset.from_list([{"a": 0, "b": ""}]).push_to_hub("alice/rows")
assert len(load_dataset("alice/rows", split="train", revision=info.oid)) == 20
assert len(load_dataset("alice/rows", split="train")) == 1

AutoTokenizer.from_pretrained(sys.argv[1]).push_to_hub("alice/tiny", private=True)
AutoModelForCausalLM.from_pretrained(sys.argv[1]).push_to_hub("alice/tiny")
base = AutoModelForCausalLM.from_pretrained("alice/tiny")
model = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
ids = torch.tensor([[1, 2, 3]])
expected = model.eval()(ids).logits
model.push_to_hub("alice/adapter", private=True)
again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("alice/tiny"), "alice/adapter")
assert torch.equal(again.eval()(ids).logits, expected)
assert AutoTokenizer.from_pretrained("alice/tiny")("abc").input_ids
"""


@pytest.mark.slow
def test_datasets_transformers_and_peft_make_their_round_trips(hub, elsewhere, stories_path):
    elsewhere(LIBRARIES, stories_path)
    assert hub.repo("alice/rows", "datasets").private and hub.repo("alice/adapter").private
