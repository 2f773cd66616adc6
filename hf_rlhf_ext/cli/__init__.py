"""The command line, and what the recipes share. Importing it loads neither torch nor TRL."""

# First, because it hides messages of other libraries that appear when they are imported.
from .parsing import parse_recipe, run_recipe  # isort: skip
from .output import prepare_output_dir

__all__ = ["parse_recipe", "prepare_output_dir", "run_recipe"]
