"""The gold reward and simulated annotators: judgments without people.

`SimulatedPerson` does what a person does on the page: it reads the texts of one task in the order in which they are
shown, and answers. `SimulatedAnnotator` labels comparison rows directly, without a page.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

from ..errors import UserError

EMPTY_COMPLETION_GOLD = -1.0
EULER_GAMMA = 0.5772156649015329
"""Mean of the standard Gumbel distribution."""
TIE = 4
"""The middle of the page's scale from 1 (the first is much better) to 7 (the second is much better)."""


def completion_text(completion: str | list[dict[str, str]]) -> str:
    """The text of a completion, which is a string or a list of messages."""
    if isinstance(completion, str):
        return completion
    return "\n".join(message["content"] for message in completion)


class GoldReward:
    """Sentiment of a completion: VADER's compound score in [-1, 1] (Hutto & Gilbert 2014), as a reward function.

    It stands for people's preferences, so that a run can be evaluated without people. It is used in the evaluation and
    by `SimulatedAnnotator`, never as PPO's reward. VADER is a lexicon: it ignores the prompt and grammar, and repeated
    praise scores high. The KL penalty must keep the policy from exploiting this; read the samples to see whether it
    does. An empty completion scores -1, the worst score (VADER's own score is 0).
    """

    __name__ = "gold"

    def __init__(self) -> None:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self._analyzer = SentimentIntensityAnalyzer()

    @property
    def lexicon(self) -> Mapping[str, float]:
        """VADER's words of sentiment, with their valence from -4 to 4."""
        return self._analyzer.lexicon

    def __call__(self, prompts: Sequence, completions: Sequence, **columns: Any) -> list[float]:
        """Scores `completions` (text or messages). `prompts` and other columns are ignored."""
        return [self._score(completion_text(completion)) for completion in completions]

    def _score(self, text: str) -> float:
        if not text.strip():
            return EMPTY_COMPLETION_GOLD
        return float(self._analyzer.polarity_scores(text)["compound"])


class Judgments(NamedTuple):
    """Judged comparison rows, and the best accuracy that their noise allows.

    rows: comparison rows (prompt, completions, pairs, targets, weights, category, source, row).
    ceiling: expected accuracy of the gold order on pairs that are not ties, the mean of max(p, 1 - p).
    gold_accuracy: accuracy of the gold order on the labels that were drawn. Both are NaN if every pair is a tie.
    dropped: row numbers of the prompts whose completions are all the same.
    """

    rows: list[dict[str, Any]]
    ceiling: float
    gold_accuracy: float
    dropped: list[int]


@dataclass(frozen=True)
class SimulatedAnnotator:
    """Judges all pairs of a prompt's completions by the gold reward with noise (Bradley & Terry 1952).

    P(i beats j) = sigmoid((gold_i - gold_j) / noise), with one 0/1 draw per pair. `noise` is in units of the gold
    reward: completions whose gold rewards differ by `noise` are judged in the gold order 73 % of the time, and always
    if it is 0. Equal gold rewards are a tie. A draw depends on the seed, the row number and the texts, not on the order
    or batches of rows or completions.
    """

    noise: float = 0.3
    seed: int = 0
    gold: Callable[..., list[float]] = field(default_factory=GoldReward)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise UserError(f"noise={self.noise}: the annotator's noise must be a finite number of at least 0.")

    def preference(self, gold_i: float, gold_j: float) -> float:
        """P(i beats j)."""
        if self.noise == 0:
            if gold_i == gold_j:
                return 0.5
            return float(gold_i > gold_j)
        logit = (gold_i - gold_j) / self.noise
        return 1 / (1 + math.exp(-max(-700.0, min(700.0, logit))))  # exp(710) overflows

    def judge(self, rows: Sequence[dict[str, Any]]) -> Judgments:
        """Labels rows `{prompt, completions, category?, source?, row?}` with K >= 2 completions (text or messages).

        Identical completions of a prompt are merged. `row` defaults to the position in `rows`. Pass it when judging in
        batches.
        """
        judged = []
        expected_accuracies = []
        hits = []
        dropped = []
        for position, row in enumerate(rows):
            number = row.get("row", position)
            distinct: dict[str, Any] = {}
            for completion in row["completions"]:
                distinct.setdefault(completion_text(completion), completion)
            if len(distinct) < 2:
                dropped.append(number)
                continue

            texts = list(distinct)
            completions = list(distinct.values())
            # Every pair is judged, as InstructGPT's rankings of K completions give them.
            golds = self.gold([row["prompt"]] * len(completions), completions)
            pairs = []
            targets = []
            for i, j in combinations(range(len(texts)), 2):
                chance = self.preference(golds[i], golds[j])
                target = self._draw(number, texts[i], texts[j], chance)
                pairs.append([i, j])
                targets.append(target)
                if chance != 0.5:  # a tie has no right order
                    expected_accuracies.append(max(chance, 1 - chance))
                    hits.append(float((chance > 0.5) == target))
            judged.append(
                {
                    "prompt": row["prompt"],
                    "completions": completions,
                    "pairs": pairs,
                    "targets": targets,
                    "weights": [1 / len(pairs)] * len(pairs),
                    "category": row.get("category"),
                    "source": row.get("source", "simulated annotator"),
                    "row": number,
                }
            )
        return Judgments(judged, _mean(expected_accuracies), _mean(hits), dropped)

    def _draw(self, row: int, text_i: str, text_j: str, chance: float) -> float:
        """1.0 with probability `chance`, else 0.0, from a hash of seed, row and two texts; 0.5 is a tie."""
        if chance == 0.5:
            return 0.5
        first, second = sorted((text_i, text_j))
        key = "\0".join((str(self.seed), str(row), first, second)).encode()
        uniform = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2**64  # in [0, 1)
        if text_i != first:  # the event "j beats i" of the sorted pair, so that both directions agree
            return float(not uniform < 1 - chance)
        return float(uniform < chance)


