"""Accounts for every column of a source: what a column that was not read looks like, and whether that stops the load.

A column is judged by its name and then by its values. Names are compared in one spelling (`chosen-rating` and
`chosenRating` are `chosen_rating`). The last word of a name says what it holds: `prompt_source` is a source, and
`source_prompt` is a prompt.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..data.schema import PreferenceDataError, Row, is_number
from ..data.text import Messages, plain_text
from .profile import Profile, is_hollow

PROMPT = "prompt material"
TOOLS = "tools"
TEMPLATE = "template options"
MEDIA = "media"
LABEL = "label"
VERDICT = "verdict"
STATUS = "status"
TURN = "turn"
TIE = "tie"
VOTE = "vote"
RATING = "rating"
ANSWER = "the chosen answer"
METADATA = "metadata"
THINKING = "thinking"
TEXT = "text"
RECORDS = "lists or records"
NUMBERS = "numbers"
YES_OR_NO = "yes or no"
EMPTY = "empty"
MEANINGFUL = frozenset(
    (PROMPT, ANSWER, TOOLS, TEMPLATE, MEDIA, LABEL, VERDICT, STATUS, TURN, TIE, VOTE, RATING, THINKING)
)
"""Meanings that stop the load if the column was not read."""
IGNORED = ", ignored"
"""Follows the meaning of a column that would stop the load, but that the user waived."""


class UnreadColumn(PreferenceDataError):
    """Raised if a column that was not read looks as if it mattered. The message names it and the two ways on."""


# --- what a column looks like -----------------------------------------------------------------------------------------

_NAMES = {
    PROMPT: "system prompt prompts instruction instructions question questions query problem request input inputs "
    "context contexts history message messages conversation conversations conv chat "
    "dialogue dialog dialogues "  # codespell:ignore
    "trajectory passage passages document documents article body post background persona scenario steps turns user "
    "human character guideline guidelines options sysprompt systemprompt preprompt goal premise demonstrations shots",
    TOOLS: "tool tools function functions api apis",
    TEMPLATE: "chat_template_kwargs template_kwargs",
    MEDIA: "image images img imgs picture pictures photo photos pixel pixels audio audios speech sound video videos "
    "frames screenshot screenshots pdf pdfs media",
    LABEL: "label labels correct safe unsafe harmful harmless acceptable accepted approved liked disliked thumb thumbs "
    "kto_tag desirable undesirable is_good is_bad feedback",
    VERDICT: "verdict verdicts winner winners winning preference preferences preferred judgment judgments "
    "judgement judgements "  # codespell:ignore
    "choice choices better best worse worst safer choose decision outcome chosen_index chosen_idx "
    "preferred_index preferred_idx winner_index winner_idx selected_index correct_index",
    STATUS: "status deleted valid invalid discarded excluded",
    TURN: "turn turn_number turn_index turn_idx turn_no judged_turn",
    TIE: "tie ties tied both_bad both_good bothbad equal draw",
    VOTE: "vote votes upvote upvotes downvote downvotes voters ballots",
    RATING: "rating ratings score scores stars star grade grades reward rewards quality rank ranks ranking rankings "
    "margin margins magnitude strength helpfulness correctness coherence complexity verbosity truthfulness honesty "
    "harmlessness instruction_following points elo",
    METADATA: "id ids uid uuid guid idx index indices key keys hash hashes sha sha1 sha256 md5 url urls uri link links "
    "model models policy policies generator generators timestamp timestamps tstamp date datetime time times created "
    "updated day year month language languages lang langs langdetect locale code source sources origin provenance "
    "dataset datasets corpus split subset license version token tokens length lengths len chars words count "
    "licence "  # codespell:ignore
    "counts num number total size "
    "category categories subcategory domain domains topic topics task tasks tag tags type types difficulty intent "
    "subject style format level metadata meta info header headers config configs parameters params kwargs resource "
    "utc at on by state country region ip name names title titles author authors annotator annotators worker workers "
    "judge judges rater batch session order anony redacted toxic moderation detoxify emojis views temperature seed "
    "distance fingerprint guard str path paths file files filename reward_model rating_model scoring_model",
    THINKING: "thinking thought thoughts reasoning reasoning_content reasoning_trace reasoning_text cot "
    "chain_of_thought",
    TEXT: "statement elaboration explanation rationale justification reason reasons comment comments critique "
    "analysis summary answer answers response responses output outputs completion completions generation "
    "generations solution solutions reference references target targets",
}  # fmt: skip
"""Meaning -> names (of columns, or their last words) that have it."""
_MEANING_OF_NAME = {name: meaning for meaning, names in _NAMES.items() for name in names.split()}

_PUBLISHED_METADATA = {
    "gen_input_configs", "instruct_reward", "input_quality", "min_neighbor_distance",  # Magpie
    "upvote_ratio", "score_ratio", "seconds_difference",  # SHP
    "review_result", "review_count",  # OASST
    "openai_moderation", "toxic_chat_tag", "category_tag", "dedup_tag", "is_refusal",  # Chatbot Arena, WildChat
    "skip_prompt_formatting", "custom_instruction",  # OpenHermes
    "used_in_training",  # Llama-Nemotron
    "orig_score",  # Feedback-Collection, where it is a part of the text to learn
    "is_reasoning_complete", "correctness_math_verify", "correctness_llama", "correctness_count",  # OpenR1-Math
}  # fmt: skip
"""Columns of published sets that describe a row, although their names look like more."""

_ABOUT_THE_JUDGING = frozenset(
    (
        "labelling",  # codespell:ignore
        "labeling",
        "annotation",
        "judge",
        "judging",
        "grading",
        "grader",
        "eval",
        "evaluation",
    )
)
"""First words of columns that hold how the answers were judged, such as a prompt for the judge."""
_BEFORE_EDITING = frozenset(("original", "orig", "raw", "old", "unfiltered", "generation", "seed"))
"""First words of columns that hold an earlier version of another column."""
_COUNTING = frozenset(("num", "n", "number", "total", "len", "count"))
_SIDES = frozenset(
    "a b c d e j k l r w x y chosen rejected first second third left right good bad one two model assistant bot "
    "response answer output completion candidate".split()
)
"""Words that only say which of the answers is meant."""
_WINNING = frozenset(("winner", "winning", "better", "safer", "preferred", "best", "worse"))
"""First words of verdicts whatever follows, such as `better_response_id` and `winner_model`."""
_POINTS_AT_A_SIDE = re.compile(r"(?:model|response|answer|output|option)?[ _-]?(?:[a-e]|\d+)|tie|both.*|neither", re.I)
"""Values that name an answer. `preferred_output` may hold the answer itself."""
_JUDGMENTS = frozenset((LABEL, VERDICT, STATUS, TURN, TIE, VOTE, RATING))
_PLACES = frozenset(
    "path paths file files filename url urls uri id ids bytes base64 name names link links data".split()
)
"""Last words of columns that say where media are, such as `image_path`."""

_ANSWERS = frozenset(("chosen", "rejected", "accepted", "category", "human_ref_a", "human_ref_b", "text", "data"))
"""Further names of columns that hold text."""
_LONG_VERDICT = 60
"""A verdict or rating is not longer, in characters."""
_LONG_LABEL = 16


def normal_name(column: str) -> str:
    """Returns the column's name in one spelling: lower case with underscores."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(column))
    return re.sub(r"[^0-9a-z]+", "_", name.lower()).strip("_")


