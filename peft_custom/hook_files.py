"""Hooks' state on disk: `hooks.safetensors` for the tensors, `hooks.json` for the rest."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

TENSORS = "hooks.safetensors"
VALUES = "hooks.json"
REFERENCE = "$tensor"  # {"$tensor": name} stands in the JSON file where the tensor was


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` with every tensor replaced by a reference and moved into `tensors`."""
    if isinstance(value, Tensor):
        while path in tensors:  # "a.b" may be one key or two
            path += "'"
        tensors[path] = value.detach().cpu().contiguous().clone()  # storage of its own: no aliases
        return {REFERENCE: path}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(
                    f"hooks' state: {path or 'top level'} has the key {key!r}; keys of "
                    "a saved dictionary are strings"
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
        f"hooks' state: {path} is a {type(value).__name__}; tensors, numbers, strings, "
        "lists and dictionaries of those can be saved"
    )


def _join(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {REFERENCE}:
            return tensors[value[REFERENCE]]
        return {key: _join(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_join(item, tensors) for item in value]
    return value


def save_hooks_state(folder: str | os.PathLike[str], state: dict[str, Any], **extra: Any) -> None:
    """Writes a hooks' `state_dict()` into an existing folder; each file aside first, then renamed.

    Args:
        folder: a checkpoint's folder.
        state: what `TrainingHooks.state_dict` returned.
        extra: JSON values to keep beside it, which `load_hooks_state` ignores.
    """
    tensors: dict[str, Tensor] = {}
    values = _split(state, "", tensors)
    stamp = os.urandom(8).hex()  # ties the two files together
    folder = Path(folder)
    aside = {name: folder / f".{name}.{os.getpid()}" for name in (TENSORS, VALUES)}
    save_file(tensors, aside[TENSORS], metadata={"stamp": stamp})
    document = {**extra, "stamp": stamp, "state": values}
    aside[VALUES].write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    for name, path in aside.items():
        os.replace(path, folder / name)


def read_values(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of `hooks.json`, tensors left as references."""
    path = Path(folder) / VALUES
    if not path.is_file():
        raise FileNotFoundError(f"{path}: this checkpoint holds no state of training hooks")
    try:
        document = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(document, dict) or not {"stamp", "state"} <= set(document):
        raise ValueError(f"{path}: not a state of training hooks ('stamp' or 'state' is missing)")
    return document


def load_hooks_state(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what `save_hooks_state` wrote."""
    document = read_values(folder)
    path = Path(folder) / TENSORS
    try:
        with safe_open(path, "pt") as file:
            stamp = (file.metadata() or {}).get("stamp")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    if stamp != document["stamp"]:
        raise ValueError(
            f"{path} and {VALUES} beside it come from different saves; use another checkpoint"
        )
    return _join(document["state"], tensors)
