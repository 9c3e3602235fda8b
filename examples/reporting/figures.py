"""The figures of a report: which runs' numbers go into which chart."""

from __future__ import annotations

import base64
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from examples.errors import OptionError
from examples.reporting import module_maps
from examples.reporting.groups import Task
from examples.reporting.runs import Run, number, smaller_is_better
from examples.reporting.svg import Point, Series, chart, heat_map, strips
from examples.reporting.tables import CUT_RULES, metric_name
from examples.training.file_names import BUDGET_CURVE, PLOTS

MOST_POINTS = 150  # of a curve of losses
SHORT = {  # names on the command line -> names in a run
    "metric": "best",
    "parameters": "trainable_parameters",
    "seconds": "train_seconds",
    "memory": "peak_memory_bytes",
    "size": "file_bytes",
    "tokens": "tokens_per_second",
    "tflops": "tflops_per_second",
    "share": "arithmetic_share",
}
LARGER = (
    "tokens_per_second",
    "tflops_per_second",
    "arithmetic_share",
    "aurac_linear",
    "aurac_log2",
)
COSTS = ("_seconds", "_bytes", "_parameters", "_share", "_weights", "_kept", "_bits", "rank")
COSTS += ("density", "forgetting", "_before", "_after", "steps", "tokens", "epochs", "epoch")


@dataclass
class Figure:
    """A chart or a picture.

    Attributes:
        name: of its file, without the ending.
        title: what it shows.
        note: how to read it.
        svg: the chart; "" where it is a picture.
        png: the picture, where a run drew it itself.
        runs: whose numbers it shows.
        others: folders that are no runs, whose numbers it shows.
    """

    name: str
    title: str
    note: str
    svg: str
    runs: list[Run]
    png: bytes = b""
    others: list[str] = field(default_factory=list)

    @property
    def file(self) -> str:
        return f"{self.name}.{'png' if self.png else 'svg'}"

    @property
    def base64(self) -> str:
        return base64.b64encode(self.png).decode("ascii")


