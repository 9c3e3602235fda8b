"""Order and batching of rows; padding or packing into tensors.

One optimiser step takes a *global batch* of rows: it is formed first, then split over processes
and into micro-batches. So p processes of b rows see what one process of p·b rows sees. The order is
f(seed, epoch) through a counter-based generator: any epoch, any global batch, can be entered
directly, which is how a resumed run skips what it has done.

    random   rows in random order
    bucket   rows of similar length share a batch, so there is little padding: the rows of every
             CHUNK global batches are sorted by length, then the batches are shuffled

Collated batches are padded to their longest row, padded to a fixed width, or packed: the tokens
of all rows end to end with `cu_seqlens`, no padding at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from examples.data.encode import EncodedSplit

CHUNK = 50  # global batches sorted together: enough to fill buckets, few enough to stay random
ORDERS = ("bucket", "random")
NO_COUNT = 1e-4  # added to counts, so that a global batch in which nothing counts has no loss


class Rows(Protocol):
    """What batching must know of a split: what a row is, and its tensors, is its collate's."""

    @property
    def lengths(self) -> np.ndarray:
        """(n,) tokens per row."""
        ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    Attributes:
        rows: (b,) row numbers.
        tokens: real tokens, padding not counted.
        weight: its share of what the global batch's loss is a mean over, rows or scored tokens: Σ
            weight · mean loss over all micro-batches of all processes is the mean loss of the
            global batch. 0 marks a batch that only keeps a process in step with the others, which
            have one more.
    """

    rows: np.ndarray
    tokens: int
    weight: float = 1.0


@dataclass(frozen=True)
class GlobalBatch:
    """One optimiser step: the micro-batches of this process.

    Attributes:
        index: which of its epoch.
        micro_batches: this process's, at least one.
        rows: how many rows all processes have together.
    """

    index: int
    micro_batches: tuple[Batch, ...]
    rows: int

    @property
    def tokens(self) -> int:
        """Real tokens of this process."""
        return sum(batch.tokens for batch in self.micro_batches if batch.weight)


class TrainingBatches:
    """The global batches of every epoch of a split.

    Args:
        split: encoded rows.
        batch_size: rows per micro-batch and process.
        accumulation: micro-batches per global batch and process.
        processes: how many there are; `process` is this one's number.
        seed: of the order.
        order: "bucket" or "random".
        max_tokens: micro-batches hold at most this many tokens instead of `batch_size` rows; the
            global batch keeps its rows and gets as many micro-batches as that takes.
        counts: (n,) what the loss of each row is a mean over, such as its scored tokens; None: a
            row counts for one.
    """

    def __init__(
        self,
        split: Rows,
        batch_size: int,
        *,
        accumulation: int = 1,
        processes: int = 1,
        process: int = 0,
        seed: int = 0,
        order: str = "bucket",
        max_tokens: int | None = None,
        counts: np.ndarray | None = None,
    ) -> None:
        for name, value in (
            ("batch_size", batch_size),
            ("accumulation", accumulation),
            ("processes", processes),
        ):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not 0 <= process < processes:
            raise ValueError(f"process={process} must be in 0..{processes - 1}")
        if order not in ORDERS:
            raise ValueError(f"order={order!r}: choose one of {', '.join(ORDERS)}")
        _check_budget(split, max_tokens)
        self.split = split
        self.lengths = split.lengths
        self.batch_size = batch_size
        self.global_batch_size = batch_size * accumulation * processes
        self.processes, self.process = processes, process
        self.seed, self.order, self.max_tokens = seed, order, max_tokens
        self.counts = counts

    @property
    def counted(self) -> int:
        """What the loss of an epoch is a mean over: rows, or scored tokens."""
        return len(self.split) if self.counts is None else int(self.counts.sum())

    def __len__(self) -> int:
        """Global batches (optimiser steps) per epoch; the last may hold fewer rows."""
        return -(-len(self.split) // self.global_batch_size)

    def global_batches(self, epoch: int, start: int = 0) -> Iterator[GlobalBatch]:
        """The global batches of an epoch, from number `start` on."""
        rows = self._epoch_order(epoch)
        size = self.global_batch_size
        for index in range(start, len(self)):
            yield self._split(index, rows[index * size : (index + 1) * size])

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """(n,) row numbers; the global batches are consecutive pieces, the short one last."""
        rows = permutation(len(self.split), self.seed, epoch)
        if self.order == "random":
            return rows
        size = self.global_batch_size
        full = len(rows) // size * size  # rows of complete global batches
        # Each piece: (≤ CHUNK, size) rows, one global batch a line.
        pieces = [
            _by_length(piece, self.lengths).reshape(-1, size)
            for piece in np.split(rows[:full], range(CHUNK * size, full, CHUNK * size))
        ]
        batches = np.concatenate(pieces) if full else rows[:0].reshape(0, size)  # (batches, size)
        # Another stream than the rows': the number of batches may equal the number of rows.
        batches = batches[permutation(len(batches), self.seed, epoch, stream=1)]
        return np.concatenate((batches.reshape(-1), rows[full:]))

    def _split(self, index: int, rows: np.ndarray) -> GlobalBatch:
        """Splits the rows of a global batch into micro-batches and takes this process's.

        Every process computes the same split, so they agree without exchanging anything.
        """
        if self.order == "bucket" or self.max_tokens is not None:
            rows = _by_length(rows, self.lengths)  # a micro-batch is padded to its longest row
        if self.max_tokens is not None:
            pieces = split_by_tokens(rows, self.lengths, self.max_tokens)
        else:
            pieces = np.array_split(rows, -(-len(rows) // self.batch_size))
        # Processes exchange gradients, so each needs the same number of micro-batches. Pieces are
        # halved until there are enough for all, unless the rows themselves are too few.
        share = -(-len(pieces) // self.processes)  # micro-batches of each process
        pieces = _halve(pieces, min(share * self.processes, len(rows)), self.lengths)
        # Dealt out in turn, so that long and short rows are spread over the processes.
        mine = [
            Batch(piece, int(self.lengths[piece].sum()), self._share(piece, rows))
            for piece in pieces[self.process :: self.processes]
        ]
        if len(mine) < share:
            # Any row will do: its weight of 0 leaves loss and gradient as they are.
            filler = rows[:1]
            mine.append(Batch(filler, int(self.lengths[filler].sum()), 0.0))
        return GlobalBatch(index, tuple(mine), len(rows))

    def _share(self, piece: np.ndarray, rows: np.ndarray) -> float:
        """The weight of a micro-batch among the rows of its global batch."""
        if self.counts is None:
            return len(piece) / len(rows)
        return float(self.counts[piece].sum() / (self.counts[rows].sum() + NO_COUNT))


def evaluation_batches(
    split: Rows,
    batch_size: int,
    *,
    processes: int = 1,
    process: int = 0,
    max_tokens: int | None = None,
) -> list[Batch]:
    """This process's batches of a split; each row is in exactly one batch of one process.

    The longest rows come first, so a batch that needs too much memory fails at once. Results are
    put back in order by `out[batch.rows] = logits`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    _check_budget(split, max_tokens)
    lengths = split.lengths
    rows = _by_length(np.arange(len(split)), lengths)[::-1]
    if max_tokens is not None:
        pieces = split_by_tokens(rows, lengths, max_tokens)
    else:
        pieces = np.split(rows, range(batch_size, len(rows), batch_size))
    return [
        Batch(piece, int(lengths[piece].sum()), len(piece) / len(rows))
        for piece in pieces[process::processes]
    ]


