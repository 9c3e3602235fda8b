"""Files without torch: finding them in a folder or on the hub, writing them whole or not at all."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

MOST_NESTED = 64  # levels of a JSON file; more than any of ours, less than Python can copy
HUB_SECONDS = 3.0  # a hub that has not answered by then is taken for absent


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or is not this model's. The message names the file."""


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
        CheckpointError: It is damaged, something else, or nested too deeply.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); restore it from its source") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold one JSON object, not a {type(values).__name__}")
    level: list[Any] = [values]
    for _ in range(MOST_NESTED):
        boxes = [item.values() if isinstance(item, dict) else item for item in level]
        level = [inner for box in boxes for inner in box if isinstance(inner, (dict, list))]
        if not level:
            return values
    raise CheckpointError(f"{path} is nested more than {MOST_NESTED} levels deep")


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
    try:
        folder = local_folder(name_or_path)
    except OSError as error:
        raise CheckpointError(str(error)) from None
    if folder is None:
        return find_on_hub(str(name_or_path), filename, revision, local_files_only)
    path = folder / filename
    return path if path.is_file() else None


def local_folder(name_or_path: str | os.PathLike[str]) -> Path | None:
    """Returns the folder that is meant, None where the name is a hub id and no folder here.

    Raises:
        NotADirectoryError: It is a file.
        FileNotFoundError: There is no such folder, and it cannot be a hub id.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{folder} is a file: give the folder that holds it")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(name_or_path)):
        raise FileNotFoundError(f"{name_or_path}: there is no such folder, and it is no hub id")
    return None


def find_on_hub(
    repo: str, filename: str, revision: str | None, local_files_only: bool
) -> Path | None:
    """`find_file` for what is known to be a hub id."""
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
    import urllib.error
    import urllib.request

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


# ---------------------------------------------------------------------- writing


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a file next to `path`, then renames it: `path` is old or new, never half.

    The file is on the disk before it takes the name, and has the mode that the umask asks for.

    Args:
        path: In a folder that exists.
        write: Called with the path of an empty file, which it fills or replaces.
    """
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
