"""What the studies (methods × tasks × seeds) share: tasks' metrics, options, tables, pictures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from examples.sweeps.drawing import dots
from examples.sweeps.records import Row, read

METRIC = {
    "mrpc": "f1", "cola": "matthews_correlation", "stsb": "pearson", "sst2": "accuracy",
    "arc_easy": "accuracy",
}  # fmt: skip
RESULTS = Path(__file__).resolve().parents[1] / "results"


def options(doc: str, name: str) -> argparse.ArgumentParser:
    """The options that every study has; unknown ones are for `examples.run_glue`.

    Args:
        doc: of the study, for --help.
        name: of the study; its rows are `results/<name>.jsonl`.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of the pretrained model (MiniLM)")
    parser.add_argument("--data_dir", help="folder of the GLUE task folders")
    parser.add_argument("--seeds", default=[0, 1, 2], type=lambda t: [*map(int, t.split(","))])
    default = RESULTS / f"{name}.jsonl"
    parser.add_argument("--out", type=Path, default=default, help="one line per run")
    parser.add_argument("--table", action="store_true", help="print the tables and stop")
    return parser


def comma_separated(text: str) -> list[str]:
    return text.split(",")


def carry_out(
    parser: argparse.ArgumentParser,
    go: Callable[[argparse.Namespace], None],
    table: Callable[[list[Row]], str],
    plot: Callable[[list[Row], Path], None] | None = None,
) -> None:
    """Parses the command line, does the runs that are missing, and prints the tables or draws."""
    if plot is not None:
        parser.add_argument("--plot", type=Path, help="draw into this PNG and stop")
    o, o.more = parser.parse_known_args()
    if plot is not None and o.plot is not None:
        plot(read(o.out), o.plot)
        return
    if not o.table:
        if not o.model or not o.data_dir:
            parser.error("--model and --data_dir are needed (or --table, for the runs there are)")
        o.out.parent.mkdir(parents=True, exist_ok=True)
        go(o)
    print(table(read(o.out)))


def markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    every = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in every)


def best_rate(rows: Iterable[Row], task: str, rates: Sequence[float], what: str) -> float:
    """The learning rate whose last weights were best on the task.

    Args:
        rows: one run per rate.
        task: whose metric decides.
        rates: all that are to be tried.
        what: names the runs where some are missing.
    """
    tried = {row["rate"]: row["final"][METRIC[task]] for row in rows}
    if len(tried) < len(rates):
        raise SystemExit(f"--part tune has not all runs of {what} yet: do it first")
    return max(tried, key=lambda rate: tried[rate])


def metrics_of(rows: Iterable[Row], part: str, task: str, **key: object) -> dict[int, float]:
    """seed -> the task's metric of the run that has `key`."""
    wanted = {"part": part, "task": task, **key}
    return {r["seed"]: r["final"][METRIC[task]] for r in rows if wanted.items() <= r.items()}


def draw_methods(axes: Any, rows: Sequence[Row], epochs: dict[str, int], methods: Any) -> None:
    """Part `main`: every task into its own axes, its methods side by side."""
    for own, (task, count) in zip(axes, epochs.items(), strict=True):
        found = {method: metrics_of(rows, "main", task, method=method) for method in methods}
        dots(own, {method: list(values.values()) for method, values in found.items()})
        own.set_title(f"{task}, {count} epochs", fontsize="medium")
        own.set_ylabel(METRIC[task].replace("_", " "))
