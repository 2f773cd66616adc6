"""Samples completions that people judge: K answers to each prompt, from one or several policies."""

import gc
import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..data.media import media_of_message, text_of_parts
from ..data.prompt_form import form_of_model
from ..data.schema import Row
from ..data.templates import template_columns
from ..data.text import (
    Messages,
    Unrenderable,
    check_tokenizer,
    decode_completion,
    encode_generation_prompt,
    is_messages,
    is_text,
    make_message,
    open_thought,
    prefill_of,
    text_key,
    with_prefill,
)
from ..errors import UserError
from ..hub.run_files import content_digest
from ..modeling.families import check_config
from ..modeling.loading import adapter_base, found_or_refused, load_policy
from ..modeling.locations import EMBEDDED_MODEL, resolve_location
from ..modeling.probing import unchanged_random_state
from ..modeling.quantization import quantization_record
from ..ppo.assembly import config_positions
from ..ppo.engine import Sampling, TransformersEngine, stop_token_ids
from ..ppo.prompts import warn_of_other_form
from ..quality.duplicates import words_of
from ..training.bars import no_bars
from .tasks import Task

NEARLY_SAME = 0.95
"""Smallest word-level similarity of two near-identical answers: one word of twenty may differ."""

_REVISION_DIGITS = 12
_PUNCTUATION = ".,;:!?\"'()…"


@dataclass(frozen=True)
class PolicySpec:
    """A policy to sample from.

    Attributes:
        name: label of the policy in `made_by`, such as "sft".
        location: folder of an adapter or a model, Hub id, path of a `.gguf` file, or `EMBEDDED_MODEL`.
        revision: branch, tag or commit of a Hub id; `None` means the default branch.
    """

    name: str
    location: str
    revision: str | None = None


class Dropped(NamedTuple):
    """A prompt that gives no task.

    Attributes:
        row: position of the prompt in the list that was sampled, from 0.
        reason: why there is no task, in a few words.
    """

    row: int
    reason: str


@dataclass(frozen=True)
class SampledTasks:
    """Result of `sample_tasks`.

    Attributes:
        tasks: one task per prompt that was kept, in the order of the prompts.
        dropped: the prompts that give no task.
        rows: position of the prompt of each task in the list that was sampled.
        fewer: number of tasks with fewer completions than were asked for, as the policies repeated themselves.
        empty: number of completions without any text. A prompt has at most one.
        resampled: number of samples that were replaced, as they were near-identical to another answer.
    """

    tasks: list[Task]
    dropped: list[Dropped] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    fewer: int = 0
    empty: int = 0
    resampled: int = 0

    def summary(self) -> str:
        """Returns one line with all counts and the reasons of dropped prompts."""
        n_prompts = len(self.tasks) + len(self.dropped)
        parts = [f"{len(self.tasks)} tasks of {n_prompts} prompts"]
        for reason, count in Counter(entry.reason for entry in self.dropped).items():
            parts.append(f"{count} dropped: {reason}")
        if self.fewer:
            parts.append(f"{self.fewer} tasks have fewer completions, as the policies repeated themselves")
        if self.resampled:
            parts.append(f"{self.resampled} near-identical answers were sampled again")
        if self.empty:
            parts.append(f"{self.empty} completions are empty")
        return "; ".join(parts)


@dataclass(frozen=True)
class _Settings:
    """The options of `sample_tasks`, checked."""

    k: int
    temperatures: tuple[float, ...]
    top_p: float
    max_new_tokens: int
    seed: int
    batch_size: int
    max_tries: int
    same: float

    def __post_init__(self):
        for name in ("k", "max_new_tokens", "batch_size", "max_tries"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: give a whole number of 1 or more.")
        if not self.temperatures:
            raise UserError("temperatures: the list is empty: give one or more temperatures, such as 0.8.")
        for temperature in self.temperatures:
            if not temperature > 0:
                raise UserError(
                    f"temperatures: {temperature:g} always gives the same answer: give temperatures above 0, such as "
                    "0.8."
                )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p:g}: give a probability above 0, at most 1.")
        if not 0 < self.same <= 1:
            raise UserError(f"same={self.same:g}: give a similarity above 0, at most 1.")

    @property
    def fewest(self) -> int:
        """Smallest number of completions of a task."""
        return min(self.k, 2)


