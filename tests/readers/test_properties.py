"""Properties of the readers, on rows that are built from the library's own tables of names and verdicts."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hf_rlhf_ext import load_comparisons, load_demonstrations
from hf_rlhf_ext.data.schema import PreferenceDataError
from hf_rlhf_ext.readers import columns as meanings
from hf_rlhf_ext.readers import guessing, verdicts
from hf_rlhf_ext.readers.columns import MEANINGFUL, UnreadColumn, meaning_of
from hf_rlhf_ext.readers.demonstrations import COMPLETION_COLUMNS, MESSAGES_COLUMNS, PROMPT_COLUMNS
from hf_rlhf_ext.readers.formats import UnknownFormat

Row = dict[str, Any]
QUESTION, FIRST, SECOND = "Is the sky red or blue?", "The sky is red.", "It is of a blue color."
ROWS = ("first", "second", "first", "tie", "second")
TARGETS = {"first": 1.0, "second": 0.0, "tie": 0.5}

fast = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Shape:
    """How a preference row is written.

    Attributes:
        columns: The roles of its columns, as a user would give them.
        cells: Who wins -> the cells of the answers and of the verdict. No "tie" if the shape cannot say it.
    """

    columns: Row
    cells: dict[str, Row]

    def rows(self, order: Any = None) -> list[Row]:
        """Rows with different prompts, won by those of `ROWS`. `order` permutes the columns."""
        rows = []
        for number, who in enumerate(self.winners()):
            row = {self.columns["prompt"]: f"{QUESTION} {number}"} | self.cells[who]
            names = list(row) if order is None else [list(row)[place] for place in order if place < len(row)]
            rows.append({name: row[name] for name in names})
        return rows

    def winners(self) -> list[str]:
        return [who for who in ROWS if who in self.cells]

    def swapped(self) -> "Shape":
        """The same judgments on the answers in the other order."""
        first, second = self.columns["answers"]
        other = {"first": "second", "second": "first", "tie": "tie"}
        cells = {}
        for who in self.cells:
            # The verdict names the other place, so that the same answer wins.
            written = self.cells[other[who]]
            cells[who] = written | {first: written[second], second: written[first]}
        return Shape(self.columns, cells)


@st.composite
def sides(draw) -> Shape:
    """A better and a worse answer, under any pair of names."""
    better, worse = draw(st.sampled_from(guessing.BETTER_AND_WORSE))
    names = [(better, worse), *guessing._with_answer_words(better, worse)]
    chosen, rejected = draw(st.sampled_from(names))
    cells = {"first": {chosen: FIRST, rejected: SECOND}}
    return Shape({"prompt": draw(prompts([chosen, rejected])), "chosen": chosen, "rejected": rejected}, cells)


@st.composite
def prompts(draw, taken: list[str]) -> str:
    name = draw(st.sampled_from(guessing.PROMPT))
    assume(name not in taken)
    return name


def answer_columns(stem: str) -> dict[str, tuple[str, str]]:
    return {
        "letters": (f"{stem}_a", f"{stem}_b"),
        "capitals": (f"{stem}_A", f"{stem}_B"),
        "from one": (f"{stem}_1", f"{stem}_2"),
        "without a mark": (f"{stem}1", f"{stem}2"),
        "from zero": (f"{stem}_0", f"{stem}_1"),
        "ordinals": (f"first_{stem}", f"second_{stem}"),
    }


LETTERS = [
    ("a", "b"),
    ("A", "B"),
    ("model_a", "model_b"),
    ("[[A]]", "[[B]]"),
    ("A>B", "B>>A"),
    ("Answer A", "Answer B"),
]
NUMBERS = {
    "from one": [(1, 2), ("1", "2"), ("response_1", "response_2"), ("1>2", "2>1")],
    "without a mark": [(1, 2), ("model_1", "model_2")],
    "from zero": [(0, 1), ("0", "1"), ("output_0", "output_1")],
    "letters": [(1, 2), ("first", "second"), ("left", "right")],
    "capitals": [(1, 2)],
    "ordinals": [("first", "second"), ("First", "Second"), ("A", "B")],
}
MEANING_OF = {"from zero": "0 or 1", "ordinals": "first or second"}


@st.composite
def judged(draw) -> Shape:
    """Two answers in columns of their own and a verdict in any coding that needs no explanation."""
    stem = draw(st.sampled_from(guessing.ANSWER))
    kind = draw(st.sampled_from(list(answer_columns(stem))))
    answers = answer_columns(stem)[kind]
    verdict = draw(st.sampled_from(guessing.VERDICT))
    code = draw(st.sampled_from(["words", "signed", "a column for a side"]))
    if code == "signed":
        verdict = draw(st.sampled_from(sorted(verdicts.SIGNED)))
        values: list[Any] = [draw(st.sampled_from([-3, -1, -0.5])), draw(st.sampled_from([1, 2.5])), 0]
        meaning = verdicts.BELOW_ZERO
    elif code == "words":
        pairs = NUMBERS[kind] + ([] if kind in ("from one", "without a mark", "from zero") else LETTERS)
        values = [*draw(st.sampled_from(pairs)), draw(st.sampled_from(sorted(verdicts._TIES)))]
        meaning = dict(zip(values, TARGETS, strict=True))
    else:
        side = answers[0].removeprefix(f"{stem}_").removeprefix(stem).removesuffix(f"_{stem}").lower()
        verdict, values = draw(
            st.sampled_from(
                [(f"prob_{side}", [0.9, 0.2, 0.5]), (f"{side}_is_better", [1, 0]), (f"winner_{side}", [1, 0])]
            )
        )
        meaning = "between 1 and 0"
    # Under this name, 1 and 2 are not told from strengths, and are refused.
    assume(verdict not in answers and not (verdict in verdicts.SIGNED and code == "words"))
    cells = {}
    for who, value in zip(TARGETS, values, strict=False):
        cells[who] = {answers[0]: FIRST, answers[1]: SECOND, verdict: value}
    columns = {
        "prompt": draw(prompts([*answers, verdict])),
        "answers": list(answers),
        "verdict": verdict,
        "verdict_is": meaning,
    }
    return Shape(columns, cells)


@st.composite
def rated(draw) -> Shape:
    """Two answers with a rating or a rank each."""
    stem = draw(st.sampled_from(guessing.ANSWER))
    kind = draw(st.sampled_from(list(answer_columns(stem))))
    answers = answer_columns(stem)[kind]
    role = draw(st.sampled_from(["ratings", "ranks"]))
    word = draw(st.sampled_from(guessing.RATING if role == "ratings" else guessing.RANK))
    scores = answer_columns(word)[kind]
    high, low = draw(st.sampled_from([(5, 2), (0.5, -3.25), (1, 0)]))
    best, worst = (high, low) if role == "ratings" else (low, high)
    written = {"first": (best, worst), "second": (worst, best), "tie": (best, best)}
    cells = {who: dict(zip((*answers, *scores), (FIRST, SECOND, *pair), strict=True)) for who, pair in written.items()}
    columns = {"prompt": draw(prompts([*answers, *scores])), "answers": list(answers), role: list(scores)}
    return Shape(columns, cells)


def texts(value: Any) -> str:
    return value if isinstance(value, str) else value[-1]["content"]


def winner_of(target: float) -> str:
    """Who wins; the probability of a first or second answer may be any."""
    if target == 0.5:
        return "tie"
    return "first" if target > 0.5 else "second"


def read(rows: list[Row], **options: Any) -> list[tuple[str, list[str], str]]:
    """(prompt, completions, who wins) of every row. No row is dropped, and no column is left unread."""
    # As a list, since a column of a `Dataset` has one type only.
    dataset, report = load_comparisons(rows, group=False, **options)
    assert (report.rows_in, report.kept, report.unread) == (len(rows), len(rows), {})
    results = []
    for row in dataset:
        results.append((texts(row["prompt"]), list(map(texts, row["completions"])), winner_of(row["targets"][0])))
    return results


# --- comparisons ------------------------------------------------------------------------------------------------------


@fast
@given(shape=st.one_of(sides(), judged(), rated()), order=st.permutations(range(6)))
def test_any_names_in_any_order_read_to_the_same_comparison_as_with_columns(shape, order):
    rows = shape.rows(order)
    expected = [(f"{QUESTION} {number}", [FIRST, SECOND], who) for number, who in enumerate(shape.winners())]

    assert read(rows) == expected
    assert read(rows, columns=shape.columns) == expected


@fast
@given(shape=st.one_of(judged(), rated()))
def test_swapped_answers_with_a_swapped_verdict_have_the_same_winner(shape):
    swapped = {"first": "second", "second": "first", "tie": "tie"}

    straight = read(shape.rows())
    other_way = read(shape.swapped().rows())

    assert other_way == [(prompt, texts[::-1], swapped[who]) for prompt, texts, who in straight]


@pytest.mark.parametrize("names", [("winner_a", "winner_b"), ("is_a_better", "is_b_better"), ("prob_a", "prob_b")])
@pytest.mark.parametrize("kind", [int, float, str])
def test_two_answers_that_both_won_or_both_lost_are_tied(names, kind):
    cells = [(1, 0), (0, 1), (0, 0), (1, 1)]
    rows = []
    for values in cells:
        row = {"question": QUESTION, "answer_a": FIRST, "answer_b": SECOND}
        rows.append(row | dict(zip(names, map(kind, values), strict=True)))

    assert [who for _, _, who in read(rows)] == ["first", "second", "tie", "tie"]


@pytest.mark.parametrize("name", sorted(verdicts.SIGNED))
def test_a_strength_without_a_value_below_zero_is_not_told_from_the_number_of_an_answer(name):
    rows = [{"question": QUESTION, "response_1": FIRST, "response_2": SECOND, name: value} for value in (1, 2)]

    with pytest.raises(UnknownFormat, match="verdict_is"):
        load_comparisons(rows)
    assert [who for _, _, who in read(rows, columns={"verdict": name, "verdict_is": "1 or 2"})] == ["first", "second"]


@pytest.mark.parametrize("names", [("better", "worse"), ("answer_a", "answer_b"), ("chosen", "rejected")])
@pytest.mark.parametrize("column", ["user_text", "aufgabe", "what_was_wanted"])
def test_a_question_under_an_unknown_name_is_not_replaced_by_the_common_words_of_the_answers(names, column):
    sides = dict(zip(names, ("The sky is blue.", "The sky is red."), strict=True))
    rows = [{column: f"{QUESTION} {number}", **sides, "winner": "a"} for number in range(2)]
    if names[0] != "answer_a":
        rows = [{name: row[name] for name in (column, *names)} for row in rows]

    with pytest.raises(UnreadColumn, match=column):
        load_comparisons(rows)
    assert [prompt for prompt, _, _ in read(rows, columns={"prompt": column})] == [row[column] for row in rows]
    dataset, report = load_comparisons(rows, ignore=[column])
    assert texts(dataset[0]["prompt"]) == "The sky is" and column in report.unread


# --- every column and every row is accounted for ----------------------------------------------------------------------

# Beside a comparison, thoughts are those of the judge.
MATTERING = MEANINGFUL - {meanings.THINKING}
WORDS = sorted(name for name, meaning in meanings._MEANING_OF_NAME.items() if meaning in MATTERING)
VALUES = [
    "Be rude and short.",
    3,
    0.5,
    True,
    "A",
    [{"role": "user", "content": "Why so?"}],
    {"bytes": b"x", "path": "y"},
]


@fast
@given(
    name=st.sampled_from(WORDS),
    before=st.sampled_from(["", "my_", "expert_", "gold_"]),
    value=st.sampled_from(VALUES),
    late=st.booleans(),
)
def test_a_column_that_matters_is_read_or_refused_but_never_left_out_in_silence(name, before, value, late):
    column = before + name
    row = {"prompt": QUESTION, "chosen": FIRST, "rejected": SECOND}
    assume(column not in row and meaning_of(column, [value]) in MATTERING)
    rows = [row | {"prompt": f"{QUESTION} {number}", column: None} for number in range(120 if late else 0)]
    rows.append(row | {column: value})
    without, _ = load_comparisons([row])

    try:
        dataset, report = load_comparisons(rows)
    except PreferenceDataError as error:
        message = str(error)
        # With `conversations`, it is the column `prompt` that is not read.
        assert (column in message or "column prompt" in message) and "\n" not in message
    else:
        # It was read, and says something on the row: in the prompt, the judgment or a column.
        assert column not in report.unread
        assert dataset[len(dataset) - 1] != without[0] or report.dropped or tie_or_status(column, value)


def tie_or_status(column: str, value: Any) -> bool:
    """True for a column that only says that the row is no tie."""
    return column in (*guessing.TIE, "status", *guessing.TURN) or value is False


CELLS = st.sampled_from(
    [None, "", "a", FIRST, 0, 1, 2, -1, 0.5, True, [], ["a", "b"], {}, {"role": "user", "content": "q"}]
)


@fast
@given(
    rows=st.lists(
        st.fixed_dictionaries({name: CELLS for name in ("question", "answer_a", "answer_b", "winner")}), min_size=1
    )
)
def test_rows_in_are_kept_or_dropped(rows):
    good = {"question": QUESTION, "answer_a": FIRST, "answer_b": SECOND, "winner": "a"}
    columns = {"prompt": "question", "answers": ["answer_a", "answer_b"], "verdict": "winner", "verdict_is": "A or B"}
    rows = [good, *rows]

    _, report = load_comparisons(rows, columns=columns)

    dropped = [number for numbers in report.dropped.values() for number in numbers]
    assert report.rows_in == len(rows) == report.kept + len(dropped)
    assert len(set(dropped)) == len(dropped)


# --- demonstrations and tools -----------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text('aé0 "', max_size=6) | st.just("02139"),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text("ab", min_size=1, max_size=3), inner, max_size=2)
    ),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.text("abc", min_size=1, max_size=4), JSON, max_size=3)


def tool_rows(arguments: list[Row], as_text: bool) -> list[Row]:
    """Conversations with a call of a function, and the function's schema."""
    rows = []
    for number, given_arguments in enumerate(arguments):
        schema = {"type": "function", "function": {"name": "look_up", "parameters": {"default": given_arguments}}}
        call = {"type": "function", "function": {"name": "look_up", "arguments": given_arguments}}
        rows.append(
            {
                "question": f"{QUESTION} {number}",
                "tools": json.dumps([schema]) if as_text else [schema],
                "good": [{"role": "assistant", "content": "", "tool_calls": [call]}],
                "bad": [{"role": "assistant", "content": "I do not know."}],
            }
        )
    return rows


