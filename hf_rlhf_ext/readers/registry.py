"""The supported public formats: the columns that identify each, where it is published, and its reader."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..data.schema import PreferenceDataError, Row, Unusable, own_row
from ..errors import first_line
from . import preferences as pref
from .guessing import has_several_answers, name_answers
from .roles import Kind, Roles, check_complete, column_of
from .verdicts import BEST_FIRST, decoder

Check = Callable[[Row], bool]
"""Checks the first value of each column, to distinguish formats that have the same columns."""


@dataclass(frozen=True)
class Format:
    """A public data format.

    Attributes:
        name: Name of the format, for the option `format`.
        columns: Columns that the data must have.
        example: A dataset in this format.
        convert: Converts a row to one or several rows, or raises `Unusable`. With `gathers`, it takes all
            (index, row) pairs and yields a `Reading` for each group of rows that belong together. `None` if `roles` say
            how to read the rows.
        check: Checks the first value of each column, to distinguish formats that have the same columns.
        gathers: Whether a comparison needs several source rows.
        order_known: Whether the first completion of a pair is the one that annotators saw first.
        roles: The roles of the columns. Optional columns, such as a system text, are found by their names.
        reads: Further columns that `convert` reads.
        known: Columns of the published data that describe the row or say the same as others. They are not read.
    """

    name: str
    columns: tuple[str, ...]
    example: str = ""
    convert: Callable[..., Any] | None = None
    check: Check = lambda first: True
    gathers: bool = False
    order_known: bool = False
    roles: Roles | None = None
    reads: tuple[str, ...] = ()
    known: tuple[str, ...] = ()

    def matches(self, first: Row) -> bool:
        """True if the data has this format. `first` maps every column to its first value that is not empty."""
        if not first.keys() >= set(self.columns):
            return False
        return self.check(first)

    def __str__(self) -> str:
        columns = ", ".join(self.columns)
        return f"{self.name} ({columns})"


def _lists(column: str, *keys: str) -> Check:
    """Makes a check that the column holds a list of records with one of these keys (without keys: a list of texts)."""

    def check(first: Row) -> bool:
        value = first[column]
        if not isinstance(value, list) or not value:
            return False
        entry = value[0]
        if not keys:
            return isinstance(entry, str)
        return isinstance(entry, dict) and not set(keys).isdisjoint(entry)

    return check


def _lacks(column: str) -> Check:
    """Makes a check that the column is missing or empty."""
    return lambda first: first.get(column) is None


def _is(column: str, kind: type) -> Check:
    """Makes a check that the column holds this type."""
    return lambda first: isinstance(first[column], kind)


def _says(column: str, meaning: str) -> Check:
    """Makes a check that the verdict is written in this way. Otherwise the names of the columns say how it is read."""
    read = decoder(meaning)

    def check(first: Row) -> bool:
        try:
            read(first[column], column)
        except Unusable:
            return False
        return True

    return check


def _has_one_answer(first: Row) -> bool:
    """A check that the label is not a verdict on several answers."""
    return not has_several_answers(first)


def _by_role(
    name: str,
    example: str,
    *,
    check: Check = lambda first: True,
    needs: tuple[str, ...] = (),
    known: tuple[str, ...] = (),
    order_known: bool = False,
    kind: Kind = "comparisons",
    **roles: Any,
) -> Format:
    """Makes a format from the roles of its columns. The data must have the columns of the roles, and `needs`."""
    by_role = Roles(kind=kind, **roles)
    columns = dict.fromkeys((*_needed_columns(by_role), *needs))

    def has_texts(first: Row) -> bool:
        is_pair = by_role.chosen is not None and by_role.rejected is not None
        return check(first) and not (is_pair and name_answers(first, by_role.chosen, by_role.rejected))

    return Format(
        name,
        tuple(columns),
        example,
        check=has_texts,
        gathers=by_role.answer is not None,
        order_known=order_known,
        roles=by_role,
        known=known,
    )


def _demonstrations(name: str, example: str, **roles: Any) -> Format:
    return _by_role(name, example, kind="demonstrations", **roles)


_OPTIONAL = {
    "system", "history", "context", "tools", "template_kwargs", "category", "annotator", "margin", "tie", "status",
    "turn", "candidates", "candidate_ratings", "repeats", "label", "rating", "verdict_is", "as_text",
}  # fmt: skip
"""Roles whose columns the data may lack."""


def _needed_columns(roles: Roles) -> list[str]:
    needed = []
    for role, value in roles.as_mapping().items():
        if role not in _OPTIONAL:
            paths = [value] if isinstance(value, str) else value
            needed += map(column_of, paths)
    return needed


_FEEDBACK = "openai/summarize_from_feedback"
_ARENA = "lmsys/lmsys-arena-human-preference-55k"
_STACK = "HuggingFaceH4/stack-exchange-preferences"
_TREES = "OpenAssistant/oasst1, its tree files"
_VICUNA = "anon8231489123/ShareGPT_Vicuna_unfiltered"
_ORCA = "Intel/orca_dpo_pairs, argilla/distilabel-intel-orca-dpo-pairs"
_TRL = "Anthropic/hh-rlhf, trl-lib/ultrafeedback_binarized"

COMPARISONS: list[Format] = [
    Format("comparisons", ("prompt", "completions", "pairs", "targets"), "what this library writes", own_row),
    Format(
        "summarize-from-feedback",
        ("info", "summaries", "choice"),
        _FEEDBACK,
        pref.summarize_from_feedback,
        reads=("worker", "extra"),
        known=("split", "batch"),
        order_known=True,
    ),
    _by_role(
        "shp",
        "stanfordnlp/SHP",
        prompt="history",
        answers=("human_ref_A", "human_ref_B"),
        verdict="labels",
        verdict_is="1 or 0",
        category="domain",
        known=("score_A", "score_B"),  # votes of Reddit, which depend on the time of the post
    ),
    _by_role(
        "stack-exchange-paired",
        "lvwerra/stack-exchange-paired",
        prompt="question",
        chosen="response_j",
        rejected="response_k",
    ),
    Format("stack-exchange", ("question", "answers"), _STACK, pref.stack_exchange, _lists("answers", "pm_score")),
    _by_role(
        "nectar",
        "berkeley-nest/Nectar",
        prompt="prompt",
        answers=("answers[].answer",),
        ranks=("answers[].rank",),
        check=_lists("answers", "rank"),
        known=("turns",),
    ),
    Format(
        "ultrafeedback",
        ("instruction", "completions"),
        "openbmb/UltraFeedback",
        pref.ultrafeedback,
        _lists("completions", "response"),
        known=("models", "correct_answers", "incorrect_answers"),
    ),
    _by_role(
        "arena",
        "lmsys/chatbot_arena_conversations",
        answers=("conversation_a", "conversation_b"),
        verdict="winner",
        verdict_is="A or B",
        check=_says("winner", "A or B"),
        known=("full_conversation", "conv_metadata", "category_tag", "openai_moderation", "toxic_chat_tag"),
        order_known=True,
    ),
    Format(
        "arena-responses",
        ("prompt", "response_a", "response_b", "winner_model_a", "winner_tie"),
        _ARENA,
        pref.arena_responses,
        reads=("winner_model_b",),
        order_known=True,
    ),
    _by_role(
        "pandalm",
        "PandaLM's test set",
        prompt="instruction",
        answers=("response1", "response2"),
        votes=("annotator1",),
        verdict_is="1 or 2, 0 is a tie",
        category="motivation_app",
        order_known=True,
    ),
    _by_role(
        "alpaca-farm",
        "tatsu-lab/alpaca_farm",
        prompt="instruction",
        answers=("output_1", "output_2"),
        verdict="preference",
        verdict_is="between 1 and 2, 0 is a tie",
        check=_says("preference", "between 1 and 2, 0 is a tie"),
        known=("raw_preference",),
        order_known=True,
    ),
    # Which answer is better decides. The safer one is another judgment: columns={"verdict": "safer_response_id"}.
    _by_role(
        "safe-rlhf",
        "PKU-Alignment/PKU-SafeRLHF",
        prompt="prompt",
        answers=("response_0", "response_1"),
        verdict="better_response_id",
        verdict_is="0 or 1",
        known=(
            "safer_response_id",
            "is_response_0_safe",
            "is_response_1_safe",
            "response_0_harm_category",
            "response_1_harm_category",
            "response_0_severity_level",
            "response_1_severity_level",
        ),
    ),
    # Helpfulness decides. The other ratings are judgments of their own: columns={"ratings": "correctness"}.
    _by_role(
        "helpsteer",
        "nvidia/HelpSteer, nvidia/HelpSteer2",
        prompt="prompt",
        answer="response",
        ratings=("helpfulness",),
        needs=("correctness", "coherence"),
        known=("correctness", "coherence", "complexity", "verbosity"),
    ),
    _by_role(
        "helpsteer-preference",
        "nvidia/HelpSteer2, its preferences",
        prompt="prompt",
        answers=("response_1", "response_2"),
        verdict="preference_strength",
        verdict_is="below zero for the first",
        check=_says("preference_strength", "below zero for the first"),
        known=(
            "preference_statement",
            "preference_elaboration",
            "three_most_similar_preferences",
            "all_preferences_unprocessed",
        ),
    ),
    # `instruction` and `output` are what a judge is asked, and its verdict.
    _by_role(
        "preference-collection",
        "prometheus-eval/Preference-Collection",
        prompt="orig_instruction",
        answers=("orig_response_A", "orig_response_B"),
        verdict="orig_preference",
        verdict_is="A or B",
        ratings=("orig_score_A", "orig_score_B"),
        known=("instruction", "input", "output", "messages", "orig_criteria", "orig_reference_answer"),
    ),
    # Of the ratings, which are in the order of `generations`, only the difference is used.
    _by_role(
        "argilla-orca",
        "argilla/distilabel-intel-orca-dpo-pairs",
        prompt="input",
        chosen="chosen",
        rejected="rejected",
        candidates="generations",
        candidate_ratings="rating",
        status="status",
        needs=("generations", "rating", "status"),
        known=("chosen_score", "labelling_prompt", "original_chosen", "original_rejected", "in_gsm8k_train"),
    ),
    # `conversation` is what the dataset was made from.
    _by_role(
        "argilla-capybara",
        "argilla/distilabel-capybara-dpo-7k-binarized",
        prompt="prompt",
        chosen="chosen",
        rejected="rejected",
        needs=("conversation", "generation_prompt"),
        known=("conversation", "generation_prompt", "raw_generation_responses", "new_generations"),
    ),
    _by_role(
        "step-dpo",
        "xinlai/Math-Step-DPO-10K",
        prompt="prompt",
        started="initial_reason_steps",
        chosen="chosen",
        rejected="rejected",
        as_text=True,
        known=("full_chosen", "full_rejected", "answer"),
    ),
    _by_role(
        "ppe-best-of-k",
        "lmarena-ai/PPE-MMLU-Pro-Best-of-K",
        prompt="prompt",
        answers=tuple(f"response_{number}" for number in range(1, 33)),
        ratings=("scores",),
        known=("answer", "ground_truth", "parsed_outputs", "mean_score", "conflict_pairs", "sampled_conflict_pairs"),
    ),
    Format("oasst-tree", ("prompt", "message_tree_id"), _TREES, pref.oasst_tree, _is("prompt", dict)),
    Format(
        "oasst",
        ("message_id", "parent_id", "text", "role", "rank"),
        "OpenAssistant/oasst2",
        pref.gather_oasst,
        gathers=True,
        known=("review_result", "review_count", "deleted", "labels", "emojis", "detoxify", "tree_state"),
    ),
    _by_role(
        "ranked-outputs",
        "LLaMA-Factory's oaast_rm",
        prompt="instruction",
        answers=("output",),
        verdict_is="best first",
        check=_is("output", list),
    ),
    _by_role(
        "sharegpt-preference",
        "llamafactory/DPO-En-Zh-20k",
        prompt="conversations",
        chosen="chosen",
        rejected="rejected",
    ),
    _by_role(
        "instruction-preference",
        "LLaMA-Factory's alpaca preference form",
        prompt="instruction",
        chosen="chosen",
        rejected="rejected",
        check=_lacks("prompt"),
    ),
    _by_role(
        "question-preference",
        _ORCA,
        prompt="question",
        chosen="chosen",
        rejected="rejected",
        check=_lacks("prompt"),
    ),
    _by_role(
        "question-preference",
        _ORCA,
        prompt="input",
        chosen="chosen",
        rejected="rejected",
        check=_lacks("prompt"),
    ),
    _by_role("trl", _TRL, chosen="chosen", rejected="rejected"),
    _by_role(
        "unpaired",
        "LLaMA-Factory's kto_en_demo",
        prompt="messages",
        answer="messages",
        verdict="label",
        check=_has_one_answer,
    ),
    _by_role(
        "unpaired",
        "trl-lib/kto-mix-14k",
        prompt="prompt",
        answer="completion",
        verdict="label",
        check=_has_one_answer,
    ),
]
"""Preference formats, in the order in which they are tried. A later format may need only a subset of the columns of an
earlier one. Data with other columns are read by the names of their columns (`guessing.py`)."""

DEMONSTRATIONS: list[Format] = [
    _demonstrations("orca", "Open-Orca/OpenOrca", prompt="question", completion="response", needs=("system_prompt",)),
    _demonstrations("dolly", "databricks/databricks-dolly-15k", prompt="instruction", completion="response"),
    _demonstrations("alpaca", "tatsu-lab/alpaca", prompt="instruction", completion="output", check=_is("output", str)),
    _demonstrations("sharegpt", _VICUNA, messages="conversations", check=_lists("conversations", "value", "content")),
    _demonstrations("lima", "GAIR/lima", messages="conversations", check=_lists("conversations")),
    _demonstrations("messages", "HuggingFaceH4/no_robots", messages="messages"),
    _demonstrations("prompt-completion", "trl-lib/tldr", prompt="prompt", completion="completion", as_text=True),
    _demonstrations("gpt4all", "nomic-ai/gpt4all-j-prompt-generations", prompt="prompt", completion="response"),
    _demonstrations(
        "oasst-text",
        "timdettmers/openassistant-guanaco",
        messages="text",
        check=lambda first: "### Assistant:" in str(first["text"]),
    ),
]
"""Demonstration formats, in the order in which they are tried. Data with other columns are read by the names of their
columns (`demonstrations.py`)."""


# --- formats of the user ----------------------------------------------------------------------------------------------


def register_format(
    name: str,
    columns: Mapping[str, Any],
    example: str = "",
    kind: Kind = "comparisons",
) -> None:
    """Adds a data format, which is then detected like the others and can be named as `format`.

    It is tried before all others. A format that was registered under the same name is replaced.

    Args:
        name: Name of the format.
        columns: Role -> column, as for `load_comparisons(…, columns=…)`.
        example: A dataset in this format.
        kind: Whether the rows are read by `load_comparisons` or by `load_demonstrations`.

    Raises:
        PreferenceDataError: A role or the meaning of the verdict is not known, nothing says which answer is better, or
            one of the library's own formats has this name.
    """
    formats = _formats_of(kind)
    by_role = Roles.from_mapping(columns, kind)
    check_complete(by_role)
    if by_role.verdict_is not in (None, BEST_FIRST):
        decoder(by_role.verdict_is)
    roles = {role: getattr(by_role, role) for role in by_role.as_mapping()}
    fmt = _by_role(name, example, kind=kind, **roles)
    if any(known.name == name and known not in _REGISTERED for known in formats):
        raise PreferenceDataError(f"register_format: {name!r} is a format of the library: choose another name.")
    formats[:] = [known for known in formats if known.name != name]
    formats.insert(0, fmt)
    _REGISTERED.append(fmt)


def register_formats(path: str | Path) -> list[str]:
    """Registers the formats of a YAML file: `name: {columns: {…}, kind: comparisons, example: …}`.

    Returns:
        The names of the formats.
    """
    path = Path(path)
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PreferenceDataError(f"{path.name}: cannot be read as YAML: {first_line(error)}") from error
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise PreferenceDataError(f"{path.name}: write each format as `name: {{columns: {{prompt: …}}}}`.")
    for name, entry in entries.items():
        unknown = entry.keys() - {"columns", "example", "kind"}
        if unknown or not isinstance(entry.get("columns"), dict):
            raise PreferenceDataError(f"{path.name}: format {name!r} needs columns, and may have example and kind.")
        register_format(str(name), **entry)
    return list(map(str, entries))


_REGISTERED: list[Format] = []


def _formats_of(kind: str) -> list[Format]:
    tables = {"comparisons": COMPARISONS, "demonstrations": DEMONSTRATIONS}
    if not isinstance(kind, str) or kind not in tables:
        raise PreferenceDataError(f"kind: {kind!r} is neither comparisons nor demonstrations.")
    return tables[kind]
