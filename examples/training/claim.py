"""One run at a time in a folder: a locked file, whose lock ends with the process that holds it.

The lock is the operating system's (`flock`, on Windows a byte range), so a run that was killed
leaves nothing that its successor must judge. Network file systems lock for all their machines
where they are mounted with locks; one without any gives a warning.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import time
from pathlib import Path

from examples.errors import RunError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CLAIM = ".claim"
FAR = 1 << 20  # the byte that Windows locks: beyond the text, which stays readable
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Claim:
    """The right to write into a folder, which is made where it is missing."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / CLAIM
        self._file: int | None = None
        self._made: list[Path] = []  # folders, the innermost first

    @property
    def held(self) -> bool:
        """Whether it has been taken."""
        return self._file is not None

    def take(self) -> None:
        """Takes the claim.

        Raises:
            RunError: another run has it, or the folder cannot be written.
        """
        folder = self.path.parent
        try:
            self._made = [p for p in (folder, *folder.parents) if not p.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            while self._file is None:
                self._file = self._open_and_lock()
            os.ftruncate(self._file, 0)
            started = time.strftime("%Y-%m-%d %H:%M:%S")
            words = f"process {os.getpid()} on {socket.gethostname()}, since {started}"
            os.write(self._file, words.encode())
        except OSError as error:
            self.release()
            raise RunError(f"--output_dir {folder}: it cannot be written ({error})") from error

    def _open_and_lock(self) -> int | None:
        """A locked descriptor of the file that has the name now; None: it went meanwhile."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(file)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                owner = os.read(file, 200).decode(errors="replace") or "it has just started"
                os.close(file)
                raise RunError(
                    f"--output_dir {self.path.parent}: another run is writing there ({owner}); "
                    "wait for it, or choose another folder"
                ) from error
            print(
                f"warning: the file system of {self.path.parent} has no locks: see to it that no "
                "other run writes there",
                file=sys.stderr,
            )
        # The holder before removes the file and then lets go: such a lock excludes nobody.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(self.path)):
                return file
        os.close(file)
        return None

    def release(self) -> None:
        """Gives it up; folders that were made for it go, where nothing was written into them."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
            os.close(self._file)
            self._file = None
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        self._made = []


def _lock(file: int) -> None:
    """Locks a descriptor, or raises OSError at once."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    import msvcrt

    os.lseek(file, FAR, os.SEEK_SET)
    try:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    finally:
        os.lseek(file, 0, os.SEEK_SET)
