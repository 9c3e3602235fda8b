"""Arrays kept on disk between runs, under a hash of everything that they depend on.

A file that was truncated or altered fails its checksum, is reported and written again. A full disk
costs the cache, never the run.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from transformers_patched.files import write_atomically

try:
    import fcntl
except ImportError:  # Windows: runs that start together each encode
    fcntl = None  # type: ignore[assignment]

Arrays = dict[str, np.ndarray]


def default_cache_dir() -> Path:
    """`$RANKWISE_CACHE`, else `~/.cache/rankwise`."""
    return Path(os.environ.get("RANKWISE_CACHE") or Path.home() / ".cache" / "rankwise")


def cached(
    make: Callable[[], Arrays],
    names: Sequence[str],
    key: str,
    cache_dir: str | os.PathLike[str] | None,
) -> Arrays:
    """The arrays that `make` makes, or those that it made before.

    Args:
        make: gives the arrays.
        names: of them.
        key: everything that they depend on.
        cache_dir: where they are kept; None: `default_cache_dir()`.
    """
    path = cache_file("encoded", key, cache_dir)
    arrays = load(path, names)
    if arrays is None:
        seen = _stamp(path)
        with _alone(path):
            if _stamp(path) != seen:  # another run has made them meanwhile
                arrays = load(path, names)
            if arrays is None:
                arrays = make()
                store(path, arrays, "the encoded data")
    return arrays


def _stamp(path: Path) -> tuple[int, int] | None:
    """Changes whenever the file is replaced; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Runs that start together make a file once: the others wait for the first.

    Where the file system has no locks each makes its own, and the last one stays.
    """
    lock = path.with_suffix(".lock")
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = held.enter_context(open(lock, "wb"))
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            # whoever waits for a lock that has lost its name finds the file made
            held.callback(lock.unlink, missing_ok=True)
        yield


def cache_file(kind: str, key: str, cache_dir: str | os.PathLike[str] | None) -> Path:
    """Where the arrays of a kind that depend on `key` are kept."""
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    return folder / kind / f"{hash_of(key.encode())}.safetensors"


def hash_of(*parts: bytes) -> str:
    """40 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:40]


def text_key(columns: Sequence[list[str]]) -> str:
    """A hash of columns of texts."""
    parts = [str(len(columns)).encode()]
    for column in columns:
        # Lengths first: the same characters split otherwise are other rows.
        parts.append(np.fromiter(map(len, column), np.int64, len(column)).tobytes())
        parts.append("".join(column).encode())
    return hash_of(*parts)


def _checksum(arrays: Mapping[str, np.ndarray], names: Sequence[str]) -> str:
    """CRC-32 of all arrays, eight hexadecimal digits."""
    total = 0
    for name in names:
        total = zlib.crc32(np.ascontiguousarray(arrays[name]).tobytes(), total)
    return f"{total:08x}"


def load(path: Path, names: Sequence[str]) -> Arrays | None:
    """The cached arrays; None where there are none, or, with a warning, where they are damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in names}
            known = (file.metadata() or {}).get("crc32")
        if known != _checksum(arrays, names):
            raise ValueError("the checksum does not match")
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        warnings.warn(
            f"{path}: this cache file is damaged ({error}); it is made anew", stacklevel=4
        )
        return None
    return arrays


def store(path: Path, arrays: Arrays, what: str) -> None:
    """Keeps the arrays, whole or not at all; warns where that cannot be done.

    Args:
        path: the file.
        arrays: by name.
        what: they are, for the warning.
    """
    data = save(arrays, metadata={"crc32": _checksum(arrays, list(arrays))})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda aside: aside.write_bytes(data))
    except OSError as error:
        warnings.warn(
            f"{path.parent}: cannot keep {what} ({error.strerror or error}); "
            "it will be made again next time, or set RANKWISE_CACHE to another folder",
            stacklevel=4,
        )
