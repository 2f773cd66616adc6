# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-rlhf-ext==0.1.*"]
# ///
r"""Best-of-n: samples n completions of each prompt, and keeps the one with the highest reward.

hf-rlhf best-of-n --model_name_or_path runs/sft --reward_model runs/reward --dataset_name prompts.jsonl --n 16 \
    --write demonstrations comparisons --output_dir runs/best_of_n

The folder gets demonstrations.jsonl (for hf-rlhf sft: rejection-sampling fine-tuning), comparisons.jsonl (for DPO or
hf-rlhf reward) or answers.jsonl, and report.json with reward and KL for every n up to --n. The same command goes on
where a run stopped. With another --write or reward, the samples of the folder are used again.
"""

# First, because it hides messages of other libraries that appear when they are imported.
from hf_rlhf_ext.cli.output import prepare_output_dir, refuse_used_folder
from hf_rlhf_ext.cli.parsing import parse_recipe, run_recipe
from hf_rlhf_ext.cli.stopped_runs import refuse_deleting_inputs
from hf_rlhf_ext.cli.stopping import Interrupted, number_of
from hf_rlhf_ext.compat import versions

# isort: split
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_rlhf_ext.cli import main_options
from hf_rlhf_ext.cli.locking import only_process
from hf_rlhf_ext.cli.quiet import library_output
from hf_rlhf_ext.collect.sampling import PolicySpec
from hf_rlhf_ext.collect.tasks import write_rows
from hf_rlhf_ext.data.json_columns import rows_of
from hf_rlhf_ext.data.media import refuse_media_columns
from hf_rlhf_ext.data.prompting import as_user_turn
from hf_rlhf_ext.data.text import is_messages, is_text, plain_text
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.ppo.engine import TransformersEngine
from hf_rlhf_ext.readers.prompts import load_prompts
from hf_rlhf_ext.recipes.best_of_n_parts.options import WRITTEN, ModelsArguments, OutputArguments, PromptArguments
from hf_rlhf_ext.recipes.best_of_n_parts.report import print_report, report_of
from hf_rlhf_ext.recipes.chat_parts.models import Speaker, load_cast
from hf_rlhf_ext.recipes.chat_parts.plan import Plan
from hf_rlhf_ext.reward.ensemble import load_reward
from hf_rlhf_ext.study.best_of_n import BestOfN, best_of_n
from hf_rlhf_ext.study.best_of_n_file import OtherSettings
from hf_rlhf_ext.study.best_of_n_rewards import CompletionRewards, Reward

ARGUMENTS = (PromptArguments, ModelsArguments, OutputArguments)
SAMPLES = "samples.jsonl"


def run_best_of_n(prompts: PromptArguments, models: ModelsArguments, output: OutputArguments) -> dict[str, Any]:
    """Samples, scores, and writes rows and report. Returns the report."""
    prompts.check()
    models.check()
    functions, gold = models.load_functions(), models.load_gold()
    folder = Path(output.output_dir)
    if "comparisons" in output.write and prompts.n < 2:
        raise UserError(f"write: comparisons are the best and the worst of several: raise --n, which is {prompts.n}.")
    goes_on = (folder / SAMPLES).is_file() and not output.overwrite
    if not goes_on and not output.overwrite:
        refuse_used_folder(folder, "samples of best-of-n")
    rows = read_rows(prompts)
    if output.overwrite:
        refuse_deleting_inputs(folder, (prompts, models))
    with only_process(folder):
        prepare_output_dir(folder, resume=goes_on, overwrite=output.overwrite)
        if goes_on:
            print(f"goes on with {folder / SAMPLES}")
        try:
            result, gold_scores, formula = sample(rows, prompts, models, functions, gold, folder / SAMPLES)
        except KeyboardInterrupt as stop:
            is_kept = (folder / SAMPLES).is_file()
            what = f"while sampling: {folder / SAMPLES} is kept" if is_kept else "before the first samples"
            raise Interrupted(number_of(stop), what, "go on" if is_kept else "start again") from None
        report = {"reward": formula, **report_of(result, gold_scores), **write(result, output)}
        report["settings"] = prompts.sampling() | {
            "policy": models.model_name_or_path,
            "reward_model": models.reward_model,
            "reward_funcs": models.reward_funcs,
            "gold": models.gold,
        }
        report["versions"] = versions()
        text = json.dumps(report, indent=2, allow_nan=False) + "\n"
        (folder / "report.json").write_text(text, encoding="utf-8")
    refuse_empty(report, output.write)
    return report


def read_rows(args: PromptArguments) -> list[dict[str, Any]]:
    """Reads the prompts with their other columns, and prints what was read.

    Raises:
        UserError: the source cannot be read, has no prompts, or a row has a prompt that is neither text nor messages.
    """
    try:
        dataset, report = load_prompts(args.dataset_name, args.dataset_split, columns=args.column_roles())
    except UserError as error:
        raise UserError(f"dataset_name: {str(error).removeprefix('dataset: ')}") from error
    print(report.summary())
    refuse_media_columns(dataset, where=f"dataset_name: {args.dataset_name}")
    if args.n_prompts is not None:
        dataset = dataset.select(range(min(args.n_prompts, len(dataset))))
    rows = list(rows_of(dataset))
    for number, row in enumerate(rows):
        if not is_text(row["prompt"]) or not plain_text(row["prompt"]).strip():
            raise UserError(
                f"dataset_name: row {number} of {args.dataset_name} has no prompt of text or messages: fix or drop it."
            )
    return rows


