"""The results of a pipeline: report.json, report.md, and the cards of its models."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markdown import Markdown

from hf_rlhf_ext.cli.finish import write_report_and_card
from hf_rlhf_ext.cli.lineage import data_records, hub_dataset, lineage_of, public_name
from hf_rlhf_ext.cli.program import PROGRAM, command_line, how_to_run
from hf_rlhf_ext.cli.stages import StageRunner
from hf_rlhf_ext.compat import versions
from hf_rlhf_ext.hub.cards.markdown import escape_markdown
from hf_rlhf_ext.hub.privacy import strip_local_paths
from hf_rlhf_ext.recipes.rounds_parts.report import table

if TYPE_CHECKING:
    from hf_rlhf_ext.recipes.pipeline import Pipeline

FOLDERS = {"sft": "sft", "reward_model": "reward_model", "ppo": "policy"}
"""Folder of the model that a stage trains."""
FEW = 20
"""An interval of fewer pairs or prompts is not shown: that of a handful of equal values has no width."""
OF_KL = (
    "KL is estimated from one completion for each held-out prompt, so with few prompts it can be below 0. The KL in "
    "the log of training is that of completions that were sampled before an update."
)
REWARD_KEYS = "comparisons (which of two answers is better), reward_model (a trained one) or reward_funcs"


def write_results(pipeline: "Pipeline", stages: StageRunner) -> dict[str, Any]:
    """Writes report.json, report.md and the cards of the finished stages. Returns the report."""
    report = collect_report(pipeline, stages)
    (pipeline.folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (pipeline.folder / "report.md").write_text(markdown(report, pipeline), encoding="utf-8")
    for stage, folder in FOLDERS.items():
        if stages.is_finished(stage):
            write_card_of_stage(pipeline, report, stage, folder)
    return report


def collect_report(pipeline: "Pipeline", stages: StageRunner) -> dict[str, Any]:
    """The content of `report.json`, from what the finished stages measured."""
    report: dict[str, Any] = {
        "seed": pipeline.args.seed,
        "base_model": public_name(pipeline.training.base),
        "first_policy": pipeline.first_policy(),
    }
    for stage in ("data", "sft", "reward_model", "check", "ppo"):
        if stages.is_finished(stage):
            report[stage] = stages.state["stages"][stage]["measured"]
    if stages.is_finished("ppo"):
        report["reward"] = pipeline.reward_in_words()
    return report | {
        "seconds": stages.seconds,
        "peak_memory_gb": stages.peak_memory_gb,
        "command": command_line(),
        "versions": versions(),
    }


# --- the table -------------------------------------------------------------------------------------------------------


def markdown(report: Mapping[str, Any], pipeline: "Pipeline") -> str:
    """The results as Markdown: what each stage measured, completions before and after PPO, and what to do next."""
    lines = [
        "# Pipeline",
        "",
        f"Base: {report['base_model']}. First policy: {report['first_policy']}. In brackets: 95 % bootstrap intervals "
        "over prompts. KL is to the first policy, in nats per completion.",
        "",
        *table(["stage", "rows", "what was measured", "seconds"], rows_of_table(report)),
        "",
    ]
    for entry in report.get("check", ()):
        if "verdict" in entry:
            found = " ".join([entry["verdict"], *few_in_check(entry)])
            lines += [f"Readiness of {named(entry['model'], pipeline)}: {escape_markdown(found)}", ""]
    if "reward" in report:
        lines += [escape_markdown(report["reward"]), ""]
    if "kl" in report.get("ppo", ()):
        lines += [OF_KL, ""]
    lines += samples_in_markdown(samples_of_policy(pipeline, report))
    lines += ["## Next", "", "```bash"]
    lines += [f"{PROGRAM} {command}" for command in next_commands(pipeline, report)]
    lines += ["```", ""]
    return "\n".join(lines)


def rows_of_table(report: Mapping[str, Any]) -> list[list[str]]:
    """One row per measured number; stage, rows and seconds are in the first one of a stage."""
    rows = []
    of_stage = {"sft": sft_lines, "reward_model": reward_model_lines, "check": check_lines, "ppo": ppo_lines}
    for stage, lines_of in of_stage.items():
        if stage not in report:
            continue
        n_rows, lines = lines_of(report)
        seconds = f"{report['seconds'][stage]:.0f}"
        for number, line in enumerate(lines):
            rows.append([stage, n_rows, line, seconds] if number == 0 else ["", "", line, ""])
    return rows


def sft_lines(report: Mapping[str, Any]) -> tuple[str, list[str]]:
    measured = report["sft"]
    n_rows = f"{measured['trained_rows']} demonstrations"
    if "eval_loss" not in measured:
        return n_rows, [f"loss in training {measured['train_loss']:.3f}; nothing was held out"]
    return n_rows, [
        f"held-out loss {measured['eval_loss']:.3f} nats per token (rows: {measured['heldout_rows']}), in training "
        f"{measured['train_loss']:.3f}"
    ]


def reward_model_lines(report: Mapping[str, Any]) -> tuple[str, list[str]]:
    measured = report["reward_model"]
    n_rows = f"{measured['pairs']} judged pairs"
    if "accuracy" not in measured:
        reason = "every held-out judgment is a tie" if measured.get("heldout_pairs") else "nothing was held out"
        return n_rows, [f"{reason}, so its accuracy is not known"]
    n_pairs = measured["decided_pairs"]
    accuracy = with_interval(measured["accuracy"], measured.get("accuracy_ci95"), n=n_pairs, unit="pair")
    pairs = "" if n_pairs < FEW else f" (pairs without ties: {n_pairs})"
    return n_rows, [
        f"held-out accuracy {accuracy}{pairs}",
        f"always choosing the longer answer: {measured['longer_wins_baseline']:.2f}",
    ]


def check_lines(report: Mapping[str, Any]) -> tuple[str, list[str]]:
    entries = report["check"]
    lines = []
    for number, entry in enumerate(entries, start=1):
        which = f"model {number}: " if len(entries) > 1 else ""
        if "verdict" not in entry:
            lines.append(f"{which}not checked: {entry['reason']}")
            continue
        accuracy = with_interval(entry["accuracy"], entry.get("accuracy_ci95"), n=n_decided(entry), unit="pair")
        ready = "ready" if entry["ready"] else "not ready"
        lines.append(f"{which}{ready}; accuracy {accuracy}, by length alone {entry['length_baseline']:.2f}")
    pairs = sum(entry.get("pairs", 0) for entry in entries)
    return f"{pairs} pairs", lines


def ppo_lines(report: Mapping[str, Any]) -> tuple[str, list[str]]:
    measured = report["ppo"]
    updates = "update" if measured["updates"] == 1 else "updates"
    n_rows = f"{measured['trained_rows']} prompts, {measured['updates']} {updates}"
    lines = []
    if "proxy_before" in measured:
        lines.append(f"reward on held-out prompts ({measured['n']}) {change_in_words(measured, 'proxy')}")
    for name in measured.get("eval_rewards", ()):
        if f"{name}_before" in measured:
            lines.append(f"{escape_markdown(name)} {change_in_words(measured, name)}")
    if "kl" in measured:
        kl = with_interval(measured["kl"], measured["kl_ci95"], n=measured["n"], unit="prompt")
        lines.append(f"KL {kl}")
        lines.append(
            f"length {measured['mean_length_before']:.1f} → {measured['mean_length_after']:.1f} tokens per completion"
        )
    if "stop_reason" in measured:
        lines.append(f"a guard stopped training early: {measured['stop_reason']}")
    return n_rows, lines or ["nothing was held out, so reward and KL on new prompts are not known"]


def change_in_words(measured: Mapping[str, Any], name: str) -> str:
    """The mean of a reward before and after PPO, and its gain, such as `0.10 → 0.50, gain +0.40 [+0.20, +0.60]`."""
    interval = measured[f"{name}_gain_ci95"]
    gain = with_interval(measured[f"{name}_gain"], interval, "+", n=measured["n"], unit="prompt")
    return f"{measured[f'{name}_before']:.2f} → {measured[f'{name}_after']:.2f}, gain {gain}"


def n_decided(entry: Mapping[str, Any]) -> int:
    """Number of pairs without ties in a check, from which its accuracy is."""
    return entry.get("decided_pairs", entry["pairs"])  # runs of earlier versions have the latter only


def too_few(n: int, unit: str) -> str:
    """`only 4 pairs: too few to tell`; empty for `FEW` or more."""
    if n >= FEW:
        return ""
    return f"only {n} {unit}{'s' if n != 1 else ''}: too few to tell"


def few_in_check(entry: Mapping[str, Any]) -> list[str]:
    """A sentence for the verdict of a check, if it has few pairs; empty otherwise."""
    few = too_few(n_decided(entry), "pair")
    return [f"It was checked on {few}."] if few else []


def with_interval(value: float, interval: Sequence[float] | None, sign: str = "", *, n: int, unit: str) -> str:
    """A number with its interval, such as `0.52 [0.43, 0.60]`; with few pairs or prompts, their number instead."""
    text = f"{value:{sign}.2f}"
    few = too_few(n, unit)
    if few:
        return f"{text} ({few})"
    if interval is None:
        return text
    low, high = interval
    return f"{text} [{low:{sign}.2f}, {high:{sign}.2f}]"


def samples_of_policy(pipeline: "Pipeline", report: Mapping[str, Any]) -> list[dict[str, str]]:
    """Held-out prompts with their completions before and after PPO, from the policy's own report."""
    if "ppo" not in report:
        return []
    own = json.loads((pipeline.folder / "policy" / "report.json").read_text(encoding="utf-8"))
    return own["card"].get("samples", [])


