"""Sides in processes of their own: for packages of one name, and for memory."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common.devices import device_of, peak_gib
from benchmarks.common.timing import seconds

if TYPE_CHECKING:
    from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".peers"  # where the commands in the benchmarks' docstrings install other packages
# As `python -m MODULE`, but with PATHS before everything else.
START = """
import os, runpy, sys
sys.path[:1] = sys.argv[1].split(os.pathsep)
module = sys.argv[2]
del sys.argv[1:3]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


class Worker:
    """A process that answers every line it is sent with a line of JSON."""

    def __init__(self, module: str, *words: object, peer: Path | None = None) -> None:
        """Starts `python -m module words …`.

        Args:
            module: of the benchmark.
            words: its command line, which says that it is to serve.
            peer: a folder whose packages come before ours.
        """
        paths = os.pathsep.join(map(str, [peer, ROOT] if peer else [ROOT]))
        self.words = [*map(str, words)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, paths, module, *self.words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def answer(self) -> Any:
        """The next line that it prints."""
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the process of {' '.join(self.words)} ended early")
        return json.loads(line)

    def ask(self) -> Any:
        """Has it measure once."""
        print("go", file=self.process.stdin, flush=True)
        return self.answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def requests() -> Iterator[int]:
    """In a worker: 0, 1, 2, …, one per line that it is sent."""
    for turn, _ in enumerate(sys.stdin):
        yield turn


def tell(answer: Any) -> None:
    """In a worker: prints an answer."""
    print(json.dumps(answer), flush=True)


@functools.cache
def importable() -> bool:
    """Whether the peer, Transformers with PEFT, is there; where it is not, prints a line once."""
    missing = [name for name in ("transformers", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"left out: the peer, for lack of {' and '.join(missing)}", flush=True)
    return not missing


class Absent:
    """In place of the worker of a side whose packages are not there: no figure is a number."""

    def ask(self) -> dict[str, float]:
        return {"tokens_per_second": math.nan, "peak_gib": math.nan}

    def close(self) -> None:
        """There is no process."""


def step_workers(
    module: str, words: Iterable[object], sides: Iterable[str]
) -> dict[str, Worker | Absent]:
    """Side -> its worker, which `serve_steps`; "ours" needs no package, every other one the peer's.

    Args:
        module: of the benchmark.
        words: its command line.
        sides: what `--side` takes.
    """
    words = list(words)
    return {
        side: Worker(module, *words, "--side", side) if side == "ours" or importable() else Absent()
        for side in sides
    }


def serve_steps(
    o: argparse.Namespace,
    build: Callable[[str], tuple[nn.Module, Callable[[Any], Tensor]]],
    turns: Iterable[tuple[list[Any], int, dict[str, Any]]],
    rate: float,
    clip: bool = True,
) -> None:
    """In a worker: for every request, takes a turn of training steps and answers.

    Answers have `tokens_per_second`, `peak_gib`, `trainable` parameters, and what the turn adds.

    Args:
        o: has `side`, `seed`, `clock` and `device`.
        build: device -> the adapted model there, and batch -> its loss.
        turns: of every request, its batches, their real tokens, and more of its answer.
        rate: of learning.
        clip: the gradients' norm to 1.
    """
    if o.side == "ours":  # what every run keeps in memory
        from examples.training import memory

        memory.keep_compiled_kernels()
        memory.keep_freed_memory()

    import torch

    torch.manual_seed(o.seed)
    device = device_of(o)
    model, loss = build(device)
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=rate, fused=o.side == "ours")

    def steps(batches: list[Any]) -> None:
        for batch in batches:
            loss(batch).backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    clock = time.process_time if o.clock == "cpu" else time.perf_counter
    for batches, tokens, more in turns:
        took = seconds(lambda batches=batches: steps(batches), device, clock)
        found = {"tokens_per_second": tokens / took, "peak_gib": peak_gib(device)}
        tell({**found, "trainable": sum(p.numel() for p in trainable), **more})


def in_turn(
    workers: Mapping[str, Worker | Absent], rounds: int, warm_up: int = 2
) -> list[dict[str, Any]]:
    """Lets the workers take turns, and ends them.

    Args:
        workers: side -> its process.
        rounds: that count.
        warm_up: rounds before them.

    Returns:
        Every round's answers, by side.
    """
    found = [
        {side: worker.ask() for side, worker in workers.items()} for _ in range(warm_up + rounds)
    ]
    for worker in workers.values():
        worker.close()
    return found[warm_up:]
