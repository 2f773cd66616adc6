# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-rlhf-ext==0.1.*"]
# ///
"""Supervised fine-tuning on demonstrations with TRL's SFTTrainer. The reward model and PPO start from its policy.

hf-rlhf sft --config smollm2-135m/sft.yaml --dataset_name demonstrations.jsonl
"""

# First, because it hides messages of other libraries that appear when they are imported.
from hf_rlhf_ext.cli.parsing import parse_recipe, run_recipe
from hf_rlhf_ext.cli.stopping import forget_checkpoints_of_stops, open_run, stoppable, stopping_callback

# isort: split
import time
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from datasets import Dataset, Value
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import SFTConfig

from hf_rlhf_ext.cli import main_options
from hf_rlhf_ext.cli.finish import check_push, finish_run
from hf_rlhf_ext.cli.first_checks import check_policy_folder, check_training
from hf_rlhf_ext.cli.idle_options import say_idle_options
from hf_rlhf_ext.cli.lineage import base_lineage, data_records, hub_dataset, lineage_of, with_commit_read
from hf_rlhf_ext.cli.memory_check import StartArguments, check_memory
from hf_rlhf_ext.cli.next_steps import use_of
from hf_rlhf_ext.cli.options import (
    DataArguments,
    DemonstrationArguments,
    ModelArguments,
    machine_defaults,
)
from hf_rlhf_ext.cli.precision import print_quantization
from hf_rlhf_ext.cli.progress import show_progress
from hf_rlhf_ext.cli.quiet import library_output
from hf_rlhf_ext.cli.row_records import RowRecord
from hf_rlhf_ext.cli.rows import check_heldout, choose_demonstrations, describe_split, train_and_heldout
from hf_rlhf_ext.data.text import check_tokenizer, is_messages, without_start
from hf_rlhf_ext.data.tokenization import drop_unrenderable
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.reports.trainer_report import draw_plot, section_steps, trainer_card_options
from hf_rlhf_ext.hub.sft import PublishingSFTTrainer
from hf_rlhf_ext.modeling.adapters import adapters_in_autocast_dtype
from hf_rlhf_ext.modeling.loading import load_base_model, load_tokenizer
from hf_rlhf_ext.readers.formats import UnknownFormat, load_demonstrations, load_rows
from hf_rlhf_ext.training.engines import require_active
from hf_rlhf_ext.training.optimizers import require_optimizer
from hf_rlhf_ext.training.refused_options import in_one_line
from hf_rlhf_ext.training.sft_config import CheckedSFTConfig

EVALUATED = ("loss", "mean_token_accuracy", "entropy", "num_tokens")
"""Metrics of SFTTrainer's evaluation."""

ARGUMENTS = (DataArguments, DemonstrationArguments, StartArguments, ModelArguments, CheckedSFTConfig)
TRAINED_COLUMNS = (
    "prompt",
    "completion",
    "messages",
    "tools",
    "chat_template_kwargs",
    "text",
    "input_ids",
    "labels",
)
"""Columns that SFTTrainer reads."""


