"""Pushes comparisons to the Hub as a dataset with a card (schema, counts, agreement, licenses of the sources)."""

import json
import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
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
"""Name of the source -> license."""

MEANINGS = {
    "prompt": "text, or a list of messages",
    "completions": "K ≥ 2 different completions",
    "pairs": "list of [i, j]: completion i was compared to completion j",
    "targets": "P(i is better) for each pair: 1.0 means i is better, 0.0 means j is better, 0.5 is a tie",
    "weights": "weight of each pair in the loss; the default is 1 / number of pairs of the prompt",
    "margins": "how much better i is than j, for each pair",
    "votes": "judgments of single annotators, who are numbered",
    "flags": "properties of the row, such as an empty completion; `harmful:1` is about completion 1",
    "made_by": "how each completion was made, such as the policy and its settings",
    "category": "use case",
    "source": "dataset that the row comes from",
    "row": "row number in the source",
}
"""Meaning of each column of comparison rows."""
_JUDGED = {"completions", "pairs", "targets"}
"""Columns of comparison rows. Rows without them are read as preference rows."""
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def push_comparisons(
    dataset: Dataset | DatasetDict,
    repo_id: str,
    *,
    licenses: Licenses | None = None,
    report: LoadReport | None = None,
    quality: QualityReport | None = None,
    title: str | None = None,
    columns: Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
    keep_annotators: bool = False,
    private: bool = True,
    token: str | None = None,
    revision: str | None = None,
    allow: Iterable[str] = (),
    licences: Licenses | None = None,
) -> str:
    """Pushes comparisons to the Hub as a dataset with a card, in one commit.

    Args:
        dataset: Comparison rows, or rows in any format of `load_comparisons`: one split (`train`), or several.
        repo_id: `owner/name`, or only a name in your own namespace.
        licenses: License of each source by its name, such as
            `{"Anthropic/hh-rlhf": "mit", "our annotators": "cc-by-4.0"}`. Required.
        report: Report of `load_comparisons`, for the counts and the columns that were not read. For rows in another
            format, the card also has the report of their conversion.
        quality: Report of `quality_report`, for agreement and other metrics in the card.
        title: Title of the card; the default is the name of the repository.
        columns: Roles of the columns, as in `load_comparisons`, for rows in another format.
        ignore: Columns to leave out, as in `load_comparisons`, for rows in another format.
        keep_annotators: Whether to publish the names of annotators. By default they are numbered.
        private: Whether the repository is private if it is created now. An existing one is not changed.
        token: Access token; the default is `HF_TOKEN` or the token stored by `hf auth login`.
        revision: Branch, which is created if it does not exist; None means `main`.
        allow: Findings of the leak scanner to accept. `email:train:12` is an e-mail address in row 12 of `train`,
            counted from 1.
        licences: Deprecated name of `licenses`.

    Returns:
        URL of the commit.

    Raises:
        UserError: There are no licenses, the leak scanner found something, or the token has no write access.
        PushError: The Hub failed, even after retries.
    """
    licenses = _licenses("push_comparisons", licenses, licences)
    if not licenses:
        raise UserError("push_comparisons: licenses is empty: give the license of each source by its name.")
    repo_id = check_access(repo_id, token)
    public = hub_owners(repo_id, *licenses)
    # The rows are from the only licensed source. Of several, it is not known from which one.
    source = next(iter(licenses)) if len(licenses) == 1 else ""
    splits, reports = _comparisons_of(dataset, source, columns=columns, ignore=ignore)
    if not keep_annotators:
        splits = _with_numbered_annotators(splits)
    if report is not None:
        reports = {"": report, **reports}
    allowed = set(allow)
    _refuse_leaks(splits, allowed, public)
    card = dataset_card(
        splits,
        licenses=licenses,
        report=reports,
        quality=quality,
        title=title,
        repo_id=repo_id,
        keep_annotators=keep_annotators,
    )
    with tempfile.TemporaryDirectory() as scratch:
        files = _write_parquet(splits, Path(scratch))
        for name in files:
            allowed.add(f"binary:{name}")  # its rows were scanned above
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
    report: LoadReport | Mapping[str, LoadReport] | None = None,
    quality: QualityReport | None = None,
    repo_id: str,
    title: str | None = None,
    keep_annotators: bool = False,
    licences: Licenses | None = None,
) -> str:
    """Renders the card of a dataset of comparisons.

    The license of the dataset is that of the sources if they all have the same, else `other`. The arguments are those
    of `push_comparisons`, except that `splits` holds the comparison rows as they are published, and that `report` may
    map each split to its report.
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
        reports=_shown_reports(report),
        quality=_shown_metrics(quality, keep_annotators),
    )
    header = _card_data(splits, licenses, title)
    card = DatasetCard(f"---\n{header.to_yaml()}\n---\n\n{body}")
    return str(card)


def _licenses(caller: str, licenses: Licenses | None, licences: Licenses | None) -> Licenses:
    """Returns the licenses, given under the current or the deprecated name."""
    if licences is not None:
        logger.warning("%s: the argument licences is deprecated: use licenses.", caller)
        licenses = licenses or licences
    return licenses or {}


def _comparisons_of(
    dataset: Dataset | DatasetDict,
    source: str,
    *,
    columns: Mapping[str, Any] | None,
    ignore: Sequence[str],
) -> tuple[dict[str, Dataset], dict[str, LoadReport]]:
    """Converts the splits to comparison rows. Also returns the reports of those that were converted."""
    splits = dict(dataset) if isinstance(dataset, DatasetDict) else {"train": dataset}
    reports = {}
    for name, rows in splits.items():
        if not _JUDGED <= set(rows.column_names):  # TRL's format or another public format
            splits[name], reports[name] = to_comparisons(rows, source=source, columns=columns, ignore=ignore)
    return splits, reports


def _with_numbered_annotators(splits: dict[str, Dataset]) -> dict[str, Dataset]:
    numbers: dict[str, str] = {}  # one numbering over all splits
    numbered = {}
    for name, rows in splits.items():
        numbered[name] = _numbered(rows, numbers) if "votes" in rows.column_names else rows
    return numbered


def _numbered(rows: Dataset, numbers: dict[str, str]) -> Dataset:
    """Replaces annotator names by 1, 2, … in the order in which they appear. `numbers` holds those assigned so far."""

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
    """Raises `UserError` if rows contain leaks. Parquet files cannot be scanned after they are written."""
    findings: list[Finding] = []
    for name, rows in splits.items():
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        for finding in scan_text(lines, f"{name}.jsonl", public=public):
            finding = finding._replace(file=name)  # line n is row n of the split, counted from 1
            if not finding.allowed(allowed):
                findings.append(finding)
    refuse_findings(findings)


def _write_parquet(splits: Mapping[str, Dataset], folder: Path) -> dict[str, Path | bytes]:
    """Writes each split. Returns the files by their names in the repository, which tell `load_dataset` the splits."""
    files: dict[str, Path | bytes] = {}
    for name, rows in splits.items():
        path = folder / f"{name}.parquet"
        rows.to_parquet(path)
        files[f"data/{name}-00000-of-00001.parquet"] = path
    return files


def _card_data(splits: Mapping[str, Dataset], licenses: Licenses, title: str) -> DatasetCardData:
    """Builds the YAML header."""
    n_rows = sum(len(rows) for rows in splits.values())
    distinct = set(licenses.values())  # the header has a single license
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


def _shown_reports(report: LoadReport | Mapping[str, LoadReport] | None) -> list[dict[str, Any]]:
    """Returns what the card shows of each report: whose rows they are, the counts, and the columns not read."""
    if report is None:
        return []
    reports = {"": report} if isinstance(report, LoadReport) else report
    shown = []
    for split, of_split in reports.items():
        source = strip_local_paths(of_split.source)
        shown.append({"split": split, "source": source, "counts": of_split})
    return shown


def _shown_metrics(quality: QualityReport | None, keep_annotators: bool) -> list[tuple[str, str]]:
    """Returns the metrics of the quality report that the card shows, as (name, value)."""
    if quality is None:
        return []
    metrics = []
    for name, value, _ in quality.rows():
        if not value or (name == "annotators" and not keep_annotators):  # this metric shows annotator names
            continue
        metrics.append((name, value))
    return metrics
