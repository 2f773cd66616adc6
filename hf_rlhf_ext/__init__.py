"""RLHF on one consumer GPU, as a thin extension of TRL: reward models, PPO with a critic, data readers and the Hub.

Train a reward model:

- `load_comparisons` reads preference data in the public formats into comparison rows, and `load_demonstrations` reads
  data for SFT; `register_format` adds a format of your own. `quality_report` checks the labels before training.
- `BradleyTerryTrainer`, with its options `BradleyTerryConfig`, trains a reward model on pairs and K-wise comparisons.
  `DataCollatorForComparisons` builds its batches.
- `RewardScorer` loads a trained reward model as a reward function for PPO or for TRL's trainers. `RewardEnsemble` does
  the same for several reward models. `export_merged` writes a reward model that plain Transformers can load.

Train a policy:

- `load_policy` loads the policy and its tokenizer; `load_base_model` and `load_tokenizer` load them separately.
- `PPOTrainer`, with its options `PPOConfig`, trains the policy with PPO and a KL penalty.
- `AdapterStack` holds policy, reference, critic and reward model as adapters on one base model.
- `plan_memory` says how much memory a run needs, before anything is loaded.

Share the result:

- `write_card` writes a model card with the measured results, `push_run` pushes a run to the Hub, and `push_comparisons`
  pushes a dataset of comparisons.

A mistake in an option, a file or a row raises `UserError`: one line with what is wrong and how to fix it.

Names are imported on first use: `import hf_rlhf_ext` itself loads neither torch nor TRL.
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
    from .modeling.memory.planner import plan_memory
    from .modeling.stack import AdapterStack
    from .ppo.config import PPOConfig
    from .ppo.trainer import PPOTrainer
    from .quality.report import quality_report
    from .readers.formats import load_comparisons, load_demonstrations
    from .readers.registry import register_format
    from .reward.config import BradleyTerryConfig
    from .reward.ensemble import RewardEnsemble
    from .reward.export import export_merged
    from .reward.scorer import RewardScorer
    from .reward.trainer import BradleyTerryTrainer
    from .study.best_of_n import best_of_n

_HOMES = {
    "AdapterStack": "modeling.stack",
    "BradleyTerryConfig": "reward.config",
    "BradleyTerryTrainer": "reward.trainer",
    "DataCollatorForComparisons": "data.collators",
    "PPOConfig": "ppo.config",
    "PPOTrainer": "ppo.trainer",
    "RewardEnsemble": "reward.ensemble",
    "RewardScorer": "reward.scorer",
    "best_of_n": "study.best_of_n",
    "export_merged": "reward.export",
    "load_base_model": "modeling.loading",
    "load_comparisons": "readers.formats",
    "load_demonstrations": "readers.formats",
    "load_policy": "modeling.loading",
    "load_tokenizer": "modeling.loading",
    "plan_memory": "modeling.memory.planner",
    "push_comparisons": "hub.dataset",
    "push_run": "hub.push",
    "quality_report": "quality.report",
    "register_format": "readers.registry",
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
    "best_of_n",
    "export_merged",
    "load_base_model",
    "load_comparisons",
    "load_demonstrations",
    "load_policy",
    "load_tokenizer",
    "plan_memory",
    "push_comparisons",
    "push_run",
    "quality_report",
    "register_format",
    "write_card",
]

require_supported_trl()


def _hub_publisher() -> Publisher:
    """A publisher for one trainer. The Hub's code is imported only when the first trainer is built."""
    from .hub.publisher import HubPublisher

    return HubPublisher()


set_publisher(_hub_publisher)

try:
    __version__ = version("hf-rlhf-ext")
except PackageNotFoundError:  # a checkout on sys.path that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value  # later accesses no longer call this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