@dataclass(eq=False)
class _Slot:
    """One completion of a prompt: which policy makes it, and what that policy answered so far."""

    policy: str
    temperature: float
    text: str | None = None  # of the completion that is kept
    prompt: str | Messages | None = None  # of the task: without a begun answer, which the completion has
    completion: str | Messages | None = None
    made_by: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class _Entry:
    """A prompt with the slots of its completions, in the order of the task."""

    row: Row
    slots: list[_Slot]
    reason: str | None = None  # why it is dropped

    def others_than(self, slot: _Slot) -> list[str]:
        """Texts of the other completions that are kept already."""
        return [other.text for other in self.slots if other is not slot and other.text is not None]


class _Job(NamedTuple):
    """A completion to sample now."""

    entry: _Entry
    slot: _Slot
    prompt_ids: list[int]


def sample_tasks(
    prompts: Sequence[Row],
    policies: Sequence[PolicySpec],
    *,
    max_new_tokens: int,
    k: int = 2,
    temperatures: Sequence[float] = (0.8,),
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    max_tries: int = 3,
    same: float = NEARLY_SAME,
    wanted: int = 1,
    batch: str | None = None,
    **load_options: Any,
) -> SampledTasks:
    """Samples `k` completions of each prompt.

    Policies and temperatures are spread evenly over the completions, and matched at random. The order of the
    completions of a task is random too: it tells neither the policy nor the temperature, nor what was sampled.

    The policies are loaded one after the other. An answer that is nearly the same as an answer kept before (see
    `nearly_same`) is sampled again by the same policy, `max_tries` samples in all. If it still is, its place stays
    empty. A prompt with fewer than two answers is then dropped. An empty answer is kept like any other, as a policy
    that says nothing must lose comparisons, but only once per prompt: two of them are the same.

    The same arguments give the same tasks, and the random state of the caller is not changed. The completions depend on
    `batch_size` and on the other prompts. On another device or in another dtype they may differ, as rounding does.

    Args:
        prompts: rows with `prompt` (text or messages), and optionally `category`, `source` and `row`.
        policies: one or more policies with different names.
        max_new_tokens: largest number of tokens of a completion.
        k: number of completions of a prompt. 1 gives tasks in which one answer is rated.
        temperatures: temperatures of sampling.
        top_p: nucleus sampling; 1.0 samples from all tokens.
        seed: seed of sampling and of the order.
        batch_size: number of completions that are sampled together.
        max_tries: largest number of samples for one completion.
        same: similarity from which on two answers are nearly the same, see `nearly_same`.
        wanted: number of people who should judge each task.
        batch: name of the batch of tasks, such as "round-1".
        load_options: options of `load_policy`, such as `dtype`, `load_in_4bit` and `trust_remote_code`.

    Returns:
        The tasks, and what was dropped.

    Raises:
        UserError: for an unusable option, a prompt that is neither text nor messages, or a policy that does not load.
    """
    settings = _Settings(k, tuple(map(float, temperatures)), top_p, max_new_tokens, seed, batch_size, max_tries, same)
    _check_prompts(prompts, wanted, batch)
    _check_policies(policies, load_options)
    entries = _planned(prompts, [policy.name for policy in policies], settings)
    resampled = 0
    for policy in policies:
        if not _has_work(policy, entries):
            continue
        resampled += _sample_policy(policy, entries, settings, load_options)
        free_memory()  # before the next policy is loaded
    return _as_tasks(entries, settings, resampled, wanted, batch)


def _check_prompts(prompts: Sequence[Row], wanted: int, batch: str | None) -> None:
    """Refuses rows that cannot become tasks, before anything is sampled."""
    if not prompts:
        raise UserError("prompts: the list is empty: give at least one prompt to sample.")
    for number, row in enumerate(prompts):
        if not is_text(row.get("prompt")):
            raise UserError(
                f"prompts row {number}: `prompt` is {row.get('prompt')!r:.80}, not text or a list of messages: fix or "
                "drop the row."
            )
        example = "text" if isinstance(row["prompt"], str) else [make_message("assistant", "text")]
        try:
            _task(row, row["prompt"], [example], [], wanted, batch)
        except UserError as error:
            raise UserError(f"prompts row {number}: {error}.") from None


def _check_policies(policies: Sequence[PolicySpec], load_options: dict[str, Any]) -> None:
    """Refuses policies that cannot be loaded, before the first one has sampled for hours."""
    if not policies:
        raise UserError("policies: the list is empty: name at least one policy to sample from.")
    for name, count in Counter(policy.name for policy in policies).items():
        if count > 1:
            raise UserError(f"policies: {count} policies are called {name!r}: give each a name of its own.")
    for policy in policies:
        with _named(policy):
            _check_location(policy, load_options.get("trust_remote_code", False))


