"""Trains reward models under an engine, one case after another: `reward_run.py FOLDER CASES.json`.

A case is a JSON object with a `name`, and what differs from the defaults. The folder holds `base`, `rows` and
`heldout`. Each process writes `NAME-RANK.json`. The first one saves the model in `NAME-saved`, loads it again and
scores with it.
"""

import json
import os
import sys
import traceback
from pathlib import Path

from datasets import load_from_disk
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_rlhf_ext.modeling.loading import load_base_model
from hf_rlhf_ext.reward.config import BradleyTerryConfig
from hf_rlhf_ext.reward.scorer import RewardScorer
from hf_rlhf_ext.reward.trainer import BradleyTerryTrainer

OPTIONS = {
    "use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none", "disable_tqdm": True,
    "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "learning_rate": 1e-2, "seed": 3,
    "data_seed": 5, "logging_steps": 1, "save_strategy": "no",
    "adam_epsilon": 1e-3,  # with a smaller one, Adam makes large steps of gradients that are rounding errors
}  # fmt: skip


class CountingTrainer(BradleyTerryTrainer):
    """Notes the number of micro-batches of each batch."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.passes.append(len(inputs.get("micro_batches", [0])))
        return super().training_step(model, inputs, num_items_in_batch)


def run(folder: Path, case: dict) -> dict:
    """Trains, evaluates, predicts and saves. Returns what can be compared with other engines."""
    name = case["name"]
    args = BradleyTerryConfig(str(folder / name), **(OPTIONS | case.get("options", {})))
    heldout = load_from_disk(folder / "heldout")
    if case["adapter"]:
        model = load_base_model(folder / "base", task="reward", **({"dtype": "float32"} | case.get("base", {})))
    else:  # which ZeRO-3 partitions, as the options are known already
        model = AutoModelForSequenceClassification.from_pretrained(folder / "base", dtype="float32")
    trainer = CountingTrainer(
        model,
        args,
        load_from_disk(folder / "rows"),
        heldout,
        processing_class=AutoTokenizer.from_pretrained(folder / "base"),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS") if case["adapter"] else None,
    )
    trainer.passes = []
    if case.get("evaluates_first"):
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=str(folder / case["resume"]) if "resume" in case else None)
    evaluated = trainer.evaluate()
    predicted = trainer.predict(heldout).predictions.tolist()
    saved = folder / f"{name}-saved"
    trainer.save_model(str(saved))
    trainer.accelerator.wait_for_everyone()
    loaded = []
    if args.process_index == 0:
        scorer = RewardScorer.from_pretrained(saved, device="cpu")
        for row in heldout:
            loaded.append(scorer.raw([row["prompt"]] * len(row["completions"]), row["completions"]))
    normalization = trainer.normalization
    return {
        "history": [_timeless(entry) for entry in trainer.state.log_history],
        "evaluated": _timeless(evaluated),
        "predicted": predicted,
        "loaded": loaded,
        "normalization": [normalization.mean, normalization.std, normalization.n],
        "passes": trainer.passes,
        "files": sorted(path.name for path in saved.iterdir()),
    }


def _timeless(metrics: dict) -> dict:
    return {name: value for name, value in metrics.items() if "time" not in name and "per_second" not in name}


def main() -> None:
    folder, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    rank = os.environ["RANK"]
    for case in cases:
        try:
            found = run(folder, case)
        except Exception as error:  # the other cases run all the same
            found = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        (folder / f"{case['name']}-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
