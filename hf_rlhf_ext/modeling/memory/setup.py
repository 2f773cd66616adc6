"""The options that a memory plan depends on, read by attribute from the configs of any stage."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ...errors import UserError
from ..loading import preferred_dtype

STAGES = ("sft", "reward", "ppo")

_ASSUMED_PROMPT = 512
_ASSUMED_COMPLETION = 256
_DEFAULTS = {"sft": {"max_length": 1024}, "reward": {"max_length": 1024}, "ppo": {"max_completion_length": 256}}

_DTYPES = {"auto", "float32", "bfloat16", "float16"}


@dataclass(frozen=True)
class Setup:
    """The resolved options. Lengths are in tokens, batches in rows: demonstrations, comparisons or completions.

    Attributes:
        stage: `sft`, `reward` or `ppo`.
        device: `cuda` or `cpu`.
        dtype: dtype of the weights of the base.
        autocast: dtype of mixed precision; `None` without.
        quantization: `none`, `4bit` or `8bit`.
        double_quant: whether the scales of 4 bits are quantized too.
        use_peft: whether an adapter is trained; otherwise all weights are.
        lora_r: rank of the adapter.
        lora_target_modules: which layers get it, as PEFT takes it.
        lora_modules_to_save: modules that are trained whole.
        use_dora: whether the adapter is DoRA.
        starts_from_adapter: whether the policy is an adapter already, whose frozen copy is the reference of PPO.
        attention: attention implementation; `None` means that of Transformers.
        checkpointing: whether activations are computed again in the backward pass.
        optimizer: name of the optimizer, as `optim` of `TrainingArguments`.
        train_batch: rows of a micro-batch.
        eval_batch: rows of a batch of evaluation.
        accumulates: whether an optimizer step has several micro-batches.
        max_tokens_per_batch: most tokens of a forward pass; `None` for no limit.
        evaluates: whether the run evaluates.
        prompt_tokens: longest prompt.
        completion_tokens: longest completion.
        per_prompt: completions of each prompt.
        layout: `plain` or `shared_prefix`.
        lora_dropout: probability of dropout in the adapter.
        learns_prompts: whether the tokens of prompts are in the loss of SFT.
        critic: kind of critic in PPO: `adapter`, `head`, `model` or `none`.
        reward: reward model in PPO: `shared` adapter on the same base, a `model` of its own, or `none`.
        reward_adapters: number of reward adapters on the base of the policy.
        rollout: completions of a rollout.
        generation_batch: completions of a rollout that are sampled together.
        generation_limit: most completions that are sampled together; `None` for no limit.
        merges: whether the adapter is merged into the base for sampling.
        needs_reference: whether PPO scores with a reference.
        joint_scoring: whether adapters are scored in one pass.
        entropy_bonus: whether entropies have gradients.
        logprobs_chunk: tokens whose logits are in memory at one time; `None` for the default.
        temperature: temperature of sampling.
        top_k: number of most probable tokens to sample from; 0 for all.
        top_p: share of the probability to sample from.
        min_new_tokens: tokens before which no completion ends; 0 for none.
        exact_kl: whether evaluations compute the KL over the whole vocabulary too.
        ptx_batch: texts of a pass of PPO-ptx; 0 without.
        offloads_optimizer: whether the states of the optimizer are on the GPU only while it takes a step.
        offloads_rewards: whether reward models of their own are on the GPU only while they score.
    """

    stage: str
    device: str
    dtype: torch.dtype
    autocast: torch.dtype | None
    quantization: str
    double_quant: bool
    use_peft: bool
    lora_r: int
    lora_target_modules: str | tuple[str, ...]
    lora_modules_to_save: tuple[str, ...]
    use_dora: bool
    starts_from_adapter: bool
    attention: str | None
    checkpointing: bool
    optimizer: str
    train_batch: int
    eval_batch: int
    accumulates: bool
    max_tokens_per_batch: int | None
    evaluates: bool
    prompt_tokens: int
    completion_tokens: int
    per_prompt: int
    layout: str
    lora_dropout: float = 0.0
    learns_prompts: bool = False
    critic: str = "none"
    reward: str = "none"
    reward_adapters: int = 0
    rollout: int = 0
    generation_batch: int = 0
    generation_limit: int | None = None
    merges: bool = False
    needs_reference: bool = False
    joint_scoring: bool = False
    entropy_bonus: bool = False
    logprobs_chunk: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_new_tokens: int = 0
    exact_kl: bool = False
    ptx_batch: int = 0
    offloads_optimizer: bool = False
    offloads_rewards: bool = False

    def with_length(self, total: int) -> "Setup":
        """The same with sequences of `total` tokens, in the same shares of prompt and completion."""
        share = self.prompt_tokens / (self.prompt_tokens + self.completion_tokens)
        prompt = max(1, round(total * share))
        return replace(self, prompt_tokens=prompt, completion_tokens=max(1, total - prompt))

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def of_evaluation(self) -> "Setup":
        """The same for an evaluation of PPO, which samples one completion for each prompt of a batch."""
        sampled = self.generation_limit or self.eval_batch
        return replace(
            self,
            per_prompt=1,
            layout="plain",
            rollout=self.eval_batch,
            generation_batch=min(self.eval_batch, sampled),
            needs_reference=True,
        )

    @property
    def of_texts(self) -> "Setup":
        """The same for the texts of PPO-ptx, of which all tokens but the first are learned."""
        return replace(
            self,
            prompt_tokens=1,
            completion_tokens=max(1, self.length - 1),
            per_prompt=1,
            layout="plain",
            train_batch=self.ptx_batch,
            temperature=1.0,
            entropy_bonus=False,
        )

    def rows(self, batch: int, copies: int = 1) -> int:
        """Rows of a forward pass over a batch, within the token budget. Each row may be there in several copies."""
        if not self.max_tokens_per_batch:
            return batch
        group = self.per_prompt
        tokens = group * self.length
        if self.layout == "shared_prefix":
            tokens = self.prompt_tokens + group * self.completion_tokens
        # In reward training, a row is a comparison with all of its completions.
        size = 1 if self.stage == "reward" else group
        return min(batch, size * max(1, self.max_tokens_per_batch // copies // tokens))

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON values."""
        values = asdict(self)
        for name, value in values.items():
            if isinstance(value, torch.dtype):
                values[name] = str(value).removeprefix("torch.")
            elif isinstance(value, tuple):
                values[name] = list(value)
        return values


