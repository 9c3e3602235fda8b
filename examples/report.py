"""Reads the folders of many runs and writes what they say: tables, curves, Pareto plots.

    python -m examples.report RUNS --output DIR
    python -m examples.report RUNS --output DIR --pareto parameters,metric --pareto seconds,ece

RUNS are folders of runs, or folders above them; nothing else is read. DIR gets report.html, one
page that needs nothing beside it, report.md with its figures, configurations.csv and runs.csv. Runs
that differ in nothing but the seed are averaged; whatever cannot be read is named in the report.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from examples import program
from examples.errors import OptionError

PARETO = ("parameters,metric",)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "examples.report", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUNS", help="folders with runs")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR",
        help="a new folder, or that of an earlier report, which is replaced",
    )  # fmt: skip
    parser.add_argument("--reference", metavar="METHOD", help="what others are compared with")
    parser.add_argument("--metric", help="of all tasks; otherwise what chose a run's best weights")
    parser.add_argument(
        "--pareto", action="append", metavar="X,Y",
        help="axes of a Pareto plot, of each task; may be given again. Any figure of "
        "all_results.json, or metric, last, parameters, seconds, tokens, tflops, memory, size, "
        f"share (default {PARETO[0]})",
    )  # fmt: skip
    parser.add_argument(
        "--peak_tflops", type=float, metavar="X",
        help="10¹² operations a second that the machine can do in the runs' dtype: adds the share "
        "of this limit that training reached",
    )  # fmt: skip
    parser.add_argument("--latex", action="store_true", help="the tables as report.tex too")
    parser.add_argument("--title", default="Comparison of runs", help="of the page")
    return parser


def main(argv: Sequence[str]) -> int:
    """The program; the words after its name."""
    o = _parser().parse_args(argv)
    pairs = [_axes(text) for text in o.pareto or PARETO]
    if o.peak_tflops is not None and not 0 < o.peak_tflops < float("inf"):
        raise OptionError(f"--peak_tflops {o.peak_tflops:g}: a number above 0")
    from examples.reporting.content import gather
    from examples.reporting.folder import ReportFolder
    from examples.reporting.runs import read

    folder = ReportFolder(o.output.expanduser())
    found = read([place.expanduser() for place in o.runs], o.metric, o.peak_tflops)
    for name, why in found.skipped.items():
        print(f"left out: {name}: {why}", file=sys.stderr)
    folder.refuse_empty(found)
    content = gather(found, o.title, o.reference, pairs)
    folder.write(content, o.latex)
    print(f"{content.counts[:-1]}: {folder.path / 'report.html'}")
    return 0


def _axes(text: str) -> tuple[str, str]:
    words = [word.strip() for word in text.split(",")]
    if len(words) != 2 or not all(words):
        raise OptionError(
            f"--pareto {text}: two names with a comma between them, such as {PARETO[0]}"
        )
    return words[0], words[1]


if __name__ == "__main__":
    sys.exit(program.run_main(main))
