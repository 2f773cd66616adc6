"""Finds the roles of the columns of a preference dataset, from tables of names and from the first values.

A name alone decides nothing: `winner` may hold "model_a" or the text of the better answer, and a label of 0 or 1 may
count from 0 or say true. What stays unclear is not guessed; `nearest_reading` then says what is missing.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

from ..data.cells import is_absent
from ..data.schema import Row, is_number
from ..data.transcripts import is_marked
from .columns import normal_name
from .profile import Profile
from .roles import Roles, cell, column_of, parsed
from .verdicts import BELOW_ZERO, BEST_FIRST, decoder, guess_meaning, is_tie

# --- names ------------------------------------------------------------------------------------------------------------

PROMPT = (
    "prompt prompts messages conversations conversation question questions query instruction orig_instruction problem "
    "trajectory dialogue "  # codespell:ignore
    "dialog chat user_prompt user_query user_message user_input user_question input_prompt "
    "prompt_text question_text task_prompt history context input inputs request post article document passage user "
    "human text"
).split()
SYSTEM = "system system_prompt system_message system_text sys_prompt sys systemprompt system_instruction".split()
HISTORY = (
    "history chat_history conversation_history dialogue_history previous_messages previous_turns past_turns"
).split()
CONTEXT = "input context passage document background knowledge".split()
STARTED = "initial_reason_steps initial_steps previous_steps steps_so_far partial_solution".split()
TOOLS = "tools functions available_tools tool_schemas".split()
TEMPLATE_KWARGS = "chat_template_kwargs template_kwargs".split()
MARGIN = "margin magnitude score_diff score_difference rating_difference score_margin reward_margin".split()
TIE = "tie is_tie tied is_tied winner_tie".split()
ANNOTATOR = "judge annotator annotator_id worker worker_id rater rater_id".split()
TURN = "turn turn_number judged_turn".split()

BETTER_AND_WORSE = (
    ("chosen", "rejected"),
    ("accepted", "rejected"),
    ("preferred", "rejected"),
    ("preferred", "non_preferred"),
    ("preferred", "dispreferred"),
    ("preferred", "unpreferred"),
    ("positive", "negative"),
    ("pos", "neg"),
    ("good", "bad"),
    ("better", "worse"),
    ("best", "worst"),
    ("winner", "loser"),
    ("winning", "losing"),
    ("win", "lose"),
    ("win", "loss"),
    ("selected", "unselected"),
    ("y_w", "y_l"),
    ("yw", "yl"),
)
"""Words for the better and the worse answer, alone or with a word of `ANSWER`."""
ANSWER = (
    "response answer output completion reply summary generation candidate conversation conv sample solution text "
    "message messages prediction continuation ref result translation essay story code"
).split()
"""Words for an answer. Columns such as `response_a` and `answer1` have one of them."""
_BESIDE_ANSWER = frozenset("orig model assistant bot human final generated llm full".split())
"""Words that may stand beside them, as in `orig_response_A` and `human_ref_B`."""
_SPEAKERS = frozenset(("model", "assistant", "bot", "chatbot", "system"))
"""Words that name an answer if the column has text, not the name of a model."""
LISTS = (
    "answers responses completions outputs generations candidates samples candidate_responses candidate_answers "
    "candidates_completions all_generated_responses replies summaries texts"
).split()
"""Columns with a list of answers."""
SINGLE = "completion response answer output reply generation text".split()
"""Columns with the only answer of a row."""

VERDICT = (
    "winner preference preferred overall_preference preference_strength signed_preference human_preference "
    "orig_preference better_response_id better_response better_answer better preferred_response preferred_answer best "
    "best_response best_answer best_index verdict choice chosen chosen_index chosen_response selected "
    "selected_response selected_index preferred_index winner_index winner_id judgment decision vote human_label "
    "judgement "  # codespell:ignore
    "gold_label gold label labels target"
).split()
"""Columns that say which answer is better, the clearest names first."""
LIKED = (
    "label kto_tag is_safe safe is_good is_correct correct liked is_liked desirable accepted is_accepted acceptable "
    "thumbs_up is_chosen chosen preferred is_preferred labels feedback"
).split()
"""Columns that say whether the only answer of a row is good."""
DISLIKED = "unsafe is_unsafe toxic is_toxic harmful is_harmful disliked is_disliked is_rejected thumbs_down".split()
"""Columns that say whether it is bad."""
RATING = (
    "overall_score overall_rating overall score avg_score mean_score total_score avg_rating mean_rating average_rating "
    "rating reward rm_score reward_score helpfulness quality correct correctness is_correct points stars upvotes votes "
    "likes safe is_safe grade elo value winner win wins"
).split()
"""Ratings of an answer, the most general first."""
RANK = "rank ranking".split()
"""Ranks of an answer, 1 for the best. A `position` is mostly where the answer was shown, and says nothing."""
CANDIDATE_RATINGS = "all_rm_scores rating ratings scores rewards rm_scores".split()

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_ORDINALS = (("first", "second"), ("left", "right"))
_POINTS_AT_AN_ANSWER = re.compile(
    r"(?:model|response|answer|output|option)?[ _-]?(?:[a-e]|\d+)|tie|both.*|neither", re.I
)


_NOTHING = Roles()

# --- the guess --------------------------------------------------------------------------------------------------------


@dataclass
class _Guess:
    """What was found so far.

    Attributes:
        profile: The columns and their first values.
        names: Normalized name -> column, of the columns that have no role yet.
        roles: The roles that were found.
        suffixes: What tells the columns of the answers apart.
        unclear: A column that may be the verdict, but whose values are not clear.
        unclear_ranks: A list that may hold the rank of each answer or the order of the answers.
        losers: Column that names the winner -> column that names the loser.
    """

    profile: Profile
    names: dict[str, str]
    roles: Roles
    suffixes: list[str] = field(default_factory=list)
    unclear: str | None = None
    unclear_ranks: str | None = None
    losers: dict[str, str] = field(default_factory=dict)

    def values(self, column: str) -> list[Any]:
        return self.profile.values.get(column, [])

    def take(self, names: Iterable[str], fits: Callable[[list[Any]], bool]) -> str | None:
        """Returns the first free column with one of the names whose values fit, and marks it as used."""
        for name in names:
            column = self.names.get(name)
            if column is not None and fits(self.values(column)):
                del self.names[name]
                return column
        return None

    def use(self, *columns: str) -> None:
        self.names = {name: column for name, column in self.names.items() if column not in columns}

    def give(self, **roles: Any) -> None:
        self.roles = replace(self.roles, **roles)

    def fill(self, role: str, names: Iterable[str], fits: Callable[[list[Any]], bool]) -> None:
        """Gives a role to a free column, unless it has one already."""
        if not getattr(self.roles, role):
            self.give(**{role: self.take(names, fits)})


def guess_roles(profile: Profile, given: Roles = _NOTHING, without: Collection[str] = ()) -> Roles | None:
    """Returns the roles of a preference dataset's columns, or None if the answers or the verdict are not clear.

    Args:
        profile: The columns and their first values.
        given: Roles that are known already. The others are looked for.
        without: Columns that have no role.
    """
    roles = _guess(profile, given, without).roles
    return roles if is_complete(roles) else None


def is_complete(roles: Roles) -> bool:
    """Whether the roles say what the answers are and which one is better."""
    if roles.rejected is not None:
        return roles.chosen is not None
    judged = roles.verdict or roles.ratings or roles.ranks or roles.votes
    if roles.answers:
        has_meaning = roles.verdict_is is not None or not (roles.verdict or roles.votes)
        return has_meaning and bool(judged or roles.verdict_is == BEST_FIRST)
    return roles.answer is not None and roles.prompt is not None and bool(judged)


def _guess(profile: Profile, given: Roles = _NOTHING, without: Collection[str] = ()) -> _Guess:
    names: dict[str, str] = {}
    for column in profile.columns:
        if column not in without and column not in given.columns:
            names.setdefault(normal_name(column), column)
    guess = _Guess(profile, names, given)
    if given.answer is not None:
        _one_answer(guess)
        return guess
    if given.answers:
        guess.suffixes = suffixes_of(given.answers)
    has_answers = given.rejected is not None or bool(given.answers)
    for find_answers in (_chosen_and_rejected, _numbered_answers, _listed_answers, _rejected_beside_messages):
        has_answers = has_answers or find_answers(guess)
    if has_answers:
        _prompt_and_more(guess)
        _judgment(guess)
    else:
        _one_answer(guess)
    return guess


# --- values -----------------------------------------------------------------------------------------------------------


def _are_texts(values: list[Any]) -> bool:
    """True if the values are texts, messages or lists, and no mere names of answers."""
    if not values or not all(isinstance(value, str | list | dict) for value in values):
        return False
    texts = [value for value in values if isinstance(value, str)]
    if len(texts) < len(values):
        return True
    return not all(_POINTS_AT_AN_ANSWER.fullmatch(text.strip()) for text in texts) or _are_few(texts)


def _are_few(texts: list[str]) -> bool:
    # Rows of a test or an example may have "a" and "b" as answers.
    return len(texts) < 3


def _are_short(values: list[Any]) -> bool:
    """True for what a verdict is written as: a number, a truth value or a few words."""
    if not values or any(isinstance(value, list | dict) for value in values):
        return False
    # Numbers may have any number of digits: one that is out of range is flagged.
    return all(not isinstance(value, str) or len(value) <= 60 for value in values)


def _are_numbers(values: list[Any]) -> bool:
    return bool(values) and all(_as_number(value) is not None for value in values)


def _as_number(value: Any) -> float | None:
    """The number that a cell holds, which may be written as text in a csv."""
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return {"true": 1.0, "false": 0.0}.get(value.strip().lower())
    return float(value) if is_number(value) else None


def _are_texts_or_turns(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, str | list | dict) for value in values)


def _are_lists(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(parsed(value), list) for value in values)


# --- the answers ------------------------------------------------------------------------------------------------------


def _chosen_and_rejected(guess: _Guess) -> bool:
    for better, worse in BETTER_AND_WORSE:
        for chosen, rejected in _with_answer_words(better, worse):
            columns = guess.names.get(chosen), guess.names.get(rejected)
            if None in columns or columns[0] == columns[1]:
                continue
            if _name_answers(guess, *map(str, columns)):
                guess.losers[str(columns[0])] = str(columns[1])
                continue
            if all(_are_texts(guess.values(str(column))) for column in columns):
                guess.give(chosen=columns[0], rejected=columns[1])
                guess.use(*map(str, columns))
                return True
    return False


def _name_answers(guess: _Guess, better: str, worse: str) -> bool:
    """True if the two columns name answers of other columns: `winner` is "model_a" beside `response_a`."""
    answers = next(_groups_of_answers(guess, without=(better, worse)), None)
    if answers is None:
        return False
    values = guess.values(better) + guess.values(worse)
    for row in guess.profile.rows:
        own = [row.get(better), row.get(worse)]
        if any(text in own for text in [row.get(column) for column in answers.columns] if text is not None):
            return False  # a copy of the answer
    return _are_short(values)


def _with_answer_words(better: str, worse: str) -> Iterable[tuple[str, str]]:
    yield better, worse
    for word in ANSWER:
        yield f"{better}_{word}", f"{worse}_{word}"
        yield f"{word}_{better}", f"{word}_{worse}"
        # ms-swift and TRL's older examples: `response` is the better one.
    for word in ANSWER:
        yield f"{better}_{word}s", f"{worse}_{word}s"


def _numbered_answers(guess: _Guess) -> bool:
    group = next(_groups_of_answers(guess), None)
    if group is None:
        return False
    guess.give(answers=tuple(group.columns))
    guess.suffixes = group.suffixes
    guess.use(*group.columns)
    return True


def _groups_of_answers(guess: _Guess, without: Collection[str] = ()) -> "Iterator[_Group]":
    """Columns whose names and values are those of answers: `response_a` and `response_b`."""
    for group in _numbered_groups(guess):
        is_of_answers = _is_answer_stem(group.stem, guess, group.columns) and set(group.columns).isdisjoint(without)
        if is_of_answers and all(_are_texts(guess.values(column)) for column in group.columns):
            yield group


def has_several_answers(first: Row) -> bool:
    """Whether a row has two answers or more, in columns such as `response_a` and `response_b`, or in a list."""
    guess = _guess_of(first)
    return _numbered_answers(guess) or _listed_answers(guess)


def name_answers(first: Row, better: str, worse: str) -> bool:
    """Whether two columns only name answers that are in other columns, as `chosen` may be "response_a"."""
    return _name_answers(_guess_of(first), better, worse)


def _guess_of(first: Row) -> _Guess:
    profile = Profile([first], {column: [] if value is None else [value] for column, value in first.items()})
    return _Guess(profile, {normal_name(column): column for column in first}, _NOTHING)


@dataclass
class _Group:
    """Columns whose names differ in one word: `response_a` and `response_b`."""

    stem: str
    suffixes: list[str]
    columns: list[str]


def _numbered_groups(guess: _Guess) -> list[_Group]:
    return _groups_of(guess.names)


def _groups_of(names: dict[str, str]) -> list[_Group]:
    """Finds columns whose names differ in one word. `names` maps normalized names to columns."""
    by_stem: dict[str, dict[str, str]] = {}
    for name, column in names.items():
        # A number may follow without a mark: "response1".
        words = re.sub(r"(?<=[a-z])(\d{1,3})(?=_|$)", r"_\1", name).split("_")
        for place, word in enumerate(words):
            if word and _is_suffix(word) and len(words) > 1:
                stem = "_".join(words[:place] + words[place + 1 :])
                by_stem.setdefault(stem, {})[word] = column
    groups = []
    for stem, columns in by_stem.items():
        suffixes = _in_order(columns)
        if suffixes:
            groups.append(_Group(stem, suffixes, [columns[suffix] for suffix in suffixes]))
    return groups


def _is_suffix(word: str) -> bool:
    is_letter = len(word) == 1 and word in _LETTERS
    is_ordinal = any(word in pair for pair in _ORDINALS)
    return is_letter or is_ordinal or (word.isdigit() and len(word) <= 3)


def suffixes_of(columns: Sequence[str]) -> list[str]:
    """What tells the columns of the answers apart: ["a", "b"] for `answer_a` and `answer_b`; [] if it is unclear."""
    names = {normal_name(column_of(column)): column for column in columns}
    for group in _groups_of(names):
        if group.columns == list(columns):
            return group.suffixes
    return []


def _in_order(suffixes: Iterable[str]) -> list[str]:
    """Returns the suffixes in order if they count from a, 0 or 1 without a gap, else []."""
    for pair in _ORDINALS:
        if set(suffixes) == set(pair):
            return list(pair)
    count = len(list(suffixes))
    if count < 2:
        return []
    for counted in (
        list(_LETTERS[:count]),
        [str(place) for place in range(count)],
        [str(place + 1) for place in range(count)],
    ):
        if set(suffixes) == set(counted):
            return counted
    return []


def _is_answer_stem(stem: str, guess: _Guess, columns: Sequence[str]) -> bool:
    words = set(stem.split("_"))
    if words & set(ANSWER) and words <= _BESIDE_ANSWER | set(ANSWER):
        return True
    if words <= _SPEAKERS:  # `model_a` usually has the name of a model
        texts = [str(value) for column in columns for value in guess.values(column)]
        return bool(texts) and sum(" " in text for text in texts) > len(texts) / 2
    return False


def _listed_answers(guess: _Guess) -> bool:
    for name in LISTS:
        column = guess.names.get(name)
        if column is None or not _are_lists(guess.values(column)):
            continue
        entries = [entry for value in guess.values(column) for entry in parsed(value) if entry is not None]
        if entries and all(isinstance(entry, str | list) for entry in entries):
            guess.give(answers=(column,))
            guess.use(column)
            return True
        if entries and all(isinstance(entry, dict) for entry in entries) and _records(guess, column, entries):
            guess.use(column)
            return True
    return False


def _records(guess: _Guess, column: str, entries: list[dict]) -> bool:
    """Finds text and rating in a list of records."""
    fields = {normal_name(name): name for name in entries[0]}
    text = next((fields[name] for name in (*ANSWER, "content") if name in fields), None)
    rating = next((fields[name] for name in RATING if _are_numbers_of(entries, fields.get(name))), None)
    rank = next((fields[name] for name in RANK if _are_numbers_of(entries, fields.get(name))), None)
    if text is None:
        return False
    guess.give(answers=(f"{column}[].{text}",))
    lists = [parsed(value) for value in guess.values(column)]
    if rating is not None and rank is not None and _contradict(lists, rating, rank):
        return True  # which of them decides is not guessed
    if rating is not None:
        guess.give(ratings=(f"{column}[].{rating}",))
    elif rank is not None:
        guess.give(ranks=(f"{column}[].{rank}",))
    return True


def _contradict(lists: list[list[dict]], rating: str, rank: str) -> bool:
    """Whether an answer with a better rank has a lower rating than another one."""
    for entries in lists:
        rated = [entry for entry in entries if is_number(entry.get(rating)) and is_number(entry.get(rank))]
        rated.sort(key=lambda entry: entry[rank])
        for better, worse in pairwise(rated):
            if better[rank] < worse[rank] and better[rating] < worse[rating]:
                return True
    return False


def _are_numbers_of(entries: list[dict], name: str | None) -> bool:
    return name is not None and any(is_number(entry.get(name)) for entry in entries)


def _rejected_beside_messages(guess: _Guess) -> bool:
    """ms-swift's form: `messages` ends with the better answer, and the worse one is in a column of its own."""
    for name in ("rejected_response", "rejected_messages", "rejected", "rejected_answer", "rejected_output"):
        column = guess.names.get(name)
        messages = guess.names.get("messages") or guess.names.get("conversations")
        if column is not None and messages is not None and _are_texts_or_turns(guess.values(column)):
            are_whole = all(isinstance(value, list) and len(value) > 1 for value in guess.values(column))
            guess.give(prompt=None if are_whole else messages, chosen=messages, rejected=column)
            guess.use(column, messages)
            return True
    return False


