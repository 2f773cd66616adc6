"""Readers of public formats, tested on published rows, on real files and on arbitrary JSON."""

import copy
import gzip
import json
import re

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_rlhf_ext.data.schema import PreferenceDataError, validate_comparison
from hf_rlhf_ext.data.text import plain_text
from hf_rlhf_ext.readers.columns import UnreadColumn
from hf_rlhf_ext.readers.formats import UnknownFormat, load_comparisons, load_demonstrations
from hf_rlhf_ext.readers.profile import SAMPLE
from hf_rlhf_ext.readers.registry import COMPARISONS, DEMONSTRATIONS, register_format


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def turn(speaker, text):
    return {"from": speaker, "value": text}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def node(role, text, *replies, rank=None):
    return {"role": role, "text": text, "rank": rank, "replies": list(replies)}


def message(name, parent, role, text, rank=None):
    return {"message_id": name, "parent_id": parent, "text": text, "role": role, "rank": rank}


Q, A, B, C = [user("q")], [assistant("a")], [assistant("b")], [assistant("c")]
SHARED = {"instruction": "q", "input": ""}
THREE = {"completions": [A, B, C], "pairs": [[0, 1], [0, 2], [1, 2]]}
ANSWERS = [{"response": "a", "overall_score": 7.5}, {"response": "b", "overall_score": 5.0}]
MORE = node("prompter", "more", node("assistant", "x", rank=1), node("assistant", "y", rank=0))
TREE = node(
    "prompter",
    "q",
    node("assistant", "a", MORE, rank=0),
    node("assistant", "b", rank=1),
)  # fmt: skip

