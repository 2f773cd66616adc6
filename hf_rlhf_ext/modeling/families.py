"""Which families of models fit: decoder-only language models as the policy, decoders and encoders as a reward model.

Everything else is refused in one line, before weights are loaded where the config says enough.
"""

from typing import Any, Literal

import torch
import transformers
from peft import PeftConfig, PeftModel, TaskType
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from ..errors import UserError, first_line
from .adapter_kinds import task_name
from .adapters import bare_model
from .embeddings import n_rows
from .logprobs import captured_hidden_states
from .probing import probing
from .quantization import each_token_alone

GOOD_POLICIES = "such as Llama, Qwen, Gemma, Mistral or OPT"
"""Examples of models for messages."""

_UNSUPPORTED = {
    "reformer": "needs sequences of a multiple of its chunk length in training, but completions have any length",
}
"""Model types that run in eval mode, but cannot be trained."""

_OTHER_TASKS = ("ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice", "ForNextSentencePrediction")


# ---- Before loading ----


def check_config(
    path: str, *, name: str, task: Literal["causal_lm", "reward"], trust_remote_code: bool = False, **location: Any
) -> None:
    """Refuses a checkpoint of a family that does not fit, before its weights are loaded.

    Args:
        path: local folder or Hub id.
        name: name of the model, for messages.
        task: as in `load_base_model`.
        trust_remote_code: whether to run Python code from the repository.
        location: further arguments of `from_pretrained`, such as `revision`.

    Raises:
        UserError: for an encoder-decoder, and for a masked language model or a classifier as a policy.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **location)
    architecture = (config.architectures or [""])[0]
    # A decoder that was saved alone, such as `BartForCausalLM`, is a decoder-only model.
    if getattr(config, "is_encoder_decoder", False) and not architecture.endswith("ForCausalLM"):
        raise UserError(_encoder_decoder(f"model_name_or_path: {name}", config.model_type, task))
    if task == "reward" or getattr(config, "is_decoder", False):
        return
    if architecture.endswith("ForSequenceClassification"):
        raise UserError(
            f"model_name_or_path: {name} is a classifier or reward model ({architecture}), which does not generate "
            f"text: give a causal language model, {GOOD_POLICIES}."
        )
    if architecture.endswith(("ForMaskedLM", "ForPreTraining")):
        raise UserError(
            f"model_name_or_path: {name} is an encoder ({architecture}), which does not generate text: give a causal "
            f"language model, {GOOD_POLICIES}."
        )


def _encoder_decoder(what: str, kind: str, task: str) -> str:
    if task == "reward":
        return (
            f"{what} is an encoder-decoder ({kind}), which is not supported as a reward model: give a decoder or an "
            "encoder, such as Llama, Qwen, BERT or DeBERTa."
        )
    return (
        f"{what} is an encoder-decoder ({kind}), which is not supported as a policy: give a decoder-only language "
        f"model, {GOOD_POLICIES}."
    )


def loading_problem(error: Exception) -> str:
    """Explains an exception of `from_pretrained` in one line.

    Args:
        error: the exception.

    Returns:
        What is wrong and what to do, as the rest of a sentence that begins with the name of the model.
    """
    text = str(error)
    reason = _first_lines(error)
    if "trust_remote_code" in text:
        return "has Python code of its own: read it, and pass trust_remote_code=True if you trust it"
    if "Unrecognized configuration class" in text:
        return _without_class(text)
    if "does not recognize this architecture" in text or isinstance(error, KeyError):
        return (
            f"is of an architecture that Transformers {transformers.__version__} does not know ({reason}): upgrade "
            "Transformers, or choose another model"
        )
    if _is_about_attention(text):
        return (
            f"cannot be loaded with this attn_implementation ({reason}): pass "
            "attn_implementation='sdpa', or install the package that it needs"
        )
    return f"cannot be loaded: {reason}"


def _without_class(text: str) -> str:
    config_class = text.split("'")[1].rsplit(".", 1)[-1] if "'" in text else "unknown"
    if "AutoModelForSequenceClassification" in text:
        return (
            f"is of a family ({config_class}) for which Transformers has no class for sequence classification, which a "
            "reward model needs: train the reward model from another base, such as Llama, Qwen, Gemma, Mistral or an "
            "encoder"
        )
    return (
        f"is of a family ({config_class}) that is no decoder-only language model: give a causal language model, "
        f"{GOOD_POLICIES}, or pass the loaded model if it generates text from text alone"
    )


def _is_about_attention(text: str) -> bool:
    lower = text.lower()
    return any(word in lower for word in ("flashattention", "flash attention", "attn_implementation", "`kernels`"))


def _first_lines(error: Exception) -> str:
    """The first sentence of a message, with the next line if the first only introduces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return first_line(error).split(". This could be")[0]


# ---- After loading ----


