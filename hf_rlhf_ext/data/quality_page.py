"""The quality report as one HTML page that needs no other file."""

from base64 import b64encode
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from ..metrics.plots import histogram_png
from .quality import QualityReport
from .schema import LoadReport


def write_quality_page(report: QualityReport, path: str | Path, load_report: LoadReport | None = None) -> Path:
    """Writes the figures, their meanings, what became of the rows, and plots; text from data is escaped."""
    plots = {
        title: b64encode(histogram_png(bins["edges"], bins["counts"], title)).decode()
        for title, bins in report.histograms.items()
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_template().render(report=report, load_report=load_report, plots=plots), encoding="utf-8")
    return path


@cache
def _template() -> Template:
    loader = PackageLoader("hf_rlhf_ext", "data/templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("quality.html.jinja")