@contextmanager
def _named(policy: PolicySpec) -> Iterator[None]:
    """Messages name the policy, not the option of `load_policy`."""
    try:
        yield
    except UserError as error:
        reason = str(error).removeprefix("model_name_or_path: ")
        raise UserError(f"policy {policy.name!r}: {reason}") from error


def _check_location(policy: PolicySpec, trust_remote_code: bool) -> None:
    """Reads the configuration of a whole model. That of an adapter's base is read when it is loaded."""
    if adapter_base(policy.location, policy.revision) is not None:
        return
    path, location = resolve_location(policy.location, policy.revision)
    with found_or_refused("model_name_or_path", policy.location):
        check_config(path, name=policy.location, task="causal_lm", trust_remote_code=trust_remote_code, **location)


# --- which policy makes which completion -----------------------------------------------------------------------------


def _planned(prompts: Sequence[Row], policies: list[str], settings: _Settings) -> list[_Entry]:
    """Spreads policies and temperatures over the completions of all prompts."""
    rng = random.Random(f"plan {settings.seed}")
    deal_policy = _Dealer(policies, rng)
    deal_temperature = _Dealer(settings.temperatures, rng)
    entries = []
    for row in prompts:
        names = deal_policy(settings.k)
        temperatures = deal_temperature(settings.k)
        slots = [_Slot(name, temperature) for name, temperature in zip(names, temperatures, strict=True)]
        entry = _Entry(_with_plain_text(row), slots)
        entry.reason = _why_not(row)
        entries.append(entry)
    return entries


def _why_not(row: Row) -> str | None:
    """Why a prompt cannot become a task, as people and the reward model would not see what the policy saw."""
    unused = template_columns(row, [])
    if unused:
        return f"has {' and '.join(unused)}, which a task does not carry"
    if is_messages(row["prompt"]):
        for message in row["prompt"]:
            media = media_of_message(message)
            if media is not None:
                return f"has a part that is not text: {media}"
    return None


def _with_plain_text(row: Row) -> Row:
    """The row with messages whose content is one text instead of a list of text parts, as people read it."""
    if not is_messages(row["prompt"]):
        return row
    messages = []
    for message in row["prompt"]:
        text = text_of_parts(message.get("content"))
        if text is not None:
            message = message | {"content": text}
        messages.append(message)
    return row | {"prompt": messages}


class _Dealer:
    """Deals values evenly: to each prompt as different ones as possible, and in all equally often. In random order."""

    def __init__(self, values: Sequence[Any], rng: random.Random):
        self._values = values
        self._rng = rng
        self._dealt = [0] * len(values)

    def __call__(self, n: int) -> list[Any]:
        whole, remainder = divmod(n, len(self._values))
        numbers = list(range(len(self._values))) * whole
        # The remainder goes to those that were dealt least so far. Random among equals, so that all pairs occur.
        order = list(range(len(self._values)))
        self._rng.shuffle(order)
        order.sort(key=self._dealt.__getitem__)
        numbers += order[:remainder]
        for number in numbers:
            self._dealt[number] += 1
        self._rng.shuffle(numbers)
        return [self._values[number] for number in numbers]


# --- sampling from one policy ----------------------------------------------------------------------------------------


def _has_work(policy: PolicySpec, entries: list[_Entry]) -> bool:
    """Whether there is a completion for this policy to make. With few prompts, there may be none."""
    for entry in entries:
        if entry.reason is None and any(slot.policy == policy.name for slot in entry.slots):
            return True
    return False