@fast
@given(arguments=st.lists(ARGUMENTS, min_size=1, max_size=3), as_text=st.booleans(), from_file=st.booleans())
def test_tools_and_calls_are_the_same_json_as_in_the_source(tmp_path_factory, arguments, as_text, from_file):
    rows = tool_rows(arguments, as_text)
    source: Any = rows
    if from_file:
        source = tmp_path_factory.mktemp("tools") / "rows.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    comparisons, _ = load_comparisons(source, columns={"chosen": "good", "rejected": "bad"}, group=False)
    demonstrations, _ = load_demonstrations(
        source, columns={"prompt": "question", "completion": "good"}, ignore=["bad"]
    )

    for row, comparison, demonstration in zip(rows, comparisons, demonstrations, strict=True):
        schema = row["tools"] if as_text else json.dumps(row["tools"], ensure_ascii=False)
        assert comparison["tools"] == demonstration["tools"] == schema
        for answer in (comparison["completions"][0], demonstration["completion"]):
            (call,) = answer[-1]["tool_calls"]
            written = call["function"]["arguments"]
            expected = row["good"][0]["tool_calls"][0]["function"]["arguments"]
            assert json.dumps(written) == json.dumps(expected)


@fast
@given(
    question=st.sampled_from(PROMPT_COLUMNS),
    answer=st.sampled_from(COMPLETION_COLUMNS),
    conversation=st.none() | st.sampled_from(MESSAGES_COLUMNS),
    turned=st.booleans(),
)
def test_demonstrations_by_name_are_those_by_columns(question, answer, conversation, turned):
    if conversation is None:
        columns = {"prompt": question, "completion": answer}
        row = {question: QUESTION, answer: FIRST}
    else:
        columns = {"messages": conversation}
        row = {conversation: [{"from": "Human", "value": QUESTION}, {"from": "GPT", "value": FIRST}]}
    if turned:
        row = dict(reversed(row.items()))

    by_name, report = load_demonstrations([row])
    by_columns, _ = load_demonstrations([row], columns=columns)

    assert report.unread == {}
    assert (texts(by_name[0]["prompt"]), texts(by_name[0]["completion"])) == (QUESTION, FIRST)
    assert by_name.to_list() == by_columns.to_list()
