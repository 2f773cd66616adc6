"""The verdict of a comparison of systems: a paragraph that is written from the intervals only."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .comparisons import BEST_OF_N, END, EQUAL_KL, EQUAL_TIME, PPO
from .curves import AT_ONCE
from .statistics import OVER_PROMPTS, OVER_SEEDS

SIGNIFICANT = 0.05
WAYS = {END: "At the end of training", EQUAL_KL: "At equal KL", EQUAL_TIME: "At equal time"}

_Entry = Mapping[str, Any]


def write_verdict(merged: Mapping[str, Any]) -> str:
    """Writes the verdict: what PPO gains over the other systems, at the end, at equal KL and at equal time.

    The first paragraph is about one PPO system, the one named "ppo" or else the first. Further paragraphs, with a blank
    line between them, have the numbers of all comparisons, other PPO systems, systems without PPO, and what is missing.

    A system "beats" another one only if the 95 % interval of the paired gain excludes 0. Otherwise it is "not
    distinguishable", and the details have the smallest difference that these data would have found with a chance of 80
    %. If that is more than what PPO gains over the reference, n is too small for a claim, and the verdict says so.
    Where nothing can be said at equal KL or at equal time, it has the reason, such as no `snapshot_seconds`. It also
    says what Holm's adjustment for the number of comparisons takes back, which systems failed, what was not
    judged, and what was left out.

    Args:
        merged: the report of all seeds, with `comparisons` as of `compare_systems`, `systems`, `reference`, `seeds`,
            `n`, `judge`, `judges` and `leaks`.
    """
    comparisons = merged["comparisons"]
    ppo_systems = [name for name, system in merged["systems"].items() if _is_ppo(name, system)]
    entries_of = {name: [entry for entry in comparisons if entry["first"] == name] for name in ppo_systems}
    headliner = PPO if PPO in ppo_systems else next(iter(ppo_systems), None)
    paragraphs = []
    others = [entry for entry in comparisons if entry["first"] not in ppo_systems]
    if headliner is None:
        paragraphs.append(" ".join(["No PPO system was compared.", *_against_reference(others, merged)]))
    else:
        paragraphs.append(" ".join(_headline(headliner, entries_of[headliner], merged)))
    paragraphs.append(_what_was_judged(merged))
    if headliner is not None:
        paragraphs += _about(headliner, entries_of[headliner], merged)
    variants = [name for name in ppo_systems if name != headliner]
    paragraphs += [" ".join(_headline(name, entries_of[name], merged)) for name in variants]
    if headliner is not None:
        paragraphs += _against_reference(others, merged)
    paragraphs.append(" ".join([*_failures(merged), *_coverage(merged), *_left_out(merged)]))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _is_ppo(name: str, system: _Entry) -> bool:
    # A system that failed in every seed may have no kind.
    kind = system.get("kind")
    return kind == PPO if kind else name == PPO or name.startswith(f"{PPO}_")


# --- sentences -------------------------------------------------------------------------------------------------------


def _what_was_judged(merged: Mapping[str, Any]) -> str:
    seeds = merged["seeds"]
    gains = [entry["gain"] for entry in merged["comparisons"] if entry["gain"]]
    n_prompts = merged["n"]
    prompts = _counted(n_prompts, "held-out prompt")
    text = f"Judged by {merged['judge']} on {prompts}, with {_counted(len(seeds), 'seed')}."
    if any(gain["over"] == OVER_SEEDS for gain in gains):
        text += " The 95 % intervals cover other seeds and other prompts"
        alone = [name for name, system in merged["systems"].items() if len(system.get("seeds") or ()) == 1]
        if alone:
            text += f", but only other prompts for {_listed(alone)}, with one seed"
        return f"{text}."
    return f"{text} The 95 % intervals cover other prompts, but not other seeds: training again may give other results."


def _headline(name: str, entries: Sequence[_Entry], merged: Mapping[str, Any]) -> list[str]:
    """Sentences on one PPO system: against the reference, then against the others, without the numbers of each."""
    reference = merged["reference"]
    compared = [entry for entry in entries if entry["gain"]]
    if not compared:
        return [f"{name} could not be compared ({entries[0]['reason']})." if entries else f"{name} was not compared."]
    sentences = []
    with_reference = [entry for entry in compared if entry["second"] == reference]
    if with_reference:
        place = _place(name, END, merged).replace(f"{name} at", "at")
        text = f"{name}{place} {_outcomes(with_reference, reference, END)}"
        sentences.append(f"{text}.")
    else:
        reasons = [entry["reason"] for entry in entries if entry["second"] == reference]
        sentences.append(f"{name} could not be compared with {reference} ({', '.join(reasons) or 'no values'}).")
    for way, beginning in WAYS.items():
        at_this = [entry for entry in compared if entry["at"] == way and entry["second"] != reference]
        if at_this:
            sentences.append(f"{beginning}, it {_names_by_outcome(at_this)}.")
    if all(entry["gain"]["over"] == OVER_PROMPTS for entry in compared):
        sentences.append("This is of one seed: training again may give other results.")
    if _weak(compared, reference, _gain_over(reference, entries)):
        sentences.append("n is too small for some of these comparisons to find a difference of that size.")
    if any(entry["p_holm"] is not None and entry["p_holm"] > SIGNIFICANT for entry in compared if _is_clear(entry)):
        sentences.append("Not all of this remains after Holm's adjustment for the number of comparisons.")
    return sentences


def _names_by_outcome(entries: Sequence[_Entry]) -> str:
    beaten = [entry["second"] for entry in entries if _is_clear(entry) and entry["gain"]["mean"] > 0]
    lost_to = [entry for entry in entries if _is_clear(entry) and entry["gain"]["mean"] < 0]
    undecided = [entry["second"] for entry in entries if not _is_clear(entry)]
    parts = []
    if lost_to:
        worst = min(lost_to, key=lambda entry: entry["gain"]["mean"])
        rest = [entry["second"] for entry in lost_to if entry is not worst]
        also = f" (also to {_listed(rest)})" if rest else ""
        parts.append(f"loses to {_by_how_much(worst, END, sign=-1)}{also}")
    if beaten:
        parts.append(f"beats {_listed(beaten)}")
    if undecided:
        parts.append(f"is not distinguishable from {_listed(undecided)}")
    return "; ".join(parts)


def _gain_over(reference: str, entries: Sequence[_Entry]) -> float | None:
    for entry in entries:
        if entry["second"] == reference and entry["gain"]:
            return entry["gain"]["mean"]
    return None


def _about(name: str, entries: Sequence[_Entry], merged: Mapping[str, Any]) -> list[str]:
    """Paragraphs with the numbers of all comparisons of a PPO system, one for each way to compare."""
    paragraphs = []
    reference = merged["reference"]
    for way, beginning in WAYS.items():
        at_this = [entry for entry in entries if entry["at"] == way]
        compared = [entry for entry in at_this if entry["gain"]]
        sentences = []
        if compared:
            where = beginning + _place(name, way, merged)
            sentences.append(f"{where}, {name} {_outcomes(compared, reference, way)}.")
        if way == EQUAL_TIME:
            sentences += _cost_of_answers(name, compared, merged)
        sentences += _too_few(name, compared, reference, _gain_over(reference, entries))
        sentences += _not_compared(name, way, [entry for entry in at_this if not entry["gain"]])
        paragraphs.append(" ".join(sentences))
    return [*paragraphs, *_taken_back(name, entries)]


def _cost_of_answers(name: str, compared: Sequence[_Entry], merged: Mapping[str, Any]) -> list[str]:
    """What the time of training leaves out, and that best-of-n is ready when reinforcement learning begins."""
    systems = merged["systems"]
    chosen = [entry for entry in compared if systems[entry["second"]].get("kind") == BEST_OF_N]
    if not chosen:
        return []
    names = _listed([entry["second"] for entry in chosen])
    text = f"This is training time, without the samples of {names} for each answer later"
    began = (systems[name].get("seconds") or 0.0) - (systems[name].get("own_seconds") or 0.0)
    if all(entry["seconds"] <= began * AT_ONCE for entry in chosen):
        text += f"; when {names} could answer, {name} had not begun and was still {merged['reference']}"
    return [f"{text}."]


def _place(name: str, way: str, merged: Mapping[str, Any]) -> str:
    kl = merged["systems"][name].get("kl")
    if way != END or kl is None:
        return ""
    return f" ({name} at {_nats(kl)})"


def _outcomes(entries: Sequence[_Entry], reference: str, way: str) -> str:
    """What a system does to others: those that it beats, then those that it loses to, then the rest."""
    beaten, lost_to, undecided = [], [], []
    # The reference first: it is what the question is about.
    for entry in sorted(entries, key=lambda entry: entry["second"] != reference):
        low, high = entry["gain"]["ci95"]
        if low is None or high is None:
            undecided.append(f"{entry['second']} (too few values for an interval)")
        elif low > 0:
            beaten.append(_by_how_much(entry, way, sign=1))
        elif high < 0:
            lost_to.append(_by_how_much(entry, way, sign=-1))
        else:
            undecided.append(_undecided(entry, way))
    parts = []
    if beaten:
        parts.append(f"beats {_listed(beaten)}")
    if lost_to:
        parts.append(f"loses to {_listed(lost_to)}")
    if undecided:
        parts.append(f"is not distinguishable from {_listed(undecided)}")
    return "; ".join(parts)


def _by_how_much(entry: _Entry, way: str, *, sign: int) -> str:
    gain = entry["gain"]
    low, high = sorted(sign * end for end in gain["ci95"])
    unit = " of win rate" if entry.get("measure") == "win rate" else ""
    digits = _decimals(high - low)
    size = f"{sign * gain['mean']:.{digits}f}{unit} [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{entry['second']} by {size}{_at(entry, way)}"


def _undecided(entry: _Entry, way: str) -> str:
    gain = entry["gain"]
    low, high = gain["ci95"]
    digits = _decimals(high - low)
    text = f"{entry['second']} ({gain['mean']:+.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]{_at(entry, way)}"
    if entry.get("detectable"):
        text += f"; a difference of {entry['detectable']:.{digits}f} would have been found"
    return f"{text})"


def _at(entry: _Entry, way: str) -> str:
    if way == EQUAL_KL and entry["kl"] is not None:
        return f" at {_nats(entry['kl'])}"
    if way == EQUAL_TIME and entry["seconds"] is not None:
        return f" at {_seconds(entry['seconds'])}"
    return ""


def _weak(entries: Sequence[_Entry], reference: str, gain_over_reference: float | None) -> list[tuple[_Entry, float]]:
    """Undecided comparisons that would not have found a difference as large as PPO's gain, with that gain."""
    weak = []
    for entry in entries:
        effect = entry["gain"]["mean"] if entry["second"] == reference else gain_over_reference
        if effect is None or _is_clear(entry) or not entry.get("detectable"):
            continue
        if entry["detectable"] > abs(effect):
            weak.append((entry, abs(effect)))
    return weak


