"""The pages in a real browser: what people do there is what the store has, and everybody can use them."""

import json
import re

import pytest

from hf_rlhf_ext.collect.store import Settings, Store
from hf_rlhf_ext.collect.tasks import Task
from tests.collect.browser import PHONE, ServerProcess, Watched, launch, ready, wait_for

pytestmark = pytest.mark.xdist_group("processes")

sync_api = pytest.importorskip("playwright.sync_api")
axe_api = pytest.importorskip("axe_playwright_python.sync_playwright")

LONG_WORD = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 2
WIDE = f"""{LONG_WORD}

```python
{"a_long_name = " * 20}1
```

| {" | ".join(f"column_{number}" for number in range(12))} |
|{"---|" * 12}
| {" | ".join("a_long_value" for _ in range(12))} |

`{LONG_WORD}` and https://example.org/{LONG_WORD}
"""

HOSTILE = """<script>window.hacked = 1; alert(1)</script>
<img src=x onerror="window.hacked = 1; alert(2)">
<svg onload="window.hacked = 1"></svg>

[click me](javascript:window.hacked=1) [or me](JaVaScRiPt:alert(3)) [me](data:text/html,<script>alert(4)</script>)

<style>body { display: none }</style> ![picture](https://evil.example/a.png)
<a href="javascript:alert(5)" onclick="window.hacked = 1">raw</a>
"""


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


@pytest.fixture
def watched(browser):
    watched = Watched(browser)
    yield watched
    watched.close()


@pytest.fixture
def site(tmp_path):
    """Starts the server in a thread: `site(tasks, **settings)` returns its store and its address."""
    from hf_rlhf_ext.collect.web.app import create_app
    from hf_rlhf_ext.collect.web.server import Server

    opened = []

    def start(tasks, **settings):
        store = Store(tmp_path / "store.sqlite")
        store._writer.execute("PRAGMA synchronous = OFF")  # nothing waits for the disk, which is faster
        store.save_settings(Settings(**{"gold_share": 0.0, "wanted": 9} | settings))
        store.add_tasks(tasks)
        server = Server(create_app(store))
        server.__enter__()
        opened.extend([server.stop, store.close])
        return store, server.url

    yield start
    for close in opened:
        close()


def pairs(n: int) -> list[Task]:
    return [Task(f"Question {number}", [f"Right {number}", f"Wrong {number}"]) for number in range(n)]


def answers_of(store: Store) -> list[dict]:
    return [judgment.answer for judgment in store.judgments()]


# ---- What was clicked is what the store has -----------------------------------------------------------------------


class Person:
    """Somebody at the keyboard, who remembers what they saw and pressed."""

    def __init__(self, name: str, page):
        self.name = name
        self.page = page
        self.clicks: dict[str, tuple[str, int]] = {}
        """Prompt -> text of the answer shown first, and the digit that counts."""
        self.task = None
        self.n_repeats = 0
        page.on("response", self._count_repeat)

    def _count_repeat(self, response) -> None:
        if response.url.endswith("/api/judgments") and response.ok:
            self.n_repeats += response.json()["repeat"]

    def look(self) -> tuple[str, str]:
        self.task = ready(self.page, instead_of=self.task)
        prompt = self.page.inner_text("#prompt").strip()
        first = self.page.locator(".pane").first.inner_text().strip()
        return prompt, first

    def press(self, digit: int) -> None:
        prompt, first = self.look()
        self.clicks[prompt] = (first, digit)
        self.page.keyboard.press(str(digit))

    def undo(self) -> None:
        """Takes the last click back; the page shows it with what had been chosen."""
        last = list(self.clicks)[-1]
        self.task = ready(self.page, instead_of=self.task)
        self.page.keyboard.press("u")
        prompt, first = self.look()
        assert (prompt, first) == (last, self.clicks[last][0])
        assert self.page.locator(".scale input:checked").get_attribute("value") == str(self.clicks[last][1])
        del self.clicks[last]
        self.task = None  # the same task is judged again


def expected(person: Person, tasks: list[Task]) -> dict[int, int]:
    """Preference by completion of every click of a person, by task."""
    found = {}
    for task in tasks:
        if task.prompt in person.clicks:
            first, digit = person.clicks[task.prompt]
            found[task.id] = digit if first == task.completions[0] else 8 - digit
    return found