@stoppable
def train_sft(
    data: DataArguments,
    model_args: ModelArguments,
    args: SFTConfig,
    *,
    demonstrations: DemonstrationArguments | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    verbose: bool = False,
    says_rows: bool = True,
    memory: str | None = None,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Trains on demonstrations of any supported format. Saves adapter, tokenizer and metrics in `args.output_dir`.

    With `says_rows=False`, how many rows were read and held out is only printed if it is not what the file has.
    `callbacks` are added to the trainer. `memory` is what `check_memory` does where the run does not fit.
    """
    check_push(args, model_args, data)
    model_args.check_task_type("CAUSAL_LM")
    check_metric(args)
    check_training(args)
    require_optimizer(args)
    if demonstrations is None:
        demonstrations = DemonstrationArguments()
    check_policy_folder(model_args.model_name_or_path)
    check_memory("sft", args, model_args, mode=memory, evaluates=data.holds_rows_out)
    checkpoint = open_run("sft", args, (data, demonstrations, model_args, args), overwrite=data.overwrite)
    start = time.monotonic()
    train, heldout, chosen, rows_read = read_rows(data, args, demonstrations, says_rows=says_rows)
    record = RowRecord(data, train, heldout)
    dataset = hub_dataset(data)

    tokenizer = load_tokenizer(
        model_args.model_name_or_path, revision=model_args.revision, trust_remote_code=args.trust_remote_code
    )
    first_prompt = train[0].get("messages", train[0].get("prompt"))
    check_tokenizer(tokenizer, needs_chat_template=is_messages(first_prompt))
    train = rows_for_trl(train, tokenizer, args.dataset_text_field, source=data.dataset_name)
    if len(heldout):
        heldout = rows_for_trl(heldout, tokenizer, args.dataset_text_field, source=f"{data.dataset_name} (held out)")
    model = load_base_model(
        model_args.model_name_or_path, revision=model_args.revision, **model_args.base_options(args)
    )
    print_quantization(model)
    with in_one_line():  # what TRL refuses: a token that is not in the vocabulary, a template that does not fit
        trainer = PublishingSFTTrainer(
            model,
            args=args,
            train_dataset=trained_columns(train),
            eval_dataset=trained_columns(heldout) if len(heldout) else None,
            processing_class=tokenizer,
            peft_config=model_args.peft_config("CAUSAL_LM"),
            callbacks=[*callbacks, stopping_callback()],
        )
    require_active(args, trainer.accelerator)
    show_progress(trainer, verbose=verbose)
    metrics = train_and_evaluate(trainer, args, checkpoint, n_heldout=len(heldout))
    trainer.save_model(_internal_call=True)  # it is pushed at the end, with its card
    forget_checkpoints_of_stops(args)
    (Path(args.output_dir) / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing here needs

    card = trainer_card_options(trainer)
    dataset = with_commit_read(dataset, card)
    card |= {
        **draw_loss(trainer, args),
        "lineage": {
            **base_lineage(card, model_args.model_name_or_path, model_args.revision),
            "demonstrations": lineage_of(data.dataset_name, data.dataset_revision, dataset=True, rows=len(train)),
        },
        "data": data_records(data, "demonstrations", train, heldout, dataset, known=card),
        "rows_read": [*rows_read, *card.get("rows_read", ())],
        **dataset,
    }
    options = (data, demonstrations, model_args, args)
    measured = metrics | chosen | section_steps(trainer)
    report = {"sft": measured, **record.write(args.output_dir, is_first_process=args.process_index == 0)}
    finish_run(args, "sft", report, options, seconds=time.monotonic() - start, card=card)
    return trainer.model, trainer.processing_class


def read_rows(
    data: DataArguments, args: SFTConfig, demonstrations: DemonstrationArguments, *, says_rows: bool = True
) -> tuple[Dataset, Dataset, dict[str, Any], list[str]]:
    """Returns rows to train on, held-out rows, the report's part on how they were chosen, and what was read."""
    split, text_field = data.dataset_train_split, args.dataset_text_field
    rows, rows_read = read_demonstrations(data, split, text_field, demonstrations, says_rows=says_rows)
    test = None
    if data.dataset_test_split:
        test, _ = read_demonstrations(data, data.dataset_test_split, text_field, demonstrations, says_rows=says_rows)
    n_read = len(rows)
    rows, chosen = choose_demonstrations(rows, demonstrations)
    train, heldout = train_and_heldout(rows, data, test)
    if says_rows or len(rows) != n_read:
        print(describe_split(data, len(rows), train, heldout, unit="demonstrations"))
    check_heldout(args, heldout)
    return train, heldout, chosen, rows_read


def read_demonstrations(
    data: DataArguments,
    split: str,
    text_field: str,
    demonstrations: DemonstrationArguments,
    *,
    says_rows: bool = True,
) -> tuple[Dataset, list[str]]:
    """Reads demonstrations, with a line on what was read. Text and token ids, for SFTTrainer, are left as they are."""
    try:
        rows, report = load_demonstrations(
            data.dataset_name,
            split=split,
            every_turn=demonstrations.every_turn,
            category_column=demonstrations.category_column,
            **data.reading(),
        )
    except UnknownFormat:
        rows = load_rows(data.dataset_name, split, data.dataset_revision, config=data.dataset_config)
        is_text_or_ids = {text_field, "input_ids"} & set(rows.column_names)
        if data.dataset_format is None and is_text_or_ids:
            return rows, []
        raise
    if says_rows or report.dropped:
        print(report.summary())
    return rows, [report.summary()]


def rows_for_trl(rows: Dataset, tokenizer: PreTrainedTokenizerBase, text_field: str, *, source: str) -> Dataset:
    """Drops rows that the chat template cannot render, and removes BOS from texts, which SFTTrainer adds itself.

    Raises:
        UserError: no row is left.
    """
    if {"prompt", "completion"} <= set(rows.column_names):
        rows, report = drop_unrenderable(rows, tokenizer, source=source)
        if not len(rows):
            raise UserError(f"{report.summary()}: no row is left: use a model whose chat template renders these rows.")
        if report.dropped:
            print(report.summary())

    for name in ("prompt", text_field):
        if name in rows.column_names and rows.features[name] == Value("string"):
            texts = [text and without_start(tokenizer, text) for text in rows[name]]
            if texts != list(rows[name]):
                rows = rows.remove_columns(name).add_column(name, texts)
    return rows


def trained_columns(rows: Dataset) -> Dataset:
    """The rows with only the columns that SFTTrainer reads."""
    return rows.select_columns([name for name in rows.column_names if name in TRAINED_COLUMNS])


def check_metric(args: SFTConfig) -> None:
    """Raises for a metric that SFTTrainer's evaluation does not have. Trainer would do so at the first evaluation."""
    name = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if name not in EVALUATED:
        nearest = get_close_matches(name, EVALUATED, n=1)
        remedy = f"set it to {nearest[0]}" if nearest else f"choose one of {', '.join(EVALUATED)}"
        raise UserError(f"metric_for_best_model: evaluations have no {name!r}: {remedy}.")


def train_and_evaluate(
    trainer: PublishingSFTTrainer, args: SFTConfig, checkpoint: str | None, *, n_heldout: int
) -> dict[str, Any]:
    """Trains, from a checkpoint if one is given. Returns the metrics of training and of the held-out rows."""
    with adapters_in_autocast_dtype(trainer.model, enabled=args.bf16 or args.fp16):
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        if n_heldout:
            metrics |= trainer.evaluate()
            metrics["heldout_rows"] = n_heldout
    return metrics


def draw_loss(trainer: PublishingSFTTrainer, args: SFTConfig) -> dict[str, Any]:
    """Draws the curve of the loss. Returns the card's entries for it; empty for a run with too few logs for a curve."""
    if args.process_index != 0:  # only the first process writes a card
        return {}
    drawn = draw_plot(trainer, Path(args.output_dir))
    return {} if drawn is None else dict(zip(("plot", "caption"), drawn, strict=True))


def main() -> None:
    data, demonstrations, terminal, model_args, args = parse_recipe(
        ARGUMENTS,
        description=__doc__,
        defaults=machine_defaults() | {"output_dir": "runs/sft"},
        main_options=main_options.SFT,
    )
    say_idle_options(data, demonstrations, model_args, args)
    with library_output(verbose=terminal.verbose):
        train_sft(
            data,
            model_args,
            args,
            demonstrations=demonstrations,
            verbose=terminal.verbose,
            memory=terminal.check_memory,
        )
    print(f"Saved the SFT policy in {args.output_dir}. Next, before `hf-rlhf reward`:")
    print(*use_of(args.output_dir), sep="\n")


if __name__ == "__main__":
    run_recipe(main)
