"""Published data sets are read in one call: no format is named, no column waived, and no row or column lost."""

import json
from typing import Any

import pytest
from datasets import Dataset

from hf_rlhf_ext import load_comparisons, load_demonstrations
from hf_rlhf_ext.data.schema import LoadReport, PreferenceDataError
from tests.readers.published import COMPARISONS, DEMONSTRATIONS, PUBLISHED, Published

Row = dict[str, Any]


def load(source: Any, entry: Published, **options: Any) -> tuple[Dataset, LoadReport]:
    if entry.kind == "comparisons":
        return load_comparisons(source, **options)
    return load_demonstrations(source, every_turn=True, **options)


def rendered(value: Any) -> str:
    """Text, or messages as JSON with all of their fields, so that tool calls can be searched too."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)


def best_and_worst(row: Row) -> tuple[list[str], list[str]]:
    """Completions that win and never lose, and those that lose and never win."""
    winners = set()
    losers = set()
    for (first, second), target in zip(row["pairs"], row["targets"], strict=True):
        if target == 0.5:
            continue
        better, worse = (first, second) if target > 0.5 else (second, first)
        winners.add(better)
        losers.add(worse)
    completions = row["completions"]
    best = [rendered(completions[index]) for index in sorted(winners - losers)]
    worst = [rendered(completions[index]) for index in sorted(losers - winners)]
    return best, worst


def check_prompt(row: Row, texts: tuple[str, ...]) -> None:
    """The texts are in the prompt, each one after the one before it."""
    prompt = rendered(row["prompt"])
    start = 0
    for text in texts:
        written = text if isinstance(row["prompt"], str) else json.dumps(text, ensure_ascii=False)[1:-1]
        place = prompt.find(written, start)
        assert place >= 0, f"{text!r} is not in the prompt {prompt!r} after character {start}"
        start = place + len(written)


def check_comparisons(rows: list[Row], entry: Published) -> None:
    expected = entry.expect
    assert len(rows) == len(expected.winner)
    for row, winner in zip(rows, expected.winner, strict=True):
        best, _ = best_and_worst(row)
        if winner == "tie":
            assert best == [], "expected a tie"
        else:
            assert any(winner in text for text in best), f"expected {winner!r} to win, but it is {best}"
    _, worst = best_and_worst(rows[0])
    if expected.loser:
        assert any(expected.loser in text for text in worst)
    if expected.margin is not None:
        assert abs(rows[0]["margins"][0]) == pytest.approx(expected.margin)
    if expected.k is not None:
        assert len(rows[0]["completions"]) == expected.k
    if expected.votes is not None:
        assert len(rows[0]["votes"]) == expected.votes


def check_demonstrations(rows: list[Row], entry: Published) -> None:
    assert entry.expect.completion in rendered(rows[-1]["completion"])
    for row in rows:
        assert rendered(row["completion"]).strip()


def everything(row: Row) -> str:
    """Prompt and answers of a row."""
    answers = row["completions"] if "completions" in row else [row["completion"]]
    return " ".join([rendered(row["prompt"]), *map(rendered, answers)])


def check(dataset: Dataset, report: LoadReport, entry: Published) -> None:
    expected = entry.expect
    rows = dataset.to_list()
    assert rows, report.summary()
    check_prompt(rows[0], expected.prompt)
    if entry.kind == "comparisons":
        check_comparisons(rows, entry)
    else:
        check_demonstrations(rows, entry)

    if expected.rows is not None:
        assert len(rows) == expected.rows
    if expected.tools:
        assert expected.tools in rows[0]["tools"]
    if expected.template_kwargs:
        assert expected.template_kwargs in rendered(rows[0]["chat_template_kwargs"])
    if expected.flag:
        assert expected.flag in rows[0]["flags"]
    if expected.present:
        assert expected.present in everything(rows[0])
    if expected.absent:
        assert not any(expected.absent in everything(row) for row in rows)
    if expected.dropped:
        assert any(expected.dropped in reason for reason in report.dropped)
    elif not expected.absent:
        # Rows that must not be read, such as disliked answers, may be dropped. All others are kept.
        assert not report.dropped


def refusal(source: Any, entry: Published) -> str:
    with pytest.raises(PreferenceDataError) as refused:
        load(source, entry)
    return str(refused.value)


def name(entry: Published) -> str:
    return entry.name


READ = [entry for entry in PUBLISHED if not entry.expect.refused]
REFUSED = [entry for entry in PUBLISHED if entry.expect.refused]
CATEGORIZED = [entry for entry in PUBLISHED if entry.expect.category_column]


@pytest.mark.parametrize("entry", READ, ids=name)
def test_it_is_read_from_memory(entry):
    dataset, report = load(Dataset.from_list(list(entry.rows)), entry)

    check(dataset, report, entry)


@pytest.mark.parametrize("entry", READ, ids=name)
def test_it_is_read_from_a_file(entry, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in entry.rows), encoding="utf-8")

    dataset, report = load(path, entry)

    check(dataset, report, entry)


@pytest.mark.parametrize("entry", REFUSED, ids=name)
def test_media_are_refused_in_one_line_that_names_the_column(entry):
    message = refusal(Dataset.from_list(list(entry.rows)), entry)

    assert entry.expect.refused in message
    assert "\n" not in message


@pytest.mark.parametrize("entry", CATEGORIZED, ids=name)
def test_a_category_column_reaches_the_rows(entry):
    expected = entry.expect

    dataset, _ = load(Dataset.from_list(list(entry.rows)), entry, category_column=expected.category_column)

    assert dataset[0]["category"] == expected.category


@pytest.mark.parametrize("entry", READ, ids=name)
def test_every_column_is_accounted_for(entry):
    """What the report calls unread are columns of the set, and none of them decides what a row means."""
    _, report = load(Dataset.from_list(list(entry.rows)), entry)

    assert set(report.unread) <= set(entry.columns)


@pytest.mark.parametrize("entries", [COMPARISONS, DEMONSTRATIONS], ids=["comparisons", "demonstrations"])
def test_the_table_is_sorted_and_complete(entries):
    names = [entry.name for entry in entries]
    assert names == sorted(names, key=str.casefold)
    assert len(set(names)) == len(names)
    for entry in entries:
        for row in entry.rows:
            assert tuple(row) == entry.columns, f"{entry.name}: each row has all columns, in the same order"