class Figures:
    """Makes all of them.

    Args:
        tasks: from `tasks_of`.
        pareto: pairs of axes.
    """

    def __init__(self, tasks: Sequence[Task], pareto: Sequence[tuple[str, str]]) -> None:
        self.tasks, self.pareto = tasks, pareto
        methods = sorted({c.method for task in tasks for c in task.configurations})
        self.colours: Mapping[str, int] = {method: i for i, method in enumerate(methods)}

    def of(self, task: Task) -> list[Figure]:
        """The figures of a task; kinds that have nothing to show are not there."""
        plain = (self.seeds, self.learning, self.losses, self.rates, self.rank_curves, self.cuts)
        found = [figure for make in plain for figure in make(task)]
        for name, title in (("ece", "Calibration"), ("forgetting", "Forgetting")):
            found += self.scatter(task, name, "metric", f"{title} and metric", front=False)
        for x, y in self.pareto:
            found += self.scatter(task, x, y, f"Pareto: {y} over {x}", front=True)
        return [*found, *self.heat_maps(task), *self.mask_maps(task), *self.pictures(task)]

    def seeds(self, task: Task) -> Iterator[Figure]:
        """The best metric of every run, methods below each other; the best mean on top."""
        rows = [(method, [*c.by_seed("best").values()]) for method, c in task.shown.items()]
        rows = [row for row in rows if row[1]]
        if not any(len(values) > 1 for _, values in rows) or len(rows) < 2:
            return
        sign = 1 if _smaller(task, "best") else -1
        rows.sort(key=lambda row: sign * statistics.mean(row[1]))
        name = task.reference.method if task.reference else ""
        line = next((statistics.mean(values) for method, values in rows if method == name), None)
        title, metric = f"Methods: {task.name}", metric_name(task.metric)
        note = "A ring is a run, a bar the mean over seeds."
        note += f" Dashed: the mean of {name}." if line is not None else ""
        runs = [run for c in task.shown.values() for run in c.runs]
        svg = strips(rows, f"best {metric}", line, title)
        yield Figure(f"seeds-{_file(task.name)}", title, note, svg, runs)

    def learning(self, task: Task) -> Iterator[Figure]:
        """The main metric over epochs, mean over seeds."""
        series, runs = [], []
        for method, c in task.shown.items():
            points = _mean_curve([_points(run.scored, run.metric) for run in c.runs])
            if points:
                runs += [run for run in c.runs if run.scored]
                series.append(Series(c.label, points, self.colours[method]))
        if series:
            yield self._chart(
                task, "learning", "Learning curves", _curves_note(task), series, "epoch", runs
            )

    def losses(self, task: Task) -> Iterator[Figure]:
        """The training loss over epochs, mean over seeds."""
        series, runs = [], []
        for method, c in task.shown.items():
            curves = [
                _points(run.log, "loss") or _points(run.metrics, "train_loss") for run in c.runs
            ]
            points = _thinned(_mean_curve(curves))
            if points:
                runs += [run for run, curve in zip(c.runs, curves, strict=True) if curve]
                series.append(Series(c.label, points, self.colours[method], markers=False))
        if series:
            svg = chart(series, "epoch", "training loss", title=f"Training loss, {task.name}")
            title = f"Training loss: {task.name}"
            note = _curves_note(task)
            yield Figure(f"loss-{_file(task.name)}", title, note, svg, runs)

    def rates(self, task: Task) -> Iterator[Figure]:
        """The best metric over the learning rate, of every method."""
        points: dict[str, dict[str, list[Point]]] = defaultdict(lambda: defaultdict(list))
        runs: list[Run] = []
        for c in task.configurations:
            rate, values = number(c.runs[0].config.get("learning_rate")), c.by_seed("best")
            if rate and rate > 0 and values:
                others = _without(c.label, "learning_rate")
                points[c.method][others].append((rate, statistics.mean(values.values())))
                runs += c.runs
        rates = {x for curves in points.values() for own in curves.values() for x, _ in own}
        if len(rates) < 2:
            return
        series = [
            Series(label, own, self.colours[method])
            for method, curves in points.items()
            for label, own in curves.items()
        ]
        series = _told_apart(series)
        note = "Best value, mean over the seeds there are; a method tried at one rate is one point."
        yield self._chart(
            task, "rate", "Metric over learning rate", note, series, "learning rate", runs, True
        )

    def rank_curves(self, task: Task) -> Iterator[Figure]:
        """The metric over the rank an adapter is cut to."""
        series, runs = [], []
        for c in task.compared:
            own = [run for run in c.runs if run.rank_curve]
            curves = [_ranks(run.rank_curve or {}, run.metric) for run in own]
            points = _mean_curve(curves)
            if points:
                area = c.mean("aurac_linear")
                label = f"{c.label}, AURAC {area:.4f}" if area is not None else c.label
                runs += [run for run, curve in zip(own, curves, strict=True) if curve]
                series.append(Series(label, points, self.colours[c.method]))
        if series:
            series = _told_apart(series)
            note = "Mean over seeds. AURAC: area under the curve over the rank, linear."
            yield self._chart(task, "ranks", "Rank curves", note, series, "rank", runs)

    def cuts(self, task: Task) -> Iterator[Figure]:
        """The metric over what a cut after training leaves, of every method's shown runs."""
        series, runs = [], []
        for method, c in task.shown.items():
            own = [run for run in c.runs if run.budget_curve]
            for rule, words in CUT_RULES.items():
                points = _mean_curve([_budgets(run.budget_curve or {}, rule) for run in own])
                if points:
                    colour, dashed = self.colours[method], rule != next(iter(CUT_RULES))
                    series.append(Series(f"{method}, {words}", points, colour, dashed=dashed))
            runs += own
        if series:
            note, x = "Mean over seeds.", "singular values of all matrices together"
            yield self._chart(task, "cuts", "Cut after training", note, series, x, runs)

    def scatter(self, task: Task, x: str, y: str, title: str, front: bool) -> Iterator[Figure]:
        """Configurations by two figures, and the front of those that none beats in both.

        Args:
            task: whose.
            x: the figure across.
            y: the figure upwards.
            title: what the two have to say.
            front: draw it.
        """
        names = SHORT.get(x, x), SHORT.get(y, y)
        places = {}
        for c in task.compared:
            values = [c.mean(name) for name in names]
            if None not in values:
                places[c.label] = (c, (values[0], values[1]))
        if not places:
            return
        series = [
            Series(
                method,
                [point for c, point in places.values() if c.method == method],
                colour,
                line=False,
                names=[label for label, (c, _) in places.items() if c.method == method],
            )
            for method, colour in self.colours.items()
            if any(c.method == method for c, _ in places.values())
        ]
        words = [_title(task, name) for name in names]
        signs = [-1 if _smaller(task, name) else 1 for name in names]
        left_out, trials = len(task.compared) - len(places), len(task.configurations)
        trials -= len(task.compared)
        note = "Means over seeds."
        if trials:
            note += f" Left out: {trials} with fewer seeds than others of their method."
        if left_out:
            note += f" {left_out} of {len(task.compared)} configurations have no such figures."
        if front:
            best = pareto_front([point for _, point in places.values()], signs)
            series.insert(0, Series("front", best, 7, markers=False, dashed=True))
            better = ["smaller" if sign < 0 else "larger" for sign in signs]
            note += f" Better is {better[0]} {words[0]} and {better[1]} {words[1]}. On the front: "
            note += "; ".join(label for label, (_, p) in places.items() if p in best) + "."
        log = min(p[0] for _, p in places.values()) > 0 and _wide([p for _, p in places.values()])
        svg = chart(series, words[0], words[1], log_x=log, title=f"{title}, {task.name}")
        runs = [run for c, _ in places.values() for run in c.runs]
        name = f"{'pareto' if front else 'scatter'}-{_file(x)}-{_file(y)}-{_file(task.name)}"
        yield Figure(name, f"{title}: {task.name}", note, svg, runs)

    def heat_maps(self, task: Task) -> Iterator[Figure]:
        """Ranks by layer and module, of configurations whose matrices differ in it."""
        for c in task.shown.values():
            found = [(run, module_maps.ranks(run.folder)) for run in c.runs]
            found = [(run, ranks) for run, ranks in found if ranks]
            if len({rank for _, ranks in found for rank in ranks.values()}) < 2:
                continue
            runs = [run for run, _ in found]
            rows, columns, cells = module_maps.grid([ranks for _, ranks in found])
            highest = max(v for row in cells for v in row if v is not None)
            title = f"Ranks of {c.label}: {task.name}"
            svg = heat_map(rows, columns, cells, highest, title)
            total = statistics.mean(sum(ranks.values()) for _, ranks in found)
            note = f"Mean over {len(runs)} seed(s), layer × module; {total:.0f} in all."
            name = f"heat-{_file(c.method)}-{_file(task.name)}"
            yield Figure(name, title, note, svg, runs)

    def mask_maps(self, task: Task) -> Iterator[Figure]:
        """What masks keep, by layer and module."""
        for c in task.shown.values():
            runs = [run for run in c.runs if run.masks]
            if not runs:
                continue
            rows, columns, cells = module_maps.grid([run.masks for run in runs])
            title = f"Masks of {c.label}: {task.name}"
            percent = [[None if v is None else round(100 * v) for v in row] for row in cells]
            note = f"Mean of the final masks over {len(runs)} seed(s), layer × module, in per cent."
            svg = heat_map(rows, columns, percent, 100, title)
            yield Figure(f"masks-{_file(c.method)}-{_file(task.name)}", title, note, svg, runs)

    def pictures(self, task: Task) -> Iterator[Figure]:
        """What runs with `--plots` drew: masks and the like, of the first seed that did."""
        for c in task.shown.values():
            for run in c.runs:
                drawn = sorted((run.folder / PLOTS).glob("*.png"))
                for path in drawn:
                    title = f"{path.stem.replace('_', ' ').capitalize()} of {c.label}: {task.name}"
                    name = f"{_file(path.stem)}-{_file(c.method)}-{_file(task.name)}"
                    note = f"Drawn by the run with seed {run.seed}."
                    yield Figure(name, title, note, "", [run], path.read_bytes())
                if drawn:
                    break

    def _chart(
        self,
        task: Task,
        name: str,
        title: str,
        note: str,
        series: Sequence[Series],
        x_label: str,
        runs: list[Run],
        log_x: bool = False,
    ) -> Figure:
        """A chart of the task's main metric."""
        whole = f"{title}: {task.name}"
        svg = chart(series, x_label, metric_name(task.metric), log_x=log_x, title=whole)
        return Figure(f"{name}-{_file(task.name)}", whole, note, svg, runs)