def read_setup(
    stage: str,
    args: Any,
    model_args: Any,
    *,
    starts_from_adapter: bool,
    stored_quantization: str | None,
    prompt_tokens: int | None,
    completion_tokens: int | None,
    device: str | None,
    has_value_model: bool = False,
    evaluates: bool | None = None,
) -> tuple[Setup, list[str]]:
    """Resolves the options of a run, without the rewards of PPO.

    Args:
        stage: `sft`, `reward` or `ppo`.
        args: the trainer's config, or any object with such attributes; missing ones have the defaults of the configs.
        model_args: options of model and adapter, in the same way.
        starts_from_adapter: whether the model is an adapter.
        stored_quantization: quantization of the checkpoint itself; `None` if it is not quantized.
        prompt_tokens: longest prompt; `None` if it is not known.
        completion_tokens: longest completion; `None` if it is not known.
        device: `cuda` or `cpu`; `None` for that of this machine.
        has_value_model: whether the critic of PPO is given as a model.
        evaluates: whether the run evaluates; `None` if `eval_strategy` says so.

    Returns:
        The options, and what was assumed, one line each.

    Raises:
        UserError: for a stage or a device that does not exist.
    """
    if stage not in STAGES:
        raise UserError(f"stage: {stage!r} is not known: choose one of {', '.join(STAGES)}.")
    if device not in (None, "cuda", "cpu"):
        raise UserError(f"device: {device!r} cannot be planned: choose cuda or cpu.")

    def option(name: str, default: Any) -> Any:
        value = getattr(args, name, None)
        return default if value is None else value

    def of_model(name: str, default: Any) -> Any:
        value = getattr(model_args, name, None)
        return default if value is None else value

    if device is None:
        on_cuda = torch.cuda.is_available() and not option("use_cpu", False)
        device = "cuda" if on_cuda else "cpu"
    notes: list[str] = []
    use_peft = bool(of_model("use_peft", True)) or starts_from_adapter
    prompt, completion = _lengths(stage, option, prompt_tokens, completion_tokens, notes)
    per_prompt = _per_prompt(stage, option)
    quantization = stored_quantization or _requested_quantization(of_model)
    targets = of_model("lora_target_modules", ["all-linear"])
    train_batch = option("per_device_train_batch_size", 8)
    setup = Setup(
        stage=stage,
        device=device,
        dtype=_dtype(of_model("dtype", "auto"), device, use_peft=use_peft),
        autocast=_autocast(option, device),
        quantization=quantization,
        double_quant=of_model("use_bnb_nested_quant", True) is not False,
        use_peft=use_peft,
        lora_r=of_model("lora_r", 16),
        lora_target_modules=_as_targets(targets),
        lora_modules_to_save=tuple(of_model("lora_modules_to_save", ())),
        use_dora=bool(of_model("use_dora", False)),
        starts_from_adapter=starts_from_adapter,
        attention=of_model("attn_implementation", None),
        checkpointing=bool(option("activation_checkpointing", option("gradient_checkpointing", True))),
        optimizer=str(getattr(option("optim", "adamw_torch_fused"), "value", option("optim", "adamw_torch_fused"))),
        train_batch=train_batch,
        eval_batch=option("per_device_eval_batch_size", 8),
        accumulates=option("gradient_accumulation_steps", 1) > 1,
        max_tokens_per_batch=getattr(args, "max_tokens_per_batch", None),
        evaluates=_evaluates(option) if evaluates is None else evaluates,
        prompt_tokens=prompt,
        completion_tokens=completion,
        per_prompt=per_prompt,
        layout=_layout(stage, option, per_prompt),
        lora_dropout=of_model("lora_dropout", 0.0),
        learns_prompts=option("completion_only_loss", True) is False,
    )
    if stage == "ppo":
        critic = option("critic", _default_critic(setup, has_value_model=has_value_model))
        setup = _with_ppo_options(replace(setup, critic=critic), args, option)
        if setup.ptx_batch:
            notes.append(f"length of the texts of PPO-ptx not known: {setup.length} tokens assumed")
    return setup, notes


