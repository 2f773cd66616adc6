"""Edge cases of the readers: unusual prompt columns, broken cells, mixed kinds, odd files, splits, configurations."""

import json

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from hf_rlhf_ext.data.schema import PreferenceDataError
from hf_rlhf_ext.data.text import completion_text
from hf_rlhf_ext.readers.columns import UnreadColumn
from hf_rlhf_ext.readers.formats import UnknownFormat, load_comparisons, load_demonstrations, load_rows


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **further):
    return {"role": "assistant", "content": text} | further


def node(role, text, *replies, rank=None):
    return {"role": role, "text": text, "rank": rank, "replies": list(replies)}


def message(name, parent, role, text, rank=None, **further):
    return {"message_id": name, "parent_id": parent, "role": role, "text": text, "rank": rank} | further


SYSTEM = {"role": "system", "content": "s"}
Q, A, B = [user("q")], [assistant("a")], [assistant("b")]
TEXT = {"chosen": "a", "rejected": "b"}
SIDES = {"chosen": A, "rejected": B}
WHOLE = {"chosen": [SYSTEM, *Q, *A], "rejected": [SYSTEM, *Q, *B]}
TRANSCRIPTS = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
PAIR = {"prompt": "p", **TEXT}
OWN = {"prompt": "p", "completions": ["a", "b"], "pairs": [[0, 1]], "targets": [1.0]}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"city": "Berlin"}}}


@pytest.fixture
def write(tmp_path):
    def to(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return to


# --- finding the prompt ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, prompt, completions",
    [
        ({"system": "s", "question": "q", **TEXT}, [SYSTEM, *Q], [A, B]),
        ({"system": "", "input": "q", **TEXT}, Q, [A, B]),
        ({"instruction": "q", "input": "data", **TEXT}, [user("q\n\ndata")], [A, B]),
        ({"instruction": "q", "history": [["hi", "hello"]], **TEXT}, [user("hi"), assistant("hello"), *Q], [A, B]),
        ({"instruction": "q", **SIDES}, Q, [A, B]),
        ({"question": "its title", **WHOLE}, [SYSTEM, *Q], [A, B]),
        ({"question": "its title", **TRANSCRIPTS}, Q, [A, B]),
        ({"question": "p", "prompt": "p", **TEXT}, "p", ["a", "b"]),
        ({"question": "", "prompt": "p", **TEXT}, "p", ["a", "b"]),
        ({"prompt": Q, **TEXT}, Q, [A, B]),
        ({"prompt": "q", **SIDES}, Q, [A, B]),
        ({"prompt": "its title", **WHOLE}, [SYSTEM, *Q], [A, B]),
        ({"prompt": "its title", **TRANSCRIPTS}, Q, [A, B]),
        ({"prompt": [user([{"type": "text", "text": "q"}])], **SIDES}, Q, [A, B]),
        ({"conversations": Q, "system": "s", "chosen": A[0], "rejected": B[0]}, [SYSTEM, *Q], [A, B]),
    ],
)
def test_the_prompt_is_found_wherever_it_is(write, row, prompt, completions):
    dataset, report = load_comparisons(write([row]))
    assert (dataset[0]["prompt"], dataset[0]["completions"]) == (prompt, completions)
    assert dataset[0]["targets"] == [1.0] and report.kept == 1


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"chosen": "yes", "rejected": "no"}, "the two sides share no prompt"),
        ({"chosen": " yes", "rejected": " no"}, "the two sides share no prompt"),
        ({"chosen": [user("x"), *A], "rejected": [user("y"), *B]}, "the two sides share no prompt"),
        ({"prompt": "p", "chosen": A, "rejected": "b"}, "one side is text, the other messages"),
        ({"prompt": "p", "chosen": "a", "rejected": [{"role": "assistant", "content": 5}]}, "rejected is not text"),
        ({"prompt": "p", "chosen": "a", "rejected": [{"role": 5, "content": "b"}]}, "rejected is not text"),
        ({"prompt": [user([{"type": "image"}])], **SIDES}, "prompt has a part that is not text"),
        (
            {"prompt": [user("x")], "chosen": [assistant("a", tool_calls=5)], "rejected": B},
            "chosen has tool_calls that",
        ),
    ],
)
def test_a_comparison_without_prompt_or_text_is_dropped_with_that_reason(write, row, reason):
    with pytest.raises(PreferenceDataError, match=f"1 dropped: {reason}.*: no usable row is left"):
        load_comparisons(write([row]))


