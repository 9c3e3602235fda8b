"""The text generation tasks: table to text, yes or no, summaries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from examples.data.tasks.task import plain_name

# the raw files of the original recipe
NLG_DATA = "https://raw.githubusercontent.com/microsoft/LoRA/main/examples/NLG/data"
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
        sources: split -> its raw file under `NLG_DATA`, for tasks that are fetched from there.
        published: split -> SHA-256 of the original recipe's formatted file.
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
    sources: Mapping[str, str] = field(default_factory=dict)
    published: Mapping[str, str] = field(default_factory=dict)


# SHA-256 of the original recipe's formatted files
PUBLISHED: Mapping[str, Mapping[str, str]] = {
    "e2e": {
        "train": "c17ccba9343fb718710d9cd8a510352fd16db22144861e12fb1bfad950cdd5d4",
        "valid": "b8aea8e7c862d1c3db3279bb494131d838e0fb1223597ed070f3cf9dde50ed69",
        "test": "9f774414e4dc88271fa2982ec21c8c1e2344c6c54d474e0e3ef8c8d677a49c9c",
    },
    "webnlg": {
        "train": "1b1f3d9e702d148e99d5ff0dab83732ff772a2c384700fca417e60a52b2647f7",
        "valid": "f92c32802d38cb520103e6edaa620da31b11db399fc81db8d02f83e7af33d3cd",
        "test": "755e5cf84869516aa4fcd7b34e783b3bd76136cc366ff50f4c3e94af9c70bdba",
    },
    "dart": {
        "train": "616d77d86f56d8ac26df3e0d4824a4e54714f729bba97c29fa566f8d76acbb23",
        "valid": "79cd5c51462e6db68653e3807bb51d0da4be9515efa4f8ea67d88b5ed439d994",
        "test": "42ad404f533d373a196c89dfc607acbea1e82e039b459b004601d2e272ed6433",
    },
}


def _sources(pattern: str, valid: str = "valid") -> dict[str, str]:
    return {s: pattern.format(split=valid if s == "valid" else s) for s in SPLITS}


NLG_TASKS: Mapping[str, NlgTask] = {
    task.name: task
    for task in (
        NlgTask(
            "e2e",
            ".txt",
            ("{split}",),
            "e2e",
            sources=_sources("e2e/{split}.txt"),
            published=PUBLISHED["e2e"],
        ),
        NlgTask(
            "webnlg",
            ".json",
            ("{split}",),
            "webnlg",
            folders=("webnlg_2017", "webnlg_challenge_2017"),
            references=6,
            tokenized=True,
            sources=_sources("webnlg_challenge_2017/{split}.json", "dev"),
            published=PUBLISHED["webnlg"],
        ),
        NlgTask(
            "dart",
            ".json",
            ("dart-v1.1.1-full-{split}", "{split}"),
            "webnlg",
            references=6,
            tokenized=True,
            sources=_sources("dart/dart-v1.1.1-full-{split}.json", "dev"),
            published=PUBLISHED["dart"],
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
