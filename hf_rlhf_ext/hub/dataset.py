"""Pushes comparisons to the Hub as a dataset with a card (schema, counts, agreement, licenses of the sources)."""

import json
import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from huggingface_hub import DatasetCard, DatasetCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..data.schema import LoadReport
from ..errors import UserError
from ..quality.report import QualityReport
from ..readers.formats import to_comparisons
from .cards.markdown import template_environment
from .cards.owner_text import CardMerge, marked
from .client import check_access, push_files
from .dataset_files import check_split_names, with_loading, with_one_schema, without_empty, write_shards
from .licenses import license_id, license_name, nearest_license
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
_RECORDED = ("source", "made_by")
"""Columns that programs fill in, so that a path in them is one of a machine, not text."""
_JUDGED = {"completions", "pairs", "targets"}
"""Columns of comparison rows. Rows without them are read as preference rows."""
_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
"""Bounds of the Hub's size classes: 1,000 rows, and ten times as many in each step."""
SHARD_BYTES = 500_000_000
"""Size of the rows in one parquet file, as in `datasets`."""


def push_comparisons(
    dataset: Dataset | DatasetDict | Mapping[str, Dataset],
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
        dataset: Comparison rows, or rows in any format of `load_comparisons`: one split (`train`), or several
            by their names.
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
        UserError: There are no licenses, the name of a split cannot be loaded, there are no rows, the leak scanner
            found something, or the token has no write access.
        PushError: The Hub failed, even after retries.
    """
    licenses = _licenses("push_comparisons", licenses, licences)
    _check_licenses(licenses)
    if isinstance(dataset, Mapping) and dataset and all(isinstance(rows, Dataset) for rows in dataset.values()):
        dataset = DatasetDict(dataset)
    if not isinstance(dataset, Dataset | DatasetDict):
        raise UserError(
            f"push_comparisons: got {type(dataset).__name__}: pass a Dataset or a DatasetDict, such as "
            "Dataset.from_list(list(rows))."
        )
    _say_unknown_licenses(licenses)
    if isinstance(dataset, DatasetDict):
        check_split_names(dataset)
    repo_id = check_access(repo_id, token)
    public = hub_owners(repo_id, *licenses)
    # The rows are from the only licensed source. Of several, it is not known from which one.
    source = next(iter(licenses)) if len(licenses) == 1 else ""
    splits, reports = _comparisons_of(dataset, source, columns=columns, ignore=ignore)
    splits = with_one_schema(without_empty(splits))
    _say_other_sources(splits, licenses, [] if report is None else [report.source])
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
        shards = write_shards(splits, Path(scratch), SHARD_BYTES)
        files: dict[str, Path | bytes] = {name: path for paths in shards.values() for name, path in paths.items()}
        for name in files:
            allowed.add(f"binary:{name}")  # its rows were scanned above
        files["README.md"] = marked(with_loading(card, splits, shards)).encode()
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
            merge_card=CardMerge(),
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

    The header has the licenses of all sources as the Hub knows them, and `other` for one that it does not know. The
    arguments are those of `push_comparisons`, except that `splits` holds the comparison rows as they are published, and
    that `report` may map each split to its report.
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


def _check_licenses(licenses: Licenses) -> None:
    if not licenses:
        raise UserError("push_comparisons: licenses is empty: give the license of each source by its name.")
    if not isinstance(licenses, Mapping) or not all(
        isinstance(text, str) and text.strip() for text in licenses.values()
    ):
        raise UserError(
            f"push_comparisons: licenses: got {licenses!r}: give the license of each source by its name, such as "
            '{"our annotators": "cc-by-4.0"}.'
        )


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
    findings: dict[Finding, None] = {}  # without repetitions
    for name, rows in splits.items():
        recorded = [column for column in _RECORDED if column in rows.column_names]
        for columns, written_by_people in ((rows.column_names, True), (recorded, False)):
            if not columns:
                continue
            lines = "\n".join(json.dumps(row, ensure_ascii=False, default=str) for row in rows.select_columns(columns))
            for finding in scan_text(lines, f"{name}.jsonl", public=public, written_by_people=written_by_people):
                finding = finding._replace(file=name)  # line n is row n of the split, counted from 1
                if not finding.allowed(allowed):
                    findings[finding] = None
    refuse_findings(list(findings))


def _card_data(splits: Mapping[str, Dataset], licenses: Licenses, title: str) -> DatasetCardData:
    """Builds the YAML header."""
    n_rows = sum(len(rows) for rows in splits.values())
    ids: list[str] = []
    unknown: list[str] = []
    for license in licenses.values():
        id = license_id(license)
        if id is None:
            id = "other"
            unknown.append(license)
        if id not in ids:
            ids.append(id)
    named = {"license_name": license_name(" ".join(dict.fromkeys(unknown)))} if unknown else {}
    return DatasetCardData(
        license=ids[0] if len(ids) == 1 else ids,
        task_categories=["reinforcement-learning", "text-generation"],
        tags=["preference", "comparisons", "rlhf", "hf_rlhf_ext"],
        size_categories=[_size_category(n_rows)],
        source_datasets=[name for name in licenses if _is_on_the_hub(name)] or None,
        pretty_name=" ".join(title.split()),
        **named,
    )


def _is_on_the_hub(name: str) -> bool:
    """True if the name of a source is the id of a data set, `owner/name`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _say_unknown_licenses(licenses: Licenses) -> None:
    """Logs a warning for each license that the Hub does not know, so that the header says `other`."""
    for source, license in licenses.items():
        if license_id(license) is None:
            near = nearest_license(license)
            hint = f" (or did you mean {near}?)" if near else ""
            logger.warning(
                "push_comparisons: license of %s: the Hub does not know %r, so the header says `other`%s.",
                source,
                license,
                hint,
            )


def _say_other_sources(splits: Mapping[str, Dataset], licenses: Licenses, read: Iterable[str]) -> None:
    """Logs a warning if licenses and rows name different sources.

    Args:
        splits: The rows. Rows that name no source may be from any.
        licenses: License of each source by its name.
        read: Names of sources that were read, as reports have them.
    """
    named: set[str] = set()
    for rows in splits.values():
        named.update(rows.unique("source") if "source" in rows.column_names else [""])
    if None in named or "" in named:
        return
    unknown = [source for source in licenses if source not in named.union(read)]
    unlicensed = sorted(named - set(licenses))
    if unknown:
        logger.warning("push_comparisons: licenses: no row is from %s: %s.", _listed(unknown), _listed_rest(unlicensed))
    elif unlicensed:
        logger.warning("push_comparisons: licenses: %s.", _listed_rest(unlicensed))


def _listed_rest(sources: Sequence[str]) -> str:
    if not sources:
        return "leave it out, or check the name"
    return f"rows are from {_listed(sources)}, whose license is missing"


def _listed(sources: Sequence[str]) -> str:
    more = f" and {len(sources) - 3} more" if len(sources) > 3 else ""
    return ", ".join(repr(strip_local_paths(source)) for source in sources[:3]) + more


def _size_category(n_rows: int) -> str:
    """Returns the Hub's class for a number of rows."""
    lowest = None
    limit = 1_000
    for name in _SIZES:
        if n_rows < limit:
            return f"n<{name}" if lowest is None else f"{lowest}<n<{name}"
        lowest = name
        limit *= 10
    return f"n>{lowest}"


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
