"""Tool calls survive storage: what goes in as JSON comes out, with its types, from any kind of source."""

import json
import math

import pytest
from datasets import Dataset, Features, Json, List, Value, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rlhf_ext.data.json_columns import RowsWithoutFill, json_text, without_arrow_fill
from hf_rlhf_ext.data.schema import PreferenceDataError, as_dataset, dataset_of
from hf_rlhf_ext.data.trl_rows import read_comparisons
from hf_rlhf_ext.readers.formats import load_comparisons, load_demonstrations

USER = {"role": "user", "content": "Where?"}
text = st.text(st.sampled_from('abc0159.-e+"\\/ nul{}[]é日😀\n'), max_size=8)
looks_like_json = st.sampled_from(["02139", "null", "true", "1e5", "[1]", '{"a": 1}', '"x"', "", "NaN"])
floats = st.floats(allow_nan=False, allow_infinity=False).filter(lambda x: x == 0 or abs(x) > 1e-280)
numbers = st.integers(-(2**63), 2**63 - 1) | floats
values = st.recursive(
    st.none() | st.booleans() | numbers | text | looks_like_json,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
arguments = st.dictionaries(text, values, max_size=3)


def call(arguments, name="look_up"):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*arguments):
    return {"role": "assistant", "content": "", "tool_calls": list(map(call, arguments))}


def same(first, second):
    """Equal, with the same types: 1, 1.0 and True are different, and so are 0.0 and -0.0."""
    return repr(first) == repr(second)


@settings(max_examples=80, deadline=None)
@given(values)
def test_json_text_is_read_as_exactly_the_value(value):
    stored = Dataset.from_dict({"column": [json_text(value)]}, features=Features({"column": Json()}))
    assert same(stored[0]["column"], value)


@settings(max_examples=200, deadline=None)
@given(floats | st.integers(-(10**8), 10**8).map(lambda n: n / 10**5))
def test_no_number_is_rounded(number):
    assert same(Json().decode_example(json_text({"x": number}))["x"], number)
    assert json.loads(json_text(number)) == pytest.approx(number, rel=1e-15, abs=0)


def test_the_numbers_that_the_reader_of_datasets_would_round():
    assert Json().decode_example("0.35427") != 0.35427  # why there is a spelling of our own
    assert Json().decode_example(json_text([0.35427, 7.5162, 1.5429452])) == [0.35427, 7.5162, 1.5429452]


@settings(max_examples=10, deadline=None)
@given(st.lists(arguments, min_size=2, max_size=4))
def test_comparisons_keep_every_argument(tmp_path_factory, sides):
    rows = []
    for k, side in enumerate(sides):
        row = {"prompt": [USER], "completions": [[calling(side)], [calling(side, {"k": k})]], "row": k}
        rows.append(row | {"pairs": [[0, 1]], "targets": [1.0]})
    dataset = as_dataset(rows)
    folder = tmp_path_factory.mktemp("saved")
    dataset.save_to_disk(str(folder / "rows"))
    dataset.to_parquet(str(folder / "rows.parquet"))
    for read in (dataset, load_from_disk(str(folder / "rows")), Dataset.from_parquet(str(folder / "rows.parquet"))):
        assert same(list(read["completions"]), [row["completions"] for row in rows])


def test_plain_messages_are_stored_as_before():
    row = {"prompt": [USER], "completions": [[USER], [USER | {"content": "x"}]], "pairs": [[0, 1]], "targets": [1.0]}
    message = {"role": Value("string"), "content": Value("string")}
    features = as_dataset([row | {"row": 0}]).features
    assert features["prompt"] == List(message) and features["completions"] == List(List(message))


def test_values_that_json_does_not_have_are_refused_in_one_line():
    rows = [{"prompt": [USER], "completion": [calling({"x": math.nan})], "row": 0}]
    with pytest.raises(PreferenceDataError, match="completion") as refused:
        as_dataset(rows, "file")
    assert "\n" not in str(refused.value)


def test_tools_are_text_and_rows_without_arguments_have_an_empty_record():
    dataset = dataset_of(
        {"tools": [None, "[]", [{"name": "f"}]], "chat_template_kwargs": [None, '{"enable_thinking": false}', {}]}
    )
    assert list(dataset["tools"]) == [None, None, '[{"name": "f"}]']
    assert list(dataset["chat_template_kwargs"]) == [{}, {"enable_thinking": False}, {}]


# --- sources ---------------------------------------------------------------------------------------------------------

ARGUMENTS = [{"zip": "02139"}, {"zip": 169, "unit": "null"}, {"zip": 1.5, "days": [1, 2], "at": {"x": "1"}}]
TOOLS = [
    {"type": "function", "function": {"name": "look_up", "parameters": {"properties": {"zip": {"type": "string"}}}}},
    {"type": "function", "function": {"name": "go", "description": "d", "parameters": {"properties": {}}}},
]


