"""Comparisons as a data set on the Hub, with a card: schema, counts, agreement, and the licenses of the sources."""

import json
import logging
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from huggingface_hub import DatasetCard, DatasetCardData

from ..data.schema import LoadReport
from ..errors import UserError
from ..quality.report import QualityReport
from ..readers.formats import to_comparisons
from .client import check_access, push_files
from .markdown import template_environment
from .privacy import hub_owners, strip_local_paths
from .scan import Finding, refuse_findings, scan_text

logger = logging.getLogger(__name__)

Licenses = Mapping[str, str]
"""License by name of the source."""

MEANINGS = {
    "prompt": "text or messages",
    "completions": "K ≥ 2 different completions",
    "pairs": "[i, j]: completion i was judged against completion j",
    "targets": "P(i is better): 1.0 a plain win, 0.5 a tie, in between for split votes",
    "weights": "weight of the pair in the loss; 1 / number of the prompt's pairs unless it says otherwise",
    "margins": "how much better, signed, i minus j",
    "votes": "who judged what; annotators are numbered",
    "flags": "kept rows worth knowing",
    "category": "use case",
    "source": "data set that the row is from",
    "row": "its number there",
}
"""What each column of comparisons means."""
_JUDGED = {"completions", "pairs", "targets"}
"""Columns that comparison rows have at least; others are read as preference rows."""
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def push_comparisons(
    dataset: Dataset | DatasetDict,
    repo_id: str,
    *,
    licenses: Licenses | None = None,
    report: LoadReport | None = None,
    quality: QualityReport | None = None,
    title: str | None = None,
    keep_annotators: bool = False,
    private: bool = True,
    token: str | None = None,
    revision: str | None = None,
    allow: Iterable[str] = (),
    licences: Licenses | None = None,
) -> str:
    """Pushes comparisons (`load_comparisons`, or any rows that it takes) with a card, as one commit.

    Args:
        dataset: one split ("train"), or several.
        repo_id: `owner/name`, or a name of your own.
        licenses: of each source, by its name: `{"Anthropic/hh-rlhf": "mit", "our annotators": "cc-by-4.0"}`. Required.
        report: what was read and dropped, for the card.
        quality: agreement and other metrics, for the card (`quality_report`).
        keep_annotators: publish their names; otherwise they are numbered.
        private, token, revision: as in `push_run`.
        allow: findings of the leak scanner to let pass (`email:train:12` is row 12 of the split).
        licences: older name of `licenses`.

    Returns:
        The commit's URL.

    Raises:
        UserError: no licenses, a leak in a row, or no right to write there.
    """
    licenses = _licenses("push_comparisons", licenses, licences)
    if not licenses:
        raise UserError("push_comparisons: licenses is empty: say under which license each source was published.")
    repo_id = check_access(repo_id, token)
    public = hub_owners(repo_id, *licenses)
    splits = _public_splits(dataset, keep_annotators)
    allowed = set(allow)
    _refuse_leaks(splits, allowed, public)
    card = dataset_card(
        splits,
        licenses=licenses,
        report=report,
        quality=quality,
        title=title,
        repo_id=repo_id,
        keep_annotators=keep_annotators,
    )
    with tempfile.TemporaryDirectory() as scratch:
        files = _write_parquet(splits, Path(scratch))
        for name in files:
            allowed.add(f"binary:{name}")  # its rows were looked at
        files["README.md"] = card.encode()
        commit = push_files(
            files,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            allow=allowed,
            public=public,
            message="Upload comparisons",
            repo_type="dataset",
        )
    return commit.commit_url


def dataset_card(
    splits: Mapping[str, Dataset],
    *,
    licenses: Licenses | None = None,
    report: LoadReport | None = None,
    quality: QualityReport | None = None,
    repo_id: str,
    title: str | None = None,
    keep_annotators: bool = False,
    licences: Licenses | None = None,
) -> str:
    """The card's text; its license is that of the sources where they agree, else `other`.

    Arguments are those of `push_comparisons`, after the rows are as they will be published.
    """
    licenses = _licenses("dataset_card", licenses, licences)
    title = title or repo_id.rsplit("/", 1)[-1]
    columns = next(iter(splits.values())).column_names
    template = template_environment().get_template("dataset.md.jinja")
    body = template.render(
        title=title,
        repo_id=repo_id,
        splits={name: (len(rows), _n_pairs(rows)) for name, rows in splits.items()},
        columns={column: MEANINGS.get(column, "as in the source") for column in columns},
        licenses=licenses,
        report=report,
        source=strip_local_paths(report.source) if report else "",
        quality=_shown_metrics(quality, keep_annotators),
    )
    header = _card_data(splits, licenses, title)
    card = DatasetCard(f"---\n{header.to_yaml()}\n---\n\n{body}")
    return str(card)


