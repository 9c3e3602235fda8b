"""Reads a split of a task: finds its files, then takes text and labels from their columns.

Sources: official GLUE files, files of one's own (`examples.data.tables` reads the formats), and
datasets on the hub. Whatever is wrong raises `DataError`, which names the file, the line and what
to do. Labels are never guessed: a name must be one of the task's, a number must be one of its
indices. A file of one's own says its labels itself (`examples.data.custom`).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from examples.data.custom import Columns, describe, is_blank, label_key
from examples.data.tables import FORMATS, Table, TsvLayout, read_tables
from examples.data.tasks import CUSTOM, Task, plain_name
from examples.errors import DataError

EMBEDDED = Path(__file__).resolve().parent / "embedded"
SPLIT_FILES = {
    "validation": ("validation", "dev", "valid", "val"),
    "validation_matched": ("validation_matched", "dev_matched"),
    "validation_mismatched": ("validation_mismatched", "dev_mismatched"),
}
INDEX_COLUMNS = ("idx", "index", "id")


@dataclass(frozen=True)
class RawSplit:
    """One split in columns.

    Attributes:
        task: the task, with columns and labels filled in where the file decided them.
        text: one list of strings per text column.
        labels: class indices or floats; None for a split without labels.
        ids: the file's own index of each row, else 0, 1, 2, …
        source: the file or hub id, for messages.
        lines: each row's line in the file (item of a JSON array, row of a table).
        unit: what `lines` counts.
        found: what a file of one's own was found to hold, in one line for people.
    """

    task: Task
    split: str
    text: tuple[list[str], ...]
    labels: list[int] | list[float] | None
    ids: list[Any]
    source: str
    lines: list[int]
    unit: str = "line"
    found: str = ""

    def __len__(self) -> int:
        return len(self.lines)

    def where(self, row: int) -> str:
        """`file, line 7`: where that row came from."""
        return f"{self.source}, {self.unit} {self.lines[row]}"

    def take(self, rows: Sequence[int]) -> RawSplit:
        """The rows of these numbers, in this order."""
        return replace(
            self,
            text=tuple([column[i] for i in rows] for column in self.text),
            labels=None if self.labels is None else [self.labels[i] for i in rows],
            ids=[self.ids[i] for i in rows],
            lines=[self.lines[i] for i in rows],
        )


# -- the three ways in --------------------------------------------------------------------------


def read_split(task: Task, data_dir: str | os.PathLike[str] | None, split: str) -> RawSplit:
    """Reads one split: from `data_dir`, else from the bundled files, else from the hub.

    Args:
        task: from `examples.data.tasks`.
        data_dir: a folder with one folder per task (any spelling: `MRPC`, `sts-b`), or the task's
            own folder.
        split: `train`, a value of `task.evaluation`, or one of `task.test_splits`.

    Raises:
        DataError: nothing there, or something wrong in it.
    """
    if data_dir is None and task.bundled:
        data_dir = EMBEDDED
    if data_dir is None:
        if task.hub is None:
            raise DataError(
                f"task {task.name!r} has no data of its own: give --data_dir, or "
                "--train_file and --validation_file"
            )
        return read_hub(task, *task.hub, split)
    files = find_split(task, Path(data_dir), split)
    return _from_table(read_tables(files, _layout(task)), task, split)


def read_file(
    task: Task,
    path: str | os.PathLike[str],
    split: str = "train",
    columns: Columns | None = None,
) -> RawSplit:
    """Reads one file of a task, or of one's own where `task` is `CUSTOM`.

    A custom training file says which columns are text and what the classes are, see
    `examples.data.custom`. The result's `.task` has it: read the other files with that.

    Args:
        task: from `examples.data.tasks`, or `.task` of the training file.
        path: tsv, csv, json, jsonl or parquet.
        split: what it is used for.
        columns: that the user names, of a custom training file.

    Raises:
        DataError: something wrong in it.
    """
    return _from_table(read_tables([Path(path)], _layout(task)), task, split, columns)


def read_hub(
    task: Task, name: str, config: str | None, split: str, columns: Columns | None = None
) -> RawSplit:
    """Reads a split of a dataset on the hub (or of a local dataset folder) through `datasets`.

    Arguments as in `read_file`. Where a custom dataset states the names of its classes, they are
    its labels.
    """
    table = hub_table(name, config, split, class_names=not task.labels_by_index)
    return _from_table(table, task, split, columns)


def hub_table(name: str, config: str | None, split: str, class_names: bool = True) -> Table:
    """All columns of a split of a dataset on the hub.

    Args:
        name: hub id, or a local dataset folder.
        config: its configuration.
        split: of the dataset.
        class_names: give classes by the names that the dataset states, not by their numbers.

    Raises:
        DataError: it cannot be read; the cause is chained.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"reading {name} from the hub needs the datasets package: "
            "pip install 'rankwise[data]', or give --data_dir"
        ) from error
    source = f"{name}/{config}" if config else name
    try:
        data = datasets.load_dataset(name, config, split=split)
        values = {column: list(data[column]) for column in data.column_names}
    except Exception as error:  # the hub, the network and datasets each raise their own
        raise DataError(
            f"{source}, split {split}: cannot be read from the hub "
            f"({type(error).__name__}: {error}); give --data_dir to read files"
        ) from error
    names = {
        column: tuple(feature.names)
        for column, feature in data.features.items()
        if class_names and isinstance(feature, datasets.ClassLabel)
    }
    for column, known in names.items():  # -1 hides a label
        values[column] = [known[i] if i is not None and i >= 0 else None for i in values[column]]
    count = len(next(iter(values.values()), []))
    return Table(f"{source}, split {split}", values, list(range(count)), "row", names)


