"""The file of a best-of-n run: its samples and rewards, chunk by chunk, so that a stopped run goes on where it was."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..collect.tasks import json_line
from ..errors import UserError, first_line

_FORMAT = 1
_BEGINNING = b'{"best_of_n": '
"""How each file of samples begins. Any other file is someone else's."""


class OtherSettings(UserError):
    """The file has samples of a run with other options.

    Attributes:
        difference: the first option that differs, and both values.
    """

    def __init__(self, path: Path, difference: str):
        super().__init__(f"{path}: its samples have {difference}: use the same options to go on, or give another path.")
        self.difference = difference


@dataclass(frozen=True)
class Chunk:
    """The samples of some prompts.

    Attributes:
        rows: positions of its prompts.
        ids: (P, n) token ids of each completion.
        logprobs: (P, n) log-probability of each completion in nats; `None` if the engine gives none.
    """

    rows: list[int]
    ids: list[list[list[int]]]
    logprobs: list[list[float]] | None


class SamplesFile:
    """Keeps samples, and the rewards of one or several reward functions, in a file of JSON lines.

    Each chunk is one line that is on the disk before the next chunk is sampled. A line that a killed run has left
    incomplete is cut off. Samples are kept for other rewards too.

    Args:
        path: the file; `None` keeps everything in memory only.
        settings: what the samples depend on. A file with other settings is refused.

    Raises:
        OtherSettings: if the file is of another run.
        UserError: if it is no such file, or cannot be read.
    """

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any]):
        self.path = None if path is None else Path(path)
        self.settings = json.loads(json.dumps(settings))
        self._samples: dict[int, Chunk] = {}
        self._rewards: dict[tuple[str, int], list[list[float | None]]] = {}
        if self.path is not None and self.path.exists():
            self._read()

    def samples(self, number: int) -> Chunk | None:
        """The samples of a chunk; `None` if it is still to be sampled."""
        return self._samples.get(number)

    def rewards(self, reward: str, number: int) -> list[list[float | None]] | None:
        """(P, n) rewards of a chunk by a reward with this digest; `None` if it is still to be scored."""
        return self._rewards.get((reward, number))

    def add_samples(self, number: int, chunk: Chunk) -> None:
        """Keeps the samples of a chunk."""
        self._samples[number] = chunk
        self._append({"chunk": number, "rows": chunk.rows, "ids": chunk.ids, "logprobs": chunk.logprobs})

    def add_rewards(self, reward: str, number: int, rewards: list[list[float | None]]) -> None:
        """Keeps the rewards of a chunk."""
        self._rewards[reward, number] = rewards
        self._append({"chunk": number, "reward": reward, "rewards": rewards})

    def _append(self, line: dict[str, Any]) -> None:
        if self.path is None:
            return
        try:
            is_new = not self.path.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                if is_new:
                    file.write(json_line({"best_of_n": _FORMAT, "settings": self.settings}))
                file.write(json_line(line))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {first_line(error)}: give another path.") from None

    def _read(self) -> None:
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {first_line(error)}: give another path.") from None
        complete = content[: content.rfind(b"\n") + 1]
        lines = complete.decode(errors="replace").splitlines()
        if not lines and _BEGINNING.startswith(content[: len(_BEGINNING)]):  # it was stopped in its first line
            self.path.unlink()
            return
        lines = lines or [""]
        self._check_settings(lines[0])
        try:
            for line in lines[1:]:
                self._take(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{self.path}: it has a line that is no chunk: delete the file, or give another path."
            ) from None
        if len(complete) < len(content):
            os.truncate(self.path, len(complete))

    def _check_settings(self, line: str) -> None:
        try:
            head = json.loads(line)
            known = head["best_of_n"] == _FORMAT
            earlier = head["settings"]
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise UserError(f"{self.path}: it is no file of samples of best-of-n: give another path.")
        for name in dict.fromkeys([*self.settings, *earlier]):
            if earlier.get(name) != self.settings.get(name):
                raise OtherSettings(self.path, f"{name} {earlier.get(name)!r}, now it is {self.settings.get(name)!r}")

    def _take(self, line: dict[str, Any]) -> None:
        number = line["chunk"]
        if "reward" in line:
            self._rewards[line["reward"], number] = line["rewards"]
        else:
            self._samples[number] = Chunk(line["rows"], line["ids"], line["logprobs"])
