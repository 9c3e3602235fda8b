"""From start and end logits to answers: the n best of every question, over all its windows.

In every feature the `n_best_size` highest starts meet the `n_best_size` highest ends. A pair counts
where both lie in the window, the end is not before the start, the answer is not too long, and no
other window shows more of the paragraph around the start. A question's pairs are ranked by the
sum of their logits; of equal texts the first one stays. Where "no answer" is allowed, it is
ranked with them: its score is the least that `[CLS]` has in the question's features.

All pairs of all features are made and ranked by numpy at once; a loop runs over questions alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.data.squad import SquadSplit
from examples.data.squad_features import SquadFeatures
from transformers_patched.files import write_atomically

FEATURES_AT_ONCE = 2048  # bounds the memory of their pairs
NOTHING = "empty"  # what the official code says where there is no pair at all


@dataclass(frozen=True)
class Decoding:
    """How answers are chosen; the options' names and values."""

    n_best_size: int = 20
    max_answer_length: int = 30
    version_2_with_negative: bool = False
    null_score_diff_threshold: float = 0.0


class Answers(NamedTuple):
    """The answers to n questions.

    Attributes:
        texts: (n) the predictions.
        best: (n) the best answer that is not "no answer".
        n_best: (n) lists of {"text", "probability", "start_logit", "end_logit"}, the best first.
        null_odds: (n,) score of "no answer" minus that of `best`; None where it is not allowed.
    """

    texts: list[str]
    best: list[str]
    n_best: list[list[dict[str, Any]]]
    null_odds: np.ndarray | None


class _Pairs(NamedTuple):
    """Ranked pairs of some questions, one question's after another's."""

    question: np.ndarray  # (P,) ascending
    chars: np.ndarray  # (P, 2) where the answer begins and ends in its paragraph
    logits: np.ndarray  # (P, 2) fp32


def decode(features: SquadFeatures, logits: np.ndarray, how: Decoding) -> Answers:
    """The answers to all questions.

    Args:
        features: m, of n questions.
        logits: (m, 2, L) fp32 of starts and ends; -inf after a feature's last token.
        how: the options.

    Raises:
        ValueError: logits are not finite.
    """
    if np.isnan(logits).any() or not np.isfinite(logits[:, :, 0]).all():
        raise ValueError("the logits are not finite")
    raw = features.raw
    null = _null_logits(features, logits, len(raw)) if how.version_2_with_negative else None
    found: list[list[dict[str, Any]]] = []
    for rows in _pieces(features.questions):
        first, last = features.questions[rows.start], features.questions[rows.stop - 1]
        pairs = _rank(features, logits, rows, how)
        bounds = np.searchsorted(pairs.question, np.arange(first, last + 2))
        for question in range(first, last + 1):
            own = slice(*bounds[question - first : question - first + 2])
            context = raw.contexts[raw.paragraphs[question]]
            own_null = None if null is None else null[question]
            found.append(_n_best(context, pairs.chars[own], pairs.logits[own], own_null, how))
    _add_probabilities(found)
    best = [next(entry for entry in entries if entry["text"]) for entries in found]
    texts = [entry["text"] for entry in best]
    if null is None:
        return Answers(texts, texts, found, None)
    score = np.array([entry["start_logit"] + entry["end_logit"] for entry in best])
    odds = null.astype(np.float64).sum(1) - score
    said = odds <= how.null_score_diff_threshold
    chosen = [text if keep else "" for text, keep in zip(texts, said, strict=True)]
    return Answers(chosen, texts, found, odds)