def meaning_of(column: str, values: Collection[Any]) -> str:
    """Returns what a column looks like, one of the meanings above.

    Args:
        column: Name of the column.
        values: Some of its values. Without one that is not empty, the column is `EMPTY`.
    """
    filled = [value for value in values if not _is_blank(value)]
    if not filled:
        return EMPTY
    if any(map(_is_media, filled)):
        return MEDIA
    name = normal_name(column)
    if name == "chosen":
        # Preference data that are read as demonstrations have their answers here.
        return VERDICT if all(map(_points_at_a_side, filled)) else ANSWER
    meaning = _meaning_by_name(name)
    if meaning is not None and _fits(meaning, name, filled):
        return meaning
    if meaning is None and any(map(is_conversation, filled)):
        return PROMPT
    return _kind_of(filled)


def holds_text(column: str) -> bool:
    """Whether a column of this name holds prompts or answers, so that its cells are text even if they are digits."""
    name = normal_name(column)
    return name in _ANSWERS or _meaning_by_name(name) in (PROMPT, TEXT)


def _meaning_by_name(name: str) -> str | None:
    """Returns the meaning of a normalized name, or None if no word of it is known."""
    if name in _PUBLISHED_METADATA:
        return METADATA
    if name in _MEANING_OF_NAME:
        return _MEANING_OF_NAME[name]
    first = name.split("_")[0]
    if first in _WINNING:
        return VERDICT
    if first in _COUNTING:
        return METADATA

    words = _without_sides(name.split("_"))
    last = words[-1]
    if words == ["toxic"]:
        return LABEL  # of one answer: `toxic` alone is about the row
    # What is judged may follow too: `score_response_1` is a score.
    judged = _without_answers(words)
    for candidate in ("_".join(judged), judged[-1]):
        if _MEANING_OF_NAME.get(candidate) in _JUDGMENTS:
            return _MEANING_OF_NAME[candidate]
    if first in _ABOUT_THE_JUDGING:
        return METADATA
    # Media stay media, however the column says where they are.
    if last in _PLACES and any(_MEANING_OF_NAME.get(word) == MEDIA for word in words):
        return MEDIA
    return _MEANING_OF_NAME.get("_".join(words)) or _MEANING_OF_NAME.get(last)


