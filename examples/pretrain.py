"""Trains a GPT-2 on plain text from random weights, or goes on training one; its tokenizer too.

    python -m examples.pretrain --config models/gpt2-mini/recipe.yaml \\
        --train_file gutenberg,inaugural,state_union --output_dir runs/gpt2-mini
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from examples import program
from examples.cli.groups import TrainingOptions
from examples.cli.pretraining import PretrainingOptions
from examples.errors import OptionError

SUMMARY = "Trains a GPT-2 and its tokenizer on plain text."


def options_of(argv: Sequence[str]) -> program.Options | None:
    """The options that the words after the program's name give; None after --help."""
    classes = {"text and model": PretrainingOptions, "training": TrainingOptions}
    # A run of the method that trains every weight; what is typed comes later and wins.
    words = ["--method", "full", *argv]
    options = program.parse(words, "examples.pretrain", SUMMARY, classes, None)
    if options is None:
        return None
    if options.method.name != "full":
        raise OptionError("pretraining trains every weight: leave --method out")
    if not options[TrainingOptions].do_train:
        raise OptionError("pretraining trains: leave --no_do_train and --eval_only out")
    return options


def main(argv: Sequence[str]) -> int:
    """The program; the words after its name."""
    options = options_of(argv)
    if options is not None:
        program.pretrain(options)
    return 0


if __name__ == "__main__":
    sys.exit(program.run_main(main))
