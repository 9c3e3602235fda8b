"""A tree of tensors and plain values as one safetensors file: resume state without a pickle.

The tensors are the file's; the tree, with a reference where a tensor was, is JSON in its metadata.
Trees are dictionaries (with keys of any plain kind), lists, tuples, numbers, strings and None.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import written_aside

Plain: TypeAlias = "bool | int | float | str | None"
Tree: TypeAlias = "Plain | Tensor | Sequence[Tree] | Mapping[Any, Tree]"

FILLER = {"": torch.zeros(0)}  # older safetensors refuse a file without a tensor


def write_tree(path: Path, tree: Tree, **metadata: str) -> None:
    """Writes a tree whole or not at all; `metadata` can be read without the tensors.

    Raises:
        TypeError: something in the tree is no tensor and no plain value; its place is named.
    """
    tensors: dict[str, Tensor] = {}
    values = json.dumps(_pack(tree, "", tensors))
    with written_aside(path) as aside:
        save_file(tensors or FILLER, aside, metadata={"tree": values, **metadata})


def read_metadata(path: Path) -> dict[str, str]:
    """Reads the `metadata` that `write_tree` was given.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged or something else ({error})") from error


def read_tree(path: Path) -> Any:
    """Reads what `write_tree` wrote.

    Raises:
        ValueError: the file is missing, damaged, or holds no tree.
    """
    try:
        with safe_open(path, "pt") as file:
            values = json.loads((file.metadata() or {})["tree"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _unpack(values, tensors)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged or something else ({error})") from error


def _pack(value: Tree, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for a tree; tensors become references, tuples and other keys than text are marked."""
    if isinstance(value, Tensor):
        while path in tensors:  # "a.b" may be one key or two
            path += "'"
        tensors[path] = value.detach().cpu().contiguous().clone()  # a storage of its own
        return {"$tensor": path}
    inner = f"{path}." if path else ""
    if isinstance(value, dict):
        items = [[key, _pack(item, f"{inner}{key}", tensors)] for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return dict(items)
        return {"$items": items}
    if isinstance(value, (list, tuple)):
        packed = [_pack(item, f"{inner}{i}", tensors) for i, item in enumerate(value)]
        return packed if isinstance(value, list) else {"$tuple": packed}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"{path or 'the state'} is a {type(value).__name__}; a saved state holds tensors, numbers, "
        "strings, lists and dictionaries of those"
    )


def _unpack(value: object, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$tuple" in value:
        return tuple(_unpack(item, tensors) for item in value["$tuple"])
    if "$items" in value:
        return {key: _unpack(item, tensors) for key, item in value["$items"]}
    return {key: _unpack(item, tensors) for key, item in value.items()}
