"""A conversation with several models: questions, commands, and the memory of each model."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from hf_rlhf_ext.cli.parsing import did_you_mean
from hf_rlhf_ext.data.text import Messages, Unrenderable, make_message
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.recipes.chat_parts.answers import Answer, answer_to, reward_of
from hf_rlhf_ext.recipes.chat_parts.models import Cast, Speaker
from hf_rlhf_ext.recipes.chat_parts.options import AnswerArguments, checked_seed, checked_temperature, checked_tokens
from hf_rlhf_ext.recipes.chat_parts.views import View


@dataclass(frozen=True)
class Command:
    """A line that begins with a slash.

    Attributes:
        name: the word, such as `/new`.
        value: what may follow it, for the help; empty if nothing may.
        help: what it does.
    """

    name: str
    value: str
    help: str


COMMANDS = (
    Command("/new", "", "begins a new conversation with every model"),
    Command("/system", "TEXT", "sets the system text and begins anew; without TEXT, there is none"),
    Command("/temperature", "X", "sets the temperature; 0 takes the most probable token"),
    Command("/max", "N", "sets the largest number of tokens of an answer"),
    Command("/seed", "N", "sets the seed, so that the next answers can be repeated"),
    Command("/help", "", "shows these commands"),
    Command("/quit", "", "ends the chat, as Ctrl-D does"),
)


@dataclass
class Session:
    """A conversation that every model has with the user by itself.

    Args:
        cast: the models and the reward model.
        options: how answers are sampled; commands change them.
        view: shows answers and notes.
        system: the system text; `None` for none.
        can_be_stopped: whether Ctrl-C stops an answer, and not the program.
    """

    cast: Cast
    options: AnswerArguments
    view: View
    system: str | None = None
    can_be_stopped: bool = False
    histories: dict[str, Messages] = field(default_factory=dict)
    n_asked: int = 0

    def greet(self) -> None:
        """Says with which system text the models are asked, and which of them continue text."""
        if self.system:
            self.view.note(f"system text: {self.system}")
        note = self.cast.note_on_text_models(self.system)
        if note is not None:
            self.view.note(note)

    def take(self, line: str) -> bool:
        """Answers a line, or does what it commands. Returns whether the chat goes on."""
        line = line.strip()
        if not line:
            return True
        if not line.startswith("/"):
            self.ask(line)
            return True
        name, _, value = line.partition(" ")
        try:
            return self.do(name, value.strip())
        except UserError as error:
            self.view.note(str(error))
            return True

    # ---- Questions ----

    def ask(self, question: str) -> None:
        """Lets every model answer a question."""
        seed = self.options.seed + self.n_asked
        self.n_asked += 1
        for speaker in self.cast.speakers:
            try:
                self._answer(speaker, question, seed)
            except UserError as error:  # of one model: the others may well answer
                reason = error.reason if isinstance(error, Unrenderable) else str(error)
                self.view.note(f"{speaker.name}: {reason}")

    def _answer(self, speaker: Speaker, question: str, seed: int) -> None:
        prompt = self.prompt_for(speaker, question)
        self.view.begin(speaker.name)
        with self._stoppable() as is_stopped:
            answer = answer_to(speaker, prompt, self.options, seed=seed, show=self.view.piece, is_stopped=is_stopped)
            reward, problem = self._reward(speaker, prompt, answer)
        remark = "; ".join(part for part in (self._remark_on(answer), problem) if part)
        self.view.end(speaker.name, answer.text, reward, remark)
        if speaker.uses_messages:
            self.histories[speaker.name] = [*prompt, *answer.completion]

    def prompt_for(self, speaker: Speaker, question: str) -> str | Messages:
        """The question after what this model was asked and answered before. Text models get the question alone."""
        if not speaker.uses_messages:
            return question
        history = self.histories.get(speaker.name)
        if history is None:
            history = [make_message("system", self.system)] if self.system else []
        return [*history, make_message("user", question)]

    def _reward(self, speaker: Speaker, prompt: str | Messages, answer: Answer) -> tuple[float | None, str]:
        """The reward of an answer, or why there is none."""
        if self.cast.scorer is None or answer.was_stopped:
            return None, ""
        try:
            return reward_of(self.cast.scorer, speaker, prompt, answer).total, ""
        except UserError as error:
            return None, f"no reward: {error}"

    def _remark_on(self, answer: Answer) -> str:
        if answer.was_stopped:
            return "stopped"
        return "" if answer.is_complete else f"cut at {answer.n_tokens} tokens"

    @contextmanager
    def _stoppable(self) -> Iterator[Callable[[], bool]]:
        """Inside the context, Ctrl-C sets a mark instead of raising, so that no adapter is left half switched.

        A second Ctrl-C raises, for an answer whose next token takes too long.
        """
        if not self.can_be_stopped or threading.current_thread() is not threading.main_thread():
            yield lambda: False
            return
        stopped = threading.Event()

        def stop(number, frame) -> None:
            if stopped.is_set():
                raise KeyboardInterrupt
            stopped.set()

        previous = signal.signal(signal.SIGINT, stop)
        try:
            yield stopped.is_set
        finally:
            signal.signal(signal.SIGINT, previous)

    # ---- Commands ----

    def do(self, name: str, value: str) -> bool:
        """Does what a command says. Returns whether the chat goes on.

        Raises:
            UserError: there is no such command, or its value is wrong.
        """
        if name == "/quit":
            return False
        known = {
            "/new": self._begin_anew,
            "/system": self._set_system,
            "/temperature": self._set_temperature,
            "/max": self._set_max,
            "/seed": self._set_seed,
            "/help": self._help,
        }
        if name not in known:
            hint = did_you_mean(name, [command.name for command in COMMANDS]).replace("--help", "/help")
            raise UserError(f"unknown command `{name}`{hint}")
        known[name](value)
        return True

    def _begin_anew(self, value: str = "") -> None:
        self.histories.clear()
        self.view.note("new conversation")

    def _set_system(self, value: str) -> None:
        self.system = value or None
        self.histories.clear()
        self.view.note("new conversation, with this system text" if value else "new conversation, no system text")

    def _set_temperature(self, value: str) -> None:
        if value:
            self.options.temperature = checked_temperature(_number(value, float, "/temperature 0.8"))
            self.options.greedy = False
        self.view.note("greedy" if self.options.is_greedy else f"temperature {self.options.temperature:g}")

    def _set_max(self, value: str) -> None:
        if value:
            self.options.max_new_tokens = checked_tokens(_number(value, int, "/max 256"))
        self.view.note(f"at most {self.options.max_new_tokens} tokens")

    def _set_seed(self, value: str) -> None:
        if value:
            self.options.seed = checked_seed(_number(value, int, "/seed 0"))
            self.n_asked = 0
        self.view.note(f"seed {self.options.seed + self.n_asked} for the next answer")

    def _help(self, value: str = "") -> None:
        width = max(len(f"{command.name} {command.value}") for command in COMMANDS)
        for command in COMMANDS:
            shown = f"{command.name} {command.value}".rstrip()
            self.view.note(f"  {shown:<{width}}  {command.help}")
        self.view.note("  Ctrl-C stops an answer. Any other line is a question.")


def _number(text: str, kind: type, example: str) -> float | int:
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"{text!r} is no number: write {example}.") from None