# --- the prompt and what belongs to it --------------------------------------------------------------------------------


def _prompt_and_more(guess: _Guess) -> None:
    if guess.roles.prompt is None:
        _give_prompt(guess, guess.take(PROMPT, _are_texts_or_turns))
    guess.fill("system", SYSTEM, _are_texts_or_turns)
    guess.fill("tools", TOOLS, _are_texts_or_turns)
    guess.fill("template_kwargs", TEMPLATE_KWARGS, _are_texts_or_turns)
    if guess.roles.prompt is not None:
        guess.fill("history", HISTORY, _are_texts_or_turns)
        guess.fill("started", STARTED, _are_texts_or_turns)
        if guess.roles.context is None:
            guess.give(context=_context(guess))
    # TRL's own rows stay as they are. All other questions and answers are turns of a conversation.
    sides = (guess.roles.chosen, guess.roles.rejected)
    is_trl = sides == ("chosen", "rejected") and guess.roles.prompt in (None, "prompt")
    is_kto = guess.roles.answer == "completion" and guess.roles.prompt == "prompt"
    if is_trl or is_kto or guess.roles.started is not None:
        guess.give(as_text=True)


def _give_prompt(guess: _Guess, column: str | None) -> None:
    """Gives the column the role of the prompt; in a column of records, the field with the text or the messages."""
    records = [value for value in guess.values(str(column)) if isinstance(value, dict)]
    if column is None or not records or "role" in records[0] or "from" in records[0]:
        guess.give(prompt=column)
        return
    fields = {normal_name(name): name for name in records[0]}
    for name in ("messages", "full_text", "text", "question", "prompt", "content", "body"):
        if name in fields:
            guess.give(prompt=f"{column}.{fields[name]}")
            break
    if "tools" in fields:
        guess.give(tools=f"{column}.tools")