def test_two_prompts_that_differ_are_refused_until_one_is_waived(write):
    rows = write([{"question": "its title", "prompt": "p", **TEXT}])
    with pytest.raises(UnreadColumn, match=r'column question .*columns=.*ignore=\["question"\]'):
        load_comparisons(rows)
    dataset, report = load_comparisons(rows, ignore=["question"])
    assert dataset["prompt"] == ["p"] and report.waived == ["question"]
    dataset, report = load_comparisons(rows, columns={"prompt": "question"}, ignore=["prompt"])
    assert "its title" in str(dataset[0]["prompt"]) and report.waived == ["prompt"]


def test_a_prompt_that_is_given_and_empty_is_kept_and_flagged(write):
    dataset, report = load_comparisons(write([{"prompt": "", **TEXT}, {"prompt": " ", **TEXT}, PAIR]), group=False)
    assert dataset["prompt"] == ["", " ", "p"] and report.flagged == {"empty_prompt": [0, 1]}
    assert load_comparisons(write([{"question": "", **TEXT}], "q.jsonl"), "question-preference")[1].flagged == {
        "empty_prompt": [0]
    }


# --- categories ------------------------------------------------------------------------------------------------------


def test_another_column_is_the_category(write, tmp_path, monkeypatch):
    rows = [{"instruction": str(k), "response": "a", "category": "c", "topic": t} for k, t in enumerate(["x", 3, None])]
    assert load_demonstrations(write(rows), category_column="topic")[0]["category"] == ["x", "3", None]
    assert load_demonstrations(write(rows))[0]["category"] == ["c"] * 3
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    large = Dataset.from_list([{"instruction": "q", "output": "a", "category": "c", "topic": "t"}] * 10_000)
    found = [load_demonstrations(large, category_column=name)[0][0]["category"] for name in ("category", "topic")]
    assert found == ["c", "t"]  # not the cached result of another column


@pytest.mark.parametrize("second, expected", [("code", "code"), (None, "code"), ("chat", None)])
def test_rows_that_are_read_together_keep_the_category_they_agree_on(write, second, expected):
    answers = [{"prompt": "p", "completion": c, "label": c == "a"} for c in "ab"]
    unpaired = [answers[0] | {"category": "code"}, answers[1] | {"category": second}]
    thread = [
        message("1", None, "prompter", "q", category="code"),
        message("2", "1", "assistant", "a", rank=0, category=second),
        message("3", "1", "assistant", "b", rank=1),
    ]
    for rows in (unpaired, thread):
        dataset, _ = load_comparisons(write([row | {"source": "web"} for row in rows]))
        assert dataset[0].get("category") == expected and dataset[0]["source"] == "web"


# --- broken cells ----------------------------------------------------------------------------------------------------

HALF = "contains half of a surrogate pair"
DEEP = json.loads("[" * 300 + "]" * 300)


