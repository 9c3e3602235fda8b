"""Text generation data: raw files to pairs of context and completion, and those to token ids.

    formatted  {"context": "name : Blue Spice | ...", "completion": "Blue Spice is a ..."}
    encoded    {"context": [3672, ..., 50256], "completion": [4518, ..., 50256]}

Both are JSON lines. A context ends with the tokenizer's end-of-text token, which stands between it
and the completion; so does a completion, which starts with the token of a blank. Several rows may
share a context: they are its references. WebNLG's rows say with "cate" whether the category is one
of training's. Whatever is wrong raises `DataError` with file and line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from examples.data.tables import Table, json_reason, numbered_lines, read_table, read_text
from examples.data.tasks import plain_name
from examples.data.tasks.nlg import SEEN_CATEGORIES, SPLITS, NlgTask
from examples.errors import DataError

if TYPE_CHECKING:
    from transformers_patched import PreTrainedTokenizer


class Pair(NamedTuple):
    """One row: a completion of a context; of WebNLG, whether its category is one of training's."""

    context: str
    completion: str
    seen: bool | None = None


@dataclass(frozen=True)
class Instance:
    """A context with all its references, in the order of the file.

    Attributes:
        rows: numbers of its rows.
    """

    context: str
    references: list[str]
    seen: bool | None
    rows: list[int]


@dataclass(frozen=True)
class EncodedPairs:
    """The token ids of n rows, one after another: context, completion, context, …

    Attributes:
        tokens: (T,) int32, row i at `tokens[offsets[i]:offsets[i + 1]]`.
        offsets: (n + 1,) int64.
        first: (n,) int32, tokens of the context, its end included; the rest is the completion.
        source: the file.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    first: np.ndarray
    source: str

    def __len__(self) -> int:
        return len(self.first)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64, tokens per row."""
        return np.diff(self.offsets)

    def context(self, row: int) -> list[int]:
        start = self.offsets[row]
        return self.tokens[start : start + self.first[row]].tolist()

    def completion(self, row: int) -> list[int]:
        return self.tokens[self.offsets[row] + self.first[row] : self.offsets[row + 1]].tolist()


# -- finding files ------------------------------------------------------------------------------


def task_folder(task: NlgTask, data_dir: Path) -> Path:
    """The task's folder in `data_dir`, whatever its spelling; else `data_dir` itself.

    Raises:
        DataError: no such folder, or two that both could be meant.
    """
    if not data_dir.is_dir():
        raise DataError(f"{data_dir}: no such folder (--data_dir)")
    names = {plain_name(name) for name in (task.name, *task.folders)}
    found = [p for p in sorted(data_dir.iterdir()) if p.is_dir() and plain_name(p.name) in names]
    if len(found) > 1:
        raise DataError(
            f"{data_dir}: both {found[0].name} and {found[1].name} could be the folder of "
            f"{task.name}; give one of them as --data_dir"
        )
    return found[0] if found else data_dir


def file_names(task: NlgTask, split: str) -> list[str]:
    """The names that the raw file of a split may have, whatever their case."""
    return [name.format(split=word) + task.suffix for name in task.files for word in SPLITS[split]]


def split_file(task: NlgTask, folder: Path, split: str) -> Path | None:
    """The raw file of a split, None where there is none.

    Raises:
        DataError: two files could be meant.
    """
    names = [name.casefold() for name in file_names(task, split)]
    found = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name.casefold() in names]
    if len(found) > 1:
        raise DataError(
            f"{folder}: {found[0].name} and {found[1].name} both could be the split {split}; "
            "leave one of them there"
        )
    return found[0] if found else None


# -- raw files to pairs -------------------------------------------------------------------------


def read_pairs(task: NlgTask, path: Path) -> list[Pair]:
    """The rows of a raw file.

    Raises:
        DataError: something is wrong in it.
    """
    if task.suffix == ".jsonl":
        return pairs_of_table(task, read_table(path))
    readers = {"e2e": _e2e, "webnlg": _webnlg, "dart": _dart}
    pairs = list(readers[task.name](path))
    if not pairs:
        raise DataError(f"{path}: empty, there is no row in it")
    return pairs


def pairs_of_table(task: NlgTask, table: Table) -> list[Pair]:
    """The rows of BoolQ or XSum, from a file or from the hub."""
    return _boolq(table) if task.name == "boolq" else _xsum(table)


