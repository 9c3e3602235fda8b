"""Run folders, read and nothing else. What cannot be used is named, never dropped."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.data.tasks import TASKS
from examples.data.tasks.choice import CHOICE_TASKS
from examples.errors import RunError
from examples.sweeps.ledger import RUNS
from examples.training.file_names import (
    BUDGET_CURVE,
    CONFIG,
    ENVIRONMENT,
    LOG,
    MASK_SHARES,
    METRICS,
    NOT_PART_OF_A_RUN,
    PROOF,
    RANK_CURVE,
    RESULTS,
)

Row = dict[str, Any]
RESULT_FOLDERS = ("adapter", "model")  # one of them holds what a run has learnt
MARK = "report.json"  # what proves a folder to be a report's
SMALLER = ("loss", "nll", "ece", "perplexity", "entropy", "TER")  # the smaller the better


class Unusable(Exception):
    """Why a folder cannot be in the report."""


@dataclass
class Run:
    """One finished run.

    Attributes:
        folder: where it is.
        name: the folder as the report calls it: relative to what was asked for.
        config: its options.
        results: `all_results.json`.
        environment: `env.json`; empty where there is none.
        metrics: lines of `metrics.jsonl`.
        log: lines of `log.jsonl`.
        rank_curve: `rank_curve.json`, or None.
        masks: `mask_shares.json`, module -> mean of its mask; empty without masks.
        budget_curve: `budget_curve.json` of a folder inside it, or None.
        variant: what the sweep that did it calls its method; "" where it was no sweep.
        metric: its main metric, such as `eval_f1`; "" where it was not evaluated.
        file_bytes: of what it has learnt, without tokenizer and read-me; None where it is gone.
        notes: parts of it that could not be read.
    """

    folder: Path
    name: str
    config: Row
    results: Row
    environment: Row = field(default_factory=dict)
    metrics: list[Row] = field(default_factory=list)
    log: list[Row] = field(default_factory=list)
    rank_curve: Row | None = None
    masks: Row = field(default_factory=dict)
    budget_curve: Row | None = None
    variant: str = ""
    metric: str = ""
    file_bytes: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def method(self) -> str:
        """What it is compared as: its method, or the sweep's word for it."""
        return self.variant or self.config["method"]

    @property
    def seed(self) -> int:
        return self.config.get("seed", 0)

    @property
    def task(self) -> str:
        """The name of its task, or of the data that it was trained on."""
        names = ("task_name", "dataset_name", "train_file", "validation_file")
        found = next((self.config[n] for n in names if self.config.get(n)), "no task")
        return found if self.config.get("task_name") else Path(str(found)).name

    @property
    def options(self) -> dict[str, str]:
        """What tells its configuration from others: each option as JSON, the seed left out."""
        left_out = {*NOT_PART_OF_A_RUN, "seed"}
        return {n: json.dumps(v) for n, v in sorted(self.config.items()) if n not in left_out}

    @property
    def scored(self) -> list[Row]:
        """The evaluations that have the main metric."""
        return [row for row in self.metrics if number(row.get(self.metric)) is not None]

    @property
    def best(self) -> float | None:
        """The best value of the main metric over training."""
        values = [row[self.metric] for row in self.scored]
        if not values:
            return number(self.results.get(self.metric))
        return min(values) if smaller_is_better(self.metric) else max(values)

    @property
    def last(self) -> float | None:
        """The last value of the main metric."""
        rows = self.scored
        return rows[-1][self.metric] if rows else number(self.results.get(self.metric))

    def figure(self, name: str) -> float | None:
        """A number of the run: `best`, `last`, `file_bytes`, or one of its results."""
        if name in ("best", "last", "file_bytes"):
            return getattr(self, name)
        value = number(self.results.get(name))
        return number(self.results.get(f"eval_{name}")) if value is None else value