# Format -> rows in the published schema, and the expected comparisons: prompt, completions and judgments.
PREFERENCES = {
    "summarize-from-feedback": (
        [
            {
                "info": {"id": "t3", "post": "long", "title": "t", "subreddit": "s", "article": None},
                "summaries": [{"text": "a", "policy": "sup"}, {"text": "b", "policy": "ref"}],
                "choice": 1,
                "worker": "w1",
                "extra": {"confidence": 7},
            }
        ],
        [
            {
                "prompt": "SUBREDDIT: r/s\n\nTITLE: t\n\nPOST: long\n\nTL;DR:",
                "completions": ["a", "b"],
                "targets": [0.0],
                "votes": [{"annotator": "w1", "pair": [0, 1], "label": 0.0, "confidence": 7.0}],
            }
        ],
    ),
    "shp": (
        [
            {
                "history": "q",
                "human_ref_A": "a",
                "human_ref_B": "b",
                "labels": 0,
                "score_A": 3,
                "score_B": 9,
                "domain": "askx",
            }
        ],
        [{"prompt": Q, "completions": [A, B], "targets": [0.0], "category": "askx"}],
    ),
    "stack-exchange-paired": (
        [{"question": "q", "response_j": "a", "response_k": "b", "qid": 1}],
        [{"prompt": Q, "completions": [A, B], "targets": [1.0]}],
    ),
    "stack-exchange": (
        [{"question": "q", "answers": [{"text": t, "pm_score": s} for t, s in (("a", 2), ("b", 5), ("c", 2))]}],
        [{"prompt": Q, **THREE, "targets": [0.0, 0.5, 1.0]}],
    ),
    "nectar": (
        [
            {
                "prompt": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: q\n\nAssistant: ",
                "answers": [{"answer": "a", "rank": 2.0, "model": "m"}, {"answer": "b", "rank": 1.0, "model": "n"}],
            }
        ],
        [{"prompt": [user("hi"), assistant("hello"), user("q")], "completions": [A, B], "targets": [0.0]}],
    ),
    "ultrafeedback": (
        [{"instruction": "q", "source": "evol", "completions": ANSWERS, "models": ["m", "n"]}],
        [{"prompt": Q, "completions": [A, B], "targets": [1.0], "margins": [2.5], "source": "evol"}],
    ),
    "arena": (
        [
            {"conversation_a": [*Q, *A], "conversation_b": [*Q, *B], "winner": "model_b", "judge": "u1"},
            {"conversation_a": [*Q, *A], "conversation_b": [*Q, *C], "winner": "tie (bothbad)", "judge": "u2"},
        ],
        [
            {"prompt": Q, "completions": [A, B], "targets": [0.0]},
            {"prompt": Q, "completions": [A, C], "targets": [0.5], "flags": ["both_bad"]},
        ],
    ),
    "arena-responses": (
        [
            {
                "prompt": '["q", "and?"]',
                "response_a": '["a", "aa"]',
                "response_b": '["a", "bb"]',
                "winner_model_a": 0,
                "winner_model_b": 1,
                "winner_tie": 0,
            }
        ],
        [
            {
                "prompt": [*Q, *A, user("and?")],
                "completions": [[assistant("aa")], [assistant("bb")]],
                "targets": [0.0],
            }
        ],
    ),
    "pandalm": (
        [SHARED | {"response1": "a", "response2": "b", "annotator1": 1, "annotator2": 0, "annotator3": 2, "idx": 0}],
        [
            {
                "prompt": Q,
                "completions": [A, B],
                "targets": [0.5],
                "votes": [
                    {"annotator": f"annotator{k}", "pair": [0, 1], "label": v, "confidence": None}
                    for k, v in ((1, 1.0), (2, 0.5), (3, 0.0))
                ],
            }
        ],
    ),
    "alpaca-farm": (
        [
            {
                "instruction": "q",
                "input": "data",
                "output_1": "a",
                "output_2": "b",
                "preference": 1.25,
                "annotator": "x",
            },
            SHARED | {"output_1": "a", "output_2": "b", "preference": 0, "annotator": None},
        ],
        [
            {"prompt": [user("q\n\ndata")], "completions": [A, B], "targets": [0.75]},
            {"prompt": Q, "completions": [A, B], "targets": [0.5]},
        ],
    ),
    "oasst-tree": (
        [{"message_tree_id": "t", "prompt": TREE}],
        [
            {"prompt": Q, "completions": [A, B], "targets": [1.0]},
            {"prompt": [*Q, *A, user("more")], "completions": [[assistant("x")], [assistant("y")]], "targets": [0.0]},
        ],
    ),
    "oasst": (
        [
            message("1", None, "prompter", "q"),
            message("2", "1", "assistant", "a", rank=1.0),
            message("3", "1", "assistant", "b", rank=0.0),
        ],
        [{"prompt": Q, "completions": [A, B], "targets": [0.0]}],
    ),
    "ranked-outputs": (
        [{"instruction": "q", "input": "", "output": ["a", "b", "c"], "history": [["hi", "hello"]]}],
        [{"prompt": [user("hi"), assistant("hello"), *Q], **THREE, "targets": [1.0, 1.0, 1.0]}],
    ),
    "sharegpt-preference": (
        [
            {
                "conversations": [turn("system", "s"), turn("human", "q")],
                "chosen": turn("gpt", "a"),
                "rejected": turn("gpt", "b"),
            }
        ],
        [{"prompt": [{"role": "system", "content": "s"}, *Q], "completions": [A, B], "targets": [1.0]}],
    ),
    "trl": (
        [{"chosen": [*Q, *A], "rejected": [*Q, *B]}],
        [{"prompt": Q, "completions": [A, B], "targets": [1.0]}],
    ),
    "instruction-preference": (
        [{"instruction": "q", "input": "data", "system": "s", "chosen": "a", "rejected": "b"}],
        [{"prompt": [{"role": "system", "content": "s"}, user("q\n\ndata")], "completions": [A, B], "targets": [1.0]}],
    ),
    "question-preference": (
        [{"system": "s", "question": "q", "chosen": "a", "rejected": "b"}],
        [{"prompt": [{"role": "system", "content": "s"}, *Q], "completions": [A, B], "targets": [1.0]}],
    ),
    "safe-rlhf": (
        [
            {
                "prompt": "q",
                "response_0": "a",
                "response_1": "b",
                "is_response_0_safe": True,
                "is_response_1_safe": False,
                "better_response_id": 1,
                "safer_response_id": 0,
            }
        ],
        [{"prompt": Q, "completions": [A, B], "targets": [0.0]}],
    ),
    "helpsteer": (
        [
            {"prompt": "q", "response": text, "helpfulness": rating, "correctness": 4, "coherence": 4}
            for text, rating in (("a", 1), ("b", 4))
        ],
        [{"prompt": Q, "completions": [A, B], "targets": [0.0], "margins": [-3.0]}],
    ),
    "helpsteer-preference": (
        [{"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": -2}],
        [{"prompt": Q, "completions": [A, B], "targets": [1.0], "margins": [2.0]}],
    ),
    "preference-collection": (
        [
            {
                "instruction": "Compare the answers.",
                "output": "A is better.",
                "orig_instruction": "q",
                "orig_response_A": "a",
                "orig_response_B": "b",
                "orig_preference": "A",
                "orig_score_A": "5",
                "orig_score_B": "2",
            }
        ],
        [{"prompt": Q, "completions": [A, B], "targets": [1.0], "margins": [3.0]}],
    ),
    "argilla-orca": (
        [
            {
                "system": "",
                "input": "q",
                "chosen": "a",
                "rejected": "b",
                "generations": ["b", "a"],
                "rating": ratings,
                "status": status,
            }
            for ratings, status in (([4.0, 9.0], "unchanged"), ([9.0, 9.0], "tie"))
        ],
        [
            {"prompt": Q, "completions": [A, B], "targets": [1.0], "margins": [5.0]},
            {"prompt": Q, "completions": [A, B], "targets": [0.5]},
        ],
    ),
    "argilla-capybara": (
        [
            {
                "prompt": "q",
                "chosen": [*Q, *A],
                "rejected": [*Q, *B],
                "rating_chosen": 5,
                "rating_rejected": 2,
                "conversation": [{"input": "q", "output": "older"}],
                "generation_prompt": ["q"],
            }
        ],
        [{"prompt": Q, "completions": [A, B], "targets": [1.0], "margins": [3.0]}],
    ),
    "step-dpo": (
        [{"prompt": "q", "initial_reason_steps": "Step 1", "chosen": " a", "rejected": " b"}],
        [{"prompt": "q\nStep 1", "completions": [" a", " b"], "targets": [1.0]}],
    ),
    "ppe-best-of-k": (
        [
            {"prompt": "q", "scores": [number == 2 for number in range(1, 33)]}
            | {f"response_{number}": f"r{number}" for number in range(1, 33)}
        ],
        [
            {
                "prompt": Q,
                "pairs": [[0, 1], *([1, number] for number in range(2, 32))],
                "targets": [0.0, *[1.0] * 30],
            }
        ],
    ),
    "unpaired": (
        [{"messages": [*Q, *B], "label": False}, {"messages": [*Q, *A], "label": True}],
        [{"prompt": Q, "completions": [B, A], "pairs": [[1, 0]], "targets": [1.0]}],
    ),
}

