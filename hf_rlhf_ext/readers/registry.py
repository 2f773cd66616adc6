"""The supported public formats: the columns that identify each, where it is published, and its reader."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..data.schema import Row, own_row
from ..data.trl_rows import trl_row
from . import demonstrations as demo
from . import preferences as pref

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
            (index, row) pairs and yields a `Reading` for each group of rows that belong together.
        check: Checks the first value of each column, to distinguish formats that have the same columns.
        gathers: Whether a comparison needs several source rows.
        order_known: Whether the first completion of a pair is the one that annotators saw first.
    """

    name: str
    columns: tuple[str, ...]
    example: str
    convert: Callable[..., Any]
    check: Check = lambda first: True
    gathers: bool = False
    order_known: bool = False

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


_FEEDBACK = "openai/summarize_from_feedback"
_ARENA = "lmsys/lmsys-arena-human-preference-55k"
_STACK = "HuggingFaceH4/stack-exchange-preferences"
_TREES = "OpenAssistant/oasst1, its tree files"
_VICUNA = "anon8231489123/ShareGPT_Vicuna_unfiltered"
_ORCA = "Intel/orca_dpo_pairs, argilla/distilabel-intel-orca-dpo-pairs"
_TRL = "Anthropic/hh-rlhf, trl-lib/ultrafeedback_binarized"

COMPARISONS = (
    Format("comparisons", ("prompt", "completions", "pairs", "targets"), "what this library writes", own_row),
    Format(
        "summarize-from-feedback",
        ("info", "summaries", "choice"),
        _FEEDBACK,
        pref.summarize_from_feedback,
        order_known=True,
    ),
    Format("shp", ("history", "human_ref_A", "human_ref_B", "labels"), "stanfordnlp/SHP", pref.shp),
    Format(
        "stack-exchange-paired",
        ("question", "response_j", "response_k"),
        "lvwerra/stack-exchange-paired",
        pref.stack_paired,
    ),
    Format("stack-exchange", ("question", "answers"), _STACK, pref.stack_exchange, _lists("answers", "pm_score")),
    Format("nectar", ("prompt", "answers"), "berkeley-nest/Nectar", pref.nectar, _lists("answers", "rank")),
    Format(
        "ultrafeedback",
        ("instruction", "completions"),
        "openbmb/UltraFeedback",
        pref.ultrafeedback,
        _lists("completions", "response"),
    ),
    Format(
        "arena",
        ("conversation_a", "conversation_b", "winner"),
        "lmsys/chatbot_arena_conversations",
        pref.arena,
        order_known=True,
    ),
    Format(
        "arena-responses",
        ("prompt", "response_a", "response_b", "winner_model_a", "winner_tie"),
        _ARENA,
        pref.arena_responses,
        order_known=True,
    ),
    Format(
        "pandalm",
        ("instruction", "response1", "response2", "annotator1"),
        "PandaLM's test set",
        pref.pandalm,
        order_known=True,
    ),
    Format(
        "alpaca-farm",
        ("instruction", "output_1", "output_2", "preference"),
        "tatsu-lab/alpaca_farm",
        pref.alpaca_farm,
        order_known=True,
    ),
    Format("oasst-tree", ("prompt", "message_tree_id"), _TREES, pref.oasst_tree, _is("prompt", dict)),
    Format(
        "oasst",
        ("message_id", "parent_id", "text", "role", "rank"),
        "OpenAssistant/oasst2",
        pref.gather_oasst,
        gathers=True,
    ),
    Format(
        "ranked-outputs",
        ("instruction", "output"),
        "LLaMA-Factory's oaast_rm",
        pref.ranked_outputs,
        _is("output", list),
    ),
    Format(
        "sharegpt-preference", ("conversations", "chosen", "rejected"), "llamafactory/DPO-En-Zh-20k", pref.share_gpt
    ),
    Format(
        "instruction-preference",
        ("instruction", "chosen", "rejected"),
        "LLaMA-Factory's alpaca preference form",
        pref.asked("instruction"),
        _lacks("prompt"),
    ),
    Format("question-preference", ("question", "chosen", "rejected"), _ORCA, pref.asked("question"), _lacks("prompt")),
    Format("question-preference", ("input", "chosen", "rejected"), _ORCA, pref.asked("input"), _lacks("prompt")),
    Format("trl", ("chosen", "rejected"), _TRL, trl_row),
    Format("unpaired", ("label", "messages"), "LLaMA-Factory's kto_en_demo", pref.gather_unpaired, gathers=True),
    Format("unpaired", ("label", "prompt", "completion"), "trl-lib/kto-mix-14k", pref.gather_unpaired, gathers=True),
)
"""Preference formats, in the order in which they are tried. A later format may need only a subset of the columns of an
earlier one."""

DEMONSTRATIONS = (
    Format("orca", ("system_prompt", "question", "response"), "Open-Orca/OpenOrca", demo.orca),
    Format("dolly", ("instruction", "response"), "databricks/databricks-dolly-15k", demo.dolly),
    Format("alpaca", ("instruction", "output"), "tatsu-lab/alpaca", demo.alpaca, _is("output", str)),
    Format("sharegpt", ("conversations",), _VICUNA, demo.share_gpt, _lists("conversations", "value", "content")),
    Format("lima", ("conversations",), "GAIR/lima", demo.lima, _lists("conversations")),
    Format("messages", ("messages",), "HuggingFaceH4/no_robots", demo.chat),
    Format("prompt-completion", ("prompt", "completion"), "trl-lib/tldr", demo.prompt_completion),
    Format("gpt4all", ("prompt", "response"), "nomic-ai/gpt4all-j-prompt-generations", demo.gpt4all),
    Format(
        "oasst-text",
        ("text",),
        "timdettmers/openassistant-guanaco",
        demo.oasst_text,
        lambda first: "### Assistant:" in str(first["text"]),
    ),
)
"""Demonstration formats, in the order in which they are tried."""
