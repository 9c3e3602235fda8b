"""The tasks, as data: columns, label names, metrics, file layouts. Imports nothing heavy.

A file for each benchmark; this one finds a task by its name. Columns have two sets of names: those
of the Hugging Face hub, used throughout the project, and those of the official files, which the
readers translate.
"""

from __future__ import annotations

from examples.data.tasks.glue import GLUE, PAIR
from examples.data.tasks.task import Task, plain_name

__all__ = ["CUSTOM", "GLUE_TASKS", "TASKS", "Task", "get_task", "plain_name"]

WORDING = Task("wording", PAIR, ("not_same", "same"), bundled=True)
TASKS: dict[str, Task] = {task.name: task for task in (*GLUE, WORDING)}
GLUE_TASKS = tuple(task.name for task in GLUE)

# Files of one's own: columns and labels are found in the training file (examples.data.custom), and
# predictions are its own labels.
CUSTOM = Task("custom", (), (), submit_names=True, labels_by_index=False)


def get_task(name: str) -> Task:
    """The task of that name, whatever its spelling (`MRPC`, `STS-B`).

    Raises:
        ValueError: no such task; the message lists them.
    """
    task = TASKS.get(plain_name(name))
    if task is None:
        raise ValueError(
            f"unknown task {name!r}; choose among {', '.join(TASKS)}, or give "
            "--train_file and --validation_file"
        )
    return task
