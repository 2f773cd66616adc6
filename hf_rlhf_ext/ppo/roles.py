"""Who computes what in PPO: policy, reference, critic and reward, on one base wherever they can share it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modeling.adapters import autocast_dtype, evaluating, mixed_precision
from ..modeling.heads import ScalarHead
from ..modeling.logprobs import (
    chunked_kl,
    chunked_logprobs,
    final_softcap,
    scatter_to_mask,
)
from ..modeling.stack import ADAPTER_NAMES, AdapterStack, read_weights
from .batching import budget_chunks
from .config import PPOConfig
from .guards import are_finite
from .rollout import Sequences

VALUE_HEAD_FILE = "value_head.safetensors"
VALUE_FOLDER = "value"
REFERENCE_FOLDER = ADAPTER_NAMES["reference"]


@dataclass
class ScoredTokens:
    """What the roles make of B completions of at most T tokens: (B, T) fp32 each, zero in the padding.

    `logprobs` and `ref_logprobs` of the emitted tokens and `entropies` of the policy's distributions in nats; `values`
    in reward. `ref_logprobs` is None where nobody asked the reference.
    """

    logprobs: Tensor
    entropies: Tensor
    values: Tensor
    ref_logprobs: Tensor | None = None


class Roles:
    """Policy, reference and critic of a PPO run. It computes; the trainer decides what is trained.

    Args:
        stack: with the roles policy, reference and value attached, and reward where it shares the base.
        critic: kind of critic: adapter, head or model.
        args: options of the run; `temperature`, `max_tokens_per_batch`, precision and the like are read from it.
    """

    def __init__(self, stack: AdapterStack, critic: str, args: PPOConfig):
        self.stack = stack
        self.critic = critic
        self.args = args
        self.temperature = args.temperature  # that of sampling, which is fixed with the trainer too

    @property
    def policy(self) -> PreTrainedModel | PeftModel:
        """The model without wrappers. PPO's forwards go to it: the trainer sums gradients over processes itself."""
        return self.stack.model

    @property
    def value_head(self) -> ScalarHead:
        """The critic's fp32 head."""
        return self.stack.roles["value"].head

    @property
    def trained(self) -> tuple[str, ...]:
        """Roles that have a forward and a backward pass of their own; a head critic goes along with the policy."""
        return ("policy",) if self.critic == "head" else ("policy", "value")

    @contextmanager
    def activate(self, role: str) -> Iterator[nn.Module]:
        """Yields the model that computes a role. Its backward pass belongs inside too."""
        with self.stack.activate(role) as model:
            yield model

    def mixed_precision(self):
        """Autocast as the options say, with the adapters computed in its dtype."""
        return mixed_precision(self.policy, autocast_dtype(self.args))

    def parameters_of_critic(self) -> list[nn.Parameter]:
        """The critic's trainable parameters that are none of the policy's."""
        policy = set(self.stack.parameters("policy"))
        return [parameter for parameter in self.stack.parameters("value") if parameter not in policy]

    def are_finite(self) -> bool:
        """Whether all trained weights are numbers."""
        return are_finite(parameter for parameter in self.policy.parameters() if parameter.requires_grad)

    # ---- What a role makes of tokens ----

    def logprobs(self, role: str, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the `targets` (N,) and entropies, (N,) fp32, nats, from hidden states (N, H)."""
        return chunked_logprobs(
            hidden,
            self.output_head(role),
            targets,
            temperature=self.temperature,
            softcap=final_softcap(self._model_of(role)),
            chunk_size=self.args.logprobs_chunk_size,
            entropy_requires_grad=self.args.entropy_coef != 0,
        )

    def text_logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities (N,) under the policy at temperature 1, for a language-model loss."""
        model = self.policy
        logprobs, _ = chunked_logprobs(
            hidden,
            model.get_output_embeddings(),
            targets,
            softcap=final_softcap(model),
            chunk_size=self.args.logprobs_chunk_size,
        )
        return logprobs

    def values(self, hidden: Tensor) -> Tensor:
        """The critic's values (N,) fp32 of hidden states (N, H)."""
        return self.value_head(hidden).squeeze(-1)

    @torch.no_grad()
    def score(self, sequences: Sequences, *, reference: bool) -> ScoredTokens:
        """What every role makes of the completions, by the training forward.

        Never the log-probabilities of `generate`: in bf16 they differ by up to 0.3 nats per token, and the first ratio
        of an update must be 1.
        """
        mask = sequences.mask
        scored = ScoredTokens(
            logprobs=torch.zeros(mask.shape, device=mask.device),
            entropies=torch.zeros(mask.shape, device=mask.device),
            values=torch.zeros(mask.shape, device=mask.device),
        )
        roles = ["policy", "value"]
        if reference:
            roles.append("reference")
            scored.ref_logprobs = torch.zeros(mask.shape, device=mask.device)
        # In eval mode dropout and gradient checkpointing are off; autocast is that of training.
        with evaluating(self.policy), self.mixed_precision():
            for chunk in self._scoring_chunks(sequences, roles):
                rows = torch.tensor(chunk, device=mask.device)
                self._score_rows(sequences, rows, roles, scored)
        return scored

    def _scoring_chunks(self, sequences: Sequences, roles: list[str]) -> list[list[int]]:
        """Which completions are scored together: scoring jointly, each role needs rows of its own in the batch."""
        copies = 1
        if self.scores_jointly and self.stack.can_score_jointly:
            copies = len({self.stack.roles[role].adapter for role in roles})
        max_tokens = self.args.max_tokens_per_batch
        if max_tokens:
            max_tokens = max(1, max_tokens // copies)
        return budget_chunks(
            sequences.lengths.tolist(),
            max_rows=max(1, self.args.per_device_train_batch_size // copies),
            max_tokens=max_tokens,
        )

    def _score_rows(self, sequences: Sequences, rows: Tensor, roles: list[str], scored: ScoredTokens) -> None:
        """Fills these rows of `scored`."""
        part = sequences.select(rows)
        mask = part.mask
        width = mask.shape[1]
        hidden = self.stack.hidden_states(roles, part.input_ids, part.prompt_lengths, mask, joint=self.scores_jointly)
        targets = part.targets()
        logprobs, entropies = self.logprobs("policy", hidden["policy"], targets)
        scored.logprobs[rows, :width] = scatter_to_mask(logprobs, mask)
        scored.entropies[rows, :width] = scatter_to_mask(entropies, mask)
        scored.values[rows, :width] = scatter_to_mask(self.values(hidden["value"]), mask)
        if "reference" in roles:
            ref_logprobs, _ = self.logprobs("reference", hidden["reference"], targets)
            scored.ref_logprobs[rows, :width] = scatter_to_mask(ref_logprobs, mask)

    @torch.no_grad()
    def exact_kl(self, sequences: Sequences) -> float:
        """KL(policy ‖ reference) over the whole vocabulary, nats, summed over all tokens of all completions."""
        total = 0.0
        with evaluating(self.policy), self.mixed_precision():
            for k in range(len(sequences.prompt_lengths)):  # one at a time: two roles' states of every token are kept
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
                    softcap=final_softcap(self.policy),
                    chunk_size=self.args.logprobs_chunk_size,
                ).sum()
        return float(total)

    def output_head(self, role: str) -> Callable[[Tensor], Tensor]:
        """Hidden states to logits of a role."""
        plain = self._model_of(role).get_output_embeddings()
        has_adapter = any(isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper) for part in plain.modules())
        if not has_adapter:
            return plain  # the same for every role on this base

        def head(hidden: Tensor) -> Tensor:
            with self.activate(role) as model:
                return model.get_output_embeddings()(hidden)

        return head

    def _model_of(self, role: str) -> nn.Module:
        return self.stack.roles[role].model or self.stack.model

    @property
    def scores_jointly(self) -> bool:
        """Whether roles are scored in one pass; by default on a GPU only, as a CPU gains nothing."""
        if self.args.joint_scoring is not None:
            return self.args.joint_scoring
        return next(self.policy.parameters()).device.type == "cuda"

    # ---- Saving and loading ----

    def save(self, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Writes the policy (an ordinary adapter or model folder) and the critic beside it, or in `value/`."""
        if self.stack.roles["policy"].adapter is not None:
            self.stack.save("policy", folder)
        else:
            # Heads and models of other roles hang on the policy's modules: they are no part of it.
            weights = state_dict or self.policy.state_dict()
            attached = tuple(f"{role}_{kind}." for role in self.stack.roles for kind in ("head", "model"))
            own = {name: value for name, value in weights.items() if not name.startswith(attached)}
            self.policy.save_pretrained(folder, state_dict=own)
        if self.critic == "head":
            save_file(self.value_head.state_dict(), folder / VALUE_HEAD_FILE)
        else:
            self.stack.save("value", folder / VALUE_FOLDER)

    def load(self, folder: Path) -> None:
        """Policy and critic as `save` wrote them, into the parameters that the optimizer already holds."""
        if self.stack.roles["policy"].adapter is not None:
            self.stack.load("policy", folder)
        else:
            read_weights(self.policy, folder)
        if self.critic == "head":
            self.value_head.load_state_dict(load_file(folder / VALUE_HEAD_FILE))
        else:
            self.stack.load("value", folder / VALUE_FOLDER)

    def save_reference(self, folder: Path) -> None:
        """Writes the reference, which a checkpoint needs and a finished run does not."""
        self.stack.save("reference", folder / REFERENCE_FOLDER)

    def load_reference(self, folder: Path) -> None:
        self.stack.load("reference", folder / REFERENCE_FOLDER)
