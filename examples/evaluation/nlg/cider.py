"""CIDEr-D as the E2E scripts compute it (Vedantam et al. 2015)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import exp, log, sqrt
from statistics import fmean

from examples.evaluation.nlg.words import Ngram, Words, ngram_counts

ORDER = 4
WIDTH = 6.0  # σ of the penalty on differences in length

# An n-gram's weight in a text: tf · (ln N − ln max(1, df)), one table for each n.
Weights = list[dict[Ngram, float]]


def cider(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """10 · mean over instances, references and n of similarity · exp(−Δ²/2σ²).

    Similarity is Σ min(h, r)·r / (‖h‖‖r‖) over n-grams of weights h and r; df counts the instances
    with the n-gram in any reference, of N in all; Δ is the difference of the numbers of *bigrams*.
    """
    counts = [[_counts(words) for words in texts] for texts in references]
    df = Counter(
        ngram
        for texts in counts
        for ngram in {ngram for text in texts for table in text for ngram in table}
    )
    total = log(len(references))

    def weigh(text: list[Counter[Ngram]]) -> Weights:
        return [
            {ngram: k * (total - log(max(1, df[ngram]))) for ngram, k in table.items()}
            for table in text
        ]

    scores = []
    for words, texts in zip(hypotheses, counts, strict=True):
        hypothesis = _counts(words)
        weights = weigh(hypothesis)
        scores.append(
            fmean(
                _similarity(weights, weigh(text))
                * exp(-((hypothesis[1].total() - text[1].total()) ** 2) / (2 * WIDTH**2))
                for text in texts
            )
        )
    return 10 * fmean(scores)


def _counts(words: Words) -> list[Counter[Ngram]]:
    return [ngram_counts(words, n) for n in range(1, ORDER + 1)]


def _similarity(hypothesis: Weights, reference: Weights) -> float:
    """The mean over n; an n without weights counts 0."""
    found = 0.0
    for h, r in zip(hypothesis, reference, strict=True):
        norm = sqrt(sum(w * w for w in h.values())) * sqrt(sum(w * w for w in r.values()))
        if norm:
            found += sum(min(w, r[ngram]) * r[ngram] for ngram, w in h.items() if ngram in r) / norm
    return found / ORDER
