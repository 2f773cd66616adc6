"""On which comparisons a reward model was trained, by what its folder says or by what the user names."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from ..collect.outcomes import same_words
from ..errors import UserError, first_line
from ..hub.run_files import content_digest
from ..readers.formats import load_comparisons

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".gz", ".arrow")
"""Endings of the files in the digest of local data in a `report.json`."""
NO_DATA = hashlib.sha256().hexdigest()[:16]
"""Digest of an empty file, or of a folder without data: it says nothing."""
HIDDEN_FOLDER = "<path>/"
"""What `training_config.yaml` has for folders outside of the working folder, which it does not tell."""
Row = Mapping[str, Any]


@dataclass
class TrainingRows:
    """The comparisons on which a reward model was trained.

    Attributes:
        pairs: fingerprint of each pair (prompt and two completions, in any order) -> its prompt; None if the rows are
            not known.
        prompts: fingerprints of the prompts.
        annotators: who judged them, as far as the votes say it.
        dataset: id, revision and split on the Hub, of rows that are known by this name only.
        digests: SHA-256 (16 digits) of each file or folder of the rows, and its split (None without one). A reward
            model has it in its `report.json`, so that it is known even if the file is not there anymore.
        why_unknown: why the rows are not known.
    """

    pairs: dict[str, str] | None = None
    prompts: set[str] = field(default_factory=set)
    annotators: set[str] = field(default_factory=set)
    dataset: str | None = None
    digests: set[tuple[str, str | None]] = field(default_factory=set)
    why_unknown: str = ""

    def is_of_same_file(self, other: "TrainingRows") -> bool:
        """Whether both were read from a file or folder with the same content, and not from two splits of it."""
        return any(
            digest == its and (split == its_split or split is None or its_split is None)
            for digest, split in self.digests
            for its, its_split in other.digests
        )


def pair_fingerprints(row: Row) -> list[str]:
    """A fingerprint of each pair of a comparison row: of its words, whatever the order of the two completions."""
    prompt = same_words(row["prompt"])
    completions = [same_words(completion) for completion in row["completions"]]
    # Without the judged pairs: a row of K completions is the same information however it was judged.
    pairs = row.get("pairs") or combinations(range(len(completions)), 2)
    return [_digest(prompt, *sorted((completions[i], completions[j]))) for i, j in pairs]


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:24]


def rows_of(comparisons: Sequence[Row]) -> TrainingRows:
    """Fingerprints of comparison rows."""
    found = TrainingRows(pairs={})
    for row in comparisons:
        prompt = same_words(row["prompt"])
        found.prompts.add(_digest(prompt))
        for fingerprint in pair_fingerprints(row):
            found.pairs[fingerprint] = prompt
        found.annotators |= {vote["annotator"] for vote in row.get("votes") or [] if vote.get("annotator")}
    return found


def read_training_rows(
    reward_model: str | Path | None, trained_on: Any, name: str, files: Sequence[str | Path] = ()
) -> TrainingRows:
    """The comparisons on which a reward model was trained.

    Args:
        reward_model: its folder or Hub id, or None.
        trained_on: comparisons that the user names: a file, a folder, a Hub id, rows, or a list of files. None looks
            them up in `training_config.yaml` and `report.json` of the folder.
        name: what messages call it.
        files: files or folders from which `trained_on` was read, where it is rows.

    Raises:
        UserError: what the user named cannot be read.
    """
    if trained_on is not None:
        found = rows_of(_read_named(trained_on, name))
        named = trained_on if isinstance(trained_on, list | tuple) else [trained_on]
        found.digests = _digests([*files, *(source for source in named if isinstance(source, str | Path))])
        return found
    if reward_model is None:
        return TrainingRows(why_unknown=f"{name}: nothing says on which comparisons it was trained")
    folder = Path(str(reward_model)).expanduser()
    found = _rows_of_folder(folder, name)
    found.digests = _recorded_digests(folder)
    return found


def _digests(files: Sequence[str | Path]) -> set[tuple[str, str | None]]:
    """Digests of local files and folders, as `report.json` of a reward model has them."""
    paths = [Path(file).expanduser() for file in files]
    found = {(content_digest(path, DATA_SUFFIXES), _split(path)) for path in paths if path.exists()}
    return {(digest, split) for digest, split in found if digest != NO_DATA}


def _read_named(trained_on: Any, name: str) -> list[Row]:
    sources = trained_on
    is_several = isinstance(trained_on, list | tuple) and all(isinstance(one, str | Path) for one in trained_on)
    if not is_several:
        sources = [trained_on]
    rows: list[Row] = []
    for source in sources:
        if isinstance(source, list) and all("completions" in row for row in source):
            rows += source
            continue
        try:
            rows += load_comparisons(source, split=_split(source))[0].to_list()
        except Exception as error:
            shown = source if isinstance(source, str | Path) else type(source).__name__
            raise UserError(f"trained_on of {name}: {shown}: {first_line(error)}.") from error
    return rows


def _split(source: Any) -> str | None:
    """The split of training rows, of a folder that has it. A file has no splits."""
    if not isinstance(source, str | Path):
        return None
    path = Path(source).expanduser()
    if path.is_dir():
        has_train = any(part.name.startswith("train") for part in path.iterdir())
        return "train" if has_train else None
    return None if path.is_file() else "train"


def _rows_of_folder(folder: Path, name: str) -> TrainingRows:
    """The rows that the folder of a reward model says it was trained on, if they are still there."""
    if not folder.is_dir():
        return TrainingRows(why_unknown=f"{name}: {folder} is no local folder, give `trained_on`")
    config = _mapping(folder / "training_config.yaml")
    dataset = config.get("dataset_name")
    if not isinstance(dataset, str):
        why = f"{name}: {folder} has no training_config.yaml with a dataset_name, give `trained_on`"
        return TrainingRows(why_unknown=why)
    recorded = next((digest for digest, _ in _recorded_digests(folder)), None)
    path = _local(dataset, folder)
    if path is None and dataset.startswith(HIDDEN_FOLDER) and recorded is not None:
        path = _local(dataset.removeprefix(HIDDEN_FOLDER), folder)  # beside the run; the digest says if it is the same
    if path is None:
        if dataset.startswith((".", "/", "~", HIDDEN_FOLDER)) or Path(dataset).suffix:
            return TrainingRows(why_unknown=f"{name}: its comparisons {dataset} are not there, give `trained_on`")
        parts = [dataset, *(str(config[key]) for key in ("dataset_config", "dataset_revision") if config.get(key))]
        split = config.get("dataset_train_split", "train")
        return TrainingRows(
            dataset=f"{'@'.join(parts)} ({split})",
            why_unknown=f"{name}: its comparisons {dataset} are on the Hub and were not read, give `trained_on`",
        )
    if recorded is not None and content_digest(path, DATA_SUFFIXES) != recorded:
        why = f"{name}: its comparisons {dataset} have changed since it was trained, give `trained_on`"
        return TrainingRows(why_unknown=why)
    split = config.get("dataset_train_split", "train") if path.is_dir() else None
    try:
        rows = load_comparisons(path, split=split, config=config.get("dataset_config"))[0].to_list()
    except Exception as error:  # readers of many formats: no error of theirs stops a report
        return TrainingRows(why_unknown=f"{name}: its comparisons {dataset} cannot be read ({first_line(error)})")
    return rows_of(rows)


def _local(dataset: str, folder: Path) -> Path | None:
    """A local dataset: as it is named, or relative to the folder of the run or to one of two above."""
    path = Path(dataset).expanduser()
    for base in (Path(), folder, folder.parent, folder.parent.parent):
        if (base / path).exists():
            return base / path
    return None


def _recorded_digests(folder: Path) -> set[tuple[str, str | None]]:
    """Digest and split of the comparisons in the `report.json` of a reward model; empty if it has none."""
    card = _mapping(folder / "report.json").get("card")
    records = card.get("data") if isinstance(card, dict) else None
    for record in records if isinstance(records, list) else ():
        if isinstance(record, dict) and record.get("role") == "comparisons":
            digest = record.get("sha256")
            if isinstance(digest, str) and digest != NO_DATA:
                return {(digest, record.get("split"))}
    return set()


def _mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; empty if there is none, or if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
