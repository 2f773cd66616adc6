"""Real Chromium and a real server for the tests of the pages.

As a program, serves a store until it is killed: python -m tests.collect.browser STORE PORT TRAP
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hf_rlhf_ext.collect.store import Store

ROOT = Path(__file__).parents[2]
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
ARGUMENTS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

COUNT_VIOLATIONS = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => window.violations.push(event.blockedURI));
"""


def launch(playwright):
    """Starts Chromium, or skips the test where there is none (fails with RLHF_REQUIRE_BROWSER=1)."""
    path = os.environ.get("RLHF_CHROMIUM", "/usr/bin/chromium")
    if not Path(path).exists():
        reason = f"no Chromium at {path}: set RLHF_CHROMIUM to it"
        if os.environ.get("RLHF_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    arguments = list(ARGUMENTS)
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")
    return playwright.chromium.launch(executable_path=path, args=arguments)


class Watched:
    """Pages of one test, and what went wrong in them: errors in the console, dialogs, and blocked content."""

    def __init__(self, browser):
        self.browser = browser
        self.contexts = []
        self.errors: list[str] = []
        self.dialogs: list[str] = []
        self.expected = ()
        """Parts of messages in the console that the test brings about."""

    def sign_in(self, url: str, token: str, *, context=None, **options):
        """Opens the link of a person, in a browser profile of its own unless `context` is given."""
        if context is None:
            context = self.context(**options)
        page = context.new_page()
        page.goto(f"{url}/join/{token}")
        return page

    def context(self, **options):
        context = self.browser.new_context(reduced_motion="reduce", **options)
        context.set_default_timeout(10_000)
        context.add_init_script(COUNT_VIOLATIONS)
        context.on("page", self._watch)
        self.contexts.append(context)
        return context

    def _watch(self, page) -> None:
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", self._on_dialog)

    def _on_console(self, message) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def _on_dialog(self, dialog) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def close(self) -> None:
        """Closes the pages. Raises if one of them had an error that the test did not expect."""
        for context in self.contexts:
            context.close()
        unexpected = [text for text in self.errors if not any(part in text for part in self.expected)]
        assert unexpected == []
        assert self.dialogs == []


def ready(page, kind: str = "compare", *, instead_of: str | None = None) -> str:
    """Waits until a task is shown that takes keys, and returns its number."""
    other = "" if instead_of is None else f":not([data-task='{instead_of}'])"
    wait_for(page, f"main[data-state=task][data-kind={kind}][data-takes-keys=true]{other}:not([aria-busy])")
    return page.get_attribute("main", "data-task")


def wait_for(page, css: str, text: str = "") -> None:
    """Waits for a visible element that holds a text.

    This looks at every frame. Playwright's own wait looks only every half a second in the end. What is evaluated is
    a function, as the page's Content-Security-Policy forbids to evaluate an expression again and again.
    """
    page.wait_for_function(_IS_VISIBLE, arg=[css, text])


_IS_VISIBLE = """([css, text]) => [...document.querySelectorAll(css)].some(
  (element) => element.checkVisibility() && element.innerText.includes(text))"""


class ServerProcess:
    """The server in a process of its own, on one port over all its lives. With the trap set, it dies at the next
    judgment: after the commit, before the first byte of the reply."""

    def __init__(self, store: Path, folder: Path):
        self.store = store
        self.trap = folder / "trap"
        self.port = 0
        self.process = None

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.collect.browser", str(self.store), str(self.port), str(self.trap)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().strip()
        self.port = int(self.url.rsplit(":", 1)[1])

    def wait_for_death(self) -> None:
        assert self.process.wait(10) == -signal.SIGKILL
        self.process.stdout.close()
        self.trap.unlink()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        self.process.stdout.close()


def dying(app, trap: Path):
    """The app, which kills its process instead of answering a judgment while the trap is set."""

    async def wrapped(scope, receive, send):
        async def send_or_die(message):
            if scope["path"] == "/api/judgments" and trap.exists():
                os.kill(os.getpid(), signal.SIGKILL)
            await send(message)

        await app(scope, receive, send_or_die if scope["type"] == "http" else send)

    return wrapped


def main(store_path: str, port: str, trap: str) -> None:
    from hf_rlhf_ext.collect.web.app import create_app
    from hf_rlhf_ext.collect.web.server import Server

    with Store(store_path) as store, Server(dying(create_app(store), Path(trap)), port=int(port)) as server:
        print(server.url, flush=True)
        signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
