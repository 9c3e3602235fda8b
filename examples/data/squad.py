"""Reads questions about paragraphs: SQuAD's own layout, or one question a row.

    {"data": [{"paragraphs": [{"context": …, "qas": [{"id": …, "question": …,
        "answers": [{"text": …, "answer_start": …}], "is_impossible": …}]}]}]}

A row (of jsonl, of parquet, of the hub) has `id`, `context`, `question` and `answers`, which is
`{"text": [...], "answer_start": [...]}`. Positions count characters. Whatever is wrong raises
`DataError`, which names the file and the question.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from examples.data.readers import hub_table
from examples.data.tables import Table, read_table, read_text
from examples.data.tasks import plain_name
from examples.data.tasks.squad import SPLITS, SquadTask
from examples.errors import DataError

ROWS = (".jsonl", ".parquet")  # files with one question a row


@dataclass(frozen=True)
class SquadSplit:
    """n questions about their paragraphs.

    Attributes:
        source: the file or hub id, for messages.
        contexts: the paragraphs.
        paragraphs: (n) which of the contexts each question is about.
        ids: (n) the questions' own names, each once.
        questions: (n) texts.
        answers: (n) the texts of all right answers; none of a question that its paragraph does not
            answer. None for a split that does not say.
        starts: (n) where each of them begins in its context, in characters.
    """

    source: str
    contexts: list[str]
    paragraphs: list[int]
    ids: list[str]
    questions: list[str]
    answers: list[list[str]] | None
    starts: list[list[int]]

    def __len__(self) -> int:
        return len(self.ids)

    def where(self, row: int) -> str:
        """`file, question ID`."""
        return f"{self.source}, question {self.ids[row]}"

    def take(self, rows: Sequence[int]) -> SquadSplit:
        """The questions of these numbers, in this order, with the paragraphs that they need."""
        used = list(dict.fromkeys(self.paragraphs[i] for i in rows))
        number = {paragraph: i for i, paragraph in enumerate(used)}
        return replace(
            self,
            contexts=[self.contexts[paragraph] for paragraph in used],
            paragraphs=[number[self.paragraphs[i]] for i in rows],
            ids=[self.ids[i] for i in rows],
            questions=[self.questions[i] for i in rows],
            answers=None if self.answers is None else [self.answers[i] for i in rows],
            starts=[self.starts[i] for i in rows],
        )


@dataclass(frozen=True)
class _Question:
    """One as it was found: `where` for messages, `answers` None where there is no such entry."""

    where: str
    id: Any
    context: Any
    question: Any
    answers: list[tuple[Any, Any]] | None
    impossible: Any


# -- the ways in --------------------------------------------------------------------------------


def read_squad(
    path: str | os.PathLike[str],
    *,
    unanswerable: bool = False,
    labelled: bool = True,
    spans: bool = True,
) -> SquadSplit:
    """Reads one file.

    Args:
        path: .json in SQuAD's layout, or .jsonl or .parquet of one question a row.
        unanswerable: questions may have no answer.
        labelled: the answers must be there.
        spans: answers must stand where they say; to score texts that does not matter.

    Raises:
        DataError: something wrong in it.
    """
    path = Path(path)
    if path.suffix.lower() in ROWS:
        found = _of_rows(read_table(path))
    else:
        found = _of_layout(read_json(path), str(path))
    return _collect(str(path), found, unanswerable, labelled, spans)


def read_squad_hub(
    name: str, config: str | None, split: str, *, unanswerable: bool, labelled: bool = True
) -> SquadSplit:
    """Reads a split of a dataset on the hub; arguments as in `read_squad`."""
    table = hub_table(name, config, split)
    return _collect(table.source, _of_rows(table), unanswerable, labelled, spans=True)


def find_squad(task: SquadTask, data_dir: Path, split: str) -> Path:
    """The file of a split in the task's folder in `data_dir`, or in `data_dir` itself.

    Raises:
        DataError: no such folder, no such file, or two that both could be meant.
    """
    if not data_dir.is_dir():
        raise DataError(f"{data_dir}: no such folder (--data_dir)")
    found = _candidates(task, data_dir, split)
    if len(found) > 1:
        raise DataError(
            f"{found[0].parent}: {found[0].name} and {found[1].name} both could be the split "
            f"{split}; leave one of them there"
        )
    if found:
        return found[0]
    where = _folders(task, data_dir)[0]
    holds = ", ".join(p.name for p in sorted(where.iterdir())[:12]) or "nothing"
    stems = " or ".join(stem for group in _stems(task, split) for stem in group)
    raise DataError(
        f"{where}: no file for the split {split} of {task.name}; looked for {stems} with .json, "
        f"{', '.join(ROWS)}; the folder holds {holds}"
    )


def has_squad(task: SquadTask, data_dir: Path, split: str) -> bool:
    """Whether there is a file of that split; arguments as in `find_squad`."""
    return data_dir.is_dir() and bool(_candidates(task, data_dir, split))


def _candidates(task: SquadTask, data_dir: Path, split: str) -> list[Path]:
    """The files that could be a split: in the first folder, of the first names, that has any."""
    for folder in _folders(task, data_dir):
        present = [p for p in sorted(folder.iterdir()) if p.suffix in (".json", *ROWS)]
        for stems in _stems(task, split):
            if found := [p for p in present if p.stem in stems and p.is_file()]:
                return found
    return []


def _folders(task: SquadTask, data_dir: Path) -> list[Path]:
    """Where a task's files may be: its own folders in `data_dir`, then that itself."""
    names = [plain_name(name) for name in (task.name, *task.folders)]
    own = [p for p in sorted(data_dir.iterdir()) if p.is_dir() and plain_name(p.name) in names]
    return [*sorted(own, key=lambda p: names.index(plain_name(p.name))), data_dir]