def _licenses(caller: str, licenses: Licenses | None, licences: Licenses | None) -> Licenses:
    """The licenses, whichever name they came under."""
    if licences is not None:
        logger.warning("%s: the argument licences is now called licenses.", caller)
        licenses = licenses or licences
    return licenses or {}


def _public_splits(dataset: Dataset | DatasetDict, keep_annotators: bool) -> dict[str, Dataset]:
    """The splits as comparison rows, annotators numbered unless their names are kept."""
    splits = dict(dataset) if isinstance(dataset, DatasetDict) else {"train": dataset}
    numbers: dict[str, str] = {}  # one numbering over all splits
    for name, rows in splits.items():
        if not _JUDGED <= set(rows.column_names):  # TRL's or another public format
            rows, _ = to_comparisons(rows, source=name)
        if "votes" in rows.column_names and not keep_annotators:
            rows = _numbered(rows, numbers)
        splits[name] = rows
    return splits


def _numbered(rows: Dataset, numbers: dict[str, str]) -> Dataset:
    """Votes without names: annotator 1, 2, … in the order in which they appear; `numbers` has those known by now."""

    def number(row: dict[str, Any]) -> dict[str, Any]:
        votes = []
        for vote in row["votes"] or ():
            annotator = vote["annotator"]
            if annotator:
                annotator = numbers.setdefault(annotator, str(len(numbers) + 1))
            votes.append({**vote, "annotator": annotator})
        return {"votes": votes}

    return rows.map(number, load_from_cache_file=False)  # a cached result would leave `numbers` empty


def _refuse_leaks(splits: Mapping[str, Dataset], allowed: set[str], public: set[str]) -> None:
    """Raises `UserError` for what must not be published; parquet cannot be scanned once it is written."""
    findings: list[Finding] = []
    for name, rows in splits.items():
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        for finding in scan_text(lines, f"{name}.jsonl", public=public):
            finding = finding._replace(file=name)  # its line is the row of the split
            if not finding.allowed(allowed):
                findings.append(finding)
    refuse_findings(findings)


def _write_parquet(splits: Mapping[str, Dataset], folder: Path) -> dict[str, Path | bytes]:
    """Writes each split; returns the files by their names in the repository, which `load_dataset` finds splits by."""
    files: dict[str, Path | bytes] = {}
    for name, rows in splits.items():
        path = folder / f"{name}.parquet"
        rows.to_parquet(path)
        files[f"data/{name}-00000-of-00001.parquet"] = path
    return files


def _card_data(splits: Mapping[str, Dataset], licenses: Licenses, title: str) -> DatasetCardData:
    """The YAML header."""
    n_rows = sum(len(rows) for rows in splits.values())
    distinct = set(licenses.values())  # the card has room for one
    on_the_hub = [name for name in licenses if name.count("/") == 1 and " " not in name]
    return DatasetCardData(
        license=distinct.pop() if len(distinct) == 1 else "other",
        task_categories=["reinforcement-learning", "text-generation"],
        tags=["preference", "comparisons", "rlhf", "hf_rlhf_ext"],
        size_categories=[_size_category(n_rows)],
        source_datasets=on_the_hub or None,
        pretty_name=title,
    )


def _size_category(n_rows: int) -> str:
    for limit, name in _SIZES:
        if n_rows < limit:
            return name
    return "n>1M"


def _n_pairs(rows: Dataset) -> int:
    return sum(len(pairs) for pairs in rows["pairs"])


def _shown_metrics(quality: QualityReport | None, keep_annotators: bool) -> list[tuple[str, str]]:
    """Name and value of the quality report's rows that a card shows."""
    if quality is None:
        return []
    metrics = []
    for name, value, _ in quality.rows():
        if not value or (name == "annotators" and not keep_annotators):  # each annotator's, by name
            continue
        metrics.append((name, value))
    return metrics