@pytest.mark.slow
def test_forty_judgments_of_two_people_survive_undo_reload_and_a_killed_server(tmp_path, watched):
    path = tmp_path / "store.sqlite"
    with Store(path) as store:
        store.save_settings(Settings(gold_share=0.0, wanted=2))
        store.add_tasks(pairs(20))
        tokens = [store.add_annotator(name) for name in ("Ada", "Ben")]
    server = ServerProcess(path, tmp_path)
    server.start()
    try:
        ada, ben = (
            Person(name, watched.sign_in(server.url, token)) for name, token in zip(("Ada", "Ben"), tokens, strict=True)
        )
        _judge_through_all_troubles(ada, ben, server, watched)
    finally:
        server.stop()

    with Store(path) as store:
        tasks = store.tasks()
        judgments = store.judgments()
        assert len(judgments) == 40
        assert len({(judgment.annotator, judgment.task_id) for judgment in judgments}) == 40
        for person in (ada, ben):
            stored = {
                judgment.task_id: judgment.answer["preference"]
                for judgment in judgments
                if judgment.annotator == person.name
            }
            assert stored == expected(person, tasks)
        undone = [judgment for judgment in store.judgments(live_only=False) if judgment.undone is not None]
        assert len(undone) == 2
    assert ada.n_repeats + ben.n_repeats >= 1  # a judgment was sent again, and the store knew it


TRY_NOW = "document.getElementById('try-now').click()"  # which the page may have done by itself meanwhile


def _judge_through_all_troubles(ada: Person, ben: Person, server: ServerProcess, watched: Watched) -> None:
    watched.expected = (
        "ERR_CONNECTION_REFUSED",
        "ERR_EMPTY_RESPONSE",
        "ERR_CONNECTION_RESET",
        "ERR_SOCKET_NOT_CONNECTED",
    )
    for digit in (1, 2, 3, 4, 5):
        ada.press(digit)
        ben.press(8 - digit)

    ada.undo()
    ada.press(7)

    # A reload in the middle of a task keeps the task, the order of its answers and what was entered.
    before = ben.look()
    ben.page.keyboard.press("c")
    ben.page.keyboard.type("half a thought")
    ben.page.reload()
    ben.task = None
    assert ben.look() == before
    assert ben.page.input_value("#comment") == "half a thought"
    ben.task = None
    ben.press(6)

    # Killed between the commit and the reply. Ada reloads her page when it is up again; Ben's page tries by itself.
    for person, other in ((ada, ben), (ben, ada)):
        for page in (person.page, other.page):
            wait_for(page, "main:not([aria-busy])")  # nothing of before falls into the trap
        server.trap.touch()
        person.press(2)
        server.wait_for_death()
        wait_for(person.page, "#try-now")
        assert person.page.inner_text("#status") == "Not saved yet, trying again"
        person.page.keyboard.press("5")  # nothing else counts until the first one is saved
        other.press(3)
        wait_for(other.page, "#try-now")
        server.start()
        if person is ada:
            person.page.reload()
        else:
            person.page.evaluate(TRY_NOW)
        other.page.evaluate(TRY_NOW)
        for page in (person.page, other.page):
            wait_for(page, "main:not([aria-busy])[data-state=task]")

    ben.undo()
    ben.press(1)
    while len(ada.clicks) < 20 or len(ben.clicks) < 20:
        for person in (ada, ben):
            if len(person.clicks) < 20:
                person.press(1 + len(person.clicks) * 3 % 7)
    for person in (ada, ben):
        wait_for(person.page, "main[data-state=done]")
        assert "20 judged" in person.page.inner_text("#pace")


def test_a_key_that_is_held_or_pressed_twice_judges_once(site, watched):
    store, url = site(pairs(4))
    page = watched.sign_in(url, store.add_annotator("Ada"))
    first = ready(page)
    page.keyboard.down("3")
    for _ in range(5):
        page.keyboard.down("3")  # the browser marks these as repeats
    second = ready(page, instead_of=first)
    page.keyboard.down("3")  # still held when the next task has been there for a while
    page.keyboard.up("3")
    page.wait_for_timeout(150)
    assert len(store.judgments()) == 1
    page.keyboard.press("2")
    page.keyboard.press("2")
    wait_for(page, f"main:not([data-task='{second}']):not([aria-busy])")
    page.keyboard.press("2")  # before anybody can have read the new task
    wait_for(page, "main[data-takes-keys=true]")
    assert len(store.judgments()) == 2
    assert "Press again" in page.inner_text("#status")


def test_saving_at_once_can_be_turned_off_and_stays_off(site, watched):
    store, url = site(pairs(3))
    page = watched.sign_in(url, store.add_annotator("Ada"))
    first = ready(page)
    page.keyboard.press("a")
    page.keyboard.press("Enter")
    assert "Choose 1 to 7" in page.inner_text("#status")
    page.keyboard.press("2")
    page.keyboard.press("6")
    page.reload()
    ready(page)
    assert page.locator(".scale input:checked").get_attribute("value") == "6"  # the draft, which nobody sent
    page.keyboard.press("Enter")
    ready(page, instead_of=first)
    page.click(".step >> nth=6")
    page.click("#save")
    wait_for(page, "#pace", "2 judged")
    first_judgment, second_judgment = store.judgments()
    assert first_judgment.answer["preference"] == (6 if first_judgment.order[0] == 0 else 2)
    assert second_judgment.answer["preference"] == (7 if second_judgment.order[0] == 0 else 1)


