"""Fine-tunes a model to answer questions about paragraphs: SQuAD 1.1, 2.0, or files like theirs.

    python -m examples.run_squad --model_name_or_path DIR --data_dir DIR --output_dir DIR \\
        --method lora [--version_2_with_negative]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from examples import program
from examples.cli.groups import OPTION_CLASSES, ModelOptions, TrainingOptions
from examples.cli.squad import SquadOptions
from examples.data.tasks.squad import SQUAD_TASKS, squad_task

SUMMARY = "Fine-tunes a pretrained model to answer questions about paragraphs, as in SQuAD."


def options_of(argv: Sequence[str]) -> program.Options | None:
    """The options that the words after the program's name give; None after --help."""
    classes = {**OPTION_CLASSES, "data": SquadOptions}
    tasks = {"task_name": SQUAD_TASKS}
    options = program.parse(argv, "examples.run_squad", SUMMARY, classes, "task_name", tasks)
    return program.with_known_task(options, SquadOptions, squad_task)


def main(argv: Sequence[str]) -> int:
    """The program; the words after its name."""
    options = options_of(argv)
    if options is None:
        return 0
    from examples.program.squad_data import SquadData, check_loss, span_model

    model: ModelOptions = options[ModelOptions]
    training: TrainingOptions = options[TrainingOptions]
    check_loss(training)
    accelerator = program.make_accelerator(training)
    processes = accelerator.num_processes, accelerator.process_index
    data = SquadData(options[SquadOptions], training, *processes)
    title = f"{data.task.name} with {'/'.join(Path(model.model_name_or_path).parts[-2:])}"
    run = program.Run(options, accelerator, span_model(model), title, data.main_metric)
    program.train_and_evaluate(run, data, data.write)
    return 0


if __name__ == "__main__":
    sys.exit(program.run_main(main))
