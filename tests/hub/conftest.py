"""The Hub stand-in as a fixture, for clients in this process and in others."""

import os
import subprocess
import sys
import time

import pytest
import transformers.utils.hub
from huggingface_hub import constants, hf_api

from tests.hub.server import USERS, HubServer

ALICE, BOB = USERS
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """A running stand-in for the Hub, which huggingface_hub in this process uses as alice, with an empty cache."""
    server, home = HubServer().start(), tmp_path_factory.mktemp("hf_home")
    # The client reads these when it is imported, so environment variables would be too late.
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(
        transformers.utils.hub, "_hf_api", None
    )  # a new one uses this server, and is removed after the test
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setenv("HF_TOKEN", ALICE)
    yield server
    server.stop()


@pytest.fixture
def naps(monkeypatch) -> list[float]:
    """Collects the seconds that retries would have waited. They do not wait in tests."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


@pytest.fixture
def elsewhere(hub, tmp_path_factory):
    """Runs code in a new process that only has access to the stand-in: elsewhere(code, *argv, token=…)."""

    def run(code: str, *argv: str, token: str | None = ALICE, check: bool = True, **env: str):
        home = tmp_path_factory.mktemp("elsewhere")
        known = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
        known |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": ROOT}
        known |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"} | ({"HF_TOKEN": token} if token else {})
        done = subprocess.run(
            [sys.executable, *(("-c", code) if code else ()), *map(str, argv)],
            cwd=home,
            env=known | env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert not check or done.returncode == 0, done.stderr
        return done

    return run
