"""Kept import path: `TunerCallback` is in `peft_custom.hf_trainer`."""

from __future__ import annotations

from typing import Any

from . import hf_trainer


def __getattr__(name: str) -> Any:
    return getattr(hf_trainer, name)
