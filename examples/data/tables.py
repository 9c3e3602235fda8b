"""Reads data files of any known format into named columns, and writes them.

What the columns mean is not known here: that is the task's, see `examples.data.readers`. Only a TSV
file does not tell how it is to be read, so its reader is given a `TsvLayout`.

TSV is never quoted, as in GLUE: a quote is a character like any other and a tab always separates.
CSV is quoted as RFC 4180 says. Text is UTF-8, with or without a byte-order mark, lines ending in
LF or CRLF. Whatever is wrong raises `DataError`, which names the file, the line and what to do.
"""

from __future__ import annotations

import csv
import io
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.errors import DataError
from transformers_patched.files import write_atomically

FORMATS = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
LONGEST_FIELD = 1 << 27  # characters in one CSV field


@dataclass(frozen=True)
class TsvLayout:
    """What a TSV file does not say of itself.

    Attributes:
        header: names of each column that a header must have, any of which will do. A first line
            without them is data.
        headerless: number of columns -> their names, for files that start with data.
        skip_short_rows: rows with too few columns are left out with a warning, not refused.
    """

    header: tuple[tuple[str, ...], ...] = ()
    headerless: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    skip_short_rows: bool = False


@dataclass(frozen=True)
class Table:
    """Named columns of n values, as the file has them.

    Attributes:
        source: the file, for messages.
        columns: name -> n values.
        lines: each row's line in the file (item of a JSON array, row of parquet).
        unit: what `lines` counts.
        class_names: column -> the names that its values may have, in their order, where the source
            states them.
    """

    source: str
    columns: dict[str, list[Any]]
    lines: list[int]
    unit: str = "line"
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def fail(self, row: int, reason: str) -> DataError:
        """The error to raise where something is wrong with a row."""
        return DataError(f"{self.source}, {self.unit} {self.lines[row]}: {reason}")


# -- reading ------------------------------------------------------------------------------------


def read_tables(paths: Sequence[Path], layout: TsvLayout | None = None) -> Table:
    """Reads one file, or the shards of one table, which must have the same columns.

    Raises:
        DataError: see `read_table`.
    """
    tables = [read_table(path, layout) for path in paths]
    return tables[0] if len(tables) == 1 else _join(tables, paths[0].parent)