def samples_in_markdown(samples: Sequence[Mapping[str, str]]) -> list[str]:
    """The model's text may contain markup, which must be shown and not rendered."""
    if not samples:
        return []
    lines = ["## Completions before and after PPO", "", "Of the first held-out prompts, not selected.", ""]
    for row in samples:
        lines += [f"**{escape_markdown(row['prompt'])}**", ""]
        for end in ("before", "after"):
            lines.append(f"- {end}: {escape_markdown(row[end]) or '(empty)'}")
        lines.append("")
    return lines


def print_results(report: Mapping[str, Any], pipeline: "Pipeline") -> None:
    """Prints the table of `report.md`, and what to do next."""
    header = ["stage", "rows", "what was measured", "seconds"]
    Console(width=140).print(Markdown("\n".join(table(header, rows_of_table(report)))))
    folder = pipeline.args.output_dir
    cards = [f"{folder}/{place}/README.md" for stage, place in FOLDERS.items() if stage in report]
    print(f"Report: {folder}/report.md · {folder}/report.json · cards: {', '.join(cards) or 'none'}")
    if not pipeline.args.has_reward:
        print(
            f"No PPO, as it needs a reward: {REWARD_KEYS}. To go on from this SFT policy, give one of these, "
            f"sft_policy: {folder}/sft in place of demonstrations, prompts, and another output_dir."
        )
    print("Next:")
    for command in next_commands(pipeline, report):
        print(f"  {how_to_run(command)}")


