"""Looks at the user's files: which role each has, how it is read, and what its first row is."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten
from typing import Any

from hf_rlhf_ext.cli.functions import functions_of_file
from hf_rlhf_ext.cli.rows import describe_comparisons
from hf_rlhf_ext.data.text import is_messages, plain_text
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.readers.columns import normal_name
from hf_rlhf_ext.readers.files import KINDS, kind_of
from hf_rlhf_ext.readers.formats import UnknownFormat
from hf_rlhf_ext.readers.guessing import ANSWER, has_several_answers
from hf_rlhf_ext.readers.looking import SPLIT, Look, look, profile_of_source
from hf_rlhf_ext.readers.profile import Profile
from hf_rlhf_ext.readers.prompts import load_prompts, prompt_column

DATA = ("demonstrations", "comparisons", "prompts")
"""Roles of files with rows, by their names in the pipeline's YAML."""
MODELS = {"reward_model": "reward_model", "sft": "sft_policy", "policy": "sft_policy"}
"""Role of a folder with a model, by the kind of its card."""
ENDINGS = (*KINDS, ".parquet", *(f"{kind}.gz" for kind in KINDS))
NAMES_OF_ANSWERS = ("chosen", "rejected", *ANSWER)
PLAIN: dict[str, Any] = {"columns": None, "ignore": ()}
"""Options of reading a file by its own columns."""
NO_COLUMNS = ("verdict_is", "as_text", "repeats")
"""Roles whose value is no name of a column."""
WIDTH = 60
"""Characters of a text that are shown."""


@dataclass
class Found:
    """What one of the user's files is.

    Attributes:
        given: The file as the user named it.
        role: `demonstrations`, `comparisons`, `prompts`, `reward_funcs`, `reward_model` or `sft_policy`.
        lines: What to say about it.
        n_rows: Number of rows that can be used; for comparisons, of prompts.
        columns: Role -> column, for the section of the YAML; empty if the file is read without it.
        ignore: Columns that are left out on the user's word.
        functions: Names of reward functions, as `rewards.py:short`.
        is_read_by_users_word: Whether the roles or the columns to ignore that the user gave are those of this file.
    """

    given: str
    role: str
    lines: list[str] = field(default_factory=list)
    n_rows: int = 0
    columns: dict[str, Any] = field(default_factory=dict)
    ignore: list[str] = field(default_factory=list)
    functions: list[str] = field(default_factory=list)
    is_read_by_users_word: bool = False


# --- which files -----------------------------------------------------------------------------------------------------


def expand(given: Iterable[str]) -> list[str]:
    """The files of a folder that has several of the user's files. Other names are returned as they are."""
    names: list[str] = []
    for name in given:
        path = Path(name).expanduser()
        if path.is_dir() and not is_one_source(path):
            files = files_in(path)
            if not files:
                raise UserError(f"{name}: the folder has no data: give files ({', '.join(KINDS)}, .parquet, .py).")
            names += files
        else:
            names.append(name)
    return list(dict.fromkeys(names))


def is_one_source(folder: Path) -> bool:
    """Whether a folder is a model, or one dataset with its splits."""
    if role_of_model(folder) is not None:
        return True
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        return True
    return any(file.name.startswith(("train.", "train-")) for file in folder.iterdir() if file.is_file())


def files_in(folder: Path) -> list[str]:
    """The files of a folder that look like data or reward functions, in the order of their names."""
    files = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and _looks_like_data(path):
            files.append(str(path))
    return files


def _looks_like_data(path: Path) -> bool:
    """Whether a file that nobody named may be data. Texts and programs are only taken by their names."""
    name = path.name.lower()
    if name.startswith((".", "_")):
        return False
    if path.suffix == ".py":
        return "reward" in name and bool(functions_of_file(path))
    if kind_of(path) == "text":
        return "prompt" in name or "question" in name
    if name in ("package.json", "tsconfig.json", "manifest.json", "config.json", "report.json"):
        return False
    return name.endswith(ENDINGS)


# --- one file --------------------------------------------------------------------------------------------------------


def look_at(
    given: str,
    role: str | None = None,
    *,
    columns: Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
) -> Found:
    """Finds out what a file, folder or dataset id is.

    Args:
        given: the file as the user named it.
        role: its role if the user said it; otherwise it is found.
        columns: the user's roles of columns, for the files that have these columns.
        ignore: columns that need not be read, for these files.

    Raises:
        UserError: it does not exist, or it is not clear what it holds.
    """
    path = Path(given).expanduser()
    if path.suffix == ".py":
        return _functions(given, path)
    if path.is_dir():
        of_model = role_of_model(path)
        if of_model is not None:
            return Found(given, of_model, [f"{_in_words(of_model)}: no rows needed for it"])
    elif not path.exists():
        _check_exists(given, path)
    if kind_of(path) == "text" and path.is_file():
        return _prompts(given, columns=None)
    if columns or ignore:
        return _by_the_users_word(given, role, {"columns": columns, "ignore": tuple(ignore)})
    return _rows(given, role, PLAIN)