def _stems(task: SquadTask, split: str) -> tuple[list[str], tuple[str, ...]]:
    """Names of a split's files: the official ones of the task's version, then those without it."""
    return [f"{name}-{task.version}" for name in SPLITS[split]], SPLITS[split]


# -- layouts ------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """What a JSON file holds."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno}: damaged JSON ({error.msg})"
        ) from error
    except RecursionError:
        raise DataError(f"{path}: JSON nested too deeply") from None


def _of_layout(content: Any, source: str) -> Iterator[_Question]:
    """The questions of a file in SQuAD's layout; also of {"data": [row, …]}."""
    articles = content.get("data") if isinstance(content, dict) else content
    if not isinstance(articles, list):
        raise DataError(f'{source}: not in SQuAD\'s layout, {{"data": [{{"paragraphs": …')
    for a, article in enumerate(articles):
        where = f"{source}, article {a}"
        if isinstance(article, dict) and "context" in article:
            yield _of_row(f"{source}, row {a}", article)
            continue
        for p, paragraph in enumerate(_list(article, "paragraphs", where)):
            here = f"{where}, paragraph {p}"
            for q, item in enumerate(_list(paragraph, "qas", here)):
                if not isinstance(item, dict):
                    raise DataError(f"{here}, question {q}: not an object but {item!r:.60}")
                answers = item.get("answers")
                if answers is not None:
                    answers = [
                        (answer.get("text"), answer.get("answer_start"))
                        if isinstance(answer, dict) else (answer, None)
                        for answer in _list(item, "answers", f"{source}, question {item.get('id')}")
                    ]  # fmt: skip
                yield _Question(
                    f"{here}, question {q}", item.get("id"), paragraph.get("context"),
                    item.get("question"), answers, item.get("is_impossible"),
                )  # fmt: skip


def _list(owner: Any, name: str, where: str) -> list[Any]:
    value = owner.get(name) if isinstance(owner, dict) else None
    if not isinstance(value, list):
        raise DataError(f'{where}: no list "{name}", as SQuAD\'s layout has it')
    return value


def _of_rows(table: Table) -> Iterator[_Question]:
    """The questions of a table."""
    for name in ("id", "context", "question"):
        if name not in table.columns:
            raise DataError(
                f"{table.source}: no column {name!r}; found {', '.join(map(repr, table.columns))}"
            )
    for row, line in enumerate(table.lines):
        values = {name: column[row] for name, column in table.columns.items()}
        yield _of_row(f"{table.source}, {table.unit} {line}", values)


