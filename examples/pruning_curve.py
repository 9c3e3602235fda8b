"""Draws a metric of finished runs over their density and over the time of their compacted models.

    python -m examples.pruning_curve RUN [RUN ...] --metric f1 --out curve.png

Runs of one method and structure are one line; runs that prune nothing stand at 100 %. Runs that
differ in nothing but the seed are one point, their mean, with their standard deviation. Models are
timed in turn on one thread, without their heads, on rows without padding; --no_latency leaves that
out. The numbers are written beside the picture, as curve.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples import program
from examples.errors import OptionError, RunError, as_user_error
from examples.training.file_names import NOT_PART_OF_A_RUN

if TYPE_CHECKING:
    from examples.plots.density import Point

DENSE = "dense"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "examples.pruning_curve", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--metric", required=True, help="of all_results.json, such as f1")
    parser.add_argument("--out", type=Path, required=True, help="the picture, a new PNG")
    parser.add_argument("--model_name_or_path", help="where the pretrained model is now")
    parser.add_argument("--batch", type=int, default=8, help="rows that are timed at once")
    parser.add_argument("--length", type=int, default=128, help="their tokens")
    parser.add_argument("--rounds", type=int, default=5, help="of which the median is taken")
    parser.add_argument("--no_latency", action="store_true", help="time nothing")
    return parser


def read(run: Path, metric: str) -> dict[str, Any]:
    """A run's label, density, metric, and base.

    Raises:
        RunError: it has not ended, or has no such metric.
    """
    try:
        options = json.loads((run / "config.json").read_text("utf-8"))
        results = json.loads((run / "all_results.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{run} is no finished run: {error}") from None
    value = results.get(metric, results.get(f"eval_{metric}"))
    if not isinstance(value, (int, float)):
        names = [name for name, v in results.items() if isinstance(v, (int, float))]
        raise OptionError(f"--metric {metric}: {run} has none; it has {', '.join(names)}")
    density = results.get("density")
    parts = [options["method"]]
    if density is not None:
        parts += [options["mask_structure"], options["pruning_method"]]
    return {
        "run": str(run), "label": ", ".join(parts), "density": 1.0 if density is None else density,
        "pruned": density is not None, "value": value, "base": options["model_name_or_path"],
        "options": {n: v for n, v in options.items() if n not in {*NOT_PART_OF_A_RUN, "seed"}},
    }  # fmt: skip


def measure(rows: list[dict[str, Any]], o: argparse.Namespace) -> None:
    """Adds `milliseconds` to every row."""
    from examples.program.encoder_time import compact_model, dense_model, milliseconds

    bases = {row["base"] for row in rows}
    if o.model_name_or_path is None and len(bases) > 1:
        raise RunError(
            f"the runs are of different models ({', '.join(sorted(bases))}): times do not compare; "
            "choose runs of one, or add --no_latency"
        )
    base = o.model_name_or_path or rows[0]["base"]
    models = {DENSE: dense_model(base)}
    for row in rows:
        if row["pruned"]:
            models[row["run"]] = compact_model(Path(row["run"]) / "adapter", base)
    found = milliseconds(models, o.batch, o.length, o.rounds)
    for row in rows:
        row["milliseconds"] = round(found[row["run"] if row["pruned"] else DENSE], 3)


def points(rows: Iterable[dict[str, Any]]) -> dict[str, list[Point]]:
    """Label -> its points, a mean for every set of runs that only their seeds tell apart."""
    from examples.plots.density import Point

    alike: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        alike.setdefault((row["label"], json.dumps(row["options"])), []).append(row)
    series: dict[str, list[Point]] = {}
    for (label, _), own in alike.items():
        mean = {
            name: statistics.mean(row[name] for row in own)
            for name in ("density", "value", "milliseconds")
            if name in own[0]
        }
        spread = statistics.stdev(row["value"] for row in own) if len(own) > 1 else 0.0
        series.setdefault(label, []).append(Point(**mean, spread=spread))
    return series


def main(argv: Sequence[str]) -> int:
    """The program; the words after its name."""
    o = _parser().parse_args(argv)
    numbers = o.out.with_suffix(".json")
    if o.out.suffix != ".png" or o.out.exists() or numbers.exists():
        raise OptionError(f"--out {o.out}: give a new .png, beside which {numbers} is new as well")
    for name in ("batch", "length", "rounds"):
        if getattr(o, name) < 1:
            raise OptionError(f"--{name} {getattr(o, name)}: at least 1")
    rows = [read(run, o.metric) for run in o.runs]
    if not o.no_latency:
        as_user_error(measure, rows, o)
    from examples.plots.density import pruning_curve

    for row in rows:
        time = f"{row['milliseconds']:10.1f} ms" if "milliseconds" in row else ""
        print(f"{row['run']:40} {row['density']:8.2%} {row['value']:10.4f}{time}")
    what = "" if o.no_latency else f"; {o.batch} × {o.length} tokens, one thread"
    title = f"{o.metric} of {len(rows)} runs{what}"
    as_user_error(pruning_curve, o.out, points(rows), o.metric, title)
    numbers.write_text(json.dumps(rows, indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(program.run_main(main))
