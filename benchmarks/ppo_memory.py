"""Memory of the four roles of a PPO run on one base, compared with one model with adapters.

make bench-ppo-memory    # the embedded SmolLM2-135M in NF4; prints a table
"""

import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def distinct_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of the tensors, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def state_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, and the tensors that bitsandbytes stores with 4-bit weights."""
    found = [*module.parameters(), *module.buffers()]
    for parameter in module.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            found += [x for x in vars(state).values() if isinstance(x, Tensor)]
            state = state.state2
    return found


class SavedTensors:
    """Measures the peak memory of tensors that autograd saves for the backward pass, without the model's weights."""

    def __init__(self, owned: Iterable[Tensor]):
        self.owned = {t.untyped_storage().data_ptr() for t in owned}
        self.live: dict[int, int] = {}
        self.peak = 0

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda holder: holder.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def _pack(self, tensor: Tensor):
        if tensor.untyped_storage().data_ptr() not in self.owned:
            self.live[id(holder := Holder(tensor, self))] = tensor.nbytes
            self.peak = max(self.peak, sum(self.live.values()))
            return holder
        return Holder(tensor, None)


class Holder:
    """Holds a saved tensor, and reports when autograd releases it."""

    def __init__(self, tensor: Tensor, counter: SavedTensors | None):
        self.tensor, self.counter = tensor, counter

    def __del__(self):
        if self.counter is not None:
            self.counter.live.pop(id(self), None)


def memory_table(trainer) -> dict[str, int]:
    """Bytes of each part after a training step, and of the activations of the next step."""
    base, adapters = [], []
    for name, parameter in trainer.model.named_parameters():
        (adapters if "lora_" in name or "_head" in name else base).append(parameter)
    everything = state_tensors(trainer.model)
    separate = [role.model for role in trainer.stack.roles.values() if role.model is not None]
    separate += [f.model for f in trainer.rewards.funcs if getattr(f, "model", trainer.model) is not trainer.model]
    optimizer = [x for state in trainer.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    everything += [tensor for model in separate for tensor in state_tensors(model)]
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    with SavedTensors(everything) as held:
        trainer.training_step(trainer.model, {})
    trainer.model.zero_grad()
    rows = torch.arange(trainer.args.per_device_train_batch_size)
    sequences = trainer.ppo.rollout.sequences.select(rows)
    with SavedTensors(everything) as bare:
        one_policy_step(trainer, sequences)
    trainer.model.zero_grad()
    parts = {"adapters and heads": distinct_bytes(adapters), "optimizer": distinct_bytes(optimizer)}
    return {
        "base": distinct_bytes(everything) - parts["adapters and heads"],
        **parts,
        "activations, all roles": held.peak,
        "activations, one model": bare.peak,
    }


def one_policy_step(trainer, sequences) -> None:
    """Forward and backward pass of the policy only, on the same tokens."""
    from hf_rlhf_ext.modeling.logprobs import completion_hidden_states

    roles = trainer.roles
    with roles.mixed_precision(), roles.activate("policy") as model:
        hidden = completion_hidden_states(model, model, sequences.input_ids, sequences.prompt_lengths, sequences.mask)
        logprobs, _ = roles.logprobs("policy", hidden, sequences.targets())
        logprobs.mean().backward()


def ratio(table: dict[str, int], one_base: int) -> float:
    """Memory of all roles, relative to one base with the same adapters and optimizer and one model's activations."""
    shared = table["adapters and heads"] + table["optimizer"]
    ours = table["base"] + shared + table["activations, all roles"]
    return ours / (one_base + shared + table["activations, one model"])


def train_reward(base: str, folder: str, *, precision: dict | None = None, **options) -> None:
    """Trains a reward adapter that prefers longer answers, on a base in NF4 unless `precision` is given."""
    from datasets import Dataset
    from peft import LoraConfig

    from hf_rlhf_ext import BradleyTerryConfig, BradleyTerryTrainer, load_base_model, load_tokenizer

    answers = ["They are sweet.", "They are sweet, and good for you.", "Fruit is good.", "Fruit is good in many ways."]
    rows = [{"prompt": "Why fruit?", "chosen": answers[k + 1], "rejected": answers[k]} for k in (0, 2)]
    args = BradleyTerryConfig(folder, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, **options)
    model = load_base_model(base, task="reward", **(precision or {"load_in_4bit": True}))
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="SEQ_CLS")
    data, tokenizer = Dataset.from_list(rows), load_tokenizer(base)
    trainer = BradleyTerryTrainer(model, args, data, processing_class=tokenizer, peft_config=lora)
    trainer.train()
    trainer.save_model()


def main() -> None:
    from tempfile import TemporaryDirectory

    from datasets import Dataset
    from peft import LoraConfig

    from hf_rlhf_ext import PPOConfig, PPOTrainer, load_base_model, load_tokenizer
    from hf_rlhf_ext.modeling.locations import EMBEDDED_MODEL

    model = load_base_model(load_in_4bit=True)
    one_base = distinct_bytes(state_tensors(model))
    prompts = Dataset.from_dict({"prompt": ["Name three fruits and say why people like them."] * 16})
    with TemporaryDirectory() as folder:
        train_reward(EMBEDDED_MODEL, f"{folder}/reward", max_steps=1)
        args = PPOConfig(folder, use_cpu=True, per_device_train_batch_size=16, max_completion_length=32, max_steps=1,
                         num_ppo_epochs=1, critic="adapter", report_to="none", save_strategy="no")  # fmt: skip
        lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        options = {"processing_class": load_tokenizer(), "peft_config": lora}
        trainer = PPOTrainer(model, f"{folder}/reward", args, prompts, **options)
        assert trainer.rewards.funcs[0].model is trainer.model  # all four on one base
        trainer.train()
        table = memory_table(trainer)
    print("| part | MB |\n|---|---|")
    print(f"| one NF4 base | {one_base / 1e6:.1f} |")
    for name, size in table.items():
        print(f"| {name} | {size / 1e6:.1f} |")
    print(f"\nratio: {ratio(table, one_base):.3f}")


if __name__ == "__main__":
    sys.exit(main())