def _without_sides(words: list[str]) -> list[str]:
    """Takes off numbers, and words at the start that only name an answer: `response_1_score` is `score`."""
    core = [word for word in words if not word.isdigit()]
    while len(core) > 1 and core[0] in _SIDES:
        core = core[1:]
    while len(core) > 1 and len(core[-1]) == 1 and core[-1] in _SIDES:
        core = core[:-1]
    return core or words


def _without_answers(words: list[str]) -> list[str]:
    """Takes off words at the end that name an answer."""
    core = list(words)
    while len(core) > 1 and core[-1] in _SIDES:
        core = core[:-1]
    return core


def _fits(meaning: str, name: str, filled: list[Any]) -> bool:
    """Whether the values can have the meaning that the name suggests."""
    first = filled[0]
    if meaning in (PROMPT, TOOLS, TEMPLATE, TEXT):
        return _may_be_text(name, first)
    if meaning == THINKING:
        # Nemotron's `reasoning` is "on" or "off".
        return any(isinstance(value, str) and len(value.split()) > 3 for value in filled)
    if meaning == MEDIA:
        return not all(isinstance(value, bool | int | float) and not value for value in filled)
    if meaning == METADATA:
        return True
    if meaning == RATING and name.endswith("_model") and isinstance(first, str):
        return False  # `score_model` names the model that gave the scores
    if meaning == LABEL and isinstance(first, dict):
        return False  # a record of labels tags the row, as in OASST
    if meaning == VERDICT and name.split("_")[0] in _WINNING and isinstance(first, str):
        last = name.split("_")[-1]
        names_an_answer = _MEANING_OF_NAME.get(last) == TEXT
        return not names_an_answer or all(map(_points_at_a_side, filled))
    longest = _LONG_LABEL if meaning == LABEL else _LONG_VERDICT
    return all(_is_short(value, longest) for value in filled)


def _points_at_a_side(value: Any) -> bool:
    """True for a number, and for text such as "A", "model_b" or "tie"."""
    if isinstance(value, str):
        return _POINTS_AT_A_SIDE.fullmatch(value.strip()) is not None
    return not isinstance(value, list | dict | tuple)


