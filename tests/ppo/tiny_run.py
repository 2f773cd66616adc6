"""A small PPO run in a process of its own: `python tiny_run.py FOLDER '{"options": …}'`, FOLDER holding a model.

Sampling is greedy and the order of inner epochs a function of the rollout alone, so that a run in two processes can be
compared with one of the doubled batch. Writes `FOLDER/<name>/weights-<rank>.safetensors` and `log-<rank>.json`.
"""

import json
import os
import random
import sys
from functools import partial
from pathlib import Path


def reward(completions, **kwargs):
    return [text.count("e") - 0.2 * len(text) for text in completions]


def orders(trainer, size):
    """The order of the rows in each pass, which depends only on the number of the rollout. Prompts stay together."""
    import torch

    epochs, together = trainer.args.num_ppo_epochs, trainer.args.num_generations
    generator = torch.Generator().manual_seed(trainer.ppo.rollout_index)
    orders = torch.stack([torch.randperm(size // together, generator=generator) for _ in range(epochs)])
    return (orders[..., None] * together + torch.arange(together)).flatten(1)


class VariedEngine:
    """Draws completions from the ids of the prompt, their number and the number of the call, not from the policy.

    Sampled greedily, the completions of a prompt would all be the same.
    """

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size
        self.calls = 0

    def sync(self, model):
        pass

    def generate(self, prompt_ids, sampling, n=1):
        self.calls += 1
        rows = []
        for ids in prompt_ids:
            for number in range(n):
                draw = random.Random(f"{ids} {number} {self.calls}")
                rows.append([draw.randrange(1, self.vocab_size) for _ in range(sampling.max_new_tokens)])
        return rows, None


def build(folder, name, options):
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_rlhf_ext import PPOConfig, PPOTrainer

    torch.manual_seed(0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompts = ["Tell me", "a sunny day", "fox", "The quick brown fox jumps over", "words, many", "happy or sad?"]
    defaults = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none", "seed": 3}
    defaults |= {"num_mini_batches": 2, "num_ppo_epochs": 2, "max_completion_length": 12, "disable_tqdm": True}
    defaults |= {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_strategy": "no", "logging_steps": 1}
    defaults |= {"stop_token_ids": list(range(0, model.config.vocab_size, 5)), "vf_coef": 0.5, "kl_coef": 0.2}
    varied = options.pop("varied", False)
    trainer = PPOTrainer(
        model,
        reward,
        args=PPOConfig(str(Path(folder) / name), **(defaults | options)),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        eval_dataset=Dataset.from_dict({"prompt": prompts[:5]}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        engine=VariedEngine(model.config.vocab_size) if varied else None,
    )
    trainer.experience._orders = partial(orders, trainer)
    return trainer


def save_result(trainer, out):
    from safetensors.torch import save_file

    rank = trainer.accelerator.process_index
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    save_file(weights, out / f"weights-{rank}.safetensors")
    (out / f"log-{rank}.json").write_text(json.dumps(trainer.state.log_history))
    health = next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "HealthWarnings")
    (out / f"health-{rank}.json").write_text(json.dumps(health.history))


def main():
    import torch

    torch.set_num_threads(1)
    folder, name, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    trainer = build(folder, name, options)
    trainer.train()
    save_result(trainer, Path(folder) / name)
    trainer.evaluate()
    (Path(folder) / name / f"evaluation-{os.environ.get('RANK', 0)}.json").write_text(
        json.dumps(trainer.state.log_history[-1])
    )


if __name__ == "__main__":
    main()