def _mean(values: list[float]) -> float:
    if not values:
        return math.nan
    return sum(values) / len(values)


# --- one simulated person at the page ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class SimulatedPerson:
    """Answers the tasks of the page by a gold reward, with the noise and the habits of a person.

    How much the person likes a completion is its gold reward, plus the biases, plus `noise` times a draw from the
    Gumbel distribution with scale 1 and mean 0. The completions are ranked by this number. For any two of them,
    whatever the number of completions,

        P(i is preferred to j) = sigmoid((gold_i + bias_i - gold_j - bias_j) / noise)

    exactly, because the difference of two Gumbel draws has the logistic distribution. This is the model of Bradley and
    Terry for two completions, and of Plackett and Luce for more (Yellott 1977, "The relationship between Luce's Choice
    Axiom, Thurstone's Theory of Comparative Judgment, and the double exponential distribution", theorem 5). Completions
    that are equally good with their biases are tied.

    The answer depends only on `name`, `seed` and the texts, not on what was answered before. Without `position_bias`,
    it does not depend on which completion is shown first either. Two people with different names and the same seed
    draw their noise independently.

    Args:
        name: name of the annotator in the store.
        gold: reward function `gold(prompts, completions)`, which returns one number for each completion. The texts are
            strings. A prompt of several messages is a list of messages.
        noise: in units of the gold reward. If two gold rewards differ by `noise`, the better completion is preferred
            73 % of the time. With 0, the person has no noise.
        seed: another seed gives other noise.
        position_bias: added to the completion that is shown first, in units of the gold reward.
        length_bias: added for each 100 characters of a completion, in units of the gold reward. It may be negative.
        lazy: share of tasks that are answered without reading, between 0 and 1.
        lazy_answer: what such an answer is: "first" (the completion that is shown first is slightly better), or "tie".
        random: whether all answers are uniform draws that ignore the texts.
        skip_share: share of tasks that are skipped, between 0 and 1.
        better_from: two completions that differ by this much with noise and biases are answered as "better" instead of
            "slightly better" (2 and 6 on the scale instead of 3 and 5), in units of the gold reward.
        much_better_from: the same for "much better" (1 and 7).
        seconds: median of the seconds that the person reports for a task. Nothing waits for that long.

    Raises:
        UserError: for a share outside 0 to 1, or a number that is negative or not finite.
    """

    name: str
    gold: Callable[..., Sequence[float]] = field(default_factory=GoldReward)
    noise: float = 0.3
    seed: int = 0
    position_bias: float = 0.0
    length_bias: float = 0.0
    lazy: float = 0.0
    lazy_answer: str = "first"
    random: bool = False
    skip_share: float = 0.0
    better_from: float = 0.5
    much_better_from: float = 1.0
    seconds: float = 8.0

    def __post_init__(self) -> None:
        for option in ("position_bias", "length_bias"):
            if not math.isfinite(getattr(self, option)):
                raise UserError(f"{option}={getattr(self, option)}: must be a finite number.")
        for option in ("noise", "seconds"):
            value = getattr(self, option)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"{option}={value}: must be a finite number of at least 0.")
        for option in ("lazy", "skip_share"):
            if not 0 <= getattr(self, option) <= 1:
                raise UserError(f"{option}={getattr(self, option)}: must be a share between 0 and 1.")
        if self.lazy_answer not in ("first", "tie"):
            raise UserError(f"lazy_answer={self.lazy_answer!r}: must be 'first' or 'tie'.")
        if not 0 < self.better_from < self.much_better_from:
            raise UserError(
                f"better_from={self.better_from} and much_better_from={self.much_better_from}: must be positive, the "
                "first smaller than the second."
            )

    def answer(self, prompt: str | list[dict[str, str]], completions: Sequence[str]) -> dict[str, Any]:
        """The answer to one task, as the page sends it.

        Args:
            prompt: text or messages.
            completions: the texts in the order in which they are shown, at least one.

        Returns:
            `{"preference": 1 to 7}` for two completions, `{"ranks": […]}` for more, `{"ratings": [1 to 7]}` for one, or
            `{"skip": True}`.
        """
        draw = _Draws(self.name, self.seed, prompt, completions)
        if draw.uniform("skip") < self.skip_share:
            return {"skip": True}
        if self.random:
            return _random_answer(draw, completions)
        if draw.uniform("lazy") < self.lazy:
            return self._lazy_answer(len(completions))

        liked = self._liked(draw, prompt, completions)
        if len(completions) == 1:
            return {"ratings": [_rating(liked[0])]}
        if len(completions) == 2:
            return {"preference": self._preference(liked[0] - liked[1])}
        return {"ranks": _ranks(liked)}

    def seconds_for(self, prompt: str | list[dict[str, str]], completions: Sequence[str]) -> float:
        """The seconds that the person reports for a task: log-logistic with the median `seconds`."""
        uniform = _Draws(self.name, self.seed, prompt, completions).uniform("seconds")
        # The log-logistic distribution with shape 4: its quartiles are 0.76 and 1.32 times the median.
        factor = (uniform / (1 - uniform)) ** 0.25
        return round(self.seconds * factor, 2)

    def _lazy_answer(self, n: int) -> dict[str, Any]:
        first = self.lazy_answer == "first"
        if n == 1:
            return {"ratings": [TIE]}
        if n == 2:
            return {"preference": TIE - 1 if first else TIE}
        if first:
            return {"ranks": [1] + [2] * (n - 1)}
        return {"ranks": [1] * n}

    def _liked(self, draw: "_Draws", prompt: str | list[dict[str, str]], completions: Sequence[str]) -> list[float]:
        """How much the person likes each completion: gold reward, biases and noise."""
        golds = self.gold([prompt] * len(completions), list(completions))
        without_noise = []
        for position, (gold, text) in enumerate(zip(golds, completions, strict=True)):
            bias = self.length_bias * len(text) / 100
            if position == 0 and len(completions) > 1:
                bias += self.position_bias
            without_noise.append(gold + bias)
        if self.noise == 0:
            return without_noise

        # Equally good completions get the same draw, so that they are tied. Others are compared with each of them as if
        # it had a draw of its own.
        first_text: dict[float, str] = {}
        for value, text in zip(without_noise, completions, strict=True):
            first_text[value] = min(text, first_text.get(value, text))
        return [value + self.noise * draw.gumbel(first_text[value]) for value in without_noise]

    def _preference(self, difference: float) -> int:
        """The place on the page's scale for what the first completion is liked more than the second."""
        if difference == 0:
            return TIE
        steps = 1
        if abs(difference) >= self.better_from:
            steps = 2
        if abs(difference) >= self.much_better_from:
            steps = 3
        return TIE - steps if difference > 0 else TIE + steps


