"""Where the recipes and their YAML files are: in an installed package inside it, in a checkout beside it."""

from pathlib import Path

from ..errors import UserError

PACKAGE = Path(__file__).parents[1]


def recipes_folder() -> Path:
    """The folder of the recipes.

    Found by its path: this ring is below the recipes and imports none of them.
    """
    for folder in (PACKAGE / "recipes", PACKAGE.parent / "recipes"):
        if (folder / "quickstart.py").is_file():
            return folder
    raise UserError("the recipes are not installed with hf_rlhf_ext: install its wheel, or use a checkout.")


def shipped_configs() -> dict[str, Path]:
    """The YAML files that come with the recipes, by the name that `--config` takes: `qwen2.5-1.5b/ppo.yaml`."""
    folder = recipes_folder() / "configs"
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.glob("*/*.yaml"))}


def find_config(name: str) -> Path:
    """The file that `--config NAME` means: a path that exists, else a shipped one.

    A name that is neither is returned as a path where it can only be one; reading it then says what is wrong.

    Raises:
        UserError: a name like `model/stage.yaml` that is not shipped; the line lists those that are.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    try:
        configs = shipped_configs()
    except UserError:  # a recipe that was installed without its configs
        return path
    if name in configs:
        return configs[name]

    # `model/stage.yaml`: whoever types that means a shipped file, or a path that has a typing mistake.
    looks_shipped = len(path.parts) == 2 and not name.startswith((".", "~"))
    if not looks_shipped:
        return path
    of_this_stage = [known for known in configs if known.endswith(f"/{path.name}")]
    raise UserError(
        f"--config: no file {name}, and none of that name is shipped; shipped are "
        f"{', '.join(of_this_stage or configs)}."
    )
