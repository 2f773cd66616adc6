"""Preference rows by the roles of their columns: prompt x answers x verdict, under any names and in any coding."""

import json
from dataclasses import dataclass

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_rlhf_ext import load_comparisons, load_demonstrations, register_format
from hf_rlhf_ext.data.schema import PreferenceDataError
from hf_rlhf_ext.readers import registry
from hf_rlhf_ext.readers.columns import UnreadColumn
from hf_rlhf_ext.readers.formats import UnknownFormat, register_formats, with_prompts
from hf_rlhf_ext.readers.guessing import PROMPT
from hf_rlhf_ext.readers.roles import ROLES, Roles, cell


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


QUESTION, FIRST, SECOND = "Which is it, red or blue?", "It is red.", "It is blue."
ASK = {"question": QUESTION}
SIDES = {"response_a": FIRST, "response_b": SECOND}


def load(*rows, **options):
    return load_comparisons(Dataset.from_list(list(rows)), **options)


def judged(row):
    """(prompt, first completion, second one, target), as text."""
    prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in row["completions"]]
    return prompt, *texts, row["targets"][0]


# --- any row built from roles, aliases and decoders reads to the same comparison --------------------------------------


@dataclass
class Coding:
    """How the answers are named and the verdict is written: `columns` of the answers, and (who wins) -> cells."""

    answers: tuple[str, str]
    cells: dict[str, dict]


def suffixed(stem):
    return {
        "ab": (f"{stem}_a", f"{stem}_b"),
        "AB": (f"{stem}_A", f"{stem}_B"),
        "12": (f"{stem}_1", f"{stem}_2"),
        "1,2": (f"{stem}1", f"{stem}2"),
        "01": (f"{stem}_0", f"{stem}_1"),
        "first": (f"first_{stem}", f"second_{stem}"),
    }


STEMS = ("response", "answer", "output", "completion", "reply", "summary", "generation", "candidate")
WINNERS = ("winner", "preference", "preferred", "choice", "better", "label", "verdict", "human_preference")
LETTERS = [("a", "b", "tie"), ("A", "B", "Tie"), ("model_a", "model_b", "tie (bothbad)"), ("A>B", "B>A", "A=B")]


@st.composite
def codings(draw):
    stem = draw(st.sampled_from(STEMS))
    kind = draw(st.sampled_from(["ab", "AB", "12", "1,2", "01", "first"]))
    answers = suffixed(stem)[kind]
    winner = draw(st.sampled_from(WINNERS))
    coded = [dict(zip(("first", "second", "tie"), draw(st.sampled_from(LETTERS)), strict=True))]
    if kind in ("12", "1,2"):
        coded.append({"first": 1, "second": 2, "tie": "tie"})
        coded.append({"first": f"{stem}_1", "second": f"{stem}_2", "tie": "both"})
    if kind == "01":
        coded.append({"first": 0, "second": 1, "tie": "tie"})
    if kind == "first":
        coded.append({"first": "first", "second": "second", "tie": "equal"})
    ratings = [{f"score_{end}": value for end, value in zip("ab", pair, strict=True)} for pair in ((5, 1), (1, 5))]
    by_winner = {who: {winner: value} for who, value in draw(st.sampled_from(coded)).items()}
    if kind == "ab" and draw(st.booleans()):
        by_winner = {"first": ratings[0], "second": ratings[1], "tie": {"score_a": 3, "score_b": 3}}
    return Coding(answers, by_winner)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    prompt=st.sampled_from([name for name in PROMPT if name not in ("input", "inputs", "history", "context", "text")]),
    coding=codings(),
    order=st.permutations(["first", "second", "tie", "first", "second"]),
    system=st.sampled_from(["", "system", "system_prompt"]),
    as_file=st.booleans(),
    data=st.data(),
)
def test_any_names_and_codings_read_to_the_same_comparison(
    tmp_path_factory, prompt, coding, order, system, as_file, data
):
    rows = []
    for number, who in enumerate(order):
        row = {prompt: f"{QUESTION} {number}", coding.answers[0]: FIRST, coding.answers[1]: SECOND}
        row |= coding.cells[who]
        if system:
            row[system] = "Answer in one word."
        names = data.draw(st.permutations(list(row))) if number == 0 else list(rows[0])
        rows.append({name: row[name] for name in names})
    kinds = {type(value) for cells in coding.cells.values() for value in cells.values()}
    if not as_file and len(kinds) == 1:  # a column of a dataset has one type
        source = Dataset.from_list(rows)
    else:
        source = tmp_path_factory.mktemp("roles") / "rows.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))

    dataset, report = load_comparisons(source)

    expected = {"first": 1.0, "second": 0.0, "tie": 0.5}
    assert [judged(row) for row in dataset] == [
        (f"{QUESTION} {number}", FIRST, SECOND, expected[who]) for number, who in enumerate(order)
    ]
    assert report.kept == report.rows_in == 5 and report.unread == {}
    assert all((row["prompt"][0]["role"] == "system") == bool(system) for row in dataset)