ORDERED = {"summarize-from-feedback", "arena", "arena-responses", "pandalm", "alpaca-farm"}
OWN = {"prompt": "p", "completions": ["a", "b"], "pairs": [[0, 1]], "targets": [1.0], "weights": [1.0], "row": 4}
OWN |= {"votes": [{"annotator": "x", "pair": [0, 1], "label": 1.0}], "flags": ["f"], "category": "c", "margins": [0.5]}

DEMONSTRATED = {
    "orca": ({"system_prompt": "s", "question": "q", "response": "a"}, [{"role": "system", "content": "s"}, *Q]),
    "dolly": ({"instruction": "q", "context": "c", "response": "a", "category": "closed_qa"}, [user("q\n\nc")]),
    "alpaca": (SHARED | {"output": "a", "text": "whole"}, Q),
    "sharegpt": ({"id": "1", "conversations": [turn("human", "q"), turn("gpt", "a"), turn("human", "dangling")]}, Q),
    "lima": ({"conversations": ["hi", "hello", "q", "a"]}, [user("hi"), assistant("hello"), *Q]),
    "messages": ({"messages": [*Q, *A], "category": "Chat"}, Q),
    "prompt-completion": ({"prompt": Q, "completion": A}, Q),
    "gpt4all": ({"prompt": "q", "response": "a", "source": "x"}, Q),
    "oasst-text": ({"text": "### Human: q### Assistant: a"}, Q),
}


def test_every_format_is_tried_here():
    assert {fmt.name for fmt in COMPARISONS} == {*PREFERENCES, "comparisons"}
    assert {fmt.name for fmt in DEMONSTRATIONS} == set(DEMONSTRATED)


