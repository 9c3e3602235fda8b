"""The official metrics of the text generation tasks.

e2e       BLEU, NIST, METEOR, ROUGE_L, CIDEr as `measure_scores.py` of the E2E challenge
webnlg    BLEU, METEOR, TER, chrF++ as `eval.py` of WebNLG's GenerationEval; DART's too
xsum      rouge1, rouge2, rougeL, rougeLsum of `rouge-score`
boolq     accuracy of generated answers
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from examples.errors import SetupError
from examples.evaluation.nlg.cider import cider
from examples.evaluation.nlg.meteor import MeteorError, meteor
from examples.evaluation.nlg.overlap import (
    References,
    Texts,
    bleu,
    chrf,
    nist,
    rouge,
    rouge_l,
)
from examples.evaluation.nlg.ter import ter
from examples.evaluation.nlg.words import Words, nltk_words, ptb_words

__all__ = ["FORMATS", "score"]

Scores = tuple[dict[str, float], list[str]]  # metrics, and lines on those that are left out


def score(format: str, predictions: Texts, references: References, *, java: bool = True) -> Scores:
    """All metrics of a format, and a line for each that could not be had.

    Args:
        format: one of `FORMATS`.
        predictions: n texts.
        references: n lists of texts, none empty.
        java: METEOR, which starts a Java program, is asked for too.

    Raises:
        SetupError: a package is missing.
        ValueError: no text, as many predictions as references, or a text without reference.
    """
    if not predictions or len(predictions) != len(references) or not all(references):
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} sets of references: as many are "
            "needed, at least one, and a reference in each set"
        )
    try:
        return FORMATS[format](predictions, references, java)
    except ImportError as error:
        raise SetupError(
            f"--format {format} needs {error.name}: pip install 'rankwise[nlg]'"
        ) from error


def _e2e(predictions: Texts, references: References, java: bool) -> Scores:
    words, targets = _split(ptb_words, predictions, references)
    first = {
        "BLEU": bleu(predictions, references, lowercase=True),
        "NIST": nist(predictions, references),
    }
    found, notes = _meteor(words, targets) if java else ({}, [])
    return first | found | {
        "ROUGE_L": rouge_l(words, targets),
        "CIDEr": cider(words, targets),
    }, notes


def _webnlg(predictions: Texts, references: References, java: bool) -> Scores:
    words, targets = _split(nltk_words, predictions, references)
    first = {"BLEU": bleu(predictions, references, lowercase=False)}
    found, notes = _meteor(words, targets) if java else ({}, [])
    last = {"TER": ter(words, targets), "chrF++": chrf(predictions, references)}
    return first | found | last, notes


def _xsum(predictions: Texts, references: References, java: bool) -> Scores:
    return rouge(predictions, references), []


def _boolq(predictions: Texts, references: References, java: bool) -> Scores:
    """Case, blanks and full stops aside, a prediction must be the answer."""

    def plain(text: str) -> str:
        return text.lower().strip(" .")

    right = [
        plain(prediction) in map(plain, texts)
        for prediction, texts in zip(predictions, references, strict=True)
    ]
    return {"accuracy": sum(right) / len(right)}, []


FORMATS: dict[str, Callable[[Texts, References, bool], Scores]] = {
    "e2e": _e2e,
    "webnlg": _webnlg,
    "xsum": _xsum,
    "boolq": _boolq,
}


def _split(
    split: Callable[[str], list[str]], predictions: Texts, references: References
) -> tuple[list[Words], list[list[Words]]]:
    return [split(text) for text in predictions], [
        [split(text) for text in texts] for texts in references
    ]


def _meteor(
    words: Sequence[Words], targets: Sequence[Sequence[Words]]
) -> tuple[dict[str, float], list[str]]:
    try:
        return {"METEOR": meteor(words, targets)}, []
    except MeteorError as error:
        return {}, [f"METEOR is left out: {error}"]
