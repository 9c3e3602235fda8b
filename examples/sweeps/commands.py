"""A command as a process that does not outlive the one that started it.

Nothing of ours is imported here: this file travels to the machines of a cluster by itself.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def start(
    command: Sequence[str], log: str | Path, more: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Starts a process that appends what it prints to a file.

    Args:
        command: its words.
        log: the file.
        more: environment variables on top of ours.
    """
    with open(log, "ab") as file:
        return subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(more or {})},
            start_new_session=True,  # Ctrl-C is for the sweep, which ends its runs itself
            preexec_fn=_bound_to(os.getpid()) if sys.platform == "linux" else None,
        )


def run(
    command: Sequence[str], log: str, more: Mapping[str, str], folder: str | None = None
) -> int:
    """Runs a command to its end, in another machine's process.

    Args:
        command: its words.
        log: the file for what it prints.
        more: environment variables.
        folder: to be in.

    Returns:
        Its exit status.
    """
    if folder is not None:
        os.chdir(folder)
    process = start(command, log, more)
    try:
        return process.wait()
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes], patience: float = 10.0) -> None:
    """Ends a process and what it has started, if it still runs; gives it `patience` seconds."""
    if process.poll() is not None:
        return
    for how, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, how)
            process.wait(seconds)
            return
        except ProcessLookupError:
            process.wait()
            return
        except subprocess.TimeoutExpired:
            continue


def note(log: str | Path, text: str) -> None:
    """Appends a line to a log."""
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"{text}\n")


def _bound_to(parent: int) -> Callable[[], None]:
    """What a new process does first: it asks to be killed when `parent` ends, however that ends.

    Linux alone can do it. Elsewhere a run outlives a sweep that is killed outright, and its claim
    of its folder keeps the next call from starting it twice.
    """
    libc = ctypes.CDLL(None)

    def ask() -> None:
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it has ended already
            os._exit(1)

    return ask