def test_a_click_is_never_saved_under_the_name_of_another_person(site, watched):
    store, url = site(pairs(3))
    tokens = {name: store.add_annotator(name) for name in ("Ada", "Ben")}
    watched.expected = ("403",)
    page = watched.sign_in(url, tokens["Ada"])
    ready(page)
    other = watched.sign_in(url, tokens["Ben"], context=page.context)
    ready(other)
    page.keyboard.press("2")
    wait_for(page, "main[data-state=signed-out]")
    assert "Ben" in page.inner_text("#other-text")
    assert store.judgments() == []

    page.goto(f"{url}/join/{tokens['Ada']}")  # her judgment had been kept
    wait_for(page, "#pace", "1 judged")
    assert [judgment.annotator for judgment in store.judgments()] == ["Ada"]


def test_who_finds_another_person_signed_in_does_nothing_in_their_name(site, watched):
    store, url = site(pairs(3))
    tokens = {name: store.add_annotator(name) for name in ("Ada", "Ben")}
    watched.expected = ("403",)
    page = watched.sign_in(url, tokens["Ada"])
    first = ready(page)
    page.keyboard.press("2")
    second = ready(page, instead_of=first)
    page.keyboard.press("3")
    ready(page, instead_of=second)
    other = watched.sign_in(url, tokens["Ben"], context=page.context)
    first = ready(other)
    other.keyboard.press("6")
    ready(other, instead_of=first)
    for _ in range(3):
        page.keyboard.press("u")  # the first one finds Ben, the others must not undo what he judged
        wait_for(page, "main[data-state=signed-out]:not([aria-busy])")
    assert len(store.judgments()) == 3

    page.goto(f"{url}/join/{tokens['Ada']}")  # one undo was asked for, not three
    ready(page)
    wait_for(page, "#pace", "1 judged")
    assert sorted(judgment.annotator for judgment in store.judgments()) == ["Ada", "Ben"]


def test_a_page_without_tasks_does_not_show_those_of_another_person(site, watched):
    store, url = site(pairs(1))
    page = watched.sign_in(url, store.add_annotator("Ada"))
    ready(page)
    page.keyboard.press("2")
    wait_for(page, "main[data-state=done]")
    ready(watched.sign_in(url, store.add_annotator("Ben"), context=page.context))
    page.click("#other-again")
    wait_for(page, "main[data-state=signed-out]", "signed in as Ben")


def _write_comment(page, text: str) -> None:
    page.keyboard.press("c")
    page.keyboard.type(text)
    page.keyboard.press("Escape")


def test_what_a_person_wrote_outlasts_a_new_link_and_a_deactivation(site, watched):
    store, url = site(pairs(3))
    watched.expected = ("401", "409")
    page = watched.sign_in(url, store.add_annotator("Ada"))
    first = ready(page)
    _write_comment(page, "half a thought")
    link = f"{url}/join/{store.new_token('Ada')}"
    page.keyboard.press("u")
    wait_for(page, "main[data-state=signed-out]", "is kept here")

    tab = page.context.new_page()  # where a mail program opens the new link
    page.close()
    tab.goto(link)
    assert ready(tab) == first
    assert tab.input_value("#comment") == "half a thought"

    store.set_active("Ada", False)  # others get her task
    tab.keyboard.press("5")
    wait_for(tab, "main[data-state=signed-out]")
    assert store.judgments() == []
    store.set_active("Ada", True)
    tab.goto(link)
    wait_for(tab, "#unsaved[open]", "was not given to this person")
    assert tab.input_value("#unsaved-words") == "half a thought"
    tab.keyboard.press("Escape")
    ready(tab)


def test_a_second_tab_hands_back_what_it_cannot_save(site, watched):
    store, url = site(pairs(2))
    watched.expected = ("409",)
    page = watched.sign_in(url, store.add_annotator("Ada"))
    first = ready(page)
    tab = page.context.new_page()
    tab.goto(f"{url}/judge")
    assert ready(tab) == first
    page.keyboard.press("1")
    second = ready(page, instead_of=first)
    _write_comment(tab, "of the second tab")
    tab.keyboard.press("7")
    wait_for(tab, "#unsaved[open]", "judged by this person already")
    assert tab.input_value("#unsaved-words") == "of the second tab"
    tab.keyboard.press("Escape")
    assert ready(tab) == second
    assert tab.input_value("#comment") == ""
    assert len(store.judgments()) == 1


NO_STORAGE = """for (const name of ["localStorage", "sessionStorage"]) {
  Object.defineProperty(window, name, { get() { throw new DOMException("denied", "SecurityError"); } });
}"""


def test_without_storage_the_page_works_and_keeps_the_form_when_the_session_ends(site, watched):
    store, url = site(pairs(2))
    watched.expected = ("401", "403")
    page = watched.context().new_page()
    page.add_init_script(NO_STORAGE)
    page.goto(f"{url}/join/{store.add_annotator('Ada')}")
    first = ready(page)
    page.keyboard.press("1")
    first = ready(page, instead_of=first)
    page.click("#theme")
    assert page.get_attribute("html", "data-theme") == "dark"

    _write_comment(page, "only on this page")
    link = f"{url}/join/{store.new_token('Ada')}"
    page.keyboard.press("2")
    wait_for(page, "#notice", "leave this page open")
    assert page.input_value("#comment") == "only on this page"
    page.context.new_page().goto(link)
    page.keyboard.press("2")
    wait_for(page, "main[data-state=done]")
    assert answers_of(store)[1]["comment"] == "only on this page"


