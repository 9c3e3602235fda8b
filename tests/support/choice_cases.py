"""Tiny multiple-choice tasks: the right choice is the one that begins as the question says."""

from __future__ import annotations

import random
from pathlib import Path

from examples.data.tables import write_table
from support.runner_cases import WORDS, sentence


def choice_task(folder: Path, splits: dict[str, int], most: int = 5, seed: int = 0) -> Path:
    """JSON-lines files of questions with two to `most` choices; test splits have no answers."""
    rng = random.Random(seed)
    starts = WORDS[:8]
    for split, rows in splits.items():
        columns: dict[str, list] = {"id": [], "question": [], "choices": [], "label": []}
        for row in range(rows):
            own = rng.sample(starts, rng.randint(2, most))
            right = rng.randrange(len(own))
            columns["id"].append(f"{split}{row}")
            columns["question"].append(f"{own[right]} {sentence(rng)}")
            columns["choices"].append([f"{start} {rng.choice(WORDS)}" for start in own])
            columns["label"].append(right)
        if split.startswith("test"):
            del columns["label"]
        write_table(folder / f"{split}.jsonl", columns)
    return folder
