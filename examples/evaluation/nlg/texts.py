"""Reads predictions and references, and brings texts into the form that is scored."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from examples.data.nlg import instances, read_formatted
from examples.data.tables import read_table, read_text
from examples.data.tasks.nlg import NLG_TASKS
from examples.errors import DataError

if TYPE_CHECKING:
    from transformers_patched import PreTrainedTokenizer

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Form:
    """The form in which a format's texts are scored.

    Attributes:
        tokenized: lower-cased, punctuation split off.
        references: most references of a prediction, None for all.
    """

    tokenized: bool = False
    references: int | None = None


FORMS = {task.metrics: Form(task.tokenized, task.references) for task in NLG_TASKS.values()}


def clean(text: str, form: Form) -> str:
    """A generated or given text up to its end or its first empty line, in a format's form."""
    text = text.split(END_OF_TEXT)[0].split("\n\n")[0].strip()
    return " ".join(re.findall(r"\w+|[^\w\s]", text.lower())) if form.tokenized else text


def read_pairs_to_score(
    predictions: Path, references: Path, format: str
) -> tuple[list[str], list[list[str]]]:
    """n predictions and as many lists of references.

    Args:
        predictions: a text a line.
        references: references a line, an empty line after those of one prediction; or one a line
            if there is no empty line; or a folder with `reference0`, `reference1`, …, a line for
            each prediction; or `…_formatted.jsonl`, with a prediction for each distinct context
            (all texts are then brought into the format's form).
        format: of `examples.evaluation.nlg`.

    Raises:
        DataError: a file is missing or wrong, or their numbers of texts differ.
    """
    texts = _lines(predictions)
    if references.is_dir():
        targets = _folder(references)
    elif references.suffix == ".jsonl":
        form = FORMS[format]
        texts = [clean(text, form) for text in texts]
        targets = [
            [clean(text, form) for text in instance.references[: form.references]]
            for instance in instances(read_formatted(references))
        ]
    else:
        targets = _groups(references)
        if len(texts) == 1 and all(len(group) == 1 for group in targets):
            targets = [[text for group in targets for text in group]]
    while len(texts) > len(targets) and not texts[-1]:
        texts.pop()  # empty lines at the end of a file are no predictions
    if len(texts) != len(targets):
        raise DataError(
            f"{predictions} has {len(texts)} predictions, but {references} has references for "
            f"{len(targets)}: a line for each is expected, in the same order"
        )
    return texts, targets


def read_samples_to_score(
    predictions: Path, references: Path, format: str, tokenizer: PreTrainedTokenizer
) -> tuple[list[str], list[list[str]]]:
    """n predictions, decoded from token ids, and as many lists of references.

    Args:
        predictions: JSON lines {"id": i, "predict": [ids]} for rows i of the test set; of several
            rows with one context the last counts.
        references: `test_formatted.jsonl`, the test set.
        format: of `examples.evaluation.nlg`.
        tokenizer: decodes the ids.

    Raises:
        DataError: a file is missing or wrong, or a context has no prediction.
    """
    if references.suffix != ".jsonl":
        raise DataError(
            f"{references}: token ids are predictions for rows of the test set: give its "
            "test_formatted.jsonl"
        )
    table, form = read_table(predictions), FORMS[format]
    for name in ("id", "predict"):
        if name not in table.columns:
            raise DataError(f"{predictions}: no {name!r} in its rows")
    texts: dict[int, str] = {}
    for row, (i, ids) in enumerate(zip(table.columns["id"], table.columns["predict"], strict=True)):
        if not isinstance(ids, list) or not all(type(x) is int and x >= 0 for x in ids):
            raise table.fail(row, f"'predict' must be a list of token ids, found {ids!r:.60}")
        texts[i] = clean(tokenizer.decode(ids), form)
    found, targets = [], []
    for instance in instances(read_formatted(references)):
        own = [row for row in instance.rows if row in texts]
        if not own:
            raise DataError(
                f"{predictions}: no prediction for the context of row {instance.rows[0]} of "
                f"{references}: {instance.context[:60]!r}"
            )
        found.append(texts[own[-1]])
        targets.append([clean(text, form) for text in instance.references[: form.references]])
    return found, targets


def _lines(path: Path) -> list[str]:
    """The lines of a file; the end of the last line starts no other."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    text = read_text(path)
    if not text.strip():
        raise DataError(f"{path}: empty, there is no text in it")
    return [line.strip() for line in text.removesuffix("\n").split("\n")]


def _groups(path: Path) -> list[list[str]]:
    lines = _lines(path)
    if "" not in lines:
        return [[line] for line in lines]
    groups: list[list[str]] = [[]]
    for line in lines:
        if line:
            groups[-1].append(line)
        elif groups[-1]:
            groups.append([])
    return groups if groups[-1] else groups[:-1]


def _folder(folder: Path) -> list[list[str]]:
    files = [path for path in folder.iterdir() if re.fullmatch(r"reference\d+", path.name)]
    if not files:
        raise DataError(f"{folder}: no files reference0, reference1, … in it")
    columns = [_lines(path) for path in sorted(files, key=lambda path: int(path.name[9:]))]
    for path, column in zip(files, columns, strict=True):
        if len(column) != len(columns[0]):
            raise DataError(f"{folder}: its files differ in their numbers of lines ({path.name})")
    return [list(row) for row in zip(*columns, strict=True)]
