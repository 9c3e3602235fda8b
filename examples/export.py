"""Writes a run's adapter at lower ranks: for PEFT, or merged into the model for Transformers.

    python -m examples.export RUN --rank 4 --out DIR           # every matrix at rank 4
    python -m examples.export RUN --rank_budget 48 --out DIR   # the 48 largest singular values
    python -m examples.export RUN --energy 0.95 --out DIR      # those with 95 % of the squares
    python -m examples.export RUN --curve --out DIR            # the metric over the budget

RUN is the folder of a finished run, of any method whose adapter is W + s·B A, or PEFT's folder of
one; for --merged and --curve a run of `examples.run_glue`. A nested adapter (--method dylora) at a
rank is the one that it was trained to be; every other cut keeps the largest singular values.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from examples import program
from examples.errors import OptionError, RunError, as_user_error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "examples.export", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or an adapter's")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--rank", type=int, help="of every matrix")
    what.add_argument("--rank_budget", type=int, help="singular values of all matrices together")
    what.add_argument("--energy", type=float, help="share of the sum of all squares, above 0 to 1")
    what.add_argument("--curve", action="store_true", help="the metric at every budget")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--merged", action="store_true", help="a whole model, not an adapter")
    parser.add_argument("--model_name_or_path", help="where the pretrained model is now")
    return parser


def main(argv: Sequence[str]) -> int:
    """The program; the words after its name."""
    o = _parser().parse_args(argv)
    if o.out.exists():
        raise RunError(f"--out {o.out} exists: choose another folder")
    if o.curve and o.merged:
        raise OptionError("--curve writes no model: leave --merged out")
    from examples.program.budget_curve import print_curve
    from examples.program.exporting import export_cut, export_nested, is_nested
    from examples.program.finished_run import FinishedRun

    nested = o.rank is not None and as_user_error(is_nested, o.run)
    run = None
    if o.merged or o.curve or nested:
        run = FinishedRun(o.run, o.model_name_or_path)
    if o.curve:
        as_user_error(print_curve, run, o.out)
    elif nested:
        as_user_error(export_nested, run, o.rank, o.out, o.merged)
        print(f"rank {o.rank} of {o.run}: {o.out}")
    else:
        left = as_user_error(export_cut, o.run, _rule(o), o.out, run if o.merged else None)
        print(f"{left}: {o.out}")
    return 0


def _rule(o: argparse.Namespace) -> Callable[..., dict[str, int]]:
    from peft_custom.tuners.lora import rank_cut

    if o.rank is not None:
        return partial(rank_cut.by_rank, rank=o.rank)
    if o.rank_budget is not None:
        return partial(rank_cut.by_budget, budget=o.rank_budget)
    return partial(rank_cut.by_energy, share=o.energy)


if __name__ == "__main__":
    sys.exit(program.run_main(main))