def _rows(of):
    for k, arguments in enumerate(of):
        answer = [calling(arguments)]
        yield {"prompt": [USER], "chosen": answer, "rejected": [calling({"no": k})], "tools": TOOLS[k % 2 :]}


def _demonstrations(of):
    for row in _rows(of):
        yield {"messages": [*row["prompt"], *row["chosen"]], "tools": row["tools"]}


def _sources(rows, folder):
    """The rows as a JSONL file, and as what Arrow makes of them: in memory and as a Parquet file."""
    rows = list(rows)
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    yield path, rows
    # In one Arrow column, an argument has one type, so each source has the rows of one type only.
    for k in range(len(rows)):
        dataset = Dataset.from_list([rows[k], *_fillers(rows[k])])
        yield dataset, [rows[k]]
        dataset.to_parquet(str(folder / f"{k}.parquet"))
        yield folder / f"{k}.parquet", [rows[k]]


def _fillers(row):
    """Rows with other arguments and tools, for which Arrow fills fields with None into all rows."""
    other = [calling({"further": 1})]
    parameters = {"required": ["a"], "properties": {"y": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "x", "strict": True, "parameters": parameters}}]
    filler = {"tools": tools, "prompt": [USER | {"content": "else"}], "chosen": other, "rejected": row.get("rejected")}
    filler["messages"] = [USER | {"content": "else"}, *other]
    yield {name: filler[name] for name in row}


def _read_tools(read, expected):
    for row, source in zip(read, expected, strict=False):
        assert json.loads(row["tools"]) == source["tools"]


def test_comparisons_from_every_kind_of_source(tmp_path):
    for source, rows in _sources(_rows(ARGUMENTS), tmp_path):
        read, report = load_comparisons(source, group=False)
        assert not report.dropped and not report.flagged
        for row, expected in zip(read, rows, strict=False):
            assert same(row["completions"], [expected["chosen"], expected["rejected"]])
        _read_tools(read, rows)


def test_demonstrations_from_every_kind_of_source(tmp_path):
    for source, rows in _sources(_demonstrations(ARGUMENTS), tmp_path):
        read, report = load_demonstrations(source)
        assert not report.dropped and not report.flagged
        for row, expected in zip(read, rows, strict=False):
            assert same(row["prompt"] + row["completion"], expected["messages"])
        _read_tools(read, rows)


def test_what_the_trainer_reads_has_no_filled_fields():
    dataset = Dataset.from_list([*_rows([{"zip": "02139"}, {"x": 1}])])
    assert "x" in dataset[0]["chosen"][0]["tool_calls"][0]["function"]["arguments"]  # Arrow filled it in
    read, _ = read_comparisons(dataset)
    assert read[0]["completions"][0] == [calling({"zip": "02139"})]


def test_null_in_a_json_file_is_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [USER, calling({"unit": None})]}))
    read, _ = load_demonstrations(path)
    assert read[0]["completion"][0]["tool_calls"][0]["function"]["arguments"] == {"unit": None}


@pytest.mark.parametrize("tools", ["[]", "", "null", [], None])
def test_an_empty_list_of_tools_is_no_tools(tmp_path, tools):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [USER, USER | {"role": "assistant"}], "tools": tools}))
    read, report = load_demonstrations(path)
    assert "tools" not in read.column_names and not report.flagged


def test_text_of_tools_is_unchanged(tmp_path):
    written = '[ {"name":"f",  "parameters": {"default": 1.50}} ]'
    rows = [{"messages": [USER, USER | {"role": "assistant"}], "tools": written}]
    rows += [{"prompt": "q", "chosen": "a", "rejected": "b", "tools": written}]
    for k, load in enumerate((load_demonstrations, load_comparisons)):
        path = tmp_path / f"{k}.jsonl"
        path.write_text(json.dumps(rows[k]))
        assert load(path)[0][0]["tools"] == written


def test_rows_with_other_tools_are_not_merged(tmp_path):
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    path = tmp_path / "rows.jsonl"
    rows = [row, row | {"tools": TOOLS}, row | {"tools": TOOLS[:1]}, row | {"tools": TOOLS, "rejected": "c"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    read, report = load_comparisons(path)
    assert [len(row["completions"]) for row in read] == [2, 3, 2]
    assert (report.rows_in, report.kept) == (4, 4)


def test_filled_fields_are_removed_from_records_only():
    rows = [{"text": None, "list": [None, 1], "turn": [{"role": "user", "content": None, "name": None}]}]
    cleaned = RowsWithoutFill(Dataset.from_list(rows))
    assert list(cleaned) == [{"text": None, "list": [None, 1], "turn": [{"role": "user", "content": None}]}]
    assert len(cleaned) == 1
    assert without_arrow_fill(rows) is rows  # rows of a JSON file
