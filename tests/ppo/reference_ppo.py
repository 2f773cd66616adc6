"""A second PPO, written from the equations: one sequence at a time, without padding, and with explicit sums.

It imports nothing of `hf_rlhf_ext.ppo` but the order in which PPO-ptx draws its texts. Log-probabilities and KL are in
nats; tensors of one sequence are (T,), with T tokens in its completion.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_rlhf_ext.data.text import encode_prompt
from hf_rlhf_ext.ppo.prompts import prompt_indices

METRICS = ("policy/clipfrac_avg", "loss/policy_avg", "loss/value_avg", "val/clipfrac_avg")
PTX_BATCH_SIZE = 3


@dataclass
class Sequence:
    """One completion of a rollout, with everything that does not change while the policy is trained on it."""

    prompt: str
    ids: list[int]
    old_logprobs: Tensor
    values: Tensor | None
    advantages: Tensor
    returns: Tensor | None
    ref_logprobs: Tensor
    weights: Tensor
    """Importance weights for the distribution of the sampler, 1 without correction."""


@dataclass
class Result:
    """The result of the run, step by step."""

    weights: list[dict[str, Tensor]] = field(default_factory=list)
    """Trained parameters after each optimizer step."""
    metrics: list[dict[str, float]] = field(default_factory=list)
    rollouts: list[list[dict[str, Tensor]]] = field(default_factory=list)
    """What was computed for each rollout, a dict per sequence."""


class ReferencePPO:
    """Repeats a recorded run from its sampled completions.

    Args:
        model: the trainer's model before training.
        recorded: `rollouts` (prompts, completions, scores) and `orders` (of the inner epochs) of the run.
        stops: ids that end a completion.
        critic: `head`, `adapter`, `model` or `none`.
        texts: token ids of the PPO-ptx texts, as context and targets.
    """

    def __init__(self, model, tokenizer, recorded, stops, args, critic="head", texts=None):
        self.model = model
        self.tokenizer = tokenizer
        self.recorded = recorded
        self.stops = stops
        self.args = args
        self.critic = critic
        self.texts = texts
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.policy_parameters = []
        self.critic_parameters = []
        of_critic = ".value." if critic == "adapter" else "value_"
        for name, parameter in self.trained.items():
            is_critic = of_critic in name or "value_head" in name
            if is_critic:
                self.critic_parameters.append(parameter)
            else:
                self.policy_parameters.append(parameter)
        groups = [{"params": self.policy_parameters}]
        if critic != "none":
            groups.append({"params": self.critic_parameters, "lr": args.value_learning_rate})
        self.optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, eps=args.adam_epsilon, weight_decay=0.0)
        self.scores_so_far = []
        self.result = Result()

    def run(self) -> Result:
        for number, (prompts, completions, scores) in enumerate(self.recorded.rollouts):
            rollout = self.make_rollout(prompts, completions, scores)
            # Whitened over all tokens of the rollout, with the variance of the population.
            advantages = torch.cat([sequence.advantages for sequence in rollout])
            mean, std = advantages.mean(), advantages.std(correction=0)
            for sequence in rollout:
                sequence.advantages = (sequence.advantages - mean) / std
            self.result.rollouts.append([self.made(sequence) for sequence in rollout])
            for epoch in self.recorded.orders[number].tolist():
                size = len(epoch) // self.args.num_mini_batches
                for start in range(0, len(epoch), size):
                    self.step([rollout[index] for index in epoch[start : start + size]])
        return self.result

    @staticmethod
    def made(sequence: Sequence) -> dict[str, Tensor]:
        names = ("old_logprobs", "ref_logprobs", "values", "advantages", "returns")
        return {name: getattr(sequence, name) for name in names if getattr(sequence, name) is not None}

    # ---- Forward passes ----

    def states(self, prompt, ids: list[int], adapter: str) -> tuple[Tensor, Tensor]:
        """Logits (T, V) and last hidden states (T, H) at the positions that predict `ids`."""
        context = encode_prompt(self.tokenizer, prompt) if isinstance(prompt, str) else prompt
        tokens = torch.tensor([context + ids])
        module = self.model
        if adapter == "value" and self.critic == "model":
            module = self.model.value_model
        else:
            self.model.set_adapter("value" if adapter == "value" and self.critic == "adapter" else "default")
        for parameter in self.trained.values():  # `set_adapter` froze some
            parameter.requires_grad_(True)
        output = module(input_ids=tokens, output_hidden_states=True)
        end = tokens.shape[1] - 1  # a token is predicted one step before it
        before = slice(end - len(ids), end)
        return output.logits[0, before], output.hidden_states[-1][0, before]

    def policy_pass(self, prompt: str, ids: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probabilities, hidden states, entropies and logits under the policy."""
        logits, hidden = self.states(prompt, ids, "policy")
        full = torch.log_softmax(logits / self.args.temperature, -1)
        entropies = -(full.exp() * full).sum(-1)
        return full[range(len(ids)), ids], hidden, entropies, logits

    def values_of(self, prompt: str, ids: list[int], hidden: Tensor | None) -> Tensor:
        if self.critic != "head":
            hidden = self.states(prompt, ids, "value")[1]
        head = self.model.value_head
        return hidden @ head.weight[0] + head.bias

    def reference_logprobs(self, prompt: str, ids: list[int]) -> Tensor:
        self.model.set_adapter("default")
        with self.model.disable_adapter():
            tokens = torch.tensor([encode_prompt(self.tokenizer, prompt) + ids])
            full = torch.log_softmax(self.model(input_ids=tokens).logits[0] / self.args.temperature, -1)
        return full[-len(ids) - 1 : -1][range(len(ids)), ids]

    # ---- A rollout ----

    def make_rollout(self, prompts: list[str], completions: list[list[int]], scores: list) -> list[Sequence]:
        is_dense = isinstance(scores[0], list)
        sequence_scores = [0.0 if is_dense else score * self.args.reward_scale for score in scores]
        self.scores_so_far += sequence_scores
        rollout = []
        for prompt, ids, score, recorded in zip(prompts, completions, sequence_scores, scores, strict=True):
            token_rewards = torch.zeros(len(ids))
            if is_dense:
                token_rewards = torch.tensor(recorded) * self.args.reward_scale
            rollout.append(self.make_sequence(prompt, ids, score, token_rewards))
        if self.critic == "none":
            self.leave_one_out(rollout)
        return rollout

    def leave_one_out(self, rollout: list[Sequence]) -> None:
        """RLOO (arXiv:2402.14740): return of a completion minus the mean return of the others of its prompt."""
        totals = [sequence.advantages.sum() for sequence in rollout]  # so far, the rewards of the tokens
        size = self.args.num_generations
        for index, sequence in enumerate(rollout):
            group = range(index // size * size, index // size * size + size)
            assert len({rollout[other].prompt for other in group}) == 1
            others = [totals[other] for other in group if other != index]
            sequence.advantages = torch.full((len(sequence.ids),), float(totals[index] - sum(others) / len(others)))

    def make_sequence(self, prompt: str, ids: list[int], score: float, token_rewards: Tensor) -> Sequence:
        args = self.args
        with torch.no_grad():
            old_logprobs, hidden, _, logits = self.policy_pass(prompt, ids)
            values = None if self.critic == "none" else self.values_of(prompt, ids, hidden)
            ref_logprobs = self.reference_logprobs(prompt, ids)
            weights = self.sampler_weights(ids, logits, old_logprobs)
        if args.normalize_rewards:
            every = torch.tensor(self.scores_so_far)
            score = ((score - every.mean()) / every.std(correction=0)).item()
        if args.reward_clip is not None:
            score = max(-args.reward_clip, min(args.reward_clip, score))
        rewards = token_rewards
        if args.kl_placement == "reward":
            rewards = rewards - args.kl_coef * self.kl(old_logprobs, ref_logprobs)
        rewards[-1] += score - self.penalties(ids)
        if values is None:
            return Sequence(prompt, ids, old_logprobs, None, rewards, None, ref_logprobs, weights)
        advantages = self.gae(rewards, values)
        return Sequence(prompt, ids, old_logprobs, values, advantages, advantages + values, ref_logprobs, weights)

    def gae(self, rewards: Tensor, values: Tensor) -> Tensor:
        """Generalized advantage estimation (arXiv:1506.02438, eq. 16), its sum written out."""
        following = torch.cat([values[1:], torch.zeros(1)])
        delta = rewards + self.args.gamma * following - values
        decay = self.args.gamma * self.args.gae_lambda
        advantages = []
        for t in range(len(delta)):
            advantages.append(sum(decay ** (k - t) * delta[k] for k in range(t, len(delta))))
        return torch.stack(advantages)

    def kl(self, new: Tensor, ref: Tensor) -> Tensor:
        """Per-token estimate of KL(policy || reference), with the estimator of the options."""
        kind = self.args.kl_estimator or ("k1" if self.args.kl_placement == "reward" else "k2")
        if kind == "k1":
            return new - ref
        if kind == "k2":
            return (new - ref) ** 2 / 2
        return (ref - new).exp() - 1 - (ref - new)

    def penalties(self, ids: list[int]) -> float:
        unfinished = self.args.missing_eos_penalty * (ids[-1] not in self.stops)
        return unfinished + self.args.length_penalty * max(0, len(ids) - self.args.length_target)

    def sampler_weights(self, ids: list[int], logits: Tensor, old_logprobs: Tensor) -> Tensor:
        """Probability under the policy divided by that under the sampler, which keeps the best `top_k` tokens."""
        if not self.args.importance_sampling_correction:
            return torch.ones(len(ids))
        drawn = []
        for row, token in zip(logits / self.args.temperature, ids, strict=True):
            best = row.topk(self.args.top_k)
            drawn.append(torch.log_softmax(best.values, -1)[best.indices.tolist().index(token)])
        return (old_logprobs - torch.stack(drawn)).exp().clamp(max=self.args.importance_sampling_cap)

    # ---- An optimizer step ----

    def step(self, batch: list[Sequence]) -> None:
        n_tokens = sum(len(sequence.ids) for sequence in batch)
        metrics = dict.fromkeys(METRICS[:2] if self.critic == "none" else METRICS, 0.0)
        for sequence in batch:
            self.backward(sequence, n_tokens, metrics)
        if self.texts:
            self.backward_texts()
        for parameters in filter(None, (self.policy_parameters, self.critic_parameters)):
            torch.nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.result.weights.append({name: p.detach().clone() for name, p in self.trained.items()})
        self.result.metrics.append(metrics)

    def backward(self, sequence: Sequence, n_tokens: int, metrics: dict[str, float]) -> None:
        """Gradients of the share of one sequence in the loss, a mean over tokens of the batch; adds to `metrics`."""
        args = self.args
        new, hidden, entropy, _ = self.policy_pass(sequence.prompt, sequence.ids)
        ratio = (new - sequence.old_logprobs).exp()
        low, high = 1 - args.clip_range, 1 + args.clip_range
        advantage = sequence.advantages
        surrogate = sequence.weights * torch.min(ratio * advantage, ratio.clamp(low, high) * advantage)
        is_clipped = ((ratio > high) & (advantage > 0)) | ((ratio < low) & (advantage < 0))
        loss = -surrogate - args.entropy_coef * entropy
        if args.kl_placement == "loss":
            loss = loss + args.kl_coef * self.kl(new, sequence.ref_logprobs)
        if self.critic == "head":  # one backward through the trunk that both share
            values = self.values_of(sequence.prompt, sequence.ids, hidden)
            critic_loss = self.critic_loss(values, sequence)
            ((loss + args.vf_coef * critic_loss).sum() / n_tokens).backward()
        else:
            (loss.sum() / n_tokens).backward()
        if self.critic in ("adapter", "model"):
            values = self.values_of(sequence.prompt, sequence.ids, None)
            critic_loss = self.critic_loss(values, sequence)
            (args.vf_coef * critic_loss.sum() / n_tokens).backward()
        metrics["policy/clipfrac_avg"] += is_clipped.sum().item() / n_tokens
        metrics["loss/policy_avg"] -= surrogate.sum().item() / n_tokens
        if self.critic == "none":
            return
        metrics["loss/value_avg"] += critic_loss.sum().item() / n_tokens
        metrics["val/clipfrac_avg"] += self.clipped_values(values, sequence) / n_tokens

    def critic_loss(self, values: Tensor, sequence: Sequence) -> Tensor:
        clip = self.args.value_clip_range
        clipped = sequence.values + (values - sequence.values).clamp(-clip, clip)
        return 0.5 * torch.max((values - sequence.returns) ** 2, (clipped - sequence.returns) ** 2)

    def clipped_values(self, values: Tensor, sequence: Sequence) -> int:
        """Tokens whose value has moved further than allowed, and is closer to the return than the limit is."""
        clip = self.args.value_clip_range
        moved = values - sequence.values
        edge = sequence.values + clip * moved.sign()
        is_nearer = (values - sequence.returns).abs() < (edge - sequence.returns).abs()
        return ((moved.abs() > clip) & is_nearer).sum().item()

    def backward_texts(self) -> None:
        """PPO-ptx: the language-model loss of the texts of this step, a mean over their tokens."""
        step = len(self.result.weights)
        drawn = prompt_indices(step, PTX_BATCH_SIZE, len(self.texts), self.args.seed)
        texts = [self.texts[index] for index in drawn]
        count = sum(len(targets) for _, targets in texts)
        for context, targets in texts:
            logprobs = torch.log_softmax(self.states(context, targets, "policy")[0], -1)
            (-self.args.ptx_coef * logprobs[range(len(targets)), targets].sum() / count).backward()
