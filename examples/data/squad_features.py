"""Questions and paragraphs as token ids, a long paragraph in several windows.

A feature is `[CLS] question [SEP] window [SEP]`, in the tokenizer's own special tokens. Window n of
a paragraph begins at its token n·stride and holds as many tokens as the question leaves room for;
the last window ends with the paragraph. A training target is the span of tokens that covers the
first answer. Where a window does not hold all of it, and where there is no answer, it is the first
token, `[CLS]`; such features are kept.

Paragraphs and questions are tokenised once each and put together by numpy: a paragraph of five
questions is not tokenised five times.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from examples.data.cache import Arrays, cached, hash_of, text_key
from examples.data.encode import EncodedSplit
from examples.data.squad import SquadSplit
from examples.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Encoding

    from transformers_patched.tokenization import PreTrainedTokenizer

VERSION = "squad 1"  # raise it when the meaning of the cached arrays changes
CHUNK = 1024  # texts tokenised at once: bounds the memory of Python lists
ARRAYS = ("tokens", "offsets", "first", "questions", "windows", "chars", "spans")


@dataclass(frozen=True, kw_only=True)
class SquadFeatures(EncodedSplit):
    """n features, the questions' in order; `first` is the column of a window's first token.

    Attributes:
        questions: (n,) int32, which question each feature is of.
        windows: (n,) int64, the first token of each window, among the tokens of all paragraphs.
        chars: (C, 2) int32, where each token of all paragraphs begins and ends in its paragraph;
            blanks at its ends are not part of it.
        spans: (n, 2) int64, the columns of the answer's first and last token.
        after: tokens after a window, such as `[SEP]`.
        raw: the questions.
    """

    questions: np.ndarray
    windows: np.ndarray
    chars: np.ndarray
    spans: np.ndarray
    after: int
    raw: SquadSplit

    @property
    def window_lengths(self) -> np.ndarray:
        """(n,) int64, tokens of the paragraph in each feature."""
        return self.lengths - self.first - self.after


class _Texts(NamedTuple):
    """Tokens of all texts, one after another: text i has `offsets[i]` to `offsets[i + 1]`."""

    tokens: np.ndarray  # (T,) int32
    offsets: np.ndarray  # (texts + 1,) int64
    chars: np.ndarray  # (T, 2) int32


class _Frame(NamedTuple):
    """The special tokens around a question and a window."""

    before: list[int]
    between: list[int]
    after: list[int]

    @property
    def size(self) -> int:
        return sum(map(len, self))


def featurise(
    raw: SquadSplit,
    tokenizer: PreTrainedTokenizer,
    *,
    max_length: int = 384,
    doc_stride: int = 128,
    max_query_length: int = 64,
    cache_dir: str | os.PathLike[str] | None = None,
    cache: bool = True,
) -> SquadFeatures:
    """The features of all questions.

    Args:
        raw: from `examples.data.squad`.
        tokenizer: from `transformers_patched`.
        max_length: tokens of a feature, special tokens included.
        doc_stride: tokens between the starts of two windows.
        max_query_length: tokens of a question; more are cut off.
        cache_dir: where the arrays are kept; default `default_cache_dir()`.
        cache: False neither reads nor writes the cache.

    Raises:
        ValueError: the model takes fewer tokens, or the tokenizer has no padding token, or its
            token types are not 0 then 1 in a row.
        DataError: a question leaves no room for its paragraph, or less than the stride.
    """
    limit = tokenizer.model_max_length
    if max_length > limit:
        raise ValueError(
            f"max_length={max_length} is more than the {limit} tokens this model "
            f"takes; use {limit} or less"
        )
    if tokenizer.pad_token_id is None:
        raise ValueError("this tokenizer has no pad_token: set one before encoding")
    token_types = "token_type_ids" in tokenizer.model_input_names
    frame = _frame(tokenizer, token_types)
    settings = max_length, doc_stride, max_query_length
    numbers = [np.asarray(raw.paragraphs), *_golds(raw)]
    keys = {
        "texts": text_key((raw.contexts, raw.questions)),
        "labels": hash_of(*(array.tobytes() for array in numbers)),
        "tokenizer": hash_of(tokenizer.fingerprint().encode()),
    }
    make = partial(_featurise, raw, tokenizer, frame, *settings)
    key = f"{VERSION} {settings} {keys}"
    arrays = cached(make, ARRAYS, key, cache_dir) if cache else make()
    return SquadFeatures(
        labels=None,
        pad_id=tokenizer.pad_token_id,
        token_types=token_types,
        keys=keys,
        after=len(frame.after),
        raw=raw,
        **arrays,
    )


def _golds(raw: SquadSplit) -> tuple[np.ndarray, np.ndarray]:
    """(n,) where the first answer begins and ends, in characters; -1 where there is none."""
    starts = np.fromiter((own[0] if own else -1 for own in raw.starts), np.int64, len(raw))
    texts = raw.answers or [[]] * len(raw)
    ends = np.fromiter((len(own[0]) if own else 0 for own in texts), np.int64, len(raw)) + starts
    return starts, ends


def _frame(tokenizer: PreTrainedTokenizer, token_types: bool) -> _Frame:
    """What the tokenizer puts around a pair, seen on one."""
    pair: Encoding = tokenizer("a", "b").encodings[0]
    owners = pair.sequence_ids  # None for special tokens
    first, second = owners.index(0), owners.index(1)
    last = len(owners) - owners[::-1].index(1)
    if token_types and pair.type_ids != [0] * second + [1] * (len(owners) - second):
        raise ValueError("this tokenizer's token types are not 0 then 1 in every row")
    questions_end = len(owners) - owners[::-1].index(0)
    return _Frame(pair.ids[:first], pair.ids[questions_end:second], pair.ids[last:])


def _featurise(
    raw: SquadSplit,
    tokenizer: PreTrainedTokenizer,
    frame: _Frame,
    max_length: int,
    doc_stride: int,
    max_query_length: int,
) -> Arrays:
    """The arrays of `SquadFeatures`."""
    asked = _tokenise([text.strip() for text in raw.questions], tokenizer)
    told = _tokenise(raw.contexts, tokenizer)
    told = told._replace(chars=_without_blanks(told, raw.contexts))
    about = np.asarray(raw.paragraphs)  # (questions,)
    query = np.minimum(np.diff(asked.offsets), max_query_length)  # (questions,) tokens
    length = np.diff(told.offsets)[about]  # (questions,) tokens of its paragraph
    room = max_length - frame.size - query  # (questions,) tokens of a window
    _check_room(raw, room, length, query, max_length, doc_stride)

    # One feature per window, n in all.
    count = np.where(length <= room, 1, 1 - (room - length) // doc_stride)  # (questions,)
    owner = np.repeat(np.arange(len(raw)), count)  # (n,)
    skipped = _counting(count) * doc_stride  # (n,) tokens of the paragraph before the window
    size = np.minimum(room[owner], length[owner] - skipped)  # (n,)
    windows = told.offsets[about[owner]] + skipped  # (n,)
    asks = query[owner]  # (n,)
    first = len(frame.before) + asks + len(frame.between)  # (n,)
    offsets = np.concatenate(([0], np.cumsum(asks + size + frame.size)))  # (n + 1,)

    tokens = np.empty(offsets[-1], np.int32)
    begin = offsets[:-1]
    for place, special in (
        (begin, frame.before),
        (begin + len(frame.before) + asks, frame.between),
        (begin + first + size, frame.after),
    ):
        for i, token in enumerate(special):
            tokens[place + i] = token
    _copy(tokens, begin + len(frame.before), asked.tokens, asked.offsets[owner], asks)
    _copy(tokens, begin + first, told.tokens, windows, size)
    spans = _spans(raw, told)[owner] - windows[:, None]  # (n, 2) tokens after the window's first
    inside = (spans[:, 0] >= 0) & (spans[:, 1] < size)  # (n,)
    return {
        "tokens": tokens,
        "offsets": offsets.astype(np.int64),
        "first": first.astype(np.int32),
        "questions": owner.astype(np.int32),
        "windows": windows.astype(np.int64),
        "chars": told.chars,
        "spans": np.where(inside[:, None], first[:, None] + spans, 0).astype(np.int64),
    }


def _tokenise(texts: list[str], tokenizer: PreTrainedTokenizer) -> _Texts:
    """All texts, without special tokens."""
    tokens, sizes, chars = [], [], []
    with warnings.catch_warnings():  # that a paragraph is longer than the model takes is no news
        warnings.simplefilter("ignore", UserWarning)
        for start in range(0, len(texts), CHUNK):
            batch = tokenizer(
                texts[start : start + CHUNK],
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                return_offsets_mapping=True,
            )
            sizes += map(len, batch["input_ids"])
            tokens += [np.array(ids, np.int32) for ids in batch["input_ids"]]
            chars += [np.array(pairs, np.int32).reshape(-1, 2) for pairs in batch["offset_mapping"]]
    offsets = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    return _Texts(np.concatenate(tokens), offsets, np.concatenate(chars))


def _without_blanks(texts: _Texts, contexts: list[str]) -> np.ndarray:
    """(T, 2) the characters of each token without the blanks at its ends.

    Tokens of byte-level and SentencePiece vocabularies may begin with the blank before a word.
    """
    every = "".join(contexts)
    letters = np.frombuffer(every.encode("utf-32-le"), np.uint32)  # (characters,)
    blanks = np.array([ord(char) for char in set(every) if char.isspace()], np.uint32)
    solid = ~np.isin(letters, blanks)
    place = np.arange(len(letters))
    # The first solid character from each one on, the last one up to it.
    after = np.minimum.accumulate(np.where(solid, place, len(letters))[::-1])[::-1]
    upto = np.maximum.accumulate(np.where(solid, place, -1))
    begins = np.cumsum([0, *map(len, contexts)])[:-1]  # (contexts,)
    base = np.repeat(begins, np.diff(texts.offsets))  # (T,) where each token's context begins
    start, end = texts.chars[:, 0] + base, texts.chars[:, 1] + base
    last = len(letters) - 1
    start = np.minimum(after[np.minimum(start, last)], end)  # a token of blanks alone is left empty
    end = np.maximum(upto[np.maximum(end - 1, 0)] + 1, start)
    return np.stack((start - base, end - base), 1).astype(np.int32)


def _spans(raw: SquadSplit, told: _Texts) -> np.ndarray:
    """(questions, 2) first and last token of the first answer, among the tokens of all paragraphs.

    -1 and -1 where there is none. The answer is tightened to the tokens that share a character
    with it.
    """
    about = np.asarray(raw.paragraphs)
    start, end = _golds(raw)  # (questions,) characters
    # Characters of all paragraphs in one count, in which tokens are sorted.
    begins = np.cumsum([0, *map(len, raw.contexts)])[:-1]  # (contexts,)
    base = np.repeat(begins, np.diff(told.offsets))  # (T,)
    first = np.searchsorted(told.chars[:, 1] + base, start + begins[about], side="right")
    last = np.searchsorted(told.chars[:, 0] + base, end + begins[about], side="left") - 1
    has = start >= 0
    lost = np.flatnonzero(has & (first > last))
    if len(lost):
        row = int(lost[0])
        raise DataError(
            f"{raw.where(row)}: this tokenizer leaves nothing of the answer "
            f"{raw.answers[row][0]!r:.60}"  # type: ignore[index]
        )
    return np.where(has[:, None], np.stack((first, last), 1), -1)


def _check_room(
    raw: SquadSplit,
    room: np.ndarray,
    length: np.ndarray,
    query: np.ndarray,
    max_length: int,
    doc_stride: int,
) -> None:
    """Raises where a question's windows hold nothing, or leave gaps, or there is nothing to hold.

    Args:
        room: (questions,) tokens that a window holds.
        length: (questions,) tokens of the paragraph.
        query: (questions,) tokens of the question.
    """
    for bad, reason in (
        (length == 0, "this tokenizer leaves nothing of its paragraph"),
        (room < 1, "it leaves no room for the paragraph in a window of {max_length}: use a larger "
         "--max_length, or a --max_query_length below {query}"),
        ((room < doc_stride) & (length > room), "it leaves a window {room} tokens of the "
         "paragraph, and windows begin every {doc_stride}: what is between would be in none; use "
         "--doc_stride {room} or less"),
    ):  # fmt: skip
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            values = {"room": room[row], "query": query[row]}
            reason = reason.format(max_length=max_length, doc_stride=doc_stride, **values)
            raise DataError(f"{raw.where(row)} ({query[row]} tokens): {reason}")


# -- pieces of flat arrays ----------------------------------------------------------------------


def _counting(counts: np.ndarray) -> np.ndarray:
    """(Σ counts,) 0, 1, … for each count."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _copy(
    target: np.ndarray,
    places: np.ndarray,
    source: np.ndarray,
    starts: np.ndarray,
    sizes: np.ndarray,
) -> None:
    """For all i: sizes[i] of `source` from starts[i] on, to `target` from places[i] on."""
    step = _counting(sizes)
    target[np.repeat(places, sizes) + step] = source[np.repeat(starts, sizes) + step]