def test_a_draft_is_not_put_into_a_task_with_the_same_number_of_another_store(site, watched):
    store, url = site(pairs(1))
    page = watched.context().new_page()
    page.goto(url)
    draft = {"answer": {"comment": "about others"}, "seconds": 3, "about": "Other\nanswers", "when": 1}
    name = f"collect-draft:Ada:{store.tasks()[0].id}"
    page.evaluate("([name, draft]) => localStorage.setItem(name, JSON.stringify(draft))", [name, draft])
    page.goto(f"{url}/join/{store.add_annotator('Ada')}")
    ready(page)
    assert page.input_value("#comment") == ""


def test_nothing_can_be_written_into_a_judgment_that_is_on_its_way(site, watched):
    store, url = site(pairs(2))
    page = watched.sign_in(url, store.add_annotator("Ada"))
    first = ready(page)
    held = []
    page.route("**/api/judgments", lambda route: held.append(route))
    page.keyboard.press("c")
    page.keyboard.type("before")
    page.keyboard.press("Escape")
    page.keyboard.press("3")
    wait_for(page, "main[aria-busy]")
    for key in ("c", "h", "e", "s", "u"):
        page.keyboard.press(key)
    page.keyboard.type("after")
    assert page.input_value("#comment") == "before"
    assert "Wait until" in page.inner_text("#status")
    held[0].continue_()
    ready(page, instead_of=first)
    assert [answer["comment"] for answer in answers_of(store)] == ["before"]


# ---- Keyboards ------------------------------------------------------------------------------------------------------

KEY_DOWN = """(init) => document.activeElement.dispatchEvent(
  new KeyboardEvent("keydown", { bubbles: true, cancelable: true, ...init }))"""


@pytest.mark.parametrize(
    "init",
    [
        {"key": "ArrowDown", "code": "Numpad2"},  # a numeric pad that scrolls
        {"key": "1", "code": "Digit1", "ctrlKey": True},  # goes to the first tab
        {"key": "1", "code": "Digit1", "metaKey": True},
        {"key": "1", "code": "Digit1", "altKey": True},
        {"key": "{", "code": "Digit7", "modifierAltGraph": True},  # on a German keyboard
        {"key": "!", "code": "Digit1", "shiftKey": True},
        {"key": "r", "code": "KeyR", "ctrlKey": True},
        {"key": "s", "code": "KeyS", "ctrlKey": True},
        {"key": "Process", "code": "Digit1", "keyCode": 229},  # an input method
        {"key": "1", "code": "Digit1", "isComposing": True},
        {"code": "KeyS"},  # a browser that fills in a field
        {"key": "8", "code": "Digit8"},
    ],
    ids=lambda init: "-".join(str(value) for value in init.values()),
)
def test_keys_that_mean_something_else_judge_nothing(keyboard_page, init):
    page, requests = keyboard_page
    is_free = page.evaluate(KEY_DOWN, init)
    assert is_free or init["key"] == "8"  # the browser does with it what it always does
    assert requests == []
    assert page.locator("main").get_attribute("aria-busy") is None


@pytest.mark.parametrize(
    "init, digit",
    [
        ({"key": "3", "code": "Numpad3"}, 3),
        ({"key": "&", "code": "Digit1"}, 1),  # French: digits need Shift
        ({"key": "1", "code": "Digit1", "shiftKey": True}, 1),
        ({"key": "٥", "code": "Digit5"}, 5),  # Arabic
    ],
)
def test_digits_of_other_keyboards_count(keyboard_page, init, digit):
    page, _ = keyboard_page
    page.evaluate(KEY_DOWN, init)
    assert page.locator(".scale input:checked").get_attribute("value") == str(digit)


@pytest.mark.parametrize(
    "init", [{"key": "K", "code": "KeyK"}, {"key": "л", "code": "KeyK"}, {"key": "k", "code": "KeyE"}], ids=str
)
def test_letters_of_other_keyboards_count(keyboard_page, init):
    page, _ = keyboard_page
    before = page.is_checked("#in-step")
    page.evaluate(KEY_DOWN, init)  # Caps Lock, a Cyrillic keyboard, another layout
    assert page.is_checked("#in-step") is not before


@pytest.fixture(scope="module")
def keyboard_page(browser, tmp_path_factory):
    """A task that stays, as it is not saved at once, and the POSTs of its page."""
    from hf_rlhf_ext.collect.web.app import create_app
    from hf_rlhf_ext.collect.web.server import Server

    with Store(tmp_path_factory.mktemp("keys") / "store.sqlite") as store, Server(create_app(store)) as server:
        store.add_tasks(pairs(1))
        watched = Watched(browser)
        page = watched.sign_in(server.url, store.add_annotator("Ada"))
        ready(page)
        page.keyboard.press("a")
        requests = []
        page.on("request", lambda request: request.method == "POST" and requests.append(request))
        yield page, requests
        watched.close()


