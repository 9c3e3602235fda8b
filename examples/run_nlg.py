"""Fine-tunes GPT-2 on text generation: tables, questions or documents to text.

    python -m examples.run_nlg --task_name e2e --model_name_or_path DIR --data_dir DIR \\
        --output_dir DIR --method lora --do_predict --num_beams 10 --length_penalty 0.8
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from examples import program
from examples.cli.groups import OPTION_CLASSES, ModelOptions, TrainingOptions
from examples.cli.nlg import DecodingOptions, NlgOptions
from examples.data.tasks.nlg import NLG_TASKS, nlg_task

SUMMARY = "Fine-tunes a pretrained GPT-2 to continue contexts, decodes and scores its texts."
CLASSES = {**OPTION_CLASSES, "data": NlgOptions, "decoding": DecodingOptions}


def options_of(argv: Sequence[str]) -> program.Options | None:
    """The options that the words after the program's name give; None after --help."""
    tasks = {"task_name": NLG_TASKS}
    options = program.parse(argv, "examples.run_nlg", SUMMARY, CLASSES, "task_name", tasks)
    return program.with_known_task(options, NlgOptions, nlg_task)


def main(argv: Sequence[str]) -> int:
    """The program; the words after its name."""
    options = options_of(argv)
    if options is None:
        return 0
    model: ModelOptions = options[ModelOptions]
    accelerator = program.make_accelerator(options[TrainingOptions])
    data = program.NlgData(
        options[NlgOptions],
        options[DecodingOptions],
        model,
        options[TrainingOptions],
        processes=accelerator.num_processes,
        process=accelerator.process_index,
    )
    run = program.Run(
        options,
        accelerator,
        program.language_model(model, data.options.dropout),
        f"{data.task.name} with {'/'.join(Path(model.model_name_or_path).parts[-2:])}",
        data.main_metric,
    )
    program.train_and_evaluate(run, data, predict_split=data.predict)
    return 0


if __name__ == "__main__":
    sys.exit(program.run_main(main))
