"""Hooks' state on disk: `hooks.safetensors`, with what is no tensor as JSON in its metadata."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

NAME = "hooks.safetensors"
REFERENCE = "$tensor"  # {"$tensor": name} stands in the JSON where the tensor was
FILLER = {"": torch.zeros(0)}  # older safetensors refuse a file without a tensor


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` with every tensor replaced by a reference and moved into `tensors`."""
    if isinstance(value, Tensor):
        while path in tensors:  # "a.b" may be one key or two
            path += "'"
        tensors[path] = value.detach().cpu().contiguous().clone()  # a storage of its own
        return {REFERENCE: path}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(
                    f"hooks' state: {path or 'top level'} has the key {key!r}; keys of a saved "
                    "dictionary are strings"
                )
        return {
            key: _split(item, f"{path}.{key}" if path else key, tensors)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_split(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"hooks' state: {path} is a {type(value).__name__}; tensors, numbers, strings, lists and "
        "dictionaries of those can be saved"
    )


def _join(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {REFERENCE}:
            return tensors[value[REFERENCE]]
        return {key: _join(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_join(item, tensors) for item in value]
    return value


def save_hooks_state(
    folder: str | os.PathLike[str], state: dict[str, Any], token: str = ""
) -> None:
    """Writes a hooks' `state_dict()` into an existing folder, aside first and then renamed.

    Args:
        folder: a checkpoint's folder.
        state: what `TrainingHooks.state_dict` returned.
        token: names the checkpoint the file belongs to (`saved_token` reads it).
    """
    tensors: dict[str, Tensor] = {}
    values = json.dumps(_split(state, "", tensors))
    aside = Path(folder) / f".{NAME}.{os.getpid()}"
    save_file(tensors or FILLER, aside, metadata={"state": values, "token": token})
    os.replace(aside, Path(folder) / NAME)


def _open(folder: str | os.PathLike[str], read_tensors: bool) -> tuple[dict[str, str], Any]:
    """(metadata, state); the state is None unless the tensors are read."""
    path = Path(folder) / NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: this checkpoint holds no state of training hooks")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if not read_tensors:
                return metadata, None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return metadata, _join(json.loads(metadata["state"]), tensors)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path}: damaged, or no state of training hooks ({error}); use another checkpoint"
        ) from error


def saved_token(folder: str | os.PathLike[str]) -> str:
    """The token given when the folder's hooks' state was written."""
    return _open(folder, read_tensors=False)[0].get("token", "")


def load_hooks_state(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what `save_hooks_state` wrote."""
    return _open(folder, read_tensors=True)[1]
