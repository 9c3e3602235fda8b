"""Hooks' state on disk: `hooks.safetensors` in a checkpoint's folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..state_files import read_metadata, read_tree, write_tree

NAME = "hooks.safetensors"
Read = TypeVar("Read")


def save_hooks_state(
    folder: str | os.PathLike[str], state: dict[str, Any], token: str = ""
) -> None:
    """Writes what `TrainingHooks.state_dict` returned into an existing folder, whole or not at all.

    Args:
        folder: a checkpoint's folder.
        state: what `TrainingHooks.state_dict` returned.
        token: names the checkpoint the file belongs to (`saved_token` reads it).
    """
    write_tree(Path(folder) / NAME, state, token=token)


def saved_token(folder: str | os.PathLike[str]) -> str:
    """The token given when the folder's hooks' state was written."""
    return _read(folder, read_metadata).get("token", "")


def load_hooks_state(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what `save_hooks_state` wrote."""
    return _read(folder, read_tree)


def _read(folder: str | os.PathLike[str], read: Callable[[Path], Read]) -> Read:
    path = Path(folder) / NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: this checkpoint holds no state of training hooks")
    try:
        return read(path)
    except ValueError as error:
        raise ValueError(f"{error}: no state of training hooks; use another checkpoint") from error
