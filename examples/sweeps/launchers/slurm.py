"""Runs as Slurm jobs, by submitit: the sweep waits for them, and may be started again meanwhile.

`slurm:` in the sweep's file holds submitit's parameters (slurm_partition, timeout_min,
gpus_per_node, ...); `cluster: local` runs the same jobs as processes here. The sweep's folder must
be on a file system that the nodes share. A job that is preempted or out of time is queued again by
submitit, and its run goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit

from examples.errors import OptionError
from examples.sweeps import commands

LANES = 64  # jobs in the queue at a time; how many of them run is Slurm's to say


class Command:
    """What a job does; submitit calls `checkpoint` where Slurm takes the job away."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.command, self.log = list(command), str(log)

    def __call__(self) -> int:
        threads = os.environ.get("OMP_NUM_THREADS") or os.environ.get("SLURM_CPUS_PER_TASK") or "1"
        return commands.run(self.command, self.log, {"OMP_NUM_THREADS": threads})

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """The same job once more."""
        return submitit.helpers.DelayedSubmission(self)


class SlurmRun:
    """A job."""

    def __init__(self, job: submitit.Job[int], log: Path) -> None:
        self.job, self.log = job, log
        self.status: int | None = None

    def poll(self) -> int | None:
        """The command's exit status; 1 where the job itself failed."""
        if self.status is None and self.job.done():
            try:
                self.status = self.job.result()
            except Exception as error:  # submitit's, and whatever the job raised
                commands.note(self.log, f"the job {self.job.job_id} failed: {error}")
                self.status = 1
        return self.status

    def stop(self) -> None:
        """Cancels it."""
        with contextlib.suppress(Exception):  # it may have ended meanwhile
            self.job.cancel()


class Slurm:
    """A Slurm cluster.

    Args:
        lanes: jobs at a time; None: LANES.
        folder: for submitit's files.
        parameters: of its executor, and `cluster`.

    Attributes:
        lanes: jobs at a time.
    """

    def __init__(self, lanes: int | None, folder: Path, parameters: dict[str, Any]) -> None:
        self.lanes = lanes or LANES
        cluster = parameters.pop("cluster", "slurm")
        try:
            self.executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
            self.executor.update_parameters(**{"name": "sweep", **parameters})
        except Exception as error:  # submitit has no base class for what it raises
            words = " ".join(str(error).split())
            raise OptionError(f"--launcher slurm: {words}") from error

    def start(self, command: Sequence[str], log: Path) -> SlurmRun:
        """Submits a job."""
        return SlurmRun(self.executor.submit(Command(command, log)), log)

    def close(self) -> None:
        """Nothing is held."""
