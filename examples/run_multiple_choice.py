"""Fine-tunes a model to choose among answers: ARC-Easy, ARC-Challenge, or questions of one's own.

    python -m examples.run_multiple_choice --task_name arc_easy --model_name_or_path DIR \\
        --data_dir DIR --output_dir DIR --method lora

Questions may have any number of choices, two or more, also within a batch.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples import program
from examples.cli.groups import OPTION_CLASSES, DataOptions, ModelOptions, TrainingOptions
from examples.data.tasks.choice import CHOICE_TASKS, choice_task

if TYPE_CHECKING:
    from torch import Tensor

    from examples.data.choice import RawChoices
    from examples.evaluation.prediction import Prediction

SUMMARY = "Fine-tunes a pretrained model on multiple choice: ARC, or question files of your own."


def options_of(argv: Sequence[str]) -> program.Options | None:
    """The options that the words after the program's name give; None after --help."""
    name, tasks = "examples.run_multiple_choice", {"task_name": CHOICE_TASKS}
    options = program.parse(argv, name, SUMMARY, OPTION_CLASSES, "task_name", tasks)
    return program.with_known_task(options, DataOptions, choice_task)


def main(argv: Sequence[str]) -> int:
    """The program; the words after its name."""
    options = options_of(argv)
    if options is None:
        return 0
    model: ModelOptions = options[ModelOptions]
    training: TrainingOptions = options[TrainingOptions]
    accelerator = program.make_accelerator(training)
    processes = accelerator.num_processes, accelerator.process_index
    data = program.ChoiceData(options[DataOptions], training, *processes)
    run = program.Run(
        options,
        accelerator,
        program.choice_model(model),
        f"{data.task.name} with {'/'.join(Path(model.model_name_or_path).parts[-2:])}",
        data.main_metric,
    )
    smoothing = training.label_smoothing_factor
    loss = smoothed_loss(smoothing) if smoothing else None
    program.train_and_evaluate(run, data, write_predictions, loss)
    return 0


def smoothed_loss(share: float) -> Callable[[Any, dict[str, Any]], Tensor]:
    """Cross-entropy with `share` of every label spread evenly over the question's own choices."""
    import torch

    def loss(output: Any, arguments: dict[str, Any]) -> Tensor:
        counts = arguments["choice_counts"]  # (b,)
        logs = output.logits.float().log_softmax(1)  # (b, choices)
        own = torch.arange(logs.shape[1], device=logs.device) < counts[:, None]
        right = logs.gather(1, arguments["labels"][:, None])[:, 0]  # (b,)
        mean = logs.masked_fill(~own, 0).sum(1) / counts  # (b,)
        return -((1 - share) * right + share * mean).mean()

    return loss


def write_predictions(folder: Path, split: str, rows: RawChoices, prediction: Prediction) -> Path:
    """A file of AI2's leaderboard, `id,label` a line without a header; its path."""
    path = folder / rows.task.submission.get(split, f"{split}.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = prediction.logits.argmax(axis=1).tolist()
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for index, names, place in zip(rows.ids, rows.names, chosen, strict=True):
            writer.writerow((index, names[place]))
    return path


if __name__ == "__main__":
    sys.exit(program.run_main(main))