@pytest.mark.parametrize("name", PREFERENCES)
def test_a_published_row_is_detected_and_becomes_its_comparison(name, tmp_path):
    rows, expected = PREFERENCES[name]
    path = write(tmp_path / "rows.jsonl", rows)
    for options in ({}, {"format": name}):
        dataset, report = load_comparisons(path, group=False, **options)
        assert (report.rows_in, report.kept, report.dropped) == (len(rows), len(rows), {})
        assert report.order_known == (name in ORDERED)
        for row, wanted in zip(dataset, expected, strict=True):
            validate_comparison(row)
            wanted = {"pairs": [[0, 1]]} | wanted
            assert {column: row[column] for column in wanted} == wanted


@pytest.mark.parametrize("name", DEMONSTRATED)
def test_a_published_demonstration_is_detected(name, tmp_path):
    row, prompt = DEMONSTRATED[name]
    for options in ({}, {"format": name}):
        dataset, report = load_demonstrations(write(tmp_path / "rows.jsonl", [row]), **options)
        assert (dataset[0]["prompt"], dataset[0]["completion"]) == (prompt, A)
        assert report.kept == report.rows_in == 1
    assert dataset[0].get("category") == row.get("category")


def test_plain_text_demonstrations_stay_text_and_ratings_and_turns_survive(tmp_path):
    dataset, _ = load_demonstrations(write(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c", "rating": 7}]))
    assert (dataset[0]["prompt"], dataset[0]["completion"], dataset[0]["rating"]) == ("p", "c", 7.0)
    row = {"conversations": ["q", "a", "more", "b"]}
    dataset, report = load_demonstrations(write(tmp_path / "b.jsonl", [row]), every_turn=True)
    assert dataset["completion"][:] == [A, B] and dataset[1]["prompt"] == [*Q, *A, user("more")]
    assert (report.rows_in, report.kept) == (1, 1)


# --- dropped rows, with the reason -----------------------------------------------------------------------------------


def test_values_that_are_not_text_and_equal_completions_are_named(tmp_path):
    rows = [
        {"instruction": "q", "output": ["a", True, "b"]},
        {"instruction": "r", "output": ["a", "a ", "b"]},
        {"instruction": "s", "output": ["a", " a"]},
        {"instruction": "t", "output": ["a", None]},
        {"instruction": 5, "output": ["a", "b"]},
        {"instruction": "u", "output": "a"},
        "a line that is text",
    ]
    dataset, report = load_comparisons(write(tmp_path / "rows.jsonl", rows))
    assert report.dropped == {
        "completions are equal": [2],
        "fewer than two completions are text": [3],
        "instruction is not text": [4],
        "output is not a list of answers": [5],
        "not a JSON object": [6],
    }
    assert report.flagged == {"completion_not_text": [0], "equal_completions_merged": [1]}
    assert dataset[0]["completions"] == [A, B] and dataset[0]["targets"] == [1.0]
    assert dataset[1]["pairs"] == [[0, 1], [0, 1]] and report.rows_in == report.kept + 5


def test_unpaired_feedback_without_a_partner_is_dropped_with_that_reason(tmp_path):
    rows = [{"prompt": "p", "completion": c, "label": label} for c, label in (("a", True), ("b", False), ("c", True))]
    rows += [{"prompt": "alone", "completion": "a", "label": True}, {"prompt": "p", "completion": "d", "label": "?"}]
    dataset, report = load_comparisons(write(tmp_path / "rows.jsonl", rows))
    assert dataset[0]["completions"] == ["a", "b", "c"] and dataset[0]["pairs"] == [[0, 1], [2, 1]]
    assert report.dropped == {
        "label is neither yes nor no": [4],
        "unpaired: all completions of the prompt have the same label": [3],
    }


def test_oasst_table_accounts_for_every_message(tmp_path):
    rows = [
        message("1", None, "prompter", "q"),
        message("2", "1", "assistant", "a", rank=0),
        message("3", "1", "assistant", "b", rank=1),
        message("4", "2", "prompter", "more"),
        message("5", "4", "assistant", "only one", rank=0),
        message("3", "1", "assistant", "twice", rank=2),
        message("7", "gone", "assistant", "x", rank=0),
        message("8", "gone", "assistant", "y", rank=1),
    ]
    dataset, report = load_comparisons(write(tmp_path / "rows.jsonl", rows))
    assert len(dataset) == 1 and report.kept == 3
    assert report.dropped == {
        "message_id is missing or repeated": [5],
        "parent message is not in the table": [6, 7],
        "not part of a turn with two ranked replies": [3, 4],
    }


def test_pairs_of_a_prompt_become_one_row(tmp_path):
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "other", "chosen": "x", "rejected": "y"},
        {"prompt": " p\r\n", "chosen": "c", "rejected": "a "},
        {"prompt": "p", "chosen": "b", "rejected": "a"},
    ]
    dataset, report = load_comparisons(write(tmp_path / "rows.jsonl", rows))
    assert len(dataset) == 2 and report.kept == 4
    first = dataset[0]
    assert first["completions"] == ["a", "b", "c"] and first["row"] == 0
    assert first["pairs"] == [[0, 1], [2, 0], [1, 0]] and first["weights"] == [pytest.approx(1 / 3)] * 3
    again, _ = load_comparisons(dataset)
    assert again.to_list() == dataset.to_list()  # grouping again changes nothing