def check_policy(model: nn.Module, peft_config: PeftConfig | None = None) -> None:
    """Refuses a model that is not a decoder-only language model.

    Args:
        model: the policy, also inside PEFT.
        peft_config: configuration of a new adapter.

    Raises:
        UserError: if the model or the adapter is of another kind.
    """
    if peft_config is not None and peft_config.task_type not in (None, TaskType.CAUSAL_LM):
        # Of an encoder-decoder, whose adapter has another task too, the model is refused below.
        if not is_encoder_decoder(model):
            raise UserError(
                f"peft_config: task_type is {task_name(peft_config)}, and a policy needs task_type='CAUSAL_LM': change "
                "it."
            )
    if not all(hasattr(model, name) for name in ("config", "get_output_embeddings")):
        inner = " (pass its `pretrained_model`)" if hasattr(model, "pretrained_model") else ""
        raise UserError(
            f"model: {type(model).__name__} is not a language model of Transformers or PEFT{inner}: pass one that "
            f"AutoModelForCausalLM loads, {GOOD_POLICIES}."
        )
    bare = bare_model(model) if isinstance(model, PeftModel) else model
    name = type(bare).__name__
    if is_encoder_decoder(bare):
        raise UserError(_encoder_decoder(f"model: {name}", bare.config.model_type, "causal_lm"))
    if model.get_output_embeddings() is None:
        kind = "has no language-model head"
        if hasattr(bare, "score") or hasattr(bare, "classifier"):
            kind = "is a classifier or reward model"
        raise UserError(
            f"model: {name} {kind}, so it does not generate text: load the policy with load_base_model or "
            "AutoModelForCausalLM."
        )
    problem = _UNSUPPORTED.get(bare.config.model_type)
    if problem is not None:
        raise UserError(f"model: {name} {problem}: use another model, {GOOD_POLICIES}.")
    if not getattr(bare, "can_generate", lambda: True)() or bare.main_input_name != "input_ids":
        raise UserError(
            f"model: {name} does not generate text from text: load a causal language model, {GOOD_POLICIES}."
        )
    refuse_router_loss(bare, "model")


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model has a decoder that reads the states of an encoder, such as T5."""
    config = getattr(model, "config", None)
    return isinstance(config, PretrainedConfig) and getattr(config, "is_encoder_decoder", False)


def reads_later_tokens(model: nn.Module, ids: list[int]) -> bool:
    """Whether the hidden states of a position depend on later tokens, as in encoders and prefix language models.

    Args:
        model: a model that `captured_hidden_states` supports.
        ids: token ids of a text, of which the first 16 are used.
    """
    ids = (ids * 2)[:16]  # a text of one token is repeated, as a later token is needed
    changed = [*ids[:-1], (ids[-1] + 1) % n_rows(model)]
    states = []
    with probing(model), each_token_alone(model), captured_hidden_states(model) as captured:
        for tokens in (ids, changed):
            model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False)
            states.append(captured[-1][0, -len(ids) : -1].float())
    # Rounding differs a little where tokens are grouped by expert.
    tolerance = 1e-4 if captured[-1].dtype == torch.float32 else 0.05
    size = states[0].abs().max()
    return bool((states[0] - states[1]).abs().max() > tolerance * size)


def check_causal(model: nn.Module, ids: list[int], *, option: Literal["model", "value_model"] = "model") -> None:
    """Refuses a policy or critic that reads later tokens: its log-probabilities or values would be wrong.

    Args:
        model: the policy, or the model that the critic starts from.
        ids: token ids of a text.
        option: name of the argument that the model comes from.

    Raises:
        UserError: if the hidden states of a position depend on later tokens.
    """
    if not reads_later_tokens(model, ids):
        return
    name = type(bare_model(model)).__name__
    if option == "value_model":
        raise UserError(
            f"value_model: {name} reads later tokens, so that its values would know the rest of the completion: choose "
            "a decoder (Llama, Qwen, Gemma, …)."
        )
    raise UserError(
        f"model: {name} reads later tokens (its attention is not causal), so it cannot be trained as a policy: give a "
        f"causal language model, {GOOD_POLICIES}, or load an encoder with is_decoder=True."
    )


def check_reward_model(model: nn.Module) -> None:
    """Refuses a model that is of no family of reward models, with a reason.

    Args:
        model: the model, without wrappers.

    Raises:
        UserError: for an encoder-decoder, and for an object that is not a model of Transformers.
    """
    if not hasattr(model, "config") or not hasattr(model, "base_model_prefix"):
        raise UserError(
            f"model: {type(model).__name__} is not a model of Transformers: pass load_base_model(..., task='reward')."
        )
    name = type(model).__name__
    if is_encoder_decoder(model):
        raise UserError(_encoder_decoder(f"model: {name}", model.config.model_type, "reward"))
    if name.endswith(_OTHER_TASKS):
        raise UserError(
            f"model: {name} is a model for another task: pass load_base_model(..., task='reward'), or a model for "
            "sequence classification with num_labels=1."
        )
    problem = _UNSUPPORTED.get(model.config.model_type)
    if problem is not None:
        raise UserError(f"model: {name} {problem}: use another model, such as Llama, Qwen, BERT or DeBERTa.")
    refuse_router_loss(model, "model")


def refuse_router_loss(model: nn.Module, option: str) -> None:
    """Refuses a mixture-of-experts model whose config asks for the load-balancing loss of its routers.

    The trainers compute their losses from hidden states, so that the loss of the routers would be left out in silence.

    Args:
        model: the model that is trained, without wrappers.
        option: name of the argument that it was passed as, for the message.

    Raises:
        UserError: if `output_router_logits` is set in its config.
    """
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise UserError(
            f"{option}: output_router_logits=True in its config asks for the load-balancing loss of the routers, which "
            f"is not supported: set {option}.config.output_router_logits = False."
        )
