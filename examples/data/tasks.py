"""The tasks, as data: columns, label names, metrics, file layouts. Imports nothing heavy.

A task knows two sets of column names: those of the Hugging Face hub, used throughout the project,
and those of the official GLUE files, which readers translate. Label names stand in the hub's
order, so label 0 means the same here, there and in a published checkpoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


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
        labels_by_index: files may give labels as indices into `labels`; in files of one's own
            a number is a name.
        skip_short_rows: the official file is known to hold rows broken by stray line ends, which
            everybody drops.
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
    labels_by_index: bool = True
    skip_short_rows: bool = False

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


PAIR = ("sentence1", "sentence2")
GLUE = "nyu-mll/glue"

_ALL = (
    Task(
        "cola",
        ("sentence",),
        ("unacceptable", "acceptable"),
        ("matthews_correlation",),
        "matthews_correlation",
        headerless={4: ("source", "label", "star", "sentence")},
        submission={"test": "CoLA.tsv"},
        hub=(GLUE, "cola"),
    ),
    Task(
        "mnli",
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        aliases={"premise": ("sentence1",), "hypothesis": ("sentence2",), "label": ("gold_label",)},
        evaluation={
            "validation_matched": "validation_matched",
            "validation_mismatched": "validation_mismatched",
        },
        submission={"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"},
        submit_names=True,
        hub=(GLUE, "mnli"),
    ),
    Task(
        "mrpc",
        PAIR,
        ("not_equivalent", "equivalent"),
        ("accuracy", "f1"),
        aliases={"sentence1": ("#1 String",), "sentence2": ("#2 String",), "label": ("Quality",)},
        submission={"test": "MRPC.tsv"},
        hub=(GLUE, "mrpc"),
    ),
    Task(
        "qnli",
        ("question", "sentence"),
        ("entailment", "not_entailment"),
        submission={"test": "QNLI.tsv"},
        submit_names=True,
        hub=(GLUE, "qnli"),
    ),
    Task(
        "qqp",
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
        aliases={"label": ("is_duplicate",)},
        submission={"test": "QQP.tsv"},
        hub=(GLUE, "qqp"),
        skip_short_rows=True,
    ),
    Task(
        "rte",
        PAIR,
        ("entailment", "not_entailment"),
        submission={"test": "RTE.tsv"},
        submit_names=True,
        hub=(GLUE, "rte"),
    ),
    Task(
        "sst2",
        ("sentence",),
        ("negative", "positive"),
        submission={"test": "SST-2.tsv"},
        hub=(GLUE, "sst2"),
    ),
    Task(
        "stsb",
        PAIR,
        (),
        ("pearson", "spearmanr"),
        "pearson",
        label_range=(0.0, 5.0),
        aliases={"label": ("score",)},
        submission={"test": "STS-B.tsv"},
        hub=(GLUE, "stsb"),
    ),
    Task(
        "wnli",
        PAIR,
        ("not_entailment", "entailment"),
        submission={"test": "WNLI.tsv"},
        hub=(GLUE, "wnli"),
    ),
    Task("wording", PAIR, ("not_same", "same"), bundled=True),
)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}
GLUE_TASKS = tuple(task.name for task in _ALL if task.hub is not None)

# Files of one's own: columns and labels are found in the training file (readers.read_file).
CUSTOM = Task("custom", (), (), labels_by_index=False)


def plain_name(name: str) -> str:
    """`STS-B`, `sts_b` and `stsb` are one name."""
    return "".join(char for char in name.casefold() if char.isalnum())


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
