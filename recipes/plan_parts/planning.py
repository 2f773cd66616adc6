"""Plans a run with its options: for the device that it is meant for, on the base that it will have."""

import copy
from dataclasses import replace
from typing import Any

import torch
from transformers import PretrainedConfig

from hf_rlhf_ext.cli.first_checks import check_model_folder, check_policy_folder, check_reward_folder
from hf_rlhf_ext.modeling.memory.advice import largest, suggestions
from hf_rlhf_ext.modeling.memory.plan import MemoryPlan, Suggestion
from hf_rlhf_ext.modeling.memory.planner import plan_of, plan_request
from hf_rlhf_ext.modeling.memory.sources import Source, find_source
from hf_rlhf_ext.recipes.plan_parts.models import MadeFrom, made_from
from hf_rlhf_ext.recipes.plan_parts.options import Planned


class Plans:
    """The plans of one run.

    Args:
        planned: The run.
        device: `cuda` or `cpu`.
        prompt_tokens: Tokens of the longest prompt. None if they are not known.
        completion_tokens: Tokens of the longest completion. None if they are not known.
        completions_per_prompt: Completions of each prompt of a reward model's comparisons.
        base_config: Config of the base, in place of the one that is read from its folder or from the Hub.

    Raises:
        UserError: A model is not there, or cannot be planned.
    """

    def __init__(
        self,
        planned: Planned,
        device: str,
        *,
        prompt_tokens: int | None = None,
        completion_tokens: int | None = None,
        completions_per_prompt: int = 2,
        base_config: PretrainedConfig | None = None,
    ):
        self.planned = planned
        self.base_config = base_config
        self.args, self.model_args = on_device(planned, device)
        if planned.stage == "reward":
            self.args.completions_per_prompt = completions_per_prompt  # a fact of the data, which no option says
        self.notes: list[str] = []
        origin = made_from(self.model_args.model_name_or_path, planned.config)
        self.base = origin.base
        self.request = plan_request(
            self._policy(origin),
            planned.stage,
            self.args,
            model_args=self.model_args,
            reward_model=self._rewards() if planned.stage == "ppo" else None,
            value_model=None if planned.value_model is None else made_from(planned.value_model, planned.config).base,
            evaluates=planned.evaluates,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            device=device,
        )

    def plan(self) -> MemoryPlan:
        """The plan of the run as its options say."""
        plan = plan_of(self.request)
        return replace(plan, notes=(*plan.notes, *self.notes, *self._positions()))

    def _positions(self) -> list[str]:
        """A note where sequences are longer than the model knows positions."""
        known = getattr(self.request.source.config.get_text_config(), "max_position_embeddings", None)
        length = self.request.setup.length
        if not isinstance(known, int) or length <= known:
            return []
        return [f"sequences of {length} tokens are longer than the model's {known} positions"]

    def largest(self, n_bytes: int | None) -> dict[str, int]:
        """The largest batch and length that fit in `n_bytes` bytes. Empty without a memory."""
        return {} if n_bytes is None else largest(self.request, n_bytes)

    def suggestions(self, n_bytes: int | None) -> list[Suggestion]:
        """The first options to change so that the run needs less, those first with which it fits in `n_bytes` bytes."""
        return suggestions(self.request, n_bytes or 0)

    def _policy(self, origin: MadeFrom) -> Source:
        """The model as the planner takes it. One that an earlier stage will make is its base with an adapter."""
        if origin.adapter is None:
            check = check_model_folder if self.planned.stage == "reward" else check_policy_folder
            check(origin.base)
            return self._config_of(origin.base)
        for option, value in origin.adapter.items():
            if option not in self.planned.given:
                setattr(self.model_args, option, value)
        return replace(self._config_of(origin.base), name=origin.base, is_adapter=True)

    def _rewards(self) -> list[str | Source | None]:
        """The reward models as the planner takes them: None for an adapter on the base of the policy."""
        planned = self.planned
        if not planned.reward_models and "reward_funcs" not in planned.given:
            self.notes.append("no reward given: a reward adapter on the base of the policy assumed")
            return [None]
        return [self._reward(name) for name in (*planned.reward_models, *planned.eval_reward_models)]

    def _reward(self, name: str) -> str | Source | None:
        origin = made_from(name, self.planned.config)
        if origin.adapter is None:
            check_reward_folder(name)
            return name
        if origin.base == self.base:
            return None
        return replace(self._config_of(origin.base), is_adapter=True)

    def _config_of(self, name: str) -> Source:
        if self.base_config is not None and name == self.base:
            return replace(find_source(self.base_config, stage=self.planned.stage), name=name)
        return find_source(
            name,
            stage=self.planned.stage,
            option="model_name_or_path",
            revision=self.model_args.revision if name == self.model_args.model_name_or_path else None,
            trust_remote_code=self.args.trust_remote_code,
        )


def on_device(planned: Planned, device: str) -> tuple[Any, Any]:
    """Copies of the options of trainer and model, with the precision that they have on the device.

    Defaults follow the machine on which the options are read. It may have no GPU, or no bf16.
    """
    args, model_args = copy.copy(planned.args), copy.copy(planned.model_args)
    if device == "cpu" or torch.cuda.is_available():
        return args, model_args
    args.use_cpu = False
    if not planned.given & {"bf16", "fp16", "no_bf16"}:
        args.bf16, args.fp16 = True, False
    if model_args.dtype == "auto":
        model_args.dtype = ("float16" if args.fp16 else "bfloat16") if model_args.use_peft else "float32"
    return args, model_args
