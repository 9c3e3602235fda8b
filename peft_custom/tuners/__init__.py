"""Tuners: one folder per method. All are imported, so that their types are registered."""

import importlib
import pkgutil
from types import ModuleType


def load_all() -> list[ModuleType]:
    """Imports every method's package and returns them."""
    return [
        importlib.import_module(f"{__name__}.{found.name}")
        for found in pkgutil.iter_modules(__path__)
        if found.ispkg
    ]
