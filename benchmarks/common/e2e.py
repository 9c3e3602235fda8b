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
    parser.add_argument("--random", action="store_true", help="tokens, in place of the data")


def check(parser: argparse.ArgumentParser, o: argparse.Namespace) -> None:
    """Ends the program where neither data nor random tokens are asked for."""
    if not o.random and (o.data_dir is None or o.tokenizer is None):
        parser.error("--data_dir and --tokenizer are needed, or --random")


def words(o: argparse.Namespace) -> list[object]:
    """The options above, for a worker."""
    if o.random:
        return ["--random"]
    return ["--data_dir", o.data_dir, "--tokenizer", o.tokenizer]


def contexts(o: argparse.Namespace, count: int) -> list[list[int]]:
    """`count` of the test set's distinct contexts, evenly spread over them."""
    if o.random:
        return [context for context, _ in _random_rows(count, 0)]
    from examples.data import nlg

    found = [instance.context for instance in nlg.instances(_pairs(o.data_dir, "test"))]
    chosen = [found[i * len(found) // count] for i in range(count)]
    return [ids + [EOS] for ids in _encode(o.tokenizer, chosen)]


def training_rows(o: argparse.Namespace, count: int, seed: int) -> list[Row]:
    """`count` rows of the training set in random order."""
    if o.random:
        return _random_rows(count, seed)
    pairs = _pairs(o.data_dir, "train")
    chosen = [pairs[i] for i in np.random.default_rng(seed).permutation(len(pairs))[:count]]
    first = _encode(o.tokenizer, [pair.context for pair in chosen])
    second = _encode(o.tokenizer, [f" {pair.completion}" for pair in chosen])
    return [(a + [EOS], b + [EOS]) for a, b in zip(first, second, strict=True)]


def _random_rows(count: int, seed: int) -> list[Row]:
    """Rows of random tokens of E2E's lengths: contexts 13 to 43, completions 9 to 40."""
    draw = np.random.default_rng(seed)

    def tokens(shortest: int, longest: int) -> list[int]:
        return [*draw.integers(0, EOS, draw.integers(shortest, longest + 1) - 1).tolist(), EOS]

    return [(tokens(13, 43), tokens(9, 40)) for _ in range(count)]


def _pairs(data_dir: Path, split: str) -> list:
    from examples.data.nlg import read_pairs
    from examples.data.tasks.nlg import NLG_TASKS

    return read_pairs(NLG_TASKS["e2e"], data_dir / "e2e" / f"{split}.txt")


def _encode(tokenizer: Path, texts: list[str]) -> list[list[int]]:
    from transformers_patched import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer)(texts, add_special_tokens=False)["input_ids"]