@pytest.mark.parametrize(
    "good, bad, reason",
    [
        (PAIR, PAIR | {"prompt": "p \ud800"}, HALF),
        (PAIR, PAIR | {"category": "\udfff"}, HALF),
        (OWN, OWN | {"completions": ["a", "\ud800"]}, HALF),
        (PAIR | {"prompt": Q, **SIDES}, {"prompt": [user(5)], **SIDES}, "prompt is not text"),
        (PAIR | {"prompt": Q, **SIDES}, {"prompt": Q, **SIDES} | {"chosen": 10**400}, "chosen is not text"),
        ({"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1},
         {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 10**400}, "labels is not 1 or 0"),
        ({"instruction": "q", "completions": [{"response": r, "overall_score": s} for r, s in (("a", 2), ("b", 1))]},
         {"instruction": "q", "completions": [{"response": r, "annotations": [1]} for r in "ab"]},
         "fewer than two rated completions"),
        ({"message_tree_id": "t", "prompt": node("prompter", "q", *(node("assistant", c, rank=0) for c in "ab"))},
         {"message_tree_id": "t", "prompt": node("prompter", "q") | {"replies": 5}}, "replies is not a list"),
        (PAIR, PAIR | {"prompt": [assistant("", tool_calls=[{"x": DEEP}])], **SIDES}, "prompt has tool_calls"),
    ],
)  # fmt: skip
def test_a_broken_cell_costs_its_row_and_says_why(write, good, bad, reason):
    dataset, report = load_comparisons(write([good, bad]), group=False)
    assert len(dataset) == report.kept == 1 and list(report.dropped.values()) == [[1]]
    assert next(iter(report.dropped)).startswith(reason)


@pytest.mark.parametrize("first, tie", [(-1, 0), (1, 1), (0.3, 0)])
def test_winners_that_are_not_one_hot_are_dropped(write, first, tie):
    row = {"prompt": '["q"]', "response_a": '["a"]', "response_b": '["b"]', "winner_model_a": 1, "winner_tie": 0}
    dataset, report = load_comparisons(write([row, row | {"winner_model_a": first, "winner_tie": tie}]))
    assert dataset["targets"] == [[1.0]] and [*report.dropped.values()] == [[1]]


def test_a_damaged_oasst_table_names_the_message(write):
    rows = [
        message("1", None, "prompter", "q"),
        message("2", "1", "assistant", "a", rank=0),
        message("3", "1", "assistant", "b", rank=1),
        message("4", ["1"], "assistant", "c", rank=2),
        message("5", "2", "prompter", "more"),
        message("6", "5", "assistant", "x", rank=0),
        message("7", "5", "assistant", "y", rank=1),
    ]
    order = [0, 3, 4, 5, 6, 1, 2]  # the deeper turn first
    dataset, report = load_comparisons(write([rows[k] for k in order]))
    assert report.dropped == {"parent_id is not text": [1]} and report.kept == 6
    assert sorted(dataset["row"]) == [0, 0] and dataset["completions"][:][1] == [A, B]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pairs": [5]}, "`pairs` holds 5: give two indices between 0 and 1"),
        ({"pairs": {"0": 1}}, "`pairs` is a dict: give a list"),
        ({"targets": 1}, "`targets` is a int: give a list"),
        ({"targets": [10**400]}, "`targets` holds 1000"),
        ({"votes": ["x"]}, "`votes` holds 'x': give annotator"),
        ({"votes": [{"annotator": "x", "pair": [0, 7], "label": 1}]}, "`votes` holds {"),
        ({"votes": [{"annotator": 3, "pair": [0, 1], "label": 1}]}, "`votes` holds {"),
        ({"flags": [1]}, "`flags` holds [1]: give a list of text"),
        ({"category": {}}, "`category` is {}: give a str, or leave it out"),
        ({"row": "x"}, "`row` is 'x': give an int"),
    ],
)
def test_a_broken_comparison_row_is_one_line(write, change, message):
    with pytest.raises(PreferenceDataError) as caught:
        load_comparisons(write([OWN, OWN | change]))
    text = str(caught.value)
    assert text.startswith(f"rows.jsonl row 1: {message}") and "\n" not in text and len(text) < 300


def test_a_number_that_no_column_holds_is_one_line(write):
    with pytest.raises(PreferenceDataError, match=r"^rows.jsonl: columns .*row.*: ") as caught:
        load_comparisons(write([OWN | {"row": 2**70}]))
    assert "\n" not in str(caught.value)


def test_one_bad_optional_cell_costs_that_cell(write):
    rows = [{"prompt": str(k), "completion": "c", "rating": r} for k, r in enumerate([7, "n/a", float("nan"), None])]
    dataset, report = load_demonstrations(write(rows))
    assert dataset["rating"] == [7.0, None, None, None] and report.flagged == {"bad_rating": [1]}
    rows = [PAIR | {"margin": m, "prompt": str(k)} for k, m in enumerate([0.5, float("nan"), "much", 10**400])]
    dataset, report = load_comparisons(write(rows))
    assert dataset["margins"] == [[0.5], [0.0], [0.0], [0.0]] and report.flagged == {"bad_margin": [2, 3]}
    row = {"instruction": "q", "response1": "a", "response2": "b", "annotator1": 1, "annotator2": "", "annotator3": 2}
    dataset, _ = load_comparisons(write([row]))
    assert [vote["annotator"] for vote in dataset[0]["votes"]] == ["annotator1", "annotator3"]
    assert dataset[0]["targets"] == [0.5]


