"""Rows are tokenized in batches, kept in the cache of `datasets`, and never read from it when anything has changed."""

import gc
import json
import logging
import random
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import trl
from datasets import Dataset
from transformers import AutoTokenizer

from hf_rlhf_ext import PPOConfig, load_comparisons
from hf_rlhf_ext.data import cache
from hf_rlhf_ext.data.batch_encoding import encode_generation_prompts, encode_rows
from hf_rlhf_ext.data.collators import DataCollatorForComparisons
from hf_rlhf_ext.data.grouping import Grouped
from hf_rlhf_ext.data.preparation import prepare_comparisons
from hf_rlhf_ext.data.schema import LoadReport, as_dataset, group_by_prompt, write_rows
from hf_rlhf_ext.data.storage import token_counts
from hf_rlhf_ext.data.templates import template_options
from hf_rlhf_ext.data.text import Unrenderable, encode_generation_prompt, text_key
from hf_rlhf_ext.data.tokenization import Tokenization, tokenize_comparisons, tokenize_row
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.ppo.prompts import encode_prompts

TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"zip": "02139"}}}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
ROWS = [
    {"prompt": "Tell me", "completions": [" a lie", "", " the truth<|im_end|>", "\n\nnothing"]},
    {"prompt": "", "completions": ["a", "b"]},
    {"prompt": "<s>Tell me", "completions": ["a", "b"]},
    {"prompt": "text", "completions": [[assistant("of messages")], "of text"]},
    {"prompt": [user("Why?")], "completions": [[assistant("So.")], [assistant("  No ")], [assistant("")]]},
    {"prompt": [{"role": "system", "content": "Be brief."}, user("Why?")], "completions": [[assistant("a")]]},
    {"prompt": [user("")], "completions": [[assistant("a")], [assistant("b")]]},
    {"prompt": [user("Why?"), assistant("Because")], "completions": [[assistant(" so")], [assistant("not")]]},
    {"prompt": [user("Why?")], "completions": [[assistant("<think>\nhm\n</think>\n\nSo.")], [assistant("No.")]]},
    {"prompt": [user("Why?")], "completions": [[assistant("So.", reasoning_content="hm")], [assistant("No.")]]},
    {"prompt": [user("Why?")], "completions": [[assistant("So."), user("Why?"), assistant("Hm.")]]},
    {"prompt": [user("Why?")], "completions": [[assistant("", tool_calls=[CALL])], [assistant("No.")]]},
    {"prompt": [user("Why?")], "completions": [[assistant("a")], [assistant("b")]], "tools": json.dumps([TOOL])},
    {
        "prompt": [user("Why?")],
        "completions": [[assistant("a")], [assistant("b")]],
        "chat_template_kwargs": {"enable_thinking": False},
    },
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}], "completions": [[assistant("a")]]},
    {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "completions": [[assistant("a")]]},
    {"prompt": [user("a"), user("b")], "completions": [[assistant("c")]]},
    {"prompt": [assistant("Hello.")], "completions": [[user("Why?")]]},
    {"prompt": [{"role": "tool", "content": "42"}], "completions": [[assistant("c")]]},
]


def one_by_one(tokenizer, row):
    try:
        ids = tokenize_row(row, tokenizer)
    except Unrenderable as error:
        return error.reason
    return ids["prompt_ids"], ids["completion_ids"]


def prompt_of_one(tokenizer, row):
    try:
        return encode_generation_prompt(tokenizer, row["prompt"], template_options(row))
    except Unrenderable as error:
        return error.reason


def check_equal(tokenizer, rows):
    together = [ids if isinstance(ids, str) else tuple(ids) for ids in encode_rows(tokenizer, rows)]
    assert together == [one_by_one(tokenizer, row) for row in rows]
    assert encode_generation_prompts(tokenizer, rows) == [prompt_of_one(tokenizer, row) for row in rows]
    return together


def test_batches_have_the_tokens_of_single_rows_with_every_template(chat_tokenizer):
    refused, plain = 0, 0
    for path in TEMPLATES:
        chat_tokenizer.chat_template = path.read_text()
        together = check_equal(chat_tokenizer, ROWS)
        refused += sum(isinstance(ids, str) for ids in together)
        # Without a row that the template refuses, the plain rows are rendered together.
        good = [row for row, ids in zip(ROWS, together, strict=True) if not isinstance(ids, str)]
        plain += len(check_equal(chat_tokenizer, good))
    assert refused > 50 and plain > 200


