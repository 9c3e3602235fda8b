"""Which hypotheses survive, end and win: one object per context, plain numbers only.

Two rule books for beams. With S = Σ log p over a hypothesis of n new tokens, EOS counted:

* "lora", Microsoft's `gpt2_beam.py` (Hu et al. 2021): of all continuations the best `num_beams` are
  kept. Those that end leave, and compete by S / n^length_penalty for one place; the others go on,
  however few, while they can still win. Repetitions are looked for in the new tokens alone.
* "transformers", as Transformers 5 searches one context: of max(2, 1 + |EOS|)·num_beams
  continuations those among the first `num_beams` may end, the best `num_beams` others go on, and
  `num_beams` ended ones are kept. Repetitions are looked for in context and new tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from .options import SearchOptions

Candidate = tuple[float, int, int]  # S, place of the parent among the live ones, token


@dataclass(slots=True)
class Hypothesis:
    """A continuation of a context.

    Attributes:
        tokens: New tokens.
        score: S.
        parent: Place of its parent among the live hypotheses one step earlier.
        slots: Bit i is set where cache slot i holds one of its tokens; the context's not counted.
    """

    tokens: list[int] = field(default_factory=list)
    score: float = 0.0
    parent: int = 0
    slots: int = 0

    def followed_by(self, token: int, score: float, parent: int) -> Hypothesis:
        return Hypothesis([*self.tokens, token], score, parent, self.slots)


class Search:
    """The live hypotheses of one context, best first, and the ended ones."""

    def __init__(self, number: int, context: tuple[int, ...], options: SearchOptions) -> None:
        self.number, self.context, self.options = number, context, options
        self.live = [Hypothesis()]
        self.length = 0  # new tokens so far
        self.done = False

    def history(self, hypothesis: Hypothesis) -> list[int]:
        """The tokens in which repetitions are looked for."""
        if self.options.rules == "lora":
            return hypothesis.tokens
        return [*self.context, *hypothesis.tokens]

    def advance(self, candidates: Iterable[Candidate]) -> None:
        """One more token; `candidates` are the best continuations, best first."""
        self.length += 1
        self._select(candidates)
        if self.length == self.options.max_new_tokens or not self.live:
            self.done = True

    def _select(self, candidates: Iterable[Candidate]) -> None:
        raise NotImplementedError

    @property
    def result(self) -> list[int]:
        """The new tokens of the best hypothesis; none where every continuation was forbidden."""
        raise NotImplementedError

    def _ends(self, token: int) -> bool:
        return token in self.options.eos or self.length == self.options.max_new_tokens

    def _final(self, score: float, length: int) -> float:
        return score / length**self.options.length_penalty


class SingleSearch(Search):
    """One hypothesis that takes the token it is given: greedy decoding, or sampling."""

    def _select(self, candidates: Iterable[Candidate]) -> None:
        for _, _, token in candidates:
            self.live = [self.live[0].followed_by(token, 0.0, 0)]
            self.done = token in self.options.eos

    @property
    def result(self) -> list[int]:
        return self.live[0].tokens


class OriginalBeam(Search):
    """The rules "lora"."""

    def __init__(self, number: int, context: tuple[int, ...], options: SearchOptions) -> None:
        super().__init__(number, context, options)
        self.best, self.best_score = Hypothesis(), -math.inf

    def _select(self, candidates: Iterable[Candidate]) -> None:
        live = []
        for score, parent, token in candidates:
            if score == -math.inf:
                break
            child = self.live[parent].followed_by(token, score, parent)
            if not self._ends(token):
                live.append(child)
            elif (final := self._final(score, self.length)) > self.best_score:
                self.best, self.best_score = child, final
        # What cannot win is not continued. Whatever takes its place has a lower S and cannot win.
        self.live = [child for child in live if self._bound(child.score) > self.best_score]

    def _bound(self, score: float) -> float:
        """What a live hypothesis of this S can reach: S only falls, so its length is all it has."""
        longest = self.options.length_penalty >= 0
        return self._final(score, self.options.max_new_tokens if longest else self.length + 1)

    @property
    def result(self) -> list[int]:
        return self.best.tokens


class TransformersBeam(Search):
    """The rules "transformers"."""

    def __init__(self, number: int, context: tuple[int, ...], options: SearchOptions) -> None:
        super().__init__(number, context, options)
        self.ended: list[tuple[float, Hypothesis]] = []  # best first

    def _select(self, candidates: Iterable[Candidate]) -> None:
        beams = self.options.num_beams
        live = []
        for place, (score, parent, token) in enumerate(candidates):
            if score == -math.inf:
                break
            child = self.live[parent].followed_by(token, score, parent)
            if not self._ends(token):
                live.append(child)
            elif place < beams:
                self.ended.append((self._final(score, self.length), child))
        self.live = live[:beams]
        self.ended = sorted(self.ended, key=lambda pair: -pair[0])[:beams]
        if len(self.ended) == beams and live:
            stops = self.options.early_stopping
            longest = stops == "never" and self.options.length_penalty > 0
            length = self.options.max_new_tokens if longest else self.length
            hope = self._final(live[0].score, length)
            self.done = stops is True or hope <= self.ended[-1][0]

    @property
    def result(self) -> list[int]:
        return self.ended[0][1].tokens if self.ended else []


def start(number: int, context: tuple[int, ...], options: SearchOptions) -> Search:
    """The search of one context under the rules that `options` asks for."""
    if not options.is_beam:
        return SingleSearch(number, context, options)
    kind = OriginalBeam if options.rules == "lora" else TransformersBeam
    return kind(number, context, options)


def completing_ngrams(history: list[int], n: int) -> list[int]:
    """The tokens that would complete an n-gram that `history` already has."""
    if n == 1:
        return history
    if len(history) < n:
        return []
    tail, last = history[1 - n :], history[-1]
    banned, place = [], n - 2
    end = len(history) - 1  # of what has a token after it
    while True:
        try:
            place = history.index(last, place, end)
        except ValueError:
            return banned
        if history[place + 2 - n : place + 1] == tail:
            banned.append(history[place + 1])
        place += 1
