"""What a training file of one's own holds: text columns, a label column, classes or scores.

Columns that the options name are taken. Else the label is `label`, and the text is in columns whose
names are known (those of GLUE's tasks, `text`), else in the one or two columns that look like text.
Where more could be meant, nothing is guessed: the error names the columns and the option.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from examples.data.tables import Table
from examples.data.tasks import TASKS, Task
from examples.errors import DataError

# Names that say by themselves where the text is; the first group that a file has whole is meant.
KNOWN_TEXT = (
    *dict.fromkeys(task.text for task in TASKS.values() if len(task.text) == 2),
    ("sentence1",),
)
KNOWN_SINGLE = ("text", "sentence")
# Words in the name of a column that numbers or dates rows, or says their label once more.
OTHER_WORDS = frozenset("id ids idx index uid guid uuid date time timestamp datetime".split())
LABEL_WORDS = frozenset(("label", "labels"))
MOST_SHOWN = 20  # classes in the line that says what was found


@dataclass(frozen=True)
class Columns:
    """Names of columns that the user has given; without them they are found.

    Attributes:
        text: one or two text columns, or none.
        label: the label column.
    """

    text: tuple[str, ...] = ()
    label: str | None = None


def describe(table: Table, task: Task, columns: Columns | None = None) -> tuple[Task, str]:
    """The task as its training file has it, and one line for people that says what was found.

    Fractions make a regression, all else names or whole numbers of classes; `1.0` is whole.

    Args:
        table: the training file.
        task: to be filled in.
        columns: that the user names.

    Raises:
        DataError: no such column, columns that could all be meant, or labels of no kind.
    """
    columns = columns or Columns()
    label = columns.label or task.label_column
    if label not in table.columns:
        raise DataError(
            f"{table.source}: no column {label!r}; found {_quoted(table.columns)}: "
            "--label_column names the label"
        )
    text = columns.text or _find_text(table, label)
    for name in text:
        if name not in table.columns:
            raise DataError(
                f"{table.source}: no column {name!r}, which --text_column names; found "
                f"{_quoted(table.columns)}"
            )
    if label in text:
        raise DataError(f"{table.source}: the column {label!r} cannot be both text and label")
    task = replace(task, text=text, label_column=label)
    if _is_regression(table, label):
        task = replace(task, labels=(), metrics=("pearson", "spearmanr"), main_metric="pearson")
        scores = [float(value) for value in _given(table.columns[label])]
        kind = f"a regression from {min(scores):g} to {max(scores):g}"
    else:
        task = replace(task, labels=_classes(table, label))
        kind = f"{len(task.labels)} classes: {_some(task.labels)}"
    unused = [name for name in table.columns if name not in (*text, label)]
    line = f"{table.source}: text in {_quoted(text)}; label in {label!r}, {kind}"
    return task, line + (f"; not used: {_quoted(unused)}" if unused else "")


def label_key(value: Any) -> str:
    """What makes labels of one's own equal: `pos ` is pos, and 1.0 is 1 however it is written."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    text = str(value).strip()
    whole = re.fullmatch(r"\+?(-?[0-9]+)(\.0*)?", text)
    return whole[1] if whole else text


def is_blank(value: Any) -> bool:
    """Whether a label of one's own is missing: nothing, blanks, or the NaN of a table."""
    return value is None or not str(value).strip() or value != value


# -- text ---------------------------------------------------------------------------------------


def _find_text(table: Table, label: str) -> tuple[str, ...]:
    """The one or two text columns of a file whose user names none."""
    names = [name for name in table.columns if name != label]
    found = {name.casefold(): name for name in names} | {name: name for name in names}
    for known in KNOWN_TEXT:
        if all(name in found for name in known):
            return tuple(found[name] for name in known)
    likely = [found[name] for name in KNOWN_SINGLE if name in found]
    if len(likely) == 1:
        return (likely[0],)
    likely = likely or _likely_text(table, names, label)
    if not likely:
        raise DataError(
            f"{table.source}: no text column beside {label!r}; found {_quoted(table.columns)}: "
            "--text_column names one or two"
        )
    if len(likely) > 2 or likely[0].casefold() in KNOWN_SINGLE:
        raise DataError(
            f"{table.source}: {_quoted(likely)} could all be the text; name one or two of them, "
            f"such as --text_column {likely[0]} or --text_column {likely[0]},{likely[1]}"
        )
    return tuple(likely)