def write_answers(folder: Path, raw: SquadSplit, answers: Answers) -> Path:
    """predictions.json, nbest_predictions.json and null_odds.json, all by id; the first's path."""
    files: dict[str, Any] = {
        "predictions": dict(zip(raw.ids, answers.texts, strict=True)),
        "nbest_predictions": dict(zip(raw.ids, answers.n_best, strict=True)),
    }
    if answers.null_odds is not None:
        files["null_odds"] = dict(zip(raw.ids, answers.null_odds.tolist(), strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        path = folder / f"{name}.json"
        write_atomically(path, lambda aside, text=text: aside.write_text(text, encoding="utf-8"))
    return folder / "predictions.json"


# -- pairs --------------------------------------------------------------------------------------


def _pieces(questions: np.ndarray) -> Iterator[slice]:
    """Slices of the features; all features of a question are in one."""
    start, count = 0, len(questions)
    while start < count:
        end = min(start + FEATURES_AT_ONCE, count)
        if end < count:  # on to the end of the last question
            end = int(np.searchsorted(questions, questions[end - 1], side="right"))
        yield slice(start, end)
        start = end


def _rank(features: SquadFeatures, logits: np.ndarray, rows: slice, how: Decoding) -> _Pairs:
    """The pairs of the features `rows` (m of them) that count, the best of each question first."""
    first = features.first[rows].astype(np.int64)  # (m,)
    size = features.window_lengths[rows]  # (m,)
    own = np.arange(len(first))[:, None]  # (m, 1)
    starts = _highest(logits[rows, 0], how.n_best_size)  # (m, k) columns
    ends = _highest(logits[rows, 1], how.n_best_size)  # (m, k)
    start, end = starts - first[:, None], ends - first[:, None]  # from the window's first token
    inside = (start >= 0) & (start < size[:, None])
    full = _full_context(features, rows)
    begins = np.cumsum(size) - size  # (m,) where each feature's tokens begin in `full`
    start_counts = inside & full[np.where(inside, begins[:, None] + start, 0)]  # (m, k)
    end_counts = (end >= 0) & (end < size[:, None])  # (m, k)
    length = end[:, None, :] - start[:, :, None] + 1  # (m, k starts, k ends)
    valid = (length >= 1) & (length <= how.max_answer_length)
    valid &= start_counts[:, :, None] & end_counts[:, None, :]
    row, s, e = np.nonzero(valid)  # (P,) each
    token = features.windows[rows][row]  # (P,) the window's first
    chars = np.stack(
        (features.chars[token + start[row, s], 0], features.chars[token + end[row, e], 1]), 1
    )
    pair = np.stack(  # (P, 2)
        (logits[rows, 0][own, starts][row, s], logits[rows, 1][own, ends][row, e]), 1
    )
    question = features.questions[rows][row]  # (P,)
    order = np.lexsort((-pair.astype(np.float64).sum(1), question))  # stable: feature, start, end
    order = order[chars[order, 0] < chars[order, 1]]  # a token of blanks alone is no answer
    return _Pairs(question[order], chars[order], pair[order])


def _highest(values: np.ndarray, k: int) -> np.ndarray:
    """(m, k) columns of the highest of (m, L) values, highest first, of equal ones the first."""
    k = min(k, values.shape[1])
    least = np.partition(values, -k, axis=1)[:, -k]  # (m,) the k-th highest
    row, column = np.nonzero(values >= least[:, None])
    order = np.lexsort((-values[row, column], row))  # stable, so equal values keep their columns
    row, column = row[order], column[order]
    place = np.arange(len(row)) - np.searchsorted(row, np.arange(len(values)))[row]
    return column[place < k].reshape(len(values), k)


def _full_context(features: SquadFeatures, rows: slice) -> np.ndarray:
    """(tokens of these windows,) whether no other window shows more around the token.

    What a window shows: the lesser of the tokens before and after it, and a hundredth of the
    window's length to tell equal ones apart; then the first window.
    """
    size = features.window_lengths[rows]
    feature = np.repeat(np.arange(len(size)), size)  # (W,)
    place = np.arange(len(feature)) - np.repeat(np.cumsum(size) - size, size)  # (W,)
    shown = np.minimum(place, size[feature] - 1 - place) + 0.01 * size[feature]
    # The same token of the same question has one number, whatever its window.
    windows, question = features.windows[rows], features.questions[rows]
    new = np.concatenate(([True], question[1:] != question[:-1]))  # a question's first window
    base = windows[new]
    last = np.concatenate((np.flatnonzero(new)[1:], [len(new)])) - 1
    tokens = windows[last] + size[last] - base  # of each question's paragraph
    which = np.cumsum(new) - 1  # (m,)
    number = (windows - base[which] + (np.cumsum(tokens) - tokens)[which])[feature] + place  # (W,)
    most = np.full(tokens.sum(), -1.0)
    np.maximum.at(most, number, shown)
    hits = np.flatnonzero(shown == most[number])[::-1]
    winner = np.empty(len(most), np.int64)
    winner[number[hits]] = feature[hits]  # of several the last one assigned, which is the first
    return winner[number] == feature


def _null_logits(features: SquadFeatures, logits: np.ndarray, count: int) -> np.ndarray:
    """(questions, 2) logits of `[CLS]` in the feature where their sum is least."""
    score = logits[:, :, 0].astype(np.float64).sum(1)  # (m,)
    order = np.lexsort((score, features.questions))
    first = np.searchsorted(features.questions[order], np.arange(count))
    return logits[order[first], :, 0]


# -- texts --------------------------------------------------------------------------------------


def _n_best(
    context: str, chars: np.ndarray, logits: np.ndarray, null: np.ndarray | None, how: Decoding
) -> list[dict[str, Any]]:
    """The best different answers of one question, without their probabilities.

    Args:
        context: the paragraph.
        chars: (P, 2), ranked.
        logits: (P, 2).
        null: (2,) of "no answer"; None where that is not allowed.
        how: the options.
    """
    seen: dict[str, tuple[float, float]] = {}
    left = null  # not yet ranked
    most = how.n_best_size
    for at in range(0, len(chars), most):  # a few blocks: few answers have equal texts
        block = slice(at, at + most)
        rows = zip(chars[block].tolist(), logits[block].tolist(), strict=True)
        for (begin, end), (start, stop) in rows:
            if left is not None and left.astype(np.float64).sum() > start + stop:
                seen[""], left = (float(left[0]), float(left[1])), None
            if len(seen) == most:
                break
            seen.setdefault(context[begin:end], (start, stop))
        if len(seen) == most:
            break
    if left is not None:
        seen[""] = float(left[0]), float(left[1])
    if not any(seen):
        seen = {NOTHING: (0.0, 0.0), **seen}
    return [{"text": t, "start_logit": s, "end_logit": e} for t, (s, e) in seen.items()]


def _add_probabilities(found: list[list[dict[str, Any]]]) -> None:
    """A softmax over each question's answers, as the second entry of each."""
    most = max(map(len, found), default=0)
    score = np.full((len(found), most), -np.inf)
    for row, entries in enumerate(found):
        score[row, : len(entries)] = [e["start_logit"] + e["end_logit"] for e in entries]
    share = np.exp(score - score.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    for row, entries in zip(share.tolist(), found, strict=True):
        for probability, entry in zip(row, entries, strict=False):
            entry["probability"] = probability