def _too_few(name: str, entries: Sequence[_Entry], reference: str, gain_over_reference: float | None) -> list[str]:
    """The sentence on comparisons for which n is too small."""
    weak = _weak(entries, reference, gain_over_reference)
    if not weak:
        return []
    entry, effect = max(weak, key=lambda item: item[0]["detectable"])
    names = _listed([item[0]["second"] for item in weak])
    over_seeds = entry["gain"]["over"] == OVER_SEEDS
    remedy = "more seeds" if over_seeds else "more prompts"
    text = f"n is too small to tell {name} from {names}: to find a difference as large as "
    text += f"{name}'s from {reference} ({_significant(effect)}) needs {remedy}"
    times = (entry["detectable"] / effect) ** 2 if effect > 0 else math.inf
    if not over_seeds and times < 1000:
        text += f", about {math.ceil(entry['gain']['n'] * times):,} instead of {entry['gain']['n']:,}"
    return [f"{text}."]


def _not_compared(name: str, way: str, entries: Sequence[_Entry]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for entry in entries:
        reasons.setdefault(entry["reason"], []).append(entry["second"])
    where = WAYS[way][0].lower() + WAYS[way][1:]
    return [f"Not compared {where}: {name} with {_listed(names)} ({reason})." for reason, names in reasons.items()]


def _taken_back(name: str, entries: Sequence[_Entry]) -> list[str]:
    """What Holm's adjustment for the number of comparisons takes back."""
    compared = [entry for entry in entries if entry["gain"] and entry["p_holm"] is not None]
    clear = [entry for entry in compared if _is_clear(entry)]
    if len(compared) < 2 or not clear:
        return []
    lost = [entry for entry in clear if entry["p_holm"] > SIGNIFICANT]
    adjustment = f"After Holm's adjustment for these {len(compared)} comparisons of {name}"
    if not lost:
        return [f"{adjustment}, all differences from others remain."]
    if len(lost) == len(clear):
        return [f"{adjustment}, no difference from another system remains."]
    names = _listed([f"{entry['second']} ({WAYS[entry['at']][3:]})" for entry in lost])
    return [f"{adjustment}, no difference remains from {names}."]


def _against_reference(entries: Sequence[_Entry], merged: Mapping[str, Any]) -> list[str]:
    reference = merged["reference"]
    beat, lose, undecided, taken_back = [], [], [], []
    for entry in entries:
        if not entry["gain"]:
            continue
        if _is_clear(entry) and (entry.get("p_holm") or 0.0) > SIGNIFICANT:
            taken_back.append(entry["first"])
        turned = {**entry, "second": entry["first"]}
        low, high = entry["gain"]["ci95"]
        if low is not None and low > 0:
            beat.append(_by_how_much(turned, END, sign=1))
        elif high is not None and high < 0:
            lose.append(_by_how_much(turned, END, sign=-1))
        else:
            undecided.append(entry["first"])
    parts = []
    if beat:
        parts.append(f"better: {_listed(beat)}")
    if lose:
        parts.append(f"worse: {_listed(lose)}")
    if undecided:
        parts.append(f"not distinguishable: {_listed(undecided)}")
    if not parts:
        return []
    text = f"Systems without PPO, compared with {reference}: {'; '.join(parts)}."
    if taken_back:
        text += f" After Holm's adjustment for these comparisons, no difference remains for {_listed(taken_back)}."
    return [text]


def _failures(merged: Mapping[str, Any]) -> list[str]:
    sentences = []
    for name, system in merged["systems"].items():
        if system["status"] != "ok":
            error = f" ({system['error'].rstrip('.')})" if system.get("error") else ""
            sentences.append(f"{name} failed{error}.")
            continue
        n_worked = len(system.get("seeds") or merged["seeds"])
        if n_worked < len(merged["seeds"]):
            sentences.append(f"{name} worked with {n_worked} of {_counted(len(merged['seeds']), 'seed')}.")
    return sentences


def _coverage(merged: Mapping[str, Any]) -> list[str]:
    sentences = []
    for judge, counts in (merged.get("judges") or {}).items():
        asked = counts["judged"] + counts["failed"]
        if counts["failed"]:
            share = counts["judged"] / asked
            sentences.append(f"{judge} gave no judgment on {counts['failed']:,} of {asked:,} (it covers {share:.1%}).")
    return sentences


def _left_out(merged: Mapping[str, Any]) -> list[str]:
    n_leaked = (merged.get("leaks") or {}).get("heldout_left_out")
    if not n_leaked:
        return []
    return [
        f"{_counted(n_leaked, 'held-out prompt')} left out, since training data contain the same or nearly the same."
    ]


# --- words -----------------------------------------------------------------------------------------------------------


def _is_clear(entry: _Entry) -> bool:
    """Whether the interval of the gain excludes 0."""
    low, high = entry["gain"]["ci95"]
    return low is not None and high is not None and (low > 0 or high < 0)


def _decimals(width: float) -> int:
    """Decimals that show two digits of an interval of this width, at most 5."""
    if not width > 0:
        return 2
    return min(5, max(0, 1 - math.floor(math.log10(width))))


def _nats(kl: float) -> str:
    """A KL in words. Estimates of a KL close to 0 may be negative."""
    return f"{max(0.0, kl):.1f} nats" if kl >= 1 else f"{max(0.0, kl):.2f} nats"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _significant(value: float) -> str:
    return f"{value:.2g}"


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _listed(items: Iterable[str]) -> str:
    names = list(items)
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
