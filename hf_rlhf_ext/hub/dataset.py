"""Comparisons as a data set on the Hub, with a card: schema, counts, agreement, and the licences of the sources."""

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from huggingface_hub import DatasetCard, DatasetCardData

from ..data.formats import to_comparisons
from ..data.quality import QualityReport
from ..data.schema import LoadReport
from ..errors import UserError
from .card import environment
from .privacy import hub_owners, strip_local_paths
from .push import check_access, push_files
from .scan import Finding, refuse_findings, scan_text

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
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def push_comparisons(
    dataset: Dataset | DatasetDict,
    repo_id: str,
    *,
    licences: Mapping[str, str],
    report: LoadReport | None = None,
    quality: QualityReport | None = None,
    title: str | None = None,
    keep_annotators: bool = False,
    private: bool = True,
    token: str | None = None,
    revision: str | None = None,
    allow: Iterable[str] = (),
) -> str:
    """Pushes comparisons (`load_comparisons`, or any rows that it takes) with a card, as one commit.

    Args:
        dataset: one split ("train"), or several.
        repo_id: `owner/name`, or a name of your own.
        licences: of each source, by its name: `{"Anthropic/hh-rlhf": "mit", "our annotators": "cc-by-4.0"}`.
        report: what was read and dropped, for the card.
        quality: agreement and other figures, for the card (`quality_report`).
        keep_annotators: publish their names; otherwise they are numbered.
        private, token, revision: as in `push_run`.
        allow: findings of the leak scanner to let pass (`email:train:12` is row 12 of the split).

    Returns:
        The commit's URL.
    """
    if not licences:
        raise UserError("push_comparisons: licences is empty: say under which licence each source was published.")
    repo_id = check_access(repo_id, token)
    public, numbers = hub_owners(repo_id, *licences), {}
    splits = dict(dataset) if isinstance(dataset, DatasetDict) else {"train": dataset}
    found: list[Finding] = []
    for name, rows in splits.items():
        if not {"completions", "pairs", "targets"} <= set(rows.column_names):
            rows, _ = to_comparisons(rows, source=name)
        splits[name] = rows = rows if keep_annotators or "votes" not in rows.column_names else _numbered(rows, numbers)
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        found += [f._replace(file=name) for f in scan_text(lines, f"{name}.jsonl", public=public)]
    allow = set(allow)
    refuse_findings([finding for finding in found if not finding.allowed(allow)])
    with tempfile.TemporaryDirectory() as scratch:
        files: dict[str, Path | bytes] = {}
        for name, rows in splits.items():
            rows.to_parquet(Path(scratch) / f"{name}.parquet")
            files[f"data/{name}-00000-of-00001.parquet"] = Path(scratch) / f"{name}.parquet"
        allow |= {f"binary:{name}" for name in files}  # their rows were looked at
        about = {"licences": licences, "report": report, "quality": quality, "title": title, "repo_id": repo_id}
        card = dataset_card(splits, **about, keep_annotators=keep_annotators)
        files["README.md"] = card.encode()
        options: dict[str, Any] = {"private": private, "token": token, "revision": revision, "allow": allow}
        options |= {"public": public, "message": "Upload comparisons", "repo_type": "dataset"}
        return push_files(files, repo_id, **options).commit_url


def dataset_card(
    splits: Mapping[str, Dataset],
    *,
    licences: Mapping[str, str],
    report: LoadReport | None = None,
    quality: QualityReport | None = None,
    repo_id: str,
    title: str | None = None,
    keep_annotators: bool = False,
) -> str:
    """The card's text; its licence is that of the sources where they agree, else `other`."""
    title = title or repo_id.rsplit("/", 1)[-1]
    rows = sum(map(len, splits.values()))
    size = next((name for limit, name in _SIZES if rows < limit), "n>1M")
    agreed = set(licences.values())
    data = DatasetCardData(
        license=agreed.pop() if len(agreed) == 1 else "other",
        task_categories=["reinforcement-learning", "text-generation"],
        tags=["preference", "comparisons", "rlhf", "hf_rlhf_ext"],
        size_categories=[size],
        source_datasets=[name for name in licences if name.count("/") == 1 and " " not in name] or None,
        pretty_name=title,
    )
    figures = [(name, value) for name, value, _ in quality.rows() if value] if quality else []
    figures = [figure for figure in figures if keep_annotators or figure[0] != "annotators"]  # each one's, by name
    body = (
        environment()
        .get_template("dataset.md.jinja")
        .render(
            title=title,
            repo_id=repo_id,
            splits={name: (len(rows), sum(map(len, rows["pairs"]))) for name, rows in splits.items()},
            columns={c: MEANINGS.get(c, "as in the source") for c in next(iter(splits.values())).column_names},
            licences=licences,
            report=report,
            source=strip_local_paths(report.source) if report else "",
            quality=figures,
        )
    )
    return str(DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def _numbered(rows: Dataset, numbers: dict[str, str]) -> Dataset:
    """Votes without names: annotator 1, 2, … in the order in which they appear; `numbers` has those known by now."""

    def number(row: dict[str, Any]) -> dict[str, Any]:
        votes = [
            vote | {"annotator": vote["annotator"] and numbers.setdefault(vote["annotator"], str(len(numbers) + 1))}
            for vote in row["votes"] or ()
        ]
        return {"votes": votes}

    return rows.map(number, load_from_cache_file=False)