def _context(guess: _Guess) -> str | None:
    """A column of text that goes with the question, unless it only repeats it."""
    for name in CONTEXT:
        column = guess.names.get(name)
        if column is None or not all(isinstance(value, str) for value in guess.values(column)):
            continue
        rows = guess.profile.rows
        repeats = all(str(row.get(column) or "") in str(cell(row, guess.roles.prompt)) for row in rows)
        if guess.values(column) and repeats:
            continue  # the account of columns sees that it is a copy
        guess.use(column)
        return column
    return None


# --- the verdict ------------------------------------------------------------------------------------------------------


def _judgment(guess: _Guess) -> None:
    if guess.roles.rejected is not None:
        _ratings_of_sides(guess)
        _candidates(guess)
    else:
        _give_verdict(guess)
        _give_ratings(guess)
        _give_votes(guess)
    guess.fill("margin", MARGIN, _are_short)  # a cell that is no number is flagged
    guess.fill("tie", TIE, _are_numbers)
    guess.fill("status", ["status"], _is_status)
    if guess.roles.verdict is not None:
        guess.fill("annotator", ANNOTATOR, _are_short)
    if guess.roles.prompt is None:
        guess.fill("turn", TURN, _are_numbers)


def _is_status(values: list[Any]) -> bool:
    """True for argilla's status: "tie", or else whether the two sides were swapped."""
    return any(map(is_tie, values)) or (bool(values) and set(map(str, values)) <= {"unchanged", "swapped"})


