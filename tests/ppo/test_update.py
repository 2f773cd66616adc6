"""PPOTrainer's advantages, returns, losses, figures and weights equal those of a second PPO.

That one is written here from the equations and nothing else: one unpadded sequence at a time, sums written out.
"""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, TrainerCallback

from hf_rlhf_ext.data.text import encode_prompt
from hf_rlhf_ext.ppo.rollout import prompt_indices

OPTIONS = {
    "temperature": 0.7,
    "kl_coef": 0.3,
    "gamma": 0.97,
    "gae_lambda": 0.9,
    "vf_coef": 0.5,
    "clip_range": 0.03,  # both clips bind
    "value_clip_range": 0.05,
    "entropy_coef": 0.01,
    "reward_clip": 1.0,
    "missing_eos_penalty": 0.75,
    "value_learning_rate": 3e-2,
    "max_steps": 8,
    "logprobs_chunk_size": 5,
    "critic": "head",
}


class Recorder(TrainerCallback):
    """Remembers what sampling gave, which a second PPO cannot know: completions, and the order of the inner epochs."""

    def __init__(self, dense=False):
        self.rollouts, self.orders, self.weights, self.dense = [], {}, [], dense
        self.kept = {}  # what PPOTrainer made of each rollout

    def reward(self, prompts, completions, completion_ids, **kwargs):
        scores = [float(sum(ids) % 7 - 3) for ids in completion_ids]
        if self.dense:
            scores = [[float(token % 3 - 1) for token in ids] for ids in completion_ids]
        self.rollouts.append((prompts, completion_ids, scores))
        return scores

    def on_step_end(self, args, state, control, model, **kwargs):
        self.orders.setdefault(len(self.rollouts) - 1, self.trainer._rollout.order)
        self.kept[len(self.rollouts) - 1] = self.trainer._rollout
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})


