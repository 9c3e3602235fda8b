"""BLEU, NIST, ROUGE and chrF++: shares of n-grams and subsequences that texts have in common.

Predictions are n texts, references n lists of at least one text each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from math import exp, log, log2
from statistics import fmean

from examples.evaluation.nlg.words import Ngram, Words, mteval_words, ngram_counts

Texts = Sequence[str]
References = Sequence[Sequence[str]]

NIST_ORDER = 5
BREVITY = log(2) / log(1.5) ** 2  # a system two thirds as long as the references scores half
BETA = 1.2  # weight of recall in the ROUGE-L of the E2E scripts


def bleu(predictions: Texts, references: References, *, lowercase: bool) -> float:
    """BLEU-4 of the corpus as mteval-13a has it, 0 to 1.

    Args:
        predictions: n texts.
        references: any number for each; the one closest in length counts for brevity.
        lowercase: as the E2E script; not so for WebNLG.
    """
    from sacrebleu.metrics.bleu import BLEU

    # force: texts in tokens are what these data sets have, no reason for a warning
    metric = BLEU(lowercase=lowercase, smooth_method="floor", smooth_value=1e-15, force=True)
    return metric.corpus_score(list(predictions), _streams(references)).score / 100


def chrf(predictions: Texts, references: References) -> float:
    """chrF++ of the corpus, 0 to 1: F2 of character 1- to 6-grams and word 1- and 2-grams."""
    from sacrebleu.metrics.chrf import CHRF

    metric = CHRF(word_order=2, eps_smoothing=True)  # the mean of F over orders, as chrF++.py
    return metric.corpus_score(list(predictions), _streams(references)).score / 100


def _streams(references: References) -> list[list[str | None]]:
    """sacrebleu's layout: first references, second references, …; None where there is none."""
    width = max(map(len, references))
    return [[refs[k] if k < len(refs) else None for refs in references] for k in range(width)]


# -- NIST ---------------------------------------------------------------------------------------


def nist(predictions: Texts, references: References) -> float:
    """NIST-5 of the corpus as mteval-13a has it, case ignored (Doddington 2002).

    Σₙ [Σ info(w₁…wₙ) over shared n-grams / number of predicted n-grams] · brevity, where
    info = log₂(count(w₁…wₙ₋₁) / count(w₁…wₙ)) over all references; for n = 1 the numerator is the
    number of their words. A text shares an n-gram as often as one of its references has it.
    brevity = exp(−β·ln² min(1, predicted words / Σ mean words of the references)).
    """
    hypotheses = [mteval_words(text) for text in predictions]
    targets = [[mteval_words(text) for text in texts] for texts in references]
    information = _information(words for texts in targets for words in texts)
    score = 0.0
    for n in range(1, NIST_ORDER + 1):
        gained, total = 0.0, 0
        for words, texts in zip(hypotheses, targets, strict=True):
            most: Counter[Ngram] = Counter()
            for text in texts:
                most |= ngram_counts(text, n)
            counts = ngram_counts(words, n)
            total += counts.total()
            gained += sum(k * information[ngram] for ngram, k in (counts & most).items())
        score += gained / total if total else 0.0
    length = sum(fmean(map(len, texts)) for texts in targets)
    ratio = min(1.0, sum(map(len, hypotheses)) / length) if length else 1.0
    return score * exp(-BREVITY * log(ratio) ** 2) if ratio else 0.0


def _information(texts: Iterable[Words]) -> dict[Ngram, float]:
    """Bits that the last word of an n-gram adds to those before it."""
    counts: Counter[Ngram] = Counter()
    for words in texts:
        counts[()] += len(words)
        for n in range(1, NIST_ORDER + 1):
            counts.update(ngram_counts(words, n))
    return {ngram: log2(counts[ngram[:-1]] / k) for ngram, k in counts.items() if ngram}


# -- ROUGE --------------------------------------------------------------------------------------


def rouge_l(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """ROUGE-L of the E2E scripts, 0 to 1: the mean of F over instances.

    P = max LCS / predicted words and R = max LCS / words of the reference, each maximum over
    references on its own; F = (1 + β²)PR / (R + β²P).
    """
    return fmean(map(_rouge_l, hypotheses, references))


def _rouge_l(hypothesis: Words, references: Sequence[Words]) -> float:
    # Splitting at blanks, the scripts see one empty word in an empty text; it matches nothing.
    lengths = [_common_subsequence(hypothesis, words) for words in references]
    precision = max(lengths) / max(1, len(hypothesis))
    recall = max(k / max(1, len(words)) for k, words in zip(lengths, references, strict=True))
    if not precision:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _common_subsequence(first: Words, second: Words) -> int:
    """Length of the longest subsequence of both, by bit vectors (Hyyrö 2004)."""
    at: dict[str, int] = {}
    for position, word in enumerate(first):
        at[word] = at.get(word, 0) | 1 << position
    full = (1 << len(first)) - 1
    free = full  # bit i is 0 where the length grows from first[:i] to first[:i + 1]
    for word in second:
        matched = free & at.get(word, 0)
        free = ((free + matched) | (free - matched)) & full
    return len(first) - free.bit_count()


def rouge(predictions: Texts, references: References) -> dict[str, float]:
    """ROUGE-1, -2, -L and -Lsum for summaries: the mean F-measure, 0 to 100, words stemmed.

    rougeL takes the whole text, rougeLsum lines. Of several references the best counts.
    """
    from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = RougeScorer(names, use_stemmer=True)
    rows = [
        scorer.score_multi(texts, prediction)
        for prediction, texts in zip(predictions, references, strict=True)
    ]
    return {name: 100 * fmean(row[name].fmeasure for row in rows) for name in names}
