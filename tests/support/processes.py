"""Several processes of one test: gloo groups by `spawn`, programs by torch's launcher."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from support.paths import ROOT

# How two processes work together -> what accelerate's launcher then sets.
WAYS: dict[str, dict[str, str]] = {
    "ddp": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
}


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_two(run: Callable[[int], dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """What `run(rank)` returns in each of two processes of a gloo group.

    Args:
        run: a function of a module, which is imported again in the processes.
        folder: empty; results pass through it.
    """
    mp.spawn(_member, (run, free_port(), folder), nprocs=2)
    return [torch.load(folder / str(rank), weights_only=True) for rank in (0, 1)]


def _member(rank: int, run: Callable[[int], dict[str, Any]], port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        torch.save(run(rank), folder / str(rank))
    finally:
        dist.destroy_process_group()


def launch_two(program: Iterable[object], *words: object, way: str = "ddp") -> str:
    """Runs a program by torch's launcher, as `-m module` or a file, on two processes.

    Args:
        program: the module or file.
        words: for its command line.
        way: of `WAYS`.

    Returns:
        What the processes said on stdout and stderr.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc_per_node", "2", *map(str, (*program, *words))]
    environment = {**os.environ, **WAYS[way], "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def launch_runs(runs: Sequence[Sequence[str]], folder: Path, way: str = "ddp") -> str:
    """Several runs on the same two processes, one after another; what was said.

    Args:
        runs: the name of a program and its words, each.
        folder: for the list.
        way: of `WAYS`.
    """
    file = folder / "runs.json"
    file.write_text(json.dumps([list(run) for run in runs]))
    return launch_two([Path(__file__).with_name("several_runs.py")], file, way=way)
