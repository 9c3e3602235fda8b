"""The workbook of published pruning runs: its rows, and how one of them is found.

`hparams/hyperparameters.xlsx` has a sheet each for SQuAD, MNLI and QQP. Row 2 holds the names of
the columns, by which cells are found; blank rows separate groups, and a blank cell is an option
that is not given. A row is known by its number; its EXP ID names a group, whose swept value is `*`.
"""

from __future__ import annotations

import difflib
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from examples.errors import DataError, OptionError

SHEETS = {"squad": "Details - SQuAD", "mnli": "Details - MNLI", "qqp": "Details - QQP"}
RESULTS = {  # names of the results, in the order of the columns
    "squad": ("EM", "F1"),
    "mnli": ("acc", "ent", "acc", "ent"),
    "qqp": ("acc", "acc&f1", "ent", "f1"),
}
CODE, KEY, MODEL, EXP_ID = "code", "key", "Model", "EXP ID"
REMAINING = "Effective encoder remain weights %"
SETTINGS = (
    "per_gpu_train_batch_size", "warmup_steps", "num_train_epochs", "max_seq_length",
    "learning_rate", "mask_scores_learning_rate", "initial_threshold", "final_threshold",
    "initial_warmup", "final_warmup", "pruning_method", "mask_init", "mask_scale",
    "regularization", "final_lambda", "teacher_type", "teacher_name_or_path", "alpha_ce",
    "alpha_distil", "num_splopa_prototypes", "splopa_prototype_rank", "splopa_init_range",
)  # fmt: skip
SPLOPA = ("num_splopa_prototypes", "splopa_prototype_rank", "splopa_init_range")
MARKER = "Marker"
HEADER = 2  # the row with the names
SHARES_BELOW = 0.9  # what is left stands as a share (0.3) or in percent (30, one of them 0.99947)