def budget_curve(name: str, content: Mapping) -> Figure:
    """The metric over what a cut leaves of an adapter, from `examples.export --curve`."""
    series = [
        Series(
            f"{words}, area {content[rule]['aurac_linear']:.4f}",
            _budgets(content, rule),
            i,
            dashed=bool(i),
        )
        for i, (rule, words) in enumerate(CUT_RULES.items())
    ]
    metric = metric_name(content["metric"])
    svg = chart(series, "singular values of all matrices together", metric, title=name)
    note = f"Read from {BUDGET_CURVE}, which names no versions and no machine."
    return Figure(
        f"budget-{_file(name)}", f"Cut after training: {name}", note, svg, [], b"", [name]
    )


def check_axes(tasks: Sequence[Task], pareto: Sequence[tuple[str, str]]) -> None:
    """Refuses axes that no run has.

    Raises:
        OptionError: the message lists those there are.
    """
    runs = [run for task in tasks for c in task.configurations for run in c.runs]
    known = {"metric", "best", "last", *SHORT}
    known |= {n for run in runs for n, v in run.results.items() if number(v) is not None}
    known |= {name.removeprefix("eval_") for name in known}
    for name in (name for pair in pareto for name in pair):
        if name not in known:
            raise OptionError(f"--pareto {name}: the runs have {', '.join(sorted(known))}")


