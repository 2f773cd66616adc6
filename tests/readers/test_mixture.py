"""Selecting demonstrations by rating and use case."""

import pytest
from datasets import Dataset, concatenate_datasets

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.readers.formats import load_demonstrations
from hf_rlhf_ext.readers.mixture import (
    DOLLY_USE_CASES,
    USE_CASE_SHARES,
    apportion,
    categorize,
    filter_by_rating,
    load_mix,
    sample_mix,
)


def rows_of(**counts):
    return Dataset.from_list(
        [{"prompt": f"{c} {k}", "completion": "x", "category": c} for c, n in counts.items() for k in range(n)]
    )


def test_ratings_filter_samples_and_keep_what_people_wrote():
    data = Dataset.from_dict({"prompt": list("abcd"), "completion": list("abcd"), "rating": [7.0, 6.0, None, 7.0]})
    kept, counts = filter_by_rating(data, 7)
    assert kept["prompt"][:] == ["a", "c", "d"]
    assert counts == {"rated_kept": 2, "rated_dropped": 1, "unrated_kept": 1}
    with pytest.raises(UserError, match="the highest rating is 7: lower min_rating"):
        filter_by_rating(data.select([0, 1]), 8)


@pytest.mark.parametrize("ratings", [None, [None, None], [float("nan"), None]])
def test_without_any_rating_all_rows_are_demonstrations_and_it_says_so(caplog, ratings):
    data = Dataset.from_dict(
        {"prompt": ["a", "b"], "completion": ["c", "d"]} | ({"rating": ratings} if ratings else {})
    )
    kept, counts = filter_by_rating(data, 7)
    assert kept["prompt"][:] == ["a", "b"] and counts == {"rated_kept": 0, "rated_dropped": 0, "unrated_kept": 2}
    assert "min_rating=7: no row has a rating" in caplog.text and "all 2 rows are kept" in caplog.text


def test_ratings_leave_dolly_whole_and_filter_what_is_added_to_it(shared_data, caplog):
    dolly, _ = load_demonstrations(shared_data / "dolly_3k.jsonl")
    kept, counts = filter_by_rating(dolly, 7)
    assert len(kept) == len(dolly) == counts["unrated_kept"] and "no row has a rating" in caplog.text
    caplog.clear()
    people = dolly.select(range(5)).select_columns(["prompt", "completion"])
    samples = people.select(range(4)).add_column("rating", [7.0, 6.0, 7.0, 1.0])
    kept, counts = filter_by_rating(concatenate_datasets([people, samples]), 7)
    assert counts == {"rated_kept": 2, "rated_dropped": 2, "unrated_kept": 5} and len(kept) == 7 and not caplog.text


def test_a_mix_takes_what_the_scarcest_category_allows():
    picked, report = sample_mix(rows_of(a=50, b=10, c=5), {"a": 0.5, "b": 0.25, "d": 0.25})
    # b: 10 / 0.25 = 40 rows at most; d has none, so its share is missing and the report shows it.
    assert report.obtained == {"a": 20, "b": 10, "d": 0} and report.rows == 30 == len(picked)
    assert report.other_category == 5 and report.no_category == 0
    assert "a 0.667 of 0.500" in report.summary() and "5 rows of other categories" in report.summary()
    again, _ = sample_mix(rows_of(a=50, b=10, c=5), {"a": 0.5, "b": 0.25, "d": 0.25})
    other, _ = sample_mix(rows_of(a=50, b=10, c=5), {"a": 0.5, "b": 0.25, "d": 0.25}, seed=1)
    assert again["prompt"][:] == picked["prompt"][:] != other["prompt"][:]
    assert len(set(picked["prompt"])) == 30  # without replacement


def test_a_mix_of_a_given_size_shows_the_gap():
    _, report = sample_mix(rows_of(a=50, b=10), {"a": 0.5, "b": 0.5}, rows=60)
    assert report.obtained == {"a": 30, "b": 10}
    with pytest.raises(UserError, match="no row has one of the categories x; found a"):
        sample_mix(rows_of(a=5), {"x": 1.0})