def test_batches_of_a_tokenizer_that_puts_a_space_before_text_and_has_a_begin_token(stories_path):
    tokenizer = AutoTokenizer.from_pretrained(stories_path)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    together = check_equal(tokenizer, ROWS)
    assert together[2][0][0] == tokenizer.bos_token_id != together[2][0][1]  # "<s>" is not there twice


@pytest.mark.xdist_group("processes")
def test_several_processes_give_the_same_rows_in_the_same_order(chat_tokenizer, monkeypatch):
    monkeypatch.setattr("hf_rlhf_ext.data.tokenization.BATCH", 20)
    rows = Dataset.from_list([comparison(k) for k in range(130)])  # more batches than wait at a time
    options = {"max_length": 60, "overflow": "drop"}
    reports = [LoadReport(source="train") for _ in range(2)]
    one = tokenize_comparisons(rows, chat_tokenizer, report=reports[0], **options)
    two = tokenize_comparisons(rows, chat_tokenizer, report=reports[1], num_proc=2, **options)
    assert len(one) == len(rows) and two.to_list() == one.to_list()
    assert reports[0] == reports[1]


def test_texts_of_one_plain_message_have_the_key_of_all_conversations():
    odd = [user(text) for text in ("", "a  b", 'say "no"\\n', "é\u2028", "\ud800", "😀\x7f")]
    for message in odd:
        key = text_key([message])
        # A field that is None takes the general way, and makes no difference.
        assert key == text_key([message | {"name": None}])
        assert json.loads(key)[0]["content"] == " ".join(message["content"].split())


def test_numbers_of_tokens_are_those_of_the_rows():
    rng = random.Random(0)
    rows = []
    for _ in range(2100):
        completions = [[2] * rng.randint(1, 9) for _ in range(rng.randint(1, 4))]
        rows.append({"prompt_ids": [1] * rng.randint(0, 9), "completion_ids": completions})
    dataset = Dataset.from_list(rows)
    for some in (dataset, dataset.shuffle(seed=1).select(range(0, 2100, 3)), dataset.select([])):
        counts = token_counts(some)
        assert (counts.prompt + counts.completions).tolist() == [
            len(row["prompt_ids"]) + sum(map(len, row["completion_ids"])) for row in some
        ]
        for layout in ("plain", "shared_prefix"):
            for multiple in (None, 8):
                collator = DataCollatorForComparisons(0, layout=layout, pad_to_multiple_of=multiple)
                assert collator.sizes(some).tolist() == list(map(collator.size, some))


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
    return folder / "hf_rlhf_ext"


def pairs(n=8, **columns):
    rows = []
    for k in range(n):
        row = {"prompt": [user(f"{k}?")], "chosen": [assistant(f"yes, {k}")], "rejected": [assistant("no " * (1 + k))]}
        rows.append(row | columns)
    return rows


def comparison(k):
    answers = [[assistant(f"yes, {k}")], [assistant(f"no, {k}")]]
    row = {"prompt": [user(f"{k}?")], "completions": answers, "pairs": [[0, 1]], "targets": [1.0]}
    return row | {"weights": [1.0], "margins": [0.0], "row": k}


def kept_folders(folder):
    return {path.name for path in folder.iterdir() if path.is_dir()} if folder.is_dir() else set()


def prepare(tokenizer, rows, **options):
    options = {"max_length": 60, "overflow": "truncate_completion", "unrenderable": "drop"} | options
    return prepare_comparisons(Dataset.from_list(rows), Tokenization(tokenizer, **options), source="train")


def test_a_second_start_reads_the_same_rows_and_report(chat_tokenizer_factory, cache_folder, monkeypatch):
    rows = pairs(10, category="news") + [{"prompt": [user("a")], "chosen": None, "rejected": [assistant("b")]}]
    rows[1]["category"] = None
    first = prepare(chat_tokenizer_factory(), rows, max_length=24)
    assert first.report.dropped and first.report.flagged["truncate_completion"]
    assert first.categories == ["news", None]
    monkeypatch.setattr(Tokenization, "write", None)  # it would fail
    again = prepare(chat_tokenizer_factory(), rows, max_length=24)
    assert again.rows.to_list() == first.rows.to_list()
    assert again.report == first.report
    assert (again.first_prompt, again.categories) == (first.first_prompt, first.categories)
    assert again.rows.cache_files[0]["filename"].startswith(str(cache_folder))