def reference_ppo(model, tokenizer, recorded, stops, args, critic="head", texts=None):
    """Weights and figures after every optimizer step, and what each rollout is made into."""
    head, own = model.value_head, ".value." if critic == "adapter" else "value_"
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    critics = [p for name, p in names.items() if own in name or "value_head" in name]
    policy = [p for p in names.values() if not any(p is other for other in critics)]
    groups = [{"params": policy}, {"params": critics, "lr": args.value_learning_rate}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, eps=args.adam_epsilon, weight_decay=0.0)
    history, steps, made, seen = [], [], [], []

    def states(prompt, ids, adapter):
        tokens = torch.tensor([(encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else prompt) + ids])
        module = model.value_model if adapter == "value" and critic == "model" else model
        if module is model:
            model.set_adapter("value" if adapter == "value" and critic == "adapter" else "default")
        for parameter in names.values():  # `set_adapter` froze some
            parameter.requires_grad_(True)
        output = module(input_ids=tokens, output_hidden_states=True)
        before = slice(tokens.shape[1] - len(ids) - 1, tokens.shape[1] - 1)  # a token is predicted one step before it
        return output.logits[0, before], output.hidden_states[-1][0, before]

    def forward(prompt, ids):
        logits, hidden = states(prompt, ids, "policy")
        full = torch.log_softmax(logits / args.temperature, -1)
        return full[range(len(ids)), ids], hidden, -(full.exp() * full).sum(-1), logits

    def values_of(prompt, ids, hidden):
        hidden = hidden if critic == "head" else states(prompt, ids, "value")[1]
        return hidden @ head.weight[0] + head.bias

    def estimate(new, ref):
        kind = args.kl_estimator or ("k1" if args.kl_placement == "reward" else "k2")
        return {"k1": new - ref, "k2": (new - ref) ** 2 / 2, "k3": (ref - new).exp() - 1 - (ref - new)}[kind]

    def sampler_weights(ids, logits, old):
        if not args.importance_sampling_correction:
            return torch.ones(len(ids))
        drawn = []
        for row, token in zip(logits / args.temperature, ids, strict=True):
            best = row.topk(args.top_k)
            drawn.append(torch.log_softmax(best.values, -1)[best.indices.tolist().index(token)])
        return (old - torch.stack(drawn)).exp().clamp(max=args.importance_sampling_cap)

    def penalties(ids):
        unfinished = args.missing_eos_penalty * (ids[-1] not in stops)
        return unfinished + args.length_penalty * max(0, len(ids) - args.length_target)

    for number, (prompts, completions, scores) in enumerate(recorded.rollouts):
        rows = []
        token_rewards = [score if isinstance(score, list) else None for score in scores]
        scores = [0.0 if isinstance(score, list) else score * args.reward_scale for score in scores]
        seen += scores
        for prompt, ids, score, dense in zip(prompts, completions, scores, token_rewards, strict=True):
            with torch.no_grad():
                old, hidden, _, logits = forward(prompt, ids)
                values = values_of(prompt, ids, hidden)
                model.set_adapter("default")
                with model.disable_adapter():
                    tokens = torch.tensor([encode_prompt(tokenizer, prompt) + ids])
                    full = torch.log_softmax(model(input_ids=tokens).logits[0] / args.temperature, -1)
                    ref = full[-len(ids) - 1 : -1][range(len(ids)), ids]
                weights = sampler_weights(ids, logits, old)
            if args.normalize_rewards:
                every = torch.tensor(seen)
                score = ((score - every.mean()) / every.std(correction=0)).item()
            if args.reward_clip is not None:
                score = max(-args.reward_clip, min(args.reward_clip, score))
            rewards = -args.kl_coef * estimate(old, ref) if args.kl_placement == "reward" else torch.zeros(len(ids))
            rewards = rewards + (torch.tensor(dense) * args.reward_scale if dense else 0.0)
            rewards[-1] += score - penalties(ids)
            following = torch.cat([values[1:], torch.zeros(1)])
            delta = rewards + args.gamma * following - values
            decay = args.gamma * args.gae_lambda
            advantages = torch.stack(
                [sum(decay ** (k - t) * delta[k] for k in range(t, len(ids))) for t in range(len(ids))]
            )
            rows.append([prompt, ids, old, values, advantages, advantages + values, ref, weights])
        every = torch.cat([row[4] for row in rows])
        mean, std = every.mean(), every.std(correction=0)
        made.append(
            [
                {
                    "old_logprobs": old,
                    "ref_logprobs": ref,
                    "values": values,
                    "advantages": (advantages - mean) / std,
                    "returns": returns,
                }
                for _, _, old, values, advantages, returns, ref, _ in rows
            ]
        )
        for epoch in recorded.orders[number].tolist():
            size = len(epoch) // args.num_mini_batches
            for start in range(0, len(epoch), size):
                batch = [rows[i] for i in epoch[start : start + size]]
                n_tokens = sum(len(row[1]) for row in batch)
                figures = dict.fromkeys(FIGURES, 0.0)
                for prompt, ids, old, old_values, advantages, returns, ref, weights in batch:
                    new, hidden, entropy, _ = forward(prompt, ids)
                    ratio, advantage = (new - old).exp(), (advantages - mean) / std
                    low, high = 1 - args.clip_range, 1 + args.clip_range
                    surrogate = weights * torch.min(ratio * advantage, ratio.clamp(low, high) * advantage)
                    bound = ((ratio > high) & (advantage > 0)) | ((ratio < low) & (advantage < 0))
                    figures["policy/clipfrac_avg"] += bound.sum().item() / n_tokens
                    figures["loss/policy_avg"] -= surrogate.sum().item() / n_tokens
                    loss = -surrogate - args.entropy_coef * entropy
                    if args.kl_placement == "loss":
                        loss = loss + args.kl_coef * estimate(new, ref)
                    if critic == "head":
                        values = values_of(prompt, ids, hidden)
                        loss = loss + args.vf_coef * critic_loss(values, old_values, returns, args)
                    (loss.sum() / n_tokens).backward()
                    if critic != "head":
                        values = values_of(prompt, ids, None)
                        (args.vf_coef * critic_loss(values, old_values, returns, args).sum() / n_tokens).backward()
                    figures["loss/value_avg"] += critic_loss(values, old_values, returns, args).sum().item() / n_tokens
                    figures["val/clipfrac_avg"] += value_clip_bound(values, old_values, returns, args) / n_tokens
                if texts:
                    mine = [texts[i] for i in prompt_indices(len(history), 3, len(texts), args.seed)]
                    count = sum(len(targets) for _, targets in mine)
                    for context, targets in mine:
                        logprobs = torch.log_softmax(states(context, targets, "policy")[0], -1)
                        (-args.ptx_coef * logprobs[range(len(targets)), targets].sum() / count).backward()
                for group in groups:
                    torch.nn.utils.clip_grad_norm_(group["params"], args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                history.append({n: p.detach().clone() for n, p in names.items()})
                steps.append(figures)
    return history, steps, made


FIGURES = ("policy/clipfrac_avg", "loss/policy_avg", "loss/value_avg", "val/clipfrac_avg")


def critic_loss(values, old_values, returns, args):
    clipped = old_values + (values - old_values).clamp(-args.value_clip_range, args.value_clip_range)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)


