"""bf16: autocast keeps its casts of fp32 weights until the outermost context ends, which can silently stop learning."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from hf_rlhf_ext.modeling.adapters import mixed_precision


class GradientNorms(TrainerCallback):
    """Norms of the adapter's gradients at every optimizer step."""

    def __init__(self):
        self.norms = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
        self.norms.append([0.0 if gradient is None else gradient.norm().item() for gradient in gradients])


def test_adapters_get_gradients_at_every_bf16_step_also_right_after_a_rollout(make_trainer):
    seen = GradientNorms()
    trainer = make_trainer(bf16=True, callbacks=[seen], max_steps=8)  # two rollouts of four steps
    trainer.train()
    assert len(seen.norms) == 8
    assert all(sum(norms) > 0 for norms in seen.norms), seen.norms


def test_autocast_really_keeps_stale_casts_so_the_contexts_matter(tiny_llama):
    # The problem itself: if a future PyTorch drops this cache, the warning in `mixed_precision` can be removed.
    model = get_peft_model(tiny_llama, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = torch.arange(3, 11)[None]

    def step_and_score():
        before = model(input_ids=ids).logits
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter += 1.0
        return before, model(input_ids=ids).logits

    with mixed_precision(model, torch.bfloat16):
        stale_before, stale_after = step_and_score()
    with mixed_precision(model, torch.bfloat16):
        fresh = model(input_ids=ids).logits
    assert torch.equal(stale_before, stale_after)
    assert not torch.equal(stale_after, fresh)
