# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-rlhf-ext[quickstart]==0.1.*"]
# ///
"""Supervised fine-tuning on demonstrations, with TRL's SFTTrainer: the policy that reward model and PPO start from.

python recipes/sft.py --config recipes/configs/smollm2-135m/sft.yaml --dataset_name demonstrations.jsonl
"""

import json
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from hf_rlhf_ext.checkpointing import resolve_checkpoint
from hf_rlhf_ext.cli import parse_recipe, prepare_output_dir, run_recipe
from hf_rlhf_ext.data.formats import load_rows
from hf_rlhf_ext.modeling.loading import load_base_model, load_tokenizer
from hf_rlhf_ext.scripts import DataArguments, ModelArguments, train_and_heldout


def train_sft(
    data: DataArguments, model_args: ModelArguments, args: SFTConfig
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Trains on rows that TRL's SFTTrainer takes and saves adapter, tokenizer and figures in `args.output_dir`."""
    prepare_output_dir(args.output_dir, resume=args.resume_from_checkpoint, overwrite=data.overwrite)
    rows = load_rows(data.dataset_name, data.dataset_train_split, data.dataset_revision)
    test = load_rows(data.dataset_name, data.dataset_test_split) if data.dataset_test_split else None
    train, heldout = train_and_heldout(rows, data, test)
    trainer = SFTTrainer(
        load_base_model(model_args.model_name_or_path, revision=model_args.revision, **model_args.base_options()),
        args=args,
        train_dataset=train,
        eval_dataset=heldout if len(heldout) else None,
        processing_class=load_tokenizer(model_args.model_name_or_path, revision=model_args.revision),
        peft_config=model_args.peft_config("CAUSAL_LM"),
    )
    result = trainer.train(resume_from_checkpoint=resolve_checkpoint(args.resume_from_checkpoint, args.output_dir))
    metrics = result.metrics | (trainer.evaluate() if len(heldout) else {})
    trainer.save_model()
    (Path(args.output_dir) / "training_args.bin").unlink(missing_ok=True)  # a pickle: nothing here needs it
    (Path(args.output_dir) / "report.json").write_text(json.dumps({"sft": metrics}, indent=2) + "\n")
    return trainer.model, trainer.processing_class


def main() -> None:
    data, model_args, args = parse_recipe((DataArguments, ModelArguments, SFTConfig), description=__doc__)
    train_sft(data, model_args, args)
    print(f"Saved the SFT policy in {args.output_dir}. Next: judge its completions, then recipes/reward.py.")


if __name__ == "__main__":
    run_recipe(main)
