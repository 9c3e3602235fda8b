#!/usr/bin/env python3
"""Writes hparams/hyperparameters.xlsx from a table of its rows, the same bytes every time.

    python scripts/make_workbook.py TABLE.tsv [--output hparams/hyperparameters.xlsx]

The table has a line per published run: sheet, row, code, Model, EXP ID, what remains of the
encoder's weights, up to four results in the sheet's order, and the settings by their names.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from examples.errors import DataError, UserError  # noqa: E402
from examples.sweeps.workbook import (  # noqa: E402
    CODE,
    EXP_ID,
    HEADER,
    KEY,
    MARKER,
    MODEL,
    REMAINING,
    RESULTS,
    SETTINGS,
    SHEETS,
    SPLOPA,
    Row,
    displaced,
)

NEEDED = ("sheet", "row", CODE, MODEL, EXP_ID, REMAINING, *SETTINGS)
CAPTIONS = {  # over the first column of a group
    CODE: "seed=92",
    "learning_rate": "Learning Rate",
    "initial_threshold": "Scheduling",
    "pruning_method": "Pruning",
    "regularization": "Regularization",
    "teacher_type": "Distillation",
    "num_splopa_prototypes": "SPLoPA",
}
ABOUT = (
    ("EXP ID", "a group of runs; * is the value that they sweep"),
    (REMAINING, "in percent, or below 0.9 as a share"),
    ("code", "B1 magnitude, C2 L0, D1 movement (topK), E2 soft movement, D4 movement ranked over "
     "all matrices with a teacher; none: the whole model"),
    ("initial_threshold, final_threshold", "share of blocks kept; of soft movement a cut"),
    ("initial_warmup, final_warmup", "multiples of warmup_steps at both ends of the cubic"),
    ("regularization, final_lambda", "penalty on the scores, and its weight at the end"),
    ("num_splopa_prototypes, splopa_prototype_rank", "K and r; blank: every weight is trained"),
    ("Marker", "* chooses the row for run_squad_from_excel_sheet.py --marked"),
    ("B1 of SQuAD and QQP, D1 of SQuAD at 3.1",
     "their results are those of unstructured pruning; the other ones are of blocks of 32 x 32"),
    ("D1 of SQuAD with K",
     "the original zeroed weights as it counted them: what remained does not follow from "
     "final_threshold, here it does"),
    ("D4 of MNLI", "final_threshold and what remained disagree in the published sheet"),
)  # fmt: skip
STAMP = (1980, 1, 1, 0, 0, 0)  # of every file in the archive
CREATED = "2022-11-08T00:00:00Z"


def value(text: str) -> str | int | float | None:
    """A cell: a number where it is one, None where it is empty."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None


def table(path: Path) -> list[dict[str, Any]]:
    """The lines, values converted.

    Raises:
        DataError: there is no such file, or it lacks a column, or a line is of no sheet.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        if missing := [name for name in NEEDED if name not in (reader.fieldnames or ())]:
            raise DataError(f"{path}: no column {missing[0]!r}")
        rows = [{name: value(text or "") for name, text in row.items()} for row in reader]
    for line, row in enumerate(rows, 2):
        if row["sheet"] not in SHEETS.values() or not isinstance(row["row"], int):
            raise DataError(f"{path}, line {line}: no sheet and row of the workbook")
        if row["row"] <= HEADER:
            raise DataError(f"{path}, line {line}: rows begin at {HEADER + 1}")
    return rows


def columns(sheet: str) -> list[str | None]:
    """The names in row 2; results stand between two groups of settings."""
    length = "max_seq_length"
    settings = [name for name in SETTINGS if sheet != "squad" or name != length]
    return [CODE, KEY, MODEL, EXP_ID, REMAINING, *RESULTS[sheet], None, *settings, MARKER]


def cells(sheet: str, row: dict[str, Any], model: str) -> Iterator[Any]:
    """The values of one row, in the order of the columns."""
    settings = {name: row[name] for name in SETTINGS if row[name] is not None}
    blank = SPLOPA if displaced(settings) else ()
    results = iter([row.get(f"result_{i}") for i in (1, 2, 3, 4)])
    known = Row(sheet, row["row"], str(row[CODE] or ""), model, str(row[EXP_ID]), row[REMAINING],
                settings=settings)  # fmt: skip
    key = None if known.percent is None else f"{known.percent:.0f}{known.code}"
    own = {CODE: row[CODE], KEY: key, MODEL: row[MODEL], EXP_ID: row[EXP_ID]}
    own |= {REMAINING: row[REMAINING], None: None, MARKER: None}
    for place, name in enumerate(columns(sheet)):
        if name in own:
            yield own[name]
        elif 5 <= place < 5 + len(RESULTS[sheet]):
            yield next(results)
        else:
            yield None if name in blank else settings.get(name)


def fill(book: Any, sheet: str, rows: Sequence[dict[str, Any]]) -> None:
    """Adds a sheet to the workbook."""
    page = book.create_sheet(SHEETS[sheet])
    for column, name in enumerate(columns(sheet), 1):
        page.cell(1, column, CAPTIONS.get(name))
        page.cell(HEADER, column, name)
    for row in rows:
        for column, content in enumerate(cells(sheet, row, str(row[MODEL] or "")), 1):
            if content is not None:
                page.cell(row["row"], column, content)
    page.freeze_panes = f"F{HEADER + 1}"
    for letter, width in (("C", 30), ("D", 40), ("E", 14)):
        page.column_dimensions[letter].width = width


def workbook(rows: Sequence[dict[str, Any]]) -> bytes:
    """The file."""
    import openpyxl

    book = openpyxl.Workbook()
    book.remove(book.active)
    for sheet, title in SHEETS.items():
        fill(book, sheet, [row for row in rows if row["sheet"] == title])
    page = book.create_sheet("HP description")
    for name, meaning in ABOUT:
        page.append((name, meaning))
    page.column_dimensions["A"].width = 44
    book.properties.creator = "rankwise"
    raw = io.BytesIO()
    book.save(raw)
    return _timeless(raw.getvalue())


def _timeless(archive: bytes) -> bytes:
    """The same archive without times and without the version of what wrote it."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "docProps/core.xml":
                data = re.sub(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", CREATED.encode(), data)
            elif name == "docProps/app.xml":
                data = re.sub(rb"<(Application|AppVersion)>.*?</\1>", b"", data)
            entry = zipfile.ZipInfo(name, STAMP)
            entry.compress_type = zipfile.ZIP_DEFLATED
            new.writestr(entry, data, compresslevel=9)
    return out.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    """The program; what a user can mend is one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("table", type=Path, help="the rows, a .tsv file")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "hparams" / "hyperparameters.xlsx", help="the file"
    )
    o = parser.parse_args(argv)
    try:
        data = workbook(table(o.table))
        o.output.write_bytes(data)
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is needed: pip install {error.name}", file=sys.stderr)
        return 2
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{o.output}: {len(data):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
