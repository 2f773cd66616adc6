# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-rlhf-ext[quickstart]==0.1.*"]
# ///
"""Bradley-Terry reward model on comparisons: pairs or K completions a prompt, from any public format.

python recipes/reward.py --config recipes/configs/smollm2-135m/reward.yaml --dataset_name preferences.jsonl
"""

# First: it hides what the libraries below say whenever they are imported.
from hf_rlhf_ext.cli import parse_recipe, prepare_output_dir, run_recipe, versions

# isort: split
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_rlhf_ext import BradleyTerryConfig, BradleyTerryTrainer, load_comparisons
from hf_rlhf_ext.checkpointing import resolve_checkpoint
from hf_rlhf_ext.hub.card import write_card
from hf_rlhf_ext.hub.privacy import strip_local_paths
from hf_rlhf_ext.modeling.loading import load_base_model, load_tokenizer
from hf_rlhf_ext.scripts import (
    ComparisonArguments,
    DataArguments,
    ModelArguments,
    machine_defaults,
    public_name,
    refine,
    train_and_heldout,
)

ARGUMENTS = (DataArguments, ComparisonArguments, ModelArguments, BradleyTerryConfig)


def train_reward(
    data: DataArguments,
    model_args: ModelArguments,
    args: BradleyTerryConfig,
    *,
    comparisons: ComparisonArguments | None = None,
    normalization_dataset: Dataset | None = None,
    extra_report: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains, evaluates on held-out comparisons, and saves adapter, head, normalisation, report and card."""
    prepare_output_dir(args.output_dir, resume=args.resume_from_checkpoint, overwrite=data.overwrite)
    name, read = data.dataset_name, {"format": data.dataset_format, "revision": data.dataset_revision}
    rows, load_report = load_comparisons(name, split=data.dataset_train_split, **read)
    print(load_report.summary())
    split = data.dataset_test_split
    test = load_comparisons(name, split=split, **read)[0] if split else None
    rows = refine(rows, comparisons or ComparisonArguments())
    train, heldout = train_and_heldout(rows, data, test)
    trainer = BradleyTerryTrainer(
        load_base_model(
            model_args.model_name_or_path, task="reward", revision=model_args.revision, **model_args.base_options(args)
        ),
        args=args,
        train_dataset=train,
        eval_dataset=heldout if len(heldout) else None,
        processing_class=load_tokenizer(
            model_args.model_name_or_path, revision=model_args.revision, trust_remote_code=args.trust_remote_code
        ),
        peft_config=model_args.peft_config("SEQ_CLS"),
        normalization_dataset=normalization_dataset,
    )
    trainer.train(resume_from_checkpoint=resolve_checkpoint(args.resume_from_checkpoint, args.output_dir))
    trainer.save_model()
    (Path(args.output_dir) / "training_args.bin").unlink(missing_ok=True)  # a pickle: nothing here needs it
    measured = {"pairs": sum(map(len, train["pairs"]))}
    if len(heldout):
        metrics = trainer.evaluate()
        measured |= {name: metrics[f"eval_{name}"] for name in ("accuracy", "nll", "longer_wins_baseline")}
        measured |= {"accuracy_ci95": [metrics["eval_accuracy_low"], metrics["eval_accuracy_high"]]}
        measured |= {"heldout_pairs": int(metrics["eval_pairs"])}
    report = {"reward_model": measured | (extra_report or {}), "versions": versions()}
    report["command"] = strip_local_paths("python " + shlex.join(sys.argv))
    (Path(args.output_dir) / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    if len(heldout):
        write_card(args.output_dir, "reward_model", report, base_model=public_name(model_args.model_name_or_path))
    else:
        (Path(args.output_dir) / "README.md").unlink(missing_ok=True)  # PEFT's empty form, which names local folders
    return report


def main() -> None:
    data, comparisons, model_args, args = parse_recipe(ARGUMENTS, description=__doc__, defaults=machine_defaults())
    report = train_reward(data, model_args, args, comparisons=comparisons)
    for name, value in report["reward_model"].items():
        print(f"{name:>22}: {value:.3f}" if isinstance(value, float) else f"{name:>22}: {value}")
    print(f"Saved the reward model in {args.output_dir}. Next: recipes/ppo.py --reward_model {args.output_dir}")


if __name__ == "__main__":
    run_recipe(main)