def _ratings_of_sides(guess: _Guess) -> None:
    """Finds the ratings of chosen and rejected: `chosen_score`, `score_rejected`, `chosen-rating`."""
    if guess.roles.ratings or guess.roles.ranks:
        return
    for better, worse in BETTER_AND_WORSE:
        for kind, names in (("ratings", RATING), ("ranks", RANK)):
            for name in names:
                for pattern in ("{side}_{name}", "{name}_{side}", "{side}_response_{name}", "{side}_answer_{name}"):
                    columns = [guess.names.get(pattern.format(side=side, name=name)) for side in (better, worse)]
                    if None not in columns and _are_scores([guess.values(str(column)) for column in columns]):
                        guess.give(**{kind: tuple(columns)})
                        guess.use(*map(str, columns))
                        return


def _are_scores(of_sides: list[list[Any]]) -> bool:
    """True for scores of which some may be missing. A cell that is no number is flagged."""
    return any(of_sides) and all(_are_short(values) or not values for values in of_sides)


def _candidates(guess: _Guess) -> None:
    """Finds a list of all answers with their ratings, among which chosen and rejected are."""
    if guess.roles.ratings or guess.roles.ranks:
        return
    candidates = guess.take(LISTS, _are_lists)
    ratings = guess.take(CANDIDATE_RATINGS, _are_lists)
    ranks = guess.take(("ranks", "rankings"), _are_lists)
    repeats = [guess.names.get(name) for name in ("chosen_score", "chosen_rating")]
    if candidates is not None and ratings is not None:
        guess.give(candidates=candidates, candidate_ratings=ratings)
        guess.give(repeats=tuple(column for column in (ranks, *repeats) if column))
    elif ratings is not None:
        # Two numbers, for chosen and rejected.
        if all(len(parsed(value)) == 2 for value in guess.values(ratings)):
            guess.give(ratings=(ratings,))
        else:
            guess.names[normal_name(ratings)] = ratings
    elif candidates is not None and ranks is not None:
        guess.give(repeats=(candidates, ranks))