@pytest.mark.parametrize(
    "better, worse",
    [
        ("chosen", "rejected"),
        ("chosen_response", "rejected_response"),
        ("accepted", "rejected"),
        ("preferred_output", "non_preferred_output"),
        ("positive", "negative"),
        ("good", "bad"),
        ("better_answer", "worse_answer"),
        ("winner", "loser"),
        ("answer_chosen", "answer_rejected"),
        ("chosenResponse", "rejectedResponse"),
        ("y_w", "y_l"),
    ],
)
@pytest.mark.parametrize("form", ["text", "message", "messages", "turns", "conversation", "JSON"])
def test_the_better_and_the_worse_answer_under_any_names(better, worse, form):
    def written(text):
        return {
            "text": text,
            "message": assistant(text),
            "messages": [assistant(text)],
            "turns": [{"from": "gpt", "value": text}],
            "conversation": [user(QUESTION), assistant(text)],
            "JSON": json.dumps([assistant(text)]),
        }[form]

    dataset, _ = load(ASK | {better: written(FIRST), worse: written(SECOND)})
    assert judged(dataset[0]) == (QUESTION, FIRST, SECOND, 1.0)


@pytest.mark.parametrize(
    "names",
    [
        ("score_chosen", "score_rejected"),
        ("chosen_score", "rejected_score"),
        ("chosen-rating", "rejected-rating"),
        ("rating_chosen", "rating_rejected"),
        ("chosen_avg_rating", "rejected_avg_rating"),
        ("chosenReward", "rejectedReward"),
    ],
)
@pytest.mark.parametrize(
    "scores, margin, target, flags",
    [((5, 2), 3.0, 1.0, []), ((4, 4), 0.0, 0.5, []), ((1, 3), 0.0, 1.0, ["scores_contradict_label"])],
)
def test_scores_give_the_margin_unless_they_contradict(names, scores, margin, target, flags):
    row = {"prompt": "p", "chosen": "a", "rejected": "b"} | dict(zip(names, scores, strict=True))
    dataset, report = load(row)
    found = dataset[0]
    assert (found["margins"], found["targets"], found["flags"]) == ([margin], [target], flags)
    assert report.unread == {}


def test_ratings_in_lists_and_among_candidates():
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert load(row | {"scores": [5.0, 2.0]})[0][0]["margins"] == [3.0]
    candidates = {"all_generated_responses": ["c", "b", "a"], "all_rm_scores": [9.0, 1.0, 1.5]}
    assert load(row | candidates)[0][0]["margins"] == [0.5]
    several = {"responses": ["x", "y", "z"], "scores": [1.0, 3.0, 1.0]}
    found = load(ASK | several)[0][0]
    assert (found["targets"], found["margins"]) == ([0.0, 0.5, 1.0], [-2.0, 0.0, 2.0])


def test_right_and_wrong_answers_are_compared_to_each_other_only():
    found = load(ASK | {"responses": ["x", "y", "z"], "scores": [False, True, False]})[0][0]
    assert (found["pairs"], found["targets"]) == ([[0, 1], [1, 2]], [0.0, 1.0])
    found = load({"prompt": "p", "chosen": ["a", "b"], "rejected": ["c"]})[0][0]
    assert (found["completions"], found["pairs"]) == (["a", "b", "c"], [[0, 2], [1, 2]])


