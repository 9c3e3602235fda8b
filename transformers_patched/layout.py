"""Where the tokens of a batch are: padded to a rectangle, or packed one after the other.

A `SequenceLayout` is made once per forward pass and handed to every layer. It holds what attention
needs to know and would otherwise work out again in each layer: the mask in every form and dtype
asked for, and for packed tokens the row maps between the packed (T, ...) and the padded (B, L, ...)
form.

Both directions of such a move are one `index_select`, in the backward pass too: every token occurs
exactly once, so no gradient is ever added up.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Rounding up keeps the shapes of matrix products few, see `SequenceLayout.round_up_rows`: (the
# smallest step, the share of the number that a step may be).
ROW_STEP = 32, 1 / 16
NO_STEP = 1, 0.0


class SequenceLayout:
    """The places of the tokens of `num_sequences` sequences. Make one with `padded` or `packed`.

    Attributes:
        is_packed: Whether hidden states are (T, hidden) rather than (B, L, hidden).
        num_sequences: B, the number of sequences.
        max_seqlen: L, the length of the longest sequence, or of the padded rectangle.
        num_tokens: T, or B·L padded.
        num_rows: Rows of the hidden states within an encoder: T rounded up, see `round_up_rows`; or
            B·L padded.
        device: Where the tokens are.
        key_mask: (B, L) bool, True at real tokens of the padded form; None where all are real.
        nonempty: (B,) bool, False at sequences without any real token; None where there are none.
        cu_seqlens: (B + 1,) int32, where each packed sequence starts, and the end; None padded.
    """

    def __init__(
        self,
        num_sequences: int,
        max_seqlen: int,
        num_tokens: int,
        device: torch.device,
        key_mask: Tensor | None,
        cu_seqlens: Tensor | None = None,
    ) -> None:
        self.num_sequences = num_sequences
        self.max_seqlen = max_seqlen
        self.num_tokens = num_tokens
        self.num_rows = num_tokens if cu_seqlens is None else round_up(num_tokens, ROW_STEP)
        self.device = device
        self.key_mask = key_mask
        self.nonempty: Tensor | None = None
        self.cu_seqlens = cu_seqlens
        self._bias: dict[torch.dtype, Tensor] = {}
        self._rows: tuple[Tensor, Tensor] | None = None
        self.cache: dict[Hashable, Any] = {}  # what others work out once per layout

    @property
    def is_packed(self) -> bool:
        return self.cu_seqlens is not None

    # ------------------------------------------------------------------ construction

    @classmethod
    def padded(
        cls,
        attention_mask: Tensor | None,
        batch: int,
        length: int,
        device: torch.device | str,
    ) -> SequenceLayout:
        """A rectangle (B, L) of tokens, of which `attention_mask` (B, L) marks the real ones.

        Args:
            attention_mask: bool or integer, nonzero at real tokens; None where all are real.
            batch: B.
            length: L.
            device: Device of the hidden states.
        """
        device = torch.device(device)
        if attention_mask is None:
            return cls(batch, length, batch * length, device, None)
        if tuple(attention_mask.shape) != (batch, length):
            raise ValueError(
                f"attention_mask must have the shape {(batch, length)} of the input, "
                f"not {tuple(attention_mask.shape)}"
            )
        if attention_mask.is_floating_point():
            raise TypeError(
                "attention_mask must be bool or integer (1 at real tokens, 0 at padding), "
                f"not {attention_mask.dtype}"
            )
        mask = attention_mask.to(device=device, dtype=torch.bool)
        # Looking at the values is free on a CPU; elsewhere it would stall the launch of every
        # kernel, and break a compiled graph.
        look = device.type == "cpu" and not torch.compiler.is_compiling()
        if look and bool(mask.all()):
            return cls(batch, length, batch * length, device, None)
        layout = cls(batch, length, batch * length, device, mask)
        nonempty = mask.any(dim=1)
        if not (look and bool(nonempty.all())):
            layout.nonempty = nonempty
        return layout

    @classmethod
    def packed(
        cls, cu_seqlens: Tensor, max_seqlen: int, num_tokens: int | None = None
    ) -> SequenceLayout:
        """Tokens (T,) of B sequences without padding; sequence i is cu_seqlens[i]:cu_seqlens[i+1].

        Args:
            cu_seqlens: (B + 1,) int32, from 0 to T, ascending: no sequence is empty.
            max_seqlen: At least the length of the longest sequence.
            num_tokens: T, checked against `cu_seqlens`; without it a GPU has to be asked.
        """
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
            raise ValueError(
                "cu_seqlens must be a vector of at least two offsets, the first 0 and the last the "
                f"number of tokens, not a tensor of shape {tuple(cu_seqlens.shape)}"
            )
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens must be int32, not {cu_seqlens.dtype}")
        cu_seqlens = cu_seqlens.to(torch.int32)
        max_seqlen = int(max_seqlen)
        if max_seqlen < 1:
            raise ValueError(f"max_seqlen must be at least 1, not {max_seqlen}")
        if cu_seqlens.device.type == "cpu":
            max_seqlen, num_tokens = _check_offsets(cu_seqlens.tolist(), max_seqlen, num_tokens)
        else:
            num_tokens = _check_offsets_on_device(cu_seqlens, max_seqlen, num_tokens)
        batch = cu_seqlens.numel() - 1
        device = cu_seqlens.device
        lengths = cu_seqlens.diff()  # (B,)
        mask = torch.arange(max_seqlen, device=device) < lengths[:, None]  # (B, L)
        full = batch * max_seqlen == num_tokens
        return cls(batch, max_seqlen, num_tokens, device, None if full else mask, cu_seqlens)

    # ------------------------------------------------------------------ where tokens are

    def cls_index(self) -> Tensor:
        """(B,) index of the first token of every sequence among the (flattened) tokens."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens[:-1].long()
        return torch.arange(0, self.num_tokens, self.max_seqlen, device=self.device)

    def position_ids(self, offset: int = 0) -> Tensor:
        """Positions within each sequence, from `offset`: (T,) packed, (1, L) padded."""
        if self.cu_seqlens is None:
            return torch.arange(offset, offset + self.max_seqlen, device=self.device)[None]
        starts = self.cu_seqlens[:-1].long()  # (B,)
        lengths = self.cu_seqlens.diff()  # (B,)
        shift = starts.repeat_interleave(lengths, output_size=self.num_tokens)  # (T,)
        return torch.arange(offset, offset + self.num_tokens, device=self.device) - shift

    def sequence_ids(self) -> Tensor:
        """(T,) number of the sequence that each packed token belongs to."""
        if self.cu_seqlens is None:
            raise ValueError("sequence_ids() asks for packed tokens; these are padded")
        numbers = torch.arange(self.num_sequences, device=self.device)  # (B,)
        return numbers.repeat_interleave(self.cu_seqlens.diff(), output_size=self.num_tokens)

    def round_up_rows(self, x: Tensor) -> Tensor:
        """(T, ...) to (num_rows, ...), where the rows after T are zeros and belong to nobody.

        Some of a CPU's kernels (bf16 products, GELU) are compiled for their very shape, which takes
        milliseconds, and kept, which takes megabytes. Packed batches rarely repeat their T, so an
        encoder that trains works on T rounded up: few shapes, each made once. No token attends to
        filler, and no gradient comes from it. Other devices keep T as it is.
        """
        if self.num_rows == self.num_tokens or x.device.type != "cpu":
            return x
        return nn.functional.pad(x, (0, 0) * (x.dim() - 1) + (0, self.num_rows - self.num_tokens))

    def drop_filler(self, x: Tensor) -> Tensor:
        """(num_rows, ...) to (T, ...), the inverse of `round_up_rows`."""
        return x[: self.num_tokens] if self.is_packed else x

    def check_tokens(self, x: Tensor, name: str) -> None:
        """Raises ValueError where the leading dimensions of `x` are not this layout's tokens."""
        expected = (self.num_tokens,) if self.is_packed else (self.num_sequences, self.max_seqlen)
        if self.is_packed and x.shape[:1] == (self.num_rows,):
            return  # filled
        if tuple(x.shape[: len(expected)]) != expected:
            raise ValueError(
                f"{name} has the shape {tuple(x.shape)}; its first dimensions must be the tokens "
                f"{expected} of the {'packed' if self.is_packed else 'padded'} layout"
            )

    # ------------------------------------------------------------------ packed <-> padded

    def pad(self, x: Tensor) -> Tensor:
        """(T, ...) to (B, L, ...) with zeros at padding; padded tokens are returned as they are."""
        self.check_tokens(x, "x")
        if self.cu_seqlens is None:
            return x
        x = x[: self.num_tokens]
        indices, inverse = self._token_rows()
        padded = _MoveRows.apply(x, indices, inverse, self._padding(), None)  # (B·L, ...)
        return padded.view(self.num_sequences, self.max_seqlen, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        """(B, L, ...) to (T, ...), the inverse of `pad`; padded tokens are returned as they are."""
        if tuple(x.shape[:2]) != (self.num_sequences, self.max_seqlen):
            raise ValueError(
                f"x must start with the dimensions {(self.num_sequences, self.max_seqlen)}, "
                f"not {tuple(x.shape)}"
            )
        if self.cu_seqlens is None:
            return x
        indices, inverse = self._token_rows()
        return _MoveRows.apply(x.flatten(0, 1), inverse, indices, None, self._padding())

    def _token_rows(self) -> tuple[Tensor, Tensor]:
        """(B·L,) packed row of each padded row, 0 at padding; (T,) padded row of each token."""
        if self._rows is None:
            starts = self.cu_seqlens[:-1].long()  # (B,)
            indices = starts[:, None] + torch.arange(self.max_seqlen, device=self.device)  # (B, L)
            if self.key_mask is not None:
                indices = indices.masked_fill(~self.key_mask, 0)
            inverse = self.sequence_ids() * self.max_seqlen + self.position_ids()  # (T,)
            self._rows = indices.flatten(), inverse
        return self._rows

    def _padding(self) -> Tensor | None:
        """(B·L,) bool, True at padding; None where there is none."""
        return None if self.key_mask is None else ~self.key_mask.flatten()

    # ------------------------------------------------------------------ masks for attention

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """(B, 1, 1, L), added to the scores: 0 at real keys, the lowest of `dtype` elsewhere."""
        if self.key_mask is None:
            return None
        if dtype not in self._bias:
            bias = torch.zeros(self.key_mask.shape, dtype=dtype, device=self.device)  # (B, L)
            bias.masked_fill_(~self.key_mask, torch.finfo(dtype).min)
            self._bias[dtype] = bias[:, None, None, :]
        return self._bias[dtype]

    @property
    def pads_right(self) -> bool:
        """Whether padding follows the tokens of every sequence, so that a causal mask hides it.

        Packed tokens always pad so. Of a rectangle with a mask only a CPU looks at the values:
        elsewhere the answer would be waited for, and is False.
        """
        if self.is_packed or self.key_mask is None:
            return True
        if self.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        if "pads right" not in self.cache:
            mask = self.key_mask
            self.cache["pads right"] = bool((mask[:, :-1] | ~mask[:, 1:]).all())
        return self.cache["pads right"]

    def causal_bias(self, dtype: torch.dtype) -> Tensor:
        """Added to the scores (B, heads, L, L): 0 at a query's own key and at earlier ones.

        The lowest of `dtype` elsewhere: (1, 1, L, L), or (B, 1, L, L) where there is padding that
        the triangle does not hide.
        """
        key = "causal bias", dtype
        if key not in self.cache:
            n, lowest = self.max_seqlen, torch.finfo(dtype).min
            bias = torch.full((1, 1, n, n), lowest, dtype=dtype, device=self.device).triu_(1)
            if not self.pads_right:
                bias = bias.expand(self.num_sequences, 1, n, n).masked_fill(
                    ~self.key_mask[:, None, None, :], lowest
                )
            self.cache[key] = bias
        return self.cache[key]

    def clear_empty(self, x: Tensor) -> Tensor:
        """Zeroes what belongs to sequences without any real token, in `x` (B, ., ., .)."""
        return x if self.nonempty is None else x * self.nonempty[:, None, None, None]


def round_up(number: int, step: tuple[int, float]) -> int:
    """`number` rounded up to a multiple of the smallest step, doubled while the share allows it."""
    size, share = step
    while 2 * size <= share * number:
        size *= 2
    return -(-number // size) * size


class _MoveRows(torch.autograd.Function):
    """y = x[indices], zero where `padding_y`; dx = dy[inverse], zero where `padding_x`."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        indices: Tensor,
        inverse: Tensor,
        padding_y: Tensor | None,
        padding_x: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(inverse, padding_x)
        y = x.index_select(0, indices)
        return y if padding_y is None else y.masked_fill_(_like_rows(padding_y, y), 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        inverse, padding_x = ctx.saved_tensors
        dx = grad.index_select(0, inverse)
        if padding_x is not None:
            dx.masked_fill_(_like_rows(padding_x, dx), 0)
        return dx, None, None, None, None


def _like_rows(mask: Tensor, x: Tensor) -> Tensor:
    """`mask` (rows,) with as many dimensions as `x` (rows, ...)."""
    return mask.view(-1, *[1] * (x.dim() - 1))


def _check_offsets(offsets: list[int], max_seqlen: int, num_tokens: int | None) -> tuple[int, int]:
    """Checks `cu_seqlens` by value; returns the longest length and the number of tokens."""
    if offsets[0] != 0:
        raise ValueError(f"cu_seqlens must start with 0, not {offsets[0]}")
    lengths = [end - start for start, end in zip(offsets, offsets[1:], strict=False)]
    for i, length in enumerate(lengths):
        if length < 1:
            what = "is empty" if length == 0 else f"ends before it starts (length {length})"
            raise ValueError(
                f"cu_seqlens must ascend: sequence {i}, from {offsets[i]} to {offsets[i + 1]}, "
                f"{what}"
            )
    if num_tokens is not None and offsets[-1] != num_tokens:
        raise ValueError(f"cu_seqlens ends at {offsets[-1]}, but there are {num_tokens} tokens")
    if max(lengths) > max_seqlen:
        raise ValueError(
            f"max_seqlen is {max_seqlen}, but sequence {lengths.index(max(lengths))} "
            f"has {max(lengths)} tokens"
        )
    return max(lengths), offsets[-1]


def _check_offsets_on_device(cu_seqlens: Tensor, max_seqlen: int, num_tokens: int | None) -> int:
    """The same checks without waiting for the device: a wrong value stops it with this message."""
    if num_tokens is None:
        num_tokens = int(cu_seqlens[-1])
    lengths = cu_seqlens.diff()
    good = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == num_tokens)
    good = good & (lengths > 0).all() & (lengths <= max_seqlen).all()
    torch._assert_async(
        good,
        "cu_seqlens must start with 0, ascend, end with the number of tokens, and have no sequence "
        "longer than max_seqlen",
    )
    return num_tokens
