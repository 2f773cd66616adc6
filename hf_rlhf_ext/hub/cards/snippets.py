"""Code of a card that loads the model as it was trained: in the same base, revision, precision, and form of prompts."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..report import CardOptions, RunReport
from .kinds import bits, is_load_in_4bit, quantization, reads_messages
from .markdown import python_literal, template_environment
from .package import install_line, linked_name

_PLACEHOLDER = "<this repository>"
_QUANTIZATION_NAMES = {4: "four_bit", 8: "eight_bit"}
"""The variable of the quantization in the code."""


_PIPELINE_OF_ADAPTER = (
    '`pipeline("text-generation", model=model, tokenizer=tokenizer)` from `transformers` takes the same `model`.'
)


class Block(NamedTuple):
    """A piece of code that runs by itself, with the sentence before it, and perhaps one after it."""

    title: str
    code: str
    note: str = ""


def code_blocks(options: CardOptions, report: RunReport, base_model: str | None) -> list[Block]:
    """Returns the code of a card: with Transformers and PEFT alone, in `pipeline`, and with this library.

    By its name alone, `pipeline` loads some adapters as another model: on the newest base, in another precision, or
    without DoRA. So for an adapter, a sentence says how it takes the model that the first block has loaded.

    Args:
        options: Options of the card.
        report: What was measured, with the members of an ensemble and the dtype of a merge.
        base_model: Hub id of the base. If None, the code of an adapter reads it from the adapter.
    """
    names = _variables(options, report, base_model)
    blocks = []
    is_reward = options.kind == "reward_model"
    family = "reward" if is_reward else "policy"
    if not (is_reward and report.reward_model.members):  # only this library loads an ensemble
        title = "Transformers and PEFT" if options.relation == "adapter" else "Transformers"
        what = ", which gives the raw score of one completion" if is_reward else ""
        note = _PIPELINE_OF_ADAPTER if options.relation == "adapter" and not is_reward else ""
        start = f"With {title} alone (`{requirements(options)}`){what}:"
        blocks.append(Block(start, _code(f"{family}_alone", names), note))
        if _has_pipeline(options):
            blocks.append(Block("With `pipeline`:", _code(f"{family}_pipeline", names)))
    title = f"With {linked_name()} (`{install_line()}`)"
    if is_reward:
        title += ", for many completions and as a reward function of a trainer"
    blocks.append(Block(f"{title}:", _code(f"{family}_library", names)))
    return blocks


def requirements(options: CardOptions) -> str:
    """Returns the command that installs what the code without this library needs."""
    packages = ["torch", "transformers", "accelerate"]
    if options.relation == "adapter":
        packages = ["transformers", "peft"]  # which needs the others
        if bits(options):
            packages.append("bitsandbytes")
    return f"pip install {' '.join(packages)}"


def _has_pipeline(options: CardOptions) -> bool:
    """Whether `pipeline` gives the outputs of this model by its name alone, so far as that was measured."""
    if options.kind != "reward_model":
        return options.relation != "adapter"
    # A merged one has a pad token of its own, without which `pipeline` would read the score too early. It has no head
    # in fp32, and the end of an encoder's text is written by its tokenizer.
    return options.relation == "merge" and (reads_messages(options) or options.encoder is False)


def _code(name: str, names: Mapping[str, Any]) -> str:
    return template_environment().get_template(f"{name}.py.jinja").render(names).strip()


def _variables(options: CardOptions, report: RunReport, base_model: str | None) -> dict[str, Any]:
    """Returns what the templates of the code use. Arguments of calls are lists of source code."""
    is_adapter = options.relation == "adapter"
    base = ["config.base_model_name_or_path", "revision=config.revision"]
    if base_model is not None:
        base = [python_literal(base_model), *_argument("revision", options.base_revision)]
    policy_options = _policy_options(options, report)
    return {
        "repo": [python_literal(options.repo_id or _PLACEHOLDER), *_argument("revision", options.revision)],
        "base": base,
        "base_is_known": base_model is not None,
        "is_adapter": is_adapter,
        "vocabulary": (options.adapter or {}).get("vocabulary"),
        "precision": _precision(options, report),
        "policy_options": policy_options,
        "own_quantization": any(argument.startswith("quantization_config") for argument in policy_options),
        "bits": bits(options) if is_adapter else None,
        "quantization_name": _QUANTIZATION_NAMES.get(bits(options)),
        "quantization_arguments": _quantization_arguments(options),
        "is_chat": reads_messages(options),
        "system_prompt": options.system_prompt,
        "encoder": options.encoder,
        "lower_precision": _computes_in_lower_precision(options),
        "autocast": options.autocast if options.relation != "merge" else None,
        "scorer": "RewardEnsemble" if report.reward_model.members else "RewardScorer",
    }


def _argument(name: str, value: str | None) -> list[str]:
    """Returns an argument as source code, in a list. Empty without a value."""
    return [f"{name}={python_literal(value)}"] if value else []


def _precision(options: CardOptions, report: RunReport) -> list[str]:
    """Returns arguments of `from_pretrained` that load the weights as they were in training.

    By default, Transformers loads the base in its stored dtype, and scores then differ by about a percent.
    """
    dtype = options.base_dtype
    if options.relation == "merge":
        dtype = report.merge.dtype if report.merge is not None else None
    arguments = _argument("dtype", dtype)
    if options.relation == "adapter" and bits(options) is not None:
        arguments.append(f"quantization_config={_QUANTIZATION_NAMES[bits(options)]}")
    return arguments


def _policy_options(options: CardOptions, report: RunReport) -> list[str]:
    """Returns arguments of `load_policy` that load the weights as in training."""
    arguments = _precision(options, report)
    if options.relation == "adapter" and is_load_in_4bit(options):
        arguments[-1] = "load_in_4bit=True"
    return arguments


def _computes_in_lower_precision(options: CardOptions) -> bool:
    """Whether the scalar head, which is trained in fp32, would be computed in another precision than in training."""
    if options.relation == "merge":
        return False
    lower = bits(options) is not None or options.base_dtype not in (None, "float32")
    return bool(options.autocast) or lower


def _quantization_arguments(options: CardOptions) -> list[str]:
    """Returns arguments of `BitsAndBytesConfig`, as source code, that quantize the base as it was in training."""
    recorded = quantization(options)
    # The heads are never quantized in this library.
    skipped = ["lm_head", "score"]
    for name in recorded.get("llm_int8_skip_modules") or ():
        if name not in skipped:
            skipped.append(name)
    if bits(options) == 8:
        arguments = ["load_in_8bit=True"]
        if recorded.get("llm_int8_threshold", 6.0) != 6.0:
            arguments.append(f"llm_int8_threshold={recorded['llm_int8_threshold']}")
    else:
        arguments = ["load_in_4bit=True", f'bnb_4bit_quant_type="{recorded.get("bnb_4bit_quant_type", "fp4")}"']
        if recorded.get("bnb_4bit_use_double_quant"):
            arguments.append("bnb_4bit_use_double_quant=True")
        arguments.append(f'bnb_4bit_compute_dtype="{recorded.get("bnb_4bit_compute_dtype", "float32")}"')
    arguments.append(f"llm_int8_skip_modules={json.dumps(skipped)}")
    return arguments
