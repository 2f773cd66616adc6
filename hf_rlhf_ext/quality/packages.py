"""Imports the packages that only checks of data need."""

from importlib import import_module
from types import ModuleType

from ..errors import UserError


def data_package(module: str) -> ModuleType:
    """Imports a package. Raises `UserError` with the command that installs it if it is missing."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed, and checks of data need it: pip install 'hf-rlhf-ext[data]'"
        ) from error
