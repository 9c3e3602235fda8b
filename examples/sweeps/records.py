"""Many runs, one JSON line each; a run that has its line is not repeated.

So a sweep that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class _Spent(threading.local):
    """CPU seconds of the processes that the present run of this lane started."""

    cpu = 0.0


_spent = _Spent()
_writing = threading.Lock()


def read(path: Path) -> list[Row]:
    """The runs there are."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def once(path: Path, key: Row, run: Callable[[Path], Row]) -> Row:
    """The row of `key`: the one in the file, or else what `run` returns, which is added to it.

    Args:
        path: the file.
        key: what tells this run from the others.
        run: does it; gets a folder that is removed afterwards.
    """
    for row in read(path):
        if key.items() <= row.items():
            return row
    started, _spent.cpu = time.perf_counter(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder))
    seconds = {
        "process_seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(_spent.cpu, 2),
    }
    row = {**key, **result, **seconds}
    with _writing, open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return row


def in_lanes(lanes: int, runs: Iterable[Callable[[], object]]) -> None:
    """Does all `runs`, `lanes` of them at a time; the first error ends it after what is running.

    Several lanes want one thread a process (OMP_NUM_THREADS=1), which costs less than many threads
    on one small model.
    """
    with ThreadPoolExecutor(lanes) as pool:
        waiting = [pool.submit(run) for run in runs]
        try:
            for future in as_completed(waiting):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def call(command: Sequence[str]) -> None:
    """Runs a process; its CPU seconds count for the run.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    process = subprocess.Popen(command)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    _spent.cpu += used.ru_utime + used.ru_stime
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def run_glue(words: Sequence[str], folder: Path) -> Row:
    """Runs `examples.run_glue` into `folder`; its history of evaluations and its figures."""
    return run_program("examples.run_glue", words, folder)


def run_program(program: str, words: Sequence[str], folder: Path) -> Row:
    """Runs a program into `folder`; its history of evaluations and its figures."""
    call([sys.executable, "-m", program, *words, "--output_dir", str(folder)])
    result = json.loads((folder / "all_results.json").read_text())
    return {
        "history": [_metrics(row) for row in read(folder / "metrics.jsonl")],
        "final": _metrics(result),
        "train_seconds": result["train_seconds"],
        "trainable": result["trainable_parameters"],
        "peak_memory_bytes": result["peak_memory_bytes"],
    }


def _metrics(row: Row) -> Row:
    return {k.removeprefix("eval_"): v for k, v in row.items() if k.startswith("eval_")}
