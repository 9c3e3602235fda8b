"""What studies (methods × tasks × seeds) share: one JSON line per run, and means over seeds.

A run that has its line is not repeated, so a study that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

METRIC = {"mrpc": "f1", "cola": "matthews_correlation", "stsb": "pearson", "sst2": "accuracy"}
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided 95 %, by number of seeds

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
    command = [sys.executable, "-m", "examples.run_glue", *words, "--output_dir", str(folder)]
    call(command)
    result = json.loads((folder / "all_results.json").read_text())
    return {
        "history": [_metrics(row) for row in read(folder / "metrics.jsonl")],
        "final": _metrics(result),
        "train_seconds": result["train_seconds"],
        "trainable": result["trainable_parameters"],
    }


def _metrics(row: Row) -> Row:
    return {k.removeprefix("eval_"): v for k, v in row.items() if k.startswith("eval_")}


def half_interval(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean (Student's t over seeds); 0 of a single value."""
    if len(values) < 2:
        return 0.0
    return STUDENT_T[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def mean_and_interval(values: Sequence[float], digits: int = 4) -> str:
    """Mean and 95 % interval."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {half_interval(values):.{digits}f}"


def paired_difference(values: dict[int, float], reference: dict[int, float]) -> str:
    """Mean and 95 % interval of values − reference over the seeds both have; "" without any.

    Runs of one seed share the order of their rows and the head they start from, so the interval
    of differences is often narrower than those of the two means suggest.
    """
    gaps = [values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())]
    if not gaps:
        return ""
    interval = f" ± {half_interval(gaps):.4f}" if len(gaps) > 1 else ""
    return f"{statistics.mean(gaps):+.4f}{interval}"


def metrics_of(rows: Sequence[Row], part: str, task: str, **key: object) -> list[float]:
    """The task's metric of the runs that have `key`, one per seed."""
    wanted = {"part": part, "task": task, **key}
    return [row["final"][METRIC[task]] for row in rows if wanted.items() <= row.items()]


def draw_methods(axes: Any, rows: Sequence[Row], epochs: dict[str, int], methods: Any) -> None:
    """Part `main`: every task into its own axes, its methods side by side."""
    for own, (task, count) in zip(axes, epochs.items(), strict=True):
        dots(own, {method: metrics_of(rows, "main", task, method=method) for method in methods})
        own.set_title(f"{task}, {count} epochs", fontsize="medium")
        own.set_ylabel(METRIC[task].replace("_", " "))


def dots(
    axes: Any, groups: dict[str, Sequence[float]], colour: str = "tab:blue", shift: float = 0.0
) -> None:
    """Draws every group's values as dots, beside them the mean and, of three or more, its interval.

    Args:
        groups: label -> one value per seed; empty ones leave a gap.
        shift: moves the dots along the axis, for several calls on the same labels.
    """
    for place, values in enumerate(groups.values()):
        if values:
            axes.plot([place + shift] * len(values), values, "o", ms=4, color=colour, alpha=0.6)
            mean = statistics.mean(values)
            half = half_interval(values) if len(values) > 2 else 0.0  # of two it hides the rest
            axes.errorbar(place + shift + 0.14, mean, half, fmt="_", capsize=3, color=colour)
    axes.set_xticks(range(len(groups)), list(groups), rotation=25, ha="right", fontsize="small")
    axes.grid(alpha=0.25, axis="y")
