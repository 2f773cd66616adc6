"""RLHF on one consumer GPU, as a thin extension of TRL.

The public names below are imported on first use: `import hf_rlhf_ext` itself loads neither torch nor TRL.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .compat import require_supported_trl
from .errors import UserError
from .publishing import Publisher, set_publisher

if TYPE_CHECKING:
    from .data.collators import DataCollatorForComparisons
    from .hub.card import write_card
    from .hub.dataset import push_comparisons
    from .hub.push import push_run
    from .modeling.loading import load_base_model, load_policy, load_tokenizer
    from .modeling.stack import AdapterStack
    from .ppo.config import PPOConfig
    from .ppo.trainer import PPOTrainer
    from .quality.report import quality_report
    from .readers.formats import load_comparisons, load_demonstrations
    from .reward.config import BradleyTerryConfig
    from .reward.ensemble import RewardEnsemble
    from .reward.export import export_merged
    from .reward.scorer import RewardScorer
    from .reward.trainer import BradleyTerryTrainer

_HOMES = {
    "AdapterStack": "modeling.stack",
    "BradleyTerryConfig": "reward.config",
    "BradleyTerryTrainer": "reward.trainer",
    "DataCollatorForComparisons": "data.collators",
    "PPOConfig": "ppo.config",
    "PPOTrainer": "ppo.trainer",
    "RewardEnsemble": "reward.ensemble",
    "RewardScorer": "reward.scorer",
    "export_merged": "reward.export",
    "load_base_model": "modeling.loading",
    "load_comparisons": "readers.formats",
    "load_demonstrations": "readers.formats",
    "load_policy": "modeling.loading",
    "load_tokenizer": "modeling.loading",
    "push_comparisons": "hub.dataset",
    "push_run": "hub.push",
    "quality_report": "quality.report",
    "write_card": "hub.card",
}

__all__ = [
    "AdapterStack",
    "BradleyTerryConfig",
    "BradleyTerryTrainer",
    "DataCollatorForComparisons",
    "PPOConfig",
    "PPOTrainer",
    "RewardEnsemble",
    "RewardScorer",
    "UserError",
    "export_merged",
    "load_base_model",
    "load_comparisons",
    "load_demonstrations",
    "load_policy",
    "load_tokenizer",
    "push_comparisons",
    "push_run",
    "quality_report",
    "write_card",
]

require_supported_trl()


def _hub_publisher() -> Publisher:
    """The trainers' way to the Hub; imported when the first trainer is built, as the trainers know nothing of it."""
    from .hub.publisher import HubPublisher

    return HubPublisher()


set_publisher(_hub_publisher)

try:
    __version__ = version("hf-rlhf-ext")
except PackageNotFoundError:  # a checkout that was put on sys.path without being installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value  # so that this function is asked once per name
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
