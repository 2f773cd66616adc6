"""What a row gives the chat template besides its messages: the columns `tools` and `chat_template_kwargs`.

`tools` is the JSON text of a list of function schemas, as TRL's trainers take it. As text, it keeps every type and the
order of the fields, which an Arrow column would not. `chat_template_kwargs` is a record, such as
`{"enable_thinking": false}`, or its JSON text.
"""

import json
from collections.abc import Mapping
from typing import Any

Row = dict[str, Any]
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")


def tools_text(value: Any) -> str | None:
    """Returns function schemas as the JSON text of a list. None for no tools: None, empty text, an empty list.

    Text that is a JSON list is returned unchanged.

    Raises:
        ValueError: The value is neither JSON text nor a list of records.
    """
    tools = json.loads(value) if isinstance(value, str) and value.strip() else value
    if tools in (None, "", [], {}) or isinstance(tools, str) and not tools.strip():
        return None
    if isinstance(tools, dict):
        return json.dumps([tools], ensure_ascii=False)
    if not isinstance(tools, list):
        raise ValueError("tools are not a list of records")
    # Some datasets have a list of JSON texts.
    records = [json.loads(tool) if isinstance(tool, str) else tool for tool in tools]
    if not all(isinstance(tool, dict) for tool in records):
        raise ValueError("tools are not a list of records")
    return value if isinstance(value, str) and records == tools else json.dumps(records, ensure_ascii=False)


def template_kwargs(value: Any) -> dict[str, Any]:
    """Returns arguments of the chat template as a dict. The value is a record, its JSON text, or None.

    Raises:
        ValueError: The value is something else.
    """
    if isinstance(value, str):
        value = json.loads(value) if value.strip() else None
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError("chat_template_kwargs is not a record")
    # Arrow fills in the arguments that only other rows have with None.
    return {name: entry for name, entry in value.items() if entry is not None}


def template_columns(
    row: Row,
    flags: list[str],
    *,
    tools: str | None = "tools",
    kwargs: str | None = "chat_template_kwargs",
) -> dict[str, Any]:
    """Reads both columns of a source row. A cell that is not usable is left out, and flagged.

    Args:
        row: Row of the source.
        flags: Flags of the row, to which `bad_tools` and `bad_chat_template_kwargs` are added.
        tools: Column of the function schemas.
        kwargs: Column of the arguments of the chat template.

    Returns:
        The columns that are not empty.
    """
    columns: dict[str, Any] = {}
    for name, column, read in (("tools", tools, tools_text), ("chat_template_kwargs", kwargs, template_kwargs)):
        if column is None or row.get(column) is None:
            continue
        try:
            value = read(row[column])
        except (TypeError, ValueError, RecursionError):
            flags.append(f"bad_{name}")
            continue
        if value:
            columns[name] = value
    return columns


def template_options(row: Row) -> dict[str, Any]:
    """Returns the arguments of `apply_chat_template` that a row gives: `tools`, and those of `chat_template_kwargs`.

    Cells that are not usable are left out.
    """
    columns = template_columns(row, [])
    options = dict(columns.get("chat_template_kwargs", {}))
    if "tools" in columns:
        options["tools"] = json.loads(columns["tools"])
    return options