def test_offline_the_page_keeps_a_judgment_and_saves_it_when_the_network_is_back(site, watched):
    store, url = site(pairs(2))
    watched.expected = ("ERR_INTERNET_DISCONNECTED",)
    page = watched.sign_in(url, store.add_annotator("Ada"))
    first = ready(page)
    page.context.set_offline(True)
    wait_for(page, "#notice", "offline")
    page.keyboard.press("2")
    wait_for(page, "#try-now")
    page.context.set_offline(False)
    ready(page, instead_of=first)
    assert page.locator("#notice").is_hidden()
    assert len(store.judgments()) == 1


# ---- Ranking, and everything beside the choice ---------------------------------------------------------------------

RANKED = ["Alpha", "Beta", "Gamma", "Delta"]


def _shown(page) -> list[str]:
    return [text.strip() for text in page.locator(".pane").all_inner_texts()]


def _stored_ranks(store: Store) -> dict[str, int]:
    return dict(zip(RANKED, store.judgments()[-1].answer["ranks"], strict=True))


def test_ranks_by_keys_with_a_tie_and_undo(site, watched):
    store, url = site([Task("Rank these", RANKED)])
    page = watched.sign_in(url, store.add_annotator("Ada"))
    ready(page, "rank")
    shown = _shown(page)
    for key in ("4", "1", "1"):  # the focus goes on to the next answer by itself
        page.keyboard.press(key)
    page.keyboard.press("Enter")
    assert "Answer D has no place" in page.inner_text("#status")
    page.keyboard.press("3")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("3")  # was 4: now a tie with the last one
    page.keyboard.press("Enter")
    wait_for(page, "main[data-state=done]")
    assert _stored_ranks(store) == dict(zip(shown, [3, 1, 1, 3], strict=True))

    page.click("#other-undo")
    ready(page, "rank")
    assert _shown(page) == shown
    places = page.eval_on_selector_all(".place input:checked", "boxes => boxes.map((box) => Number(box.value))")
    assert places == [3, 1, 1, 3]


def _drag_by_mouse(page, chip, tier) -> None:
    start, end = chip.bounding_box(), tier.bounding_box()
    page.mouse.move(start["x"] + 15, start["y"] + 15)
    page.mouse.down()
    page.mouse.move(start["x"] + 30, start["y"] + 10)
    page.mouse.move(end["x"] + 20, end["y"] + 20, steps=3)
    page.mouse.up()


def _drag_by_touch(page, chip, tier) -> None:
    page.locator(".tier").last.scroll_into_view_if_needed()
    start, end = chip.bounding_box(), tier.bounding_box()
    session = page.context.new_cdp_session(page)

    def touch(kind, *points):
        touches = [{"x": x, "y": y} for x, y in points]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})

    touch("touchStart", (start["x"] + 15, start["y"] + 15))
    touch("touchMove", (start["x"] + 20, start["y"] + 30))
    touch("touchMove", (end["x"] + 30, end["y"] + 15))
    touch("touchEnd")


@pytest.mark.parametrize("drag, options", [(_drag_by_mouse, {}), (_drag_by_touch, PHONE)], ids=["mouse", "touch"])
def test_ranks_by_drag(site, watched, drag, options):
    store, url = site([Task("Rank these", RANKED)])
    page = watched.sign_in(url, store.add_annotator("Ada"), **options)
    ready(page, "rank")
    shown = _shown(page)
    for answer, place in enumerate([2, 1, 2, 4]):
        drag(page, page.locator(f".chip[data-answer='{answer}']"), page.locator(f".tier[data-place='{place}']"))
    page.click(".chip[data-answer='3']")  # without dragging: the letter, then the place
    page.locator(".tier[data-place='3'] .tier-name").click()
    page.click("#save")
    wait_for(page, "main[data-state=done]")
    assert _stored_ranks(store) == dict(zip(shown, [2, 1, 2, 4], strict=True))