def pareto_front(points: Sequence[Point], signs: Sequence[int]) -> list[Point]:
    """The points that none beats: no other is as good in both figures and better in one.

    Args:
        points: any.
        signs: of each figure, 1 where more is better, −1 where less is.
    """

    def beats(a: Point, b: Point) -> bool:
        gains = [sign * (p - q) for sign, p, q in zip(signs, a, b, strict=True)]
        return min(gains) >= 0 and max(gains) > 0

    return sorted({p for p in points if not any(beats(other, p) for other in points)})


def _smaller(task: Task, name: str) -> bool:
    if name in ("best", "last"):
        return smaller_is_better(task.metric)
    if name in LARGER:
        return False
    return smaller_is_better(name) or name.endswith(COSTS)


def _title(task: Task, name: str) -> str:
    if name in ("best", "last"):
        return f"{name} {metric_name(task.metric)}"
    return name.removeprefix("eval_").replace("_", " ")


def _points(rows: Sequence[Mapping], name: str) -> list[Point]:
    pairs = [(number(row.get("epoch")), number(row.get(name))) for row in rows]
    return [(x, y) for x, y in pairs if x is not None and y is not None]


def _mean_curve(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """The mean over seeds at every x that all of them have."""
    curves = [curve for curve in curves if curve]
    if not curves:
        return []
    values = [dict(curve) for curve in curves]
    shared = sorted(set.intersection(*({*own} for own in values)))
    return [(x, statistics.mean(own[x] for own in values)) for x in shared]


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Means of neighbours, so that a long log stays small."""
    size = -(-len(points) // MOST_POINTS) if points else 1
    chunks = [points[i : i + size] for i in range(0, len(points), size)]
    return [
        (statistics.mean(x for x, _ in own), statistics.mean(y for _, y in own)) for own in chunks
    ]


def _ranks(curve: Mapping, metric: str) -> list[Point]:
    ranks, values = curve.get("ranks"), curve.get(metric) or curve.get(str(curve.get("metric")))
    if not isinstance(ranks, list) or not isinstance(values, list) or len(ranks) != len(values):
        return []
    pairs = [(number(x), number(y)) for x, y in zip(ranks, values, strict=True)]
    return [(x, y) for x, y in pairs if x is not None and y is not None]


def _budgets(curve: Mapping, rule: str) -> list[Point]:
    return list(zip(curve["budgets"], curve[rule]["values"], strict=True))


def _curves_note(task: Task) -> str:
    left_out = len(task.configurations) - len(task.shown)
    note = "Mean over seeds, at the epochs that all of them have."
    if left_out:
        note += f" One configuration of each method; {left_out} others are in the task's table."
    return note


def _told_apart(series: Sequence[Series]) -> list[Series]:
    """The colours of the methods; where one has several series, a colour for each of all."""
    if len({s.colour for s in series}) == len(series):
        return list(series)
    return [replace(s, colour=i) for i, s in enumerate(series)]


def _without(label: str, option: str) -> str:
    return ", ".join(word for word in label.split(", ") if not word.startswith(f"{option} "))


def _wide(points: Sequence[Point]) -> bool:
    xs = [x for x, _ in points]
    return max(xs) > 20 * min(xs)


def _file(name: str) -> str:
    """A part of a file's name."""
    return "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in name)
