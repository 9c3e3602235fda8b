"""Scores over the vocabulary: the head's product, its normaliser, edits, and the best of them.

Scores live in one buffer (P, R), fp32: a row per token, a column per hypothesis. So the product
reads the head's weight as it is stored, and everything after it goes along whole vectors. P is the
vocabulary rounded up to whole blocks; what lies beyond the vocabulary is -inf. The best of a column
are found among the blocks with the highest maxima, which costs one pass over the buffer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..heads import Decoder
from .options import SearchOptions
from .rules import Hypothesis, Search, completing_ngrams

BLOCK = 16  # scores that share a maximum
TOKENS = 1024  # of the head's product at a time: a CPU's caches hold such a piece of the weight
FEW = 64  # below so many columns MKL is a fifth faster at the transposed product
NUMBERS_AT_ONCE = 1 << 17  # exponentials taken at a time, in the caches too


class Scores:
    """The scores of R hypotheses, made by `of` and then read; the buffer is used again."""

    def __init__(self, head: nn.Module, vocabulary: int) -> None:
        self.head, self.vocabulary = head, vocabulary
        self.height = -(-vocabulary // BLOCK) * BLOCK  # P
        self._buffer = torch.empty(0)

    def of(self, hidden: Tensor) -> None:
        """Computes the logits of `hidden` (R, H)."""
        rows = len(hidden)
        if self.height * rows > len(self._buffer) or self._buffer.device != hidden.device:
            self._buffer = torch.empty(self.height * rows, device=hidden.device)
        self.values = self._buffer[: self.height * rows].view(self.height, rows)  # (P, R)
        self.values[self.vocabulary :] = -math.inf
        self._maxima: Tensor | None = None
        head, logits = self.head, self.values[: self.vocabulary]
        plain = type(head) in (Decoder, nn.Linear) and head.bias is None
        if not (plain and hidden.device.type == "cpu" and head.weight.dtype == torch.float32):
            logits.copy_(head(hidden).T)
            return
        pieces = zip(head.weight.split(TOKENS), logits.split(TOKENS), strict=True)
        for weight, out in pieces:  # (n, H), (n, R)
            if rows < FEW:
                out.copy_((hidden @ weight.T).T)
            else:
                torch.mm(weight, hidden.T, out=out)

    def _blocks(self) -> Tensor:
        return self.values.view(-1, BLOCK, self.values.shape[1])  # (P / BLOCK, BLOCK, R)

    def maxima(self) -> Tensor:
        """(P / BLOCK, R): the highest score of every block."""
        if self._maxima is None:
            self._maxima = self._blocks().amax(1)
        return self._maxima

    def log_sums(self) -> Tensor:
        """(R, 1): log Σ exp."""
        if self.values.is_cuda:
            return self.values.logsumexp(0)[:, None]
        highest = self.maxima().amax(0)  # (R,)
        total = torch.zeros_like(highest)
        for piece in self.values.split(max(1, NUMBERS_AT_ONCE // len(highest))):
            total += (piece - highest).exp_().sum(0)
        return (highest + total.log_())[:, None]

    def edit(self, rows: list[tuple[Search, Hypothesis]], shift: Tensor | None) -> None:
        """Applies the repetition penalty ρ, then forbids repeated n-grams and an early EOS.

        A penalised score s becomes ρ·s below zero and s/ρ above.

        Args:
            rows: The hypothesis of every column.
            shift: (R, 1), s is the score less this; None for the score itself.
        """
        options, count = rows[0][0].options, len(rows)
        seen, banned = [], []  # places in the flat buffer
        for row, (search, hypothesis) in enumerate(rows):
            history = search.history(hypothesis)
            if options.repetition_penalty != 1.0:
                seen += [token * count + row for token in set(history)]
            if options.no_repeat_ngram_size:
                tokens = completing_ngrams(history, options.no_repeat_ngram_size)
                banned += [token * count + row for token in tokens]
            if len(hypothesis.tokens) < options.min_new_tokens:
                banned += [token * count + row for token in options.eos]
        if seen:
            self._penalise(seen, options.repetition_penalty, shift)
        if banned:
            places = torch.tensor(banned, device=self.values.device)
            self.values.view(-1)[places] = -math.inf
            self._update_maxima(places)

    def _penalise(self, seen: list[int], penalty: float, shift: Tensor | None) -> None:
        places = torch.tensor(seen, device=self.values.device)
        flat = self.values.view(-1)
        score = flat[places]
        of_row = 0.0 if shift is None else shift.flatten()[places % self.values.shape[1]]
        score = score - of_row
        flat[places] = torch.where(score < 0, score * penalty, score / penalty) + of_row
        self._update_maxima(places)

    def _update_maxima(self, places: Tensor) -> None:
        if self._maxima is not None:
            count = self.values.shape[1]
            block, row = places // (BLOCK * count), places % count
            self._maxima[block, row] = self._blocks()[block, :, row].amax(-1)

    def highest(self) -> Tensor:
        """(R,): the token of every column's highest score, the first of equal ones."""
        block = self.maxima().argmax(0)  # (R,)
        row = torch.arange(len(block), device=block.device)
        return block * BLOCK + self._blocks()[block, :, row].argmax(1)

    def best(self, count: int) -> tuple[Tensor, Tensor]:
        """The `count` highest scores of every column and their tokens, best first, (R, count) each.

        Where a column has fewer the rest is -inf.
        """
        maxima = self.maxima().T  # (R, P / BLOCK)
        blocks = maxima.topk(min(count, maxima.shape[1])).indices  # (R, c)
        row = torch.arange(len(blocks), device=blocks.device)[:, None]
        found = self._blocks()[blocks, :, row].flatten(1)  # (R, c·BLOCK)
        missing = max(0, count - found.shape[1])
        top = nn.functional.pad(found, (0, missing), value=-math.inf).topk(count)
        within = top.indices.clamp(max=found.shape[1] - 1)
        return top.values, blocks.gather(1, within // BLOCK) * BLOCK + within % BLOCK

    def sample(self, draws: Tensor, options: SearchOptions) -> Tensor:
        """(R,) tokens: at temperature τ, of the `top_k` best, of the fewest with mass `top_p`.

        A draw u in [0, 1) picks the first token, in order of falling probability where the tail is
        cut and of ids otherwise, at which the cumulated probability exceeds u.

        Args:
            draws: (R,).
            options: τ, `top_k` and `top_p`.
        """
        scores = self.values[: self.vocabulary].T.double() / options.temperature
        tokens = None
        if options.top_k is not None:
            scores, tokens = scores.topk(min(options.top_k, self.vocabulary))
        elif options.top_p < 1.0:
            scores, tokens = scores.sort(descending=True)
        mass = scores.softmax(-1).cumsum(-1)
        if options.top_p < 1.0:
            kept = (mass < options.top_p).sum(-1, keepdim=True)  # places before the last one kept
            total = mass.gather(1, kept.clamp(max=mass.shape[1] - 1))
        else:
            total = mass[:, -1:]
        place = torch.searchsorted(mass, draws[:, None].double() * total, right=True)
        place = place.clamp(max=mass.shape[1] - 1)
        return (place if tokens is None else tokens.gather(1, place))[:, 0]
