"""`hf-rlhf check-hub` on the stand-in: it finds no difference there, says one that is made, and leaves nothing."""

import re
from pathlib import Path

import datasets
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from hf_rlhf_ext.cli.main import run_command
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.check import check_hub
from hf_rlhf_ext.hub.check_parts import Check, OwnRepositories
from hf_rlhf_ext.hub.check_steps import headers_of_cards
from tests.hub import headers


@pytest.fixture
def others(hub):
    """A repository that was there before."""
    HfApi().create_repo("alice/hf-rlhf-check-base")
    yield hub.repo("alice/hf-rlhf-check-base")
    assert hub.repos == {("models", "alice/hf-rlhf-check-base"): hub.repo("alice/hf-rlhf-check-base")}
    assert len(hub.repo("alice/hf-rlhf-check-base").history()) == 1


def differing(checks):
    return {check.what: check.found for check in checks if not check.same}


def test_everything_is_as_on_the_stand_in_and_nothing_is_left(hub, others, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    asked = len(hub.requests)
    run_command(["check-hub"])
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if line.startswith("ok ")]
    assert printed[-1] == f"All {len(lines)} as on the stand-in." and len(lines) > 30
    for tried in ("visibility of a new repository", "bytes of the pulled files", "outputs of the pulled adapter"):
        assert any(tried in line for line in lines)
    made = [line for line in hub.requests[asked:] if "/api/models/" in line or "/api/datasets/" in line]
    assert made and all(re.search(r"alice/hf-rlhf-check-[0-9a-f]{16}-(base|adapter|data)", line) for line in made)
    assert not list(Path(constants.HF_HUB_CACHE).glob("**/*hf-rlhf-check-*"))


def test_what_the_hub_does_otherwise_is_said_and_the_command_fails(hub, others, monkeypatch, capsys):
    monkeypatch.setattr(headers, "HUB_LICENSES", {"apache-2.0": "", "new-1.0": "", "other": ""})

    def step(own, scratch):
        repo_id = own.create("a")
        yield Check("visibility", "public", "private")
        HfApi().hf_hub_download(repo_id, "no.txt")

    checks = check_hub(steps=[headers_of_cards, step])
    found = differing(checks)
    assert found.pop("list of licenses").startswith("differs in afl-3.0") and found["visibility"] == "public"
    assert found["several licenses"] == "refused" and found["step"].startswith("failed: 404")
    assert "new-1.0" in [check for check in checks if check.what == "list of licenses"][0].found
    printed = capsys.readouterr().out
    assert re.search(r"^DIFFERS +visibility +public; the stand-in: private$", printed, re.MULTILINE)
    with pytest.raises(SystemExit, match="1"):
        monkeypatch.setattr("hf_rlhf_ext.hub.check_steps.STEPS", (headers_of_cards,))
        run_command(["check-hub", "--repo_prefix", "acme/try"])


def test_repositories_are_deleted_after_ctrl_c_and_kept_on_demand(hub, others, capsys):
    def step(own, scratch):
        own.create("a")
        own.create("b", "dataset")
        assert len(hub.repos) == 3 and all(repo.private for repo in hub.repos.values() if repo is not others)
        yield Check("first", "done", "done")
        if interrupt:
            raise KeyboardInterrupt

    interrupt = True
    with pytest.raises(KeyboardInterrupt):
        check_hub(steps=[step])
    assert len(hub.repos) == 1
    interrupt = False
    check_hub(steps=[step], keep=True)
    assert len(hub.repos) == 3
    kept = re.findall(r"^Kept: (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert [url.removeprefix(hub.url) for url in kept] == [
        f"/{'datasets/' * (kind == 'datasets')}{name}" for kind, name in hub.repos if name != "alice/hf-rlhf-check-base"
    ]
    for kind, name in list(hub.repos):
        if name != "alice/hf-rlhf-check-base":
            HfApi().delete_repo(name, repo_type=kind.rstrip("s"))


def test_a_repository_of_somebody_is_never_deleted(hub, others):
    with OwnRepositories("alice/hf-rlhf-check", None, keep=False) as own:
        with pytest.raises(HfHubHTTPError, match="409"):
            own.create("base")
        hub.fault(504, match="repos/create", done=True)  # created, but the answer was lost
        with pytest.raises(HfHubHTTPError):
            own.create("new")


def test_what_cannot_be_deleted_is_named_with_the_command(hub, naps, capsys):
    def step(own, scratch):
        own.create("a")
        hub.fault(403, match="DELETE")
        yield Check("first", "done", "done")

    checks = check_hub(steps=[step])
    (name,) = [name for _, name in hub.repos]
    assert differing(checks) == {"deletion of the repositories": f"all but {name}"}
    assert f"hf repos delete {name} --type model" in capsys.readouterr().err


def test_without_a_token_or_a_possible_name_nothing_is_tried(hub, monkeypatch, capsys):
    with pytest.raises(UserError, match="such as my-check"):
        check_hub("my check")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SystemExit, match="2"):
        run_command(["check-hub"])
    assert "hf auth login" in capsys.readouterr().err and hub.repos == {}
