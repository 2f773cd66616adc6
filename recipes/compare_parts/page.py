"""The report as one HTML page without external files, and as Markdown."""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from hf_rlhf_ext.hub.cards.markdown import code_span, escape_markdown, fenced
from hf_rlhf_ext.recipes.compare_parts.tables import Table


@dataclass(frozen=True)
class Plot:
    """A plot of the report.

    Attributes:
        path: the PNG.
        caption: what it shows, and how to read it.
    """

    path: Path
    caption: str

    @property
    def png(self) -> str:
        """The picture in Base64."""
        return b64encode(self.path.read_bytes()).decode()


@dataclass(frozen=True)
class ReportSection:
    """A section of the report.

    Attributes:
        title: its heading.
        plots: its plots.
        tables: its tables.
    """

    title: str
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class ReportPage:
    """What the report says, for HTML and Markdown alike.

    Attributes:
        title: its heading.
        lead: what was compared, in a sentence or two.
        verdict: the conclusion, written from the intervals: its first paragraph, and after blank lines the details.
        warnings: what limits the conclusion: failed systems, leaks, failed judgments.
        sections: plots and tables.
        samples: answers side by side, see `samples.side_by_side`.
        samples_of: whose answers they are.
        provenance: pairs of a label and a text.
        settings: the settings of the run, as YAML.
    """

    title: str
    lead: str
    verdict: str
    sections: Sequence[ReportSection]
    provenance: Sequence[tuple[str, str]]
    settings: str
    warnings: Sequence[str] = ()
    samples: Sequence[dict[str, Any]] = field(default_factory=list)
    samples_of: str = ""

    @property
    def headline(self) -> str:
        """The first paragraph of the verdict."""
        return paragraphs(self.verdict)[0]

    @property
    def details(self) -> list[str]:
        """The other paragraphs of the verdict."""
        return paragraphs(self.verdict)[1:]


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a text, which blank lines separate; at least one."""
    return [part.strip() for part in text.strip().split("\n\n")]


def write_html(page: ReportPage, path: Path) -> None:
    """Writes the page with its plots inside. All texts are escaped."""
    path.write_text(_template().render(page=page), encoding="utf-8")


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("hf_rlhf_ext.recipes.compare_parts"),
        autoescape=True,
        undefined=StrictUndefined,
    )
    environment.filters["breakable"] = breakable
    return environment.get_template("compare.html.jinja")


def breakable(name: str) -> Markup:
    """A name as HTML that may be broken after an underscore, on a narrow screen."""
    return Markup("_<wbr>").join(name.split("_"))


def write_markdown(page: ReportPage, path: Path) -> None:
    """Writes the report as Markdown, with links to the plots beside it."""
    path.write_text(as_markdown(page), encoding="utf-8")


def as_markdown(page: ReportPage) -> str:
    """The report as Markdown."""
    lines = [f"# {escape_markdown(page.title)}", "", plain(page.lead), "", f"> {plain(page.headline)}", ""]
    for paragraph in page.details:
        lines += [plain(paragraph), ""]
    if page.warnings:
        lines += [*(f"- {plain(warning)}" for warning in page.warnings), ""]
    for section in page.sections:
        lines += [f"## {plain(section.title)}", ""]
        for plot in section.plots:
            lines += [f"![{escape_markdown(plot.caption)}]({plot.path.name})", "", f"*{plain(plot.caption)}*", ""]
        for number, table in enumerate(section.tables):
            if number > 0 or table.title != section.title:
                lines += [f"### {plain(table.title)}", ""]
            lines += [plain(table.note), "", *markdown_table(table), ""] if table.note else [*markdown_table(table), ""]
    if page.samples:
        lines += ["## Answers side by side", ""]
        lines += [
            f"The first held-out prompts in their order, not selected, with the answers of {page.samples_of}.",
            "",
        ]
        for number, sample in enumerate(page.samples, 1):
            lines += [f"**Prompt {number}:** {escape_markdown(sample['prompt'])}", ""]
            lines += [
                f"- {code_span(name)}: {escape_markdown(text) or '*(empty)*'}" for name, text in sample["answers"]
            ]
            lines.append("")
    lines += ["## How it was made", ""]
    lines += [f"- {plain(label)}: {plain(text)}" for label, text in page.provenance]
    lines += ["", fenced(page.settings, "yaml"), ""]
    return "\n".join(lines)


def markdown_table(table: Table) -> list[str]:
    """Lines of a Markdown table."""
    rows = [table.header, ["---"] * len(table.header), *table.rows]
    return ["| " + " | ".join(plain(cell) for cell in row) + " |" for row in rows]


def plain(text: str) -> str:
    """A text of our own, or a name, in Markdown: on one line, without HTML, and not the end of a cell."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", r"\|").replace("](", r"]\(")
    return " ".join(text.replace("*", r"\*").replace("`", r"\`").split())
