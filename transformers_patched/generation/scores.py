"""Scores over the vocabulary: the head's product, its normaliser, edits, and the best of them.

Scores live in one buffer (R, P), fp32, where P is the vocabulary rounded up to whole blocks; what
lies beyond the vocabulary is -inf. The best of a row are found among the blocks with the highest
maxima, which costs one pass over the buffer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..heads import Decoder
from .options import SearchOptions
from .rules import Hypothesis, Search, completing_ngrams

BLOCK = 64  # scores that share a maximum
COLUMNS = 1024  # of the head's product at a time: a CPU's caches hold such a piece of the weight
NUMBERS_AT_ONCE = 1 << 19  # exponentials taken at a time, in the caches too


class Scores:
    """The scores of R hypotheses, made by `of` and then read; the buffer is used again."""

    def __init__(self, head: nn.Module, vocabulary: int) -> None:
        self.head, self.vocabulary = head, vocabulary
        self.width = -(-vocabulary // BLOCK) * BLOCK
        self._buffer = torch.empty(0, self.width)

    def of(self, hidden: Tensor) -> None:
        """Computes the logits of `hidden` (R, H)."""
        rows = len(hidden)
        if rows > len(self._buffer) or self._buffer.device != hidden.device:
            self._buffer = torch.full((rows, self.width), -math.inf, device=hidden.device)
        self.values = self._buffer[:rows]  # (R, P)
        head = self.head
        plain = type(head) in (Decoder, nn.Linear) and head.bias is None
        if plain and hidden.device.type == "cpu" and head.weight.dtype == torch.float32:
            for start in range(0, self.vocabulary, COLUMNS):
                end = min(start + COLUMNS, self.vocabulary)
                out = self.values[:, start:end]
                torch.mm(hidden, head.weight[start:end].T, out=out)
        else:
            self.values[:, : self.vocabulary] = head(hidden)
        self._maxima: Tensor | None = None

    def maxima(self) -> Tensor:
        """(R, P / BLOCK): the highest score of every block."""
        if self._maxima is None:
            self._maxima = self.values.view(len(self.values), -1, BLOCK).amax(-1)
        return self._maxima

    def log_sums(self) -> Tensor:
        """(R, 1): log Σ exp."""
        if self.values.is_cuda:
            return self.values.logsumexp(1, keepdim=True)
        highest = self.maxima().amax(1, keepdim=True)  # (R, 1)
        step = max(1, NUMBERS_AT_ONCE // self.width)
        sums = [
            (x - top).exp_().sum(1, keepdim=True)
            for x, top in zip(self.values.split(step), highest.split(step), strict=True)
        ]
        return highest + torch.cat(sums).log_()

    def edit(self, rows: list[tuple[Search, Hypothesis]], shift: Tensor | None) -> None:
        """Applies the repetition penalty ρ, then forbids repeated n-grams and an early EOS.

        A penalised score s becomes ρ·s below zero and s/ρ above.

        Args:
            rows: The hypothesis of every row.
            shift: (R, 1), s is the score less this; None for the score itself.
        """
        options = rows[0][0].options
        seen, banned = [], []
        for row, (search, hypothesis) in enumerate(rows):
            offset = row * self.width
            history = search.history(hypothesis)
            if options.repetition_penalty != 1.0:
                seen += [offset + token for token in set(history)]
            if options.no_repeat_ngram_size:
                tokens = completing_ngrams(history, options.no_repeat_ngram_size)
                banned += [offset + token for token in tokens]
            if len(hypothesis.tokens) < options.min_new_tokens:
                banned += [offset + token for token in options.eos]
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
        of_row = 0.0 if shift is None else shift.flatten()[places // self.width]
        score = score - of_row
        flat[places] = torch.where(score < 0, score * penalty, score / penalty) + of_row
        self._update_maxima(places)

    def _update_maxima(self, places: Tensor) -> None:
        if self._maxima is not None:
            blocks = places // BLOCK  # of the whole buffer, whose rows are whole blocks
            self._maxima.view(-1)[blocks] = self.values.view(-1, BLOCK)[blocks].amax(-1)

    def best(self, count: int) -> tuple[Tensor, Tensor]:
        """The `count` highest scores of every row, best first, and their tokens; (R, count) each.

        Where a row has fewer scores the rest is -inf.
        """
        rows = len(self.values)
        blocks = self.maxima().topk(min(count, self.width // BLOCK)).indices  # (R, c)
        found = self.values.view(rows, -1, BLOCK).gather(
            1, blocks[..., None].expand(-1, -1, BLOCK)
        )  # (R, c, BLOCK)
        missing = max(0, count - found[0].numel())
        top = nn.functional.pad(found.flatten(1), (0, missing), value=-math.inf).topk(count)
        within = top.indices.clamp(max=found[0].numel() - 1)
        tokens = blocks.gather(1, within // BLOCK) * BLOCK + within % BLOCK
        return top.values, tokens

    def sample(self, draws: Tensor, options: SearchOptions) -> Tensor:
        """(R,) tokens: at temperature τ, of the `top_k` best, of the fewest with mass `top_p`.

        A draw u in [0, 1) picks the first token, in order of falling probability where the tail is
        cut and of ids otherwise, at which the cumulated probability exceeds u.

        Args:
            draws: (R,).
            options: τ, `top_k` and `top_p`.
        """
        scores = self.values[:, : self.vocabulary].double() / options.temperature
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