def _evaluates(option: Any) -> bool:
    strategy = option("eval_strategy", "no")
    return str(getattr(strategy, "value", strategy)) != "no"


def _default_critic(setup: Setup, *, has_value_model: bool) -> str:
    if has_value_model:
        return "model"
    return "adapter" if setup.use_peft else "head"


def _with_ppo_options(setup: Setup, args: Any, option: Any) -> Setup:
    is_on_gpu = setup.device != "cpu"  # in a run on the CPU, nothing is moved
    accumulation = option("gradient_accumulation_steps", 1)
    minibatch = setup.train_batch * accumulation
    rollout = minibatch * option("num_mini_batches", 1)
    limit = getattr(args, "generation_batch_size", None)
    generation_batch = limit or rollout
    generation_batch = max(generation_batch - generation_batch % setup.per_prompt, setup.per_prompt)
    texts = option("ptx_batch_size", minibatch) if option("ptx_coef", 0.0) else 0
    return replace(
        setup,
        rollout=rollout,
        generation_batch=min(rollout, generation_batch),
        generation_limit=limit,
        merges=bool(option("merge_for_generation", True)) and setup.use_peft and setup.quantization == "none",
        needs_reference=option("kl_coef", 0.05) > 0 or getattr(args, "max_kl", 100.0) is not None,
        joint_scoring=bool(option("joint_scoring", setup.device == "cuda")) and setup.use_peft,
        entropy_bonus=option("entropy_coef", 0.0) != 0,
        logprobs_chunk=getattr(args, "logprobs_chunk_size", None),
        temperature=option("temperature", 1.0),
        top_k=option("top_k", 0),
        top_p=option("top_p", 1.0),
        min_new_tokens=_generation_kwargs(option).get("min_new_tokens") or 0,
        exact_kl=option("exact_kl_rows", 4) > 0,
        ptx_batch=min(texts, setup.train_batch),
        offloads_optimizer=bool(option("offload_optimizer", False)) and is_on_gpu,
        offloads_rewards=bool(option("offload_reward_model", False)) and is_on_gpu,
    )