def _may_be_text(name: str, value: Any) -> bool:
    """Whether a value can be a text, messages or tools."""
    if isinstance(value, str):
        if name in ("user", "human"):
            return " " in value.strip()  # otherwise it is the name of a person
        if name in ("api", "apis", "function", "functions"):
            return "{" in value
        return True
    # `parallel_tool_calls` is a switch, and `steps` may be a number.
    return isinstance(value, list | dict | tuple)


def _is_short(value: Any, longest: int) -> bool:
    """True for what a label, verdict or rating is written as: a number, a word, or a list or record of these."""
    if isinstance(value, str):
        return len(value) <= longest
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return all(_is_short(entry, longest) for entry in value)
    return True


def _kind_of(filled: list[Any]) -> str:
    """Returns what the values are, for a name that says nothing."""
    first = filled[0]
    if isinstance(first, bool):
        return YES_OR_NO
    if isinstance(first, str):
        return TEXT
    if is_number(first):
        return NUMBERS
    if isinstance(first, list | tuple | dict):
        return RECORDS
    return METADATA  # dates, times, decimals


def _is_blank(value: Any) -> bool:
    """True for a cell without content, and for lists and records of such cells."""
    if is_hollow(value):
        return True
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null", "None")
    if isinstance(value, dict):
        return all(map(_is_blank, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_blank, value))
    return False


def _is_media(value: Any) -> bool:
    """True for a decoded picture, sound or film, for bytes, and for the record in which `datasets` stores them."""
    if isinstance(value, list | tuple):
        return any(map(_is_media, value))
    if isinstance(value, dict):
        return value.keys() == {"bytes", "path"} or {"array", "sampling_rate"} <= value.keys()
    if isinstance(value, bytes | bytearray):
        return True
    module = type(value).__module__
    return module.startswith(("PIL.", "torchcodec", "torchvision", "datasets.features"))


def is_conversation(value: Any) -> bool:
    """True for a list of turns, `{role, content}` or `{from, value}`, which may be written as JSON."""
    value = _parsed(value)
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(map(_is_turn, value))


