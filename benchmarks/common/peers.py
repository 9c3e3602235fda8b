"""Sides in processes of their own: for packages of one name, and for memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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


def in_turn(workers: Mapping[str, Worker], rounds: int, warm_up: int = 2) -> list[dict[str, Any]]:
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
