"""The search of options for every place of the grid, and the winners over the seeds.

    search:
      options: {learning_rate: [2e-4, 5e-4, 1e-3]}   # every combination is a run: a grid
      metric: f1   # unless given: metric_for_best_model, else the task's own
    search:
      by: optuna                                     # see examples.sweeps.sampling
      options: {learning_rate: {low: 1e-4, high: 1e-2, log: true}, lora_r: [4, 8, 16]}
      runs: 8                                        # of every place of the grid
      at_once: 2                                     # of one place; 1 unless given
      halving: 3                                     # of 3 runs, 1 goes on at every rung

Every place of the grid (task x method) has the same number of runs, with the first seed and the
final number of epochs. The best result decides (the smallest where the metric's name ends in
`loss`), and its options are run with every seed. What was tried stays in `search.jsonl`.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from examples.errors import OptionError
from examples.sweeps.jobs import Job, make_job
from examples.sweeps.ledger import write_lines
from examples.sweeps.sheet import Point, Sheet, Values, refuse_unknown

TABLE = "search.jsonl"
KEYS = ("by", "options", "metric", "runs", "at_once", "halving")


class Sampler(Protocol):
    """Which values to try in one place of the grid.

    Attributes:
        runs: how many there will be.
    """

    runs: int

    def samples(self) -> list[Values]:
        """What may be tried; the options of each are checked before anything starts."""

    def earlier(self) -> list[Values]:
        """What earlier calls of the sweep have tried to its end, where the sampler knows."""

    def ask(self) -> list[Values]:
        """What is to be run now."""

    def tell(self, tried: Values, state: str, value: float | None) -> None:
        """What became of one (done, failed or stopped)."""

    def lost(self, tried: Values, values: list[float]) -> bool:
        """Whether a run with these evaluations so far should end."""


class GridSampler:
    """All combinations."""

    def __init__(self, options: Values, where: str) -> None:
        for name, values in options.items():
            if not isinstance(values, list) or not values:
                raise OptionError(f"{where}: {name}: a list of values is needed, such as [1, 2]")
        combinations = itertools.product(*options.values())
        self._new = [dict(zip(options, chosen, strict=True)) for chosen in combinations]
        self.runs = len(self._new)

    def samples(self) -> list[Values]:
        """All of them."""
        return self._new

    def earlier(self) -> list[Values]:
        """None: runs that are done are skipped."""
        return []

    def ask(self) -> list[Values]:
        """All of them, once."""
        new, self._new = self._new, []
        return new

    def tell(self, tried: Values, state: str, value: float | None) -> None:
        """Nothing follows from it."""

    def lost(self, tried: Values, values: list[float]) -> bool:
        """Never: a grid compares whole runs."""
        return False


@dataclass
class Cell:
    """A place of the grid.

    Attributes:
        point: its options.
        sampler: what to try.
        tried: name of a run -> (run, values, state), as they were asked for.
        chosen: the winner's values.
    """

    point: Point
    sampler: Sampler
    tried: dict[str, tuple[Job, Values, str]] = field(default_factory=dict)
    chosen: Values | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing that was asked for is still to end."""
        return all(state != "running" for _, _, state in self.tried.values())


