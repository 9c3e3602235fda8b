"""Writes what a run has learnt for others: an adapter for PEFT, or a whole model; cut, if asked.

    python -m examples.export RUN --to peft --out DIR          # the adapter as PEFT's LoRA
    python -m examples.export RUN --to merged --out DIR        # the whole model, any method
    python -m examples.export RUN --to hf --out DIR            # the same; runs without adapter too
    python -m examples.export RUN --to compact --out DIR       # without the heads and units that
                                                               # a pruning run's masks took out
    python -m examples.export RUN --rank 4 --out DIR           # every matrix at rank 4
    python -m examples.export RUN --rank_budget 48 --out DIR   # the 48 largest singular values
    python -m examples.export RUN --energy 0.95 --out DIR      # those with 95 % of the squares
    python -m examples.export RUN --curve --out DIR            # the metric over the budget

RUN is the folder of a finished run, of any method whose adapter is W + s·B A where it is cut, or
PEFT's folder of one; for cuts with --merged and for --curve a run of `examples.run_glue`. A nested
adapter (--method dylora) at a rank is the one that it was trained to be; every other cut keeps the
largest singular values. --push_to_hub NAME uploads what was written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from examples import program
from examples.errors import OptionError, RunError, as_user_error

FORMS = ("peft", "merged", "hf", "compact")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "examples.export", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or an adapter's")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--rank", type=int, help="of every matrix")
    what.add_argument("--rank_budget", type=int, help="singular values of all matrices together")
    what.add_argument("--energy", type=float, help="share of the sum of all squares, above 0 to 1")
    what.add_argument("--curve", action="store_true", help="the metric at every budget")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument(
        "--to",
        choices=FORMS,
        help="an adapter for PEFT (the default of a cut), "
        "a whole model, or one without what masks took out",
    )
    parser.add_argument("--merged", action="store_true", help="the same as --to merged")
    parser.add_argument(
        "--push_to_hub",
        metavar="NAME",
        help="upload the result to this hub "
        "repository, such as me/adapter, made private where it is new",
    )
    parser.add_argument("--model_name_or_path", help="where the pretrained model is now")
    return parser


def main(argv: Sequence[str]) -> int:
    """The program; the words after its name."""
    o = _parser().parse_args(argv)
    if o.out.exists():
        raise RunError(f"--out {o.out} exists: choose another folder")
    if o.push_to_hub and o.curve:
        raise OptionError("--push_to_hub uploads adapters and models: leave --curve out")
    upload = _uploader(o.push_to_hub) if o.push_to_hub else None
    _write(o)
    if upload is not None:
        print(f"uploaded: {upload(o.out)}")
    return 0


def _uploader(name: str) -> Callable[[Path], str]:
    """Imported only where one is asked for."""
    from examples.program.uploading import uploader

    return uploader(name)


def _write(o: argparse.Namespace) -> None:
    """Writes what is asked for into `o.out`, and says what it is."""
    cut = o.rank is not None or o.rank_budget is not None or o.energy is not None
    _refuse(o, cut)
    if not cut and not o.curve and o.to != "peft":
        print(f"{_whole(o)}: {o.out}")
        return
    from examples.program.budget_curve import print_curve
    from examples.program.exporting import export_cut, export_nested, is_nested
    from examples.program.finished_run import FinishedRun

    merged = o.to in ("merged", "hf")
    nested = (o.rank is not None or not cut) and as_user_error(is_nested, o.run)
    run = None
    if merged or o.curve or nested:
        run = FinishedRun(o.run, o.model_name_or_path)
    if o.curve:
        as_user_error(print_curve, run, o.out)
    elif nested:
        rank = run.options.method_options.lora_r if o.rank is None else o.rank
        as_user_error(export_nested, run, rank, o.out, merged)
        print(f"rank {rank} of {o.run}: {o.out}")
    else:
        left = as_user_error(export_cut, o.run, _rule(o), o.out, run if merged else None)
        print(f"{left}: {o.out}")


def _refuse(o: argparse.Namespace, cut: bool) -> None:
    """Options that do not go together; settles `o.to`."""
    if o.curve and (o.merged or o.to):
        raise OptionError("--curve writes no model: leave --merged out, and --to")
    if o.merged and o.to not in (None, "merged"):
        raise OptionError(f"--merged is --to merged, but --to is {o.to}: give one of them")
    if o.merged:
        o.to = "merged"
    if o.to is None and not cut and not o.curve:
        raise OptionError(f"say what to write: --to {', '.join(FORMS)}, or a cut such as --rank 4")
    if cut and o.to == "compact":
        raise OptionError("--to compact: a cut of ranks takes no heads or units out; leave it out")


def _whole(o: argparse.Namespace) -> str:
    """Writes a whole model of the run as it is; what it is."""
    from examples.program.whole_models import export_full, export_whole

    if o.to == "hf" and (o.run / "model").is_dir():
        return export_full(o.run, o.out)
    return as_user_error(export_whole, o.run, o.model_name_or_path, o.out, o.to == "compact")


def _rule(o: argparse.Namespace) -> Callable[..., dict[str, int]]:
    from peft_custom.tuners.lora import rank_cut

    if o.rank is not None:
        return partial(rank_cut.by_rank, rank=o.rank)
    if o.rank_budget is not None:
        return partial(rank_cut.by_budget, budget=o.rank_budget)
    return partial(rank_cut.by_energy, share=1.0 if o.energy is None else o.energy)


if __name__ == "__main__":
    sys.exit(program.run_main(main))