def read_table(path: Path, layout: TsvLayout | None = None) -> Table:
    """Reads one file by the ending of its name; `layout` says how to read TSV.

    Raises:
        DataError: no such file, unknown format, no row, or something wrong in it.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    kind = path.suffix.lower()
    if kind not in FORMATS:
        raise DataError(f"{path}: unknown format {path.suffix!r}; known are {', '.join(FORMATS)}")
    table = _read_tsv(path, layout or TsvLayout()) if kind == ".tsv" else READERS[kind](path)
    if not table.lines:
        raise DataError(f"{path}: empty, there is no row in it")
    return table


def read_text(path: Path) -> str:
    """The text of a file, which must be UTF-8 without NUL."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    mark = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    try:
        text = data[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        at = mark + error.start
        hint = (
            "it looks like UTF-16"
            if data[:2] in (b"\xff\xfe", b"\xfe\xff")
            else ("another encoding, perhaps Latin-1 or Windows-1252")
        )
        line = data.count(b"\n", 0, at) + 1
        raise DataError(
            f"{path}, line {line}: not UTF-8 (byte "
            f"0x{data[at]:02x} at offset {at}); {hint}: convert the file, e.g. with "
            "iconv -t UTF-8"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path}, line {line}: a NUL character; the file is damaged or binary")
    return text


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines that hold something. Only LF ends one: sentences may hold U+2028 or U+0085."""
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if line:
            yield number, line


def _read_tsv(path: Path, layout: TsvLayout) -> Table:
    """Not by the csv module: it would take quotes for more than characters."""
    lines = numbered_lines(read_text(path))
    first = next(lines, None)
    if first is None:
        raise DataError(f"{path}: empty, there is no row in it")
    names = first[1].split("\t")
    body: Iterable[tuple[int, str]] = lines
    is_header = all(any(name in names for name in known) for known in layout.header)
    if not is_header and len(names) in layout.headerless:
        names = list(layout.headerless[len(names)])
        body = [first, *lines]
    _check_names(path, names)
    rows, numbers, short = [], [], []
    for number, line in body:
        fields = line.split("\t")
        if len(fields) != len(names):
            if layout.skip_short_rows and len(fields) < len(names):
                short.append(number)
                continue
            raise DataError(
                f"{path}, line {number}: {len(fields)} columns where {len(names)} are "
                f"expected ({', '.join(names)}); look for a stray tab or line end"
            )
        rows.append(fields)
        numbers.append(number)
    if short:
        warnings.warn(
            f"{path}: {len(short)} rows broken by stray line ends are left out (lines "
            f"{', '.join(map(str, short[:5]))}{', …' if len(short) > 5 else ''})",
            stacklevel=2,
        )
    return Table(str(path), _transpose(names, rows), numbers)


def _read_csv(path: Path) -> Table:
    """A row may span lines; its number is that of its first line."""
    previous = csv.field_size_limit(LONGEST_FIELD)  # a setting of the whole process: put back
    try:
        reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
        names: list[str] | None = None
        rows, numbers, start = [], [], 1
        try:
            for fields in reader:
                number, start = start, reader.line_num + 1
                if not fields:
                    continue
                if names is None:
                    names = fields
                    _check_names(path, names)
                elif len(fields) != len(names):
                    raise DataError(
                        f"{path}, line {number}: {len(fields)} columns where "
                        f"{len(names)} are expected ({', '.join(names)}); look for a "
                        "stray comma, or quote the field"
                    )
                else:
                    rows.append(fields)
                    numbers.append(number)
        except csv.Error as error:
            raise DataError(
                f"{path}, line {start}: a stray or unclosed quote ({error}); a quote "
                "inside a quoted field is written twice"
            ) from error
    finally:
        csv.field_size_limit(previous)
    return Table(str(path), _transpose(names or [], rows), numbers)


def _read_json(path: Path) -> Table:
    """An array of objects, `{"data": [...]}`, or JSON lines under this name, as the hub has it."""
    text = read_text(path)
    start = text.lstrip()[:1]
    # One object may be the whole file or the first of many: its first line decides.
    if start != "[":
        first = next(numbered_lines(text), (1, ""))[1]
        if start != "{" or _parses(first):
            return _read_jsonl(path)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {json_reason(error)}") from error
    items = data.get("data") if isinstance(data, dict) else data
    if not isinstance(items, list):
        raise DataError(
            f"{path}: an array of objects is expected, or an object with an array named data"
        )
    return _from_objects(path, list(enumerate(items, 1)), "item")


def _read_jsonl(path: Path) -> Table:
    items = []
    for number, line in numbered_lines(read_text(path)):
        if not line.strip():
            continue
        try:
            items.append((number, json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: {json_reason(error)}") from error
    return _from_objects(path, items, "line")


def _parses(text: str) -> bool:
    """Whether a text is JSON."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def json_reason(error: Exception) -> str:
    """What is wrong with a JSON text; one that ends too early was probably cut off."""
    if isinstance(error, json.JSONDecodeError) and (
        error.pos >= len(error.doc.rstrip()) or "Unterminated" in error.msg
    ):
        return f"truncated JSON ({error.msg}); the file was cut off, write it again"
    return f"not JSON ({error})"


def _from_objects(path: Path, items: list[tuple[int, Any]], unit: str) -> Table:
    """A table from numbered JSON objects, which must all have the keys of the first."""
    columns: dict[str, list[Any]] = {}
    for position, (number, item) in enumerate(items):
        if not isinstance(item, dict):
            raise DataError(
                f"{path}, {unit} {number}: an object is expected, found {json.dumps(item)[:60]}"
            )
        if position == 0:
            columns = {name: [] for name in item}
        elif item.keys() != columns.keys():
            lacking = [name for name in columns if name not in item]
            if lacking:
                raise DataError(
                    f"{path}, {unit} {number}: no {lacking[0]!r}; the first one has "
                    f"{', '.join(columns)}, this one {', '.join(item) or 'nothing'}"
                )
            extra = next(name for name in item if name not in columns)
            raise DataError(
                f"{path}, {unit} {number}: {extra!r} is not in the first one, which "
                f"has {', '.join(columns) or 'nothing'}"
            )
        for name, value in item.items():
            columns[name].append(value)
    return Table(str(path), columns, [number for number, _ in items], unit)


def _read_parquet(path: Path) -> Table:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(f"{path}: parquet needs pyarrow: pip install 'rankwise[data]'") from error
    try:
        table = parquet.read_table(path)
        names = list(table.column_names)
        columns = [column.to_pylist() for column in table.columns]
    except Exception as error:  # pyarrow's own errors, OSError and plain ValueError
        raise DataError(f"{path}: damaged or not parquet ({error})") from error
    _check_names(path, names)
    return Table(
        str(path), dict(zip(names, columns, strict=True)), list(range(1, table.num_rows + 1)), "row"
    )


READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _check_names(path: Path, names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(
            f"{path}, line 1: two columns are called {twice!r}; the first line of a "
            "file must name its columns"
        )


def _transpose(names: list[str], rows: list[list[str]]) -> dict[str, list[Any]]:
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def _join(tables: list[Table], folder: Path) -> Table:
    """The rows of all tables, one after another."""
    first = tables[0]
    for table in tables[1:]:
        if table.columns.keys() != first.columns.keys():
            raise DataError(
                f"{table.source}: columns {', '.join(table.columns)}, but "
                f"{first.source} has {', '.join(first.columns)}"
            )
    columns = {
        name: [value for table in tables for value in table.columns[name]] for name in first.columns
    }
    count = sum(len(table.lines) for table in tables)
    return Table(str(folder), columns, list(range(1, count + 1)), "row")


# -- writing ------------------------------------------------------------------------------------


def write_table(path: str | os.PathLike[str], columns: Mapping[str, Sequence[Any]]) -> None:
    """Writes columns in the format of the file name's ending, so that `read_table` gives them back.

    The file appears whole or not at all.

    Raises:
        DataError: the format cannot hold a value (a tab in TSV, NUL in text), or is unknown.
    """
    path = Path(path)
    write = WRITERS.get(path.suffix.lower())
    if write is None:
        raise DataError(f"{path}: unknown format {path.suffix!r}; known are {', '.join(FORMATS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda aside: write(aside, columns))


def _write_tsv(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    lines = []
    for fields in [list(columns), *zip(*columns.values(), strict=True)]:
        texts = [str(value) for value in fields]
        line = "\t".join(texts)
        bad = next((t for t in texts if any(char in t for char in "\t\n\r\0")), None)
        if bad is not None or not line:
            raise DataError(
                f"TSV cannot hold {bad or 'an empty line'!r:.60} (row {len(lines)}): write JSON "
                "lines instead"
            )
        lines.append(line + "\n")
    path.write_text("".join(lines), encoding="utf-8", newline="")


def _write_csv(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n")
        for row, fields in enumerate([list(columns), *zip(*columns.values(), strict=True)]):
            if any("\0" in str(value) for value in fields):
                raise DataError(f"CSV cannot hold a NUL character (row {row})")
            writer.writerow(fields)


def _objects(columns: Mapping[str, Sequence[Any]]) -> list[str]:
    """One JSON object a row."""
    rows = zip(*columns.values(), strict=True)
    return [json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) for row in rows]


def _write_jsonl(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    text = "".join(line + "\n" for line in _objects(columns))
    path.write_text(text, encoding="utf-8", newline="")


def _write_json(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    text = "[\n" + ",\n".join(_objects(columns)) + "\n]\n"
    path.write_text(text, encoding="utf-8", newline="")


def _write_parquet(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError("writing parquet needs pyarrow: pip install 'rankwise[data]'") from error
    parquet.write_table(pyarrow.table({name: list(v) for name, v in columns.items()}), path)


WRITERS: dict[str, Callable[[Path, Mapping[str, Sequence[Any]]], None]] = {
    ".tsv": _write_tsv,
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
    ".json": _write_json,
    ".parquet": _write_parquet,
}