class Search:
    """The plan of a sweep with a search.

    Args:
        sheet: with `search`.
        sampler: (place, options, where) -> its sampler; None: all combinations.

    Raises:
        OptionError: its options are wrong, or places would have unlike numbers of runs.
    """

    def __init__(
        self, sheet: Sheet, sampler: Callable[[Point, Values, str], Sampler] | None = None
    ) -> None:
        assert sheet.search is not None
        self.sheet, self.where = sheet, f"{sheet.path}: search"
        refuse_unknown(sheet.search, KEYS, self.where)
        self.metric = sheet.search.get("metric")
        self._make = sampler or (lambda point, options, where: GridSampler(options, where))
        self.cells = [self._cell(point) for point in sheet.points]
        counts = {c.sampler.runs: " ".join(c.point.labels.values()) for c in self.cells}
        if len(counts) > 1:
            (few, one), (many, other), *_ = sorted(counts.items())
            raise OptionError(
                f"{self.where}: {few} runs for {one or 'one'}, but {many} for {other}: every place "
                "of the grid must have the same number"
            )
        self._of: dict[str, Cell] = {}
        self._samples = [
            self._job(cell, values, seed, "search")
            for cell in self.cells
            for values in cell.sampler.samples()
            for seed in sheet.seeds
        ]
        runs = next(iter(counts))
        self.total = len(self.cells) * (runs + len(sheet.seeds) - 1)

    def _cell(self, point: Point) -> Cell:
        where = f"{self.where}: {' '.join(point.labels.values())}".rstrip(": ")
        if not point.tried:
            raise OptionError(f"{where}: options: nothing is to be tried")
        fixed = [name for name in point.tried if name in point.options]
        if fixed or "seed" in point.tried:
            name = fixed[0] if fixed else "seed"
            raise OptionError(f"{where}: {name} is set already: tune it, or set it")
        return Cell(point, self._make(point, point.tried, where))

    def preview(self) -> list[Job]:
        """What may be tried, with the first seed."""
        return self._samples[:: len(self.sheet.seeds)]

    def start(self) -> list[Job]:
        """The first runs of every place."""
        return [job for cell in self.cells for job in self._resume(cell) + self._next(cell)]

    def _resume(self, cell: Cell) -> list[Job]:
        """Takes in what was tried before; those of which nothing is left are run again."""
        again = []
        for values in cell.sampler.earlier():
            job = self._job(cell, values, self.sheet.seeds[0], "search")
            state = "done" if job.done else "stopped" if job.folder.exists() else "running"
            cell.tried[job.name], self._of[job.name] = (job, values, state), cell
            again += [job] * (state == "running")
        return again

    def _next(self, cell: Cell) -> list[Job]:
        """What is to be tried next, or, at the end of a place's search, its winner."""
        jobs = self._ask(cell)
        if not jobs and cell.idle and cell.chosen is None:
            cell.chosen = self._winner(cell)
            if cell.chosen is not None:
                seeds = self.sheet.seeds
                return [self._job(cell, cell.chosen, seed, "grid") for seed in seeds]
        return jobs

    def _ask(self, cell: Cell) -> list[Job]:
        jobs = []
        for values in cell.sampler.ask():
            job = self._job(cell, values, self.sheet.seeds[0], "search")
            if job.name in cell.tried:  # a sampler may come back to what it has tried
                cell.sampler.tell(values, *self._said(cell, job.name))
                cell.tried[f"{job.name} {len(cell.tried)}"] = cell.tried[job.name]
                jobs += self._ask(cell)
                continue
            cell.tried[job.name] = (job, values, "running")
            self._of[job.name] = cell
            jobs.append(job)
        return jobs

    def _said(self, cell: Cell, name: str) -> tuple[str, float | None]:
        job, _, state = cell.tried[name]
        return state, self.value(job) if state == "done" else None

    def _job(self, cell: Cell, values: Values, seed: Any, part: str) -> Job:
        more = {**values, "seed": seed}
        return make_job(cell.point, self.sheet.output_dir, str(self.sheet.path), part, **more)

    def after(self, job: Job, state: str) -> list[Job]:
        """What follows from the end of a run of the search."""
        if job.part != "search":
            return []
        cell = self._of[job.name]
        values = cell.tried[job.name][1]
        cell.tried[job.name] = (job, values, state)
        cell.sampler.tell(values, *self._said(cell, job.name))
        jobs = self._next(cell)
        self.write()
        return jobs

    def lost(self, job: Job) -> bool:
        """Whether the sampler gives a run up, by its evaluations so far."""
        cell = self._of[job.name]
        values = [value for value in self.evaluations(job) if math.isfinite(value)]
        return bool(values) and cell.sampler.lost(cell.tried[job.name][1], values)

    # -- results ------------------------------------------------------------------------------

    def _winner(self, cell: Cell) -> Values | None:
        """The values of the best run; None where none has ended well."""
        found = [
            (value, values)
            for job, values, state in cell.tried.values()
            if state == "done" and (value := self.value(job)) is not None
        ]
        if not found:
            return None
        best = min if self._name(next(iter(cell.tried.values()))[0]).endswith("loss") else max
        return best(found, key=lambda pair: pair[0])[1]

    def _name(self, job: Job) -> str:
        """The metric as files have it: `eval_f1`; `eval_loss` where nobody names another."""
        name = self.metric or job.options.get("metric_for_best_model")
        name = str(name or job.results().get("main_metric") or "loss")
        return name if name.startswith("eval_") else f"eval_{name}"

    def value(self, job: Job) -> float | None:
        """The metric of a run's result.

        Raises:
            OptionError: the run has ended and has no such figure.
        """
        results = job.results()
        if self._name(job) not in results:
            figures = ", ".join(name for name in results if name.startswith("eval_"))
            raise OptionError(
                f"{self.where}: metric: {job.folder} has no {self._name(job)}; it has "
                f"{figures or 'no metric at all'}"
            )
        value = float(results[self._name(job)])
        return value if math.isfinite(value) else None

    def evaluations(self, job: Job) -> list[float]:
        """The metric of every evaluation of a run, so far."""
        path, name = job.folder / "metrics.jsonl", self._name(job)
        found = []
        for line in path.read_text("utf-8").splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:  # it is being written
                break
            if name in row:
                found.append(float(row[name]))
        return found

    def rows(self) -> list[Values]:
        """A line for every run of the search."""
        found = []
        for cell in self.cells:
            for job, values, state in cell.tried.values():
                every = self.evaluations(job)
                pick = min if self._name(job).endswith("loss") else max
                found.append({
                    "cell": cell.point.labels,
                    "options": values,
                    "seed": self.sheet.seeds[0],
                    "state": state,
                    "metric": self._name(job) if job.ran else self.metric,
                    "value": self.value(job) if state == "done" else None,
                    "last": every[-1] if every else None,
                    "best": pick(every) if every else None,
                    "folder": job.name,
                    "chosen": values == cell.chosen,
                })  # fmt: skip
        return found

    def write(self) -> None:
        """Writes the table; places of the grid that this call leaves out keep their lines."""
        path: Path = self.sheet.output_dir / TABLE
        path.parent.mkdir(parents=True, exist_ok=True)
        own = [cell.point.labels for cell in self.cells]
        earlier = path.read_text("utf-8").splitlines() if path.exists() else []
        others = [row for row in map(json.loads, earlier) if row["cell"] not in own]
        write_lines(path, others + self.rows())

    def table(self) -> str:
        """The table for people."""
        lines = []
        for row in self.rows():
            value = "" if row["value"] is None else f"{row['metric']} {row['value']:.4f}"
            options = "  ".join(f"{name} {value}" for name, value in row["options"].items())
            mark = "*" if row["chosen"] else " "
            where = " ".join(row["cell"].values())
            lines.append(f"{mark} {where:<28} {options:<30} {row['state']:<8} {value}".rstrip())
        return "\n".join(lines)