def _give_verdict(guess: _Guess) -> None:
    roles = guess.roles
    count = _count(guess)
    if roles.verdict is not None:
        if roles.verdict_is is None:
            guess.unclear = roles.verdict
            name = normal_name(roles.verdict)
            guess.give(verdict_is=guess_meaning(name, guess.values(roles.verdict), guess.suffixes, count))
        return
    if roles.ratings or roles.ranks or roles.votes or roles.verdict_is == BEST_FIRST:
        return
    directed = _directed(guess)
    for name in (*VERDICT, *directed):
        column = guess.names.get(name)
        if column is None or not _are_short(guess.values(column)):
            continue
        meaning = _meaning_of_verdict(guess, name, count)
        if meaning is not None and _reads_most(meaning, guess.values(column), column):
            guess.give(verdict=column, verdict_is=meaning)
            guess.use(column)
            # One column for each answer, such as `winner_model_a` and `winner_model_b`, says the same twice.
            repeats = [guess.names[other] for other in directed if other in guess.names and name in directed]
            if column in guess.losers:
                repeats.append(guess.losers[column])
            guess.give(repeats=tuple(repeats))
            guess.use(*repeats)
            return
        if guess.unclear is None:
            guess.unclear = column


def _meaning_of_verdict(guess: _Guess, name: str, count: int) -> str | None:
    values = guess.values(guess.names[name])
    if count == 2 and name == "overall_preference" and _individual_scores(guess) is not None:
        return BELOW_ZERO  # HelpSteer3, even if all of the first rows are above zero
    return guess_meaning(name, values, guess.suffixes, count)


