"""The options of SQuAD: data, windows, answers. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from examples.cli.fields import option
from examples.cli.groups import DataOptions
from examples.errors import OptionError


@dataclass(frozen=True)
class SquadOptions(DataOptions):
    """`DataOptions`, and what only questions about a paragraph have.

    Without `--task_name`, files or a dataset, the task is SQuAD 1.1, or 2.0 where questions without
    an answer are asked for. Files whose names are no paths are looked for in `--data_dir` too.
    """

    max_length: int = option(384, "tokens of a window: question, part of the paragraph", low=3)
    doc_stride: int = option(
        128,
        "tokens between the starts of two windows of a paragraph (Transformers' run_qa has their "
        "overlap under this name)",
        low=1,
    )
    max_query_length: int = option(64, "tokens of a question; longer ones are cut", low=1)
    version_2_with_negative: bool = option(
        False, "some questions have no answer in their paragraph"
    )
    null_score_diff_threshold: float = option(
        0.0, "no answer where it scores higher than the best answer by more than this"
    )
    n_best_size: int = option(
        20,
        "starts and ends looked at in a window, and answers written per question",
        low=1,
    )
    max_answer_length: int = option(30, "tokens of an answer", low=1)
    do_lower_case: bool | None = option(None, "lower-case the text; none: as the tokenizer says")
    truncate_train_examples: int = option(
        -1, "use only the first questions of both splits; -1: all of them", low=-1
    )

    def __post_init__(self) -> None:
        ways = (self.task_name, self.train_file, self.validation_file, self.test_file)
        if not any((*ways, self.dataset_name)):
            name = "squad_v2" if self.version_2_with_negative else "squad"
            object.__setattr__(self, "task_name", name)
        super().__post_init__()
        for name in ("text_column", "label_column"):
            if getattr(self, name):
                raise OptionError(f"--{name}: SQuAD's columns are known")
        if self.truncate_train_examples > 0:
            for name in ("max_train_samples", "max_eval_samples"):
                if getattr(self, name) is None:
                    object.__setattr__(self, name, self.truncate_train_examples)
