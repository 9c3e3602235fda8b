"""Fine-tunes a model on a GLUE task, the embedded task, or files of one's own.

    python -m examples.run_glue --task_name mrpc --model_name_or_path DIR --data_dir DIR \\
        --output_dir DIR --method lora
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples import program
from examples.cli.groups import OPTION_CLASSES, DataOptions, ModelOptions, TrainingOptions
from examples.data.tasks import TASKS, get_task

if TYPE_CHECKING:
    from torch import Tensor

    from examples.data.readers import RawSplit
    from examples.data.tasks import Task
    from examples.evaluation.prediction import Prediction

SUMMARY = "Fine-tunes a pretrained model on a GLUE task, or on sentence files of your own."


def options_of(argv: Sequence[str]) -> program.Options | None:
    """The options that the words after the program's name give; None after --help."""
    tasks = {"task_name": TASKS}
    name = "examples.run_glue"
    options = program.parse(argv, name, SUMMARY, OPTION_CLASSES, "task_name", tasks)
    return program.with_known_task(options, DataOptions, get_task)


def main(argv: Sequence[str]) -> int:
    """The program; the words after its name."""
    options = options_of(argv)
    if options is None:
        return 0
    model: ModelOptions = options[ModelOptions]
    training: TrainingOptions = options[TrainingOptions]
    accelerator = program.make_accelerator(training)
    processes = accelerator.num_processes, accelerator.process_index
    data = program.TaskData(options[DataOptions], training, *processes)
    run = program.Run(
        options,
        accelerator,
        program.sequence_classifier(model, data.task),
        f"{data.task.name} with {'/'.join(Path(model.model_name_or_path).parts[-2:])}",
        data.main_metric,
    )
    smoothing = 0.0 if data.task.regression else training.label_smoothing_factor
    loss = smoothed_loss(smoothing) if smoothing else None
    program.train_and_evaluate(run, data, partial(write_submission, data.task), loss)
    return 0


def smoothed_loss(share: float) -> Callable[[Any, dict[str, Any]], Tensor]:
    """Cross-entropy with `share` of every label spread evenly over all classes."""
    from torch.nn.functional import cross_entropy

    def loss(output: Any, arguments: dict[str, Any]) -> Tensor:
        return cross_entropy(output.logits.float(), arguments["labels"], label_smoothing=share)

    return loss


def write_submission(
    task: Task, folder: Path, split: str, rows: RawSplit, prediction: Prediction
) -> Path:
    """A file of the GLUE server, `index<tab>prediction`; its path."""
    from examples.evaluation.glue import predict

    lines = ["index\tprediction"]
    for index, value in zip(rows.ids, predict(task, prediction.logits).tolist(), strict=True):
        if task.regression:
            low, high = task.label_range or (-float("inf"), float("inf"))
            shown = f"{min(max(value, low), high):.3f}"
        else:
            shown = task.labels[value] if task.submit_names else str(value)
        lines.append(f"{index}\t{shown}")
    path = folder / task.submission.get(split, f"{split}.tsv")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(program.run_main(main))
