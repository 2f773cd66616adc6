"""Finds the recipes and their YAML files: inside an installed package, or beside the package in a checkout."""

from pathlib import Path

from ..errors import UserError

PACKAGE = Path(__file__).parents[1]


def recipes_folder() -> Path:
    """The folder of the recipes. It is found by its path, because this package must not import the recipes."""
    for folder in (PACKAGE / "recipes", PACKAGE.parent / "recipes"):
        if (folder / "quickstart.py").is_file():
            return folder
    raise UserError("the recipes are not installed with hf_rlhf_ext: install its wheel, or use a checkout")


def shipped_configs() -> dict[str, Path]:
    """The YAML files of the recipes by their name for `--config`, such as `qwen2.5-1.5b/ppo.yaml`."""
    folder = recipes_folder() / "configs"
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.glob("*/*.yaml"))}


def shipped_accelerate_configs() -> dict[str, Path]:
    """The configurations for `accelerate launch` by their name for `--accelerate_config`, such as `fsdp2`."""
    return {path.stem: path for path in sorted((recipes_folder() / "accelerate").glob("*.yaml"))}


def find_config(name: str) -> Path:
    """The file for `--config NAME`: an existing path, otherwise a shipped file.

    Other names are returned as paths, unless they look like `model/stage.yaml`. Reading them raises the error.

    Raises:
        UserError: a name like `model/stage.yaml` that is neither a path nor shipped. The line lists the shipped files.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    try:
        configs = shipped_configs()
    except UserError:  # recipes that were installed without their configs
        return path
    if name in configs:
        return configs[name]

    # `model/stage.yaml` is probably meant as a shipped file, or is a path with a typing mistake.
    looks_shipped = len(path.parts) == 2 and not name.startswith((".", "~"))
    if not looks_shipped:
        return path
    of_this_stage = [known for known in configs if known.endswith(f"/{path.name}")]
    raise UserError(
        f"--config: no file {name}: give a path, or the name of a shipped file: {', '.join(of_this_stage or configs)}"
    )
