"""A gold reward of the user's own: `CheckedGold`, which the studies use too."""

from hf_rlhf_ext.collect.gold import CheckedGold

__all__ = ["CheckedGold"]
