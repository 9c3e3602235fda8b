"""How a sweep stands: a block of lines on a terminal, elsewhere a line per run that has ended."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TextIO

from examples.sweeps.jobs import Job

STEP = re.compile(rb"step (\d+)/(\d+)([^\r\n]*)")  # a line of a run that logs its loss
REDRAW, HEARTBEAT = 0.5, 60.0  # seconds


class Running(NamedTuple):
    """A run at this moment.

    Attributes:
        job: the run.
        elapsed: seconds of this attempt.
        training: the run itself, not a command after it.
    """

    job: Job
    elapsed: float
    training: bool = True


class Board:
    """Shows the runs, with one estimate of the time that is left.

    Args:
        spent: name -> seconds of runs that earlier calls have done.
        out: where it is shown.

    Attributes:
        lanes: runs at a time.
    """

    def __init__(self, spent: Mapping[str, float] | None = None, out: TextIO | None = None) -> None:
        self.out = out or sys.stderr
        self.live = self.out.isatty()
        self.lanes = 1
        self.counts: dict[str, int] = {}
        self._known: dict[tuple[str, ...], list[float]] = {}
        self._spent = dict(spent or {})
        self._lines = 0  # of the block that is on the terminal
        self._shown = time.perf_counter()
        self._now: tuple[Sequence[Running], Sequence[Job]] = ((), ())

    def settled(self, job: Job, status: str, seconds: float, ended: int, total: int) -> None:
        """A run has ended, or was done before."""
        self.counts[status] = self.counts.get(status, 0) + 1
        known = seconds if status == "done" else self._spent.get(job.name, 0.0)
        if known and status in ("done", "skipped"):
            self._known.setdefault(kind(job), []).append(known)
        if status != "skipped":
            running = [run for run in self._now[0] if run.job.name != job.name]
            left = self._left(running, [_step(run) for run in running], self._now[1], total - ended)
            self.line(f"[{ended}/{total}] {status:<8} {job.name}  {seconds:.1f} s  ({left} left)")

    def show(
        self, running: Sequence[Running], waiting: Sequence[Job], ended: int, total: int
    ) -> None:
        """Draws the block anew from time to time, or prints a line once a minute."""
        now, self._now = time.perf_counter(), (running, waiting)
        if now - self._shown < (REDRAW if self.live else HEARTBEAT) or not running:
            return
        self._shown = now
        steps = [_step(run) for run in running]
        left = self._left(running, steps, waiting, total - ended)
        counts = ", ".join(f"{count} {status}" for status, count in self.counts.items())
        lines = [f"{ended} of {total} runs ({counts or 'none yet'}), {left} left"]
        for run, (_, words) in zip(running, steps, strict=True):
            lines.append(f"  {clock(run.elapsed)}  {run.job.name}  {words}")
        if self.live:
            self._wipe()
            self._lines = len(lines)
        print("\n".join(lines), file=self.out, flush=True)

    def line(self, text: str) -> None:
        """A line that stays."""
        self._wipe()
        print(text, file=self.out, flush=True)

    def close(self) -> None:
        """Takes the block away."""
        self._wipe()

    def _wipe(self) -> None:
        if self._lines:
            self.out.write(f"\x1b[{self._lines}A\x1b[J")
            self._lines = 0

    def _left(
        self,
        running: Sequence[Running],
        steps: Sequence[tuple[float, str]],
        waiting: Sequence[Job],
        unsettled: int,
    ) -> str:
        seconds = self._estimate(running, steps, waiting, unsettled)
        return "?" if seconds is None else clock(seconds)

    def _estimate(
        self,
        running: Sequence[Running],
        steps: Sequence[tuple[float, str]],
        waiting: Sequence[Job],
        unsettled: int,
    ) -> float | None:
        typical = {name: sum(v) / len(v) for name, v in self._known.items()}
        whole = list(typical.values())
        whole += [r.elapsed / part for r, (part, _) in zip(running, steps, strict=True) if part]
        if not whole:
            return None
        mean = sum(whole) / len(whole)
        current = []
        for run, (part, _) in zip(running, steps, strict=True):
            expected = run.elapsed / part if part else typical.get(kind(run.job), mean)
            current.append(max(expected - run.elapsed, 0.0))
        ahead = [typical.get(kind(job), mean) for job in waiting]
        ahead += [mean] * max(0, unsettled - len(running) - len(waiting))  # runs to come
        return seconds_left(current, ahead, self.lanes)


def seconds_left(current: Sequence[float], ahead: Sequence[float], lanes: int) -> float:
    """How long it takes, when the next run starts in the lane that is free first.

    Args:
        current: seconds left of each run that goes on.
        ahead: seconds of each run to come, in their order.
        lanes: runs at a time.
    """
    free = [*sorted(current), *[0.0] * max(0, lanes - len(current))]
    for seconds in ahead:
        free.sort()
        free[0] += seconds
    return max(free, default=0.0)


def kind(job: Job) -> tuple[str, ...]:
    """Runs of one kind take about as long: those that differ in their seed, or a searched option
    other than the axes'."""
    return (job.program, *(job.labels[a] for a in ("task_name", "method") if a in job.labels))


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _step(run: Running) -> tuple[float, str]:
    """How far a run is, 0 to 1 (0: it does not say), and its last line about it."""
    if not run.training:
        return 0.0, "its last command"
    try:
        with open(run.job.log, "rb") as file:
            file.seek(max(0, run.job.log.stat().st_size - 4_000))
            text = file.read()
    except OSError:
        return 0.0, ""
    every = [*STEP.finditer(text, text.rfind(b"\n$ ") + 1)]  # of this attempt
    if not every:
        return 0.0, ""
    found = every[-1]
    done, total = int(found[1]), int(found[2])
    words = found[3].decode("utf-8", "replace").split("(")[0].strip()
    return done / max(total, 1), f"step {done}/{total}  {words}"[:70]