def _layout(task: Task) -> TsvLayout:
    """How the official TSV files of a task are to be read."""
    header = tuple(task.column_names(column) for column in task.text)
    return TsvLayout(header, task.headerless, task.skip_short_rows)


def find_split(task: Task, data_dir: Path, split: str) -> list[Path]:
    """The files of a split: one, or the shards of a parquet split.

    Raises:
        DataError: no such folder, no such file, or two that both could be meant.
    """
    if not data_dir.is_dir():
        raise DataError(f"{data_dir}: no such folder (--data_dir)")
    named = [
        child
        for child in sorted(data_dir.iterdir())
        if child.is_dir() and plain_name(child.name) == plain_name(task.name)
    ]
    if len(named) > 1:
        raise DataError(
            f"{data_dir}: both {named[0].name} and {named[1].name} could be the folder "
            f"of {task.name}; give one of them as --data_dir"
        )
    folder = named[0] if named else data_dir
    stems = SPLIT_FILES.get(split, (split,))
    if task.prefix:
        stems = (*stems, *(task.prefix + stem.capitalize() for stem in stems))
    present = sorted(path for path in folder.iterdir() if path.is_file())
    found = [path for path in present if path.suffix in FORMATS and path.stem in stems]
    if len(found) > 1:
        raise DataError(
            f"{folder}: {found[0].name} and {found[1].name} both could be the split "
            f"{split}; leave one of them there"
        )
    if found:
        return found
    shard = re.compile(rf"({'|'.join(stems)})-\d+-of-\d+\.parquet")
    if shards := [path for path in present if shard.fullmatch(path.name)]:
        return shards
    children = [f"{path.name}/" for path in sorted(folder.iterdir()) if path.is_dir()]
    holds = ", ".join([path.name for path in present[:12]] + children[:12]) or "nothing"
    raise DataError(
        f"{folder}: no file for the split {split} of {task.name}; looked for "
        f"{' or '.join(stems)} with {', '.join(FORMATS)}; the folder holds {holds}"
    )


# -- from columns to text and labels ------------------------------------------------------------


def _from_table(table: Table, task: Task, split: str, columns: Columns | None = None) -> RawSplit:
    """Text, labels and row numbers of a table of n rows."""
    if not table.lines:
        raise DataError(f"{table.source}: empty, there is no row in it")
    found = ""
    if task.name == CUSTOM.name and not task.text:
        task, found = describe(table, task, columns)
    text = tuple(texts(table, _column(table, name, task)) for name in task.text)
    labels = _labels(table, task, split)
    index = next((name for name in INDEX_COLUMNS if name in table.columns), None)
    ids = table.columns[index] if index else list(range(len(table.lines)))
    return RawSplit(task, split, text, labels, ids, table.source, table.lines, table.unit, found)


