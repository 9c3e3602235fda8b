"""Checkpoint files: finding them in a folder or on the hub, reading tensors, writing atomically.

Nothing read here can run code: safetensors holds none, and `pytorch_model.bin` is read by torch's
restricted unpickler. Tensors stay mapped to their file until they are written to.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SAFE_WEIGHTS = "model.safetensors"
BIN_WEIGHTS = "pytorch_model.bin"
HUB_SECONDS = 3.0  # a hub that has not answered by then is taken for absent


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or is not this model's. The message names the file."""


# ---------------------------------------------------------------------- finding files


def find_file(
    name_or_path: str | Path,
    filename: str,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Path | None:
    """Returns the path of `filename` in a folder or hub repository, None where it has no such file.

    Args:
        name_or_path: A folder, or a hub id such as `sentence-transformers/all-MiniLM-L6-v2`.
        filename: A file name inside it.
        revision: Branch, tag or commit on the hub.
        local_files_only: Use the hub's cache on this machine only.

    Raises:
        CheckpointError: There is no such folder, and no such hub repository within reach.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        path = folder / filename
        return path if path.is_file() else None
    if folder.exists():
        raise CheckpointError(f"{folder} is a file: give the folder that holds it")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(name_or_path)):
        raise CheckpointError(f"{name_or_path}: there is no such folder, and it is no hub id")
    return _find_on_hub(str(name_or_path), filename, revision, local_files_only)


def _find_on_hub(
    repo: str, filename: str, revision: str | None, local_files_only: bool
) -> Path | None:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub import utils as hub

    if local_files_only or constants.HF_HUB_OFFLINE:
        reason = "the hub is not asked (local_files_only or HF_HUB_OFFLINE)"
        return _find_in_cache(repo, filename, revision, reason)
    if not hub_answers(constants.ENDPOINT):
        reason = f"the hub at {constants.ENDPOINT} did not answer"
        return _find_in_cache(repo, filename, revision, reason)
    try:
        return Path(hf_hub_download(repo, filename, revision=revision, etag_timeout=HUB_SECONDS))
    except hub.LocalEntryNotFoundError:  # it answered once, and then no more
        reason = f"the hub at {constants.ENDPOINT} did not answer"
        return _find_in_cache(repo, filename, revision, reason)
    except hub.EntryNotFoundError:
        return None
    except hub.RevisionNotFoundError:
        raise CheckpointError(f"{repo} has no revision {revision!r} on the hub") from None
    except hub.RepositoryNotFoundError:
        raise CheckpointError(
            f"{repo} is neither a folder here nor a repository you can read on the hub at "
            f"{constants.ENDPOINT} (a private one needs HF_TOKEN)"
        ) from None
    except (hub.HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{repo}: {filename} could not be downloaded: {error}") from None


def _find_in_cache(repo: str, filename: str, revision: str | None, reason: str) -> Path | None:
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.file_download import repo_folder_name

    path = try_to_load_from_cache(repo, filename, revision=revision)
    if isinstance(path, str):
        return Path(path)
    cached = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"))
    ref = cached / "refs" / (revision or "main")
    commit = ref.read_text().strip() if ref.is_file() else str(revision)
    if (cached / "snapshots" / commit).is_dir():
        return None  # the repository is in the cache, without this file
    where = f"{repo} (revision {revision})" if revision else repo
    raise CheckpointError(
        f"{where} is no folder here, it is not in the cache, and {reason}: "
        "give a folder that holds the model"
    )


@lru_cache(maxsize=8)
def hub_answers(endpoint: str, seconds: float = HUB_SECONDS) -> bool:
    """Whether anything answers at `endpoint` in `seconds`, look-up of its name included."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(
                urllib.request.Request(endpoint, method="HEAD"), timeout=seconds
            ).close()
            answers.append(True)
        except urllib.error.HTTPError:
            answers.append(True)  # an error page is an answer
        except urllib.error.URLError as error:
            answers.append("CERTIFICATE" in str(error))  # huggingface_hub brings its own
        except (OSError, ValueError):
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)  # a look-up of a name has no time limit
    thread.start()
    thread.join(seconds)
    return bool(answers and answers[0])


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
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
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


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a file beside `path`, then renames it: `path` is old or new, never half."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.touch()
        mode = aside.stat().st_mode  # what the umask asks for; safetensors makes files private
        write(aside)
        aside.chmod(mode)
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors as Transformers reads them (its loader wants the metadata `format: pt`)."""
    plain = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    write_atomically(path, lambda aside: save_file(plain, aside, metadata={"format": "pt"}))
