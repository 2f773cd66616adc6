"""The model that a critic of kind `model` starts from: how it is loaded, and whether it fits the policy."""

from collections.abc import Iterable
from pathlib import Path

from peft import PeftConfig, PeftModel, TaskType
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from ..modeling.adapters import bare_model
from ..modeling.embeddings import n_rows
from ..modeling.families import check_causal, is_encoder_decoder
from ..modeling.loading import (
    base_and_revision,
    found_or_refused,
    load_base_model,
    load_policy,
    load_tokenizer,
)
from ..modeling.locations import resolve_location
from ..modeling.merging import merge_into_base
from ..modeling.ownership import independent_copy
from ..modeling.vocabulary import other_vocabulary
from ..reward.normalization import NORMALIZATION_FILE
from ..reward.scorer import load_reward_weights, local_folder

_PROBE_IDS = list(range(1, 17))
"""Token ids with which the check for later tokens is made. Every vocabulary has them."""

_INSTEAD_OF_MERGING = "use a reward model that was trained with LoRA"


def load_value_model(name: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Loads the model that `critic="model"` starts from, in fp32, with its adapter merged into it if it is one.

    Args:
        name: folder or Hub id of a causal LM, of a reward model, or of an adapter of one of them.
        trust_remote_code: whether to run Python code from the repository, as in Transformers.

    Returns:
        The model. As it starts, a reward model gives its raw scores.

    Raises:
        UserError: if it cannot be loaded, or if its adapter cannot be merged.
    """
    options = {"dtype": "float32", "trust_remote_code": trust_remote_code}
    base_id, _ = base_and_revision(name)
    if base_id is not None:
        if PeftConfig.from_pretrained(name).task_type == TaskType.CAUSAL_LM:
            model, _ = load_policy(name, **options)
        else:
            model = load_reward_weights(local_folder(name, None, code=trust_remote_code), **options)
        return merge_into_base(model, "value_model", _INSTEAD_OF_MERGING)
    if _is_reward_model(name, trust_remote_code):
        return load_reward_weights(local_folder(name, None, code=trust_remote_code), **options)
    return load_base_model(name, **options)


def _is_reward_model(name: str, trust_remote_code: bool) -> bool:
    """Whether a whole model is a sequence classifier, by its own record or by its configuration."""
    if (Path(name).expanduser() / NORMALIZATION_FILE).is_file():
        return True
    path, location = resolve_location(name, None)
    with found_or_refused("value_model", name):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **location)
    return any(architecture.endswith("ForSequenceClassification") for architecture in config.architectures or ())


def prepare_value_model(
    value_model: str | Path | PreTrainedModel | PeftModel,
    policy: nn.Module,
    *,
    reward_models: Iterable[nn.Module] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Loads the value model if it is given by name, and checks that it can be a critic of the policy.

    Args:
        value_model: the argument of `PPOTrainer`.
        policy: the policy.
        reward_models: models of the reward functions. A critic that starts from one of them gets a copy.
        tokenizer: tokenizer of the policy; `None` if it is not known.
        trust_remote_code: whether to run Python code from the repository, as in Transformers.

    Raises:
        UserError: if the model has another vocabulary, reads later tokens, or is no decoder.
    """
    own_tokenizer = None
    if isinstance(value_model, Path):
        value_model = str(value_model)
    if isinstance(value_model, str):
        own_tokenizer = _tokenizer_of(value_model, trust_remote_code)
        value_model = load_value_model(value_model, trust_remote_code=trust_remote_code)
    elif bare_model(value_model) is bare_model(policy):
        raise UserError("value_model: is the policy itself, which critic and policy would both train: leave it out.")
    elif getattr(value_model, "is_quantized", False) or getattr(bare_model(value_model), "is_quantized", False):
        raise UserError("value_model: training of a quantized value model is not supported: load it in fp32.")
    elif isinstance(value_model, PeftModel):
        # Merging would change the model of the user.
        value_model = merge_into_base(independent_copy(value_model), "value_model", _INSTEAD_OF_MERGING)
    elif any(value_model is model for model in reward_models):
        value_model = independent_copy(value_model)  # otherwise training the critic would change the rewards

    if is_encoder_decoder(value_model):
        raise UserError(
            f"value_model: {type(value_model).__name__} is an encoder-decoder: choose a decoder of the policy's "
            "vocabulary, such as its reward model."
        )
    if tokenizer is not None:
        _check_vocabulary(value_model, policy, tokenizer, own_tokenizer)
    check_causal(value_model, _PROBE_IDS, option="value_model")
    return value_model


def _tokenizer_of(name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a value model, or of its base; `None` if there is none."""
    base_id, _ = base_and_revision(name)
    for source in (name, base_id):
        if source is None:
            continue
        try:
            return load_tokenizer(source, trust_remote_code=trust_remote_code)
        except (UserError, OSError, ValueError):  # a folder with weights only
            continue
    return None


def _check_vocabulary(
    value_model: PreTrainedModel,
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    own_tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    # The last tokens of a tokenizer may have no row in the policy either, which then never reads or emits them.
    tokens = min(max(tokenizer.get_vocab().values()) + 1, n_rows(policy))
    rows = n_rows(value_model)
    if rows < tokens:
        raise UserError(
            f"value_model: has rows for {rows} tokens, but the policy's tokenizer has {tokens}: choose a model of the "
            "policy's vocabulary, or call resize_token_embeddings on it."
        )
    if own_tokenizer is None:
        return
    difference = other_vocabulary(tokenizer, own_tokenizer)
    if difference is not None:
        raise UserError(
            f"value_model: its vocabulary is not that of the policy ({difference}): choose a model with the same "
            "tokenizer, such as a reward model of the same base."
        )
