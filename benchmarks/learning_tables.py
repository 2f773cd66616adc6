"""The tables of docs/results/learning.md, from docs/study/learning.json."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

STUDY = Path(__file__).parents[1] / "docs" / "study" / "learning.json"
NOT_YET = "*Not measured yet.*\n"
ALT = "Gold reward against KL and against CPU minutes, with intervals over seeds"
FINAL, BASE = "final-", "base"
DEFAULTS = {
    "learning_rate": "learning rate",
    "value_learning_rate": "learning rate of the critic",
    "epochs": "`num_ppo_epochs`",
    "mini_batches": "`num_mini_batches`",
    "generations": "`num_generations`",
    "critic": "`critic`",
    "warmup_rollouts": "`critic_warmup_steps`, in rollouts",
    "value_gae_lambda": "`value_gae_lambda`",
    "length_adaptive_lambda": "`length_adaptive_lambda`",
    "gae_lambda": "`gae_lambda`",
    "clip_range_high": "`clip_range_high`",
    "kl_coef": "`kl_coef`",
    "whitening": "`whiten_advantages`",
}
"""Factor -> the option that it decides about."""

World = Mapping[str, Any]
Markdown = Callable[..., str]


def with_interval(value: Mapping[str, Any], digits: int = 2) -> str:
    """A mean with its interval, if there is one."""
    if value["mean"] is None:
        return ""
    mean, low, high = (value["mean"], *value["ci95"])
    if low is None:
        return signed(mean, digits)
    return f"{signed(mean, digits)} ({signed(low, digits)} to {signed(high, digits)})"


def signed(number: float, digits: int = 2) -> str:
    return f"{number:.{digits}f}".replace("-", "−")


def names_of(world: World) -> list[str]:
    """The settings of stage 1 that are PPO with a function as the reward, the base first."""
    names = []
    for name, entry in world["settings"].items():
        if entry["kind"] == "ppo" and (entry["factor"] or name == BASE or name.startswith("joint-")):
            names.append(name)
    return names


# --- tables ----------------------------------------------------------------------------------------------------------


def verdict(world: World, markdown: Markdown) -> str:
    if "verdict" not in world:
        return NOT_YET
    return "\n".join(f"- {line}" for line in world["verdict"]) + "\n"


def defaults(world: World, markdown: Markdown) -> str:
    """Which row chose which default."""
    if "chosen" not in world:
        return NOT_YET
    rows = []
    for entry in world["chosen"]:
        decision = "replaces the default" if entry["replaces"] else "a tie or worse: the default stays"
        rows.append([DEFAULTS[entry["factor"]], f"`{entry['setting']}`", with_interval(entry["gain"]), decision])
    header = ("decides about", "the row with the highest score", "gain over today's default", "decision")
    table = markdown(header, rows)
    if "winner" not in world:
        return table
    options = ", ".join(f"`{name}` {value}" for name, value in world["winner"]["options"].items())
    return f"{table}\nThe winner is `{world['winner']['name']}`: {options or 'today’s defaults'}.\n"


def factors(world: World, markdown: Markdown) -> str:
    """All rows of stages 1 and 2."""
    rows = [row_of(name, world["settings"][name]) for name in names_of(world)]
    return markdown(ROW, rows, "lrrrrrr")


def trl(world: World, markdown: Markdown) -> str:
    """All rows of TRL's trainers. The best one of each is bold."""
    rows = []
    for name, entry in world["settings"].items():
        if entry["kind"] != "ppo" and not name.startswith(FINAL):
            row = row_of(name, entry)
            if name in world.get("best_trl", {}).values():
                row[0] = f"**{row[0]}**"
            rows.append(row)
    return markdown(ROW, rows, "lrrrrrr") if rows else NOT_YET


ROW = ("setting", "seeds", "score", "gain over `base`", "CPU minutes", "gold at the end", "KL at the end")