def test_whatever_the_tokens_depend_on_is_part_of_the_key(chat_tokenizer_factory, cache_folder, monkeypatch):
    tokenizer = chat_tokenizer_factory()
    rows = pairs()
    changes = [
        lambda: prepare(tokenizer, rows),
        lambda: prepare(tokenizer, rows[1:]),
        lambda: prepare(tokenizer, [rows[0] | {"chosen": [assistant("changed")]}, *rows[1:]]),
        lambda: prepare(tokenizer, rows, max_length=50),
        lambda: prepare(tokenizer, rows, overflow="drop"),
        lambda: prepare(tokenizer, rows, unrenderable="error"),
    ]
    for number, change in enumerate(changes):
        change()
        assert len(kept_folders(cache_folder)) == number + 1
        change()
        assert len(kept_folders(cache_folder)) == number + 1

    tokenizer(["a", "b b"], padding=True)  # leaves a padding in the tokenizer, which changes no ids
    prepare(tokenizer, rows)
    assert len(kept_folders(cache_folder)) == len(changes)
    tokenizer.chat_template += " "
    prepare(tokenizer, rows)
    tokenizer.add_tokens(["yes"])
    changed = prepare(tokenizer, rows)
    assert changed.rows[0]["completion_ids"][0][0] == tokenizer.convert_tokens_to_ids("yes")
    tokenizer.eos_token = "<|im_start|>"
    prepare(tokenizer, rows)
    monkeypatch.setattr(cache, "_code", lambda: "another version")
    prepare(tokenizer, rows)
    assert len(kept_folders(cache_folder)) == len(changes) + 4


def test_a_changed_file_is_read_again(cache_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_rlhf_ext.readers.sources._MANY_BYTES", 1)
    path = tmp_path / "rows.jsonl"
    for n in (5, 6):
        path.write_text("\n".join(map(json.dumps, pairs(n))))
        for _ in range(2):
            assert len(load_comparisons(path)[0]) == n
    assert len(kept_folders(cache_folder)) == 2


def test_of_several_processes_one_prepares_and_the_others_wait_and_read(cache_folder):
    built = []

    def build(file):
        built.append(len(built))
        time.sleep(0.3)
        file.write(cache.pa.table({"row": [1, 2, 3]}))
        return {"by": built[-1]}

    # Each lock has a file handle of its own, so that threads wait for each other as processes do.
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: cache.kept("key", build), range(3)))
    assert built == [0]
    assert [(len(part.rows), part.notes) for part in found] == [(3, {"by": 0})] * 3


def test_without_caching_nothing_is_left(chat_tokenizer, cache_folder):
    datasets.disable_caching()
    try:
        assert len(prepare(chat_tokenizer, pairs()).rows) == 8
    finally:
        datasets.enable_caching()
    assert not kept_folders(cache_folder)


def test_a_cache_that_cannot_be_written_is_said_in_one_line(chat_tokenizer, cache_folder, caplog, monkeypatch):
    cache_folder.parent.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert len(prepare(chat_tokenizer, pairs()).rows) == 8
    (record,) = [record for record in caplog.records if "cache cannot be written" in record.message]
    assert "HF_DATASETS_CACHE" in record.message and "\n" not in record.message


def test_a_disk_that_gets_full_loses_no_row(chat_tokenizer, cache_folder, monkeypatch):
    class FullDisk(cache.RowsFile):
        def write(self, table):
            super().write(table)
            if not isinstance(self._sink, cache.pa.BufferOutputStream):
                raise OSError(28, "No space left on device")

    expected = prepare(chat_tokenizer, pairs())
    monkeypatch.setattr(cache, "RowsFile", FullDisk)
    other = prepare(chat_tokenizer, pairs(), overflow="drop")
    assert other.rows.to_list() == expected.rows.to_list()
    assert other.report == expected.report
    assert len(kept_folders(cache_folder)) == 1  # nothing unfinished is left


