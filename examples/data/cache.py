"""Arrays that cost time to make, kept on disk for the next run under a hash of their content.

A file that was truncated or altered fails its checksum, is reported and written again. A full disk
costs the cache, never the run.
"""

from __future__ import annotations

import hashlib
import os
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from transformers_patched.files import write_atomically


def default_cache_dir() -> Path:
    """`$RANKWISE_CACHE`, else `~/.cache/rankwise`."""
    return Path(os.environ.get("RANKWISE_CACHE") or Path.home() / ".cache" / "rankwise")


def hash_of(*parts: bytes) -> str:
    """SHA-256 of all parts, 40 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:40]


def load_arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray] | None:
    """The cached arrays; None where there are none, or, with a warning, where they are damaged.

    Args:
        path: the file.
        names: of the arrays that it must hold.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in names}
            known = (file.metadata() or {}).get("crc32")
        if known != _checksum(arrays):
            raise ValueError("the checksum does not match")
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        warnings.warn(
            f"{path}: this cache file is damaged ({error}); it is made anew", stacklevel=3
        )
        return None
    return arrays


def store_arrays(path: Path, arrays: Mapping[str, np.ndarray], what: str) -> None:
    """Keeps the arrays, whole or not at all; warns where that cannot be done.

    Args:
        path: the file.
        arrays: by name.
        what: they are, for the warning.
    """
    data = save(dict(arrays), metadata={"crc32": _checksum(arrays)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda aside: aside.write_bytes(data))
    except OSError as error:
        warnings.warn(
            f"{path.parent}: cannot keep {what} ({error.strerror or error}); "
            "it will be made again next time, or set RANKWISE_CACHE to another folder",
            stacklevel=3,
        )


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """CRC-32 of all arrays in their order, eight hexadecimal digits."""
    total = 0
    for array in arrays.values():
        total = zlib.crc32(np.ascontiguousarray(array).tobytes(), total)
    return f"{total:08x}"
