"""PPO runs in the processes of one launch: `ppo_run.py FOLDER CASES`, CASES a JSON file with a list of cases.

A case is a dict: `name`, `options` of PPOConfig, and what `run_case` reads further. All write to `FOLDER/<name>/`:
`weights-<rank>.safetensors` (whole tensors), `log-<rank>.json`, and `evaluation-<rank>.json`.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from hf_rlhf_ext import PPOConfig, PPOTrainer
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.shards import whole
from tests.ppo.tiny_run import reward

PROMPTS = ["Tell me", "a sunny day", "fox", "The quick brown fox jumps over", "words, many", "happy or sad?"]
TEXTS = ["a short text", "a somewhat longer text of several words", "fox", "the end of it all, and more"]


class Jump(TrainerCallback):
    """Multiplies all trained weights by a factor after a step; the reference stays."""

    def __init__(self, step: int, factor: float):
        self.step = step
        self.factor = factor

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.mul_(self.factor)


def build(folder: Path, case: dict) -> PPOTrainer:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        folder / case.get("model", "model"), dtype=case.get("dtype", "float32")
    )
    options = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none", "seed": 3}
    options |= {"num_mini_batches": 2, "num_ppo_epochs": 2, "max_completion_length": 12, "disable_tqdm": True}
    options |= {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_strategy": "no", "logging_steps": 1}
    # Every fifth token ends a completion: processes stop sampling at different steps.
    options |= {"stop_token_ids": list(range(0, model.config.vocab_size, 5)), "vf_coef": 0.5, "kl_coef": 0.2}
    options |= {"per_device_train_batch_size": 2, "max_steps": 4, "adam_epsilon": 1e-3}
    options |= {"logprobs_chunk_size": 4}  # several chunks
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if "policy" in case:
        model = PeftModel.from_pretrained(model, folder / case["policy"], is_trainable=True)
    return PPOTrainer(
        model,
        [str(folder / name) for name in case["reward_models"]] if "reward_models" in case else reward,
        args=PPOConfig(str(folder / case["name"]), **(options | case.get("options", {}))),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS[: case.get("eval_rows", 5)]}),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=None if "policy" in case or case.get("full") else LoraConfig(**(lora | case.get("lora", {}))),
        callbacks=[Jump(*case["jumps"])] if "jumps" in case else None,
        ptx_dataset=Dataset.from_dict({"text": TEXTS}) if case.get("ptx") else None,
    )


def save_result(trainer: PPOTrainer, out: Path) -> None:
    rank = trainer.accelerator.process_index
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: whole(p.detach()).clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    # The state of the optimizer too, parameter after parameter.
    parameters = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        for name, value in trainer.optimizer.state[parameter].items():
            weights[f"optimizer/{number}/{name}"] = whole(value).clone()
    save_file(weights, out / f"weights-{rank}.safetensors")
    (out / f"log-{rank}.json").write_text(json.dumps(trainer.state.log_history))


def run_case(folder: Path, case: dict) -> None:
    trainer = build(folder, case)
    out = folder / case["name"]
    if case.get("evaluates_first"):
        trainer.evaluate()
    for _ in range(case.get("trains", 1)):
        trainer.train(resume_from_checkpoint=str(folder / case["resumes"]) if "resumes" in case else None)
    save_result(trainer, out)
    trainer.evaluate()
    rank = trainer.accelerator.process_index
    (out / f"evaluation-{rank}.json").write_text(json.dumps(trainer.state.log_history[-1]))
    if case.get("saves"):
        trainer.save_model()


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for case in json.loads(Path(sys.argv[2]).read_text()):
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()
        rank = PartialState().process_index
        try:
            run_case(folder, case)
        except UserError as error:
            (folder / case["name"]).mkdir(parents=True, exist_ok=True)
            (folder / case["name"] / f"refused-{rank}.txt").write_text(str(error))
        gc.collect()


if __name__ == "__main__":
    main()