def test_votes_of_several_annotators():
    labels = {"annotator_1": 1, "annotator_2": 2, "annotator_3": 2}
    found = load(ASK | {"response_1": FIRST, "response_2": SECOND} | labels)[0][0]
    assert found["targets"] == [pytest.approx(1 / 3)]
    assert [(vote["annotator"], vote["label"]) for vote in found["votes"]] == [
        ("annotator_1", 1.0),
        ("annotator_2", 0.0),
        ("annotator_3", 0.0),
    ]
    individual = [{"score": -1, "reasoning": "r"}, {"score": 3, "reasoning": "r"}]
    row = {"response1": FIRST, "response2": SECOND, "overall_preference": 1, "individual_preference": individual}
    found = load(ASK | row)[0][0]
    assert found["targets"] == [0.0] and [vote["label"] for vote in found["votes"]] == [1.0, 0.0]


def test_one_answer_a_row_is_compared_with_the_others_of_its_prompt():
    rows = [{"instruction": QUESTION, "output": text, "rating": rating} for text, rating in ((FIRST, 1), (SECOND, 4))]
    dataset, report = load(*rows, {"instruction": "other", "output": "x", "rating": 3})
    assert judged(dataset[0]) == (QUESTION, FIRST, SECOND, 0.0) and dataset[0]["margins"] == [-3.0]
    assert report.dropped == {"unpaired: the prompt has only one answer": [2]}
    rows = [
        {"question": QUESTION, "answer": text, "feedback": word}
        for text, word in ((FIRST, "like"), (SECOND, "dislike"))
    ]
    assert load(*rows)[0][0]["pairs"] == [[0, 1]]


def test_a_judged_turn_ends_the_conversation():
    talk = [user("q"), assistant("one"), user("more"), assistant("two")]
    other = [user("q"), assistant("uno"), user("more"), assistant("dos")]
    row = {"conversation_a": talk, "conversation_b": other, "winner": "model_b"}
    dataset, _ = load(row | {"turn": 1}, row | {"turn": 2}, group=False)
    assert dataset[0]["completions"] == [[assistant("one")], [assistant("uno")]]
    assert dataset[1]["completions"] == [talk[1:], other[1:]]


# --- what looks like one thing and is another -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cells, targets, margins",
    [
        ([{"a_wins": 3, "b_wins": 1}], [1.0], [2.0]),
        ([{"a_wins": 1, "b_wins": 0}, {"a_wins": 0, "b_wins": 2}], [1.0, 0.0], [1.0, -2.0]),
        ([{"a_wins": 1, "b_wins": 0}, {"a_wins": 0, "b_wins": 0}], [1.0, 0.5], [0.0, 0.0]),
    ],
)
def test_numbers_of_wins_are_ratings_unless_each_is_0_or_1(cells, targets, margins):
    rows = [{"question": f"{QUESTION} {number}"} | SIDES | wins for number, wins in enumerate(cells)]
    dataset, _ = load(*rows)
    assert [row["targets"][0] for row in dataset] == targets
    assert [row["margins"][0] for row in dataset] == margins


def test_a_late_number_of_wins_costs_its_row():
    rows = [{"question": str(number)} | SIDES | {"a_wins": 1, "b_wins": 0} for number in range(110)]
    _, report = load(*rows, {"question": "late"} | SIDES | {"a_wins": 1, "b_wins": 3})
    assert report.dropped == {"b_wins is neither yes nor no": [110]}


def test_where_an_answer_was_shown_is_no_rank():
    records = [{"text": FIRST, "position": 1, "score": 1}, {"text": SECOND, "position": 2, "score": 9}]
    assert load(ASK | {"responses": records})[0]["targets"][:] == [[0.0]]
    dataset, _ = load(ASK | SIDES | {"winner": "b", "position_a": 1, "position_b": 2})
    assert dataset["flags"][:] == [[]]


