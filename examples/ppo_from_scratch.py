"""PPO with a KL penalty on one page: the algorithm of InstructGPT, built from the pure functions of this library.

    python examples/ppo_from_scratch.py

A tiny random Llama learns to write the letter "e". Each update prints a line with reward and KL. The run takes about
ten seconds on a CPU. `tests/examples/test_ppo_from_scratch.py` checks that `PPOTrainer` trains the same weights from
the same random numbers.

This page leaves out what the library has in other files: adapters, a 4-bit base and a separate critic (`ppo/roles.py`,
`ppo/assembly.py`); logits in chunks (`modeling/logprobs.py`); micro-batches, several processes and mixed precision
(`ppo/trainer.py`, `ppo/ranks.py`); an adaptive KL coefficient (`ppo/kl.py`); shaping of scores and several reward
functions (`ppo/shaping.py`, `ppo/rewards.py`); guards (`ppo/guards.py`); evaluation, checkpoints, logs and
learning-rate schedules.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_rlhf_ext.modeling.heads import ScalarHead
from hf_rlhf_ext.ppo.advantages import generalized_advantages, token_rewards, whiten
from hf_rlhf_ext.ppo.engine import RolloutEngine, Sampling, TransformersEngine
from hf_rlhf_ext.ppo.kl import kl_k1
from hf_rlhf_ext.ppo.losses import masked_mean, policy_loss, value_loss
from hf_rlhf_ext.ppo.prompts import prompt_indices
from hf_rlhf_ext.ppo.rollout import Sequences, pack_sequences


@dataclass
class Options:
    """Options with the names and meanings of `PPOConfig`."""

    updates: int = 30
    rollout_size: int = 32  # completions per update
    minibatch_size: int = 16  # completions per optimizer step
    num_ppo_epochs: int = 2
    max_completion_length: int = 12
    learning_rate: float = 3e-3
    kl_coef: float = 0.2  # reward per nat
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    vf_coef: float = 0.1
    gamma: float = 1.0
    gae_lambda: float = 0.95
    max_grad_norm: float = 1.0
    seed: int = 0


def train(
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    reward: Callable[[list[str]], list[float]],
    prompts: list[str],
    options: Options,
    engine: RolloutEngine,
) -> ScalarHead:
    """Trains `policy` in place and returns the value head."""
    # The reference is a copy of the policy before training. The critic is a head on the policy, with weights of zero.
    reference = copy.deepcopy(policy).eval()
    value_head = ScalarHead(policy.config.hidden_size, bias=True)
    nn.init.zeros_(value_head.weight)
    nn.init.zeros_(value_head.bias)
    optimizer = torch.optim.AdamW(
        [*policy.parameters(), *value_head.parameters()], options.learning_rate, weight_decay=0
    )

    prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    sampling = Sampling(options.max_completion_length, [tokenizer.eos_token_id], tokenizer.pad_token_id)
    for update in range(options.updates):
        # 1. Rollout: the policy completes prompts, and the reward function scores the completions.
        rows = prompt_indices(update, options.rollout_size, len(prompts), options.seed)
        asked = [prompt_ids[row] for row in rows]
        engine.sync(policy)
        completion_ids = engine.generate(asked, sampling).ids
        scores = torch.tensor(reward([tokenizer.decode(ids, skip_special_tokens=True) for ids in completion_ids]))
        sequences = pack_sequences(asked, completion_ids, tokenizer.pad_token_id, torch.device("cpu"))
        mask = sequences.mask  # (B, T), True for emitted tokens

        # 2. Before the first optimizer step: log-probabilities and values of the old policy, KL and advantages.
        with torch.no_grad():
            old_logprobs, old_values = logprobs_and_values(policy.eval(), sequences, value_head)
            ref_logprobs, _ = logprobs_and_values(reference, sequences, value_head)
        kl = kl_k1(old_logprobs, ref_logprobs)
        rewards = token_rewards(scores, kl, sequences.completion_lengths, kl_coef=options.kl_coef)
        advantages, returns = generalized_advantages(
            rewards, old_values, mask, gamma=options.gamma, gae_lambda=options.gae_lambda
        )
        advantages = whiten(advantages, mask)

        # 3. Several passes over the same completions. The clip keeps the policy close to the old policy.
        policy.train()
        orders = [torch.randperm(options.rollout_size) for _ in range(options.num_ppo_epochs)]
        for order in orders:
            for batch in order.split(options.minibatch_size):
                part = sequences.select(batch)
                width = part.mask.shape[1]
                logprobs, values = logprobs_and_values(policy, part, value_head)
                surrogate, _ = policy_loss(
                    logprobs,
                    old_logprobs[batch, :width],
                    advantages[batch, :width],
                    part.mask,
                    clip_range=options.clip_range,
                )
                critic_loss, _ = value_loss(
                    values,
                    old_values[batch, :width],
                    returns[batch, :width],
                    part.mask,
                    clip_range=options.value_clip_range,
                )
                optimizer.zero_grad()
                (surrogate + options.vf_coef * critic_loss).backward()
                # Clipped separately, so that a large gradient of the critic does not scale down that of the policy.
                nn.utils.clip_grad_norm_(policy.parameters(), options.max_grad_norm)
                nn.utils.clip_grad_norm_(value_head.parameters(), options.max_grad_norm)
                optimizer.step()

        mean_kl = masked_mean(kl, mask, len(scores))  # per completion
        print(f"update {update + 1:2}: reward {scores.mean():5.2f}, KL {mean_kl:5.2f} nats per completion")
    return value_head


def logprobs_and_values(model: nn.Module, sequences: Sequences, value_head: ScalarHead) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the emitted tokens (nats) and values before each token, both (B, T), zero in the padding."""
    positions = torch.arange(sequences.input_ids.shape[1])
    attention_mask = (positions < sequences.lengths[:, None]).long()
    output = model(sequences.input_ids, attention_mask=attention_mask, output_hidden_states=True)
    mask = sequences.mask
    rows, steps = mask.nonzero(as_tuple=True)
    before = sequences.prompt_lengths[rows] - 1 + steps  # the hidden state at a position predicts the next token
    all_logprobs = output.logits[rows, before].float().log_softmax(-1)  # (N, V), N emitted tokens
    chosen = all_logprobs.gather(1, sequences.targets()[:, None]).squeeze(1)
    values = value_head(output.hidden_states[-1][rows, before]).squeeze(1)
    zeros = torch.zeros(mask.shape)
    return zeros.masked_scatter(mask, chosen), zeros.masked_scatter(mask, values)


# ---- A tiny task ----


def count_e(completions: list[str]) -> list[float]:
    """Reward: number of letters e in a completion."""
    return [float(text.count("e")) for text in completions]


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter, with a stop token and a pad token."""
    vocabulary = ["<pad>", "<stop>", *"abcdefghijklmnopqrstuvwxyz "]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<stop>", pad_token="<pad>")


def tiny_policy(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A random Llama with 22,000 parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


PROMPTS = ["the sea", "a tree", "my cat", "one day", "the end", "red hat", "at noon", "we went"]


def main() -> None:
    torch.manual_seed(0)
    tokenizer = letter_tokenizer()
    train(tiny_policy(tokenizer), tokenizer, count_e, PROMPTS, Options(), TransformersEngine())


if __name__ == "__main__":
    main()
