"""Where the runs of a sweep happen: here, on a Ray cluster, or under Slurm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from examples.errors import OptionError

LAUNCHERS = ("local", "ray", "slurm")


class Handle(Protocol):
    """A command that has been started."""

    def poll(self) -> int | None:
        """Its exit status; None while it runs or waits. What killed it from outside is 1."""

    def stop(self) -> None:
        """Ends it."""


class Launcher(Protocol):
    """Starts commands, each a process of its own.

    Attributes:
        lanes: how many at a time.
    """

    lanes: int

    def start(self, command: Sequence[str], log: Path) -> Handle:
        """Starts one; what it prints is appended to `log`."""

    def close(self) -> None:
        """Gives back what was held."""


def make_launcher(
    name: str,
    lanes: int | None,
    folder: Path,
    *,
    address: str | None = None,
    ray: Mapping[str, Any] | None = None,
    slurm: Mapping[str, Any] | None = None,
) -> Launcher:
    """A launcher.

    Args:
        name: of LAUNCHERS.
        lanes: runs at a time; None: what there is room for.
        folder: the sweep's.
        address: of a Ray cluster; None: one of its own, on this machine.
        ray: what a run needs there, such as num_gpus.
        slurm: parameters of submitit, such as slurm_partition.

    Raises:
        OptionError: a package is missing, or its parameters are wrong.
    """
    try:
        if name == "ray":
            from examples.sweeps.launchers.ray_cluster import RayCluster

            return RayCluster(lanes, address, dict(ray or {}))
        if name == "slurm":
            from examples.sweeps.launchers.slurm import Slurm

            return Slurm(lanes, folder / "slurm", dict(slurm or {}))
    except ImportError as error:
        raise OptionError(
            f"--launcher {name}: {error.name} is not installed; pip install 'rankwise[sweep]'"
        ) from None
    from examples.sweeps.launchers.local import Local

    return Local(lanes)