def _generation_kwargs(option: Any) -> dict[str, Any]:
    """Further options of sampling; a config file may have them as text, of which nothing is read here."""
    given = option("generation_kwargs", {})
    return given if isinstance(given, dict) else {}


def _lengths(
    stage: str, option: Any, prompt_tokens: int | None, completion_tokens: int | None, notes: list[str]
) -> tuple[int, int]:
    """Longest prompt and completion; what is not given is assumed, with a note."""
    if stage == "ppo":
        completion = completion_tokens or option("max_completion_length", _ASSUMED_COMPLETION)
        prompt = prompt_tokens or option("max_prompt_length", None)
        if prompt is None:
            notes.append(f"length of prompts not given: {_ASSUMED_PROMPT} tokens assumed")
            prompt = _ASSUMED_PROMPT
        return prompt, completion
    limit = option("max_length", 1024)
    if prompt_tokens is None and completion_tokens is None:
        notes.append(f"lengths not given: rows of max_length={limit} tokens assumed, half of each the completion")
        return max(1, limit // 2), max(1, limit - limit // 2)
    prompt = prompt_tokens or 1
    completion = completion_tokens or max(1, limit - prompt)
    if prompt + completion > limit:
        notes.append(f"rows are longer than max_length={limit}: cut to it")
        completion = max(1, min(completion, limit - 1))
        prompt = limit - completion
    return prompt, completion


def _per_prompt(stage: str, option: Any) -> int:
    if stage == "ppo":
        return option("num_generations", 1)
    if stage == "reward":
        return option("completions_per_prompt", 2)
    return 1


def _layout(stage: str, option: Any, per_prompt: int) -> str:
    """The layout in use. The trainers share prompts where they can, which attention by sdpa always can."""
    if per_prompt == 1 or (stage == "reward" and option("layout", "auto") == "plain"):
        return "plain"
    return "shared_prefix"


def _requested_quantization(of_model: Any) -> str:
    if of_model("load_in_4bit", False):
        return "4bit"
    return "8bit" if of_model("load_in_8bit", False) else "none"


def _dtype(name: str | torch.dtype, device: str, *, use_peft: bool) -> torch.dtype:
    if isinstance(name, torch.dtype):
        return name
    if name not in _DTYPES:
        raise UserError(f"dtype: {name!r} is not known: choose auto, float32, bfloat16 or float16.")
    if name != "auto":
        return getattr(torch, name)
    if not use_peft:
        return torch.float32
    if device == "cuda" and not torch.cuda.is_available():
        return torch.bfloat16
    return preferred_dtype()


def _autocast(option: Any, device: str) -> torch.dtype | None:
    if option("fp16", False):
        return torch.float16
    return torch.bfloat16 if option("bf16", device == "cuda") else None


def _as_targets(targets: Any) -> str | tuple[str, ...]:
    names = [targets] if isinstance(targets, str) else list(targets)
    return names[0] if names == ["all-linear"] else tuple(names)