def _directed(guess: _Guess) -> list[str]:
    """The columns that name one of the answers, such as `a_wins` and `prob_b`; without those that count its wins."""
    if not guess.suffixes:
        return []
    directed = []
    for name, column in guess.names.items():
        if _names_a_side(name, guess.suffixes):
            directed.append(name)
            numbers = {_as_number(value) for value in guess.values(column)} - {None}
            says_yes_or_no = not (guess_meaning(name, (), guess.suffixes, 2) or "").startswith("between")
            if says_yes_or_no and not numbers <= {0.0, 1.0}:
                return []  # of `a_wins` 3 and `b_wins` 1, both are ratings
    return directed


def _names_a_side(name: str, suffixes: Sequence[str]) -> bool:
    return guess_meaning(name, (), suffixes, len(suffixes)) is not None and name not in VERDICT


def _reads_most(meaning: str, values: list[Any], column: str) -> bool:
    read = decoder(meaning)
    n_read = 0
    for value in values:
        try:
            read(value, column)
        except Exception:  # a value that is dropped later, with its reason
            continue
        n_read += 1
    return n_read > len(values) / 2


def _count(guess: _Guess) -> int:
    """Number of answers of a row. 0 if it is not the same in all rows."""
    if len(guess.roles.answers) > 1:
        return len(guess.roles.answers)
    counts = set()
    for row in guess.profile.rows:
        answers = parsed(cell(row, guess.roles.answers[0]))
        if isinstance(answers, list):
            counts.add(len(answers))
    return counts.pop() if len(counts) == 1 else 0


