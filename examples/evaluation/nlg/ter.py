"""Translation edit rate as WebNLG's scripts compute it (Snover et al. 2006)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import fmean

from examples.evaluation.nlg.words import Words


def ter(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """The mean over texts of the least edit rate over references; an empty reference counts 1."""
    return fmean(
        min(edit_rate(words, text) if text else 1.0 for text in texts)
        for words, texts in zip(hypotheses, references, strict=True)
    )


def edit_rate(hypothesis: Words, reference: Words) -> float:
    """(shifts + words inserted, deleted, replaced) / words of the reference.

    A shift moves a run of words to the place where the reference has it. While one lowers the
    number of edits, the best is made; of equal ones that whose words come last in the alphabet.
    """
    distance = edit_distance_to(reference)
    words, shifts = list(hypothesis), 0
    edits = distance(words)
    while True:
        shifted = [(-distance(moved), moved) for moved in _shifts(words, reference)]
        if not shifted or -max(shifted)[0] >= edits:
            return (shifts + edits) / len(reference)
        best, words = max(shifted)
        edits, shifts = -best, shifts + 1


def _shifts(words: list[str], reference: Words) -> Iterator[list[str]]:
    """`words` with a run that it shares with the reference moved to its place there."""
    places: dict[str, list[int]] = {}
    for place, word in enumerate(reference):
        places.setdefault(word, []).append(place)
    for start, word in enumerate(words):
        for place in places.get(word, ()):
            if place == start:
                continue
            end, other = start + 1, place + 1
            while end < len(words) and other < len(reference) and words[end] == reference[other]:
                end, other = end + 1, other + 1
            rest = words[:start] + words[end:]
            yield rest[:place] + words[start:end] + rest[place:]


def edit_distance_to(reference: Words) -> Callable[[Words], int]:
    """Levenshtein's distance to `reference`, by bit vectors (Myers 1999, Hyyrö 2003).

    Bit i of the vectors says whether the distance to reference[:i + 1] is one more (`up`) or one
    less (`down`) than that to reference[:i].
    """
    at: dict[str, int] = {}
    for position, word in enumerate(reference):
        at[word] = at.get(word, 0) | 1 << position
    size = len(reference)
    full, last = (1 << size) - 1, 1 << size >> 1

    def distance(words: Words) -> int:
        if not size:
            return len(words)
        up, down, found = full, 0, size
        for word in words:
            match = at.get(word, 0)
            diagonal = (((match & up) + up) ^ up) | match | down  # equal along the diagonal
            more = down | ~(diagonal | up) & full
            less = up & diagonal
            found += bool(more & last) - bool(less & last)
            more = more << 1 & full | 1
            less = less << 1 & full
            up = less | ~(diagonal | more) & full
            down = more & diagonal
        return found

    return distance