def answers_withheld(task: NlgTask, path: Path) -> bool:
    """Whether this is BoolQ's official test file, which has questions only."""
    return task.name == "boolq" and "answer" not in read_table(path).columns


def _e2e(path: Path) -> Iterator[Pair]:
    """Lines `name : Blue Spice | …||text`; what follows a second `||` is ignored."""
    for number, line in numbered_lines(read_text(path)):
        fields = line.strip().split("||")
        if len(fields) < 2:
            raise DataError(f"{path}, line {number}: no '||' between table and text: {line[:60]!r}")
        yield Pair(fields[0], fields[1])


def _webnlg(path: Path) -> Iterator[Pair]:
    """Entry i of `entries` holds its content under the key i + 1; texts marked good are taken."""
    data = _read_json(path)
    entries = data.get("entries") if isinstance(data, dict) else None
    if not isinstance(entries, list):
        raise DataError(f"{path}: an object with an array named entries is expected (WebNLG 2017)")
    for number, item in enumerate(entries, 1):
        try:
            entry = item[str(number)]
            triples = [
                (t["subject"], t["property"], t["object"]) for t in entry["modifiedtripleset"]
            ]
            texts = [t["lex"] for t in entry["lexicalisations"] if t["comment"] == "good"]
            seen = entry["category"] in SEEN_CATEGORIES
            context = " | ".join(" : ".join(triple) for triple in triples)
        except (KeyError, TypeError) as error:
            raise _misshapen(path, "entry", number, error) from error
        for text in texts:
            yield Pair(context, text, seen)


def _dart(path: Path) -> Iterator[Pair]:
    """Items with `tripleset` and `annotations`; relations are lower-cased."""
    data = _read_json(path)
    if not isinstance(data, list):
        raise DataError(f"{path}: an array of objects is expected (DART 1.1.1)")
    for number, item in enumerate(data, 1):
        try:
            triples = [f"{head} : {relation.lower()} : {tail}"
                       for head, relation, tail in item["tripleset"]]  # fmt: skip
            texts = [annotation["text"] for annotation in item["annotations"]]
            context = " | ".join(triples)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _misshapen(path, "item", number, error) from error
        for text in texts:
            yield Pair(context, text)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: {json_reason(error)}") from error


def _misshapen(path: Path, unit: str, number: int, error: Exception) -> DataError:
    lacks = f"no {error}" if isinstance(error, KeyError) else f"not of the known form ({error})"
    return DataError(f"{path}, {unit} {number}: {lacks}")


def _boolq(table: Table) -> list[Pair]:
    """Passage and question are the context, `true` or `false` the completion."""
    passages, questions = (_texts(table, name) for name in ("passage", "question"))
    answers = _truths(table, "answer")
    return [
        Pair(f"{passage} {question}?", "true" if answer else "false")
        for passage, question, answer in zip(passages, questions, answers, strict=True)
    ]


def _xsum(table: Table) -> list[Pair]:
    """`document` is the context, `summary` the completion."""
    return [
        Pair(document, summary)
        for document, summary in zip(
            _texts(table, "document"), _texts(table, "summary"), strict=True
        )
    ]


def _column(table: Table, name: str) -> list[Any]:
    if name not in table.columns:
        found = ", ".join(map(repr, table.columns))
        raise DataError(f"{table.source}: no {name!r} in its rows; found {found}")
    return table.columns[name]


def _texts(table: Table, column: str) -> list[str]:
    """A column of strings."""
    values = _column(table, column)
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise table.fail(row, f"{column!r} must be text, found {value!r:.60}")
    return values


def _truths(table: Table, column: str) -> list[bool]:
    """A column of true and false."""
    values = _column(table, column)
    for row, value in enumerate(values):
        if not isinstance(value, bool):
            raise table.fail(row, f"{column!r} must be true or false, found {value!r:.60}")
    return values


# -- pairs, as files and as instances -----------------------------------------------------------


def formatted_lines(pairs: Iterable[Pair]) -> Iterator[str]:
    """JSON lines of `{train,valid,test}_formatted.jsonl`; other than ASCII is escaped."""
    for pair in pairs:
        seen = {} if pair.seen is None else {"cate": pair.seen}
        row = {"context": pair.context, "completion": pair.completion, **seen}
        yield json.dumps(row) + "\n"


