"""The site builds without a warning, fetches nothing, and documents every public name; README links are right."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt

import hf_rlhf_ext
from tests.docs.blocks import DOCS, ROOT


class Page(HTMLParser):
    """What a page loads, what it links to, and what can be linked to in it."""

    def __init__(self, text: str):
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if values.get("id"):
            self.anchors.add(values["id"])
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        elif tag in ("script", "img", "iframe", "source") and values.get("src"):
            self.loads.append(values["src"])
        elif tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loads.append(values["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site: what `make docs` does, on a copy."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(DOCS, folder / "docs")
    for name in ("mkdocs.yml", "README.md"):
        shutil.copyfile(ROOT / name, folder / name)
    (folder / "hf_rlhf_ext").symlink_to(ROOT / "hf_rlhf_ext")  # whose docstrings the reference shows
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No issues found" in done.stdout + done.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}


def test_every_page_is_built(site, pages):
    for source in DOCS.rglob("*.md"):
        assert (site / source.relative_to(DOCS)).with_suffix(".html") in pages


def test_nothing_is_fetched_from_elsewhere(site, pages):
    for path, page in pages.items():
        for address in page.loads:
            assert urlsplit(address).netloc == "", f"{path.name} loads {address}"
    for style in site.rglob("*.css"):
        assert re.findall(r"url\([\"']?(https?:[^)]*)", style.read_text(encoding="utf-8")) == [], style


def test_links_and_images_of_the_site_lead_somewhere(site, pages):
    for path, page in pages.items():
        if path.name == "404.html":  # its links start at the server's root
            continue
        for link in page.links + page.loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            assert target.exists(), f"{path.relative_to(site)} links to {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].anchors | {"__skip"}, f"{path.name}: no anchor {link}"


def test_every_public_name_has_its_entry_in_the_reference(pages):
    anchors = set()
    for path, page in pages.items():
        if path.parent.name == "reference":
            anchors |= {anchor.rpartition(".")[2] for anchor in page.anchors if anchor.startswith("hf_rlhf_ext.")}
    assert set(hf_rlhf_ext.__all__) - anchors == set()


def test_search_has_an_index_that_a_page_from_the_disk_can_load(site):
    assert (site / "search.js").read_text(encoding="utf-8").startswith("var __index = ")
    assert "iframe-worker.js" in (site / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_of_the_files_at_the_top_lead_somewhere(name):
    links = []
    for token in MarkdownIt().enable("table").parse((ROOT / name).read_text(encoding="utf-8")):
        for child in token.children or []:
            if child.type == "link_open":
                links.append(child.attrs["href"])
            elif child.type == "image":
                links.append(child.attrs["src"])
    if name == "README.md":
        assert len(links) > 10
    for link in links:
        parts = urlsplit(link)
        if parts.scheme:
            continue
        target = ROOT / (parts.path or name)
        assert target.exists(), link
        if parts.fragment:
            assert parts.fragment in headings(target), link


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and the site make them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in found}
