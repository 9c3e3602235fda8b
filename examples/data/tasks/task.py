"""What is known about a task before its data is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


def plain_name(name: str) -> str:
    """`STS-B`, `sts_b` and `stsb` are one name."""
    return "".join(char for char in name.casefold() if char.isalnum())


@dataclass(frozen=True)
class Task:
    """What a program must know to read, train and score one task.

    Attributes:
        name: as in `--task_name`.
        text: the text columns, one or two, by their hub names.
        labels: label names in index order; empty for regression.
        metrics: names for `examples.evaluation.glue`, in the order they are reported.
        main_metric: the one that chooses the best checkpoint (larger is better).
        label_range: lowest and highest label of a regression task, None where unbounded.
        aliases: column -> its names in the official files.
        headerless: number of columns -> names, for official files without a header line.
        evaluation: key in the results -> split, in the order of evaluation.
        submission: test split -> file name of a GLUE submission.
        submit_names: predictions are written as label names rather than numbers.
        hub: dataset id and configuration on the hub.
        bundled: the files come with the project.
        label_column: the label's column, "label" unless a file of one's own has it elsewhere.
        labels_by_index: files may give labels as indices into `labels`; in files of one's own
            a number is a name.
        skip_short_rows: the official file is known to hold rows broken by stray line ends, which
            everybody drops.
        prefix: official file names are this and the split, capitalised: `ARC-Easy-Train.jsonl`.
    """

    name: str
    text: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    main_metric: str = "accuracy"
    label_range: tuple[float, float] | None = None
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    headerless: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    evaluation: Mapping[str, str] = field(default_factory=lambda: {"validation": "validation"})
    submission: Mapping[str, str] = field(default_factory=dict)
    submit_names: bool = False
    hub: tuple[str, str | None] | None = None
    bundled: bool = False
    label_column: str = "label"
    labels_by_index: bool = True
    skip_short_rows: bool = False
    prefix: str = ""

    @property
    def regression(self) -> bool:
        return not self.labels

    @property
    def num_labels(self) -> int:
        """Width of the classification head: 1 for regression."""
        return len(self.labels) or 1

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.labels))

    @property
    def label2id(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.labels)}

    def column_names(self, column: str) -> tuple[str, ...]:
        """All names that a text column or "label" may have in a file, the hub's first."""
        return (column, *self.aliases.get(column, ()))

    @property
    def test_splits(self) -> tuple[str, ...]:
        return tuple(self.submission) or ("test",)