def test_flags_comment_category_ratings_and_an_edited_answer_arrive(site, watched):
    store, url = site([Task("Q", ["Right", "Wrong"], category="Chat")], categories=["Chat", "Coding"])
    page = watched.sign_in(url, store.add_annotator("Ada"))
    ready(page)
    shown = _shown(page)
    page.keyboard.press("h")
    assert "Choose the answer first" in page.inner_text("#status")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("h")
    page.keyboard.press("n")
    page.keyboard.press("n")  # off again
    page.keyboard.press("ArrowRight")
    page.keyboard.press("w")
    page.keyboard.press("c")
    page.keyboard.type("Both are short. 1234567")  # digits in a text field choose nothing
    page.keyboard.press("Escape")
    page.keyboard.press("e")
    page.wait_for_function("() => document.activeElement.id === 'edited'")
    assert page.input_value("#edited") == shown[1]
    page.fill("#edited", "Better than both")
    page.select_option("#category", "Coding")
    page.select_option("#rating-0", "6")
    page.keyboard.press("Escape")
    page.keyboard.press("4")
    wait_for(page, "main[data-state=done]")

    task, answer = store.tasks()[0], store.judgments()[0].answer
    first, second = (task.completions.index(text) for text in shown)
    flags, ratings = [None, None], [None, None]
    flags[first], flags[second] = ["harmful"], ["wrong_language"]
    ratings[first] = 6
    assert answer == {
        "preference": 4,
        "flags": flags,
        "comment": "Both are short. 1234567",
        "category": "Coding",
        "ratings": ratings,
        "edited": {"completion": second, "text": "Better than both"},
    }


def test_one_answer_is_rated_and_another_skipped(site, watched):
    store, url = site([Task("Q1", ["Only one"]), Task("Q2", ["Only this"])])
    page = watched.sign_in(url, store.add_annotator("Ada"))
    first = ready(page, "rate")
    page.keyboard.press("6")
    ready(page, "rate", instead_of=first)
    page.keyboard.press("s")
    wait_for(page, "main[data-state=done]")
    assert answers_of(store) == [{"ratings": [6]}, {"skip": True}]


def test_an_unchanged_copy_of_an_answer_is_not_sent_as_a_better_one(site, watched):
    store, url = site(pairs(1))
    page = watched.sign_in(url, store.add_annotator("Ada"))
    ready(page)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("e")
    assert "only if you change it" in page.inner_text("#edited-note")
    page.keyboard.press("Control+Enter")
    assert "Choose 1 to 7" in page.inner_text("#status")
    page.keyboard.press("Escape")
    page.keyboard.press("4")
    wait_for(page, "main[data-state=done]")
    assert answers_of(store) == [{"preference": 4}]


def test_plain_text_shows_every_character(site, watched):
    store, url = site([Task("What is *it*?", ["2*3*4", "1. a\n9. b"])] + pairs(1))
    page = watched.sign_in(url, store.add_annotator("Ada"))
    first = ready(page)
    assert "234" in _shown(page)
    page.keyboard.press("p")
    assert set(_shown(page)) == {"2*3*4", "1. a\n9. b"}
    assert page.inner_text("#prompt").strip() == "What is *it*?"
    page.keyboard.press("p")
    assert "234" in _shown(page)
    page.keyboard.press("p")
    page.keyboard.press("4")
    ready(page, instead_of=first)
    assert page.locator(".pane pre").count() == 2  # it stays on


def test_a_conversation_opens_at_its_last_message(site, watched):
    turns = [{"role": ("user", "assistant")[number % 2], "content": f"turn {number} " * 40} for number in range(9)]
    answers = [[{"role": "assistant", "content": text}] for text in ("yes", "no")]
    store, url = site([Task(turns, answers)])
    page = watched.sign_in(url, store.add_annotator("Ada"))
    ready(page)
    box, last = page.locator("#prompt").bounding_box(), page.locator(".message").last.bounding_box()
    assert box["y"] <= last["y"] < box["y"] + box["height"]


def test_each_paragraph_runs_in_the_direction_of_its_language(site, watched):
    store, url = site([Task("Q", ["مرحبا\n\nHello", "Hello\n\nمرحبا"])])
    page = watched.sign_in(url, store.add_annotator("Ada"))
    ready(page)
    for pane in page.locator(".pane").all():
        left = pane.bounding_box()["x"] + 100
        for paragraph in pane.locator("p").all():
            start = paragraph.evaluate(
                "(p) => { const range = document.createRange(); range.selectNodeContents(p);"
                " return range.getBoundingClientRect().x; }"
            )
            assert (start < left) is (paragraph.inner_text() == "Hello")


def test_a_place_that_is_not_there_and_an_answer_that_is_too_long_are_said(site, watched):
    store, url = site([Task("Rank these", [*RANKED[:2], "x" * 20_500])])
    page = watched.sign_in(url, store.add_annotator("Ada"))
    ready(page, "rank")
    page.keyboard.press("4")
    assert page.inner_text("#status") == "Choose 1 to 3."
    for key in ("1", "2", "3"):
        page.keyboard.press(key)
    page.locator(".edit").nth([len(text) > 20_000 for text in _shown(page)].index(True)).click()
    page.evaluate("document.getElementById('edited').value += '!'")
    page.keyboard.press("Control+Enter")
    assert "too long" in page.inner_text("#status")
    assert store.judgments() == []