def _column(table: Table, column: str, task: Task) -> str:
    """The name under which a table has a column.

    Raises:
        DataError: it has none.
    """
    found = _find(table, column, task)
    if found is None:
        wanted = " or ".join(map(repr, task.column_names(column)))
        raise DataError(
            f"{table.source}: no column {wanted}, which {task.name} needs; found "
            f"{', '.join(map(repr, table.columns))}"
        )
    return found


def _find(table: Table, column: str, task: Task) -> str | None:
    """The name under which a table has a column, None where it has none."""
    return next((name for name in task.column_names(column) if name in table.columns), None)


def texts(table: Table, column: str) -> list[str]:
    """A column of n strings that UTF-8 can hold.

    Raises:
        DataError: a value is something else.
    """
    values = table.columns[column]
    for row, value in enumerate(values):
        if not isinstance(value, str):
            shown = "nothing" if value is None else f"{value!r:.60}"
            raise table.fail(row, f"{column!r} must be text, found {shown}")
    try:
        "".join(values).encode()  # all rows at once; one by one only to name the bad one
    except UnicodeEncodeError:
        for row, value in enumerate(values):
            if any("\ud800" <= char <= "\udfff" for char in value):
                raise table.fail(
                    row, f"{column!r} holds half a surrogate pair; write the character whole"
                ) from None
        raise
    return values


def _labels(table: Table, task: Task, split: str) -> list[int] | list[float] | None:
    """n class indices or scores; None for a test split without labels."""
    testing = split.startswith("test")
    if testing and _find(table, task.label_column, task) is None:
        return None
    name = _column(table, task.label_column, task)
    values = table.columns[name]
    blank = [row for row, value in enumerate(values) if _unlabelled(value, task)]
    if blank and testing:
        return None
    if blank:
        raise table.fail(
            blank[0],
            f"no label ({values[blank[0]]!r}) in {len(blank)} of "
            f"{len(values)} rows, but {split} needs them: this is an unlabelled "
            "split, or the rows are damaged",
        )
    convert = _score if task.regression else _class_index
    labels = []
    key = str if task.labels_by_index else label_key
    known = {key(label): index for index, label in enumerate(task.labels)}
    for row, value in enumerate(values):
        label = convert(value, task, known)
        if isinstance(label, str):
            raise table.fail(row, label)
        labels.append(label)
    return labels


def _unlabelled(value: Any, task: Task) -> bool:
    """Whether a label is missing, or the hub's -1 for hidden ones where no label can be -1."""
    if not task.labels_by_index:
        return is_blank(value)
    if value is None or value == "":
        return True
    if task.regression:
        return task.label_range is not None and value in (-1, "-1", "-1.0")
    # Equality alone would let -1.0 pass, which is no class in any format.
    return type(value) in (int, str) and value in (-1, "-1", "-")


def _class_index(value: Any, task: Task, known: dict[str, int]) -> int | str:
    """The index of a label; a string says why it has none."""
    choices = ", ".join(
        f"{i} ({name})" if task.labels_by_index else name for i, name in enumerate(task.labels)
    )
    if not task.labels_by_index:
        unknown = f"unknown label {value!r:.60}; the training file has {choices}"
        return known.get(label_key(value), unknown)
    if isinstance(value, str) and value in known:
        return known[value]
    index = _whole(value)
    if index is None:
        return f"unknown label {value!r:.60}; {task.name} has {choices}"
    if not 0 <= index < len(task.labels):
        return f"label {index} is out of range; {task.name} has {choices}"
    return index


def _score(value: Any, task: Task, known: dict[str, int]) -> float | str:
    """The label of a regression; a string says why it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return f"the label must be a number, found {value!r:.60}"
    try:
        score = float(value)
    except (ValueError, OverflowError):
        return f"the label must be a number, found {value!r:.60}"
    if not math.isfinite(score):
        return f"the label must be a finite number, found {value!r:.60}"
    low, high = task.label_range or (score, score)
    if not low <= score <= high:
        return f"label {value!r:.60} is out of range; {task.name} has {low:g} to {high:g}"
    return score


def _whole(value: Any) -> int | None:
    """A whole number, or a string that spells one; None for anything else, `True` and 1.0 too."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,9}", value):
        return int(value)
    return None
