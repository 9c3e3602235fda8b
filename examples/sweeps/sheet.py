"""The file of a sweep: what its runs share, and what is varied.

    program: run_glue                # of examples/, or a module of yours with `options_of(words)`
    output_dir: runs/glue            # of the sweep; every run has a folder in it
    options: {num_train_epochs: 3}   # of every run
    grid:                            # every combination is a run
      task_name: [mrpc, {task_name: cola, num_train_epochs: 8}]
      method: [lora, {label: wide, method: lora, lora_r: 64}]
      seed: [0, 1, 2]
    rows: {file: runs.xlsx}          # as many runs, or times as many: examples.sweeps.rows
    search: {options: {learning_rate: [1e-4, 1e-3]}}   # examples.sweeps.search
    then: {cut: "examples.export {run} --curve --out {out}"}   # after each run, in its folder

A value of the grid may be a mapping: options that change together, and `label` (its name in tables
and folders), `program`, `then`, and `search` (other values to try for the same options).
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from examples.errors import OptionError
from examples.sweeps.rows import read_rows

KEYS = ("program", "output_dir", "options", "grid", "rows", "search", "then", "ray", "slurm")
OWN = ("label", "program", "then", "search")  # of a value of the grid, beside options

Values = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """A place of the grid: one run, or with a search one cell of it for each place but the seed.

    Attributes:
        program: as the sheet names it.
        options: of the program.
        labels: axis -> the word for its value.
        then: name -> command after the run.
        tried: option -> values or range, of a search.
    """

    program: str
    options: Values
    labels: dict[str, str]
    then: dict[str, str] = field(default_factory=dict)
    tried: Values = field(default_factory=dict)


@dataclass(frozen=True)
class Sheet:
    """A sweep's file, read.

    Attributes:
        path: the file, for errors.
        output_dir: the sweep's folder.
        points: every place of the grid; with a search those of its seeds are left out.
        seeds: of the winners of a search.
        search: its mapping, or None.
        ray: what a run needs on Ray.
        slurm: parameters of submitit.
    """

    path: Path
    output_dir: Path
    points: list[Point]
    seeds: list[Any]
    search: Values | None = None
    ray: Values = field(default_factory=dict)
    slurm: Values = field(default_factory=dict)


def read_sheet(path: Path, more: Mapping[str, Any], output_dir: Path | None = None) -> Sheet:
    """Reads the file.

    Args:
        path: the file.
        more: options of every run, from the command line.
        output_dir: instead of the file's.

    Raises:
        OptionError: what is wrong in it, and where.
    """
    values = _load(path)
    refuse_unknown(values, KEYS, str(path))
    for name in ("options", "grid", "then", "ray", "slurm"):
        values[name] = _mapping(values.get(name), f"{path}: {name}")
    where = output_dir or values.get("output_dir")
    if not where:
        raise OptionError(f"{path}: output_dir is missing: name the sweep's folder")
    search = values.get("search")
    if search is not None:
        search = _mapping(search, f"{path}: search")
    grid = {name: _axis(name, entries, path) for name, entries in values["grid"].items()}
    seeds = [values["options"].get("seed", 0)]
    if search is not None and "seed" in grid:
        seeds = grid.pop("seed")
        if any(isinstance(seed, dict) for seed in seeds):
            raise OptionError(f"{path}: grid: seed: whole numbers are needed for a search")
    rows = [({}, {})]
    if "rows" in values:
        rows = [({"row": word}, row) for word, row in read_rows(values["rows"], path)]
    points = [
        _point(values, labels, row, dict(zip(grid, chosen, strict=True)), more, search, path)
        for (labels, row), chosen in itertools.product(rows, itertools.product(*grid.values()))
    ]
    folder = Path(where).expanduser()
    return Sheet(path, folder, points, seeds, search, values["ray"], values["slurm"])


def choose(sheet: Sheet, only: Iterable[str]) -> Sheet:
    """Some places of the grid.

    Args:
        sheet: all of them.
        only: `axis=label,label` of each axis by which to choose.

    Raises:
        OptionError: there is no such axis, or no such label on it.
    """
    points = sheet.points
    for choice in only:
        axis, _, labels = choice.partition("=")
        wanted = labels.split(",")
        known = list(dict.fromkeys(p.labels[axis] for p in sheet.points if axis in p.labels))
        if not known:
            axes = dict.fromkeys(axis for point in sheet.points for axis in point.labels)
            hint = f"choose among {', '.join(axes)}" if axes else "the file has no grid"
            raise OptionError(f"{sheet.path}: --only {choice}: there is no axis {axis!r}; {hint}")
        if missing := [label for label in wanted if label not in known]:
            raise OptionError(
                f"{sheet.path}: --only {choice}: {axis} has no {missing[0]!r}; it has "
                f"{', '.join(known)}"
            )
        points = [point for point in points if point.labels.get(axis) in wanted]
    return replace(sheet, points=points)


def _load(path: Path) -> Values:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(f"{path}: cannot be read ({reason})") from error
    except yaml.YAMLError as error:
        raise OptionError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    return _mapping(values, str(path))


def _mapping(value: Any, where: str) -> Values:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise OptionError(f"{where}: lines of the form `name: value` are expected")
    return dict(value)


def refuse_unknown(values: Iterable[str], known: Iterable[str], where: str) -> None:
    """One error for a key that means nothing, with what is close to it."""
    known = list(known)
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise OptionError(f"{where}: there is no key {name!r}; {hint}")


def _axis(name: str, entries: Any, path: Path) -> list[Any]:
    if not isinstance(entries, list) or not entries:
        raise OptionError(f"{path}: grid: {name}: a list of values is needed, such as [1, 2]")
    return [_mapping(e, f"{path}: grid: {name}") if isinstance(e, dict) else e for e in entries]


def _point(
    values: Values,
    labels: dict[str, str],
    row: Values,
    chosen: Values,
    more: Mapping[str, Any],
    search: Values | None,
    path: Path,
) -> Point:
    """The common options, then the row's, then the axes' in their order, then the typed ones."""
    merged = {"program": values.get("program"), **values["options"], **row}
    labels, then = dict(labels), dict(values["then"])
    tried = {} if search is None else _mapping(search.get("options"), f"{path}: search: options")
    for axis, entry in chosen.items():
        labels[axis] = _word(axis, entry)
        if not isinstance(entry, dict):
            merged[axis] = entry
            continue
        merged.update({name: value for name, value in entry.items() if name != "label"})
        then |= _mapping(merged.pop("then", None), f"{path}: grid: {axis}: then")
        tried |= _mapping(merged.pop("search", None), f"{path}: grid: {axis}: search")
    merged |= more
    program = merged.pop("program")
    if not isinstance(program, str):
        raise OptionError(f"{path}: program is missing: name one, such as run_glue")
    if tried and search is None:
        raise OptionError(f"{path}: a value of the grid has `search`, but the file has none")
    return Point(program, merged, labels, then, tried)


def _word(axis: str, entry: Any) -> str:
    """What a value of an axis is called."""
    if not isinstance(entry, dict):
        return ",".join(map(str, entry)) if isinstance(entry, list) else str(entry)
    if "label" in entry:
        return str(entry["label"])
    return str(entry.get(axis, "-".join(str(v) for n, v in entry.items() if n not in OWN)))
