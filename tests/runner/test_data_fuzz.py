"""Fuzzing: any bytes are rows or a `DataError`; what is written is read back."""

import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from examples.data.readers import RawSplit, read_file
from examples.data.tables import FORMATS, DataError, read_table, write_table
from examples.data.tasks import CUSTOM, TASKS, Task

QUICK = settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
VALID = {
    ".tsv": b'Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\ta "b\tc\n0\t3\t4\td\te\n',
    ".csv": b'sentence1,sentence2,label\r\n"a, ""b""",c,1\r\nd,e,0\r\n',
    ".jsonl": b'{"sentence1": "a", "sentence2": "b", "label": 1}\n'
    b'{"sentence1": "c", "sentence2": "\\u00e9", "label": 0}\n',
    ".json": b'[{"sentence1": "a", "sentence2": "b", "label": 1},\n'
    b' {"sentence1": "c", "sentence2": "d", "label": 0}]\n',
}
TEXT_FORMATS = tuple(VALID)
PIECES = [
    b"\t",
    b"\n",
    b'"',
    b",",
    b"\r",
    b"\0",
    b"\xff",
    b"\xc3",
    b"\xef\xbb\xbf",
    b"{",
    b"]",
    b"label",
    b"-1",
    b"2",
    b"null",
    b"NaN",
    b"1e999",
    b"\\ud800",
    b"true",
    b"sentence1",
]


def survives(data: bytes, kind: str, task: Task) -> RawSplit | None:
    """Reads `data`; anything but rows or a DataError that names the file fails the test."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / f"x{kind}"
        path.write_bytes(data)
        try:
            rows = read_file(task, path)
        except DataError as error:
            assert str(path) in str(error)
            return None
    check(rows)
    return rows


def check(rows: RawSplit) -> None:
    """What every reader promises of its rows."""
    assert len(rows) > 0
    assert rows.labels is not None
    assert len(rows.labels) == len(rows.ids) == len(rows)
    for column in rows.text:
        assert len(column) == len(rows)
        "".join(column).encode()
    if rows.task.regression:
        assert all(isinstance(label, float) and math.isfinite(label) for label in rows.labels)
    else:
        assert all(type(label) is int for label in rows.labels)
        assert all(0 <= label < len(rows.task.labels) for label in rows.labels)


def mutated(original: bytes) -> st.SearchStrategy[bytes]:
    """The file with some stretches replaced: close enough to valid to get past the header."""
    spot = st.tuples(
        st.integers(0, len(original)),
        st.integers(0, 12),
        st.one_of(st.sampled_from(PIECES), st.binary(max_size=4)),
    )

    def apply(spots: list[tuple[int, int, bytes]]) -> bytes:
        data = original
        for start, length, piece in spots:
            data = data[:start] + piece + data[start + length :]
        return data

    return st.lists(spot, min_size=1, max_size=3).map(apply)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("task", [TASKS["mrpc"], CUSTOM], ids=lambda task: task.name)
@given(data=st.binary(max_size=200))
@settings(parent=QUICK, max_examples=60)
def test_any_bytes(kind: str, task: Task, data: bytes) -> None:
    survives(data, kind, task)


@pytest.mark.parametrize("kind", TEXT_FORMATS)
@pytest.mark.parametrize("name", ["mrpc", "stsb", "qqp", "custom"])
@given(data=st.data())
@settings(parent=QUICK, max_examples=150)
def test_damaged_files(kind: str, name: str, data: Any) -> None:
    survives(data.draw(mutated(VALID[kind])), kind, TASKS.get(name, CUSTOM))


@pytest.mark.parametrize("kind", TEXT_FORMATS)
def test_every_cut(kind: str) -> None:
    """A file cut at any byte is refused, or holds a beginning of the rows, never another text."""
    whole = survives(VALID[kind], kind, TASKS["mrpc"])
    assert whole is not None and len(whole) == 2
    for end in range(len(VALID[kind])):
        rows = survives(VALID[kind][:end], kind, TASKS["mrpc"])
        if rows is not None:
            assert rows.labels == whole.labels[: len(rows)]
            for column, full in zip(rows.text, whole.text, strict=True):
                assert all(b.startswith(a) for a, b in zip(column, full, strict=False))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_cut_of_parquet_and_friends_by_bytes(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{kind}"
    write_table(path, {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [1, 0]})
    data = path.read_bytes()
    for end in range(0, len(data), max(1, len(data) // 60)):
        survives(data[:end], kind, TASKS["mrpc"])
    assert survives(data, kind, TASKS["mrpc"]) is not None


# JSON and parquet hold any text; TSV neither tabs nor line ends; no format half a character.
ANY = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
FLAT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0\t\n\r"), min_size=1, max_size=20
)


@pytest.mark.parametrize("kind", FORMATS)
@given(data=st.data())
@QUICK
def test_what_is_written_is_read_back(kind: str, data: Any) -> None:
    text = FLAT if kind == ".tsv" else ANY
    rows = data.draw(st.lists(st.tuples(text, text, st.integers(0, 1)), min_size=1, max_size=6))
    names = ("sentence1", "sentence2", "label")
    columns = {
        name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x{kind}"
        write_table(path, columns)
        read = read_file(TASKS["mrpc"], path)
        table = read_table(path)
    assert list(read.text) == [columns["sentence1"], columns["sentence2"]]
    assert read.labels == columns["label"]
    assert list(table.columns) == list(names)