# --- real files ------------------------------------------------------------------------------------------------------


def test_pandalm_names_its_dirt_by_row(shared_data):
    dataset, report = load_comparisons(shared_data / "pandalm_testset.json", group=False)
    assert (report.rows_in, report.kept) == (999, 993)
    assert report.dropped == {"response1 is not text": [157, 158, 159, 164], "response2 is not text": [161, 162]}
    rows = read(shared_data / "pandalm_testset.json")
    empty = {k for k, row in enumerate(rows) if "" in (row["response1"], row["response2"])}
    assert set(report.flagged["empty_completion"]) == empty
    assert sum((row["response1"] == "") + (row["response2"] == "") for row in rows) == 54
    assert len(dataset[0]["votes"]) == 3
    grouped, _ = load_comparisons(shared_data / "pandalm_testset.json")
    assert len(grouped) == 170 and sum(map(len, grouped["pairs"])) == 993 - 96  # 96 rows are copies of another row


def test_llama_factory_preference_files(shared_data):
    folder = shared_data / "formats"
    dataset, report = load_comparisons(folder / "lf_dpo_en_demo.json", group=False)
    assert report.kept == len(dataset) == 300 and not report.dropped

    dataset, report = load_comparisons(folder / "lf_oaast_rm_zh.json", group=False)
    outputs = [[" ".join(text.split()) for text in row["output"]] for row in read(folder / "lf_oaast_rm_zh.json")]
    repeated = [k for k, texts in enumerate(outputs) if len(set(texts)) < len(texts)]
    assert report.dropped == {"completions are equal": [k for k in repeated if len(set(outputs[k])) == 1]}
    assert report.flagged == {"equal_completions_merged": [k for k in repeated if len(set(outputs[k])) > 1]}
    assert max(map(len, dataset["completions"])) == 10

    dataset, report = load_comparisons(folder / "lf_kto_en_demo.json")
    labels = {}
    for row in read(folder / "lf_kto_en_demo.json"):
        labels.setdefault(json.dumps(row["messages"][:-1]), []).append(row["label"])
    both = [found for found in labels.values() if len(set(found)) == 2]
    assert len(dataset) == len(both) and report.kept == sum(map(len, both))
    assert {reason: len(rows) for reason, rows in report.dropped.items()} == {
        "unpaired: all completions of the prompt have the same label": 300 - report.kept
    }


@pytest.mark.parametrize(
    "name, rows",
    [
        ("formats/fastchat_dummy_conversation.json", 500),
        ("formats/lf_glaive_toolcall_en_demo.json", 300),
        ("dolly_3k.jsonl", 3000),
    ],
)  # fmt: skip
def test_real_demonstrations_lose_nothing(shared_data, name, rows):
    dataset, report = load_demonstrations(shared_data / name)
    assert (report.rows_in, report.kept, len(dataset)) == (rows, rows, rows)
    assert all(row["prompt"] and row["completion"][0]["role"] == "assistant" for row in dataset)
    if "glaive" in name:
        assert json.loads(dataset[0]["tools"]) is not None
        assert any(turn["role"] == "tool" for row in dataset for turn in row["prompt"])


# --- arbitrary JSON --------------------------------------------------------------------------------------------------

NUMBERS = st.integers(-3, 3) | st.floats() | st.sampled_from([10**400, 2**63])
SCALARS = st.none() | st.booleans() | NUMBERS | st.text("aq \n\ud800", max_size=4)
KEYS = st.sampled_from("role content from value text rank response answer pm_score replies tool_calls Rating".split())
ANYTHING = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner), max_leaves=6)
FURTHER = "input system history prompt margin score_chosen score_rejected rating tools category source".split()


