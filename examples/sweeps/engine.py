"""The loop of a sweep: starts what has room, looks at what runs, tries once more what failed.

One thread does it all. A run that has its results is skipped; one that was interrupted goes on from
its last checkpoint, because every run is started with `--resume_from_checkpoint auto`.
"""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from examples.sweeps import commands
from examples.sweeps.jobs import Job, Step
from examples.sweeps.launchers import Handle, Launcher
from examples.sweeps.ledger import Ledger
from examples.sweeps.progress import Board, Running

TRIES = 2
PAUSE = 0.05  # seconds between two looks
LOOK_AT_METRICS = 1.0  # seconds between two looks at the evaluations of a run of a search
TAIL = 15  # lines of a failed run's log


class Plan(Protocol):
    """Which runs there are.

    Attributes:
        total: how many there will be, as far as it is known.
    """

    total: int

    def preview(self) -> list[Job]:
        """Those that are known now."""

    def start(self) -> list[Job]:
        """The first ones."""

    def after(self, job: Job, state: str) -> list[Job]:
        """Those that follow from the end of one (done, failed or stopped)."""

    def lost(self, job: Job) -> bool:
        """Whether a run that goes on is not worth its time any more."""


@dataclass
class Fixed:
    """A plan that is known from the start."""

    jobs: list[Job]

    @property
    def total(self) -> int:
        """How many runs there are."""
        return len(self.jobs)

    def preview(self) -> list[Job]:
        """All of them."""
        return self.jobs

    def start(self) -> list[Job]:
        """All of them."""
        return self.jobs

    def after(self, job: Job, state: str) -> list[Job]:
        """None."""
        return []

    def lost(self, job: Job) -> bool:
        """Never."""
        return False


@dataclass
class Active:
    """A run that has been started.

    Attributes:
        job: the run.
        steps: its commands that are still to be done, the present one first.
        handle: of the present one.
        began: when this attempt did.
        looked: when its evaluations were read last.
    """

    job: Job
    steps: list[Step | None]  # None: the run itself
    handle: Handle
    began: float = field(default_factory=time.perf_counter)
    looked: float = 0.0


