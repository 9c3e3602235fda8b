"""Reads a split of a task: finds its files, then takes text and labels from their columns.

Sources: official GLUE files, files of one's own (`examples.data.tables` reads the formats), and
datasets on the hub. Whatever is wrong raises `DataError`, which names the file, the line and what
to do. Labels are never guessed: a name must be one of the task's, a number must be one of its
indices.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
    """

    task: Task
    split: str
    text: tuple[list[str], ...]
    labels: list[int] | list[float] | None
    ids: list[Any]
    source: str
    lines: list[int]
    unit: str = "line"

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


def read_file(task: Task, path: str | os.PathLike[str], split: str = "train") -> RawSplit:
    """Reads one file of a task, or of one's own where `task` is `CUSTOM`.

    Of a custom training file the text columns are `sentence1` and `sentence2` where present, else
    the first two that are neither the label nor an index; the classes are its sorted labels, and
    float labels make it a regression. The result's `.task` says so: read the other files with it.
    """
    return _from_table(read_tables([Path(path)], _layout(task)), task, split)


def read_hub(task: Task, name: str, config: str | None, split: str) -> RawSplit:
    """Reads a split of a dataset on the hub (or of a local dataset folder) through `datasets`."""
    return _from_table(hub_table(name, config, split), task, split)


def hub_table(name: str, config: str | None, split: str) -> Table:
    """All columns of a split of a dataset on the hub.

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
        columns = {column: list(data[column]) for column in data.column_names}
    except Exception as error:  # the hub, the network and datasets each raise their own
        raise DataError(
            f"{source}, split {split}: cannot be read from the hub "
            f"({type(error).__name__}: {error}); give --data_dir to read files"
        ) from error
    count = len(next(iter(columns.values()), []))
    return Table(f"{source}, split {split}", columns, list(range(count)), "row")


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
        if child.is_dir() and plain_name(child.name) == task.name
    ]
    if len(named) > 1:
        raise DataError(
            f"{data_dir}: both {named[0].name} and {named[1].name} could be the folder "
            f"of {task.name}; give one of them as --data_dir"
        )
    folder = named[0] if named else data_dir
    stems = SPLIT_FILES.get(split, (split,))
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


def _from_table(table: Table, task: Task, split: str) -> RawSplit:
    """Text, labels and row numbers of a table of n rows."""
    if not table.lines:
        raise DataError(f"{table.source}: empty, there is no row in it")
    if task.name == CUSTOM.name and not task.text:
        task = _describe(table, task)
    text = tuple(_text(table, _column(table, name, task)) for name in task.text)
    labels = _labels(table, task, split)
    index = next((name for name in INDEX_COLUMNS if name in table.columns), None)
    ids = table.columns[index] if index else list(range(len(table.lines)))
    return RawSplit(task, split, text, labels, ids, table.source, table.lines, table.unit)


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


def _text(table: Table, column: str) -> list[str]:
    """A column of n strings that UTF-8 can hold."""
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
    if testing and _find(table, "label", task) is None:
        return None
    name = _column(table, "label", task)
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
    known = {label: index for index, label in enumerate(task.labels)}
    for row, value in enumerate(values):
        label = convert(value, task, known)
        if isinstance(label, str):
            raise table.fail(row, label)
        labels.append(label)
    return labels


def _unlabelled(value: Any, task: Task) -> bool:
    """Whether a label is missing, or the hub's -1 for hidden ones where no label can be -1."""
    if value is None or value == "":
        return True
    if task.regression:
        return task.label_range is not None and value in (-1, "-1", "-1.0")
    # Equality alone would let -1.0 pass, which is no class in any format.
    return task.labels_by_index and type(value) in (int, str) and value in (-1, "-1", "-")


def _class_index(value: Any, task: Task, known: dict[str, int]) -> int | str:
    """The index of a label; a string says why it has none."""
    choices = ", ".join(
        f"{i} ({name})" if task.labels_by_index else name for i, name in enumerate(task.labels)
    )
    if isinstance(value, str) and value in known:
        return known[value]
    if not task.labels_by_index:
        unknown = f"unknown label {value!r:.60}; the training file has {choices}"
        return known.get(str(value), unknown) if isinstance(value, (bool, int)) else unknown
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


# -- files of one's own -------------------------------------------------------------------------


def _describe(table: Table, task: Task) -> Task:
    """The task with text columns, labels and metrics as its training file has them."""
    names = list(table.columns)
    if "label" not in names:
        raise DataError(f"{table.source}: no column 'label'; found {', '.join(map(repr, names))}")
    if "sentence1" in names:
        text = ("sentence1", "sentence2") if "sentence2" in names else ("sentence1",)
    else:
        text = tuple(name for name in names if name not in ("label", *INDEX_COLUMNS))[:2]
    if not text:
        raise DataError(
            f"{table.source}: no text column beside 'label'; found {', '.join(map(repr, names))}"
        )
    values = [value for value in table.columns["label"] if value not in (None, "")]
    if any(isinstance(value, (list, dict)) for value in values):  # JSON may hold anything
        raise DataError(f"{table.source}: labels must be names or numbers")
    if values and any(_fraction(value) for value in values) and all(map(_number, values)):
        return replace(
            task, text=text, labels=(), metrics=("pearson", "spearmanr"), main_metric="pearson"
        )
    if values and all(_whole(value) is not None for value in values):
        labels = tuple(str(number) for number in sorted({_whole(value) for value in values}))
    else:
        labels = tuple(sorted({str(value) for value in values}))
    if len(labels) < 2:
        raise DataError(
            f"{table.source}: {len(labels)} kinds of label "
            f"({', '.join(labels) or 'all empty'}); a classifier needs at least two"
        )
    return replace(task, text=text, labels=labels)


def _number(value: Any) -> bool:
    """Whether a value is a finite number, or a string that spells one."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return False
    try:
        return math.isfinite(float(value))
    except (ValueError, OverflowError):
        return False


def _fraction(value: Any) -> bool:
    """A float, or a string that spells one rather than a whole number."""
    return isinstance(value, float) or (
        isinstance(value, str) and _whole(value) is None and _number(value)
    )
