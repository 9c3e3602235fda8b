"""Checkpoint files: reading and writing tensors; `files` finds them and writes whole files.

Nothing read here can run code: safetensors holds none, and `pytorch_model.bin` is read by torch's
restricted unpickler. Tensors stay mapped to their file until they are written to.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import CheckpointError, find_file, hub_answers, read_json, write_atomically

__all__ = [
    "CheckpointError",
    "find_file",
    "hub_answers",
    "read_bin",
    "read_safetensors",
    "read_weights",
    "write_atomically",
    "write_safetensors",
]

SAFE_WEIGHTS = "model.safetensors"
BIN_WEIGHTS = "pytorch_model.bin"
# ---------------------------------------------------------------------- reading


def read_weights(
    name_or_path: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> tuple[dict[str, Tensor], dict[str, Path]]:
    """Reads the weights of a folder or hub id, safetensors before `.bin`, sharded or not.

    Returns:
        The tensors by key, on the CPU, and the file that each came from.
    """

    def find(filename: str) -> Path | None:
        return find_file(
            name_or_path, filename, revision=revision, local_files_only=local_files_only
        )

    for filename, read in ((SAFE_WEIGHTS, read_safetensors), (BIN_WEIGHTS, read_bin)):
        if path := find(filename):
            tensors = read(path)
            return tensors, dict.fromkeys(tensors, path)
        if index := find(f"{filename}.index.json"):
            return _read_shards(index, find, read, Path(filename).suffix)
    raise CheckpointError(
        f"{name_or_path} has no weights: expected {SAFE_WEIGHTS} or {BIN_WEIGHTS}, "
        "or one of them in shards with its .index.json"
    )


def _read_shards(
    index: Path,
    find: Callable[[str], Path | None],
    read: Callable[[Path], dict[str, Tensor]],
    suffix: str,
) -> tuple[dict[str, Tensor], dict[str, Path]]:
    try:
        weight_map = read_json(index)["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (CheckpointError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index} is no index of shards: it needs a 'weight_map'") from None
    tensors: dict[str, Tensor] = {}
    files: dict[str, Path] = {}
    for shard in shards:
        if not re.fullmatch(r"[\w.-]+", str(shard)) or not str(shard).endswith(suffix):
            raise CheckpointError(
                f"{index} names the shard {shard!r}: shards are {suffix} files beside their index"
            )
        path = find(shard)
        if path is None:
            raise CheckpointError(f"{index} names the shard {shard}, which is missing beside it")
        part = read(path)
        absent = [k for k, name in weight_map.items() if name == shard and k not in part]
        if absent:
            raise CheckpointError(f"{path} lacks {_some(absent)}, which {index.name} says it holds")
        tensors.update(part)
        files.update(dict.fromkeys(part, path))
    return tensors, files


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Reads one safetensors file; CheckpointError where it is truncated or something else."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(_damaged(path, "safetensors", error)) from None


def read_bin(path: Path) -> dict[str, Tensor]:
    """Reads one `.bin` of plain tensors; anything else in it is refused, unexecuted."""
    try:
        state = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError:
        if _is_pointer(path):
            raise CheckpointError(_damaged(path, "weights", None)) from None
        raise CheckpointError(
            f"{path} is damaged or holds more than tensors; loading such objects could run code, "
            "so it is refused. Save its state dict as safetensors where it is trusted, or load that"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(_damaged(path, "weights", error)) from None
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} must hold a state dict, not a {type(state).__name__}")
    others = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(f"{path} must hold a state dict; no tensors are {_some(others)}")
    return dict(state)


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(24).startswith(b"version https://git-lfs")


def _damaged(path: Path, kind: str, error: Exception | None) -> str:
    size = path.stat().st_size
    if _is_pointer(path):
        return f"{path} is a Git LFS pointer, not the {kind} file itself: run `git lfs pull` there"
    first_line = str(error).split("\n")[0]
    return (
        f"{path} ({size:,} bytes) is truncated or no {kind} file ({first_line}): "
        "download or copy it again"
    )


def _some(keys: list[str], most: int = 5) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


# ---------------------------------------------------------------------- writing


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors as Transformers reads them (its loader wants the metadata `format: pt`)."""
    plain = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    write_atomically(path, lambda aside: save_file(plain, aside, metadata={"format": "pt"}))