def next_commands(pipeline: "Pipeline", report: Mapping[str, Any]) -> list[str]:
    """Commands of `hf-rlhf` that go on with what is finished, without the name of the program."""
    folder = pipeline.args.output_dir
    policy = "policy" if "ppo" in report else "sft" if "sft" in report else None
    if policy is None:
        return [f"push {folder}/reward_model"]
    commands = [f"chat {folder}", f"merge {folder}/{policy}"]
    prompts = pipeline.args.prompts
    if prompts is not None:
        commands.insert(1, f"generate {folder} --prompts {prompts}")
        commands.append(
            f"rounds --model_name_or_path {folder}/{policy} --prompts {prompts} --judge page --people YOUR_NAME "
            "--output_dir runs/rounds"
        )
    return [*commands, f"push {folder}/{policy}"]


# --- the cards -------------------------------------------------------------------------------------------------------


def write_card_of_stage(pipeline: "Pipeline", report: Mapping[str, Any], stage: str, folder: str) -> None:
    """Writes report and card of a model again, with the user's files in place of the copies that it was trained on."""
    path = pipeline.folder / folder
    role = {"sft": "demonstrations", "reward_model": "comparisons", "ppo": "prompts"}[stage]
    data = pipeline.data_of(role)
    own = json.loads((path / "report.json").read_text(encoding="utf-8"))
    card = own["card"]
    own_base = {name: text for name, text in card["lineage"].items() if name == "base model"}
    changes: dict[str, Any] = {"lineage": own_base | lineage(pipeline, report, stage)}
    changes |= hub_dataset(data)
    changes["data"] = data_of_card(card, role, data_records(data, role, (), (), changes)[0])
    for read in report["data"].get(role, {}).get("read", ())[:1]:
        # The first line of the card is about the copy, and the others are what the trainer dropped.
        changes["rows_read"] = [strip_local_paths(read), *card.get("rows_read", ())[1:]]
    added = []
    if stage == "ppo":
        added.append(f"PPO maximized this: {report['reward']}.")
    if stage != "sft":
        added += verdicts(report, pipeline)
    changes["notes"] = list(dict.fromkeys([*added, *card.get("notes", ())]))  # they are there if it is written again
    own["rows"]["source"] = lineage_of(data.dataset_name, data.dataset_revision, dataset=True)
    own["command"] = report["command"]
    own["pipeline"] = {name: report[name] for name in ("first_policy", "check", "reward") if name in report}
    write_report_and_card(path, own, card | changes)