def value_clip_bound(values, old_values, returns, args):
    """Tokens whose value has moved further than allowed, and is nearer to the return than the edge is."""
    moved = values - old_values
    nearer = (values - returns).abs() < (old_values + args.value_clip_range * moved.sign() - returns).abs()
    return ((moved.abs() > args.value_clip_range) & nearer).sum().item()


def run(make_trainer, **options):
    recorder = Recorder(dense=options.pop("dense", False))
    trainer = make_trainer(reward_funcs=recorder.reward, callbacks=[recorder], **(OPTIONS | options))
    recorder.trainer, start = trainer, copy.deepcopy(trainer.model)
    trainer.train()
    return recorder, trainer, start


SMALL_STEPS = {"max_grad_norm": 100.0, "adam_epsilon": 1e-2}  # an Adam that is not indifferent to the loss's scale
KINDS = {
    # Clipping binds; rounding errors of tiny gradients do not decide Adam's sign.
    "clipped": {"max_grad_norm": 0.1, "adam_epsilon": 1e-5},
    "head": SMALL_STEPS,
    "adapter": {"critic": "adapter"} | SMALL_STEPS,
    "kl in the loss": {"kl_placement": "loss", "critic": "adapter"} | SMALL_STEPS,
    "k3 in the loss": {"kl_placement": "loss", "kl_estimator": "k3"} | SMALL_STEPS,
    "shaped": {"normalize_rewards": True, "reward_scale": 0.5, "length_penalty": 0.1, "length_target": 3} | SMALL_STEPS,
    "dense": {"dense": True, "reward_scale": 0.5} | SMALL_STEPS,
    "sampler": {"top_k": 6, "importance_sampling_correction": True, "importance_sampling_cap": 0.9} | SMALL_STEPS,
    "ptx": {"ptx_coef": 0.3, "ptx_batch_size": 3, "max_tokens_per_batch": 24} | SMALL_STEPS,
    "model": {"critic": "model"} | SMALL_STEPS,
}


