"""Checks whether a reward adapter gives the same scores on a loaded base as in training.

An ensemble uses this to share one base among its members, PPO to attach the reward adapter to the policy's base, and a
scorer to warn if it is given a base that differs.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from peft import PeftConfig, PeftModel, TaskType
from torch import nn

from ..modeling.adapter_files import adapter_weight_names, refuse_lost_modules
from ..modeling.adapter_kinds import base_sharing_problem
from ..modeling.embeddings import embedding_mismatch
from ..modeling.loading import base_and_revision
from ..modeling.quantization import (
    describe_quantization,
    quantization_differs,
    quantization_kind,
    quantization_record,
)
from .normalization import RewardNormalization, dtype_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Precision:
    """Precision of the weights of a base and of the forward pass. `None` means unknown, which matches everything.

    Attributes:
        dtype: dtype of the weights, such as `"bfloat16"`.
        quantization: `"4-bit"`, `"8-bit"`, the name of another method, or `"off"`.
        autocast: dtype of autocast, or `"off"`.
        details: the whole configuration of the quantization, see `quantization_record`.
    """

    dtype: str | None = None
    quantization: str | None = None
    autocast: str | None = None
    details: dict[str, Any] | None = None

    @classmethod
    def recorded(cls, record: RewardNormalization | None) -> Self:
        """The precision of training, as recorded; unknown without a record."""
        if record is None:
            return cls()
        quantization = quantization_kind(record.quantization)
        if record.load_in_4bit:
            quantization = "4-bit"  # earlier versions recorded nothing else
        return cls(
            dtype=None if record.base_dtype == "auto" else record.base_dtype,
            quantization=quantization,
            autocast=record.autocast or "off",
            details=record.quantization,
        )

    @classmethod
    def of_model(cls, model: nn.Module) -> Self:
        """The precision of a loaded base. Autocast is unknown, as the caller chooses it."""
        details = quantization_record(model)
        return cls(dtype=dtype_name(model), quantization=quantization_kind(details), details=details)

    def __str__(self) -> str:
        if self.quantization in (None, "off"):
            return self.dtype or "unquantized"
        return self.quantization


def precision_mismatch(trained: Precision, present: Precision) -> str | None:
    """How the present precision differs from that of training, in a few words; `None` if it does not differ."""
    if _differ(trained.quantization, present.quantization):
        return f"{trained} weights, here {present}"
    if _details_differ(trained, present):
        return f"{describe_quantization(trained.details)}, here {describe_quantization(present.details)}"
    if _differ(trained.dtype, present.dtype):
        if str(trained) == str(present):  # both are quantized, but the dtype of the other layers differs
            return f"{trained} weights with other layers in {trained.dtype}, here {present.dtype}"
        return f"{trained} weights, here {present}"
    if _differ(trained.autocast, present.autocast):
        return f"autocast {trained.autocast}, here {present.autocast}"
    return None


def _details_differ(trained: Precision, present: Precision) -> bool:
    """Whether both are quantized, and it is known that they are quantized in different ways."""
    known = trained.details is not None and present.details is not None
    return known and quantization_differs(trained.details, present.details)


def _differ(trained: str | None, present: str | None) -> bool:
    known = trained is not None and present is not None
    return known and trained != present


def base_mismatch(folder: str | Path, other: str | Path) -> str | None:
    """Why the adapters in two folders cannot share one base, in a few words; `None` if they can.

    They can if both name the same base and revision and were trained in the same precision, as far as recorded.
    """
    trained_base, trained_revision = base_and_revision(str(folder))
    other_base, other_revision = base_and_revision(str(other))
    if trained_base is None:
        return "a base that it does not name"
    if other_base is None or not same_base(trained_base, other_base) or trained_revision != other_revision:
        return f"base {_shown_base(trained_base, trained_revision)}, here {_shown_base(other_base, other_revision)}"
    config = PeftConfig.from_pretrained(str(folder))
    problem = base_sharing_problem(config, [PeftConfig.from_pretrained(str(other))])
    if problem is not None:
        return f"a base of its own: {problem}"
    return precision_mismatch(
        Precision.recorded(RewardNormalization.load(folder)), Precision.recorded(RewardNormalization.load(other))
    )


def shareable_adapter(folder: Path, policy: nn.Module, *, name: str | Path | None = None) -> RewardNormalization | None:
    """Checks whether a reward adapter can share the base of a loaded policy.

    It cannot if the folder is not a reward adapter, if the policy is not a `PeftModel`, or if base, PEFT type,
    precision or embeddings differ. If only the precision or the embeddings differ, a warning is logged, as loading the
    policy like this would save the memory of a second base.

    Args:
        folder: local folder of the reward model.
        policy: model whose base is to be shared.
        name: name of the reward model in the warning; `None` means `folder`.

    Returns:
        The normalization of the reward model, or defaults if it has no `reward_normalization.json`; `None` if it cannot
        share the base.

    Raises:
        UserError: if it could share the base, but the file of its weights is damaged or lacks the score head.
    """
    if not isinstance(policy, PeftModel) or not (folder / "adapter_config.json").is_file():
        return None
    config = PeftConfig.from_pretrained(str(folder))
    base = policy.get_base_model()
    if config.task_type == TaskType.CAUSAL_LM:
        return None
    if not same_base(config.base_model_name_or_path, base.config.name_or_path):
        return None
    if config.peft_type != policy.active_peft_config.peft_type:
        return None  # PEFT holds adapters of one type only
    problem = base_sharing_problem(config, policy.peft_config.values())
    if problem is not None:
        logger.warning(
            "%s cannot share the policy's base, as %s: it is loaded on a separate base.", name or folder, problem
        )
        return None
    refuse_lost_modules(folder, config, adapter_weight_names(folder))

    normalization = RewardNormalization.load(folder) or RewardNormalization()
    # Not compared: the revision, which a loaded base does not record, and autocast, which the scorer sets itself.
    trained = Precision.recorded(normalization)
    present = Precision.of_model(base)
    if present.quantization != "off":
        # The dtype of the few layers that are not quantized does not justify a second base.
        present = replace(present, dtype=None)
    if precision_mismatch(trained, present) is not None:
        logger.warning(
            "%s was trained on %s weights, but the policy has %s: it is loaded on a separate base.",
            name or folder,
            *_shown_precisions(trained, present),
        )
        return None
    mismatch = embedding_mismatch(folder, policy)
    if mismatch is not None:
        logger.warning(
            "%s does not fit the embeddings of the policy's base, as %s: it is loaded on a separate base.",
            name or folder,
            mismatch,
        )
        return None
    return normalization


def _shown_precisions(trained: Precision, present: Precision) -> tuple[str, str]:
    """Both in as few words as tell them apart."""
    if str(trained) == str(present) and _details_differ(trained, present):
        return describe_quantization(trained.details), describe_quantization(present.details)
    return str(trained), str(present)


def same_base(first: str | None, second: str | None) -> bool:
    """Whether two names of base models mean the same model: equal names, or two paths of the same folder."""
    if first is None or second is None:
        return False
    if first == second:
        return True
    # A relative and an absolute path, or a link.
    paths = [Path(first).expanduser(), Path(second).expanduser()]
    if not all(path.is_dir() for path in paths):
        return False
    return paths[0].resolve() == paths[1].resolve()


def _shown_base(name: str | None, revision: str | None) -> str:
    if revision is None:
        return str(name)
    return f"{name} at {revision}"