@pytest.mark.parametrize(("frozen", "expected"), [(0, ["freeze", "unfreeze"]), (9, [])])
def test_the_garbage_collector_is_as_before_afterwards(monkeypatch, cache_folder, frozen, expected):
    calls = []
    collector = SimpleNamespace(get_freeze_count=lambda: frozen, get_threshold=gc.get_threshold)
    for name in ("freeze", "unfreeze"):
        setattr(collector, name, partial(calls.append, name))
    thresholds = []
    collector.set_threshold = lambda *numbers: thresholds.append(numbers)
    monkeypatch.setattr(cache, "gc", collector)

    def build(file):
        raise UserError("a row is refused")

    with pytest.raises(UserError):
        cache.kept("key", build)
    assert calls == expected
    assert thresholds[-1] == gc.get_threshold() != thresholds[0]


def test_a_refused_row_is_refused_again_and_leaves_nothing(chat_tokenizer, cache_folder):
    for _ in range(2):
        with pytest.raises(UserError, match=r"^train row 5: 31 tokens, .*max_length=30.*overflow='drop'"):
            prepare(chat_tokenizer, pairs(), max_length=30, overflow="error")
    assert not kept_folders(cache_folder)


def test_an_incomplete_folder_is_built_again(chat_tokenizer, cache_folder):
    expected = prepare(chat_tokenizer, pairs()).rows.to_list()
    (name,) = kept_folders(cache_folder)
    rows = cache_folder / name / "rows.arrow"
    rows.unlink()  # not cut, as it may be mapped into memory
    rows.write_bytes(b"")
    assert prepare(chat_tokenizer, pairs()).rows.to_list() == expected


def test_prompts_of_ppo_are_kept(chat_tokenizer, cache_folder, tmp_path, caplog):
    chat_tokenizer.chat_template = (Path(TEMPLATES[0].parent) / "gemma.jinja").read_text()
    rows = [{"prompt": [user(f"{k}?")], "answer": k} for k in range(5)]
    rows.insert(2, {"prompt": [user("a"), user("b")], "answer": 0})  # which this template refuses
    dataset = Dataset.from_list(rows)
    args = PPOConfig(str(tmp_path), use_cpu=True, bf16=False, max_completion_length=4, unrenderable="drop")
    first, again = (encode_prompts(dataset, chat_tokenizer, args, "train_dataset", 100) for _ in range(2))
    assert first["row"] == again["row"] == [0, 1, 3, 4, 5]
    assert first["prompt_ids"] == [encode_generation_prompt(chat_tokenizer, rows[k]["prompt"]) for k in first["row"]]
    assert again.to_list() == first.to_list()
    assert len(kept_folders(cache_folder)) == 1
    said = [record.message for record in caplog.records if "5 of 6 rows kept" in record.message]
    assert len(said) == 2  # by the second start too


# --- rows that pass one batch after another --------------------------------------------------------------------------


def test_rows_are_written_as_a_dataset_in_memory_has_them():
    rows = []
    for k in range(2500):
        answers = [[assistant(f"yes, {k}")], [assistant("no")]]
        row = {"prompt": [user(f"{k % 1900}?")], "completions": answers, "pairs": [[0, 1]], "targets": [1.0]}
        row |= {"row": k, "flags": [], "source": "mine"}
        if k == 2300:  # an other shape, long after the first batch
            row |= {"prompt": [user("x") | {"name": "02139"}], "extra": {"a": 1}, "tools": [TOOL]}
        rows.append(row)
    reports = [LoadReport(), LoadReport()]
    sink = cache.pa.BufferOutputStream()
    file = cache.RowsFile(sink)
    write_rows(Grouped(rows, reports[0]), file)
    file.close()
    written = Dataset.from_buffer(sink.getvalue())
    expected = as_dataset(group_by_prompt(rows, reports[1]))
    assert written.features == expected.features
    assert written.to_list() == expected.to_list()
    assert reports[0] == reports[1]
    assert len(written) == 1901


def test_a_spool_keeps_its_entries_where_there_is_no_room_on_disk(monkeypatch):
    def full_disk():
        raise OSError(28, "No space left on device")

    entries = [{"text": str(k)} for k in range(1234)]
    assert list(cache.Spool(iter(entries))) == entries
    monkeypatch.setattr(cache, "TemporaryFile", full_disk)
    spool = cache.Spool(iter(entries))
    assert list(spool) == list(spool) == entries