@pytest.mark.parametrize("ranks, is_read", [((2, 1), True), ((1, 2), False)])
def test_ranks_and_scores_that_contradict_are_not_guessed(ranks, is_read):
    records = [{"text": FIRST, "rank": ranks[0], "score": 1}, {"text": SECOND, "rank": ranks[1], "score": 9}]
    if is_read:
        assert load(ASK | {"responses": records})[0]["targets"][:] == [[0.0]]
    else:
        with pytest.raises(UnknownFormat):
            load(ASK | {"responses": records})


@pytest.mark.parametrize(
    "names",
    [
        {"winner": "model_b", "loser": "model_a"},
        {"better": "B", "worse": "A"},
        {"chosen": "response_b", "rejected": "response_a"},
    ],
)
@pytest.mark.parametrize("n_rows", [1, 5])
def test_names_of_the_winner_are_no_answers(names, n_rows):
    dataset, report = load(*({"question": f"{QUESTION} {number}"} | SIDES | names for number in range(n_rows)))
    assert {judged(row)[1:] for row in dataset} == {(FIRST, SECOND, 0.0)}
    assert (report.kept, report.unread) == (n_rows, {})


def test_names_of_models_are_no_answers_and_copies_of_answers_are():
    models = {"model_a": "gpt-4", "model_b": "llama", "winner": "gpt-4", "loser": "llama"}
    with pytest.raises(UnknownFormat, match='"verdict": "winner"'):
        load(ASK | SIDES | models)
    dataset, _ = load(ASK | SIDES | {"chosen": SECOND, "rejected": FIRST})
    assert judged(dataset[0]) == (QUESTION, SECOND, FIRST, 1.0)


@pytest.mark.parametrize(
    "winner, difference, margin, flags",
    [
        ("B", -3.0, -3.0, []),
        ("B", 3.0, -3.0, []),
        ("A", 3.0, 3.0, []),
        ("A", -3.0, 0.0, ["scores_contradict_label"]),
    ],
)
def test_the_margin_has_the_sign_of_the_verdict(winner, difference, margin, flags):
    found = load(ASK | SIDES | {"winner": winner, "score_diff": difference})[0][0]
    assert (found["margins"], found["flags"]) == ([margin], flags)


def test_a_margin_below_zero_contradicts_chosen_and_rejected():
    found = load({"prompt": "p", "chosen": "a", "rejected": "b", "margin": -2.0})[0][0]
    assert (found["margins"], found["flags"]) == ([0.0], ["scores_contradict_label"])


@pytest.mark.parametrize("other, flags", [("B", ["votes_contradict_label"]), ("A", []), ("tie", [])])
def test_a_verdict_against_all_votes_is_flagged(other, flags):
    found = load(ASK | SIDES | {"winner": "A", "annotator_1": "B", "annotator_2": other})[0][0]
    assert (found["targets"], found["flags"]) == ([1.0], flags)


@pytest.mark.parametrize(
    "votes",
    [
        {"votes": ["A", "B", "A"]},
        {"votes": json.dumps(["A", "B", "A"])},
        {"annotations": [{"annotator": str(place), "preference": vote} for place, vote in enumerate("ABA")]},
    ],
)
def test_lists_of_votes(votes):
    found = load(ASK | SIDES | votes)[0][0]
    assert found["targets"] == [pytest.approx(2 / 3)] and [vote["label"] for vote in found["votes"]] == [1.0, 0.0, 1.0]


def test_a_tie_needs_no_winner():
    rows = [ASK | SIDES | {"winner": "", "tie": True}, {"question": "q"} | SIDES | {"winner": "A", "tie": False}]
    dataset, report = load(*rows)
    assert (dataset["targets"][:], report.dropped) == ([[0.5], [1.0]], {})


def test_a_word_that_names_no_answer_costs_its_row():
    dataset, report = load(*({"question": str(place)} | SIDES | {"winner": who} for place, who in enumerate(WORDS)))
    assert dataset["targets"][:] == [[1.0], [0.0], [0.5]]
    assert report.dropped == {"winner is not A or B": [3]}


WORDS = ("Response A is better", "Response B is better", "equally bad", "skip")