def _by_the_users_word(given: str, role: str | None, options: dict[str, Any]) -> Found:
    """Reads a file by the user's roles of columns; one that lacks these columns is read without them."""
    try:
        found = _rows(given, role, options)
    except UserError as error:
        if "is no column" not in str(error):
            raise
        return _rows(given, role, PLAIN)
    found.is_read_by_users_word = True
    return found


def _check_exists(given: str, path: Path) -> None:
    is_hub_id = given.count("/") == 1 and not path.suffix and not given.startswith((".", "~", "/"))
    if not is_hub_id:
        near = [file for file in files_in(path.parent)] if path.parent.is_dir() else []
        there = f" (found {', '.join(Path(file).name for file in near[:6])})" if near else ""
        raise UserError(f"{given}: there is no such file{there}: check the name.")


def role_of_model(folder: Path) -> str | None:
    """The role of a folder with a model; None for any other folder."""
    try:
        kind = json.loads((folder / "report.json").read_text(encoding="utf-8"))["card"]["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        kind = None
    if kind in MODELS:
        return MODELS[kind]
    if (folder / "reward_normalization.json").is_file() or (folder / "ensemble.json").is_file():
        return "reward_model"
    is_model = any((folder / name).is_file() for name in ("adapter_config.json", "config.json"))
    return "sft_policy" if is_model else None


def _functions(given: str, path: Path) -> Found:
    if not path.is_file():
        raise UserError(f"{given}: there is no such file: check the name.")
    names = functions_of_file(path)
    if not names:
        raise UserError(f"{given}: it has no function that takes `completions`: see docs/how_to/reward_functions.md.")
    functions = [f"{given}:{name}" for name in names]
    return Found(given, "reward_funcs", [f"reward functions: {', '.join(names)}"], functions=functions)


def _rows(given: str, role: str | None, options: Mapping[str, Any]) -> Found:
    """Reads a file as comparisons, else as demonstrations, else as prompts."""
    looks: dict[str, Look] = {}
    refusals: dict[str, UserError] = {}
    for kind in ("comparisons", "demonstrations"):
        is_clear = kind == "demonstrations" and _has_most_rows(looks.get("comparisons"))
        if role in (None, kind) and not is_clear:
            try:
                looks[kind] = look(given, kind, **options)
            except UserError as error:
                refusals[kind] = error
    if role != "prompts":
        best = _better_of(looks)
        if best is not None:
            return _found(given, best, options)
        clear = [error for error in refusals.values() if not isinstance(error, UnknownFormat)]
        if clear or role is not None:
            raise (clear or list(refusals.values()))[0]
    try:
        return _prompts(given, options["columns"], only_prompts=role is None)
    except UserError as error:
        if not refusals:
            raise
        raise max(refusals.values(), key=_n_columns_found) from error


def _n_columns_found(refusal: UserError) -> int:
    """Number of columns in the reading that a refusal proposes: of two proposals, that with more is the nearer one."""
    proposal = re.search(r"columns=({.*}) \(--columns\)", str(refusal))
    if proposal is None:
        return 0
    names = []
    for role, value in json.loads(proposal[1]).items():
        if role != "verdict_is":
            names += value if isinstance(value, list) else [value]
    return sum("…" not in str(name) for name in names)


def _has_most_rows(seen: Look | None) -> bool:
    """Whether a reading keeps half of the rows, so that no other one comes before it: a large file is read once."""
    return seen is not None and 2 * seen.report.kept >= seen.report.rows_in


def _better_of(looks: Mapping[str, Look]) -> Look | None:
    """Comparisons, unless most rows are lost in them and not as demonstrations."""
    comparisons = looks.get("comparisons")
    demonstrations = looks.get("demonstrations")
    if comparisons is None or demonstrations is None:
        return comparisons or demonstrations
    if 2 * comparisons.report.kept < demonstrations.report.kept:
        return demonstrations
    return comparisons


def _found(given: str, seen: Look, options: Mapping[str, Any]) -> Found:
    how = how_read(seen)
    if seen.kind == "comparisons":
        what = describe_comparisons(seen.rows, seen.report)
    else:
        what = f"{seen.report.summary()}; {len(seen.rows)} answers to train on"
    what = what.removeprefix(f"{seen.report.source}: ")
    lines = [f"{seen.kind}: {what}", how, f"first: {_first_row(seen)}"]
    # A known format is found again without help. Guessed roles are written down, to be seen and changed.
    columns = seen.columns if seen.format is None or options["columns"] else {}
    return Found(given, seen.kind, lines, len(seen.rows), columns, list(options["ignore"]))


def _prompts(given: str, columns: Mapping[str, Any] | None, *, only_prompts: bool = False) -> Found:
    """Reads a file of prompts.

    Args:
        only_prompts: whether a file is refused that has other texts too, which may be answers.
    """
    is_text_file = kind_of(Path(given).expanduser()) == "text"
    if not is_text_file and columns is None:
        profile = profile_of_source(given)
        column = prompt_column(profile.columns)
        if column is None:
            raise UserError(f"{given}: no column has prompts.")
        if only_prompts and _may_have_answers(profile, column):
            raise UserError(f"{given}: it is not clear which columns are answers.")
        columns = None if column == "prompt" else {"prompt": column}
    rows, report = load_prompts(given, SPLIT, columns=columns)
    how = "one prompt a line" if is_text_file else f"read by columns: {roles_in_words(columns or {'prompt': 'prompt'})}"
    what = report.summary().removeprefix(f"{report.source}: ")
    first = quoted(rows[0]["prompt"])
    return Found(given, "prompts", [f"prompts: {what}", how, f"first: {first}"], len(rows), dict(columns or {}))


def _may_have_answers(profile: Profile, prompt: str) -> bool:
    """Whether another column than the prompt's has sentences, or a name like that of an answer, misspelt or not."""
    if has_several_answers(profile.first):
        return True
    for column, values in profile.values.items():
        if column == prompt:
            continue
        if _are_sentences(values) or get_close_matches(normal_name(column), NAMES_OF_ANSWERS, n=1, cutoff=0.75):
            return True
    return False


def _are_sentences(values: Sequence[Any]) -> bool:
    return bool(values) and all(isinstance(value, str) and len(value.split()) > 3 for value in values)


# --- what to show ----------------------------------------------------------------------------------------------------


def roles_in_words(columns: Mapping[str, Any]) -> str:
    """`prompt = question, answers = answer_a and answer_b, verdict = winner (A or B)`."""
    parts = []
    for role, value in columns.items():
        if role in NO_COLUMNS:
            continue
        names = " and ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        meaning = f" ({columns['verdict_is']})" if role == "verdict" and "verdict_is" in columns else ""
        parts.append(f"{role} = {names}{meaning}")
    return ", ".join(parts)


def how_read(seen: Look) -> str:
    """`read by the columns chosen and rejected (format trl)`, or the roles of columns without a known format."""
    if seen.format is None:
        return f"read by columns: {roles_in_words(seen.columns)}"
    names: list[str] = []
    for role, value in seen.columns.items():
        if role not in NO_COLUMNS:
            names += value if isinstance(value, list | tuple) else [value]
    names = list(dict.fromkeys(names))
    if not names:
        return f"read as a known format: {seen.format}"
    which = f"columns {' and '.join(names)}" if len(names) > 1 else f"column {names[0]}"
    return f"read by the {which} (format {seen.format})"


def _first_row(seen: Look) -> str:
    row = seen.rows[0]
    prompt = quoted(row["prompt"])
    if seen.kind == "demonstrations":
        return f"{prompt} -> {quoted(row['completion'])}"
    (i, j), target = row["pairs"][0], row["targets"][0]
    if target < 0.5:
        i, j = j, i
    sign = "is as good as" if target == 0.5 else "is better than"
    return f"{prompt} -> {quoted(row['completions'][i])} {sign} {quoted(row['completions'][j])}"


def quoted(text: Any) -> str:
    """A text or message on one line and shortened; of several messages, the first and the last one with their roles."""
    if is_messages(text) and len(text) > 1:
        turns = [f"{turn['role']}: {_on_one_line(plain_text([turn]))}" for turn in (text[0], text[-1])]
        shown = (" / " if len(text) == 2 else " / … / ").join(turns)
    else:
        shown = _on_one_line(plain_text(text))
    return json.dumps(shown, ensure_ascii=False)


def _on_one_line(text: str) -> str:
    words = " ".join(text.split())
    shown = shorten(words, WIDTH, placeholder=" …")
    if shown == "…":  # the first word is longer, as in a language without spaces
        return f"{words[:WIDTH]} …"
    return shown


def _in_words(role: str) -> str:
    return {"reward_model": "a reward model", "sft_policy": "a policy to start from"}[role]


# --- all files -------------------------------------------------------------------------------------------------------


def one_of_each(found: Sequence[Found]) -> dict[str, Found]:
    """The file of each role of rows or models. Raises `UserError` for two files of one role."""
    by_role: dict[str, Found] = {}
    for one in found:
        if one.role == "reward_funcs":
            continue
        other = by_role.setdefault(one.role, one)
        if other is not one:
            raise UserError(_two_files(one.role, other.given, one.given))
    return by_role


def _two_files(role: str, first: str, second: str) -> str:
    what = f"{first} and {second} are both {role.replace('_', ' ')}"
    if role not in DATA:
        return f"{what}: give one of them."
    endings = {Path(first).suffix, Path(second).suffix}
    if endings <= {".jsonl", ".txt"} and len(endings) == 1:
        (ending,) = endings
        return f"{what}: give one, or merge them: cat {first} {second} > all{ending}"
    return f"{what}: give one, or put both into a folder of their own as train-1 and train-2, and give the folder."