def _likely_text(table: Table, names: Sequence[str], label: str) -> list[str]:
    """Columns that hold text, as far as names and values show."""
    likely = [name for name in names if _may_be_text(name, table.columns[name])]
    # A name for every class, or one word a row beside sentences, is no text. Alone it may be.
    for is_text in (
        lambda values: not _repeats(values, table.columns[label]),
        lambda values: any(isinstance(v, str) and len(v.split()) > 1 for v in values),
    ):
        likely = [name for name in likely if is_text(table.columns[name])] or likely
    return likely


def _may_be_text(name: str, values: Sequence[Any]) -> bool:
    """Whether a column has a name, not one of an index, a date or a label, and has letters."""
    words = {word.casefold() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}
    if re.fullmatch(r"\s*(Unnamed: [\d.]+)?", name) or words & (OTHER_WORDS | LABEL_WORDS):
        return False
    return any(isinstance(value, str) and any(map(str.isalpha, value)) for value in values)


def _repeats(values: Sequence[Any], labels: Sequence[Any]) -> bool:
    """Whether a column says the label in other words: each value goes with one label, and back."""
    texts, keys = [str(value) for value in values], [label_key(value) for value in labels]
    pairs = set(zip(texts, keys, strict=True))
    return len(pairs) == len(set(texts)) == len(set(keys)) < len(values)


# -- labels -------------------------------------------------------------------------------------


def _given(values: Sequence[Any]) -> list[Any]:
    """The labels that are there."""
    return [value for value in values if not is_blank(value)]


def _is_regression(table: Table, label: str) -> bool:
    """Whether the labels are numbers and not all of them whole."""
    values = table.columns[label]
    given = _given(values)
    if any(isinstance(value, (list, dict)) for value in given):  # JSON may hold anything
        raise DataError(f"{table.source}: labels must be names or numbers")
    numbers = [_number(value) for value in given]
    if not any(numbers) or not any(
        number and not _whole(value) for value, number in zip(given, numbers, strict=True)
    ):
        return False
    if not all(numbers):
        odd = given[numbers.index(False)]
        raise table.fail(
            values.index(odd),
            f"{label!r} is {odd!r:.60}, but other rows have numbers with fractions: scores must "
            "all be numbers",
        )
    return True


def _classes(table: Table, label: str) -> tuple[str, ...]:
    """The classes under their own names, whole numbers in their order, else alphabetically."""
    if label in table.class_names:
        return table.class_names[label]
    names: dict[str, str] = {}  # key -> the shortest way in which the file writes it
    for value in _given(table.columns[label]):
        key, name = label_key(value), str(value).strip()
        names[key] = min(names.get(key, name), name, key=len)
    if len(names) < 2:
        found = ", ".join(names.values()) or "all empty"
        raise DataError(
            f"{table.source}: {len(names)} kinds of label ({found}) in {label!r}; a classifier "
            "needs at least two"
        )
    numbers = all(re.fullmatch(r"-?[0-9]{1,4000}", key) for key in names)  # int() has a limit
    order = sorted(names, key=(lambda key: (int(key), key)) if numbers else None)
    return tuple(names[key] for key in order)


def _number(value: Any) -> bool:
    """Whether a value is a finite number, or a string that spells one (1_000 is a name)."""
    if isinstance(value, str):
        plain = re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", value.strip())
        return plain is not None and math.isfinite(float(value))
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def _whole(value: Any) -> bool:
    """Whether a value is a whole number, also one written as 1.0."""
    return re.fullmatch(r"-?[0-9]+", label_key(value)) is not None


# -- for people ---------------------------------------------------------------------------------


def _quoted(names: Sequence[str] | dict[str, Any]) -> str:
    return ", ".join(map(repr, names))


def _some(labels: Sequence[str]) -> str:
    """The labels in one line, the first ones where there are many."""
    shown = [" ".join(name.split())[:40] for name in labels[:MOST_SHOWN]]
    rest = len(labels) - len(shown)
    return ", ".join(shown) + (f" and {rest:,} more" if rest else "")
