"""SQuAD 1.1 and 2.0: where their files are, by which names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from examples.data.tasks.task import plain_name

# split -> its names in the files that people have
SPLITS: Mapping[str, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("dev", "validation", "valid", "val"),
    "test": ("test",),
}

HUB_V2 = "rajpurkar/squad_v2"


@dataclass(frozen=True)
class SquadTask:
    """One of the two.

    Attributes:
        name: as on the command line.
        version: of the official files, `train-v1.1.json`.
        unanswerable: it has questions that the paragraph does not answer.
        folders: names of its folder besides its own; case, `-`, `_` and `.` do not matter.
        hub: dataset id.
    """

    name: str
    version: str
    unanswerable: bool
    folders: tuple[str, ...]
    hub: str


SQUAD_TASKS: Mapping[str, SquadTask] = {
    task.name: task
    for task in (
        SquadTask("squad", "v1.1", False, ("squad_v1", "squad_v1.1"), "rajpurkar/squad"),
        SquadTask("squad_v2", "v2.0", True, ("squad2", "squad_v2.0", "squad"), HUB_V2),
    )
}


def squad_task(name: str) -> SquadTask:
    """The task of that name, whatever its spelling.

    Raises:
        ValueError: no such task; the message lists them.
    """
    for task in SQUAD_TASKS.values():
        own = (task.name, *(folder for folder in task.folders if folder not in SQUAD_TASKS))
        if plain_name(name) in map(plain_name, own):
            return task
    raise ValueError(f"unknown task {name!r}; choose among {', '.join(SQUAD_TASKS)}")