def _sample_policy(policy: PolicySpec, entries: list[_Entry], settings: _Settings, load_options: dict[str, Any]) -> int:
    """Fills the slots of one policy. Returns the number of samples that were near-identical to another answer."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with unchanged_random_state(device):
        with _named(policy):
            model, tokenizer = load_policy(policy.location, revision=policy.revision, **load_options)
        if quantization_record(model) is None:  # quantized weights are already in their place
            model.to(device)
        has_messages = any(is_messages(entry.row["prompt"]) for entry in entries)
        check_tokenizer(tokenizer, needs_chat_template=has_messages)
        warn_of_other_form(form_of_model(model), tokenizer, {f"prompts of {policy.name}": [entries[0].row]})
        sampler = _Sampler(policy, model, tokenizer, settings)
        jobs = _encoded_jobs(entries, sampler)
        resampled = 0
        with no_bars(), tqdm(total=len(jobs), desc=f"sampling {policy.name}", leave=False, disable=None) as bar:
            for attempt in range(settings.max_tries):
                jobs = sampler.fill(jobs, attempt, bar)
                resampled += len(jobs)
            bar.update(len(jobs))
    return resampled


def _encoded_jobs(entries: list[_Entry], sampler: "_Sampler") -> list[_Job]:
    """The completions that this policy makes. Prompts that it cannot read are dropped, with the reason."""
    jobs = []
    for entry in entries:
        own = [slot for slot in entry.slots if slot.policy == sampler.policy.name]
        if entry.reason is not None or not own:
            continue
        try:
            prompt_ids = sampler.encode(entry.row)
        except _Unusable as problem:
            entry.reason = str(problem)
            continue
        for slot in own:
            jobs.append(_Job(entry, slot, prompt_ids))
    return jobs


class _Unusable(Exception):
    """A prompt that a policy cannot read. Its text is the reason."""


class _Sampler:
    """Samples the completions of one policy that is loaded."""

    def __init__(self, policy: PolicySpec, model: Any, tokenizer: PreTrainedTokenizerBase, settings: _Settings):
        self.policy = policy
        self.tokenizer = tokenizer
        self.settings = settings
        self.revision = policy_revision(policy)
        self.positions = config_positions(model)
        self.stop_ids = stop_token_ids(tokenizer, model)
        self.engine = TransformersEngine()
        self.engine.sync(model)

    def encode(self, row: Row) -> list[int]:
        """Token ids of a prompt. Raises `_Unusable` if the template refuses it, or if it leaves no room."""
        try:
            ids = encode_generation_prompt(self.tokenizer, row["prompt"])
        except Unrenderable as error:
            raise _Unusable(error.reason) from error
        if not ids:
            raise _Unusable("the prompt has no tokens")
        if len(ids) + self.settings.max_new_tokens > self.positions:
            raise _Unusable(
                f"the prompt and max_new_tokens={self.settings.max_new_tokens} are longer than the {self.positions} "
                f"tokens of the policy {self.policy.name!r}"
            )
        return ids

    def fill(self, jobs: list[_Job], attempt: int, bar: tqdm) -> list[_Job]:
        """Samples one answer for each job, and keeps those that are new. Returns the other jobs."""
        repeated = []
        for temperature in dict.fromkeys(self.settings.temperatures):
            of_temperature = [job for job in jobs if job.slot.temperature == temperature]
            of_temperature.sort(key=lambda job: -len(job.prompt_ids))  # prompts of similar length: less padding
            for number, batch in enumerate(_batches(of_temperature, self.settings.batch_size)):
                # Each batch has a seed of its own, so that nothing that ran before changes it.
                torch.manual_seed(_seed(self.settings.seed, self.policy.name, temperature, attempt, number))
                completions = self._generate(batch, temperature)
                for job, ids in zip(batch, completions, strict=True):
                    if self._keep(job, ids):
                        bar.update()
                    else:
                        repeated.append(job)
        return repeated

    def _generate(self, batch: list[_Job], temperature: float) -> list[list[int]]:
        sampling = Sampling(
            max_new_tokens=self.settings.max_new_tokens,
            stop_ids=self.stop_ids,
            pad_token_id=self.tokenizer.pad_token_id,
            temperature=temperature,
            top_p=self.settings.top_p,
        )
        return self.engine.generate([job.prompt_ids for job in batch], sampling).ids

    def _keep(self, job: _Job, ids: list[int]) -> bool:
        """Keeps an answer unless the prompt has nearly the same one already. Returns whether it was kept."""
        slot = job.slot
        text = decode_completion(self.tokenizer, ids, job.prompt_ids)
        others = job.entry.others_than(slot)
        if any(nearly_same(text, other, self.settings.same) for other in others):
            return False
        slot.text = text
        slot.prompt, slot.completion = self._as_completion(job.entry.row["prompt"], text, ids)
        slot.made_by = {
            "policy": self.policy.name,
            "revision": self.revision,
            "temperature": slot.temperature,
            "top_p": self.settings.top_p,
            "max_new_tokens": self.settings.max_new_tokens,
            "seed": self.settings.seed,
        }
        return True

    def _as_completion(
        self, prompt: str | Messages, text: str, ids: list[int]
    ) -> tuple[str | Messages, str | Messages]:
        """The prompt and the completion of the task: text after text, one message of the assistant after messages."""
        if isinstance(prompt, str):
            return prompt, text
        if prefill_of(prompt) is not None:  # a begun answer, which the completion then holds as a whole
            return with_prefill(self.tokenizer, prompt, text)
        # Some templates open a thought in the prompt, which belongs to the answer.
        opening = open_thought(self.tokenizer, prompt, {})
        return prompt, [make_message("assistant", opening + decode_completion(self.tokenizer, ids))]


def _batches(jobs: list[_Job], size: int) -> Iterator[list[_Job]]:
    for start in range(0, len(jobs), size):
        yield jobs[start : start + size]


def _seed(*parts: Any) -> int:
    """A seed that depends on all parts."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:6])