@pytest.mark.parametrize(
    "good, bad",
    [("yes", "no"), ("accept", "reject"), ("👍", "👎"), ("thumbs_up", "thumbs down"), ("Good", "Bad"), (True, False)],
)
@pytest.mark.parametrize("name", ["label", "is_correct", "isSafe", "feedback"])
def test_labels_of_one_answer_in_all_words(name, good, bad):
    rows = [{"prompt": QUESTION, "response": text, name: value} for text, value in ((FIRST, bad), (SECOND, good))]
    dataset, _ = load(*rows)
    assert [judged(row) for row in dataset] == [(QUESTION, SECOND, FIRST, 1.0)] or dataset["pairs"][:] == [[[1, 0]]]


@pytest.mark.parametrize("name", ["unsafe", "is_toxic", "harmful"])
def test_a_label_that_says_what_is_bad(name):
    rows = [{"prompt": QUESTION, "response": text, name: text == FIRST} for text in (FIRST, SECOND)]
    found = load(*rows)[0][0]
    first, second = found["pairs"][0]
    assert (texts_of(found)[first], texts_of(found)[second], found["targets"]) == (SECOND, FIRST, [1.0])


def texts_of(row):
    return [text if isinstance(text, str) else text[-1]["content"] for text in row["completions"]]


def test_one_answer_a_row_with_a_rank():
    rows = [{"prompt": QUESTION, "response": text, "rank": rank} for text, rank in ((FIRST, 2), (SECOND, 1))]
    assert judged(load(*rows)[0][0]) == (QUESTION, FIRST, SECOND, 0.0)


def test_a_scale_is_no_yes_or_no():
    rows = [{"prompt": QUESTION, "completion": f"answer {label}", "label": label} for label in range(5)]
    with pytest.raises(PreferenceDataError, match="neither yes nor no"):
        load(*rows)


def test_lists_as_python_writes_them_and_lists_with_gaps(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(f"""question,responses,scores\n"{QUESTION}","['{FIRST}', '{SECOND}']","[1, 2]"\n""")
    assert judged(load_comparisons(path)[0][0]) == (QUESTION, FIRST, SECOND, 0.0)
    dataset, _ = load(ASK | {"responses": [FIRST, SECOND, None], "scores": [1, 2, 3]})
    assert judged(dataset[0]) == (QUESTION, FIRST, SECOND, 0.0)


# --- what is unclear is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, suggestion",
    [
        (ASK | SIDES | {"label": 0}, '"verdict": "label", "verdict_is": "… or …"'),
        (ASK | SIDES | {"label": 4}, '"verdict": "label", "verdict_is": "… or …"'),
        (ASK | SIDES | {"label": -2}, '"verdict": "label", "verdict_is": "… zero for the first"'),
        (ASK | SIDES | {"overall_preference": 2}, '"verdict_is": "… or …"'),
        (ASK | {"responses": [FIRST, SECOND, "x"], "ranking": [1, 2, 0]}, '"answers": ["responses"], "ranks": "…"'),
        (ASK | SIDES | {"winner": "gpt-4"}, '"verdict": "winner"'),
        (ASK | SIDES, '"answers": ["response_a", "response_b"], "verdict": "…"'),
        ({"x": 1, "y": "text"}, '"chosen": "…", "rejected": "…"'),
    ],
)
def test_an_unclear_shape_shows_the_nearest_reading(row, suggestion):
    with pytest.raises(UnknownFormat, match="did you mean columns=") as caught:
        load(row)
    message = str(caught.value)
    assert suggestion in message and "\n" not in message and len(message) < 400


