"""Files: written whole or not at all, found in a local folder or on the hub."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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