@dataclass(frozen=True)
class Row:
    """One published run.

    Attributes:
        sheet: squad, mnli or qqp.
        number: of the row, as spreadsheets count.
        code: of the criterion: B1 magnitude, C2 L0, D1 movement, E2 soft movement; empty: dense.
        model: the group's name.
        exp_id: what the runs of a group share.
        remaining: what is left of the encoder's weights, as it stands there; None: not given.
        results: published ones, name and value, where there are any.
        settings: option -> value, of the cells that are not blank.
        marked: its Marker is `*`.
    """

    sheet: str
    number: int
    code: str
    model: str
    exp_id: str
    remaining: float | None
    results: tuple[tuple[str, float], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    marked: bool = False

    @property
    def prunes(self) -> bool:
        """Whether it has masks; the first row of a sheet is the whole model."""
        return "pruning_method" in self.settings

    @property
    def percent(self) -> float | None:
        """What is left, in percent."""
        if self.remaining is None:
            return None if self.prunes else 100.0
        return self.remaining * 100 if self.remaining < SHARES_BELOW else self.remaining

    @property
    def ranks_all(self) -> bool:
        """One ranking for all matrices; the sheets have no column that says so."""
        return "_global" in self.exp_id

    @property
    def distilled(self) -> bool:
        """Whether it has a teacher."""
        return "teacher_name_or_path" in self.settings

    def __str__(self) -> str:
        """One line of a list."""
        left = "     –" if self.percent is None else f"{self.percent:6.2f}"
        swept = [f"{s}={self.settings[n]:g}" for n, s in SWEPT.items() if n in self.settings]
        results = " ".join(f"{name} {value:.4g}" for name, value in self.results)
        return (
            f"row {self.number:<3} {self.code or '–':3} {left} %  {' '.join(swept):22} "
            f"{results}  {self.exp_id}"
        )


SWEPT = {"final_threshold": "τ", "final_lambda": "λ", "num_splopa_prototypes": "K"}


# -- reading ------------------------------------------------------------------------------------


def displaced(settings: Mapping[str, Any]) -> bool:
    """Whether the cells of SPLoPA repeat the teacher: so it is in MNLI's distilled rows."""
    name = settings.get("num_splopa_prototypes")
    return name is not None and name == settings.get("teacher_name_or_path")


def find_workbook(path: Path) -> Path:
    """The file; `.xslx`, as the original's README spells it, is `.xlsx`.

    Raises:
        DataError: there is none.
    """
    other = path.with_suffix(".xlsx") if path.suffix == ".xslx" else path
    found = next((p for p in (path, other) if p.is_file()), None)
    if found is None:
        raise DataError(f"{other}: no such workbook; scripts/make_workbook.py writes it")
    return found


def read_workbook(path: Path, sheet: str) -> list[Row]:
    """The rows of a sheet that have an EXP ID.

    Args:
        path: of the workbook.
        sheet: squad, mnli or qqp.

    Raises:
        DataError: openpyxl or the file is missing, or there is something in it that is not known.
    """
    path = find_workbook(path)
    cells = _cells(path, SHEETS[sheet])
    if len(cells) < HEADER:
        raise DataError(f"{path}, {SHEETS[sheet]}: row {HEADER} should hold the columns' names")
    columns = _columns(cells[HEADER - 1], f"{path}, {SHEETS[sheet]}", sheet)
    rows, model = [], ""
    for number, values in enumerate(cells[HEADER:], HEADER + 1):
        given = {i: v for i, v in enumerate(values) if v is not None and v != ""}
        model = str(given.get(columns[MODEL][0], model))  # of the whole group
        if columns[EXP_ID][0] in given:
            where = f"{path}, {SHEETS[sheet]}, row {number}"
            rows.append(_row(sheet, number, model, given, columns, where))
    return rows


def _cells(path: Path, title: str) -> list[tuple[Any, ...]]:
    if find_spec("openpyxl") is None:
        raise DataError(
            f"reading {path.name} needs openpyxl: pip install openpyxl (the extra `data` has it)"
        )
    import openpyxl
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        book = openpyxl.load_workbook(path, data_only=True)
    except (InvalidFileException, zipfile.BadZipFile, KeyError, ValueError, OSError) as error:
        raise DataError(f"{path}: cannot be read as a workbook ({error})") from error
    if title not in book.sheetnames:
        raise DataError(f"{path}: no sheet {title!r}; there are {', '.join(book.sheetnames)}")
    return list(book[title].values)


def _columns(header: Sequence[Any], where: str, sheet: str) -> dict[str, list[int]]:
    """Name -> places; results may share a name.

    Raises:
        DataError: a name is unknown, missing or there twice.
    """
    found: dict[str, list[int]] = {}
    for i, name in enumerate(header):
        if name is not None and str(name).strip():
            found.setdefault(str(name).strip(), []).append(i)
    known = {CODE, KEY, MODEL, EXP_ID, REMAINING, MARKER, *SETTINGS, *RESULTS[sheet]}
    if unknown := [name for name in found if name not in known]:
        raise DataError(f"{where}: unknown column {unknown[0]!r} in row {HEADER}")
    if missing := [name for name in (MODEL, EXP_ID, REMAINING) if name not in found]:
        raise DataError(f"{where}: row {HEADER} has no column {missing[0]!r}")
    twice = [n for n, places in found.items() if len(places) > 1 and n not in RESULTS[sheet]]
    if twice:
        raise DataError(f"{where}: column {twice[0]!r} is there twice")
    return found


def _row(
    sheet: str,
    number: int,
    model: str,
    given: Mapping[int, Any],
    columns: Mapping[str, list[int]],
    where: str,
) -> Row:
    def cell(name: str) -> Any:
        return given.get(columns[name][0]) if name in columns else None

    settings = {name: cell(name) for name in SETTINGS if cell(name) is not None}
    if displaced(settings):
        settings = {name: value for name, value in settings.items() if name not in SPLOPA}
    places = sorted({i for name in RESULTS[sheet] for i in columns.get(name, ()) if i in given})
    names = {i: name for name in RESULTS[sheet] for i in columns.get(name, ())}
    for name in (REMAINING, *SWEPT):
        if cell(name) is not None and (name not in SETTINGS or name in settings):
            _number(cell(name), f"{where}, {name}")
    left = cell(REMAINING)
    return Row(
        sheet=sheet,
        number=number,
        code=str(cell(CODE) or ""),
        model=model,
        exp_id=str(cell(EXP_ID)),
        remaining=None if left is None else float(left),
        results=tuple((names[i], _number(given[i], f"{where}, {names[i]}")) for i in places),
        settings=settings,
        marked=cell(MARKER) == "*",
    )


def _number(value: Any, where: str) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    raise DataError(f"{where}: {value!r} is not a number")


# -- choosing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """What the rows that are meant have in common; None where it does not matter.

    Attributes:
        exp_id: their group.
        remaining: what is left of the weights: `30.05`, `30.05%` or `0.3005`.
        num_prototypes: K; 0: no SPLoPA.
        final_lambda: λ.
        numbers: of rows.
        marked: their Marker is `*`.
    """

    exp_id: str | None = None
    remaining: str | None = None
    num_prototypes: int | None = None
    final_lambda: float | None = None
    numbers: tuple[int, ...] = ()
    marked: bool = False

    @property
    def empty(self) -> bool:
        """Nothing is asked for."""
        return self == Selection()


def select(rows: Sequence[Row], wanted: Selection, several: bool = False) -> list[Row]:
    """The rows that are meant.

    Args:
        rows: of a sheet.
        wanted: what they have in common.
        several: there may be more than one; rows that are named or marked may anyway.

    Raises:
        OptionError: there is none, or more than one; the message lists those that come close.
    """
    kept = list(rows)
    for option, keep in _criteria(wanted):
        found = keep(kept)
        if not found:
            raise OptionError(f"no row has {option}; {_candidates(kept, wanted)}")
        kept = found
    if lacking := sorted({*wanted.numbers} - {row.number for row in kept}):
        raise OptionError(f"no row has --row {lacking[0]}; {_candidates(rows, wanted)}")
    if len(kept) > 1 and not (several or wanted.numbers or wanted.marked):
        raise OptionError(
            f"{len(kept)} rows are meant; name one by --row, --remaining, --num_prototypes or "
            f"--final_lambda, or take --all of them:\n{listed(kept)}"
        )
    return kept


def _criteria(wanted: Selection) -> list[tuple[str, Any]]:
    """The option as it was given, and what it keeps of a list of rows."""
    found: list[tuple[str, Any]] = []

    def add(text: str, keep: Any) -> None:
        found.append((text, keep))

    w = wanted
    if w.numbers:
        add(
            f"--row {','.join(map(str, w.numbers))}",
            lambda rows: [row for row in rows if row.number in w.numbers],
        )
    if w.marked:
        add("--marked (a Marker *)", lambda rows: [row for row in rows if row.marked])
    if w.exp_id is not None:
        add(f"--exp_id {w.exp_id}", lambda rows: [row for row in rows if row.exp_id == w.exp_id])
    for name, value in (
        ("num_prototypes", w.num_prototypes),
        ("final_lambda", w.final_lambda),
    ):
        if value is not None:
            column = "num_splopa_prototypes" if name == "num_prototypes" else name
            lacks = 0 if name == "num_prototypes" else None
            add(
                f"--{name} {value:g}",
                lambda rows, c=column, v=value, lacks=lacks: [
                    row for row in rows if row.settings.get(c, lacks) == v
                ],
            )
    if w.remaining is not None:
        add(f"--remaining {w.remaining}", lambda rows: with_remaining(rows, str(w.remaining)))
    return found


def with_remaining(rows: Iterable[Row], text: str) -> list[Row]:
    """The rows with so much left, to the digits given: below 1 a share, else percent.

    `0.3` is first what rounds to 30 %, and where there is no such row, to 0.3.

    Raises:
        OptionError: it is no number from 0 to 100.
    """
    rows = list(rows)
    try:
        given = Decimal(text.strip().removesuffix("%"))
        if not given.is_finite() or not 0 <= given <= 100:
            raise InvalidOperation
    except InvalidOperation:
        raise OptionError(
            f"--remaining {text}: give percent such as 30.05, or a share such as 0.3005"
        ) from None
    scale = 100 if given < 1 and "%" not in text else 1
    half = Decimal(5).scaleb(int(given.as_tuple().exponent) - 1) * scale  # of the last digit
    for tolerance in (min(half, Decimal("0.5")), half):
        found = [
            row
            for row in rows
            if row.percent is not None
            and abs(Decimal(row.percent) - given * scale) <= tolerance + Decimal("1e-9")
        ]
        if found:
            return found
    return [row for row in rows if row.remaining == float(given)]  # MNLI's 0.999465471912209 %


def listed(rows: Iterable[Row]) -> str:
    """One line for each."""
    return "\n".join(f"  {row}" for row in rows)


def _candidates(rows: Sequence[Row], wanted: Selection) -> str:
    ids = list(dict.fromkeys(row.exp_id for row in rows))
    if wanted.exp_id is not None and wanted.exp_id not in ids:
        near = difflib.get_close_matches(wanted.exp_id, ids, len(ids), 0.5) or ids
        return "EXP IDs are:\n" + "\n".join(f"  {name}" for name in near)
    return f"there are:\n{listed(rows)}"