def test_the_suggestion_works_when_it_is_filled_in():
    rows = [ASK | SIDES | {"label": label} for label in (0, 1)]
    columns = {
        "prompt": "question",
        "answers": ["response_a", "response_b"],
        "verdict": "label",
        "verdict_is": "0 or 1",
    }
    dataset, _ = load(*rows, columns=columns, group=False)
    assert dataset["targets"][:] == [[1.0], [0.0]]
    # Only what was unclear need be said.
    dataset, _ = load(*rows, columns={"verdict": "label", "verdict_is": "1 or 0"}, group=False)
    assert dataset["targets"][:] == [[0.0], [1.0]]


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"winner": "label"}, "no role 'winner'; the usual ones are prompt, "),
        ({"promptly": "question"}, r"no role 'promptly': did you mean prompt\?$"),
        ({"system": "question", "prompt": "question"}, "'question' is both prompt and system"),
        ({"answers": ["response_a", "response_a"], "ratings": "label"}, "'response_a' is twice in answers"),
        ({"chosen": "response_a", "rejected": "response_b", "verdict": "label"}, "so verdict is not read"),
        ({"answers": ["response_a", "response_b", "question"], "ratings": ["label", "x"]}, "2 columns for 3 answers"),
        ({"prompt": "nowhere"}, "prompt is 'nowhere', which is no column; found label, question"),
        ({"answers": 5}, "answers is 5: give the name"),
        ({"prompt": ["a"]}, r"prompt is \['a'\]: give the name of one column"),
        ({"rejected": "response_b"}, "rejected needs chosen"),
        ({"answers": ["response_a", "response_b"], "verdict": "label"}, "give verdict_is"),
        ({"verdict": "label", "verdict_is": "so so"}, "verdict_is: 'so so'"),
    ],
)
def test_a_mistake_in_columns_is_one_line(columns, message):
    with pytest.raises(PreferenceDataError, match=message) as caught:
        load(ASK | SIDES | {"label": 0}, columns=columns)
    assert "\n" not in str(caught.value)


def test_a_column_that_matters_stops_the_load_and_can_be_used_or_waived():
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "persona": "Be rude."}
    with pytest.raises(UnreadColumn, match=r"persona .*columns=.*ignore=\[\"persona\"\]"):
        load(row)
    dataset, report = load(row, columns={"system": "persona"})
    assert dataset[0]["prompt"] == [{"role": "system", "content": "Be rude."}, user("p")] and report.unread == {}
    dataset, report = load(row, ignore=["persona"])
    assert dataset[0]["prompt"] == "p" and report.waived == ["persona"]
    streamed = Dataset.from_list([row]).to_iterable_dataset()
    with pytest.raises(UnreadColumn, match="persona"):
        load_comparisons(streamed, streaming=True)


@settings(max_examples=25, deadline=None)
@given(
    column=st.sampled_from(["my_system", "dialogue_messages", "persona", "images", "user_rating", "is_safe", "votes"]),
    late=st.booleans(),
)
def test_any_unread_column_that_matters_is_reported(column, late):
    value = {"images": ["1.jpg"], "user_rating": 3, "is_safe": False, "votes": 7}.get(column, "Be rude and short.")
    plain = {"prompt": "p", "chosen": "a", "rejected": "b", column: None}
    rows = [plain | {"prompt": str(number)} for number in range(120 if late else 1)]
    rows.append(plain | {column: value})
    with pytest.raises(UnreadColumn, match=column):
        load(*rows)


def test_another_judgment_of_a_published_set_can_be_chosen():
    row = {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 1, "safer_response_id": 0}
    assert load(row)[0][0]["targets"] == [0.0]
    assert load(row, columns={"verdict": "safer_response_id"})[0][0]["targets"] == [1.0]


# --- categories, csv, paths -------------------------------------------------------------------------------------------


def test_any_column_is_the_category():
    rows = [{"prompt": str(k), "chosen": "a", "rejected": "b", "subset": name} for k, name in enumerate("xy")]
    assert load(*rows, category_column="subset")[0]["category"][:] == ["x", "y"]
    assert load(*rows, columns={"category": "subset"})[0]["category"][:] == ["x", "y"]
    with pytest.raises(PreferenceDataError, match="category_column: 'topic' is no column; found chosen"):
        load(*rows, category_column="topic")


def test_a_csv_with_a_winner_is_simply_read(tmp_path):
    lines = ["question,answer_a,answer_b,winner", *(f"q{k},x{k},y{k},{who}" for k, who in enumerate(("a", "b", "tie")))]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    dataset, report = load_comparisons(tmp_path / "rows.csv")
    assert dataset["targets"][:] == [[1.0], [0.0], [0.5]] and report.unread == {}


