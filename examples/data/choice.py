"""Multiple-choice questions: read, encoded, collated.

A question has two choices or more, and others may have another number of them: nothing is dropped
and nothing is filled up. Its choices are sequences (question, choice), one after another, and a row
of a batch is a question: see `choice_counts` of the models' multiple-choice heads.

Three layouts are known, in JSON lines or whatever else holds lists:

    {"id": 7, "question": "…", "choices": ["…", "…"], "label": 1}
    {"id": "Q7", "question": {"stem": "…", "choices": [{"text": "…", "label": "A"}, …]},
     "answerKey": "A"}
    {"id": "Q7", "question": "…", "choices": {"text": ["…", …], "label": ["A", …]},
     "answerKey": "A"}

Where choices are named, the answer is a name; where they are not, it is a number from 0.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from examples.data import batches
from examples.data.batches import Batch
from examples.data.cache import hash_of
from examples.data.encode import EncodedSplit, encode
from examples.data.readers import INDEX_COLUMNS, RawSplit, find_split, hub_table, texts
from examples.data.tables import Table, read_tables
from examples.data.tasks import Task
from examples.errors import DataError

if TYPE_CHECKING:
    from transformers_patched.tokenization import PreTrainedTokenizer

ANSWERS = ("label", "answerKey")  # names of the column with the answer


@dataclass(frozen=True)
class RawChoices(RawSplit):
    """Questions; `text` is their one column, `labels` the places of the right choices from 0.

    Attributes:
        choices: the texts of each question's choices.
        names: what the file calls them, place numbers where it does not say.
    """

    choices: Sequence[list[str]] = ()
    names: Sequence[list[str]] = ()

    def take(self, rows: Sequence[int]) -> RawChoices:
        """The questions of these numbers, in this order."""
        taken = super().take(rows)
        some = {n: [getattr(self, n)[i] for i in rows] for n in ("choices", "names")}
        return replace(taken, **some)

    def pairs(self) -> RawSplit:
        """(question, choice) of all choices, one question's after another's, without labels."""
        owner = [row for row, own in enumerate(self.choices) for _ in own]
        return RawSplit(
            self.task,
            self.split,
            ([self.text[0][row] for row in owner], [text for own in self.choices for text in own]),
            None,
            [self.ids[row] for row in owner],
            self.source,
            [self.lines[row] for row in owner],
            self.unit,
        )


# -- reading ------------------------------------------------------------------------------------


def read_choices(
    task: Task,
    split: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    file: str | os.PathLike[str] | None = None,
    hub: tuple[str, str | None] | None = None,
) -> RawChoices:
    """Reads a split from one of three places, by default from the task's on the hub.

    Args:
        task: from `examples.data.tasks.choice`.
        split: `train`, a value of `task.evaluation`, or one of `task.test_splits`.
        data_dir: a folder with the task's folder in it, or that folder.
        file: the very file.
        hub: id and configuration of a dataset, or a local dataset folder.

    Raises:
        DataError: nothing there, or something wrong in it.
    """
    if file is not None:
        table = read_tables([Path(file)])
    elif data_dir is not None:
        table = read_tables(find_split(task, Path(data_dir), split))
    elif hub or task.hub:
        table = hub_table(*(hub or task.hub), split)
    else:
        raise DataError(f"task {task.name!r} has no data of its own: give --train_file")
    return _questions(table, task, split)


def _questions(table: Table, task: Task, split: str) -> RawChoices:
    if not table.lines:
        raise DataError(f"{table.source}: empty, there is no row in it")
    if "question" not in table.columns:
        raise DataError(
            f"{table.source}: no column 'question', which multiple choice needs; found "
            f"{', '.join(map(repr, table.columns))}"
        )
    stems, choices, names = [], [], []
    for row in range(len(table.lines)):
        stem, own, called = _parts(table, row)
        stems.append(stem)
        choices.append(own)
        names.append(called)
    _check_texts(table, stems, choices)
    labels = _answers(table, names, choices, split)
    ids = _ids(table)
    where = table.source, table.lines, table.unit
    return RawChoices(task, split, (stems,), labels, ids, *where, "", choices, names)


def _parts(table: Table, row: int) -> tuple[Any, list[Any], list[str]]:
    """The question of a row, its choices, and what they are called."""
    stem = table.columns["question"][row]
    if isinstance(stem, Mapping):
        given, stem = stem.get("choices"), stem.get("stem")
    elif "choices" in table.columns:
        given = table.columns["choices"][row]
    else:
        given = None
    if isinstance(given, Mapping):  # columns of texts and names
        texts_of, names = given.get("text"), given.get("label")
    elif _is_list(given) and len(given) and all(isinstance(one, Mapping) for one in given):
        texts_of = [one.get("text") for one in given]
        names = [one.get("label") for one in given]
    else:
        texts_of, names = given, None
    if not _is_list(texts_of) or len(texts_of) == 0:
        raise table.fail(row, "no choices: a list of texts is needed")
    if names is None:
        names = range(len(texts_of))
    if not _is_list(names) or len(names) != len(texts_of) or None in list(names):
        raise table.fail(row, f"{len(texts_of)} choices, but not every one of them has a label")
    if len(texts_of) < 2:
        raise table.fail(row, "one choice alone is no question: at least two are needed")
    called = [str(name).strip() for name in names]
    twice = next((name for name in called if called.count(name) > 1), None)
    if twice is not None:
        raise table.fail(row, f"two choices have the label {twice!r}")
    return stem, list(texts_of), called


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple, range, np.ndarray))


def _check_texts(table: Table, stems: list[Any], choices: list[list[Any]]) -> None:
    """Refuses what is no text, or a blank one; warns of choices that say the same."""
    owner = [row for row, own in enumerate(choices) for _ in own]
    lines = [table.lines[row] for row in owner]
    flat = [text for own in choices for text in own]
    for name, values, numbers in (("question", stems, table.lines), ("choices", flat, lines)):
        own = Table(table.source, {name: values}, numbers, table.unit)
        for row, text in enumerate(texts(own, name)):
            if not text.strip():
                raise own.fail(row, f"an empty text in {name!r}")
    same = [
        table.lines[row]
        for row, own in enumerate(choices)
        if len({text.strip() for text in own}) < len(own)
    ]
    if same:
        shown = ", ".join(map(str, same[:5])) + (", …" if len(same) > 5 else "")
        warnings.warn(
            f"{table.source}: choices with the same text in {len(same)} questions ({table.unit}s "
            f"{shown}); which of them is meant cannot be learnt",
            stacklevel=4,
        )


def _answers(
    table: Table, names: list[list[str]], choices: list[list[str]], split: str
) -> list[int] | None:
    """The place of each right choice; None for a test split without answers."""
    testing = split.startswith("test")
    column = next((name for name in ANSWERS if name in table.columns), None)
    if column is None:
        if testing:
            return None
        raise DataError(
            f"{table.source}: no column {' or '.join(map(repr, ANSWERS))} with the answers, which "
            f"{split} needs; found {', '.join(map(repr, table.columns))}"
        )
    values = table.columns[column]
    blank = [row for row, value in enumerate(values) if _is_blank(value, names[row])]
    if blank and testing:
        return None
    if blank:
        raise table.fail(
            blank[0],
            f"no answer ({values[blank[0]]!r}) in {len(blank)} of {len(values)} questions, but "
            f"{split} needs them",
        )
    labels = []
    for row, value in enumerate(values):
        exact = isinstance(value, (int, str)) and not isinstance(value, bool)
        called = str(value).strip()
        if not exact or called not in names[row]:
            raise table.fail(
                row,
                f"{column!r} is {value!r:.60}, but the {len(choices[row])} choices are "
                f"{', '.join(names[row])}",
            )
        labels.append(names[row].index(called))
    return labels


def _is_blank(value: Any, names: list[str]) -> bool:
    """Whether there is no answer: nothing, or the hub's -1 for hidden ones."""
    text = "" if value is None else str(value).strip()
    return text == "" or (text == "-1" and text not in names)