def test_long_answers_scroll_in_step_and_seconds_count_only_while_visible(site, watched):
    long = [Task("Q", ["line\n\n" * 200, "word\n\n" * 100])]
    store, url = site(long)
    page = watched.sign_in(url, store.add_annotator("Ada"))
    ready(page)
    tops = "[...document.querySelectorAll('.pane')].map((pane) => pane.scrollTop)"
    page.eval_on_selector(".pane", "pane => { pane.scrollTop = pane.scrollHeight; }")
    page.wait_for_function(f"() => {tops}[1] > 500")
    page.keyboard.press("k")
    page.eval_on_selector(".pane", "pane => { pane.scrollTop = 0; }")
    page.wait_for_timeout(100)
    assert page.evaluate(tops)[1] > 500

    hide = "Object.defineProperty(document, 'visibilityState', {value: '%s', configurable: true});"
    page.evaluate(hide % "hidden" + "document.dispatchEvent(new Event('visibilitychange'))")
    before = page.evaluate("performance.now()") / 1000  # since the page was loaded
    page.wait_for_timeout(1500)
    page.evaluate(hide % "visible" + "document.dispatchEvent(new Event('visibilitychange'))")
    page.keyboard.press("1")
    wait_for(page, "main[data-state=done]")
    assert 0.3 < store.judgments()[0].seconds < before + 0.7


# ---- The page of the admin ------------------------------------------------------------------------------------------


def test_the_admin_adds_pauses_exports_and_ends_access(site, watched):
    store, url = site(pairs(3))
    watched.expected = ("400", "401", "404")
    admin = watched.sign_in(url, store.add_annotator("Root", "admin"))
    admin.fill("#name", "Ada <b>")
    admin.click("text=Add person")
    wait_for(admin, "#link[open]")
    link = admin.input_value("#link-url")
    admin.click("#link [data-close]")
    admin.fill("#name", "Ada <b>")
    admin.keyboard.press("Enter")
    wait_for(admin, "#notice", "exists already")

    page = watched.context().new_page()
    page.goto(link)
    first = ready(page)
    page.keyboard.press("1")
    ready(page, instead_of=first)

    admin.click("#pause")
    wait_for(admin, "#paused", "Paused")
    page.keyboard.press("2")
    wait_for(page, "main[data-state=paused]")
    admin.click("#pause")
    wait_for(admin, "#paused", "Running")
    page.click("#other-again")
    ready(page)

    with admin.expect_download() as download:
        admin.click("text=Comparisons (JSON lines)")
    wait_for(admin, "#exported", "2 of 3 tasks, 1 left out (not judged yet).")
    rows = download.value.path().read_text(encoding="utf-8").splitlines()
    assert [len(json.loads(row)["votes"]) for row in rows] == [1, 1]

    admin.reload()
    row = admin.locator("tr", has_text="Ada <b>")
    assert row.locator("td[data-name=Judged]").inner_text().endswith("2")
    row.get_by_text("Deactivate").click()
    row.get_by_text("no access").wait_for()
    page.reload()
    assert "Open your personal link" in page.inner_text("h1")
    row.get_by_text("Activate").click()
    row.get_by_text("Deactivate").wait_for()
    page.reload()
    ready(page)
    row.get_by_text("New link").click()
    admin.click("#confirm-yes")
    wait_for(admin, "#link[open]")
    assert admin.input_value("#link-url") != link
    page.keyboard.press("3")
    wait_for(page, "main[data-state=signed-out]")
    page.goto(link)
    assert "not known" in page.inner_text("h1")
    page.goto(admin.input_value("#link-url"))  # what could not be saved then is saved now
    wait_for(page, "#pace", "3 judged")
    assert len(store.judgments()) == 3


# ---- For everybody: readers, phones, and text that attacks ----------------------------------------------------------


def _all_kinds() -> list[Task]:
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": f"Say more. {WIDE}"},
    ]
    ranked = [f"{WIDE} {number}" for number in range(4)]
    return [
        Task(conversation, [[{"role": "assistant", "content": WIDE}], [{"role": "assistant", "content": "Short"}]]),
        Task(f"Rank {WIDE}", ranked, category="Chat"),
        Task("Rate", [WIDE]),
    ]


def _visit_all(watched, site, check, **options) -> None:
    """Calls `check(page, name)` on every page and in every state."""
    store, url = site(_all_kinds(), title=f"Title {LONG_WORD}", instructions=f"# Read\n\n{WIDE}", categories=["Chat"])
    watched.expected = ("404", "401")
    stranger = watched.context(**options).new_page()
    for path, name in (("/", "landing"), ("/judge", "signed out"), ("/join/nobody", "unknown link")):
        stranger.goto(url + path)
        check(stranger, name)

    page = watched.sign_in(url, store.add_annotator(f"Ada {LONG_WORD}"[:100]), **options)
    wait_for(page, "#instructions[open]")
    check(page, "instructions")
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    check(page, "keys")
    page.keyboard.press("Escape")
    ready(page)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("h")
    page.keyboard.press("e")
    check(page, "judging")
    page.keyboard.press("Escape")
    page.keyboard.press("2")
    ready(page, "rank")
    page.keyboard.press("1")
    check(page, "ranking")
    for key in ("1", "2", "3", "Enter"):
        page.keyboard.press(key)
    ready(page, "rate")
    check(page, "rating")
    page.keyboard.press("5")
    wait_for(page, "main[data-state=done]")
    check(page, "done")

    admin = watched.sign_in(url, store.add_annotator("Root", "admin"), **options)
    wait_for(admin, "#people-rows tr")
    admin.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    check(admin, "admin")
    admin.fill("#name", "Ben")
    admin.click("text=Add person")
    wait_for(admin, "#link[open]")
    check(admin, "secret link")