@pytest.mark.parametrize("branch", [None, 5, node("assistant", None), node("assistant", "x") | {"replies": "none"}])
def test_a_broken_branch_of_a_tree_costs_that_branch(write, branch):
    turn = node("prompter", "more", node("assistant", "x", rank=0), node("assistant", "y", rank=1))
    tree = node("prompter", "q", node("assistant", "a", branch, turn, rank=0), node("assistant", "b", rank=1))
    dataset, report = load_comparisons(write([{"message_tree_id": "t", "prompt": tree}]))
    assert [row["completions"] for row in dataset] == [[A, B], [[assistant("x")], [assistant("y")]]]
    assert report.kept == 1 and report.flagged == {"broken_branch": [0]}


def test_the_rarer_kind_of_prompt_is_dropped(write):
    texts = [PAIR | {"prompt": str(k)} for k in range(3)]
    chats = [{"prompt": [user(str(k))], **SIDES} for k in range(2)]
    mixed = [*chats, *texts]
    dataset, report = load_comparisons(write(mixed))
    assert dataset["prompt"] == ["0", "1", "2"] and report.kept == 3
    assert report.dropped == {"prompt is messages, but other prompts are text": [0, 1]}
    dataset, report = load_comparisons(write([*texts[:1], *chats]))
    assert report.kept == 2 and report.dropped == {"prompt is text, but other prompts are messages": [0]}
    streamed, report = load_comparisons(write(mixed), streaming=True)
    assert len(list(streamed)) == 2 and report.dropped == {"prompt is text, but other prompts are messages": [2, 3, 4]}


# --- detection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "load, rows, prompt",
    [
        (load_demonstrations, [{"conversations": []}, {"conversations": [*Q, *A]}], Q),
        (load_demonstrations, [{"conversations": []}, {"conversations": ["q", "a"]}], Q),
        (load_demonstrations, [{"text": ""}, {"text": "### Human: q### Assistant: a"}], Q),
        (load_comparisons,
         [{"question": "x", "answers": []},
          {"question": "q", "answers": [{"text": t, "pm_score": k} for k, t in enumerate("ab")]}], Q),
    ],
)  # fmt: skip
def test_an_empty_first_cell_does_not_hide_the_format(write, load, rows, prompt):
    dataset, report = load(write(rows))
    assert dataset["prompt"] == [prompt] and report.rows_in == 2 and [*report.dropped.values()] == [[0]]


# --- other fields of a source ----------------------------------------------------------------------------------------


