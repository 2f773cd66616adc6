"""PPOTrainer's weights equal those of a second PPO, written here from the equations and nothing else."""

import copy

import pytest
import torch
from transformers import TrainerCallback

from hf_rlhf_ext.data.text import encode_prompt

OPTIONS = {
    "temperature": 0.7,
    "kl_coef": 0.3,
    "gamma": 0.97,
    "gae_lambda": 0.9,
    "vf_coef": 0.5,
    "entropy_coef": 0.01,
    "reward_clip": 1.0,
    "missing_eos_penalty": 0.75,
    "value_learning_rate": 3e-2,
    "max_steps": 8,
    "logprobs_chunk_size": 5,
}


class Recorder(TrainerCallback):
    """Remembers what sampling gave, which a second PPO cannot know: completions, and the order of the inner epochs."""

    def __init__(self):
        self.rollouts, self.orders, self.weights = [], {}, []

    def reward(self, prompts, completions, completion_ids, **kwargs):
        scores = [float(sum(ids) % 7 - 3) for ids in completion_ids]
        self.rollouts.append((prompts, completion_ids, scores))
        return scores

    def on_step_end(self, args, state, control, model, **kwargs):
        self.orders.setdefault(len(self.rollouts) - 1, self.trainer._rollout.order)
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})


def reference_ppo(model, head, tokenizer, recorded, stops, args):
    """Weights after every optimizer step. One unpadded sequence at a time, full logits, sums written out."""
    policy = [p for name, p in model.named_parameters() if p.requires_grad and "value_head" not in name]
    groups = [{"params": policy}, {"params": list(head.parameters()), "lr": args.value_learning_rate}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, eps=args.adam_epsilon, weight_decay=0.0)
    history = []

    def forward(prompt, ids):
        tokens = torch.tensor([encode_prompt(tokenizer, prompt) + ids])
        output = model(input_ids=tokens, output_hidden_states=True)
        before = slice(tokens.shape[1] - len(ids) - 1, tokens.shape[1] - 1)  # a token is predicted one step before it
        full = torch.log_softmax(output.logits[0, before] / args.temperature, -1)
        values = output.hidden_states[-1][0, before] @ head.weight[0] + head.bias
        return full[range(len(ids)), ids], values, -(full.exp() * full).sum(-1)

    for number, (prompts, completions, scores) in enumerate(recorded.rollouts):
        rows = []
        for prompt, ids, score in zip(prompts, completions, scores, strict=True):
            with torch.no_grad():
                old, values, _ = forward(prompt, ids)
                with model.disable_adapter():
                    ref = forward(prompt, ids)[0]
            score = max(-args.reward_clip, min(args.reward_clip, score))
            score -= args.missing_eos_penalty * (ids[-1] not in stops)
            rewards = -args.kl_coef * (old - ref)
            rewards[-1] += score
            following = torch.cat([values[1:], torch.zeros(1)])
            delta = rewards + args.gamma * following - values
            decay = args.gamma * args.gae_lambda
            advantages = torch.stack(
                [sum(decay ** (k - t) * delta[k] for k in range(t, len(ids))) for t in range(len(ids))]
            )
            rows.append([prompt, ids, old, values, advantages, advantages + values])
        for parameter in model.parameters():  # `disable_adapter` froze the value head
            parameter.requires_grad_(any(parameter is p for group in groups for p in group["params"]))
        every = torch.cat([row[4] for row in rows])
        mean, std = every.mean(), every.std(correction=0)
        for epoch in recorded.orders[number].tolist():
            size = len(epoch) // args.num_mini_batches
            for start in range(0, len(epoch), size):
                batch = [rows[i] for i in epoch[start : start + size]]
                total = 0.0
                for prompt, ids, old, old_values, advantages, returns in batch:
                    new, values, entropy = forward(prompt, ids)
                    ratio, advantage = (new - old).exp(), (advantages - mean) / std
                    surrogate = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
                    clipped = old_values + (values - old_values).clamp(-0.2, 0.2)
                    error = torch.max((values - returns) ** 2, (clipped - returns) ** 2)
                    total += (-surrogate + args.vf_coef * 0.5 * error - args.entropy_coef * entropy).sum()
                (total / sum(len(row[1]) for row in batch)).backward()
                for group in groups:
                    torch.nn.utils.clip_grad_norm_(group["params"], args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                history.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    return history


def run(make_trainer, **options):
    recorder = Recorder()
    trainer = make_trainer(reward_funcs=recorder.reward, callbacks=[recorder], **(OPTIONS | options))
    recorder.trainer, start = trainer, copy.deepcopy(trainer.model)
    trainer.train()
    return recorder, trainer, start


@pytest.mark.parametrize(
    "max_grad_norm, adam_epsilon",
    [
        (0.1, 1e-5),  # clipping binds; rounding errors of tiny gradients do not decide Adam's sign
        (100.0, 1e-2),  # no clipping, and an Adam that is not indifferent to the scale of the loss
    ],
)
def test_weights_after_every_step_equal_the_reference(make_trainer, chat_tokenizer, max_grad_norm, adam_epsilon):
    recorder, trainer, start = run(make_trainer, max_grad_norm=max_grad_norm, adam_epsilon=adam_epsilon)
    lengths = [len(ids) for _, completions, _ in recorder.rollouts for ids in completions]
    stops = trainer._stop_ids
    stopped = [ids[-1] in stops for _, completions, _ in recorder.rollouts for ids in completions]
    assert len(recorder.rollouts) == 2 and len(set(lengths)) > 3 and 0 < sum(stopped) < len(stopped)
    expected = reference_ppo(start, start.value_head, chat_tokenizer, recorder, stops, trainer.args)
    assert len(expected) == len(recorder.weights) == 8
    for step, (got, wanted) in enumerate(zip(recorder.weights, expected, strict=True)):
        assert got.keys() == wanted.keys() and any("value_head" in name for name in got)
        for name in got:
            torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=1e-5, msg=f"step {step}: {name}")
    change = max((recorder.weights[-1][name] - weight).abs().max() for name, weight in recorder.weights[0].items())
    assert change > 1e-2  # a thousand times the tolerance


@pytest.mark.parametrize("batch, accumulation", [(2, 2), (1, 4)])
def test_gradient_accumulation_changes_nothing(make_trainer, batch, accumulation):
    plain = {"max_steps": 4, "optim": "sgd", "max_grad_norm": 1e3, "learning_rate": 0.1}  # the loss's scale shows
    whole, *_ = run(make_trainer, **plain)
    parts, *_ = run(make_trainer, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, **plain)
    assert parts.rollouts[0] == whole.rollouts[0]
    for got, expected in zip(parts.weights, whole.weights, strict=True):
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-5)