class _Draws:
    """Random draws for one person and one task: hashes, which are the same in any order of calls and of completions."""

    def __init__(self, name: str, seed: int, prompt: str | list[dict[str, str]], completions: Sequence[str]):
        parts = [name, str(seed), completion_text(prompt), *sorted(completions)]
        # With the length of each part, two different lists of parts cannot give the same key.
        self._key = "".join(f"{len(part)}:{part}" for part in parts)

    def uniform(self, purpose: str) -> float:
        """A draw in (0, 1), without the ends."""
        digest = hashlib.sha256(f"{self._key}{purpose}".encode()).digest()
        bits = int.from_bytes(digest[:8], "big") >> 12
        return (bits + 0.5) / 2**52  # 53 bits in all, which a float holds exactly

    def gumbel(self, text: str) -> float:
        """A draw from the Gumbel distribution with scale 1 and mean 0 for one completion."""
        return -math.log(-math.log(self.uniform(f"gumbel {text}"))) - EULER_GAMMA


def _random_answer(draw: _Draws, completions: Sequence[str]) -> dict[str, Any]:
    """Each place of the scale, or each order of the completions, with the same probability."""
    place = 1 + int(7 * draw.uniform("random"))
    if len(completions) == 1:
        return {"ratings": [place]}
    if len(completions) == 2:
        return {"preference": place}
    return {"ranks": _ranks([draw.uniform(f"random {position}") for position in range(len(completions))])}


def _ranks(liked: Sequence[float]) -> list[int]:
    """Rank of each number, from 1 for the greatest. Equal numbers share a rank, and the next rank follows it."""
    places = sorted(set(liked), reverse=True)
    return [1 + places.index(value) for value in liked]


def _rating(liked: float) -> int:
    """1 for -1 or less, 4 for 0, 7 for 1 or more, and steps of a third between them."""
    return max(1, min(7, round(TIE + 3 * liked)))
