"""The multiple-choice tasks: the two parts of ARC, the AI2 reasoning challenge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from examples.data.tasks.task import Task, plain_name

HUB = "allenai/ai2_arc"


@dataclass(frozen=True)
class ChoiceTask(Task):
    """A task whose rows are questions, each with choices of its own, one of them right.

    `labels` is empty: classes are nothing but places among a question's choices.
    """

    @property
    def regression(self) -> bool:
        return False


def _arc(part: str) -> ChoiceTask:
    return ChoiceTask(
        f"arc_{part.lower()}",
        ("question", "choices"),
        (),
        submission={"test": f"ARC-{part}.csv"},
        hub=(HUB, f"ARC-{part}"),
        prefix=f"ARC-{part}-",
    )


CHOICE_TASKS: Mapping[str, ChoiceTask] = {
    task.name: task for task in map(_arc, ("Easy", "Challenge"))
}
CUSTOM_CHOICE = ChoiceTask("custom", ("question", "choices"), (), submission={"test": "test.csv"})


def choice_task(name: str) -> ChoiceTask:
    """The task of that name, whatever its spelling (`ARC-Easy`, `arc_easy`).

    Raises:
        ValueError: no such task; the message lists them.
    """
    for task in CHOICE_TASKS.values():
        if plain_name(name) == plain_name(task.name):
            return task
    raise ValueError(
        f"unknown task {name!r}; choose among {', '.join(CHOICE_TASKS)}, or give --train_file and "
        "--validation_file"
    )
