"""The results of all rounds side by side: report.json, rounds.md, rounds.png and a card for each policy."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markdown import Markdown

from hf_rlhf_ext.cli.finish import write_report_and_card
from hf_rlhf_ext.cli.lineage import lineage_of, public_name
from hf_rlhf_ext.cli.options import ModelArguments
from hf_rlhf_ext.cli.program import command_line
from hf_rlhf_ext.cli.stages import StageRunner
from hf_rlhf_ext.compat import versions
from hf_rlhf_ext.data.text import plain_text
from hf_rlhf_ext.metrics.plots import plot_rounds
from hf_rlhf_ext.modeling.loading import adapter_base
from hf_rlhf_ext.recipes.ppo import STARTS, kind_of_start
from hf_rlhf_ext.recipes.rounds_parts.data import read_rows

if TYPE_CHECKING:
    from hf_rlhf_ext.recipes.rounds import Rounds

PLOT = "rounds.png"
SAMPLES = 4
"""Number of held-out prompts whose completions a card shows."""


def write_results(rounds: "Rounds", stages: StageRunner, finished: int) -> dict[str, Any]:
    """Writes the report, the table, the plot and the cards of the rounds 1 to `finished`. Returns the report."""
    folder = rounds.folder
    report = collect_report(rounds, stages, finished)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "rounds.md").write_text(markdown(report), encoding="utf-8")
    points, quality = points_of(report)
    plot_rounds(points, folder / PLOT, quality=quality)
    for number in range(1, finished + 1):
        write_policy_card(rounds, report, number)
    return report


def collect_report(rounds: "Rounds", stages: StageRunner, finished: int) -> dict[str, Any]:
    """The content of `report.json`, from what the stages measured."""
    first = measured(stages, 1, "evaluate")
    sft: dict[str, Any] = {"length": first["sft_length"], "kl": {"mean": 0.0}}
    entries = []
    labels = 0
    for number in range(1, finished + 1):
        judged = measured(stages, number, "judge")
        labels += judged["labels"]
        entry = {"round": number, "policy": rounds.policy_name(number), "judged_by": judged["by"]}
        entry |= {"prompts": judged["prompts"], "labels_of_round": judged["labels"], "labels": labels}
        entry["start"] = rounds.policy_name(number - 1 if rounds.args.start_from == "last" else 0)
        if rounds.args.learner == "ppo":
            entry["reward_model"] = measured(stages, number, "reward_model")
        entry[rounds.args.learner] = measured(stages, number, "policy")
        evaluation = measured(stages, number, "evaluate")
        entry["kl"] = evaluation["kl"]
        entry["length"] = evaluation["length"]
        for reward in ("gold", "proxy"):
            if reward in evaluation:
                # A proxy is measured by the reward model of its round, so the SFT policy has one value per round.
                entry[reward] = evaluation[reward][entry["policy"]]
                entry[f"{reward}_gain"] = evaluation[f"{reward}_gain"]
        if "gold" in evaluation:
            sft.setdefault("gold", evaluation["gold"]["sft"])
        entry["win_rate"] = evaluation["win_rate"]
        entries.append(entry)
    return {
        "seed": rounds.args.seed,
        "learner": rounds.args.learner,
        "start_from": rounds.args.start_from,
        "eval_prompts": rounds.args.eval_prompts,
        "sft": sft,
        "rounds": entries,
        "settings": stages.state["settings"],
        "seconds": stages.seconds,
        "peak_memory_gb": stages.peak_memory_gb,
        "command": command_line(),
        "versions": versions(),
    }


def measured(stages: StageRunner, number: int, stage: str) -> dict[str, Any]:
    """What a finished stage of a round measured."""
    return stages.state["stages"][f"round-{number}/{stage}"]["measured"]


def points_of(report: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The points of the plot, and the name of the quality: the gold reward, else the win rate against SFT."""
    # Whoever judges may change from round to round, and the gold reward with it.
    has_gold = all("gold" in entry for entry in report["rounds"])
    first = report["sft"]["gold"] if has_gold else None
    points = [{"name": "SFT", "quality": first, "kl": report["sft"]["kl"]}]
    for entry in report["rounds"]:
        quality = entry["gold"] if has_gold else entry["win_rate"].get("sft")
        points.append({"name": f"round {entry['round']}", "quality": quality, "kl": entry["kl"]})
    return points, "gold reward" if has_gold else "win rate against SFT"


