"""Runs a grid of programs x methods x tasks x seeds, tunes options first if asked, resumes.

    python -m examples.sweep sweeps/tiny.yaml
    python -m examples.sweep sweeps/minilm_glue.yaml --model_name_or_path DIR --data_dir DIR
    python -m examples.sweep sweeps/minilm_glue.yaml --only task_name=sst2 --only method=lora,full
    python -m examples.sweep FILE.yaml --launcher ray --address auto

FILE.yaml is described in examples/sweeps/sheet.py. Every run is a process with a folder of its own,
named by the content of its options: what is done is skipped, what was interrupted goes on from its
last checkpoint, what fails is tried once more. Any other `--option value` is one of every run.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from examples import program
from examples.errors import OptionError
from examples.sweeps.engine import Engine, Fixed, Plan
from examples.sweeps.jobs import make_job
from examples.sweeps.launchers import LAUNCHERS, make_launcher
from examples.sweeps.ledger import SUMMARY, Ledger
from examples.sweeps.progress import Board
from examples.sweeps.search import Search
from examples.sweeps.sheet import Sheet, choose, read_sheet
from examples.training.claim import Claim


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "examples.sweep", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("file", type=Path, metavar="FILE.yaml", help="the sweep")
    parser.add_argument("--output_dir", type=Path, help="the sweep's folder, not the file's")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="local", help="where runs happen")
    parser.add_argument("--lanes", type=int, help="runs at a time; default: GPUs, else cores")
    parser.add_argument("--address", help="of a Ray cluster; default: one on this machine")
    parser.add_argument(
        "--only", action="append", default=[], metavar="AXIS=LABEL,…",
        help="those places of the grid alone; once for every axis",
    )  # fmt: skip
    parser.add_argument("--dry_run", action="store_true", help="print the commands and stop")
    return parser


def main(argv: Sequence[str]) -> int:
    """The program; the words after its name."""
    o, words = _parser().parse_known_args(argv)
    if o.lanes is not None and o.lanes < 1:
        raise OptionError(f"--lanes {o.lanes}: at least 1 is needed")
    sheet = read_sheet(o.file, _options(words), o.output_dir)
    if o.only:
        sheet = choose(sheet, o.only)
    plan = _plan(sheet)
    if o.dry_run:
        for job in plan.preview():
            print(shlex.join(job.command))
        return 0
    claim = Claim(sheet.output_dir)
    claim.take()
    try:
        return _carry_out(sheet, plan, o)
    finally:
        claim.release()


def _options(words: Sequence[str]) -> dict[str, Any]:
    """`--name value`, `--name=value` and `--switch` -> options; their programs check them."""
    found: dict[str, Any] = {}
    rest = list(words)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            raise OptionError(f"{name!r} belongs to no option; options begin with --")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        found[name[2:].replace("-", "_")] = value
    return found


def _plan(sheet: Sheet) -> Plan:
    """Which runs there are; all of them are parsed here, before anything starts."""
    if sheet.search is not None:
        by = sheet.search.get("by", "grid")
        if by not in ("grid", "optuna"):
            raise OptionError(f"{sheet.path}: search: by: {by}: choose among grid, optuna")
        if by == "grid":
            return Search(sheet)
        from examples.sweeps.sampling import optuna_sampler

        return Search(sheet, partial(optuna_sampler, sheet))
    jobs = [make_job(point, sheet.output_dir, str(sheet.path)) for point in sheet.points]
    names: dict[str, str] = {}
    for job in jobs:
        words = " ".join(job.labels.values())
        if job.name in names:
            raise OptionError(f"{sheet.path}: {words}: the same run as {names[job.name]}")
        names[job.name] = words
    return Fixed(jobs)


def _carry_out(sheet: Sheet, plan: Plan, o: argparse.Namespace) -> int:
    ledger = Ledger(sheet.output_dir)
    board = Board(ledger.seconds())
    clusters = {"address": o.address, "ray": sheet.ray, "slurm": sheet.slurm}
    launcher = partial(make_launcher, o.launcher, o.lanes, sheet.output_dir, **clusters)
    engine = Engine(plan, ledger, board, launcher)
    interrupted = False
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        engine.run()
    except KeyboardInterrupt:
        interrupted = True
    ledger.summarize(list(engine.outcomes.values()))
    _report(engine, plan, sheet)
    if interrupted:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 1 if any(run["status"] == "failed" for run in engine.outcomes.values()) else 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _report(engine: Engine, plan: Plan, sheet: Sheet) -> None:
    """What became of everything: the search's table, the failed runs, and how many there were."""
    if isinstance(plan, Search):
        print(f"\ntried (*: chosen):\n{plan.table()}")
    for run in engine.outcomes.values():
        if run["status"] == "failed":
            print(f"\nfailed: {run['folder']}; its log ends:", file=sys.stderr)
            print("\n".join(f"    {line}" for line in run["log_tail"]), file=sys.stderr)
    counts = ", ".join(f"{count} {status}" for status, count in engine.board.counts.items())
    left = engine.unsettled()
    print(f"\n{counts or 'nothing'}{f', {left} to be done' if left else ''}; ", end="")
    print(f"runs in {sheet.output_dir}, this call's in {sheet.output_dir / SUMMARY}")


if __name__ == "__main__":
    sys.exit(program.run_main(main))