def _is_turn(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    has_speaker = "role" in value or "from" in value
    return has_speaker and ("content" in value or "value" in value)


def _parsed(value: Any) -> Any:
    """Returns the value of JSON text that holds a list or record, and everything else as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


# --- copies of what was read ------------------------------------------------------------------------------------------

_SURE = 20
"""A text of this many characters is a copy if it occurs in what was read. A shorter one must equal a message."""
_MARKUP = re.compile(
    r"<\|[^<>|]{1,40}\|>\s*(?:user|assistant|system|tool)?\b|<[^<>]{1,40}>|\[/?(?:INST|SYS)\]"
    r"|below is an instruction that describes a task(?:, paired with an input that provides further context)?\."
    r" write a response that appropriately completes the request\."
    r"|\b(?:human|user|prompter|assistant|gpt|system|instruction|question|answer|input|response|prompt|q|a) ?:"
    r"|\b(?:user|assistant|system)\b(?=\s*$)",
    re.IGNORECASE,
)
"""What templates and transcripts write around the texts."""


_TEXT_FIELDS = (
    "content",
    "value",
    "text",
    "input",
    "output",
    "instruction",
    "prompt",
    "response",
    "question",
    "answer",
)
"""Fields of turns and other records that hold text."""


class _WhatWasRead:
    """The texts of one converted row: prompt and answers, as a whole and message by message."""

    def __init__(self, result: Any):
        self.is_demonstration = False
        self.parts: set[str] = set()
        self.n_questions: set[int] = set()
        """Number of user messages, for a column that counts turns."""
        for row in result if isinstance(result, list) else [result]:
            if isinstance(row, dict) and "prompt" in row:
                self._add(row)
        self.parts.discard("")
        self._all = " \n ".join(self.parts)

    def _add(self, row: Row) -> None:
        self.is_demonstration = "completion" in row
        answers = row.get("completions") or [row.get("completion")]
        for text in (row["prompt"], *answers):
            self._add_text(text)
        for answer in answers:
            self.n_questions.add(_n_questions(row["prompt"]) + _n_questions(answer))

    def _add_text(self, text: str | Messages | None) -> None:
        if isinstance(text, list):
            self.parts.add(_squeezed(plain_text(text)))
        self.parts.update(map(_squeezed, _texts_in(text)))

    def holds(self, cell: Any) -> bool:
        """True if every text of the cell was read."""
        texts = [_squeezed(text) for text in _texts_in(_parsed(cell))]
        return all(map(self._holds_text, texts))

    def _holds_text(self, text: str) -> bool:
        if not text or text in self.parts:
            return True
        if len(text) >= _SURE and re.search(rf"(?<!\w){re.escape(text)}(?!\w)", self._all):
            return True
        return self._is_rendered(text)

    def _is_rendered(self, text: str) -> bool:
        """True if the text is nothing but texts that were read and the markup of a template between them."""
        rest = text
        # The longest first, so that a part of another part is not taken out of it.
        for part in sorted(self.parts, key=len, reverse=True):
            rest = rest.replace(part, " ")
        if rest == text:
            return False
        rest = _MARKUP.sub(" ", rest)
        return not re.search(r"\w", rest)


def _n_questions(text: str | Messages | None) -> int:
    if not isinstance(text, list):
        return 0
    return sum(message.get("role") == "user" for message in text)


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _texts_in(value: Any) -> list[str]:
    """Returns the texts in a cell: itself, those of a list, or the contents of turns and parts, without speakers."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list | tuple):
        return [text for entry in value for text in _texts_in(entry)]
    if not isinstance(value, dict):
        return []
    texts = []
    for name, entry in value.items():
        # Lists and records are searched under any name, since parts of messages are nested.
        if name in _TEXT_FIELDS or isinstance(entry, list | dict):
            texts += _texts_in(entry)
    return texts


def _is_copy(column: str, meaning: str, converted: list[tuple[Row, _WhatWasRead]]) -> bool:
    """True if all cells of the column repeat what was read from their rows."""
    if meaning not in (PROMPT, ANSWER, THINKING, TEXT, RECORDS, TURN):
        return False
    n_compared = 0
    for row, was_read in converted:
        cell = row.get(column)
        if _is_blank(cell):
            continue
        n_compared += 1
        if meaning == TURN:
            # WildChat and the Arena count the turns of the conversation. MT-Bench names the turn that was judged.
            repeats = list(was_read.n_questions) == [cell]
        else:
            repeats = bool(_texts_in(_parsed(cell))) and was_read.holds(cell)
        if not repeats:
            return False
    return n_compared > 0


# --- the account ------------------------------------------------------------------------------------------------------


def account(
    profile: Profile,
    read: Collection[str],
    converted: Iterable[tuple[Row, Any]] = (),
    ignore: Collection[str] = (),
    *,
    known: Collection[str] = (),
    source: str = "",
) -> dict[str, str]:
    """Returns the columns that were not read, each with what it looks like.

    A column that repeats what was read (equal texts or messages, or the same texts rendered by a template) counts as
    read, and is not in the result.

    Args:
        profile: The columns and the first rows of the source.
        read: Columns that the reader reads.
        converted: Some of the rows, each with what it was converted to: one row, several, or the reason for none.
        ignore: Columns that the user waives.
        known: Columns of a published set that are known to be metadata.
        source: Name of the source, for the message.

    Raises:
        UnreadColumn: A column that was not read looks as if it mattered.
    """
    with_texts = [(row, _WhatWasRead(result)) for row, result in converted if isinstance(result, dict | list)]
    reads_a_prompt = _reads_a_prompt(profile, read)
    are_demonstrations = any(was_read.is_demonstration for _, was_read in with_texts)
    unread = {}
    stops = {}
    for column, values in profile.values.items():
        if column in read:
            continue
        meaning = METADATA if column in known else _meaning_beside(column, values, reads_a_prompt, are_demonstrations)
        if _is_copy(column, meaning, with_texts):
            continue
        if meaning in MEANINGFUL and column in ignore:
            meaning += IGNORED
        unread[column] = meaning
        if meaning in MEANINGFUL:
            stops[column] = meaning
    if stops:
        raise UnreadColumn(_refusal(stops, source))
    return unread


def _reads_a_prompt(profile: Profile, read: Collection[str]) -> bool:
    """Whether a column with a question or conversation was read."""
    for column in read:
        values = profile.values.get(column, ())
        if normal_name(column) != "system" and meaning_of(column, values) == PROMPT:
            return True
    return False


def _meaning_beside(column: str, values: Collection[Any], reads_a_prompt: bool, are_demonstrations: bool) -> str:
    """Returns what a column looks like beside the columns that were read."""
    meaning = meaning_of(column, values)
    words = normal_name(column).split("_")
    first_word = words[0]
    # Beside a comparison, thoughts are those of the judge, unless the name says whose they are.
    if meaning == THINKING and not are_demonstrations and words == _without_answers(_without_sides(words)):
        return TEXT
    # MetaMathQA's `original_question` is what `query` was made from.
    if meaning == PROMPT and reads_a_prompt and first_word in _BEFORE_EDITING:
        return TEXT
    return meaning


def _refusal(stops: Mapping[str, str], source: str, row: int | None = None) -> str:
    """Returns the line that names the columns and the ways on."""
    where = source or "dataset"
    if row is not None:
        where += f" row {row}"
    names = list(stops)
    shown = [f"{_printable(name)} (looks like {stops[name]})" for name in names[:4]]
    if len(names) > 4:
        shown.append(f"{len(names) - 4} more")
    noun = "column" if len(names) == 1 else "columns"
    verb = "is" if len(names) == 1 else "are"
    waive = ", ".join(f'"{_printable(name)}"' for name in names[:4])
    if len(names) > 4:
        waive += ", …"
    if MEDIA in stops.values():
        way_on = "images, audio and video are not supported: use a text dataset"
    elif THINKING in stops.values():
        way_on = "write it into the answers as reasoning_content of the message"
    else:
        way_on = "say what to do with columns={…} (recipes: --columns)"
    listed = ", ".join(shown)
    return f"{where}: {noun} {listed} {verb} not read: {way_on}, or leave out with ignore=[{waive}] (--ignore)."


def _printable(name: str) -> str:
    # A message is one line, so a line break in a name is escaped.
    return name if name.isprintable() else repr(name)


class ColumnWatch:
    """Looks for columns that matter and that first have values after the rows of the profile."""

    def __init__(
        self,
        profile: Profile,
        read: Collection[str],
        ignore: Collection[str] = (),
        *,
        known: Collection[str] = (),
        source: str = "",
        unread: dict[str, str] | None = None,
    ):
        """`unread` is the result of `account`, to which late columns are added."""
        self._source = source
        self._unread = {} if unread is None else unread
        self._waived = set(ignore)
        self._reads_a_prompt = _reads_a_prompt(profile, read)
        self._seen = set(profile.values) | set(read) | set(known)
        self._empty = [column for column, meaning in self._unread.items() if meaning == EMPTY]

    def check(self, row: Row, index: int, result: Any = None) -> None:
        """Raises `UnreadColumn` if the row has a value in a column that matters and had none before.

        `result` is what the row was converted to, so that a column that repeats it counts as read.
        """
        if not row.keys() <= self._seen:
            for column in row.keys() - self._seen:
                self._seen.add(column)
                self._unread[column] = EMPTY
                self._empty.append(column)
        if not self._empty:
            return
        for column in list(self._empty):
            if not _is_blank(row.get(column)):
                self._empty.remove(column)
                self._add(column, row, index, result)

    def _add(self, column: str, row: Row, index: int, result: Any) -> None:
        was_read = _WhatWasRead(result)
        meaning = _meaning_beside(column, [row[column]], self._reads_a_prompt, was_read.is_demonstration)
        if _is_copy(column, meaning, [(row, was_read)]):
            del self._unread[column]
            return
        if meaning in MEANINGFUL and column in self._waived:
            meaning += IGNORED
        self._unread[column] = meaning
        if meaning in MEANINGFUL:
            raise UnreadColumn(_refusal({column: meaning}, self._source, index))