def test_a_path_reaches_into_records_and_lists():
    row = {"a.b": 1, "q": {"text": "t"}, "l": [{"x": 1}, {}, 5], "j": '[{"x": 2}]'}
    assert [cell(row, path) for path in ("a.b", "q.text", "q.no", "l[].x", "j[].x", None)] == [
        1,
        "t",
        None,
        [1, None, None],
        [2],
        None,
    ]
    columns = {"prompt": "q.text", "answers": "l[].x", "ratings": "l[].s"}
    records = [{"x": FIRST, "s": 1}, {"x": SECOND, "s": 2}]
    dataset, _ = load({"q": {"text": QUESTION}, "l": records}, columns=columns)
    assert judged(dataset[0]) == (QUESTION, FIRST, SECOND, 0.0)


# --- formats of the user ----------------------------------------------------------------------------------------------


@pytest.fixture
def own_formats():
    before = list(registry.COMPARISONS), list(registry.DEMONSTRATIONS)
    yield
    registry.COMPARISONS[:], registry.DEMONSTRATIONS[:] = before


def test_a_registered_format_is_detected_and_named(own_formats, tmp_path):
    columns = {"prompt": "frage", "chosen": "gut", "rejected": "schlecht"}
    row = {"frage": QUESTION, "gut": FIRST, "schlecht": SECOND}
    with pytest.raises(UnknownFormat):
        load(row)
    register_format("german", columns, "ours/german")
    for options in ({}, {"format": "german"}):
        assert judged(load(row, **options)[0][0]) == (QUESTION, FIRST, SECOND, 1.0)
    with pytest.raises(PreferenceDataError, match="'trl' is a format of the library"):
        register_format("trl", columns)
    with pytest.raises(PreferenceDataError, match="rejected needs chosen"):
        register_format("broken", {"prompt": "frage", "rejected": "schlecht"})

    path = tmp_path / "formats.yaml"
    path.write_text("talk:\n  kind: demonstrations\n  columns: {prompt: frage, completion: gut}\n")
    assert register_formats(path) == ["talk"]
    dataset, _ = load_demonstrations(Dataset.from_list([{"frage": QUESTION, "gut": FIRST}]))
    assert dataset[0]["completion"] == [assistant(FIRST)]
    path.write_text("talk: 5\n")
    with pytest.raises(PreferenceDataError, match=r"^formats.yaml: write each format as"):
        register_formats(path)


def test_roles_are_given_back_as_the_mapping_they_were_made_from():
    mapping = {"prompt": "q", "answers": ["a", "b"], "verdict": "v", "verdict_is": "0 or 1"}
    roles = Roles.from_mapping(mapping)
    assert roles.as_mapping() == mapping and roles.columns == {"q", "a", "b", "v"}
    assert set(ROLES["demonstrations"]) & set(ROLES["comparisons"]) >= {"prompt", "system", "tools", "category"}


def test_demonstrations_by_columns():
    row = {"topic": "x", "ask": QUESTION, "tell": FIRST}
    dataset, _ = load_demonstrations(
        Dataset.from_list([row]), columns={"prompt": "ask", "completion": "tell"}, category_column="topic"
    )
    assert dataset[0]["prompt"] == [user(QUESTION)] and dataset[0]["completion"] == [assistant(FIRST)]
    assert dataset[0]["category"] == "x"


def test_prompts_for_ppo_by_columns():
    rows = Dataset.from_list([{"ask": QUESTION, "persona": "Be short.", "solution": "4"}])
    dataset = with_prompts(rows, {"prompt": "ask", "system": "persona"})
    assert dataset[0]["prompt"] == [{"role": "system", "content": "Be short."}, user(QUESTION)]
    assert dataset[0]["solution"] == "4"
    with pytest.raises(PreferenceDataError, match="row 0: ask is missing"):
        with_prompts(Dataset.from_list([{"ask": None, "x": 1}]), {"prompt": "ask"})
