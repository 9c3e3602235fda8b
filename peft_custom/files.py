"""Files: written whole or not at all, found in a local folder or on the hub."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST_NESTED = 64  # levels of a JSON file; more than any of ours, less than Python can copy


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`; what is written there replaces `path` on success.

    A reader, or a run that is killed, finds the old file or the new one, never a part.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
        ValueError: it is damaged, something else, or nested too deeply; the file is named.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: one JSON object is needed, not a {type(values).__name__}")
    level: list[Any] = [values]
    for _ in range(MOST_NESTED):
        level = [item for box in level for item in _items(box)]
        if not level:
            return values
    raise ValueError(f"{path}: nested more than {MOST_NESTED} levels deep")


def _items(value: object) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def find_file(
    folder_or_hub_id: str | os.PathLike[str], name: str, subfolder: str | None = None, **hub: Any
) -> str | None:
    """Path of a file in a local folder, else downloaded from the hub; None when it is not there."""
    folder = Path(folder_or_hub_id)
    if folder.is_dir():
        path = folder / (subfolder or "") / name
        return str(path) if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        return hf_hub_download(str(folder_or_hub_id), name, subfolder=subfolder, **hub)
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{folder_or_hub_id}: not a local folder, and the hub could not be asked for {name}"
        ) from error
    except EntryNotFoundError:
        return None
    except HFValidationError as error:
        raise FileNotFoundError(
            f"{folder_or_hub_id}: neither a local folder nor a hub id of the form owner/name"
        ) from error