def free_memory() -> None:
    """Frees the last policy, whose modules may refer to each other in a circle."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- the result ------------------------------------------------------------------------------------------------------


def _as_tasks(
    entries: list[_Entry], settings: _Settings, resampled: int, wanted: int, batch: str | None
) -> SampledTasks:
    tasks = []
    dropped = []
    rows = []
    fewer = 0
    empty = 0
    for number, entry in enumerate(entries):
        kept = [slot for slot in entry.slots if slot.text is not None]
        if entry.reason is None and len(kept) < settings.fewest:
            entry.reason = f"fewer than two different answers in {settings.max_tries} tries each"
        if entry.reason is not None:
            dropped.append(Dropped(number, entry.reason))
            continue
        completions = [slot.completion for slot in kept]
        made_by = [slot.made_by for slot in kept]
        task = _task(entry.row, kept[0].prompt, completions, made_by, wanted, batch)
        tasks.append(task)
        rows.append(number)
        fewer += len(kept) < settings.k
        empty += sum(not slot.text.strip() for slot in kept)
    return SampledTasks(tasks, dropped, rows, fewer, empty, resampled)


def _task(
    row: Row, prompt: str | Messages, completions: list, made_by: list[dict[str, Any]], wanted: int, batch: str | None
) -> Task:
    """A task with the labels of the row that the prompt is from."""
    return Task(
        prompt=prompt,
        completions=completions,
        made_by=made_by,
        category=row.get("category"),
        source=row.get("source"),
        row=row.get("row"),
        wanted=wanted,
        batch=batch,
    )


# --- near-identical answers ------------------------------------------------------------------------------------------


def nearly_same(one: str, other: str, threshold: float = NEARLY_SAME) -> bool:
    """Returns whether a person would see two answers as the same.

    The words are compared in lower case, without white space and without punctuation at their ends. Two answers are
    nearly the same if these words are equal, or if 2 M / T reaches the threshold, where M is the number of words in
    matching blocks and T the number of words of both (`difflib.SequenceMatcher`). Chinese and Japanese are compared by
    character.

    Args:
        one: an answer.
        other: another answer.
        threshold: smallest similarity, above 0 and at most 1. With 0.95, one word of twenty may differ.
    """
    words = _compared_words(one)
    other_words = _compared_words(other)
    if words == other_words:
        return True
    longer = max(len(words), len(other_words))
    shorter = min(len(words), len(other_words))
    if 2 * shorter < threshold * (longer + shorter):
        return False  # too different in length, whatever the words are
    matcher = SequenceMatcher(None, words, other_words, autojunk=False)
    # An upper bound first, which takes linear time.
    return matcher.quick_ratio() >= threshold and matcher.ratio() >= threshold


def _compared_words(text: str) -> list[str]:
    words = []
    for word in words_of(text_key(text).lower()):
        words.append(word.strip(_PUNCTUATION) or word)
    return words


# --- which version of a policy ---------------------------------------------------------------------------------------


def policy_revision(policy: PolicySpec) -> str | None:
    """Returns which version of its weights a policy has.

    For a folder, it is 12 digits of a SHA-256 of its safetensors files. For a GGUF file and the embedded model, it is
    12 digits of the SHA-256 of the file. For a Hub id, it is the commit, which is known once the policy was loaded.
    `None` if it is not known.
    """
    if policy.location == EMBEDDED_MODEL or policy.location.endswith(".gguf"):
        folder, _ = resolve_location(policy.location, None)
        return folder.rpartition("-")[2][:_REVISION_DIGITS]  # the unpacked folder is named after the file's digest
    folder = Path(policy.location).expanduser()
    if folder.is_dir():
        return content_digest(folder)[:_REVISION_DIGITS]
    for name in ("adapter_config.json", "config.json"):
        found = try_to_load_from_cache(policy.location, name, revision=policy.revision)
        if isinstance(found, str):
            return Path(found).parent.name  # snapshots/<commit>/<file>
    return policy.revision
