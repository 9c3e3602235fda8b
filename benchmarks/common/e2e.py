"""Real token lists: the E2E data set's contexts and completions, encoded as GPT-2 reads them."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

EOS = 50256

Row = tuple[list[int], list[int]]  # context and completion, each with EOS at its end


def add_options(parser: argparse.ArgumentParser) -> None:
    """Where the data and the tokenizer are."""
    parser.add_argument("--data_dir", type=Path, help="folder with e2e/{train,test}.txt")
    parser.add_argument("--tokenizer", type=Path, help="folder with GPT-2's vocab.json, merges.txt")


def contexts(data_dir: Path, tokenizer: Path, count: int) -> list[list[int]]:
    """`count` of the test set's distinct contexts, evenly spread over them."""
    from examples.data import nlg

    found = [instance.context for instance in nlg.instances(_pairs(data_dir, "test"))]
    chosen = [found[i * len(found) // count] for i in range(count)]
    return [ids + [EOS] for ids in _encode(tokenizer, chosen)]


def training_rows(data_dir: Path, tokenizer: Path, count: int, seed: int) -> list[Row]:
    """`count` rows of the training set in random order."""
    pairs = _pairs(data_dir, "train")
    chosen = [pairs[i] for i in np.random.default_rng(seed).permutation(len(pairs))[:count]]
    first = _encode(tokenizer, [pair.context for pair in chosen])
    second = _encode(tokenizer, [f" {pair.completion}" for pair in chosen])
    return [(a + [EOS], b + [EOS]) for a, b in zip(first, second, strict=True)]


def _pairs(data_dir: Path, split: str) -> list:
    from examples.data.nlg import read_pairs
    from examples.data.tasks.nlg import NLG_TASKS

    return read_pairs(NLG_TASKS["e2e"], data_dir / "e2e" / f"{split}.txt")


def _encode(tokenizer: Path, texts: list[str]) -> list[list[int]]:
    from transformers_patched import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer)(texts, add_special_tokens=False)["input_ids"]
