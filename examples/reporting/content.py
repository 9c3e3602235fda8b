"""A report's content, in the order in which every page shows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from examples.reporting import tables
from examples.reporting.figures import Figure, Figures, budget_curve, check_axes
from examples.reporting.groups import Task, tasks_of
from examples.reporting.runs import Found
from examples.reporting.tables import Table


@dataclass
class Section:
    """A heading, its tables and its figures."""

    title: str
    tables: list[Table]
    figures: list[Figure]


@dataclass
class Content:
    """What is in a report.

    Attributes:
        title: of the page.
        counts: what was read, in a sentence.
        sections: the overview, then a section for each task.
        found: what was read.
        tasks: its tasks.
    """

    title: str
    counts: str
    sections: list[Section]
    found: Found
    tasks: list[Task]

    @property
    def figures(self) -> list[Figure]:
        return [figure for section in self.sections for figure in section.figures]


def gather(
    found: Found, title: str, reference: str | None, pareto: Sequence[tuple[str, str]]
) -> Content:
    """Puts a report together.

    Args:
        found: what was read; at least one run.
        title: of the page.
        reference: the method that others are compared with, or None.
        pareto: pairs of axes.

    Raises:
        OptionError: no run has such a method, or such an axis.
    """
    tasks = tasks_of(found.runs, reference)
    check_axes(tasks, pareto)
    figures = Figures(tasks, pareto)
    sections = [Section("Overview", tables.overview(tasks), [])]
    for task in tasks:
        more = (tables.calibration, tables.forgetting, tables.areas, tables.cuts)
        made = (tables.of_task(task), *(make(task) for make in more))
        shown = [table for table in made if table is not None]
        sections.append(Section(task.name, shown, figures.of(task)))
    curves = [budget_curve(name, curve) for name, curve in found.budget_curves.items()]
    if curves:
        sections.append(Section("Cuts after training", [], curves))
    if trouble := _trouble(found):
        sections.append(Section("Not in the report", trouble, []))
    _name_apart([figure for section in sections for figure in section.figures])
    return Content(title, _counts(found, tasks), sections, found, tasks)


def _counts(found: Found, tasks: Sequence[Task]) -> str:
    configurations = [c for task in tasks for c in task.configurations]
    methods = {c.method for c in configurations}
    counts = [
        _many(len(found.runs), "run"),
        _many(len(configurations), "configuration"),
        _many(len(methods), "method"),
        _many(len(tasks), "task"),
    ]
    left_out = _many(len(found.skipped), "folder") if found.skipped else "no folder"
    return f"{', '.join(counts)}; {left_out} left out."


def _many(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _trouble(found: Found) -> list[Table]:
    """Folders that were left out, and parts of runs that could not be read."""
    shown = []
    if found.skipped:
        rows = [[name, why] for name, why in sorted(found.skipped.items())]
        note = f"{_many(len(rows), 'folder')} with a run's files, or with what looks like them."
        shown.append(Table("Folders left out", note, ["folder", "why"], rows))
    notes = [[run.name, note] for run in found.runs for note in run.notes]
    if notes:
        note = "These runs are in the report, without these parts."
        shown.append(Table("Parts that are missing", note, ["run", "what"], notes))
    return shown


def _name_apart(figures: Sequence[Figure]) -> None:
    """Figures whose files would have one name get numbers."""
    seen: Counter[str] = Counter()
    for figure in figures:
        seen[figure.file.lower()] += 1
        if (number := seen[figure.file.lower()]) > 1:
            figure.name = f"{figure.name}-{number}"
