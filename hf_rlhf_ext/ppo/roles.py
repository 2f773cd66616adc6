"""The roles of PPO: policy, reference, critic and reward, on one base model if they can share it.

Shapes: B completions of at most T tokens; N emitted tokens; H units of the hidden states.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modeling.adapters import autocast_dtype, mixed_precision
from ..modeling.heads import ScalarHead
from ..modeling.logprobs import (
    chunked_kl,
    chunked_logprobs,
    completion_hidden_states,
    logit_transform,
    scatter_to_mask,
)
from ..modeling.packing import Layout
from ..modeling.probing import evaluating
from ..modeling.shards import own_part
from ..modeling.stack import AdapterStack, read_weights
from ..training.auto_batch import TOKENS, FixedSizes
from ..training.bars import progress_bar
from .batching import prompt_chunks
from .config import PPOConfig
from .guards import are_finite
from .ranks import Ranks
from .reference_file import load_reference, save_reference
from .rollout import Sequences
from .sharding import Whole

VALUE_HEAD_FILE = "value_head.safetensors"
VALUE_FOLDER = "value"


@dataclass
class ScoredTokens:
    """What the roles compute for each token: (B, T) fp32 each, zero in the padding.

    Attributes:
        logprobs: log-probabilities under the policy, in nats.
        entropies: entropies of the policy's distributions, in nats.
        values: values of the critic, in units of reward; `None` without a critic.
        ref_logprobs: log-probabilities under the reference, in nats; `None` if they were not requested.
    """

    logprobs: Tensor
    entropies: Tensor
    values: Tensor | None = None
    ref_logprobs: Tensor | None = None


class Roles:
    """Policy, reference and critic of a PPO run. This class computes; the trainer decides what is trained.

    Args:
        stack: stack with the roles policy and reference, with value if there is a critic, and with reward if it shares
            the base.
        critic: kind of critic: `adapter`, `head`, `model` or `none`.
        args: options of the run, such as temperature, precision and batch sizes.
    """

    def __init__(self, stack: AdapterStack, critic: str, args: PPOConfig):
        self.stack = stack
        self.critic = critic
        self.args = args
        self.temperature = args.temperature  # fixed here, as the temperature of sampling is
        self.sharding = Whole()  # the trainer replaces it once it knows its engine
        self.sizes = FixedSizes()  # the same

    @property
    def policy(self) -> PreTrainedModel | PeftModel:
        """The policy without wrappers such as DDP, as the trainer itself sums gradients over processes."""
        return self.stack.model

    @property
    def has_critic(self) -> bool:
        """Whether there is a critic, and so the role `value`."""
        return self.critic != "none"

    @property
    def value_head(self) -> ScalarHead | None:
        """The fp32 head of the critic; `None` without a critic."""
        return self.stack.roles["value"].head if self.has_critic else None

    @property
    def trained(self) -> tuple[str, ...]:
        """Roles with their own forward and backward pass. A head critic uses those of the policy."""
        return ("policy", "value") if self.critic in ("adapter", "model") else ("policy",)

    @contextmanager
    def activate(self, role: str) -> Iterator[nn.Module]:
        """Yields the model that computes a role. The backward pass must be inside the context too."""
        with self.stack.activate(role) as model:
            yield model

    def mixed_precision(self):
        """Autocast to the dtype of the options. Adapters compute in this dtype too."""
        return mixed_precision(self.policy, autocast_dtype(self.args))

    def parameters_of_critic(self) -> list[nn.Parameter]:
        """The trainable parameters of the critic that do not belong to the policy; none without a critic."""
        if not self.has_critic:
            return []
        policy = set(self.stack.parameters("policy"))
        return [parameter for parameter in self.stack.parameters("value") if parameter not in policy]

    def are_finite(self) -> bool:
        """Whether all trained weights are finite."""
        own = (own_part(parameter) for parameter in self.policy.parameters() if parameter.requires_grad)
        return self.sharding.are_all(are_finite(own))

    # ---- How sequences pass through the models ----

    def hidden_states(self, role: str, model: nn.Module, sequences: Sequences) -> Tensor:
        """The hidden states from which the emitted tokens are predicted, with gradients.

        Args:
            role: the role, which must be active.
            model: the model of the role.
            sequences: prompts and completions.

        Returns:
            (N, H), see `completion_hidden_states`.
        """
        return completion_hidden_states(
            model,
            model,
            sequences.input_ids,
            sequences.prompt_lengths,
            sequences.mask,
            per_prompt=sequences.per_prompt,
            layout=self.stack.roles[role].layout,
        )

    def chunks(
        self, sequences: Sequences, roles: Iterable[str], *, max_rows: int, max_tokens: int | None
    ) -> list[list[int]]:
        """Splits sequences into chunks that fit a budget in the layout of every role, see `prompt_chunks`.

        Returns:
            For each chunk, the indices of its sequences.
        """
        layouts = {self.stack.roles[role].layout for role in roles}
        # The one in which the same sequences have the most tokens.
        widest = next(layout for layout in (Layout.PLAIN, Layout.MASK, Layout.SEGMENTS) if layout in layouts)
        lengths, prompt_lengths = torch.stack([sequences.lengths, sequences.prompt_lengths]).tolist()
        return prompt_chunks(
            lengths,
            prompt_lengths,
            per_prompt=sequences.per_prompt,
            layout=widest,
            max_rows=max_rows,
            max_tokens=max_tokens,
        )

    # ---- What a role computes for tokens ----

    def logprobs(self, role: str, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of tokens and entropies of their distributions under a role.

        Args:
            role: `policy` or `reference`.
            hidden: (N, H) hidden states before each token.
            targets: (N,) int64 ids of the tokens.

        Returns:
            Log-probabilities (N,) and entropies (N,), both fp32 in nats, at the sampling temperature.
        """
        return chunked_logprobs(
            hidden,
            self.output_head(role),
            targets,
            temperature=self.temperature,
            transform=logit_transform(self._model_of(role)),
            chunk_size=self.args.logprobs_chunk_size,
            entropy_requires_grad=self.args.entropy_coef != 0,
        )

    def text_logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities (N,) fp32 under the policy in nats, at temperature 1, for a language-model loss."""
        model = self.policy
        logprobs, _ = chunked_logprobs(
            hidden,
            self.sharding.head(model.get_output_embeddings()),
            targets,
            transform=logit_transform(model),
            chunk_size=self.args.logprobs_chunk_size,
        )
        return logprobs

    def values(self, hidden: Tensor) -> Tensor:
        """Values (N,) fp32 of the critic, in units of reward, from hidden states (N, H)."""
        return self.value_head(hidden).squeeze(-1)

    @torch.no_grad()
    def score(self, sequences: Sequences, *, reference: bool) -> ScoredTokens:
        """Scores the tokens of completions with the same forward pass as in training.

        The log-probabilities of `generate` are not used: in bf16 they differ by up to 0.3 nats per token, but the ratio
        must be 1 at the first optimizer step on a rollout.

        Args:
            sequences: prompts and completions.
            reference: whether to compute the log-probabilities under the reference.

        Returns:
            Log-probabilities, entropies, and the values of a critic.
        """
        return self.sizes.until_it_fits(lambda: self._score(sequences, reference=reference))

    def _score(self, sequences: Sequences, *, reference: bool) -> ScoredTokens:
        mask = sequences.mask
        scored = ScoredTokens(
            logprobs=torch.zeros(mask.shape, device=mask.device),
            entropies=torch.zeros(mask.shape, device=mask.device),
        )
        roles = ["policy"]
        if self.has_critic:
            roles.append("value")
            scored.values = torch.zeros(mask.shape, device=mask.device)
        if reference:
            roles.append("reference")
            scored.ref_logprobs = torch.zeros(mask.shape, device=mask.device)
        # Eval mode turns off dropout and gradient checkpointing. Autocast is the same as in training.
        with evaluating(self.policy), self.mixed_precision():
            # Copies of a chunk, where other processes have more, compute the same values again.
            max_tokens = self.args.max_tokens_per_batch
            chunks = self.sharding.in_step(self._scoring_chunks(sequences, roles, max_tokens))
            title = "log-probabilities and values" if self.has_critic else "log-probabilities"
            with progress_bar(title, len(chunks)) as advance:
                for chunk, _ in chunks:
                    rows = torch.tensor(chunk, device=mask.device)
                    with self._bounded(sequences, rows, roles):
                        self._score_rows(sequences, rows, roles, scored)
                    advance(1)
        return scored

    def _scoring_chunks(self, sequences: Sequences, roles: list[str], max_tokens: int | None) -> list[list[int]]:
        """Splits completions into chunks. With joint scoring, every adapter needs a copy of the rows in the batch."""
        copies = self._copies(roles)
        if max_tokens:
            max_tokens = max(1, max_tokens // copies)
        max_rows = max(1, self.args.per_device_train_batch_size // copies)
        return self.chunks(sequences, roles, max_rows=max_rows, max_tokens=max_tokens)

    def _copies(self, roles: list[str]) -> int:
        """Number of copies of a sequence in a pass that scores it."""
        if self.scores_jointly and self.stack.can_score_jointly:
            return len({self.stack.roles[role].adapter for role in roles})
        return 1

    def _bounded(self, sequences: Sequences, rows: Tensor, roles: list[str]) -> AbstractContextManager:
        """Around the pass that scores a chunk, which may be split if it does not fit."""
        if not self.sizes.enabled:
            return nullcontext()  # the width would be read from the device
        part = sequences.select(rows)
        return self.sizes.one_pass(
            "scoring",
            TOKENS,
            rows=len(part.lengths) * self._copies(roles),
            width=part.input_ids.shape[1],
            n_parts=lambda max_tokens: len(self._scoring_chunks(part, roles, max_tokens)),
        )

    def _score_rows(self, sequences: Sequences, rows: Tensor, roles: list[str], scored: ScoredTokens) -> None:
        """Computes these rows of `scored`."""
        part = sequences.select(rows)
        mask = part.mask
        width = mask.shape[1]
        hidden = self.stack.hidden_states(
            roles,
            part.input_ids,
            part.prompt_lengths,
            mask,
            joint=self.scores_jointly,
            per_prompt=part.per_prompt,
        )
        targets = part.targets()
        logprobs, entropies = self.logprobs("policy", hidden["policy"], targets)
        scored.logprobs[rows, :width] = scatter_to_mask(logprobs, mask)
        scored.entropies[rows, :width] = scatter_to_mask(entropies, mask)
        if "value" in roles:
            scored.values[rows, :width] = scatter_to_mask(self.values(hidden["value"]), mask)
        if "reference" in roles:
            ref_logprobs, _ = self.logprobs("reference", hidden["reference"], targets)
            scored.ref_logprobs[rows, :width] = scatter_to_mask(ref_logprobs, mask)

    @torch.no_grad()
    def exact_kl(self, sequences: Sequences) -> float:
        """Exact KL(policy ‖ reference) over the whole vocabulary, summed over all tokens, in nats."""
        total = 0.0
        with evaluating(self.policy), self.mixed_precision(), self.sharding.inference():
            for k in range(len(sequences.prompt_lengths)):  # one at a time, to save memory
                row = slice(k, k + 1)
                mask = sequences.mask[row]
                hidden = self.stack.hidden_states(
                    ["policy", "reference"],
                    sequences.input_ids[row],
                    sequences.prompt_lengths[row],
                    mask,
                    joint=self.scores_jointly,
                )
                total += chunked_kl(
                    hidden["policy"],
                    hidden["reference"],
                    self.output_head("policy"),
                    self.output_head("reference"),
                    temperature=self.temperature,
                    transform=logit_transform(self.policy),
                    chunk_size=self.args.logprobs_chunk_size,
                ).sum()
        return float(total)

    def output_head(self, role: str) -> Callable[[Tensor], Tensor]:
        """The function from hidden states (N, H) to logits (N, V) of a role."""
        layer = self._model_of(role).get_output_embeddings()
        plain = self.sharding.head(layer)
        has_adapter = any(isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper) for part in layer.modules())
        if not has_adapter:
            return plain  # without an adapter, it is the same for every role on this base

        def head(hidden: Tensor) -> Tensor:
            with self.activate(role):
                return plain(hidden)

        return head

    def _model_of(self, role: str) -> nn.Module:
        return self.stack.roles[role].model or self.stack.model

    @property
    def scores_jointly(self) -> bool:
        """Whether roles are scored in one pass. By default only on a GPU, as it is not faster on a CPU."""
        if self.args.joint_scoring is not None:
            return self.args.joint_scoring
        return next(self.policy.parameters()).device.type == "cuda"

    # ---- Saving and loading ----

    def save(self, folder: Path, state_dict: dict[str, Tensor] | None = None, *, writes: bool = True) -> None:
        """Writes the policy as an ordinary adapter or model folder, and the critic into the same folder or `value/`.

        Args:
            folder: the folder.
            state_dict: weights of a policy without adapters; `None` means those that it has.
            writes: whether this process writes the files. If the weights are in shards, every process must call this.
        """
        if self.stack.roles["policy"].adapter is not None:
            self.stack.save("policy", folder, writes=writes)
        elif writes:
            # Heads and models of other roles are modules of the policy too. They are not saved with it.
            weights = state_dict or self.policy.state_dict()
            attached = tuple(f"{role}_{kind}." for role in self.stack.roles for kind in ("head", "model"))
            own = {name: value for name, value in weights.items() if not name.startswith(attached)}
            self.policy.save_pretrained(folder, state_dict=own)
        if self.critic in ("adapter", "model"):
            self.stack.save("value", folder / VALUE_FOLDER, writes=writes)
        elif writes and self.has_critic:
            save_file(self.value_head.state_dict(), folder / VALUE_HEAD_FILE)

    def load(self, folder: Path) -> None:
        """Reads policy and critic from a folder that `save` wrote, into the existing parameters."""
        with self.sharding.loading():
            if self.stack.roles["policy"].adapter is not None:
                self.stack.load("policy", folder)
            else:
                read_weights(self.policy, folder)
            if self.critic == "head":
                self.value_head.load_state_dict(load_file(folder / VALUE_HEAD_FILE))
            elif self.has_critic:
                self.stack.load("value", folder / VALUE_FOLDER)

    def save_reference(self, checkpoint: Path, digest: str | None, ranks: Ranks, *, writes: bool) -> str | None:
        """Writes the reference beside a checkpoint, once per run; see `reference_file.save_reference`."""
        return save_reference(self.stack, checkpoint, digest, ranks, writes=writes)

    def load_reference(self, checkpoint: Path, state: Mapping[str, Any], output_dir: Path) -> None:
        """Makes the reference that of a checkpoint; see `reference_file.load_reference`."""
        with self.sharding.loading():
            load_reference(self.stack, checkpoint, state, output_dir)