def row_of(name: str, entry: Mapping[str, Any]) -> list[str]:
    last = entry["points"][-1]
    stopped = f" ({len(entry['stopped'])} stopped by `max_kl`)" if entry["stopped"] else ""
    return [
        f"`{name}`{stopped}",
        str(len(entry["seeds"])),
        with_interval(entry["score"]) if "score" in entry else "",
        with_interval(entry["gain"]) if "gain" in entry and name != BASE else "",
        signed(entry["minutes"]["mean"]),
        signed(last["gold"]["mean"]),
        signed(last["kl"], 1),
    ]


def equal(world: World, markdown: Markdown) -> str:
    """Gold at equal time and at equal KL, of all compared settings."""
    if "compared" not in world:
        return NOT_YET
    compared = world["compared"]
    times = [f"{minutes:.2f} CPU minutes" for minutes in compared["minutes"]]
    kls = [f"{kl:g} nats" for kl in compared["kl"]]
    tables = []
    for axis, header in (("at_time", times), ("at_kl", kls)):
        rows = []
        for name, entry in compared["settings"].items():
            label = f"`{name.removeprefix(FINAL)}`"
            rows.append([label, *(with_interval(value) for value in entry[axis])])
        tables.append(markdown(("setting", *header), rows, "l" + "r" * len(header)))
    return "\n".join(tables)


def differences(world: World, markdown: Markdown) -> str:
    """Ours minus each other setting, paired by seed."""
    if "compared" not in world:
        return NOT_YET
    compared = world["compared"]
    header = [f"{minutes:.2f} min" for minutes in compared["minutes"]] + [f"{kl:g} nats" for kl in compared["kl"]]
    rows = []
    for name, entry in compared["settings"].items():
        if name == compared["ours"]:
            continue
        values = entry["ours_minus_this_at_time"] + entry["ours_minus_this_at_kl"]
        rows.append([f"`{name.removeprefix(FINAL)}`", *(with_interval(value) for value in values)])
    ours = compared["ours"].removeprefix(FINAL)
    return markdown((f"`{ours}` minus", *header), rows, "l" + "r" * len(header))


def critics(world: World, markdown: Markdown) -> str:
    """Explained variance by the start of the critic and by its warm-up."""
    rows = []
    for name, entry in world["settings"].items():
        found = entry["explained_variance"]
        is_of_a_start = entry["uses_model"] or entry["factor"] in ("critic", "warmup_rollouts") or name == BASE
        if found and is_of_a_start:
            first, *later = found.values()  # a run that a guard stopped may have one rollout
            last = with_interval(later[-1]) if later else ""
            rows.append([f"`{name}`", with_interval(first), last, list(found)[-1]])
    return markdown(("setting", "at rollout 1", "later", "at rollout"), rows, "lrrr") if rows else NOT_YET


def cost(world: World, markdown: Markdown) -> str:
    return f"The runs took {world['cpu_minutes']:.0f} CPU minutes in all, on one core each.\n"


OF_BOTH = (verdict, equal, differences, critics, trl, cost)
OF_WORLD = {"stories": (*OF_BOTH, defaults, factors), "smollm2": OF_BOTH}


def learning_tables(markdown: Markdown) -> dict[str, Callable[[Path], str]]:
    """Functions of tables by name, for `benchmarks/tables.py`.

    Args:
        markdown: function that makes a Markdown table of header, rows and alignment.
    """
    found: dict[str, Callable[[Path], str]] = {}
    for world, makers in OF_WORLD.items():
        for make in makers:
            found[f"learning_{world}_{make.__name__}"] = writer(world, make, markdown)
        found[f"learning_{world}_plot"] = writer(world, image_of(world), markdown)
    return found


def image_of(world: str) -> Callable[[World, Markdown], str]:
    def image(entry: World, markdown: Markdown) -> str:
        return f"![{ALT}](../study/learning/{world}.png)\n"

    return image


def writer(world: str, make: Callable[[World, Markdown], str], markdown: Markdown) -> Callable[[Path], str]:
    def write(page: Path) -> str:
        if not STUDY.is_file():
            return NOT_YET
        worlds = json.loads(STUDY.read_text(encoding="utf-8"))["worlds"]
        return make(worlds[world], markdown) if world in worlds else NOT_YET

    return write