def test_tool_calls_survive_as_they_are(write, chat_tokenizer_factory):
    other = CALL | {"function": {"name": "g", "arguments": {"city": 5, "days": [1]}}}
    talk = [*Q, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    talk += [{"role": "tool", "name": "f", "tool_call_id": "1", "content": "sun"}, assistant("Sun.")]
    rows = [{"messages": talk, "tools": [{"name": "f"}]}, {"messages": [*Q, assistant(None, tool_calls=[other])]}]
    dataset, report = load_demonstrations(write(rows))
    assert dataset[0]["prompt"] == [*Q, assistant("", tool_calls=[CALL]), talk[2]]
    assert dataset[1]["completion"] == [assistant("", tool_calls=[other])] and not report.flagged
    assert json.loads(dataset[0]["tools"]) == [{"name": "f"}]
    tokenizer = chat_tokenizer_factory()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert '"name": "g"' in completion_text(tokenizer, dataset[1]["prompt"], dataset[1]["completion"])
    sides = {"chosen": [assistant("", tool_calls=[CALL])], "rejected": [assistant("", tool_calls=[other])]}
    dataset, report = load_comparisons(write([{"prompt": Q, **sides}, {"prompt": [user("r")], **SIDES}]))
    assert dataset[0]["completions"] == [*sides.values()] and dataset[1]["completions"] == [A, B]
    assert report.flagged == {}


@pytest.mark.parametrize("tools, flagged", [("[", {"bad_tools": [0]}), (5, {"bad_tools": [0]}), ("", {}), (None, {})])
def test_tools_that_are_no_json_are_left_out(write, tools, flagged):
    dataset, report = load_demonstrations(write([{"messages": [*Q, *A], "tools": tools}]))
    assert "tools" not in dataset.column_names and report.flagged == flagged


def test_dolly_with_the_input_column_of_alpaca(write):
    dataset, _ = load_demonstrations(write([{"instruction": "q", "input": "data", "response": "a"}]))
    assert dataset[0]["prompt"] == [user("q\n\ndata")]


@pytest.mark.parametrize(
    "scores, margin, target",
    [((8.5, 6.0), 2.5, 1.0), ((7, 7), 0.0, 0.5), ((6, 7), 0.0, 1.0), ((None, 7), 0.0, 1.0)],
)
def test_scores_of_the_sides_are_the_margin(write, scores, margin, target):
    row = {"prompt": "q", "score_chosen": scores[0], "score_rejected": scores[1]}
    row |= {"chosen": [*Q, *A], "rejected": [*Q, *B], "messages": [*Q, *A]}  # as ultrafeedback_binarized
    dataset, report = load_comparisons(write([row]))
    assert (dataset[0]["margins"], dataset[0]["targets"], dataset[0]["prompt"]) == ([margin], [target], Q)
    assert ("scores_contradict_label" in report.flagged) == (scores == (6, 7))


@pytest.mark.parametrize(
    "info, prompt",
    [
        ({"subreddit": "r/x", "title": "t", "post": "p"}, "SUBREDDIT: r/x\n\nTITLE: t\n\nPOST: p\n\nTL;DR:"),
        ({"title": "t", "post": "p"}, "TITLE: t\n\nPOST: p\n\nTL;DR:"),
        ({"title": "t", "post": "", "article": "long"}, "Article:\n\nlong\n\nTL;DR:"),
    ],
)
def test_summaries_are_asked_for_as_in_the_paper(write, info, prompt):
    row = {"info": info, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0, "worker": "w"}
    dataset, _ = load_comparisons(write([row | {"extra": {"confidence": 8}}]))
    assert dataset[0]["prompt"] == prompt
    assert dataset[0]["votes"] == [{"annotator": "w", "pair": [0, 1], "label": 1.0, "confidence": 8.0}]


@pytest.mark.parametrize("winner", ["tie (bothbad)", "tie (both bad)", "Tie (Both Bad)", "both_bad", "bothbad"])
def test_both_bad_is_a_flagged_tie_however_it_is_spelled(write, winner):
    dataset, report = load_comparisons(
        write([{"conversation_a": [*Q, *A], "conversation_b": [*Q, *B], "winner": winner}])
    )
    assert dataset[0]["targets"] == [0.5] and report.flagged == {"both_bad": [0]}


def test_the_cache_remembers_whether_the_order_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    row = {"instruction": "q", "response1": "a", "response2": "b", "annotator1": 1}
    data = Dataset.from_list([row | {"instruction": str(k)} for k in range(10_000)])
    first = load_comparisons(data)[1]
    monkeypatch.setattr("hf_rlhf_ext.readers.formats.convert_source", None)  # nothing is converted again
    assert first.order_known and load_comparisons(data)[1] == first


# --- files, splits, configurations -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "split, rows", [("train", 10), ("train[:4]", 4), ("train[2:4]+train[8:]", 4), ("train[:10%]", 1)]
)
def test_a_data_set_without_splits_is_its_own_train_split(tmp_path, write, split, rows):
    data = Dataset.from_list([PAIR | {"prompt": str(k)} for k in range(10)])
    data.save_to_disk(tmp_path / "saved")
    for source in (tmp_path / "saved", data, DatasetDict({"train": data, "test": data}), write(data.to_list())):
        found, report = load_comparisons(source, split=split)
        assert len(found) == report.rows_in == rows
        assert found[-1]["row"] == rows - 1  # numbered within the requested split
    both = load_rows(DatasetDict({"train": data, "test": data}), "train[:1]+test[1:3]")
    assert both["prompt"] == ["0", "1", "2"]