def _give_ratings(guess: _Guess) -> None:
    """Finds a rating for each answer: one column for each, or one with a list."""
    if guess.roles.ratings or guess.roles.ranks or guess.roles.verdict_is == BEST_FIRST:
        return
    by_stem = {}
    for group in _numbered_groups(guess):
        if group.suffixes == guess.suffixes and all(_are_numbers(guess.values(column)) for column in group.columns):
            by_stem[_rating_word(group.stem)] = group
    for kind, names in (("ratings", RATING), ("ranks", RANK)):
        for name in names:
            if name in by_stem:
                guess.give(**{kind: tuple(by_stem[name].columns)})
                guess.use(*by_stem[name].columns)
                return
    if guess.roles.verdict is not None or guess.roles.votes:
        return
    ratings = guess.take(("scores", "ratings", "rewards", "rating", "score", "all_rm_scores"), _are_lists)
    if ratings is not None:
        guess.give(ratings=(ratings,))
        return
    ranks = guess.take(("ranks", "rankings", "rank", "ranking"), _are_lists)
    if ranks is None:
        return
    if normal_name(ranks).startswith("ranking") and _may_be_indices(guess.values(ranks)):
        guess.unclear_ranks = ranks
    else:
        guess.give(ranks=(ranks,))


def _may_be_indices(values: list[Any]) -> bool:
    """True for lists such as [2, 0, 1]: the third answer is the best, or the second one is?"""
    lists = [parsed(value) for value in values]
    return all(set(entries) == set(range(len(entries))) for entries in lists if all(map(is_number, entries)))


def _rating_word(stem: str) -> str:
    """`is_response_safe` -> "is_safe", `conv_rating` -> "rating"."""
    words = [word for word in stem.split("_") if word not in ANSWER and word not in _BESIDE_ANSWER]
    return "_".join(words)


_VOTERS = ("annotator", "annotator_label", "rater", "vote", "judge", "label", "annotation")


def _give_votes(guess: _Guess) -> None:
    """Finds the votes of several annotators: `annotator1`, `annotator2`, or a list of records with a score."""
    count = _count(guess)
    if guess.roles.votes == ("annotator1",):  # PandaLM has any number of them
        further = [column for name, column in guess.names.items() if re.fullmatch(r"annotator_?\d+", name)]
        guess.give(votes=("annotator1", *sorted(further)))
        guess.use(*further)
    if count != 2 or guess.roles.votes or guess.roles.ratings or guess.roles.ranks:
        return
    for group in _numbered_groups(guess):
        if group.stem in _VOTERS:
            values = [value for column in group.columns for value in guess.values(column)]
            meaning = guess.roles.verdict_is or guess_meaning(group.stem, values, guess.suffixes, count)
            if meaning is not None:
                guess.give(votes=tuple(group.columns), verdict_is=meaning)
                guess.use(*group.columns)
                return
    scores = _individual_scores(guess)
    if scores is not None and guess.roles.verdict_is is not None:
        guess.give(votes=(scores,))
        guess.use(column_of(scores))
        return
    _listed_votes(guess, count)


def _individual_scores(guess: _Guess) -> str | None:
    """The path of the annotators' scores in HelpSteer3."""
    column = guess.names.get("individual_preference") or guess.names.get("individual_preferences")
    if column is None or not _are_lists(guess.values(column)):
        return None
    entries = [entry for value in guess.values(column) for entry in parsed(value)]
    are_scored = all(isinstance(entry, dict) and "score" in entry for entry in entries)
    return f"{column}[].score" if are_scored else None


_LISTS_OF_VOTES = "votes annotations annotator_votes annotator_labels annotator_preferences preferences labels".split()
_VOTE = "preference vote label choice winner preferred verdict".split()


def _listed_votes(guess: _Guess, count: int) -> None:
    """Finds a list of votes, such as ["A", "B", "A"], or of records with a vote."""
    for name in _LISTS_OF_VOTES:
        column = guess.names.get(name)
        if column is None or not _are_lists(guess.values(column)):
            continue
        entries = [entry for value in guess.values(column) for entry in parsed(value) if entry is not None]
        path, votes = column, entries
        if entries and all(isinstance(entry, dict) for entry in entries):
            vote = next((key for key in entries[0] if normal_name(key) in _VOTE), None)
            path, votes = f"{column}[].{vote}", [entry.get(vote) for entry in entries]
        # Numbers may also say how many votes each answer got.
        if not votes or not all(isinstance(vote, str) and _as_number(vote) is None for vote in votes):
            continue
        meaning = guess.roles.verdict_is or guess_meaning(name, votes, guess.suffixes, count)
        if meaning is not None and _reads_most(meaning, votes, column):
            guess.give(votes=(path,), verdict_is=meaning)
            guess.use(column)
            return


# --- one answer a row -------------------------------------------------------------------------------------------------