def test_instructgpt_shares_on_dolly(shared_data):
    assert set(DOLLY_USE_CASES.values()) < set(USE_CASE_SHARES)
    dolly, _ = load_demonstrations(shared_data / "dolly_3k.jsonl")
    picked, report = sample_mix(categorize(dolly), load_mix("instructgpt"))
    there = {name for name in USE_CASE_SHARES if name in DOLLY_USE_CASES.values()}
    assert report.obtained["generation"] == max(report.obtained.values()) == 295  # creative_writing is the scarcest
    for name in USE_CASE_SHARES:
        wanted = apportion(int(295 / load_mix("instructgpt")["generation"]))[name] if name in there else 0
        assert report.obtained[name] == wanted
    assert report.no_category == 0 and len(picked) == sum(report.obtained.values())


def test_rules_give_a_category_to_rows_without_one(tmp_path):
    rules = tmp_path / "rules.yaml"
    rules.write_text("summarization: ['summar(y|ize)', 'tl;?dr']\nrewrite: [rewrite]\n")
    data = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": text}] for text in ("Summarize: x", "Rewrite it", "Hm", "TLDR")],
            "topic": [None, None, None, "closed_qa"],
        }
    )
    named = categorize(data, "topic", str(rules))
    assert named["category"][:] == ["summarization", "rewrite", None, "closed QA"]
    _, report = sample_mix(named, {"summarization": 1.0})
    assert (report.no_category, report.other_category) == (1, 2)
    with pytest.raises(UserError, match="no column 'kind'; found prompt, topic"):
        categorize(data, "kind")


@pytest.mark.parametrize(
    "text, message",
    [
        ("[a, b]", "must map categories"),
        ("a: 0", "must map categories"),
        ("a: {", "cannot read"),
        (None, "cannot read"),
    ],
)
def test_a_bad_mix_file_is_one_line(tmp_path, text, message):
    path = tmp_path / "mix.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_mix(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[a]", "rules.yaml must map categories to lists of expressions"),
        ("", "rules.yaml must map categories to lists of expressions"),
        ("chat: hello", r"rules.yaml, category 'chat': write a list of regular expressions in quotes: chat: \["),
        ("chat: []", "category 'chat': write a list"),
        ("chat: ['']", "category 'chat': write a list"),  # would match every prompt
        ("ok: [x]\nchat: [1]", "category 'chat': write a list"),
        ("chat: {a: b}", "category 'chat': write a list"),
        (
            "chat: ['x', '(a']",
            r"category 'chat': '\(a' is not a regular expression \(missing \), unterminated ",
        ),
        ("chat: ['a{99999999999}']", r"category 'chat': 'a\{9+\}' is not a regular expression"),
        ("no: [x]", "category False is a bool, not a name: put it in quotes"),
    ],
)
def test_a_bad_rules_file_is_one_line(tmp_path, text, message):
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        categorize(Dataset.from_dict({"prompt": ["hello"]}), rules=str(path))
    assert "\n" not in str(error.value) and str(tmp_path) not in str(error.value)


def test_a_mix_of_no_rows_is_refused():
    with pytest.raises(UserError, match="mix_rows=0: give a number above 0"):
        sample_mix(rows_of(a=5), {"a": 1.0}, rows=0)
    with pytest.raises(UserError, match="mix: 1 rows are too few .*raise mix_rows"):
        sample_mix(rows_of(b=5), {"a": 0.9, "b": 0.1}, rows=1)


def test_a_mix_file_is_scaled_to_one(tmp_path):
    (tmp_path / "mix.yaml").write_text("chat: 3\nrewrite: 1\n")
    assert load_mix(str(tmp_path / "mix.yaml")) == {"chat": 0.75, "rewrite": 0.25}