def sample(
    rows: list[dict[str, Any]],
    prompts: PromptArguments,
    models: ModelsArguments,
    functions: Sequence[Reward],
    gold: Reward | None,
    path: Path,
) -> tuple[BestOfN, list[list[float | None]] | None, str]:
    """Loads the models, samples and scores. Returns the samples, their gold rewards, and the reward as a formula."""
    for reward in [*functions, *([] if models.gold is None or isinstance(gold, str) else [gold])]:
        CompletionRewards(reward).check_columns(rows[0] if rows else [])  # before anything is loaded
    spec = PolicySpec("policy", models.model_name_or_path, models.model_revision)
    cast = load_cast(Plan([spec], models.reward_model), models.cast())
    (speaker,) = cast.speakers
    rows = in_form(rows, speaker, prompts.prompt_form)
    rewards = [*([] if cast.scorer is None else [cast.scorer]), *functions]
    if isinstance(gold, str):  # loaded and checked before anything is sampled
        try:
            gold = load_reward(gold, trust_remote_code=models.trust_remote_code)
            CompletionRewards(gold).check_prompts(any(is_messages(row["prompt"]) for row in rows))
        except UserError as error:
            raise UserError(f"gold: {error}") from error
    options = prompts.sampling() | {"tokenizer": speaker.tokenizer, "path": path}
    # Merging needs an adapter.
    options["engine"] = TransformersEngine(merge=speaker.has_adapter)
    with speaker.activated() as model:
        try:
            result = best_of_n(model, rows, rewards, prompts.n, reward_weights=models.reward_weights, **options)
        except OtherSettings as error:
            raise UserError(
                f"output_dir: {path} has samples with {error.difference}: use the same options to go on, pass another "
                "--output_dir, or --overwrite true to sample again."
            ) from None
        gold_scores = None
        if gold is not None:
            try:
                measured = best_of_n(model, rows, gold, prompts.n, **options)  # the same samples, from the file
            except UserError as error:
                raise UserError(f"gold: {error}") from error
            gold_scores = on_the_same_prompts(measured, result)
    return result, gold_scores, CompletionRewards(rewards, models.reward_weights).formula


def in_form(rows: list[dict[str, Any]], speaker: Speaker, form: str) -> list[dict[str, Any]]:
    """The rows with prompts as the policy gets them: text, or messages where it answers those."""
    if form == "messages" and speaker.tokenizer.chat_template is None:
        raise UserError("prompt_form: the policy has no chat template for messages: leave it out, or pass text.")
    as_messages = form == "messages" or (form == "auto" and speaker.uses_messages)
    n_texts = sum(isinstance(row["prompt"], str) for row in rows)
    if not as_messages or not n_texts:
        return rows
    if form == "auto":
        print(f"{n_texts} prompts are text: each is a turn of the user (--prompt_form text continues the text)")
    return [row | {"prompt": as_user_turn(row["prompt"])} for row in rows]


def on_the_same_prompts(measured: BestOfN, result: BestOfN) -> list[list[float | None]]:
    """The gold rewards of the prompts in `result`. A prompt of which gold scored nothing has None."""
    by_row = dict(zip(measured.rows, measured.rewards, strict=True))
    return [by_row.get(row, [None] * result.n) for row in result.rows]


def write(result: BestOfN, output: OutputArguments) -> dict[str, Any]:
    """Writes the rows that were asked for. Returns how many there are.

    Files of an earlier run on the same samples are written again, as another reward chooses other rows.
    """
    folder = Path(output.output_dir)
    earlier = [name for name in WRITTEN if name not in output.write and (folder / f"{name}.jsonl").is_file()]
    if earlier:
        print(f"also written again, with this reward: {', '.join(f'{name}.jsonl' for name in earlier)}")
    wanted = [*output.write, *earlier]
    counts: dict[str, Any] = {}
    if "demonstrations" in wanted:
        rows = result.demonstrations()
        write_rows(rows, folder / "demonstrations.jsonl")
        counts["demonstrations"] = len(rows)
    if "comparisons" in wanted:
        pairs = result.comparisons()
        write_rows(pairs.rows, folder / "comparisons.jsonl")
        counts["comparisons"] = {
            "rows": len(pairs.rows),
            "same_text": pairs.same_text,
            "same_reward": pairs.same_reward,
            "empty": pairs.empty,
        }
    if "answers" in wanted:
        rows = result.answers()
        write_rows(rows, folder / "answers.jsonl")
        counts["answers"] = len(rows)
    return counts


def refuse_empty(report: dict[str, Any], wanted: Sequence[str]) -> None:
    """Raises `UserError` if a file that was asked for has no rows."""
    if "demonstrations" in wanted and not report["demonstrations"]:
        raise UserError("write: there are no demonstrations: every best completion is empty: change the reward.")
    pairs = report.get("comparisons")
    if "comparisons" in wanted and not pairs["rows"]:
        counts = f"{pairs['same_text']} same text, {pairs['same_reward']} same reward, {pairs['empty']} empty"
        raise UserError(f"write: there are no comparisons ({counts}): raise --n, or change the reward.")


def main() -> None:
    prompts, models, output = parse_recipe(ARGUMENTS, description=__doc__, main_options=main_options.BEST_OF_N)
    with library_output(verbose=False):
        report = run_best_of_n(prompts, models, output)
    print_report(report)
    files = [f"{output.output_dir}/{name}.jsonl" for name in output.write]
    print(f"Report: {output.output_dir}/report.json · rows: {', '.join(files)}")


if __name__ == "__main__":
    run_recipe(main)
