"""The code blocks of README.md and of the pages of docs/: found, checked by parsing, and run page by page.

A block of Python or bash runs unless the title of its fence starts with "Not run"; then it is parsed.
"""

import ast
import json
import re
import shlex
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from hf_rlhf_ext.cli.launch import take_launch_options
from hf_rlhf_ext.cli.main import find_command
from hf_rlhf_ext.cli.main import main as run_hf_rlhf
from hf_rlhf_ext.cli.options import machine_defaults
from hf_rlhf_ext.cli.parsing import parse_recipe

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]

EXECUTED = ("python", "bash")
CHECKED = (*EXECUTED, "yaml", "json")
NOT_CHECKED = ("text", "bibtex", "")  # output, trees of files
SETUP = re.compile(r"<!-- setup\n(.*?)-->", re.DOTALL)

# Recipes that train start from the defaults of the machine, as `main` of each does.
TRAINING = ("sft", "reward", "ppo")


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, first line, language, code and title."""

    page: str
    line: int
    language: str
    code: str
    title: str

    @property
    def runs(self) -> bool:
        return self.language in EXECUTED and not self.title.startswith("Not run")

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(path: Path) -> list[Block]:
    """All fenced blocks of a page in order, with those that a reader does not see (`<!-- setup … -->`)."""
    page = path.relative_to(ROOT).as_posix()
    blocks = []
    for token in MarkdownIt().parse(path.read_text(encoding="utf-8")):
        if token.type == "fence":
            blocks.append(_block(page, token, first_line=0))
        elif token.type == "html_block":
            hidden = SETUP.search(token.content)
            if hidden is not None:
                for inner in MarkdownIt().parse(hidden[1]):
                    if inner.type == "fence":
                        blocks.append(_block(page, inner, first_line=token.map[0] + 1))
    return blocks


def _block(page: str, fence: Token, first_line: int) -> Block:
    language, _, rest = fence.info.strip().partition(" ")
    title = re.search(r'title="([^"]*)"', rest)
    line = first_line + fence.map[0] + 1
    return Block(page, line, language, fence.content, title[1] if title else "")


def shell_lines(code: str) -> list[list[str]]:
    """The words of each command; a backslash goes on to the next line, comments are left out."""
    whole = code.replace("\\\n", " ")
    commands = []
    for line in whole.splitlines():
        words = shlex.split(line, comments=True)
        if words:
            commands.append(words)
    return commands


def as_hf_rlhf(words: list[str]) -> list[str] | None:
    """The words after `hf-rlhf`, however the command is started; None for another program."""
    program = words[0]
    if Path(program).name == "hf-rlhf":
        return words[1:]
    if Path(program).name not in ("python", "python3"):
        return None
    if words[1:3] == ["-m", "hf_rlhf_ext"]:
        return words[3:]
    recipe = Path(words[1])
    if recipe.parts[:1] == ("recipes",) and len(recipe.parts) == 2:
        return [recipe.stem.replace("_", "-"), *words[2:]]
    return None


def check(block: Block) -> None:
    """Raises where the block could not be what it says: syntax, imports, options, targets of make."""
    if block.language == "python":
        check_python(block.code)
    elif block.language == "bash":
        written: set[str] = set()
        for words in shell_lines(block.code):
            if "--config" in words and words[words.index("--config") + 1] in written:
                find_command(as_hf_rlhf(words)[0])  # what it needs is in the file that is not there
                continue
            check_command(words)
            if "init" in words and "--output" in words:
                written.add(words[words.index("--output") + 1])
    elif block.language == "yaml":
        yaml.safe_load(block.code)
    elif block.language == "json":
        json.loads(block.code)


def check_python(code: str) -> None:
    """It parses, and what it imports from this library is there."""
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("hf_rlhf_ext"):
            continue
        module = import_module(node.module)
        for alias in node.names:
            getattr(module, alias.name)


def check_command(words: list[str]) -> None:
    """The options of our own commands parse; targets and variables of make exist."""
    if words[0] == "make":
        check_make(words[1:])
        return
    ours = as_hf_rlhf(words)
    if not ours or ours[0] in ("--help", "--version"):
        return
    command = find_command(ours[0])
    _, options = take_launch_options(ours[1:])
    if "--help" in options:
        return
    if command.recipe is None:
        import_module(command.module).make_parser().parse_args(options)
        return
    stage = Path(command.recipe).stem
    if stage == "collect":
        if options:  # a subcommand, with options of its own
            import_module("recipes.collect").parse(options)
        return
    recipe = import_module(f"recipes.{stage}")
    if hasattr(recipe, "parse"):  # words outside of options
        recipe.parse(options)
        return
    defaults = machine_defaults() if stage in TRAINING else {}
    parse_recipe(recipe.ARGUMENTS, options, defaults=defaults)


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, is_variable, _ = word.partition("=")
        if is_variable:
            assert re.search(rf"\$\((if )?{name}\b|^{name} \?=", makefile, re.MULTILINE), f"make has no variable {name}"
        else:
            assert re.search(rf"^{name}:", makefile, re.MULTILINE), f"make has no target {name}"


def run_page(blocks: list[Block]) -> None:
    """Runs the blocks of a page in order, in the working folder.

    All Python blocks share one namespace; `hf-rlhf` runs in this process.
    """
    before = dict(sys.modules)
    try:
        _run_in_order(blocks)
    finally:
        _forget_modules_of_the_page(before)


def _forget_modules_of_the_page(before: dict[str, ModuleType]) -> None:
    """Another test may import a module of the same name, before or after the page."""
    for name, module in list(sys.modules.items()):
        if before.get(name) is module:
            continue
        file = getattr(module, "__file__", None)
        is_written_here = file is not None and Path(file).is_relative_to(Path.cwd())
        is_made_by_hand = getattr(module, "__spec__", None) is None
        if name in before:
            sys.modules[name] = before[name]
        elif is_written_here or is_made_by_hand:
            del sys.modules[name]


def _run_in_order(blocks: list[Block]) -> None:
    namespace = {"__name__": "docs_page"}
    for block in blocks:
        if not block.runs:
            continue
        try:
            if block.language == "python":
                # Numbered as in the page, for the traceback.
                code = "\n" * block.line + block.code
                exec(compile(code, str(block), "exec"), namespace)
            else:
                run_shell(block.code)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{block}: {type(error).__name__}: {error}") from error


def run_shell(code: str) -> None:
    for words in shell_lines(code):
        ours = as_hf_rlhf(words)
        assert ours is not None, f"{words[0]} is not run in tests: give the block a title that starts with 'Not run'"
        try:
            run_hf_rlhf(ours)
        except SystemExit as end:
            assert end.code in (None, 0), f"{shlex.join(words)}: exit status {end.code}"
