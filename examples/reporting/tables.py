"""Tables of a report, as text that every page sets in its own way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from examples.reporting.groups import Configuration, Task, difference, plus_minus
from examples.sweeps.statistics import paired_gaps

NONE = "–"
MIB = 2**20


@dataclass
class Table:
    """A table; the first column names its rows.

    Attributes:
        title: of the table.
        note: how to read it.
        header: of the columns.
        rows: cells, as long as the header.
    """

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]


# title of the column, the figure's name, and how a value is written
COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("trained parameters", "trainable_parameters", "{:,.0f}".format),
    ("seconds", "train_seconds", "{:.1f}".format),
    ("tokens/s", "tokens_per_second", "{:,.0f}".format),
    ("TFLOP/s", "tflops_per_second", "{:.3g}".format),
    ("of the arithmetic limit", "arithmetic_share", "{:.0%}".format),
    ("memory, MiB", "peak_memory_bytes", lambda value: f"{value / MIB:,.0f}"),
    ("file, KiB", "file_bytes", lambda value: f"{value / 1024:,.0f}"),
    ("weights kept", "density", "{:.3f}".format),
)
CALIBRATION = (
    ("ECE", "ece", "{:.4f}".format),
    ("NLL", "nll", "{:.4f}".format),
    ("entropy", "entropy", "{:.4f}".format),
)
FORGETTING = (
    ("forgetting", "forgetting", "{:+.4f}".format),
    ("loss before", "language_loss_before", "{:.4f}".format),
    ("loss after", "language_loss_after", "{:.4f}".format),
)

CUT_RULES = {  # of `budget_curve.json`
    "global": "one threshold for all matrices",
    "uniform": "the same rank everywhere",
}


def metric_name(metric: str) -> str:
    """`eval_f1` -> `f1`."""
    return metric.removeprefix("eval_") or "no metric"


def spread(values: Sequence[float], write: Callable[[float], str] = "{:.4f}".format) -> str:
    """Mean ± standard deviation; the value alone where there is one, or the same one each time."""
    if not values:
        return NONE
    mean, deviation = plus_minus(values)
    return f"{write(mean)} ± {write(deviation).lstrip('+')}" if deviation else write(mean)


def against(task: Task, configuration: Configuration) -> str:
    """The difference to the reference with its interval and n."""
    if configuration is task.reference:
        return "reference"
    return _gaps(task.gaps(configuration))


def _apart(task: Task, values: Mapping[int, float]) -> str:
    """The difference of values by seed to the reference."""
    return _gaps(paired_gaps(values, task.reference.by_seed("best") if task.reference else {}))


def _gaps(gaps: Sequence[float]) -> str:
    if not gaps:
        return NONE
    mean, half = difference(gaps)
    return f"{mean:+.4f}" + (f" ± {half:.4f}" if half is not None else "") + f" (n {len(gaps)})"


def overview(tasks: Sequence[Task]) -> list[Table]:
    """Methods × tasks: best values, and differences to the reference."""
    methods = sorted({method for task in tasks for method in task.shown})
    titles = [f"{task.name}, {metric_name(task.metric)}" for task in tasks]
    best = [[m, *(_standing(task, m) for task in tasks)] for m in methods]
    gaps = [[m, *(_gap(task, m) for task in tasks)] for m in methods]
    chosen = (
        "A method with several configurations of a task is there with one of them: of those with "
        "the most seeds, the one with the best mean; “1 of 4” says so, and the task's own table "
        "has all. A winner of many single runs is flattered by having been chosen."
    )
    tables = [
        Table(
            "Methods and tasks",
            "Best value of the main metric over training: mean ± standard deviation over n seeds. "
            + chosen,
            ["method", *titles],
            best,
        )
    ]
    if any(cell not in (NONE, "reference") for row in gaps for cell in row[1:]):
        note = (
            "Best value less the reference's with the same seed: mean ± half of the 95 % interval "
            "by Student's t over the n seeds both have; one seed has no interval."
        )
        tables.append(Table("Paired differences", note, ["method", *titles], gaps))
    return tables


def _standing(task: Task, method: str) -> str:
    if method not in task.shown:
        return NONE
    shown = task.shown[method]
    values = list(shown.by_seed("best").values())
    among = sum(c.method == method for c in task.configurations)
    more = f", 1 of {among}" if among > 1 else ""
    return f"{spread(values)} (n {len(values)}{more})" if values else NONE


def _gap(task: Task, method: str) -> str:
    return against(task, task.shown[method]) if method in task.shown else NONE


def of_task(task: Task) -> Table:
    """Every configuration of a task in a row of its own."""
    used = [column for column in COLUMNS if any(c.by_seed(column[1]) for c in task.configurations)]
    rows = []
    for c in task.configurations:
        cells = [c.label, str(len(c.runs))]
        cells += [spread(list(c.by_seed(name).values())) for name in ("last", "best")]
        cells.append(against(task, c))
        cells += [spread(list(c.by_seed(name).values()), write) for _, name, write in used]
        rows.append(cells)
    metric = metric_name(task.metric)
    compared = task.reference.label if task.reference else "nothing"
    header = ["configuration", "n", f"last {metric}", f"best {metric}", "difference"]
    return Table(
        task.name,
        "A row is a configuration: runs that differ in nothing but the seed. Mean ± standard "
        f"deviation over n seeds; differences of best values are to {compared}, paired by seed, "
        "± half of their 95 % interval. Seconds, speed and memory are of the machines named under "
        "the figures; TFLOP/s are the matrix products that training needs, counted, over its "
        "seconds.",
        header + [title for title, _, _ in used],
        rows,
    )


def of_figures(
    title: str, note: str, task: Task, columns: Sequence[tuple[str, str, Callable[[float], str]]]
) -> Table | None:
    """A table of other figures, of the configurations that have the first of them."""
    rows = []
    for c in task.configurations:
        if c.by_seed(columns[0][1]):
            values = [spread(list(c.by_seed(name).values()), write) for _, name, write in columns]
            rows.append([c.label, str(len(c.by_seed(columns[0][1]))), *values])
    header = ["configuration", "n", *(name for name, _, _ in columns)]
    return Table(f"{title}: {task.name}", note, header, rows) if rows else None


def calibration(task: Task) -> Table | None:
    """What `--calibration` measures."""
    note = "Expected calibration error over 15 bins, negative log-likelihood and entropy in nats."
    return of_figures("Calibration", note, task, CALIBRATION)


def forgetting(task: Task) -> Table | None:
    """What `--forgetting` measures."""
    note = "The rise of the language-model loss on other text, in nats per scored token."
    return of_figures("Forgetting", note, task, FORGETTING)


def cuts(task: Task) -> Table | None:
    """What adapters are worth after a cut, with the difference to the reference's runs."""
    rows = []
    for c in task.shown.values():
        curves = {run.seed: run.budget_curve for run in c.runs if run.budget_curve}
        budgets = curves[min(curves)]["budgets"] if curves else []
        for place, budget in enumerate(budgets):
            cells = [c.label, f"{budget:,}"]
            for rule in CUT_RULES:
                values = {seed: curve[rule]["values"][place] for seed, curve in curves.items()}
                cells += [spread(list(values.values())), _apart(task, values)]
            rows.append(cells)
    heads = [word for words in CUT_RULES.values() for word in (words, "difference")]
    note = "Mean ± standard deviation over seeds; differences are to the runs of the reference."
    header = ["configuration", "singular values left", *heads]
    return Table(f"Cut after training: {task.name}", note, header, rows) if rows else None


def areas(task: Task) -> Table | None:
    """Areas under the rank curves."""
    columns = tuple(
        (title, name, "{:.4f}".format if name.startswith("aurac") else "{:g}".format)
        for title, name in (
            ("AURAC, linear", "aurac_linear"),
            ("AURAC, log₂ rank", "aurac_log2"),
            ("best rank", "best_rank"),
            ("smallest rank within tolerance", "smallest_rank"),
        )
    )
    note = "The area under the metric over the rank, divided by the ranks' range."
    return of_figures("Ranks", note, task, columns)
