"""The nine tasks of GLUE.

Label names stand in the hub's order, so label 0 means the same here, there and in a published
checkpoint.
"""

from __future__ import annotations

from examples.data.tasks.task import Task

PAIR = ("sentence1", "sentence2")
HUB = "nyu-mll/glue"

GLUE = (
    Task(
        "cola",
        ("sentence",),
        ("unacceptable", "acceptable"),
        ("matthews_correlation",),
        "matthews_correlation",
        headerless={4: ("source", "label", "star", "sentence")},
        submission={"test": "CoLA.tsv"},
        hub=(HUB, "cola"),
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
        hub=(HUB, "mnli"),
    ),
    Task(
        "mrpc",
        PAIR,
        ("not_equivalent", "equivalent"),
        ("accuracy", "f1"),
        aliases={"sentence1": ("#1 String",), "sentence2": ("#2 String",), "label": ("Quality",)},
        submission={"test": "MRPC.tsv"},
        hub=(HUB, "mrpc"),
    ),
    Task(
        "qnli",
        ("question", "sentence"),
        ("entailment", "not_entailment"),
        submission={"test": "QNLI.tsv"},
        submit_names=True,
        hub=(HUB, "qnli"),
    ),
    Task(
        "qqp",
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
        aliases={"label": ("is_duplicate",)},
        submission={"test": "QQP.tsv"},
        hub=(HUB, "qqp"),
        skip_short_rows=True,
    ),
    Task(
        "rte",
        PAIR,
        ("entailment", "not_entailment"),
        submission={"test": "RTE.tsv"},
        submit_names=True,
        hub=(HUB, "rte"),
    ),
    Task(
        "sst2",
        ("sentence",),
        ("negative", "positive"),
        submission={"test": "SST-2.tsv"},
        hub=(HUB, "sst2"),
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
        hub=(HUB, "stsb"),
    ),
    Task(
        "wnli",
        PAIR,
        ("not_entailment", "entailment"),
        submission={"test": "WNLI.tsv"},
        hub=(HUB, "wnli"),
    ),
)