def permutation(n: int, seed: int, epoch: int, stream: int = 0) -> np.ndarray:
    """(n,) a random order of 0..n-1 that depends on nothing but the arguments.

    Sorts the raw output of the Philox counter generator, which its definition fixes; a library's
    shuffle may change with its version.
    """
    key = np.array([seed % 2**64, stream], np.uint64)
    raw = np.random.Philox(key=key, counter=[0, 0, 0, epoch]).random_raw(n)
    return np.argsort(raw, kind="stable")


def split_by_tokens(rows: np.ndarray, lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Consecutive pieces of `rows` of at most `max_tokens` tokens each, none of them empty."""
    ends = np.cumsum(lengths[rows])  # (len(rows),) tokens up to and with each row
    cuts, done = [], 0  # done: tokens before the last cut
    while True:
        # The first row that would exceed the budget begins the next piece.
        cut = int(np.searchsorted(ends, done + max_tokens, side="right"))
        if cut >= len(rows):
            return np.split(rows, cuts)
        cuts.append(cut)
        done = int(ends[cut - 1])


def collate(
    split: EncodedSplit,
    batch: Batch,
    *,
    packed: bool = False,
    width: int | None = None,
    multiple: int = 1,
) -> dict[str, torch.Tensor | int]:
    """The tensors of a batch of b rows and T tokens, under the names of the model's arguments.

    Args:
        packed: `input_ids (T,)`, `cu_seqlens (b + 1,) int32`, `max_seqlen`; else padded to
            `input_ids (b, width)` with `attention_mask`.
        width: padded to this many tokens; default the longest row's.
        multiple: the default width is rounded up to a multiple of this.
    """
    rows = batch.rows
    starts, lengths = split.offsets[rows], split.offsets[rows + 1] - split.offsets[rows]  # (b,)
    ends = np.cumsum(lengths)  # (b,) where each row ends in the batch
    # Token t of the batch is token `source[t]` of the split: each row's start plus 0, 1, 2, …
    source = np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)  # (T,)
    tokens = split.tokens[source].astype(np.int64)  # (T,)
    longest = int(lengths.max())
    data: dict[str, torch.Tensor | int]
    if packed:
        data = {
            "input_ids": torch.from_numpy(tokens),
            "cu_seqlens": torch.from_numpy(np.concatenate(([0], ends)).astype(np.int32)),
            "max_seqlen": longest,
        }
        if split.token_types:
            place = source - np.repeat(starts, lengths)  # (T,) 0, 1, … in every row
            second = place >= np.repeat(split.first[rows], lengths)  # (T,)
            data["token_type_ids"] = torch.from_numpy(second.astype(np.int64))
    else:
        if width is not None and width < longest:
            raise ValueError(f"width={width}, but a row has {longest} tokens")
        size = width if width is not None else -(-longest // multiple) * multiple
        place = np.arange(size)[None]  # (1, size)
        real = place < lengths[:, None]  # (b, size)
        ids = np.full(real.shape, split.pad_id, np.int64)  # (b, size)
        ids[real] = tokens  # both run row by row
        data = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(real.astype(np.int64)),
        }
        if split.token_types:
            second = (place >= split.first[rows][:, None]) & real  # (b, size)
            data["token_type_ids"] = torch.from_numpy(second.astype(np.int64))
    if split.labels is not None:
        data["labels"] = torch.from_numpy(split.labels[rows])
    return data


def on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on the device."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


def _by_length(rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The rows, shortest first; a stable sort, so every process and version gets the same."""
    return rows[np.argsort(lengths[rows], kind="stable")]


def _halve(pieces: list[np.ndarray], count: int, lengths: np.ndarray) -> list[np.ndarray]:
    """Halves the largest piece, again and again, until there are `count`."""
    while len(pieces) < count:
        # By tokens, which are the work of a piece. A single row cannot be halved.
        tokens = [lengths[piece].sum() if len(piece) > 1 else 0 for piece in pieces]
        at = int(np.argmax(tokens))
        pieces = [*pieces[:at], *np.array_split(pieces[at], 2), *pieces[at + 1 :]]
    return pieces


def _check_budget(split: Rows, max_tokens: int | None) -> None:
    """Raises ValueError where the longest row alone has more than `max_tokens`."""
    if max_tokens is None or not len(split):
        return
    longest = int(split.lengths.max())
    if max_tokens < longest:
        raise ValueError(
            f"max_tokens={max_tokens}, but a row has {longest} tokens; use at least "
            "that, or a smaller max_length"
        )
