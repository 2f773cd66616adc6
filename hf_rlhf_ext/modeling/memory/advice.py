"""What to change so that a run fits, and the largest batch and length that fit: by planning again."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .plan import MemoryPlan, Suggestion
from .planner import PlanRequest, plan_of
from .search import largest_that_fits
from .setup import Setup

_WORTH = 0.01
"""A suggestion must save at least this share of the plan."""

_N_SUGGESTIONS = 3
_LARGEST_BATCH = 1024
_LARGEST_LENGTH = 2**17


@dataclass(frozen=True)
class _Change:
    """An option to change, what it costs, and the options with it."""

    option: str
    costs: str
    setup: Setup


def suggestions(request: PlanRequest, card_bytes: int, plan: MemoryPlan | None = None) -> list[Suggestion]:
    """The first options to change so that a run needs less memory.

    Options with which the run fits come first, those that cost the least before others; then those that save the most.

    Args:
        request: the run, see `plan_request`.
        card_bytes: memory of the card in bytes.
        plan: the plan of the run, if it is known already.

    Returns:
        At most three suggestions.
    """
    if plan is None:
        plan = plan_of(request)
    fitting: list[Suggestion] = []
    others: list[Suggestion] = []
    for change in _changes(request.setup, plan):
        changed = plan_of(replace(request, setup=change.setup))
        saves = plan.n_bytes - changed.n_bytes
        if saves < _WORTH * plan.n_bytes:
            continue
        found = fitting if changed.fits(card_bytes) else others
        found.append(Suggestion(change.option, saves, change.costs))
        if len(fitting) == _N_SUGGESTIONS:
            break
    others.sort(key=lambda suggestion: -suggestion.saves)
    return (fitting + others)[:_N_SUGGESTIONS]


def _changes(setup: Setup, plan: MemoryPlan) -> Iterator[_Change]:
    """The changes that may help, those that cost the least first."""
    if not setup.checkpointing:
        yield _Change(
            "--activation_checkpointing true", "a third more time for a step", replace(setup, checkpointing=True)
        )
    half = _half_batch(setup)
    if half is not None:
        yield _Change(
            f"--per_device_train_batch_size {half}",
            "more passes for a step; with gradient_accumulation_steps doubled, the same optimization",
            replace(setup, train_batch=half, accumulates=True),
        )
    if plan.peak.name == "evaluation" and setup.eval_batch > 1:
        smaller = setup.eval_batch // 2
        yield _Change(
            f"--per_device_eval_batch_size {smaller}", "a slower evaluation", replace(setup, eval_batch=smaller)
        )
    if setup.stage == "ppo":
        yield from _changes_of_ppo(setup, plan)
    if not any(name in setup.optimizer for name in ("8bit", "adafactor")):
        yield _Change("--optim adamw_8bit", "an optimizer state in 8 bits", replace(setup, optimizer="adamw_8bit"))
    if not setup.use_peft:
        yield _Change("--use_peft true", "an adapter is trained, not all weights", _with_adapter(setup))
    elif setup.quantization != "4bit":
        changed = replace(setup, quantization="4bit", merges=False)
        yield _Change("--load_in_4bit true", "rounded base weights, and slower passes", changed)


def _half_batch(setup: Setup) -> int | None:
    """Half of the micro-batch, in whole prompts; `None` if there is no smaller one."""
    step = setup.per_prompt if setup.stage == "ppo" else 1
    half = setup.train_batch // 2 // step * step
    return half if half >= step else None


def _changes_of_ppo(setup: Setup, plan: MemoryPlan) -> Iterator[_Change]:
    if plan.peak.name == "rollout":
        if setup.merges:
            yield _Change("--merge_for_generation false", "slower sampling", replace(setup, merges=False))
        half = setup.generation_batch // 2 // setup.per_prompt * setup.per_prompt
        if half:
            yield _Change(f"--generation_batch_size {half}", "slower sampling", replace(setup, generation_batch=half))
    if setup.device == "cuda":
        yield from _offloads(setup, plan)
    if setup.critic in ("adapter", "model"):
        yield _Change(
            "--critic head", "a critic that reads the hidden states of the policy", replace(setup, critic="head")
        )


def _offloads(setup: Setup, plan: MemoryPlan) -> Iterator[_Change]:
    """What a run on a GPU can keep on the CPU while it is not needed."""
    if not setup.offloads_optimizer and plan.peak.name != "optimizer step":
        yield _Change(
            "--offload_optimizer true",
            "copies from and to the CPU at each step",
            replace(setup, offloads_optimizer=True),
        )
    if not setup.offloads_rewards and plan.peak.name != "reward":
        yield _Change(
            "--offload_reward_model true",
            "copies from and to the CPU at each rollout",
            replace(setup, offloads_rewards=True),
        )


def _with_adapter(setup: Setup) -> Setup:
    """The options with an adapter instead of trained weights. A critic of its own becomes an adapter too."""
    critic = "adapter" if setup.critic == "model" else setup.critic
    merges = setup.stage == "ppo" and setup.quantization == "none"
    return replace(setup, use_peft=True, critic=critic, merges=merges)


def largest(request: PlanRequest, card_bytes: int) -> dict[str, int]:
    """The largest micro-batch and the largest length that fit, each with everything else as it is.

    Args:
        request: the run, see `plan_request`.
        card_bytes: memory of the card in bytes.

    Returns:
        `per_device_train_batch_size` in rows, and `length` of a sequence in tokens, prompt and completion together, in
        the same shares. 0 where not even one row or a token fits. A plan with the answer fits, and one with a value
        that is 1 % larger (at least one row or token) does not.
    """
    setup = request.setup
    step = setup.per_prompt if setup.stage == "ppo" else 1
    most_rows = setup.rollout if setup.stage == "ppo" else _LARGEST_BATCH
    positions = getattr(request.source.config.get_text_config(), "max_position_embeddings", None)
    most_tokens = positions if isinstance(positions, int) and positions > 0 else _LARGEST_LENGTH
    known = plan_of(request)

    def plan_with(changed: Setup) -> MemoryPlan:
        return known if changed == setup else plan_of(replace(request, setup=changed))

    groups = largest_that_fits(
        lambda n: plan_with(replace(setup, train_batch=n * step)),
        card_bytes,
        start=setup.train_batch // step,
        most=most_rows // step,
        degree=1,
    )
    tokens = largest_that_fits(
        lambda n: plan_with(setup.with_length(n)), card_bytes, start=setup.length, most=most_tokens, degree=2
    )
    return {"per_device_train_batch_size": groups * step, "length": tokens}
