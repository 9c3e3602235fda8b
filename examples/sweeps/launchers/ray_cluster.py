"""Runs as tasks of a Ray cluster: one that is there, or one of the sweep's own on this machine.

`ray:` in the sweep's file says what a run needs (num_cpus, num_gpus, resources). The sweep's
folder, its data and this project must have the same paths on all machines. A worker that dies takes
its run with it; the sweep starts the run again, and it goes on from its last checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle

from examples.errors import OptionError
from examples.sweeps import commands
from examples.sweeps.launchers.local import usable_cores

PASSED_ON = ("PYTHONPATH", "PATH", "HOME", "HF_HOME", "HF_HUB_OFFLINE")  # and RANKWISE_*


class RayRun:
    """A task."""

    def __init__(self, task: ray.ObjectRef, log: Path) -> None:
        self.task, self.log = task, log
        self.status: int | None = None

    def poll(self) -> int | None:
        """The command's exit status; 1 where its worker died."""
        if self.status is None and ray.wait([self.task], timeout=0)[0]:
            try:
                self.status = ray.get(self.task)
            except ray.exceptions.RayError as error:
                commands.note(
                    self.log, f"Ray: {type(error).__name__}: {str(error).splitlines()[0]}"
                )
                self.status = 1
        return self.status

    def stop(self) -> None:
        """Kills the worker, and the run with it."""
        ray.cancel(self.task, force=True)


class RayCluster:
    """A Ray cluster.

    Args:
        lanes: runs at a time; None: as many as there is room for.
        address: of the cluster (`auto`, HOST:PORT, ray://HOST:PORT); None: one of our own.
        needs: of a run: num_cpus (1), num_gpus (1 where the cluster has any), and so on.

    Attributes:
        lanes: runs at a time.
    """

    def __init__(self, lanes: int | None, address: str | None, needs: dict[str, Any]) -> None:
        own = {} if address else {"num_cpus": lanes or usable_cores(), "include_dashboard": False}
        try:
            ray.init(address=address or "local", log_to_driver=False, **own)
        except Exception as error:  # Ray has no class for a cluster that does not answer
            where = f" --address {address}" if address else ""
            raise OptionError(f"--launcher ray{where}: {error}") from error
        there = ray.cluster_resources()
        self.needs = {"num_cpus": 1, "num_gpus": 1 if there.get("GPU") else 0, **needs}
        share = self.needs["num_gpus"] or self.needs["num_cpus"]
        room = there.get("GPU" if self.needs["num_gpus"] else "CPU", 1)
        self.lanes = lanes or max(1, int(room // share))
        # by value: a worker need not find this project to start a run
        cloudpickle.register_pickle_by_value(commands)
        try:
            self._run = ray.remote(commands.run).options(max_retries=0, **self.needs)
        except (ValueError, TypeError) as error:
            ray.shutdown()
            raise OptionError(f"ray: {error}") from error

    def start(self, command: Sequence[str], log: Path) -> RayRun:
        """Gives the cluster a task; it waits there until a worker is free."""
        known = {n: v for n, v in os.environ.items() if n in PASSED_ON or n.startswith("RANKWISE_")}
        more = {**known, "OMP_NUM_THREADS": str(max(1, int(self.needs["num_cpus"])))}
        task = self._run.remote(list(command), str(log.absolute()), more, os.getcwd())
        return RayRun(task, log)

    def close(self) -> None:
        """Leaves the cluster; one of our own ends."""
        ray.shutdown()
        cloudpickle.unregister_pickle_by_value(commands)
