"""Pictures of the judging pages for the docs: python benchmarks/collect_screenshots.py docs/assets

Needs Chromium (RLHF_CHROMIUM names another path than /usr/bin/chromium). With --all, writes every page in light and
dark, wide and on a phone, to look at after a change of the design.
"""

import argparse
import io
import os
import random
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from hf_rlhf_ext.collect.store import Settings, Store
from hf_rlhf_ext.collect.tasks import Task
from hf_rlhf_ext.collect.web.app import create_app
from hf_rlhf_ext.collect.web.server import Server

INSTRUCTIONS = """Choose the answer that **helps the person more**.

1. Is it true? An answer with a wrong fact loses against one without.
2. Does it do what was asked, in the language that was asked for?
3. Is it clear and no longer than it needs to be?

A long answer is not better because it is long. If you cannot tell, choose **4**; if you cannot judge the topic, skip.
"""

SHORT = (
    "A `list` can change and a `tuple` cannot:\n\n"
    "```python\npoint = (3, 4)\npath = [point]\npath.append((5, 6))\n```\n\n"
    "Use a tuple for things that belong together, such as the two numbers of a point, and a list for any number of "
    "things of one kind. A tuple can also be the key of a dictionary."
)

LONG = (
    "Great question! Lists and tuples are both sequence types in Python, and they have a lot in common. Both can be "
    "indexed, sliced and looped over.\n\n"
    "| | list | tuple |\n|---|---|---|\n| can change | yes | no |\n| written as | `[1, 2]` | `(1, 2)` |\n"
    "| key of a dictionary | no | yes |\n\n"
    "**Lists** are mutable. You can add, remove or replace elements:\n\n"
    "```python\nnumbers = [1, 2, 3]\nnumbers.append(4)\nnumbers[0] = 10\n```\n\n"
    "**Tuples** are immutable. Once a tuple is made, it stays as it is:\n\n"
    "```python\nnumbers = (1, 2, 3)\nnumbers[0] = 10  # TypeError: 'tuple' object does not support item assignment\n"
    "```\n\n"
    "Tuples are also a bit faster and take less memory, which matters in programs that make very many of them. Some "
    "people therefore use tuples for everything that does not change.\n\n"
    "In summary, use lists when you need to change the data and tuples when you do not."
)

NAMES = [
    "**Rye & Shine**. Short, and it says what you bake.",
    "How about *The Bakery*? It is simple and easy to remember, and people will know what it is.",
    "1. Crumb\n2. The Early Loaf\n3. Flour Hour\n\nI like *Flour Hour* best: it sounds like something that one plans.",
    "I'm sorry, but I cannot help with naming a business.",
]

PEOPLE = {"Amina": 0.15, "Jonas": 0.2, "Mei": 0.2, "Sofia": 0.25, "Tom": 0.9}
"""Annotators of the admin page, and how often each one answers without looking."""


def tasks() -> list[Task]:
    """A pair, a ranking, one answer to rate, and pairs that fill the admin page."""
    found = [
        Task("What is the difference between a list and a tuple in Python? Please show code.", [SHORT, LONG], wanted=1),
        Task("I open a small bakery for sourdough bread. Give me a name for it.", NAMES, category="Brainstorming"),
        Task("Explain photosynthesis to a child of six.", ["Plants eat sunlight. Their leaves catch it."]),
    ]
    for number in range(60):
        good = f"Answer {number} is right, short and says why."
        bad = f"Answer {number} goes on and on, is not quite right and does not say why, but it is long."
        answers = [good, bad] if number % 2 == 0 else [bad, good]
        gold = {"best": [answers.index(good)]} if number % 6 < 2 else None
        category = ["Brainstorming", "Open question answering", "Rewriting"][number % 3]
        found.append(Task(f"Question {number}", answers, category=category, wanted=4, gold=gold))
    return found


def fill(store: Store) -> None:
    """Lets some people judge, one of them without looking."""
    rng = random.Random(0)
    now = 1_760_000_000.0
    for name, carelessness in PEOPLE.items():
        token = store.add_annotator(name)
        annotator = store.annotator_of(token)
        for number in range(rng.randrange(28, 44)):
            now += 30
            shown = store.next_task(annotator.id, now)
            if shown is None:
                break
            answer = _answer(shown, rng, carelessness)
            seconds = 2.5 if carelessness > 0.5 else rng.uniform(9, 40)
            store.judge(annotator.id, shown.task.id, f"picture-{name}-{number}", answer, seconds, now)


def _answer(shown, rng: random.Random, carelessness: float) -> dict:
    if rng.random() < 0.04:
        return {"skip": True}
    first_is_good = "is right" in shown.task.completions[shown.order[0]]
    if rng.random() < carelessness:
        return {"preference": 1}
    return {"preference": rng.choice([1, 2, 3]) if first_is_good else rng.choice([5, 6, 7])}


