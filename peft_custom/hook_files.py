"""Kept import path: the hooks' state on disk is in `peft_custom.hooks.state`."""

from .hooks.state import load_hooks_state, save_hooks_state, saved_token

__all__ = ["load_hooks_state", "save_hooks_state", "saved_token"]
