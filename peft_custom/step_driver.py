"""Kept import path: the step driver is in `peft_custom.hooks.step_driver`."""

from .hooks.step_driver import StepDriver, unwrap_optimizer

__all__ = ["StepDriver", "unwrap_optimizer"]
