"""`hf-rlhf merge`: the adapter of a run and its base as one plain model, which Transformers opens without this library.

Command line: `hf-rlhf merge runs/ppo runs/ppo-merged`.
"""

import argparse
import shlex
from pathlib import Path

from ..errors import UserError, refuse_words
from .parsing import run_recipe
from .program import how_to_run
from .quiet import library_output

STAGES = ("sft", "reward_model", "policy")
"""Values of `--stage`, as in `run_folder.STAGES`."""


def make_parser() -> argparse.ArgumentParser:
    """The options of `hf-rlhf merge`."""
    parser = argparse.ArgumentParser(
        prog="hf-rlhf merge",
        usage="%(prog)s FOLDER [OUTPUT_DIR] [options]",
        description="Merges the adapter of a run into its base, which gives a plain model to open with Transformers "
        "alone, to push or to convert.",
    )
    parser.add_argument(
        "folder", metavar="FOLDER", help="folder of an adapter, or of a whole run (pipeline, quickstart, rounds)"
    )
    parser.add_argument(
        "output_dir",
        nargs="?",
        metavar="OUTPUT_DIR",
        help="folder to write the merged model to (default: FOLDER with -merged at its end)",
    )
    parser.add_argument("--output_dir", dest="output_option", metavar="OUTPUT_DIR", help="the same, as an option")
    parser.add_argument("--stage", choices=STAGES, help="which model of a whole run (default: the policy)")
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        default="bfloat16",
        help="data type of the merged weights (default: bfloat16)",
    )
    parser.add_argument(
        "--base_model", metavar="MODEL", help="path or Hub id of the base (default: the base recorded in the adapter)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a merged model that this command wrote into the output folder"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """`hf-rlhf merge`; `argv` are the words after it."""
    run_recipe(lambda: _run(argv))


def _run(argv: list[str] | None) -> None:
    parser = make_parser()
    parser.error = refuse_words
    args = parser.parse_args(argv)
    if args.output_dir is not None and args.output_option is not None:
        raise UserError("merge: the output folder is given twice: leave --output_dir out.")
    # Loaded late: `--help` and a wrong option should not wait for torch.
    from ..hub.merge import merge_run

    folder, name = model_to_merge(args.folder, args.stage)
    output_dir = args.output_dir or args.output_option or f"{name}-merged"
    with library_output(verbose=False):
        merged = merge_run(folder, output_dir, dtype=args.dtype, base_model=args.base_model, overwrite=args.overwrite)
    task = "AutoModelForSequenceClassification" if is_reward_model(merged) else "AutoModelForCausalLM"
    print(f"Merged {folder} into {merged}, a plain model: {task}.from_pretrained({str(merged)!r}). Next:")
    print(f"  {how_to_run('push')} {shlex.quote(str(merged))}")


def model_to_merge(folder: str, stage: str | None) -> tuple[str, str]:
    """The folder of the adapter, and the path to which `-merged` is added for the folder to write.

    Raises:
        UserError: there is no such folder, or the run has no such model.
    """
    from .run_folder import find_models, is_run_folder

    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"merge: no folder {folder}: give the folder of an adapter or of a run.")
    plain = str(path).rstrip("/")
    if not is_run_folder(path):
        if stage is not None:
            raise UserError(f"merge: {folder} is no folder of a whole run: leave --stage out.")
        return plain, plain
    run = find_models(path)
    stage = stage or "policy"
    place = getattr(run, stage)
    if place is None:
        found = ", ".join(name for name in STAGES if getattr(run, name) is not None)
        why = f" ({run.left_out[stage]})" if stage in run.left_out else ""
        remedy = f"choose another one with --stage, it has {found}" if found else "run its command again, which goes on"
        raise UserError(f"merge: {folder} has no {stage}{why}: {remedy}.")
    if not Path(place).expanduser().is_dir():
        raise UserError(f"merge: the {stage} of {folder} is {place}, which was given to the run: download it first.")
    return place, plain if stage == "policy" else f"{plain}-{stage}"


def is_reward_model(folder: Path) -> bool:
    """Whether a merged model is a reward model."""
    from ..reward.normalization import NORMALIZATION_FILE

    return (folder / NORMALIZATION_FILE).is_file()


if __name__ == "__main__":
    main()