@pytest.mark.parametrize("kind", KINDS)
def test_rollouts_figures_and_weights_of_every_step_equal_the_reference(
    make_trainer, chat_tokenizer, tiny_config, kind
):
    options, texts = dict(KINDS[kind]), None
    if kind == "ptx":
        lines = ["A fox is quick and brown.", "Many words!", "The garden, on a sunny day", "happy people there"]
        options["ptx_dataset"] = Dataset.from_dict({"text": lines})
        texts = [(ids[:1], ids[1:]) for ids in chat_tokenizer(lines)["input_ids"]]
    if kind == "model":
        torch.manual_seed(1)
        options["value_model"] = LlamaForCausalLM(tiny_config)
    recorder, trainer, start = run(make_trainer, **options)
    lengths = [len(ids) for _, completions, _ in recorder.rollouts for ids in completions]
    stops = trainer._stop_ids
    stopped = [ids[-1] in stops for _, completions, _ in recorder.rollouts for ids in completions]
    assert len(recorder.rollouts) == 2 and len(set(lengths)) > 3 and 0 < sum(stopped) < len(stopped)
    expected, steps, made = reference_ppo(start, chat_tokenizer, recorder, stops, trainer.args, trainer.critic, texts)
    assert len(expected) == len(recorder.weights) == 8
    for step, (got, wanted) in enumerate(zip(recorder.weights, expected, strict=True)):
        assert got.keys() == wanted.keys() and any("value_head" in name for name in got)
        for name in got:
            torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=1e-5, msg=f"step {step}: {name}")
    change = max((recorder.weights[-1][name] - weight).abs().max() for name, weight in recorder.weights[0].items())
    assert change > 1e-2  # a thousand times the tolerance
    for number, rows in enumerate(made):
        for row, wanted in enumerate(rows):
            for name, values in wanted.items():
                got = getattr(recorder.kept[number], name)[row]
                torch.testing.assert_close(got[: len(values)], values, rtol=0, atol=1e-5, msg=f"{number} {row} {name}")
                assert name == "advantages" or not got[len(values) :].any()
    logs = [log for log in trainer.state.log_history if "loss/policy_avg" in log]
    for step, (log, figures) in enumerate(zip(logs, steps, strict=True)):
        for name, value in figures.items():
            assert log[name] == pytest.approx(value, abs=1e-5), (step, name)
    for number, log in enumerate(log for log in logs if "objective/kl" in log):
        kl = sum((row["old_logprobs"] - row["ref_logprobs"]).sum() for row in made[number]) / len(made[number])
        assert log["objective/kl"] == pytest.approx(float(kl), abs=1e-5)
    assert number == 1 and abs(float(kl)) > 1e-3
    assert max(figures["policy/clipfrac_avg"] for figures in steps) > 0.05
    assert max(figures["val/clipfrac_avg"] for figures in steps) > 0.05


SGD = {"max_steps": 4, "optim": "sgd", "max_grad_norm": 1e3, "learning_rate": 0.1}  # the loss's scale shows


@pytest.mark.parametrize("critic", ["head", "adapter"])
@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"max_tokens_per_batch": 30},
        {"max_tokens_per_batch": 1, "gradient_checkpointing": True},
        {"mixed_pass": True},
        {"logprobs_chunk_size": 1000, "mixed_pass": True, "max_tokens_per_batch": 40},
    ],
)
def test_batching_changes_nothing(make_trainer, critic, options):
    whole, *_ = run(make_trainer, critic=critic, **SGD)
    parts, *_ = run(make_trainer, critic=critic, **(SGD | options))
    assert parts.rollouts[0] == whole.rollouts[0]
    for got, expected in zip(parts.weights, whole.weights, strict=True):
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-5)


def test_the_policy_s_first_step_is_the_same_with_every_critic(make_trainer, tiny_config):
    # Values are zero at first and the critic's gradient does not reach the policy: only later steps may differ.
    steps = {}
    torch.manual_seed(1)
    value_model = LlamaForCausalLM(tiny_config)
    for critic in ("head", "adapter", "model"):
        options = SGD | {"critic": critic, "max_steps": 1} | ({"value_model": value_model} if critic == "model" else {})
        recorder, *_ = run(make_trainer, **options)
        steps[critic] = {name: weight for name, weight in recorder.weights[0].items() if ".default." in name}
    assert steps["head"].keys() == steps["adapter"].keys() == steps["model"].keys() and len(steps["head"]) > 20
    for name, weight in steps["head"].items():
        torch.testing.assert_close(steps["adapter"][name], weight, rtol=0, atol=1e-6)
        torch.testing.assert_close(steps["model"][name], weight, rtol=0, atol=1e-6)