@dataclass
class Found:
    """All that was read.

    Attributes:
        runs: in the order of their names.
        budget_curves: name of the folder -> `budget_curve.json` of `examples.export --curve`, of
            folders that are in no run.
        skipped: name of the folder -> why it is not in the report.
    """

    runs: list[Run] = field(default_factory=list)
    budget_curves: dict[str, Row] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def number(value: Any) -> float | None:
    """The value, if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if math.isfinite(value) else None


def smaller_is_better(name: str) -> bool:
    """Whether a metric of that name is a loss."""
    return name.endswith(SMALLER)


def read(
    places: Sequence[Path], metric: str | None = None, peak_tflops: float | None = None
) -> Found:
    """All runs in and below `places`.

    Args:
        places: folders.
        metric: the main metric of all of them, with or without `eval_`; None: each run's own.
        peak_tflops: what the machine of all runs could do at most, in 10¹² operations a second.

    Raises:
        RunError: one of the places is no folder.
    """
    found = Found()
    for place in places:
        if not place.is_dir():
            raise RunError(f"{place}: no such folder; name folders of runs, or one above them")
        for folder in _folders(place):
            inside = folder.relative_to(place).as_posix()
            name = inside if len(places) == 1 and inside != "." else str(place / inside)
            _add(found, folder, Path(name).as_posix(), metric)
    for sweep in {run.folder.parent for run in found.runs}:
        words = _words_of_a_sweep(sweep)
        for run in (run for run in found.runs if run.folder.parent == sweep):
            run.variant = words.get(run.folder.name, "")
    for run in found.runs:
        _add_speed(run.results, peak_tflops)
    return _without_copies(found)


def _folders(place: Path) -> Iterator[Path]:
    """Folders that may be a run's, in the order of their paths; not those inside a run's result."""
    for path, folders, files in os.walk(place):
        here = Path(path)
        looks = {CONFIG, RESULTS, METRICS, ENVIRONMENT, BUDGET_CURVE} & {*files}
        folders.sort()
        if looks & {RESULTS, METRICS, ENVIRONMENT}:
            own = (*RESULT_FOLDERS, "submission", "plots", ".replaced")
            folders[:] = [n for n in folders if n not in own and not n.startswith("checkpoint-")]
        if looks and MARK not in files:
            yield here


def _add(found: Found, folder: Path, name: str, metric: str | None) -> None:
    try:
        if (folder / BUDGET_CURVE).is_file():
            curve = _checked_curve(_object(folder / BUDGET_CURVE))
            if found.runs and found.runs[-1].folder in folder.parents:
                found.runs[-1].budget_curve = curve
            else:
                found.budget_curves[name] = curve
            return
        found.runs.append(_run(folder, name, metric))
    except Unusable as error:
        found.skipped[name] = str(error)


def _checked_curve(curve: Row) -> Row:
    try:
        for rule in ("global", "uniform"):
            pairs = zip(curve["budgets"], curve[rule]["values"], strict=True)
            if any(number(v) is None for pair in pairs for v in pair):
                raise ValueError
            number(curve[rule]["aurac_linear"])
        str(curve["metric"])
    except (KeyError, TypeError, ValueError):
        raise Unusable(f"{BUDGET_CURVE} is not as examples.export writes it") from None
    return curve


def _run(folder: Path, name: str, metric: str | None) -> Run:
    if not (folder / CONFIG).exists():
        raise Unusable(f"damaged: it has no {CONFIG}")
    config = _object(folder / CONFIG)
    if not config.keys() >= PROOF:
        raise Unusable(f"no run's: its {CONFIG} is something else's, such as a model's")
    if not isinstance(config["method"], str) or not isinstance(config.get("seed", 0), int):
        raise Unusable(f"damaged: method or seed in {CONFIG} are not what a run writes")
    if not (folder / RESULTS).exists():
        raise Unusable(f"unfinished: it has no {RESULTS}")
    run = Run(folder, name, config, _object(folder / RESULTS))
    run.file_bytes = _bytes_learnt(folder)
    parts = {"environment": ENVIRONMENT, "rank_curve": RANK_CURVE, "masks": MASK_SHARES}
    for part, file in parts.items():
        try:
            if (folder / file).exists():
                setattr(run, part, _object(folder / file))
            elif file == ENVIRONMENT:
                run.notes.append(f"{file} is missing")
        except Unusable as error:
            run.notes.append(str(error))
    if any(number(share) is None for share in run.masks.values()):
        run.notes.append(f"damaged: {MASK_SHARES} holds something else than numbers")
        run.masks = {}
    run.metrics, run.log = (_lines(folder / file, run.notes) for file in (METRICS, LOG))
    run.metric = _main_metric(run, metric)
    return run


def _add_speed(results: Row, peak_tflops: float | None) -> None:
    """Matrix products per second of training, and their share of what the machine could do."""
    work, time = (number(results.get(name)) for name in ("train_flops", "train_seconds"))
    if work is None or not time or time < 0:
        return
    results["tflops_per_second"] = work / time / 1e12
    if peak_tflops is not None:
        results["arithmetic_share"] = results["tflops_per_second"] / peak_tflops


def _words_of_a_sweep(folder: Path) -> dict[str, str]:
    """Name of a run's folder -> the sheet's word for its method, of the sweep in `folder`."""
    words = {}
    try:
        for line in (folder / RUNS).read_text("utf-8").splitlines():
            row = json.loads(line)
            words[row["folder"]] = str(row["labels"]["method"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        pass  # no sweep, or one without methods: a run's own is used
    return words


def _object(path: Path) -> Row:
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Unusable(f"damaged: {path.name} cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise Unusable(f"damaged: {path.name} holds a {type(values).__name__}, not an object")
    return values


def _lines(path: Path, notes: list[str]) -> list[Row]:
    """The rows of a .jsonl file up to the first one that cannot be read."""
    rows: list[Row] = []
    if not path.exists():
        return rows
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read ({error})")
        return rows
    for place, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or number(row.get("step")) is None:
            notes.append(f"{path.name}: line {place} of {len(lines)} and what follows left out")
            break
        rows.append(row)
    return rows


def _bytes_learnt(folder: Path) -> int | None:
    """Bytes of the weights in the run's result and of what belongs to them."""
    for name in RESULT_FOLDERS:
        files = [p for p in (folder / name).glob("*") if p.suffix in (".safetensors", ".bin")]
        if files:
            return sum(path.stat().st_size for path in files)
    return None


def _main_metric(run: Run, asked: str | None) -> str:
    """What chose the run's best weights. Older runs did not write it: then it is their task's, or
    else the first metric that is no loss."""
    there = [n for rows in (run.metrics[-1:], [run.results]) for row in rows for n in row]
    there = [name for name in there if name.startswith("eval_")]
    name = asked or run.results.get("main_metric") or run.config.get("metric_for_best_model")
    if not isinstance(name, str):
        task = TASKS.get(run.task) or CHOICE_TASKS.get(run.task)
        others = [n for n in there if not smaller_is_better(n)]
        name = task.main_metric if task is not None else (others or ["eval_loss"])[0]
    name = name.removeprefix("eval_")
    if f"eval_{name}" in there:
        return f"eval_{name}"
    return next((n for n in there if n.endswith(f"_{name}")), "")


def _without_copies(found: Found) -> Found:
    """Of several runs with the same options and seed one counts: they are no independent draws."""
    first: dict[tuple[str, int], Run] = {}
    for run in found.runs:
        key = (json.dumps(run.options), run.seed)
        if key in first:
            found.skipped[run.name] = f"the same options and seed as {first[key].name}"
        else:
            first[key] = run
    found.runs = list(first.values())
    return found
