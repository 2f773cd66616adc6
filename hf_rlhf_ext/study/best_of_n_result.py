"""The result of best-of-n: samples with their rewards, the winners, and the rows that they make."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..data.templates import TEMPLATE_COLUMNS
from ..data.text import Messages, text_key
from ..errors import UserError

UNSCORED = "the reward gave none of its completions a score"
_CARRIED = ("category", "source", *TEMPLATE_COLUMNS)
"""Columns of a prompt that rows of winners keep."""


@dataclass(frozen=True)
class Dropped:
    """A prompt that has no winner.

    Attributes:
        row: its position in the prompts that were given, from 0.
        reason: why, in a few words.
    """

    row: int
    reason: str


@dataclass(frozen=True)
class ChosenPairs:
    """Best and worst completions as comparisons.

    Attributes:
        rows: rows with `prompt`, `chosen`, `rejected`, `score_chosen`, `score_rejected` and `row`.
        same_text: number of prompts whose best and worst completion have the same text.
        same_reward: number of further prompts whose best and worst completion have the same reward, or with only one
            completion that was scored.
        empty: number of further prompts whose best or worst completion has no text.
    """

    rows: list[dict[str, Any]]
    same_text: int = 0
    same_reward: int = 0
    empty: int = 0


@dataclass(frozen=True)
class BestOfN:
    """Result of `best_of_n`: the samples of the prompts that were kept (P of them), and which ones won.

    Attributes:
        n: number of completions of a prompt.
        rows: (P,) position of each prompt in those that were given.
        prompts: (P,) prompts as they belong to the completions: an answer that a prompt begins is in the completion.
        completions: (P, n) text after text, one message of the assistant after messages.
        texts: (P, n) what was decoded, without a thought or an answer that the prompt opens.
        ids: (P, n) token ids of the completions, with their stop tokens.
        logprobs: (P, n) log-probability of each completion in nats, in the distribution that was sampled from. `None`
            if the engine gives none.
        rewards: (P, n) rewards; `None` for a completion without a score.
        stopped: (P, n) whether a completion ended by itself, and not at the largest number of tokens.
        columns: (P,) further columns of each prompt, such as `category`.
        dropped: the prompts without a winner.
        reward_problems: what the reward model said of completions that it refused.
    """

    n: int
    rows: list[int]
    prompts: list[str | Messages]
    completions: list[list[str | Messages]]
    texts: list[list[str]]
    ids: list[list[list[int]]]
    logprobs: list[list[float]] | None
    rewards: list[list[float | None]]
    stopped: list[list[bool]]
    columns: list[dict[str, Any]]
    dropped: list[Dropped] = field(default_factory=list)
    reward_problems: list[str] = field(default_factory=list)

    @property
    def best(self) -> list[int]:
        """(P,) position of the best completion among the n. The first one of several that are equally good."""
        return [max(scored_places(rewards), key=lambda place: (rewards[place], -place)) for rewards in self.rewards]

    @property
    def worst(self) -> list[int]:
        """(P,) position of the worst completion that has a score."""
        return [min(scored_places(rewards), key=lambda place: (rewards[place], place)) for rewards in self.rewards]

    @property
    def winners(self) -> list[str | Messages]:
        """(P,) the best completions."""
        return [of_prompt[place] for of_prompt, place in zip(self.completions, self.best, strict=True)]

    @property
    def losers(self) -> list[str | Messages]:
        """(P,) the worst completions."""
        return [of_prompt[place] for of_prompt, place in zip(self.completions, self.worst, strict=True)]

    @property
    def winner_rewards(self) -> list[float]:
        """(P,) rewards of the best completions."""
        return [of_prompt[place] for of_prompt, place in zip(self.rewards, self.best, strict=True)]

    @property
    def winner_ids(self) -> list[list[int]]:
        """(P,) token ids of the best completions."""
        return [of_prompt[place] for of_prompt, place in zip(self.ids, self.best, strict=True)]

    @property
    def winner_logprobs(self) -> list[float] | None:
        """(P,) log-probabilities of the best completions in nats; `None` if the engine gives none."""
        if self.logprobs is None:
            return None
        return [of_prompt[place] for of_prompt, place in zip(self.logprobs, self.best, strict=True)]

    @property
    def unscored(self) -> int:
        """Number of completions without a score, of prompts that were kept. They cannot win or lose."""
        return sum(reward is None for rewards in self.rewards for reward in rewards)

    def of_first(self, n: int) -> "BestOfN":
        """Best of the first `n` completions of each prompt: what a run with a smaller n would be.

        Raises:
            UserError: if `n` is above the number of completions, or no prompt is left.
        """
        if not 1 <= n <= self.n:
            raise UserError(f"n={n}: there are {self.n} completions of each prompt: give a number from 1 to {self.n}.")
        kept = [place for place, rewards in enumerate(self.rewards) if scored_places(rewards[:n])]
        dropped = list(self.dropped)
        for place, row in enumerate(self.rows):
            if place not in kept:
                dropped.append(Dropped(row, UNSCORED))
        refuse_nothing(len(kept), dropped)

        def first(values: list[list]) -> list[list]:
            return [values[place][:n] for place in kept]

        return replace(
            self,
            n=n,
            rows=[self.rows[place] for place in kept],
            prompts=[self.prompts[place] for place in kept],
            columns=[self.columns[place] for place in kept],
            completions=first(self.completions),
            texts=first(self.texts),
            ids=first(self.ids),
            logprobs=None if self.logprobs is None else first(self.logprobs),
            rewards=first(self.rewards),
            stopped=first(self.stopped),
            dropped=sorted(dropped, key=lambda entry: entry.row),
        )

    def demonstrations(self) -> list[dict[str, Any]]:
        """The winners as rows with `prompt`, `completion`, `rating` (the reward) and `row`. Empty ones are left out."""
        rows = []
        for place, best in enumerate(self.best):
            if self.texts[place][best].strip():
                scores = {"rating": self.rewards[place][best], "row": self.rows[place]}
                rows.append(self._row(place, completion=self.completions[place][best]) | scores)
        return rows

    def comparisons(self) -> ChosenPairs:
        """The best and the worst completion of each prompt, for DPO or a reward model, where they differ."""
        left_out: Counter = Counter()
        rows = []
        for place, (best, worst) in enumerate(zip(self.best, self.worst, strict=True)):
            texts, rewards = self.texts[place], self.rewards[place]
            if rewards[best] == rewards[worst]:
                all_texts = {text_key(texts[number]) for number in scored_places(rewards)}
                says_the_same = len(all_texts) == 1 and len(scored_places(rewards)) > 1
                left_out["same_text" if says_the_same else "same_reward"] += 1
            elif text_key(texts[best]) == text_key(texts[worst]):
                left_out["same_text"] += 1
            elif not texts[best].strip() or not texts[worst].strip():
                left_out["empty"] += 1
            else:
                completions = self.completions[place]
                pair = self._row(place, chosen=completions[best], rejected=completions[worst])
                scores = {"score_chosen": rewards[best], "score_rejected": rewards[worst], "row": self.rows[place]}
                rows.append(pair | scores)
        return ChosenPairs(rows, **left_out)

    def answers(self) -> list[dict[str, Any]]:
        """All completions as rows with `prompt`, `completion`, `reward`, `best`, `tokens`, `stopped` and `row`."""
        rows = []
        for place, best in enumerate(self.best):
            for number, completion in enumerate(self.completions[place]):
                about = {
                    "reward": self.rewards[place][number],
                    "best": number == best,
                    "tokens": len(self.ids[place][number]),
                    "stopped": self.stopped[place][number],
                    "row": self.rows[place],
                }
                rows.append(self._row(place, completion=completion) | about)
        return rows

    def _row(self, place: int, **columns: Any) -> dict[str, Any]:
        carried = {name: self.columns[place][name] for name in _CARRIED if self.columns[place].get(name) is not None}
        return {"prompt": self.prompts[place], **columns, **carried}


def scored_places(rewards: Sequence[float | None]) -> list[int]:
    """Positions of the rewards that are there."""
    return [place for place, reward in enumerate(rewards) if reward is not None]


def refuse_nothing(kept: int, dropped: Sequence[Dropped], problems: Sequence[str] = ()) -> None:
    """Raises `UserError` if no prompt is left, with the reasons."""
    if kept:
        return
    reasons = Counter(entry.reason for entry in dropped)
    listed = "; ".join(f"{count} dropped: {reason}" for reason, count in reasons.items())
    first = f"; the first problem: {problems[0]}" if problems else ""
    raise UserError(f"prompts: none of them has a winner ({listed}{first}): change prompts, options or reward.")