# --- the table -------------------------------------------------------------------------------------------------------


def markdown(report: Mapping[str, Any]) -> str:
    """The results as Markdown: one table with a row per policy, and one of the win rates."""
    lines = [
        "# Rounds",
        "",
        f"Measured on {report['eval_prompts']} held-out prompts, one completion each. In brackets: 95 % bootstrap "
        "intervals over prompts. KL is to the SFT policy, in nats per completion.",
        "",
        *without_empty_columns(HEADER, [sft_row(report["sft"]), *map(policy_row, report["rounds"])]),
        "",
    ]
    rates = win_rate_rows(report["rounds"])
    if rates:
        lines += ["Win rate of the policy of a row against that of a column:", "", *rates, ""]
    return "\n".join(lines)


HEADER = ("policy", "labels", "reward model accuracy", "gold", "gold gain over SFT", "proxy gain", "KL", "tokens")


def sft_row(sft: Mapping[str, Any]) -> list[str]:
    return ["SFT", "0", "", with_interval(sft.get("gold")), "", "", "0", f"{sft['length']['mean']:.1f}"]


def policy_row(entry: Mapping[str, Any]) -> list[str]:
    reward_model = entry.get("reward_model", {})
    accuracy = ""
    if "accuracy" in reward_model:
        accuracy = with_interval({"mean": reward_model["accuracy"], "ci95": reward_model.get("accuracy_ci95")})
    return [
        f"round {entry['round']}",
        str(entry["labels"]),
        accuracy,
        with_interval(entry.get("gold")),
        with_interval(entry.get("gold_gain", {}).get("sft"), signed=True),
        with_interval(entry.get("proxy_gain", {}).get("sft"), signed=True),
        with_interval(entry["kl"]),
        f"{entry['length']['mean']:.1f}",
    ]


def win_rate_rows(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of win rates; empty if nothing was judged."""
    if not any(entry["win_rate"] for entry in entries):
        return []
    opponents = ["sft", *(entry["policy"] for entry in entries[:-1])]
    rows = []
    for entry in entries:
        rates = [with_interval(entry["win_rate"].get(opponent)) for opponent in opponents]
        rows.append([f"round {entry['round']}", *rates])
    names = ["SFT" if name == "sft" else name.replace("-", " ") for name in opponents]
    return table(["", *names], rows)


def without_empty_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table of the columns that have an entry: a run without gold reward has no column of it."""
    kept = [column for column in range(len(header)) if any(row[column] for row in rows)]
    return table([header[column] for column in kept], [[row[column] for column in kept] for row in rows])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]]


