"""Merges the YAML headers of two cards: what the owner added, changed or removed stays, the rest is the new one's."""

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from huggingface_hub.repocard_data import yaml_dump

HeaderRecord = dict[str, list[str]]
"""Key of a header -> digests of the values that were generated: one, or one for each item of a list."""
_INDEX = "model-index"


def header_yaml(header: Mapping[str, Any]) -> str:
    """Returns a header as YAML, as huggingface_hub writes it. An empty header is an empty text."""
    return yaml_dump(dict(header), sort_keys=False).strip() if header else ""


def digests_of(name: str, value: Any) -> list[str]:
    """Returns the digests of a value of the header: one for each item of a list, or for each metric of the index."""
    return [_digest(item) for item in _items(name, value)]


def merged_headers(
    new: Mapping[str, Any],
    new_record: Mapping[str, Collection[str]],
    old: Mapping[str, Any],
    old_record: Mapping[str, Collection[str]],
    asked: Collection[str] = (),
) -> dict[str, Any]:
    """Merges two headers.

    Args:
        new: The header of the new card.
        new_record: Digests of its generated values; other values are the owner's.
        old: The header of the card that is there.
        old_record: Digests of its generated values.
        asked: Keys whose new values the user gave now, so that they win.
    """
    header: dict[str, Any] = {}
    for name in [*new, *(name for name in old if name not in new)]:
        if name in asked and name in new:
            header[name] = new[name]
            continue
        made_new = set(new_record.get(name, ()))
        made_old = set(old_record.get(name, ()))
        if isinstance(new.get(name), list) or isinstance(old.get(name), list):
            items = _merged_items(name, new.get(name), made_new, old.get(name), made_old)
        else:
            items = _merged_value(new.get(name), made_new, old.get(name), made_old)
        if items:
            header[name] = _rebuilt(name, items, new.get(name), old.get(name))
    return header


def _merged_value(new: Any, made_new: set[str], old: Any, made_old: set[str]) -> list[Any]:
    """A value, as a list of none or one: the owner's in the new card, the owner's in the old one, or the new one."""
    if new is not None and _digest(new) not in made_new:
        return [new]
    if old is not None and _digest(old) not in made_old:
        return [old]
    was_removed = old is None and bool(made_old)
    return [] if new is None or was_removed else [new]


def _merged_items(name: str, new: Any, made_new: set[str], old: Any, made_old: set[str]) -> list[Any]:
    """The items of a list: the new ones, but for those that the owner removed, and those that the owner added."""
    old_items = _items(name, old)
    there = {_digest(item) for item in old_items}
    removed = made_old - there
    items = [item for item in _items(name, new) if _digest(item) not in removed or _digest(item) not in made_new]
    known = {_digest(item) for item in items}
    # What the owner removed from the new card has a digest in its record.
    gone = made_new - {_digest(item) for item in _items(name, new)}
    # Without a record, nobody knows who wrote a metric: of two values, that of the new weights is true.
    measured = {_metric_of(item) for item in items} if name == _INDEX and not made_old else set()
    for item in old_items:
        if _digest(item) in made_old | known | gone or (measured and _metric_of(item) in measured):
            continue
        items.append(item)
    return items


def _items(name: str, value: Any) -> list[Any]:
    if value is None:
        return []
    if name == _INDEX:
        return _metrics(value) if isinstance(value, list) else []
    return value if isinstance(value, list) else [value]


def _metrics(index: list[Any]) -> list[Any]:
    """The entries of a model index with one metric each, so that each can be compared by itself."""
    entries = []
    for model in index:
        results = model.get("results") if isinstance(model, dict) else None
        for result in results if isinstance(results, list) else ():
            metrics = result.get("metrics") if isinstance(result, dict) else None
            for metric in metrics if isinstance(metrics, list) else ():
                entries.append({**result, "metrics": [metric]})
    return entries


def _metric_of(entry: dict[str, Any]) -> str:
    """What an entry of the index with one metric measures, without the value."""
    (metric,) = entry["metrics"]
    names = [metric.get("type"), metric.get("name")] if isinstance(metric, dict) else metric
    return _digest({**entry, "metrics": names})


def _rebuilt(name: str, items: list[Any], new: Any, old: Any) -> Any:
    if name == _INDEX:
        return [{**_first_model(new, old), "results": _joined(items)}]
    is_list = isinstance(new, list) or isinstance(old, list)
    return items if is_list else items[0]


def _first_model(*indices: Any) -> dict[str, Any]:
    """The first entry of the first index that has one."""
    for index in indices:
        if isinstance(index, list) and index and isinstance(index[0], dict):
            return index[0]
    return {}


def _joined(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of a model index with the metrics of the same task and dataset together again."""
    results: dict[str, dict[str, Any]] = {}
    for entry in entries:
        key = _digest({**entry, "metrics": None})
        if key in results:
            results[key]["metrics"].extend(entry["metrics"])
        else:
            results[key] = {**entry, "metrics": list(entry["metrics"])}
    return list(results.values())


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:6]
