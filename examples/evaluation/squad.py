"""Exact match and F1 of answers, as SQuAD's own scripts compute them.

Texts are compared in lower case, without punctuation, without the words a, an, the, with one blank
between words. A prediction's score is its best over the question's right answers; "" is right where
there is none. A question without a prediction is wrong.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from examples.data.squad import SquadSplit
from examples.errors import DataError

ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
METRICS = ("exact", "f1")


def normalised(text: str) -> list[str]:
    """The words that are compared."""
    return ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split()


def exact_match(prediction: list[str], gold: list[str]) -> float:
    """1 where both are the same words, else 0."""
    return float(prediction == gold)


def f1(prediction: list[str], gold: list[str]) -> float:
    """2pr / (p + r) over the words both have; as exact match where either has none."""
    if not prediction or not gold:
        return float(prediction == gold)
    common = (Counter(prediction) & Counter(gold)).total()
    if not common:
        return 0.0
    precision, recall = common / len(prediction), common / len(gold)
    return 2 * precision * recall / (precision + recall)


class Scorer:
    """Scores predictions for one split.

    Args:
        raw: n questions, with their answers.

    Attributes:
        answerable: (n,) bool.
    """

    def __init__(self, raw: SquadSplit) -> None:
        if raw.answers is None:
            raise DataError(f"{raw.source}: its questions have no answers to compare with")
        self.ids = raw.ids
        self.answerable = np.array([bool(own) for own in raw.answers])
        # An answer of which nothing is left is no answer; a question without any wants "".
        golds = ({" ".join(normalised(text)): None for text in own} for own in raw.answers)
        self.golds = [[text.split() for text in own if text] or [[]] for own in golds]

    def each(self, predictions: Sequence[str | None]) -> np.ndarray:
        """(n, 2) exact match and F1 of one prediction per question, in the questions' order."""
        scores = np.zeros((len(self.golds), 2))
        for row, (text, golds) in enumerate(zip(predictions, self.golds, strict=True)):
            if text is not None:
                words = normalised(text)
                scores[row] = [max(fn(words, gold) for gold in golds) for fn in (exact_match, f1)]
        return scores

    def score(
        self, predictions: Sequence[str | None], null_odds: Sequence[float] | None = None
    ) -> dict[str, float]:
        """`exact`, `f1`, `total`; `HasAns_…` and `NoAns_…` where there are questions of both kinds.

        Args:
            predictions: one per question; None is wrong.
            null_odds: by how much no answer scores higher than each prediction: adds the best
                values that a threshold can give, and that threshold (`best_f1_thresh`).
        """
        scores = self.each(predictions)
        results = _means(scores, "")
        if not self.answerable.all():
            for prefix, rows in (("HasAns_", self.answerable), ("NoAns_", ~self.answerable)):
                if rows.any():
                    results |= _means(scores[rows], prefix)
        if null_odds is not None:
            odds, said = np.asarray(null_odds), np.array([bool(text) for text in predictions])
            for column, name in enumerate(METRICS):
                best, threshold = self._best(scores[:, column], said, odds)
                results |= {f"best_{name}": best, f"best_{name}_thresh": threshold}
        return results

    def _best(self, scores: np.ndarray, said: np.ndarray, odds: np.ndarray) -> tuple[float, float]:
        """The best mean score that a threshold on the odds gives, and it.

        From "no answer" everywhere, answers are let in by growing odds.
        """
        order = np.argsort(odds, kind="stable")
        gain = np.where(self.answerable, scores, -said.astype(float))[order]
        total = np.concatenate(([0.0], np.cumsum(gain))) + (~self.answerable).sum()
        at = int(total.argmax())
        return 100 * float(total[at]) / len(scores), float(odds[order[at - 1]]) if at else 0.0

    def unanswered(self, predictions: Sequence[str | None]) -> list[str]:
        """The ids of the questions without a prediction."""
        return [id for id, text in zip(self.ids, predictions, strict=True) if text is None]


def _means(scores: np.ndarray, prefix: str) -> dict[str, float]:
    """Means of (rows, 2) scores, in per cent, and the number of rows."""
    means = 100 * scores.mean(0)
    found = {f"{prefix}{name}": float(value) for name, value in zip(METRICS, means, strict=True)}
    return {**found, f"{prefix}total": len(scores)}


def in_order(raw: SquadSplit, predictions: Mapping[str, object], source: str) -> list[str | None]:
    """The prediction of each question, None where there is none.

    Args:
        raw: the questions.
        predictions: id -> answer.
        source: where these are from, for messages.

    Raises:
        DataError: an id is of no question, or an answer is no text.
    """
    known = set(raw.ids)
    unknown = [id for id in predictions if id not in known]
    if unknown:
        more = f" and {len(unknown) - 1:,} more" if len(unknown) > 1 else ""
        raise DataError(
            f"{source}: question {unknown[0]}{more} not in {raw.source}: these are predictions "
            "for other questions"
        )
    for id, text in predictions.items():
        if not isinstance(text, str):
            raise DataError(f"{source}, question {id}: its answer is {text!r:.60}, not a text")
    return [predictions.get(id) for id in raw.ids]  # type: ignore[misc]
