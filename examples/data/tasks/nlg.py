"""The text generation tasks: table to text, yes or no, summaries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from examples.data.tasks.task import plain_name

# split -> its names in the files that people have
SPLITS: Mapping[str, tuple[str, ...]] = {
    "train": ("train",),
    "valid": ("valid", "validation", "dev", "val"),
    "test": ("test",),
}


@dataclass(frozen=True)
class NlgTask:
    """What must be known to read and score one task.

    Attributes:
        name: as on the command line.
        suffix: of its raw files.
        files: their names, `{split}` being one of `SPLITS`; case does not matter.
        metrics: `--format` of `examples.evaluate_nlg`.
        folders: names of its folder besides its own; case, `-` and `_` do not matter.
        references: most references a context has in the official evaluation, None for all.
        tokenized: the official evaluation lower-cases texts and splits off punctuation first.
        answers: every completion is one of these, so that their likelihoods can be compared.
        hub: dataset id on the hub, for tasks that can be read from there.
        hub_splits: split -> its name there.
    """

    name: str
    suffix: str
    files: tuple[str, ...]
    metrics: str
    folders: tuple[str, ...] = ()
    references: int | None = None
    tokenized: bool = False
    answers: tuple[str, ...] = ()
    hub: str | None = None
    hub_splits: Mapping[str, str] = field(default_factory=dict)


NLG_TASKS: Mapping[str, NlgTask] = {
    task.name: task
    for task in (
        NlgTask("e2e", ".txt", ("{split}",), "e2e"),
        NlgTask(
            "webnlg",
            ".json",
            ("{split}",),
            "webnlg",
            folders=("webnlg_2017", "webnlg_challenge_2017"),
            references=6,
            tokenized=True,
        ),
        NlgTask(
            "dart",
            ".json",
            ("dart-v1.1.1-full-{split}", "{split}"),
            "webnlg",
            references=6,
            tokenized=True,
        ),
        NlgTask(
            "boolq",
            ".jsonl",
            ("{split}",),
            "boolq",
            answers=("true", "false"),
            hub="google/boolq",
            hub_splits={"train": "train", "valid": "validation"},
        ),
        NlgTask(
            "xsum",
            ".jsonl",
            ("{split}", "{split}-1000"),
            "xsum",
            hub="EdinburghNLP/xsum",
            hub_splits={"train": "train", "valid": "validation", "test": "test"},
        ),
    )
}
# BoolQ: how the 3,270 rows of dev.jsonl, in the file's order, stand in for the official splits
# where passages for training are not to be had.
BOOLQ_DEV_ROWS: Mapping[str, int] = {"train": 2270, "valid": 500, "test": 500}
# WebNLG 2017: the categories of the training set; the others of the test set are unseen.
SEEN_CATEGORIES = frozenset(
    "Airport Astronaut Building City ComicsCharacter Food Monument SportsTeam University "
    "WrittenWork".split()
)


def nlg_task(name: str) -> NlgTask:
    """The task of that name or of that name of its folder, whatever its spelling.

    Raises:
        ValueError: no such task; the message lists them.
    """
    for task in NLG_TASKS.values():
        if plain_name(name) in map(plain_name, (task.name, *task.folders)):
            return task
    raise ValueError(f"unknown task {name!r}; choose among {', '.join(NLG_TASKS)}")