def _ids(table: Table) -> list[Any]:
    """What the file calls its questions, which predictions are written under; else 0, 1, 2, …"""
    column = next((name for name in INDEX_COLUMNS if name in table.columns), None)
    if column is None:
        return list(range(len(table.lines)))
    seen: dict[str, int] = {}
    for row, value in enumerate(table.columns[column]):
        first = seen.setdefault(str(value), row)
        if first != row:
            line = f"{table.unit} {table.lines[first]}"
            raise table.fail(row, f"{column!r} {value!r:.60} is that of {line} too")
    return table.columns[column]


# -- encoding -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedChoices:
    """The token ids of a split of n questions.

    Attributes:
        pairs: (question, choice) of all S choices, one question's after another's.
        counts: (n,) int64 choices of each question.
        labels: (n,) int64 places of the right choices; None for a split without answers.
        keys: "texts", "labels", "tokenizer" and "choices" -> a hash of the content.
    """

    pairs: EncodedSplit
    counts: np.ndarray
    labels: np.ndarray | None
    keys: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.counts)

    @cached_property
    def starts(self) -> np.ndarray:
        """(n + 1,) int64, question i is the pairs from starts[i] to starts[i + 1]."""
        return np.concatenate(([0], np.cumsum(self.counts)))

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64, tokens of all choices of a question."""
        return np.diff(self.pairs.offsets[self.starts])

    @property
    def most(self) -> int:
        """The largest number of choices."""
        return int(self.counts.max())


def encode_choices(
    raw: RawChoices,
    tokenizer: PreTrainedTokenizer,
    max_length: int,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    cache: bool = True,
) -> EncodedChoices:
    """Token ids of (question, choice) for every choice; what is too long loses the question's end.

    Arguments as in `examples.data.encode.encode`.

    Raises:
        DataError: a choice leaves no room for its question.
        ValueError: see `encode`.
    """
    pairs = raw.pairs()
    try:
        encoded = encode(
            pairs, tokenizer, max_length, truncation="only_first", cache_dir=cache_dir, cache=cache
        )
    except ValueError:
        _refuse_long_choices(pairs, tokenizer, max_length)
        raise
    counts = np.fromiter(map(len, raw.choices), np.int64, len(raw))
    keys = {**encoded.keys, "choices": hash_of(counts.tobytes())}
    labels = None
    if raw.labels is not None:
        labels = np.asarray(raw.labels, np.int64)
        keys["labels"] = hash_of(labels.tobytes())
    return EncodedChoices(encoded, counts, labels, keys)


def _refuse_long_choices(pairs: RawSplit, tokenizer: PreTrainedTokenizer, max_length: int) -> None:
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
    for row, text in enumerate(pairs.text[1]):
        tokens = len(tokenizer.encode(text, add_special_tokens=False))
        if tokens >= room:
            raise DataError(
                f"{pairs.where(row)}: the choice {text!r:.60} has {tokens} tokens, which leaves "
                f"its question no room in --max_length {max_length}: give at least "
                f"{max_length + tokens - room + 1}, or shorten the choice"
            )


def collate_choices(
    split: EncodedChoices,
    batch: Batch,
    *,
    packed: bool = False,
    width: int | None = None,
    multiple: int = 1,
) -> dict[str, torch.Tensor | int]:
    """The tensors of a batch of b questions: those of their choices, and `choice_counts` (b,).

    `num_choices` is the split's largest number, so that all its logits have one shape. Arguments as
    in `examples.data.batches.collate`.
    """
    rows = batch.rows
    counts = split.counts[rows]  # (b,)
    before = np.cumsum(counts) - counts  # (b,) choices in the batch before each question's
    shift = np.repeat(split.starts[rows] - before, counts)
    choices = Batch(np.arange(len(shift)) + shift, batch.tokens)  # numbers of the pairs
    data = batches.collate(split.pairs, choices, packed=packed, width=width, multiple=multiple)
    data |= {"choice_counts": torch.from_numpy(counts), "num_choices": split.most}
    if split.labels is not None:
        data["labels"] = torch.from_numpy(split.labels[rows])
    return data