def _one_answer(guess: _Guess) -> None:
    """Finds a prompt, one answer, and whether it is good or how it is rated."""
    if not (guess.roles.verdict or guess.roles.ratings or guess.roles.ranks):
        guess.fill("verdict", LIKED, _say_yes_or_no)
    if guess.roles.verdict is not None:
        if guess.roles.verdict_is is None:
            guess.give(verdict_is=_meaning_of_liked(guess.values(guess.roles.verdict)))
    for role, names in (("ratings", RATING), ("ranks", RANK)):
        if not guess.roles.ranks and not guess.roles.ratings:
            column = guess.take(names, _are_numbers)
            if column is not None:
                guess.give(**{role: (column,)})
    if not (guess.roles.verdict or guess.roles.ratings or guess.roles.ranks):
        # Beside a rating, `toxic` is a judgment of its own.
        guess.fill("verdict", DISLIKED, _are_zero_or_one)
        if guess.roles.verdict is not None:
            guess.give(verdict_is="0 or 1")  # a false says that the answer is good
    guess.fill("answer", SINGLE, _are_texts_or_turns)
    if guess.roles.answer is None:
        messages = guess.take(("messages", "conversations", "conversation"), _are_lists)
        if messages is not None:
            guess.give(prompt=messages, answer=messages)
    _prompt_and_more(guess)


_LIKED_WORDS = (
    "yes or no",
    "good or bad",
    "like or dislike",
    "liked or disliked",
    "positive or negative",
    "desirable or undesirable",
    "thumbs_up or thumbs_down",
    "up or down",
    "chosen or rejected",
    "accepted or rejected",
    "accept or reject",
    "👍 or 👎",
    "safe or unsafe",
    "correct or incorrect",
)


def _meaning_of_liked(values: list[Any]) -> str | None:
    seen = {re.sub(r"[\s_-]+", "_", str(value).strip().lower()) for value in values}
    for meaning in _LIKED_WORDS:
        if seen <= set(meaning.split(" or ")):
            return meaning
    return None  # a number or a truth value


def _say_yes_or_no(values: list[Any]) -> bool:
    if not values:
        return False
    if None not in map(_as_number, values):
        return _are_zero_or_one(values)
    return all(isinstance(value, str) for value in values) and _meaning_of_liked(values) is not None


def _are_zero_or_one(values: list[Any]) -> bool:
    return bool(values) and {_as_number(value) for value in values} <= {0.0, 1.0}


# --- what to say if it is not clear -----------------------------------------------------------------------------------


def nearest_reading(profile: Profile, given: Roles | None = None) -> str:
    """Returns a `columns={…}` with what was found, and `"…"` for what the user has to say."""
    guess = _guess(profile, given or _NOTHING)
    mapping = {role: value for role, value in guess.roles.as_mapping().items() if role not in ("as_text", "repeats")}
    has_sides = guess.roles.rejected is not None or guess.roles.answers or guess.roles.answer
    if not has_sides:
        mapping |= {side: _misspelt(guess, side) for side in ("chosen", "rejected")}
        if guess.unclear is None and guess.roles.prompt is None:
            mapping = {"prompt": "…"} | mapping
    elif guess.unclear_ranks is not None:
        mapping["ranks"] = "…"  # the column may hold the ranks or their order
    elif not is_complete(guess.roles):
        mapping["verdict"] = guess.unclear or "…"
        mapping["verdict_is"] = _unclear_meaning(guess)
        if guess.roles.prompt is None and all(map(_are_plain_texts, map(guess.values, guess.roles.answers))):
            mapping = {"prompt": _free_text(guess) or "…"} | mapping
    return json.dumps(mapping, ensure_ascii=False)


def _misspelt(guess: _Guess, name: str) -> str:
    """The free column whose name is nearly this one; "…" without one."""
    near = get_close_matches(name, guess.names, n=1, cutoff=0.75)
    return guess.names[near[0]] if near else "…"


def _are_plain_texts(values: list[Any]) -> bool:
    return all(isinstance(value, str) and not is_marked(value) for value in values)


def _free_text(guess: _Guess) -> str | None:
    """The first column without a role that has texts of several words."""
    for column in guess.names.values():
        values = guess.values(column)
        if column != guess.unclear and values and all(isinstance(value, str) and " " in value for value in values):
            return column
    return None


def _unclear_meaning(guess: _Guess) -> str:
    """The form of a meaning for the values of the unclear verdict. Which answer they name is for the user to say."""
    values = [value for value in guess.values(str(guess.unclear)) if not is_absent(value)]
    numbers = [number for number in map(_as_number, values) if number is not None]
    if numbers and min(numbers) < 0:
        return "… zero for the first"
    return "… or …"
