"""The command line, and what the recipes share. Importing it loads neither torch nor TRL."""

# Before any other library: it hides what they say whenever they are imported.
from .parsing import parse_recipe, run_recipe  # isort: skip
from .output import prepare_output_dir

__all__ = ["parse_recipe", "prepare_output_dir", "run_recipe"]
