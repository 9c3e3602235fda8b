"""Runs from the rows of an Excel sheet: a column per option, a row per run.

    rows: {file: runs.xlsx, sheet: MNLI, header: 2, columns: {LR: learning_rate}}

`file` is beside the sweep's own unless it is absolute. `sheet` is the first one unless named.
`header` is the line with the columns' names, 1 unless given. With `columns` only those are read,
under the options' names; without it every column is an option. Empty cells are not given.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.errors import OptionError

KEYS = ("file", "sheet", "header", "columns")


def read_rows(asked: Any, sweep: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(the row's number in the sheet, its options) of every row that is not empty.

    Args:
        asked: the mapping under `rows`.
        sweep: the sweep's file.

    Raises:
        OptionError: the file or what is asked of it is wrong.
    """
    where = f"{sweep}: rows"
    if not isinstance(asked, dict) or "file" not in asked or not asked.keys() <= {*KEYS}:
        raise OptionError(f"{where}: `file:` is needed, and {', '.join(KEYS[1:])} are possible")
    header, columns = asked.get("header", 1), asked.get("columns")
    if not isinstance(header, int) or header < 1:
        raise OptionError(f"{where}: header {header}: the number of a line is needed, such as 1")
    lines = _lines(sweep.parent / Path(asked["file"]).expanduser(), asked.get("sheet"), where)
    if header > len(lines):
        raise OptionError(f"{where}: header {header}: the sheet has {len(lines)} lines")
    heads = ["" if cell is None else str(cell).strip() for cell in lines[header - 1]]
    if columns is None:
        columns = {head: head for head in heads if head}
    if missing := [head for head in columns if head not in heads]:
        raise OptionError(
            f"{where}: line {header} has no column {missing[0]!r}; it has {', '.join(heads)}"
        )
    places = {heads.index(head): option for head, option in columns.items()}
    for number, line in enumerate(lines[header:], header + 1):
        row = {option: line[place] for place, option in places.items()}
        if row := {option: value for option, value in row.items() if value not in (None, "")}:
            yield str(number), row


def _lines(path: Path, sheet: str | None, where: str) -> list[tuple[Any, ...]]:
    """All lines of a sheet."""
    try:
        import openpyxl
    except ImportError:
        raise OptionError(
            f"{where}: reading Excel needs openpyxl; pip install 'rankwise[sweep]'"
        ) from None
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except Exception as error:  # zip's, xml's and openpyxl's own
        raise OptionError(f"{where}: {path} cannot be read as Excel ({error})") from error
    if sheet is not None and sheet not in book.sheetnames:
        raise OptionError(
            f"{where}: {path} has no sheet {sheet!r}; it has {', '.join(book.sheetnames)}"
        )
    lines = list((book[sheet] if sheet else book.worksheets[0]).iter_rows(values_only=True))
    book.close()
    if not lines:
        raise OptionError(f"{where}: {path}: the sheet is empty")
    return lines