class Engine:
    """Carries out a plan.

    Args:
        plan: the runs.
        ledger: keeps what became of them.
        board: shows it.
        launcher: makes the launcher, once one is needed.

    Attributes:
        outcomes: name -> a line of `sweep.json`, of the runs that this call has settled.
    """

    def __init__(
        self, plan: Plan, ledger: Ledger, board: Board, launcher: Callable[[], Launcher]
    ) -> None:
        self.plan, self.ledger, self.board = plan, ledger, board
        self._make_launcher, self._launcher = launcher, None
        self.waiting: list[Job] = []
        self.active: list[Active] = []
        self.outcomes: dict[str, dict[str, Any]] = {}
        self._tries: dict[str, int] = {}
        self._spent: dict[str, float] = {}  # seconds of this call

    def run(self) -> None:
        """Does everything; where it is interrupted, it ends what runs and says so in the ledger."""
        try:
            self._admit(self.plan.start())
            self.ledger.write()
            while self.waiting or self.active:
                self._fill()
                time.sleep(PAUSE)
                for active in list(self.active):
                    self._look(active)
                self.board.show(self._running(), self.waiting, len(self.outcomes), self.plan.total)
        finally:
            self._stop_all()
            self.board.close()

    def _admit(self, jobs: Sequence[Job]) -> None:
        """Takes runs in: those that are done are settled at once."""
        known = {job.name for job in self.waiting} | {active.job.name for active in self.active}
        for job in jobs:
            if job.name in self.outcomes:  # the winner's own run of the search, for one
                self.ledger.note(job, part=job.part)
                self._admit(self.plan.after(job, self.ledger[job]["state"]))
            elif job.done or (not job.trains and self.ledger[job]["state"] == "done"):
                self._settle(job, "skipped", 0.0)
            elif job.name not in known:
                self.ledger[job].update(state="waiting", part=job.part)
                self.waiting.append(job)
                known.add(job.name)

    def _fill(self) -> None:
        """Starts runs while there is room."""
        if self.waiting and self._launcher is None:
            self._launcher = self._make_launcher()
            self.board.lanes = self._launcher.lanes
        while self.waiting and len(self.active) < self._launcher.lanes:
            job = self.waiting.pop(0)
            job.log.parent.mkdir(parents=True, exist_ok=True)
            self._tries[job.name] = self._tries.get(job.name, 0) + 1
            steps: list[Step | None] = [] if job.ran else [None]
            steps += [step for step in job.then if not step.result.exists()]
            attempts = self.ledger[job]["attempts"] + 1
            self.ledger.note(job, state="running", attempts=attempts)
            self.active.append(Active(job, steps, self._launch(job, steps[0])))

    def _launch(self, job: Job, step: Step | None) -> Handle:
        command = job.command if step is None else step.command
        if step is not None:
            _remove(step.aside)
        commands.note(job.log, f"$ {shlex.join(command)}")
        return self._launcher.start(command, job.log)

    def _look(self, active: Active) -> None:
        """Sees what became of a run."""
        job, status = active.job, active.handle.poll()
        if status is None:
            self._look_at_metrics(active)
            return
        step = active.steps[0]
        if status == 0 and step is None and job.trains and not job.ran:
            commands.note(job.log, "the program ended well, but without all_results.json")
            status = 1
        if status == 0 and step is not None:
            if step.aside.exists():
                step.aside.replace(step.result)
            else:
                commands.note(job.log, f"the command ended well, but did not write {step.aside}")
                status = 1
        if status == 0 and len(active.steps) > 1:
            active.steps.pop(0)
            active.handle = self._launch(job, active.steps[0])
            return
        if status != 0 and self._tries[job.name] < TRIES:
            self._end(active)
            self.ledger.note(job, state="waiting")
            self.board.line(f"again    {job.name} (exit status {status})")
            self.waiting.append(job)
            return
        self._end(active)
        self._settle(job, "failed" if status else "done", self._spent[job.name])

    def _look_at_metrics(self, active: Active) -> None:
        now = time.perf_counter()
        if active.job.part != "search" or now - active.looked < LOOK_AT_METRICS:
            return
        active.looked = now
        if self.plan.lost(active.job):
            active.handle.stop()
            self._end(active)
            self._settle(active.job, "stopped", self._spent[active.job.name])

    def _end(self, active: Active) -> None:
        """Takes an attempt off the list, its seconds noted."""
        self.active.remove(active)
        name, seconds = active.job.name, time.perf_counter() - active.began
        self._spent[name] = self._spent.get(name, 0.0) + seconds
        row = self.ledger[active.job]
        row["seconds"] = round(row["seconds"] + seconds, 2)

    def _settle(self, job: Job, status: str, seconds: float) -> None:
        """A run's last word in this call."""
        state = "done" if status == "skipped" else status
        lines = tail(job.log) if status == "failed" else []
        row = {"state": state, "part": job.part, "log_tail": lines}
        if status != "skipped":
            self.ledger.note(job, **row)
        else:
            self.ledger[job].update(row)
        self.outcomes[job.name] = {
            "folder": str(job.folder),
            "options": job.options,
            "status": status,
            "seconds": round(seconds, 2),
            "log_tail": lines,
        }
        self.board.settled(job, status, seconds, len(self.outcomes), self.plan.total)
        self._admit(self.plan.after(job, state))

    def _running(self) -> list[Running]:
        now = time.perf_counter()
        return [Running(a.job, now - a.began, a.steps[0] is None) for a in self.active]

    def _stop_all(self) -> None:
        for active in list(self.active):
            active.handle.stop()
            self._end(active)
            self.ledger[active.job].update(state="waiting")
        self.ledger.write()
        if self._launcher is not None:
            self._launcher.close()

    def unsettled(self) -> int:
        """Runs that were still to be done when the loop ended."""
        return max(self.plan.total - len(self.outcomes), 0)


def tail(log: Path, lines: int = TAIL) -> list[str]:
    """The last lines of a log."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 20_000))
            return file.read().decode("utf-8", "replace").splitlines()[-lines:]
    except OSError:
        return []


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