def places(value, path=()):
    """Yields the paths of all values inside a row."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(inner, (*path, key))


@st.composite
def damaged(draw, rows):
    """Published rows in which one value, at any depth, is replaced by another."""
    rows = copy.deepcopy(rows)
    *path, last = draw(st.sampled_from(list(places(rows))))
    inner = rows
    for key in path:
        inner = inner[key]
    inner[last] = draw(ANYTHING)
    return rows


def arbitrary(fmt, published):
    required = list(fmt.columns)
    further = dict.fromkeys((name for name in FURTHER if name not in required), ANYTHING)
    columns = st.fixed_dictionaries(dict.fromkeys(required, ANYTHING), optional=further)
    return damaged(published) | st.lists(columns | st.sampled_from(published), min_size=1, max_size=5)


def check_accounts(load, rows, name, path):
    path.write_text(json.dumps(rows))
    try:
        dataset, report = load(path, format=name)
    except PreferenceDataError as error:  # a user error is one line
        assert "\n" not in str(error)
        return
    assert report.rows_in == len(rows)
    named = [row for numbers in report.dropped.values() for row in numbers]
    assert len(set(named)) == len(named) and report.kept == len(rows) - len(named)
    order = [row for row in dataset["row"]]
    assert order == sorted(order) or name in ("unpaired", "oasst", "comparisons")
    for row in dataset if "pairs" in dataset.column_names else ():
        validate_comparison(row)
    assert load(path, format=name)[0].to_list() == dataset.to_list()


ACCOUNTS = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.mark.parametrize("fmt", COMPARISONS, ids=lambda fmt: fmt.name)
@ACCOUNTS
@given(data=st.data())
def test_arbitrary_json_in_preference_columns_is_accounted_for(fmt, tmp_path, data):
    published = PREFERENCES[fmt.name][0] if fmt.name in PREFERENCES else [OWN]
    check_accounts(load_comparisons, data.draw(arbitrary(fmt, published)), fmt.name, tmp_path / "rows.json")


@pytest.mark.parametrize("fmt", DEMONSTRATIONS, ids=lambda fmt: fmt.name)
@ACCOUNTS
@given(data=st.data())
def test_arbitrary_json_in_demonstration_columns_is_accounted_for(fmt, tmp_path, data):
    published = [DEMONSTRATED[fmt.name][0]]
    check_accounts(load_demonstrations, data.draw(arbitrary(fmt, published)), fmt.name, tmp_path / "rows.json")


# --- files that contain no data --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("page.jsonl", b"<!DOCTYPE html><html><body>404</body></html>", "line 1 is not JSON, it looks like HTML"),
        ("cut.json", b'[{"chosen": "a", "rejected": "b"},', "cannot be read as json: line 1: "),
        ("latin.jsonl", b'{"chosen": "\xe9", "rejected": "b"}', "line 1 is not UTF-8: convert the file"),
        (
            "twice.csv",
            b"prompt,chosen,rejected,chosen\np,a,b,c\n",
            "two columns have the name 'chosen': rename or remove one",
        ),
        ("empty.jsonl", b"", "cannot be read as json: it is empty"),
        ("numbers.json", b"[1, 2]", "found columns \\(none\\)"),
        ("deep.jsonl", b"[" * 100_000, "cannot be read as json"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PreferenceDataError, match=f"^{re.escape(name)}: .*{message}") as caught:
        load_comparisons(tmp_path / name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 2000


def test_a_gzip_file_that_was_cut_short_is_one_line(tmp_path):
    rows = "".join(json.dumps({"prompt": str(k), "chosen": "a", "rejected": "b"}) + "\n" for k in range(5000))
    whole = gzip.compress(rows.encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PreferenceDataError, match=r"^cut.jsonl.gz: .* damaged or incomplete: download it again"):
        load_comparisons(tmp_path / "cut.jsonl.gz")


def test_a_giant_line_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_rlhf_ext.readers.files.MAX_LINE", 1000)
    (tmp_path / "line.jsonl").write_text('{"chosen": "' + "a" * 5000)
    with pytest.raises(PreferenceDataError, match="line 1 .*: write one row per line"):
        load_comparisons(tmp_path / "line.jsonl")
    (tmp_path / "array.json").write_text("[" + '"a",' * 5000)
    with pytest.raises(PreferenceDataError, match="4,000 characters: write one row per line"):
        load_comparisons(tmp_path / "array.json")


def test_an_unknown_format_lists_what_is_known(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"a": 1}])
    with pytest.raises(PreferenceDataError, match=r"'hh'; known are comparisons, .*unpaired\."):
        load_comparisons(path, format="hh")
    with pytest.raises(UnknownFormat, match=r"columns a; .* shp \(history, .*\): rename yours"):
        load_comparisons(path, format="shp")


# --- streaming and the cache -----------------------------------------------------------------------------------------


def test_a_streamed_source_fills_its_report_while_it_is_read(tmp_path):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "a" if k == 1 else "b"} for k in range(4)]
    path = write(tmp_path / "rows.jsonl", rows)
    dataset, report = load_comparisons(path, streaming=True)
    assert (report.rows_in, report.kept) == (0, 0)
    for _ in range(2):  # a second pass counts from zero
        found = list(dataset)
        assert [row["row"] for row in found] == [0, 2, 3] and found[0]["weights"] == [1.0]
        assert (report.rows_in, report.kept, report.dropped) == (4, 3, {"chosen and rejected are equal": [1]})
    streamed = Dataset.from_list(rows).to_iterable_dataset()
    assert len(list(load_comparisons(streamed, streaming=True)[0])) == 3
    with pytest.raises(PreferenceDataError, match="unpaired .*: leave streaming out"):
        load_comparisons(
            write(tmp_path / "kto.jsonl", [{"prompt": "p", "completion": "c", "label": True}]), streaming=True
        )


def test_a_large_source_is_converted_once(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"prompt": str(k), "chosen": "a", "rejected": "a" if k == 7 else "b"} for k in range(10_000)]
    data = Dataset.from_list(rows)
    first, report = load_comparisons(data)
    monkeypatch.setattr("hf_rlhf_ext.readers.formats.convert_source", None)  # nothing is converted again
    second, again = load_comparisons(data)
    assert again == report and report.dropped == {"chosen and rejected are equal": [7]}
    assert second.to_list() == first.to_list() and len(first) == 9_999
    with pytest.raises(TypeError):
        load_comparisons(data.select(range(9_999, -1, -1)))  # other rows have another fingerprint


# --- columns that are ignored, that come late, or that only some rows fill --------------------------------------------

ASKED = {"prompt": "Name a blue thing.", "chosen": "The sky.", "rejected": "No idea at all."}
KTO = [{"prompt": "p", "completion": text, "label": liked} for text, liked in (("a b", True), ("c d", False))]
LATE = [ASKED | {"prompt": f"Name blue thing {n}."} for n in range(SAMPLE + 5)] + [ASKED | {"system": "Be rude."}]


@pytest.mark.parametrize("ignore", ["margin", ["margin"], ("margin",)])
@pytest.mark.parametrize("streaming", [False, True])
def test_an_ignored_column_is_not_read(ignore, streaming):
    dataset, report = load_comparisons([ASKED | {"margin": 3}], ignore=ignore, streaming=streaming)
    assert next(iter(dataset))["margins"] in (None, [0.0]) and report.unread == {"margin": "rating, ignored"}
    dataset, _ = load_comparisons([ASKED | {"margin": 3}], streaming=streaming)
    assert next(iter(dataset))["margins"] == [3.0]


def test_an_ignored_label_or_tool_of_any_reader_is_not_read():
    dataset, report = load_demonstrations(KTO, ignore="label")
    assert len(dataset) == 2 and report.unread == {"label": "label, ignored"}
    dataset, report = load_comparisons([ASKED | {"tools": [{"name": "f"}]}], ignore="tools")
    assert "tools" not in dataset.column_names and report.unread == {"tools": "tools, ignored"}
    ours = load_comparisons([ASKED | {"margin": 3}])[0].to_list()
    assert load_comparisons(ours, ignore="margins")[0]["margins"][0] in (None, [0.0])
    with pytest.raises(UnknownFormat, match="did you mean"):
        load_comparisons(KTO, ignore="label")


@pytest.mark.parametrize("load, rows", [(load_comparisons, [ASKED]), (load_demonstrations, KTO)])
def test_ignoring_a_column_that_is_none_is_refused(load, rows):
    with pytest.raises(PreferenceDataError, match=r"^dataset: ignore: 'persna' is no column; found .*prompt"):
        load(rows, ignore="persna")
    with pytest.raises(PreferenceDataError, match="columns and ignore both name 'prompt'"):
        load(rows, columns={"prompt": "prompt"}, ignore="prompt")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_that_comes_late_can_be_used_or_ignored(tmp_path, streaming):
    source = write(tmp_path / "rows.jsonl", LATE)
    with pytest.raises(UnreadColumn, match="column system"):
        list(load_comparisons(source)[0])
    dataset, report = load_comparisons(source, columns={"system": "system"}, streaming=streaming)
    assert list(dataset)[-1]["prompt"][0] == {"role": "system", "content": "Be rude."} and report.kept == len(LATE)
    dataset, report = load_comparisons(source, ignore="system", streaming=streaming)
    assert list(dataset)[-1]["prompt"] == ASKED["prompt"] and report.kept == len(LATE)
    with pytest.raises(PreferenceDataError, match="system is 'the_system', which is no column"):
        load_comparisons(source, columns={"system": "the_system"})


FEW_ROWS = settings(max_examples=15, deadline=None)
PART_OF_PROMPT = st.sampled_from([{"system": "Be rude."}, {"history": [["hi", "ho"]]}, {"context": "It is noon."}])


@FEW_ROWS
@given(parts=st.lists(st.none() | PART_OF_PROMPT, min_size=1, max_size=4), streaming=st.booleans())
def test_a_part_of_the_prompt_in_some_rows_costs_no_row(parts, streaming):
    rows = [{"prompt": f"Question {n}?"} | (part or {}) for n, part in enumerate(parts)]
    pairs = [row | {"chosen": "The sky.", "rejected": "No idea."} for row in rows]
    for load, source in (
        (load_comparisons, pairs),
        (load_demonstrations, [row | {"completion": "x y"} for row in rows]),
    ):
        dataset, report = load(source, streaming=streaming)
        assert len(list(dataset)) == report.kept == len(rows)


# --- labels and meanings that cannot be what they are taken for -------------------------------------------------------


@given(grades=st.lists(st.integers(0, 4), min_size=2, max_size=6).filter(lambda grades: max(grades) > 1))
@FEW_ROWS
def test_grades_are_no_label(grades):
    rows = [{"prompt": "p", "completion": f"text {n}", "label": grade} for n, grade in enumerate(grades)]
    with pytest.raises(PreferenceDataError, match='neither yes nor no: .*"ratings": "label"'):
        load_comparisons(rows)
    by_rating = {"answer": "completion", "ratings": "label"}
    dataset, _ = load_comparisons(rows, columns=by_rating)
    assert dataset[0]["completions"] == [row["completion"] for row in rows]


@pytest.mark.parametrize(
    "columns, options, message",
    [
        ("chosen", {}, "no dictionary"),
        (["prompt"], {}, "no dictionary"),
        ({"chosen": "good", "rejected": "bad"}, {"kind": ["a"]}, "neither comparisons nor demonstrations"),
        ({"answers": ["a", "b"], "verdict": "v", "verdict_is": "whichever"}, {}, "'whichever' is not understood"),
    ],
)
def test_a_format_that_cannot_work_is_refused_at_once(columns, options, message):
    with pytest.raises(PreferenceDataError, match=message):
        register_format("never", columns, **options)
    if not isinstance(columns, dict):
        with pytest.raises(PreferenceDataError, match=message):
            load_comparisons([ASKED], columns=columns)


# --- a question that the answers repeat -------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["prompt", "question", "instruction", "query"])
@pytest.mark.parametrize("sides", [("chosen", "rejected"), ("response_a", "response_b")])
def test_a_question_that_both_answers_repeat_is_taken_off(prompt, sides):
    question = ASKED["prompt"]
    row = {prompt: question, "winner": "A"} if sides[0] == "response_a" else {prompt: question}
    row |= {side: f"{question}\n{text}" for side, text in zip(sides, ("The sky.", "No idea."), strict=True)}
    completions = load_comparisons([row])[0][0]["completions"]
    assert [plain_text(text).strip() for text in completions] == ["The sky.", "No idea."]
    one_quotes = row | {sides[1]: "No idea."}
    completions = load_comparisons([one_quotes])[0][0]["completions"]
    assert plain_text(completions[0]) == row[sides[0]]
