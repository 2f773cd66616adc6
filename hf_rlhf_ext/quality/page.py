"""Writes the quality report as a single HTML page without external files."""

from base64 import b64encode
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from ..data.schema import LoadReport
from ..metrics.plots import histogram_png
from .report import QualityReport


def write_quality_page(report: QualityReport, path: str | Path, load_report: LoadReport | None = None) -> Path:
    """Writes an HTML page with metrics, their meanings, dropped and flagged rows, columns not read, and histograms.

    Text from the data is escaped.

    Args:
        report: Result of `quality_report`.
        path: File to write. Missing folders are created.
        load_report: Report of `load_comparisons`, for dropped and flagged rows and unread columns.

    Returns:
        The path of the page.
    """
    plots = {}
    for title, bins in report.histograms.items():
        image = histogram_png(bins["edges"], bins["counts"], title)
        plots[title] = b64encode(image).decode()
    page = _template().render(report=report, load_report=load_report, plots=plots)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("hf_rlhf_ext.quality"),
        autoescape=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("quality.html.jinja")
