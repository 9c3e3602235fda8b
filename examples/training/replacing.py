"""A run that replaces another: what was there is kept aside until the new result stands.

The old run's files wait in `.replaced` in the folder. Its `config.json` is the last to come and the
first to go back, so at every moment it says whose the files in the folder are: while it is in
`.replaced`, the new run's. A run that was killed in between is put right by the next one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

CONFIG = "config.json"
REPLACED, GONE = ".replaced", ".replaced.tmp"


def set_aside(folder: Path, names: Iterable[str]) -> None:
    """Moves a run's files aside; where others wait there already, the run's own are removed.

    Args:
        folder: of the run.
        names: of what the run wrote, `config.json` among them.
    """
    aside = folder / REPLACED
    if (aside / CONFIG).exists():  # the present run was to replace them, and came to no end
        remove(folder, names)
        return
    aside.mkdir(exist_ok=True)
    for name in sorted(names, key=lambda name: name == CONFIG):
        if os.path.lexists(folder / name):
            os.replace(folder / name, aside / name)


def put_back(folder: Path, names: Iterable[str]) -> None:
    """Removes what the new run wrote, `names`, and brings the old one's files back."""
    aside = folder / REPLACED
    if (aside / CONFIG).exists():
        remove(folder, names)
        os.replace(aside / CONFIG, folder / CONFIG)
    for path in aside.iterdir():
        os.replace(path, folder / path.name)
    aside.rmdir()


def discard(folder: Path) -> None:
    """Removes what waits aside."""
    os.replace(folder / REPLACED, folder / GONE)  # at once: from here on nothing is put back
    discard_rest(folder)


def discard_rest(folder: Path) -> None:
    """Removes what a run that was killed in `discard` has left."""
    shutil.rmtree(folder / GONE, ignore_errors=True)


def remove(folder: Path, names: Iterable[str]) -> None:
    """Removes files and folders; of a link, the link."""
    for path in (folder / name for name in names):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