@pytest.mark.parametrize(
    "kind, split, message",
    [
        ("file", "train[abc]", r"^rows.jsonl: split 'train\[abc\]': Unrecognized .*write a slice as 'train\[:500\]'"),
        ("file", "train[", r"^rows.jsonl: split 'train\[': "),
        ("file", "train[:1]+test", r"^rows.jsonl: split .*Unknown split"),
        ("file", "train[5:]", r"^rows.jsonl: split 'train\[5:\]' selects none of the 2 rows"),
        ("saved", "train[abc]", r"^saved: split 'train\[abc\]': Unrecognized"),
        ("saved", "test", r"^saved: splits are train: .*\(got 'test'\)"),
        ("stream", "train[:1]", r"^dataset: splits are train: pass one of them as split= \(got 'train\[:1\]'\)"),
    ],
)
def test_a_split_that_cannot_be_is_one_line(tmp_path, write, kind, split, message):
    data = Dataset.from_list([PAIR, PAIR])
    data.save_to_disk(tmp_path / "saved")
    streamed = IterableDataset.from_generator(lambda: iter([PAIR]))
    source = {"file": write([PAIR, PAIR]), "saved": tmp_path / "saved", "stream": streamed}[kind]
    with pytest.raises(PreferenceDataError, match=message) as caught:
        load_comparisons(source, split=split)
    assert "\n" not in str(caught.value)


def test_one_of_several_configurations_is_read(tmp_path, write, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "several"
    folder.mkdir()
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("one", "two", "three"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    write([{"prompt": "p", "completion": "c"}], "several/three.jsonl")
    for name in ("one", "two"):
        write([PAIR | {"prompt": name}], f"several/{name}.jsonl")
    assert load_comparisons(folder, config="two", split="train")[0]["prompt"] == ["two"]
    assert load_rows(folder, "train", config="one")["prompt"] == ["one"]
    assert load_demonstrations(folder, config="three", split="train")[0]["completion"] == ["c"]
    with pytest.raises(
        PreferenceDataError, match=r"available configs: \['one', 'two', 'three'\].*--dataset_config"
    ) as caught:
        load_comparisons(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(PreferenceDataError, match="leave config='two' out"):
        load_comparisons(write([PAIR]), config="two")


@pytest.mark.parametrize(
    "content",
    [
        '{"data": [%s, %s]}',
        '{"data": [\n%s,\n%s\n]}\n',
        '{\n"version": 1, "rows": [%s, %s]}',
        "[%s, %s]",
        "%s\n%s\n",
        "%s\n\n%s",
    ],
)
def test_rows_of_a_file_are_found_however_they_are_wrapped(tmp_path, content):
    rows = [json.dumps(PAIR | {"prompt": str(k)}) for k in range(2)]
    (tmp_path / "rows.json").write_text(content % tuple(rows))
    assert load_comparisons(tmp_path / "rows.json")[0]["prompt"] == ["0", "1"]


def test_a_single_row_is_no_wrapper(write):
    assert load_demonstrations(write([{"messages": [*Q, *A]}]))[1].kept == 1
    assert load_comparisons(write([OWN]))[1].kept == 1


def test_an_object_nested_without_end_is_one_line(tmp_path):
    (tmp_path / "deep.json").write_text('{"a":' * 100_000)
    with pytest.raises(PreferenceDataError, match="^deep.json: cannot be read as json: line 1 is not JSON"):
        load_comparisons(tmp_path / "deep.json")


@pytest.mark.parametrize("before, line", [(0, 1), (2, 3), (5000, 5001)])
def test_a_line_that_is_not_utf8_is_numbered(tmp_path, before, line):
    row = json.dumps(PAIR | {"prompt": "é" * 200}, ensure_ascii=False).encode() + b"\n"
    (tmp_path / "rows.jsonl").write_bytes(row * before + b'{"prompt": "\xe9"}\n' + row)
    with pytest.raises(PreferenceDataError, match=f"line {line} is not UTF-8: convert the file"):
        load_comparisons(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    "columns, shown",
    [
        ([f"c{k:03}" for k in range(500)], "c000, c001, .*, c005 and 494 more, no known"),
        (["x" * 9999], "found columns x{39}…, no known"),
        (["two\nlines"], r"found columns 'two\\nlines', no known"),
        (["half \ud800"], r"found columns 'half \\ud800', no known"),
    ],
)
def test_columns_of_an_unknown_format_are_shortened(write, columns, shown):
    with pytest.raises(UnknownFormat, match=shown) as caught:
        load_comparisons(write([dict.fromkeys(columns, 1)]))
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600 and "did you mean columns={" in text
    text.encode()
