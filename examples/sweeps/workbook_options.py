"""What a row of the workbook is on our command line: the columns' names are options there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from examples.cli.names import ALIASES
from examples.sweeps.workbook import SETTINGS, Row

PROGRAMS = {"squad": "examples.run_squad", "mnli": "examples.run_glue", "qqp": "examples.run_glue"}
NOT_GIVEN = ("teacher_type",)  # the teacher's own config.json says it
SEED = 92  # the sheets say so
BLOCK = 32  # side of the blocks of all runs


def method(row: Row) -> str:
    """By which a row trains: rows with prototypes are SPLoPA's, others without adapters."""
    if not row.prunes:
        return "full"
    return "splopa" if "num_splopa_prototypes" in row.settings else "block_prune"


def options(row: Row) -> list[str]:
    """Names and values, without model, data and folder.

    The published runs clipped the gradient with the regulariser in it, which their λ depend on,
    and gave every matrix prototypes of its own.
    """
    words = ["--task_name", row.sheet, "--method", method(row)]
    for name in SETTINGS:
        if name in row.settings and name not in NOT_GIVEN:
            words += [f"--{name}", shown(row.settings[name])]
    if row.prunes:
        words += ["--mask_block_rows", str(BLOCK), "--mask_block_cols", str(BLOCK)]
    if row.ranks_all:
        words.append("--global_topk")
    if "regularization" in row.settings:
        words.append("--clip_regularization")
    if method(row) == "splopa":
        words.append("--splopa_prototypes_not_shared")
    return [*words, "--seed", str(SEED)]


def shown(value: Any) -> str:
    """As a word: 16 for 16.0, 3e-05 for 0.00003."""
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value)) if whole else str(value)


def with_more(words: Sequence[str], more: Sequence[str]) -> list[str]:
    """`words`, then `more`, whose options take the place of those of the same meaning."""
    names = {_meaning(word) for word in more if word.startswith("--")}
    kept: list[str] = []
    keep = True
    for word in words:
        if word.startswith("--"):
            keep = _meaning(word) not in names
        if keep:
            kept.append(word)
    return [*kept, *more]


def _meaning(word: str) -> str:
    name = word[2:].partition("=")[0].removeprefix("no_")
    return ALIASES.get(name, name)