class Photographer:
    """Opens pages in one browser, and writes pictures of them to a folder."""

    def __init__(self, browser: Browser, folder: Path):
        self.browser = browser
        self.folder = folder

    def open(self, link: str, *, dark: bool = False, phone: bool = False) -> Page:
        """Opens the page of a person, with the instructions already read."""
        context = self.browser.new_context(
            viewport={"width": 360, "height": 740} if phone else {"width": 1280, "height": 800},
            device_scale_factor=2 if phone else 1,
            has_touch=phone,
            is_mobile=phone,
            color_scheme="dark" if dark else "light",
            reduced_motion="reduce",
        )
        page = context.new_page()
        page.goto(link)
        page.wait_for_load_state("networkidle")
        if page.locator("dialog[open]").count():
            page.keyboard.press("Escape")
        return page

    def take(self, page: Page, name: str, *, full: bool = False) -> None:
        """Writes NAME.png with few colors, which keeps it small."""
        picture = Image.open(io.BytesIO(page.screenshot(full_page=full))).convert("RGB")
        path = self.folder / f"{name}.png"
        picture.quantize(256).save(path, optimize=True)
        print(f"{path}  {path.stat().st_size / 1000:.0f} kB")


def docs_pictures(photographer: Photographer, links: dict[str, str]) -> None:
    """The three pictures of the docs."""
    page = photographer.open(links["You"])
    page.keyboard.press("ArrowRight")
    photographer.take(page, "collect_judging")
    rank(page)
    photographer.take(page, "collect_ranking")
    admin = photographer.open(links["admin"])
    admin.set_viewport_size({"width": 1280, "height": 960})
    photographer.take(admin, "collect_admin")


def rank(page: Page) -> None:
    """Judges the pair, and gives three of the next four answers a place."""
    page.keyboard.press("2")
    page.wait_for_selector("main[data-kind=rank]")
    page.wait_for_timeout(500)  # the page takes no key that comes right after the one before
    for key in ("1", "3", "1"):
        page.keyboard.press(key)


def all_pictures(photographer: Photographer, links: dict[str, str]) -> None:
    """Every page, wide and on a phone, in light and dark."""
    for name in ("wide", "wide_dark", "phone", "phone_dark"):
        phone = "phone" in name
        dark = "dark" in name
        page = photographer.open(links[name], dark=dark, phone=phone)
        photographer.take(page, f"judging_{name}")
        if phone:
            photographer.take(page, f"judging_full_{name}", full=True)
        page.keyboard.press("?")
        photographer.take(page, f"help_{name}")
        page.keyboard.press("Escape")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("h")
        page.keyboard.press("e")
        photographer.take(page, f"more_{name}")
        page.keyboard.press("Escape")
        rank(page)
        photographer.take(page, f"ranking_{name}", full=phone)
        page.keyboard.press("4")
        page.keyboard.press("Enter")
        page.wait_for_selector("main[data-kind=rate]")
        photographer.take(page, f"rating_{name}")
        page.wait_for_timeout(500)
        page.keyboard.press("6")
        page.wait_for_selector("main[data-state=done]")
        photographer.take(page, f"done_{name}")
        admin = photographer.open(links["admin"], dark=dark, phone=phone)
        photographer.take(admin, f"admin_{name}", full=True)


def make_stores(folder: Path) -> tuple[Store, Store]:
    """A store for the pages of annotators, and one with many judgments for the page of the admin."""
    found = tasks()
    judging = Store(folder / "judging.sqlite")
    judging.save_settings(
        Settings("Helpful answers", INSTRUCTIONS, gold_share=0.0, wanted=9, categories=["Brainstorming", "Coding"])
    )
    judging.add_tasks(found[:3])
    judged = Store(folder / "judged.sqlite")
    judged.save_settings(Settings("Helpful answers", gold_share=0.2))
    judged.add_tasks(found[3:])
    fill(judged)
    return judging, judged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--all", action="store_true", help="every page, to look at the design")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    arguments = ["--disable-gpu", "--disable-background-networking", "--no-first-run"]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")
    with tempfile.TemporaryDirectory() as scratch:
        judging, judged = make_stores(Path(scratch))
        with (
            Server(create_app(judging)) as site,
            Server(create_app(judged)) as admin_site,
            sync_playwright() as playwright,
        ):
            chromium = os.environ.get("RLHF_CHROMIUM", "/usr/bin/chromium")
            browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
            photographer = Photographer(browser, options.folder)
            links = {"admin": f"{admin_site.url}/join/{judged.add_annotator('Admin', 'admin')}"}
            for name in ("You", "wide", "wide_dark", "phone", "phone_dark"):
                links[name] = f"{site.url}/join/{judging.add_annotator(name)}"
            take = all_pictures if options.all else docs_pictures
            take(photographer, links)
            browser.close()
        judging.close()
        judged.close()


if __name__ == "__main__":
    sys.exit(main())
