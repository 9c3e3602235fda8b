"""Tokenises a split once, into flat arrays, and caches them on disk.

The cache key is a hash of everything the tokens depend on: the texts, the tokenizer itself, the
maximal length, the version of this code.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from examples.data.cache import cached, default_cache_dir, hash_of, text_key
from examples.data.readers import RawSplit

if TYPE_CHECKING:
    from transformers_patched.tokenization import PreTrainedTokenizer

__all__ = ["EncodedSplit", "default_cache_dir", "encode"]

VERSION = "1"  # raise it when the meaning of the cached arrays changes
ARRAYS = ("tokens", "offsets", "first")
CHUNK = 4096  # sentences tokenised at once: bounds the memory of Python lists


@dataclass(frozen=True)
class EncodedSplit:
    """The token ids of a split of n rows, one after another.

    Attributes:
        tokens: (T,) int32, row i at `tokens[offsets[i]:offsets[i + 1]]`.
        offsets: (n + 1,) int64.
        first: (n,) int32, tokens of type 0; the rest of the row has type 1.
        labels: (n,) int64 classes or float32 scores; None for a split without labels.
        pad_id: what padding is filled with.
        token_types: the model takes `token_type_ids`.
        keys: "texts", "labels" and "tokenizer" -> a hash of the content.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    first: np.ndarray
    labels: np.ndarray | None
    pad_id: int
    token_types: bool
    keys: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.first)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64, tokens per row."""
        return np.diff(self.offsets)


def encode(
    raw: RawSplit,
    tokenizer: PreTrainedTokenizer,
    max_length: int,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    cache: bool = True,
) -> EncodedSplit:
    """Token ids of every row, cut to `max_length` (the longer sentence of a pair first).

    Args:
        raw: from `examples.data.readers`.
        tokenizer: from `transformers_patched`.
        max_length: tokens per row, special tokens included.
        cache_dir: where the arrays are kept; default `default_cache_dir()`.
        cache: False neither reads nor writes the cache.

    Raises:
        ValueError: the model takes fewer tokens, or the tokenizer has no padding token, or its
            token types are not 0 then 1 in a row.
    """
    limit = tokenizer.model_max_length
    if max_length > limit:
        raise ValueError(
            f"max_length={max_length} is more than the {limit} tokens this model "
            f"takes; use {limit} or less"
        )
    keys = {"texts": text_key(raw.text), "tokenizer": hash_of(tokenizer.fingerprint().encode())}
    make = partial(_tokenise, raw, tokenizer, max_length)
    key = f"{VERSION} {max_length} {keys}"
    arrays = cached(make, ARRAYS, key, cache_dir) if cache else make()
    labels = None
    if raw.labels is not None:
        labels = np.asarray(raw.labels, np.float32 if raw.task.regression else np.int64)
        keys["labels"] = hash_of(labels.tobytes())
    if tokenizer.pad_token_id is None:
        raise ValueError("this tokenizer has no pad_token: set one before encoding")
    return EncodedSplit(
        arrays["tokens"],
        arrays["offsets"],
        arrays["first"],
        labels,
        tokenizer.pad_token_id,
        "token_type_ids" in tokenizer.model_input_names,
        keys,
    )


def _tokenise(
    raw: RawSplit, tokenizer: PreTrainedTokenizer, max_length: int
) -> dict[str, np.ndarray]:
    """The arrays `tokens`, `offsets` and `first` of an `EncodedSplit`."""
    tokens, lengths, first = [], [], []
    for start in range(0, len(raw), CHUNK):
        text = [column[start : start + CHUNK] for column in raw.text]
        batch = tokenizer(
            *text,
            truncation=True,
            max_length=max_length,
            return_token_type_ids=True,
            return_attention_mask=False,
        )
        # A chunk of c rows and t tokens.
        size = np.fromiter(map(len, batch["input_ids"]), np.int64, len(batch["input_ids"]))  # (c,)
        types = _flat(batch["token_type_ids"], size.sum())  # (t,) 0 or 1
        ends = np.cumsum(size)  # (c,) row i is tokens ends[i] - size[i] to ends[i]
        # Ones before every token; between the ends of two rows it grows by the ones of a row.
        ones_before = np.concatenate(([0], np.cumsum(types)))  # (t + 1,)
        ones = np.diff(ones_before[np.concatenate(([0], ends))])  # (c,)
        # Of the types only the number of zeros is kept, so the ones must be a row's last tokens.
        place = np.arange(len(types)) - np.repeat(ends - size, size)  # (t,) 0, 1, … in every row
        if not np.array_equal(types != 0, place >= np.repeat(size - ones, size)):
            raise ValueError("this tokenizer's token types are not 0 then 1 in every row")
        tokens.append(_flat(batch["input_ids"], size.sum()))
        lengths.append(size)
        first.append(size - ones)
    offsets = np.concatenate(([0], np.cumsum(np.concatenate(lengths)))).astype(np.int64)
    return {
        "tokens": np.concatenate(tokens),
        "offsets": offsets,
        "first": np.concatenate(first).astype(np.int32),
    }


def _flat(lists: Iterable[list[int]], total: int) -> np.ndarray:
    """(total,) int32, the numbers of all lists."""
    return np.fromiter((value for row in lists for value in row), np.int32, int(total))