def with_interval(value: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """A mean with its interval, such as `0.52 [0.43, 0.60]`; empty without a value."""
    if value is None:
        return ""
    spec = "+.2f" if signed else ".2f"
    text = format(value["mean"], spec)
    interval = value.get("ci95")
    if interval is None:
        return text
    low, high = interval
    return f"{text} [{low:{spec}}, {high:{spec}}]"


def print_table(report: Mapping[str, Any]) -> None:
    """Prints the tables of `rounds.md`."""
    Console(width=140).print(Markdown(markdown(report)))


# --- the cards -------------------------------------------------------------------------------------------------------


def write_policy_card(rounds: "Rounds", report: Mapping[str, Any], number: int) -> None:
    """Writes report and card of a round's policy again, with what the rounds measured and what it was made from."""
    folder = rounds.round_folder(number) / "policy"
    entry = report["rounds"][number - 1]
    own = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    section = rounds.args.learner
    start = start_in_words(entry, first_policy(rounds.model_args))
    own[section] = own[section] | {"start": start} | against_sft(report, entry)
    if "gold" in entry and rounds.args.gold is None:
        own["gold_reward"] = "vader"
    shutil.copyfile(rounds.folder / PLOT, folder / PLOT)
    card = own["card"] | {
        "lineage": lineage_of_policy(rounds, report, number),
        "notes": notes(rounds, report, number),
        "samples": samples(rounds, number),
        "plot": PLOT,
        "caption": "the policies of all rounds so far",
    }
    own["rounds"] = report["rounds"][:number]
    write_report_and_card(folder, own, card)


def first_policy(model_args: ModelArguments) -> str:
    """The policy of round 0 in words: of which kind it is, if its report says so, and else its name."""
    kind = kind_of_start(model_args)
    if kind is not None:
        return f"the {STARTS[kind]}"
    name = model_args.model_name_or_path
    is_adapter = adapter_base(name, model_args.revision) is not None
    return f"the {'adapter' if is_adapter else 'base model'} {public_name(name)}"


def start_in_words(entry: Mapping[str, Any], first: str) -> str:
    """What the policy of a round started from. `first` is the policy of round 0."""
    if entry["start"] == "sft":
        return first
    return "the policy of " + entry["start"].replace("-", " ")


def against_sft(report: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a card: before is the SFT policy, after is the policy of the round."""
    numbers = {
        "n": entry["kl"]["n"],
        "kl": entry["kl"]["mean"],
        "kl_ci95": entry["kl"]["ci95"],
        "mean_length_before": report["sft"]["length"]["mean"],
        "mean_length_after": entry["length"]["mean"],
    }
    if "gold" in entry:
        numbers["eval_rewards"] = ["gold"]
        numbers["gold_before"] = report["sft"]["gold"]["mean"]
        numbers["gold_after"] = entry["gold"]["mean"]
        numbers["gold_n"] = entry["gold_gain"]["sft"]["n"]  # a gold reward may leave out prompts
        numbers["gold_gain"] = entry["gold_gain"]["sft"]["mean"]
        numbers["gold_gain_ci95"] = entry["gold_gain"]["sft"]["ci95"]
    return numbers


def lineage_of_policy(rounds: "Rounds", report: Mapping[str, Any], number: int) -> dict[str, str]:
    """What a policy was made from: first policy, start, reward model, and the judgments of every round so far."""
    label = STARTS.get(kind_of_start(rounds.model_args), "first policy")
    made_from = {label: lineage_of(rounds.location(0), rounds.model_args.revision)}
    if rounds.args.start_from == "last" and number > 1:
        made_from[f"policy of round {number - 1}"] = lineage_of(rounds.location(number - 1))
    if rounds.args.learner == "ppo":
        made_from["reward model"] = lineage_of(str(rounds.round_folder(number) / "reward_model"))
    for entry in report["rounds"][:number]:
        path = rounds.round_folder(entry["round"]) / "comparisons.jsonl"
        judged = f"{entry['labels_of_round']} labels by {entry['judged_by']}"
        made_from[f"judgments of round {entry['round']}"] = (
            f"{lineage_of(str(path), dataset=True, rows=entry['prompts'])}, {judged}"
        )
    made_from["prompts"] = lineage_of(str(rounds.data / "prompts" / "train.jsonl"), dataset=True)
    return made_from


def notes(rounds: "Rounds", report: Mapping[str, Any], number: int) -> list[str]:
    """Sentences on how the policy of a round was trained and measured."""
    args = rounds.args
    entry = report["rounds"][number - 1]
    first = first_policy(rounds.model_args)
    lines = [
        f"Round {entry['round']} of {args.learner.upper()}, started from {start_in_words(entry, first)}, to which the "
        f"KL penalty of training refers. KL, rewards and lengths below compare it with {first}.",
        f"One completion for each of {args.eval_prompts} held-out prompts was sampled at temperature "
        f"{args.temperature:g} with seed {args.seed} and cut at {args.max_completion_length} tokens. Samples are of "
        "the first prompts.",
    ]
    judged_by = {earlier["judged_by"] for earlier in report["rounds"][:number]}
    if judged_by & {"simulated", "mixed"}:
        lines.append(f"Judgments by simulated annotators are a gold reward with noise {args.noise:g}, not people.")
    for opponent, rate in entry["win_rate"].items():
        lines.append(f"Win rate against {opponent}: {with_interval(rate)} on {rate['n']} held-out prompts.")
    return lines


def samples(rounds: "Rounds", number: int) -> list[dict[str, str]]:
    """The first held-out prompts with the completions of the SFT policy and of a round's policy."""
    before = read_rows(rounds.evaluation_file(0))
    after = read_rows(rounds.evaluation_file(number))
    shown = []
    for first, second in zip(before[:SAMPLES], after[:SAMPLES], strict=True):
        texts = {"before": plain_text(first["completion"]), "after": plain_text(second["completion"])}
        shown.append({"prompt": plain_text(first["prompt"])} | texts)
    return shown


def read_report(folder: str | Path) -> dict[str, Any]:
    """The report of a finished run."""
    return json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
