# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-rlhf-ext==0.1.*"]
# ///
"""Lets base, SFT policy and policy answer the same questions, with the reward of each answer.

hf-rlhf chat runs/mine
hf-rlhf chat runs/sft runs/ppo --reward_model runs/reward
echo "What is rain?" | hf-rlhf chat runs/mine

In a terminal, /help lists the commands, Ctrl-C stops an answer, and Ctrl-D ends the chat. From a pipe, each line is a
question, and each answer is a line of the form `policy (reward +0.83): text`.
"""

# First, because it hides messages of other libraries that appear when they are imported.
from hf_rlhf_ext.cli.parsing import run_recipe

# isort: split
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from hf_rlhf_ext.cli import main_options
from hf_rlhf_ext.cli.quiet import library_output
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.recipes.chat_parts.models import load_cast
from hf_rlhf_ext.recipes.chat_parts.options import AnswerArguments, CastArguments, parse_with_models
from hf_rlhf_ext.recipes.chat_parts.plan import make_plan
from hf_rlhf_ext.recipes.chat_parts.rewards import RewardSum, check_functions
from hf_rlhf_ext.recipes.chat_parts.session import Session
from hf_rlhf_ext.recipes.chat_parts.views import PlainView, TerminalView

ARGUMENTS = (CastArguments, AnswerArguments)
PROMPT = "you> "


def parse(words: Sequence[str]) -> tuple[Any, ...]:
    """The options of a command line, on which models may stand outside of options."""
    return parse_with_models(ARGUMENTS, words, __doc__, main_options.CHAT)


def chat(args: CastArguments, options: AnswerArguments) -> None:
    """Loads the models, and answers the lines of stdin until they end."""
    if sys.stdin is None:  # closed, as in a service
        raise UserError("chat: there is no stdin to read questions from: use a terminal or a pipe.")
    plan = make_plan(args)
    check_functions(plan.functions, [], where="a chat (hf-rlhf generate has the columns of --prompts)")
    is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
    for stream in (sys.stdin, sys.stdout):  # a wrong byte in a question must not end the chat
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    view = TerminalView() if is_interactive else PlainView()
    for note in (*plan.notes, plan.note_on_length(options.max_new_tokens)):
        if note is not None:
            view.note(note)
    if is_interactive:
        view.note(f"loading {', '.join(spec.name for spec in plan.specs)} …")
    cast = load_cast(plan, args)
    system = plan.system if options.system is None else options.system
    session = Session(cast, options, view, system=system or None, can_be_stopped=is_interactive)
    session.greet()
    if plan.reward_model is not None:
        view.note(f"rewards by {plan.reward_model}")
    if isinstance(cast.scorer, RewardSum):
        view.note(cast.scorer.formula)
    if sys.stdin.isatty():  # also where the answers go to a file
        view.note("Type a question. /help lists the commands, Ctrl-D ends the chat.")
    for line in interactive_lines() if is_interactive else sys.stdin:
        if not session.take(line):
            break


def interactive_lines() -> Iterator[str]:
    """The lines that the user types, with the history of the terminal. Ends at Ctrl-D, and at Ctrl-C."""
    try:
        import readline  # noqa: F401  # `input` then edits lines, and knows earlier ones
    except ImportError:  # Windows
        pass
    while True:
        try:
            line = input(PROMPT)
        except (EOFError, KeyboardInterrupt):
            print()
            return
        yield line


def main() -> None:
    args, options = parse(sys.argv[1:])
    with library_output(verbose=False):
        chat(args, options)


if __name__ == "__main__":
    run_recipe(main)
