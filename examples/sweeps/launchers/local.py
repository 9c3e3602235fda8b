"""Runs on this machine: one to a GPU, or one to a core with one thread each."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from examples.sweeps import commands


class LocalRun:
    """A process, and the lane that it holds."""

    def __init__(self, process: subprocess.Popen[bytes], lane: int, free: list[int]) -> None:
        self.process, self.lane, self.free = process, lane, free

    def poll(self) -> int | None:
        """Its exit status; None while it runs."""
        status = self.process.poll()
        if status is not None and self.lane >= 0:
            self.free.append(self.lane)
            self.lane = -1
        return status

    def stop(self) -> None:
        """Ends it."""
        commands.stop(self.process)
        self.poll()


class Local:
    """This machine.

    Args:
        lanes: runs at a time; None: the GPUs, else the cores that we may use.

    Attributes:
        lanes: runs at a time.
    """

    def __init__(self, lanes: int | None = None) -> None:
        self.gpus = visible_gpus()
        self.lanes = lanes or len(self.gpus) or usable_cores()
        self._free = list(range(self.lanes))

    def start(self, command: Sequence[str], log: Path) -> LocalRun:
        """Starts a process in a free lane."""
        lane = self._free.pop(0)
        # one thread: runs side by side share the cores, and the bits do not depend on how many
        more = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        if self.gpus:
            more["CUDA_VISIBLE_DEVICES"] = self.gpus[lane % len(self.gpus)]
        return LocalRun(commands.start(command, log, more), lane, self._free)

    def close(self) -> None:
        """Nothing is held."""


def usable_cores() -> int:
    """Processors that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name, one entry a GPU, found without torch."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [word for word in given.split(",") if word.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return [str(place) for place, _ in enumerate(line for line in lines if line.startswith("GPU"))]
