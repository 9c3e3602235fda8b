"""Configurations: the runs that differ in nothing but the seed, and what they say together."""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from examples.errors import OptionError
from examples.reporting.runs import Run, smaller_is_better
from examples.sweeps.statistics import half_interval, paired_gaps

PREFERRED = ("lora", "full")  # the reference where none is named


@dataclass
class Configuration:
    """Runs of one task that differ only in their seed.

    Attributes:
        runs: by seed.
        label: its method, and the options that tell it from the method's others on the task.
    """

    runs: list[Run]
    label: str = ""

    @property
    def task(self) -> str:
        return self.runs[0].task

    @property
    def method(self) -> str:
        return self.runs[0].method

    @property
    def metric(self) -> str:
        return self.runs[0].metric

    def by_seed(self, name: str) -> dict[int, float]:
        """A figure of every run that has it."""
        found = {run.seed: run.figure(name) for run in self.runs}
        return {seed: value for seed, value in found.items() if value is not None}

    def mean(self, name: str) -> float | None:
        values = self.by_seed(name).values()
        return statistics.mean(values) if values else None


@dataclass
class Task:
    """The configurations of a task.

    Attributes:
        name: of the task.
        configurations: in the order of their labels.
        shown: method -> the configuration that stands for it in overviews and curves.
        reference: what the others are compared with; None where nothing fits.
    """

    name: str
    configurations: list[Configuration]
    shown: dict[str, Configuration] = field(default_factory=dict)
    reference: Configuration | None = None

    @property
    def metric(self) -> str:
        """The main metric's name."""
        return next((c.metric for c in self.configurations if c.metric), "")

    @property
    def compared(self) -> list[Configuration]:
        """Those with as many seeds as any of their method: trials of a search are left out."""
        most = {method: len(c.by_seed("best")) for method, c in self.shown.items()}
        return [c for c in self.configurations if len(c.by_seed("best")) >= most[c.method]]

    def gaps(self, configuration: Configuration) -> list[float]:
        """Best values less the reference's, over the seeds both have."""
        if self.reference is None or configuration is self.reference:
            return []
        return paired_gaps(configuration.by_seed("best"), self.reference.by_seed("best"))


def tasks_of(runs: Iterable[Run], reference: str | None) -> list[Task]:
    """The runs in order: tasks, their configurations, their runs by seed.

    Args:
        runs: any.
        reference: the method to compare with; None: lora, else full, else the first there is.

    Raises:
        OptionError: no run is of that method.
    """
    groups: dict[tuple[str, str, str], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.task, run.metric, json.dumps(run.options)].append(run)
    # values of different metrics are never in one table
    by_task: dict[tuple[str, str], list[Configuration]] = defaultdict(list)
    for (task, metric, _), own in groups.items():
        by_task[task, metric].append(Configuration(sorted(own, key=lambda run: run.seed)))
    methods = {c.method for own in by_task.values() for c in own}
    if reference is not None and reference not in methods:
        raise OptionError(f"--reference {reference}: the runs are of {', '.join(sorted(methods))}")
    found = []
    names = Counter(name for name, _ in by_task)
    for (name, metric), own in sorted(by_task.items()):
        _name(own)
        own.sort(key=lambda c: (c.method, [_sortable(word) for word in c.label.split()]))
        by_metric = f"{name}, {metric.removeprefix('eval_') or 'not evaluated'}"
        task = Task(by_metric if names[name] > 1 else name, own)
        for method in sorted({c.method for c in own}):
            task.shown[method] = _standing_for([c for c in own if c.method == method])
        wanted = (reference,) if reference is not None else (*PREFERRED, *task.shown)
        task.reference = next((task.shown[m] for m in wanted if m in task.shown), None)
        found.append(task)
    return found


def _standing_for(configurations: Sequence[Configuration]) -> Configuration:
    """Of those with the most seeds, the one with the best mean."""
    most = max(len(c.by_seed("best")) for c in configurations)
    seen = [c for c in configurations if len(c.by_seed("best")) == most]
    if not most:
        return seen[0]
    sign = -1.0 if smaller_is_better(seen[0].metric) else 1.0
    return max(seen, key=lambda c: sign * (c.mean("best") or 0.0))


def _name(configurations: list[Configuration]) -> None:
    """Labels: the method, each option in which the method's configurations differ, and each that
    all methods of the task have and that is not the same everywhere; a sweep's word for a method
    says that already."""
    options = {id(c): c.runs[0].options for c in configurations}
    everywhere = set.intersection(*({*own} for own in options.values())) - {"method"}
    apart = {n for n in everywhere if len({own[n] for own in options.values()}) > 1}
    for method in {c.method for c in configurations}:
        own = [c for c in configurations if c.method == method]
        names = {name for c in own for name in options[id(c)]}
        differ = {n for n in names if len({options[id(c)].get(n) for c in own}) > 1}
        differ |= set() if own[0].runs[0].variant else apart
        for c in own:
            words = [f"{name} {_short(options[id(c)].get(name))}" for name in sorted(differ)]
            c.label = ", ".join([method, *words])


def _short(value: str | None) -> str:
    """An option's JSON for people; a path by its last part."""
    if value is None:
        return "not set"
    plain = json.loads(value)
    if isinstance(plain, str):
        return Path(plain).name if plain.startswith(("/", "~", ".")) else plain
    if isinstance(plain, float):
        return f"{plain:g}"
    return " ".join(map(str, plain)) if isinstance(plain, list) else str(plain)


def _sortable(word: str) -> tuple[int, float, str]:
    try:
        return 0, float(word.rstrip(",")), ""
    except ValueError:
        return 1, 0.0, word


def plus_minus(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and standard deviation where there are two values or more."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def difference(gaps: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half of its 95 % interval where there are two values or more."""
    return statistics.mean(gaps), half_interval(gaps) if len(gaps) > 1 else None
