"""The import path of options that people know; their home is `examples.cli`."""

from __future__ import annotations

from typing import Any

from examples.cli.fields import OptionError, option

__all__ = ["OptionError", "option"]


def __getattr__(name: str) -> Any:
    """`get_default_config` and `BIMLoRAConfig`, where users of the original look for them."""
    if name in ("get_default_config", "BIMLoRAConfig"):
        from examples.methods import bim_lora

        return getattr(bim_lora, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