def data_of_card(card: Mapping[str, Any], role: str, source: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The data of a card with the user's data set in place of the copies that were trained and evaluated on."""
    records = []
    for record in card.get("data", ()):
        if record["role"] in (role, "evaluation"):
            record = {**source, "role": record["role"], "rows": record["rows"]}
        records.append(record)
    return records


def lineage(pipeline: "Pipeline", report: Mapping[str, Any], stage: str) -> dict[str, str]:
    """What the model of a stage was made from."""
    if stage in ("sft", "reward_model"):
        role = "demonstrations" if stage == "sft" else "comparisons"
        return {role: of_file(pipeline, report, stage, role)}
    start, revision = pipeline.training.start()
    label = "SFT policy" if pipeline.args.demonstrations or pipeline.args.sft_policy else "start"
    made_from = {label: lineage_of(start, revision)}
    models = pipeline.args.reward_model
    if pipeline.args.trains_reward_model:
        models = [str(pipeline.folder / "reward_model")]
    for number, name in enumerate(models, start=1):
        made_from["reward model" if len(models) == 1 else f"reward model {number}"] = lineage_of(name)
    for name, source in pipeline.sources_of_functions().items():
        made_from[f"reward function {name}"] = source
    made_from["prompts"] = of_file(pipeline, report, stage, "prompts")
    return made_from


def of_file(pipeline: "Pipeline", report: Mapping[str, Any], stage: str, role: str) -> str:
    """A file of the user in a card: its name, digest, and the number of rows that were trained on."""
    given, revision = pipeline.given_for(role)
    return lineage_of(given, revision, dataset=True, rows=report[stage]["trained_rows"])


def verdicts(report: Mapping[str, Any], pipeline: "Pipeline") -> list[str]:
    """What the check found about each reward model, for a card."""
    # Of a reward model that was given, it may not be known on which rows it was trained.
    rows = "held-out comparisons" if pipeline.args.trains_reward_model else "the comparisons that were given"
    lines = []
    for entry in report.get("check", ()):
        if "verdict" in entry:
            found = [entry["verdict"], *few_in_check(entry)]
        else:
            found = [f"not done: {entry['reason']}."]
        lines.append(f"Check of the reward model on {rows}: {' '.join(found)}")
    return lines


def print_verdict(entry: Mapping[str, Any]) -> None:
    """Prints what the check found about a reward model. `entry` is what was measured, as in `report.json`."""
    if "verdict" not in entry:
        print(f"The reward model was not checked: {entry['reason']}.")
        return
    few = too_few(n_decided(entry), "pair")
    if entry["ready"]:
        print(f"Ready for PPO: no problem found{f', but in {few}' if few else ''}.")
        return
    print("Not ready for PPO:")
    for problem in [*entry["problems"], *filter(None, [few])]:
        print(f"  - {problem}")
    if not entry["better_than_chance"]:
        print(
            "warning: on held-out comparisons, the reward model is not clearly better than chance, so PPO may follow "
            "noise: give more comparisons.",
            file=sys.stderr,
        )


def named(model: str, pipeline: "Pipeline") -> str:
    """A reward model in the report."""
    return "the reward model" if pipeline.args.trains_reward_model else escape_markdown(model)