@pytest.mark.slow
def test_axe_finds_no_violation_on_any_page_in_light_and_dark(site, watched):
    axe = axe_api.Axe()
    found = {}

    def check(page, name):
        runs = [("light", {})]
        if name in ("instructions", "judging", "ranking", "admin"):  # between them, they have every color
            runs.append(("dark", {"runOnly": ["color-contrast", "link-in-text-block"]}))
        for scheme, options in runs:
            page.emulate_media(color_scheme=scheme)
            violations = axe.run(page, options={"resultTypes": ["violations"]} | options).response["violations"]
            if violations:
                found[name, scheme] = [(item["id"], item["nodes"][0]["html"][:200]) for item in violations]

    _visit_all(watched, site, check)
    assert found == {}


def test_no_page_scrolls_sideways_on_a_phone_and_targets_are_large(site, watched):
    wide, small = {}, {}

    def check(page, name):
        width = page.evaluate("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)")
        if width > 360:
            wide[name] = width
        for box in page.evaluate(_SMALL_TARGETS):
            small.setdefault(name, []).append(box)
        if page.locator(".pane").count():
            sizes = page.evaluate("[...document.querySelectorAll('.pane *')].map((e) => getComputedStyle(e).fontSize)")
            assert min(float(size.removesuffix("px")) for size in sizes) >= 16, name

    _visit_all(watched, site, check, **PHONE)
    assert wide == {}
    assert small == {}


# Buttons, fields and labels of hidden inputs that a thumb would miss; links in running text may be smaller.
_SMALL_TARGETS = """() => [...document.querySelectorAll("button, .button, select, input, textarea, summary, label")]
  .filter((e) => e.checkVisibility() && !e.matches(".for-readers, label input, .card p a"))
  .filter((e) => !(e.matches("label") && !e.querySelector("input")))
  .map((e) => [e.outerHTML.slice(0, 80), e.getBoundingClientRect()])
  .filter(([, box]) => box.width > 1 && (box.height < 43.5 || box.width < 43.5))
  .map(([html, box]) => `${html} ${box.width}x${box.height}`)"""


def test_a_complaint_of_the_admins_page_stays_until_something_else_is_done(site, watched):
    store, url = site(pairs(1))
    watched.expected = ("400",)
    admin = watched.context().new_page()
    admin.clock.install()
    admin.goto(f"{url}/join/{store.add_annotator('Root', 'admin')}")
    wait_for(admin, "#people-rows tr")
    admin.fill("#name", "Root")
    admin.keyboard.press("Enter")
    wait_for(admin, "#notice", "exists already")
    with admin.expect_response("**/api/admin/statistics"):
        admin.clock.run_for(11_000)
    admin.evaluate("() => new Promise((resolve) => requestAnimationFrame(resolve))")
    assert admin.locator("#notice").is_visible()
    admin.click("#pause")
    wait_for(admin, "#paused", "Paused")
    assert admin.locator("#notice").is_hidden()


def test_hostile_text_runs_nothing_on_any_page(site, watched):
    task = Task(HOSTILE, [HOSTILE, f"{HOSTILE}!", f"{HOSTILE}?"], category="<img src=x onerror=alert(6)>")
    store, url = site(
        [task], title="<script>alert(7)</script>", instructions=HOSTILE, categories=["<b onclick=alert(8)>"]
    )
    page = watched.sign_in(url, store.add_annotator("<img src=x onerror=alert(9)>"))
    wait_for(page, "#instructions[open]")
    page.keyboard.press("Escape")
    ready(page, "rank")
    links = page.eval_on_selector_all("main a", "links => links.map((link) => link.getAttribute('href'))")
    assert not [link for link in links if link and not re.match(r"https?:|mailto:", link)]
    for text in page.locator(".pane a, .pane img").all():
        text.click(trial=True)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("e")
    page.fill("#edited", HOSTILE)
    page.fill("#comment", HOSTILE)
    page.keyboard.press("Escape")
    for key in ("1", "2", "3", "Enter"):
        page.keyboard.press(key)
    wait_for(page, "main[data-state=done]")

    admin = watched.sign_in(url, store.add_annotator("</td><script>alert(10)</script>", "admin"))
    wait_for(admin, "#people-rows tr")
    for opened in (page, admin):
        assert opened.evaluate("window.hacked") is None
        assert opened.evaluate("window.violations") == []
    assert "<script>alert(10)</script>" in admin.inner_text("#people-rows")
    assert answers_of(store)[0]["comment"] == HOSTILE.strip()
