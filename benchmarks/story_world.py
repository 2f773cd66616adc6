"""A small world for studies: a story model, a gold reward of its stories, noisy judgments, and reward models of them.

The policy is stories260K (Karpathy's tinyllamas, 260,000 parameters, MIT), which continues openings of children's
stories. `gold` is a function of the text, so that it costs nothing and never changes. No reward model sees it; they
see only which of two stories of the base policy it prefers, and some of these judgments are flipped.

`gold` is made so that a small reward model learns it only in part. Happy words are frequent in stories of the base
policy, so their value is easy to learn. That they count less and less, and that repetition and sentences that never end
cost a lot, shows in few of these stories: the base policy rarely does it.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from hf_rlhf_ext import BradleyTerryConfig, BradleyTerryTrainer, RewardScorer, load_base_model, load_tokenizer
from hf_rlhf_ext.data.text import decode_completion, encode_prompt, plain_text
from hf_rlhf_ext.ppo.engine import Sampling, TransformersEngine, stop_token_ids

SHARED = Path(os.environ.get("RLHF_SHARED", "../shared"))
STORIES = str(SHARED / "models" / "stories260K")
MAX_TOKENS = 48
"""Length of a completion: about 25 words."""

# --- prompts ---------------------------------------------------------------------------------------------------------

OPENINGS = (
    "Once upon a time, there was a {who} named {name}.",
    "One day, a {who} named {name} went to the {place}.",
    "{name} was a {who} who lived near the {place}.",
    "{name} and a {who} were at the {place}.",
)
WHO = ("little girl", "little boy", "big dog", "small cat", "bird", "rabbit", "bear", "old man")
NAMES = ("Lily", "Tom", "Max", "Sue", "Ben", "Mia", "Tim", "Anna")
PLACES = ("park", "house", "garden", "forest", "lake", "shop", "school", "farm")
N_HELDOUT = 32


def all_prompts() -> list[str]:
    """The openings of 128 stories, in a fixed random order, none of them twice."""
    rng = np.random.default_rng(2210)
    prompts: dict[str, None] = {}
    while len(prompts) < 128:
        opening = OPENINGS[len(prompts) % len(OPENINGS)]
        who, name, place = (str(rng.choice(words)) for words in (WHO, NAMES, PLACES))
        prompts[opening.format(who=who, name=name, place=place)] = None
    return list(prompts)


def train_prompts() -> list[str]:
    """Prompts of comparisons and of PPO."""
    return all_prompts()[N_HELDOUT:]


def heldout_prompts() -> list[str]:
    """Prompts that only evaluations use."""
    return all_prompts()[:N_HELDOUT]


# --- gold ------------------------------------------------------------------------------------------------------------

HAPPY = frozenset(
    "happy happily glad joy smile smiled smiling laugh laughed laughing fun funny love loved loves lovely play played "
    "playing friend friends hug hugged kiss kissed nice kind good great best sunny pretty beautiful excited proud sing "
    "sang dance danced cake gift share shared together thank thanked yummy cheer cheered".split()
)
MAX_SENTENCE = 12
"""Words that a sentence of such a story has at most. Longer ones cost."""


def gold_of_text(text: str) -> float:
    """Gold reward of one story, roughly −4 to 6: joy, minus repetition, minus sentences that do not end.

    Joy is 2·log(1 + number of happy words). Repetition is the share of words, and of pairs of neighboring words, that
    the story has had before; up to 0.25 of the words is normal ("the", "and") and costs nothing. Words beyond the
    twelfth of a sentence cost in proportion to their share.
    """
    words = re.findall(r"[a-z']+", text.lower())
    if not words:
        return -4.0
    joy = 2.0 * math.log1p(sum(word in HAPPY for word in words))
    repeated_words = max(0.0, repeated_share(words) - 0.25)
    repeated_pairs = repeated_share(list(pairwise(words)))
    sentences = [len(re.findall(r"[a-z']+", part.lower())) for part in re.split(r"[.!?]", text)]
    too_long = sum(max(0, length - MAX_SENTENCE) for length in sentences) / len(words)
    return joy - 4.0 * repeated_words - 6.0 * repeated_pairs - 3.0 * too_long


def repeated_share(items: Sequence) -> float:
    """Share of the items that are equal to an earlier one."""
    if not items:
        return 0.0
    return sum(count - 1 for count in Counter(items).values()) / len(items)


def gold(completions: Sequence, **columns: Any) -> list[float]:
    """Gold reward of completions, in the form of a reward function of TRL."""
    return [gold_of_text(plain_text(text)) for text in completions]


# --- samples and judgments -------------------------------------------------------------------------------------------


def sample_stories(prompts: Sequence[str], n: int, seed: int, *, batch_size: int = 1024) -> list[list[str]]:
    """Samples completions of the base policy at temperature 1.

    Args:
        prompts: P prompts.
        n: number of completions per prompt.
        seed: seed of the sampling.
        batch_size: number of completions that are sampled at once.

    Returns:
        P lists of n completions.
    """
    policy = load_base_model(STORIES, dtype="float32")
    tokenizer = load_tokenizer(STORIES)
    engine = TransformersEngine()
    engine.sync(policy)
    sampling = Sampling(
        max_new_tokens=MAX_TOKENS,
        stop_ids=stop_token_ids(tokenizer, policy),
        pad_token_id=tokenizer.pad_token_id,
        batch_size=batch_size,
    )
    prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    torch.manual_seed(seed)
    stories: list[list[str]] = [[] for _ in prompts]
    while len(stories[0]) < n:
        # A few per prompt and call: the engine keeps the completions of a prompt in one batch.
        size = min(n - len(stories[0]), max(1, batch_size // len(prompts)))
        samples = engine.generate(prompt_ids, sampling, n=size)
        texts = [decode_completion(tokenizer, ids) for ids in samples.ids]
        for position, _ in enumerate(prompts):
            stories[position] += texts[position * size : (position + 1) * size]
    return stories


@lru_cache(maxsize=4)
def stories_of_seed(prompts: tuple[str, ...], n: int, seed: int) -> list[list[str]]:
    """`sample_stories`, kept for comparisons of the same stories with other flips."""
    return sample_stories(prompts, n, seed)


def judged_pairs(n_pairs: int, flips: float, seed: int, prompts: Sequence[str] | None = None) -> Dataset:
    """Comparisons of two stories of the base policy. The one with more gold is better.

    Args:
        n_pairs: number of pairs.
        flips: share of judgments that are wrong, 0 to 0.5.
        seed: seed of stories and flips. The stories are the same for all values of `flips`, and the pairs of a smaller
            `n_pairs` with the same seed are others.
        prompts: prompts; `None` means those of training.

    Returns:
        Rows with `prompt`, `completions`, `pairs` and `targets`, as `BradleyTerryTrainer` takes them.
    """
    prompts = list(prompts or train_prompts())
    per_prompt = math.ceil(n_pairs / len(prompts))
    stories = stories_of_seed(tuple(prompts), 2 * per_prompt, seed)
    rng = np.random.default_rng([seed, n_pairs])
    rows = []
    for position in range(per_prompt):
        for prompt, of_prompt in zip(prompts, stories, strict=True):
            rows.append({"prompt": prompt, "completions": of_prompt[2 * position : 2 * position + 2]})
    return Dataset.from_list([row | judgment(row["completions"], flips, rng) for row in rows[:n_pairs]])


def judgment(completions: Sequence[str], flips: float, rng: np.random.Generator) -> dict[str, Any]:
    """The columns of one noisy judgment. Equal gold is a tie, which is not flipped."""
    first, second = gold(completions)
    target = 0.5 if first == second else float(first > second)
    if rng.random() < flips:
        target = 1.0 - target
    return {"pairs": [[0, 1]], "targets": [target]}


# --- reward models ---------------------------------------------------------------------------------------------------

EXAMPLES = 2048
"""Comparisons that a reward model sees in training, if that takes two to eight passes over its comparisons."""


def train_reward_model(
    comparisons: Dataset, seed: int, *, folder: str | Path | None = None, **changes: Any
) -> RewardScorer:
    """Trains a Bradley-Terry reward model from the story model, all of its weights.

    Args:
        comparisons: rows of `judged_pairs`.
        seed: seed of the training.
        folder: folder to save the model in; `None` keeps it in memory only.
        changes: options of `BradleyTerryConfig` that differ.

    Returns:
        The scorer. Its rewards are normalized on the stories of the comparisons.
    """
    epochs = min(8, max(2, EXAMPLES // len(comparisons)))
    options = {
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "per_device_train_batch_size": 32,
        "num_train_epochs": epochs,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 5,
        "seed": seed,
        "model_init_kwargs": {"dtype": "float32"},
    }
    with TemporaryDirectory() as temporary:
        target = str(folder or temporary)
        trainer = BradleyTerryTrainer(STORIES, BradleyTerryConfig(target, **options | changes), comparisons)
        trainer.train()
        trainer.save_model()
        return RewardScorer.from_pretrained(target, batch_size=256)


def accuracy(scorer: RewardScorer, comparisons: Dataset) -> float:
    """Share of comparisons without a tie in which the better story has the higher score."""
    rows = [row for row in comparisons.to_list() if row["targets"] != [0.5]]
    prompts = [row["prompt"] for row in rows for _ in range(2)]
    scores = np.reshape(scorer(prompts, [text for row in rows for text in row["completions"]]), (-1, 2))
    targets = np.array([row["targets"][0] for row in rows])
    return float(np.mean((scores[:, 0] > scores[:, 1]) == (targets == 1.0)))