def read_formatted(path: Path) -> list[Pair]:
    """Reads what `formatted_lines` wrote.

    Raises:
        DataError: no such file, or something wrong in it.
    """
    table = read_table(path)
    columns = [_texts(table, name) for name in ("context", "completion")]
    if "cate" in table.columns:
        columns.append(_truths(table, "cate"))
    return [Pair(*row) for row in zip(*columns, strict=True)]


def instances(pairs: Sequence[Pair]) -> list[Instance]:
    """Rows of equal contexts together, in order of first appearance."""
    found: dict[str, Instance] = {}
    for row, pair in enumerate(pairs):
        instance = found.get(pair.context)
        if instance is None:
            instance = found[pair.context] = Instance(pair.context, [], pair.seen, [])
        instance.references.append(pair.completion)
        instance.rows.append(row)
    return list(found.values())


# -- token ids ----------------------------------------------------------------------------------


def encoded_lines(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizer) -> Iterator[str]:
    """JSON lines of `{train,valid,test}.jsonl`: ids of the context and of the completion.

    Raises:
        ValueError: the tokenizer has no end-of-text token.
    """
    for context, completion in token_ids(pairs, tokenizer):
        yield json.dumps({"context": context, "completion": completion}) + "\n"


def token_ids(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizer
) -> Iterator[tuple[list[int], list[int]]]:
    """Ids of every row's context and completion, the end-of-text token after each.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(f"{tokenizer.name_or_path}: this tokenizer has no eos_token")
    distinct = list(dict.fromkeys(pair.context for pair in pairs))  # one for many references
    contexts = dict(zip(distinct, _ids(tokenizer, distinct), strict=True))
    completions = _ids(tokenizer, [f" {pair.completion}" for pair in pairs])
    for pair, completion in zip(pairs, completions, strict=True):
        yield [*contexts[pair.context], end], [*completion, end]


def encoded_pairs(rows: Iterable[tuple[Sequence[int], Sequence[int]]], source: str) -> EncodedPairs:
    """Rows of ids, context and completion, one after another in arrays."""
    parts = [np.asarray(ids, np.int32) for row in rows for ids in row]
    lengths = np.array([len(ids) for ids in parts], np.int64).reshape(-1, 2)  # (n, 2)
    offsets = np.concatenate([[0], np.cumsum(lengths.sum(1))])
    tokens = np.concatenate([np.empty(0, np.int32), *parts])
    return EncodedPairs(tokens, offsets, lengths[:, 0].astype(np.int32), source)


def _ids(tokenizer: PreTrainedTokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]


def read_encoded(path: Path, *, vocab_size: int, eos_token_id: int) -> EncodedPairs:
    """Reads what `encoded_lines` wrote, for a model of this vocabulary.

    Args:
        path: `{train,valid,test}.jsonl` of `examples.data.prepare_nlg`, or the original recipe's.
        vocab_size: ids are below it.
        eos_token_id: ends every context and every completion.

    Raises:
        DataError: no such file, a damaged line, or ids of another tokenizer.
    """
    table = read_table(path)
    columns = {name: _column(table, name) for name in ("context", "completion")}
    parts: dict[str, list[np.ndarray]] = {name: [] for name in columns}
    for number in range(len(table.lines)):
        for name, lists in columns.items():
            ids = _id_array(lists[number])
            problem = _problem(ids, vocab_size, eos_token_id)
            if problem is not None:
                raise table.fail(number, f"{name!r} {problem}")
            parts[name].append(ids)
    return encoded_pairs(zip(*parts.values(), strict=True), str(path))


def _id_array(value: Any) -> np.ndarray | None:
    """(k,) int64 of a list of whole numbers, None for anything else."""
    if not isinstance(value, list) or any(type(token) is not int for token in value):
        return None
    try:
        return np.array(value, np.int64)  # of an empty list too
    except OverflowError:
        return None


def _problem(ids: np.ndarray | None, vocab_size: int, end: int) -> str | None:
    """What is wrong with the ids of one text, None if nothing is."""
    if ids is None:
        return "must be a list of token ids: a formatted file, perhaps, where the encoded is meant"
    again = "prepare the data again with this model's tokenizer"
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        return f"holds token {outside[0]}, but the vocabulary has {vocab_size}: {again}"
    if not len(ids) or ids[-1] != end:
        last = f"ends with token {ids[-1]}" if len(ids) else "is empty"
        return f"{last}, not with the end-of-text token {end}: {again}"
    return None