def _of_row(where: str, row: Mapping[str, Any]) -> _Question:
    answers = row.get("answers")
    if answers is not None:
        if not isinstance(answers, Mapping) or "text" not in answers:
            raise DataError(f'{where}: answers must be {{"text": […], "answer_start": […]}}')
        texts = list(answers["text"])
        starts = list(answers.get("answer_start") or [None] * len(texts))
        if len(starts) != len(texts):
            raise DataError(f"{where}: {len(texts)} answers, but {len(starts)} starts")
        answers = list(zip(texts, starts, strict=True))
    context, question = row.get("context"), row.get("question")
    return _Question(where, row.get("id"), context, question, answers, row.get("is_impossible"))


# -- from what was found to a split -------------------------------------------------------------


def _collect(
    source: str, found: Iterator[_Question], unanswerable: bool, labelled: bool, spans: bool
) -> SquadSplit:
    """Checks every question; see `read_squad`."""
    contexts: dict[str, int] = {}
    ids: dict[str, str] = {}
    split = SquadSplit(source, [], [], [], [], [], [])
    unlabelled = 0
    for item in found:
        if not isinstance(item.id, str) or not item.id:
            raise DataError(f"{item.where}: its id is {item.id!r:.60}; a text is needed")
        where = f"{source}, question {item.id}"
        if item.id in ids:
            raise DataError(f"{where}: there are two of this id, {ids[item.id]} and {item.where}")
        ids[item.id] = item.where.removeprefix(f"{source}, ")
        _check_text(item.context, "paragraph", where)
        _check_text(item.question, "question", where)
        if item.answers is None:
            unlabelled += 1
            if labelled:
                raise DataError(f"{where}: no entry `answers`, which this split needs")
        texts, starts = _answers(item, where, unanswerable, spans)
        split.paragraphs.append(contexts.setdefault(item.context, len(contexts)))
        split.ids.append(item.id)
        split.questions.append(item.question)
        split.answers.append(texts)  # type: ignore[union-attr]
        split.starts.append(starts)
    if not split.ids:
        raise DataError(f"{source}: empty, there is no question in it")
    return replace(split, contexts=list(contexts), answers=None if unlabelled else split.answers)


def _check_text(value: Any, what: str, where: str) -> None:
    """Raises where a paragraph or a question is no text, or an empty one."""
    if not isinstance(value, str):
        raise DataError(f"{where}: its {what} is {value!r:.60}; a text is needed")
    if not value.strip():
        raise DataError(f"{where}: its {what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: its {what} holds half a surrogate pair; write the character whole"
        ) from None


def _answers(
    item: _Question, where: str, unanswerable: bool, spans: bool
) -> tuple[list[str], list[int]]:
    """Texts and starts of a question's answers."""
    given = item.answers or []
    if item.answers is not None:
        if not given and not unanswerable:
            raise DataError(f"{where}: it has no answer; --version_2_with_negative allows that")
        if item.impossible is True and given:
            raise DataError(f"{where}: is_impossible, but it has the answer {given[0][0]!r:.60}")
        if item.impossible is False and not given:
            raise DataError(f"{where}: not is_impossible, but it has no answer")
    for text, start in given:
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: its answer is {text!r:.60}; a text is needed")
        if not spans:
            continue
        if isinstance(start, bool) or not hasattr(start, "__index__"):
            raise DataError(f"{where}: answer_start is {start!r:.60}; a whole number is needed")
        there = item.context[max(0, start) : max(0, start) + len(text)]
        if start < 0 or there != text:
            at = item.context.find(text)
            hint = "it is nowhere in it" if at < 0 else f"it is at {at}"
            raise DataError(
                f"{where}: the answer {text!r:.60} is not at character {start} of its paragraph, "
                f"where {there!r:.60} stands; {hint}"
            )
    return [text for text, _ in given], [int(start) if spans else 0 for _, start in given]
