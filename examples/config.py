"""The import path of options that people know; their homes are `examples.cli` and below."""

from __future__ import annotations

from examples.cli.fields import option
from examples.errors import OptionError
from examples.methods.bim_reference import BIMLoRAConfig, get_default_config

__all__ = ["BIMLoRAConfig", "OptionError", "get_default_config", "option"]
