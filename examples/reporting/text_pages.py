"""The report as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any

from examples.reporting.content import Content
from examples.reporting.figures import Figure
from examples.reporting.groups import Configuration, Task, difference, plus_minus
from examples.reporting.provenance import checkout, environments
from examples.reporting.runs import Run, number
from examples.reporting.tables import COLUMNS, Table

FIGURES = "figures"  # folder of the pictures that Markdown shows
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "–": "--", "₂": "$_2$", "“": "``", "”": "''", "−": "$-$", "×": r"$\times$",
}  # fmt: skip


def markdown(content: Content) -> str:
    """Tables, and figures from the folder beside the file."""
    parts = [f"# {_plain(content.title)}", content.counts]
    for section in content.sections:
        parts.append(f"## {_plain(section.title)}")
        parts += [_markdown_table(table) for table in section.tables]
        parts += [_markdown_figure(figure) for figure in section.figures]
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """Text without what Markdown or HTML would take for marks."""
    return re.sub(r"([\\`*_{}\[\]|#])", r"\\\1", escape(text, quote=False)).replace("\n", " ")


def _markdown_table(table: Table) -> str:
    def row(cells: Sequence[str]) -> str:
        return f"| {' | '.join(_plain(cell) for cell in cells)} |"

    rule = "|".join(["", ":--", *["--:"] * (len(table.header) - 1), ""])
    rows = "\n".join([row(table.header), rule, *(row(cells) for cells in table.rows)])
    return f"### {_plain(table.title)}\n\n{_plain(table.note)}\n\n{rows}"


def _markdown_figure(figure: Figure) -> str:
    names = ", ".join(dict.fromkeys([*(run.name for run in figure.runs), *figure.others]))
    where = " / ".join(environments(figure.runs))
    ran = f"Runs: {names}." + (f" {where}." if where else "")
    title = _plain(figure.title)
    return (
        f"### {title}\n\n![{title}]({FIGURES}/{figure.file})\n\n{_plain(figure.note)}\n\n"
        f"<details><summary>Runs, versions, machine, checkout</summary>\n\n{_plain(ran)}\n\n"
        "</details>"
    )


def configurations_csv(tasks: Sequence[Task]) -> str:
    """A line for every configuration."""
    figures = ("last", "best", *(name for _, name, _ in COLUMNS))
    header = ["task", "method", "configuration", "metric", "n", "seeds"]
    header += [f"{name}_{what}" for name in figures for what in ("mean", "sd")]
    header += ["reference", "difference_mean", "difference_half_95", "difference_n"]
    return _csv(header, [_line(task, c, figures) for task in tasks for c in task.configurations])


def _line(task: Task, c: Configuration, figures: Sequence[str]) -> list[Any]:
    seeds = " ".join(str(run.seed) for run in c.runs)
    line: list[Any] = [task.name, c.method, c.label, c.metric, len(c.runs), seeds]
    for name in figures:
        values = list(c.by_seed(name).values())
        line += plus_minus(values) if values else (None, None)
    gaps = task.gaps(c)
    line.append(task.reference.label if task.reference else None)
    return [*line, *(difference(gaps) if gaps else (None, None)), len(gaps)]


def runs_csv(runs: Sequence[Run]) -> str:
    """A line for every run: all its figures, and where it ran."""
    names = list(
        dict.fromkeys(n for run in runs for n, v in run.results.items() if number(v) is not None)
    )
    header = ["run", "task", "method", "seed", "learning_rate", "metric", "last", "best"]
    header += ["file_bytes", *names, "platform", "device", "threads", "checkout"]
    rows = []
    for run in runs:
        env = run.environment
        line = [run.name, run.task, run.method, run.seed, run.config.get("learning_rate")]
        line += [run.metric, run.last, run.best, run.file_bytes]
        line += [number(run.results.get(name)) for name in names]
        line += [env.get("platform"), env.get("device"), env.get("threads")]
        rows.append([*line, checkout(env.get("git_commit"))])
    return _csv(header, rows)


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(["" if cell is None else cell for cell in row] for row in rows)
    return file.getvalue()


def latex(content: Content) -> str:
    """The tables, each in a `table` environment of plain LaTeX."""
    tables = [table for section in content.sections for table in section.tables]
    return "\n".join(_latex_table(table) for table in tables)


def _latex_table(table: Table) -> str:
    def row(cells: Sequence[str]) -> str:
        return " & ".join(_latex(cell) for cell in cells) + r" \\"

    columns = "l" + "r" * (len(table.header) - 1)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_latex(table.title)}. {_latex(table.note)}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\hline",
        row(table.header),
        r"\hline",
        *(row(cells) for cells in table.rows),
        r"\hline",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in text)
