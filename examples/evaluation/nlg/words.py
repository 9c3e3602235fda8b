"""How each official metric splits text into words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

Words = Sequence[str]
Ngram = tuple[str, ...]

_LETTER = r"[^\W_]"
_PTB = re.compile(
    rf"""
    -[lr][rsc]b- | \.\.\. | --+
  | '(?:s|m|d|re|ve|ll)\b                                   # a clitic standing alone
  | (?:[^\W\d_]\.)+(?:[^\W\d_]\b\.?)?(?=\ *\w)              # initials: j. u.s.
  | (?:(?<!\S)-(?=\d))?{_LETTER}+(?:[-'./,:_&@]{_LETTER}+)* # words, numbers, -25
  | \S
    """,
    re.VERBOSE,
)
_CLITIC = re.compile(r"(.+?)(n't|'(?:s|m|d|re|ve|ll))")
_SPELLED = str.maketrans({
    "£": " # ", "’": "'", "–": " -- ", "—": " -- ", "(": " -lrb- ", ")": " -rrb- ",
    "[": " -lsb- ", "]": " -rsb- ", "{": " -lcb- ", "}": " -rcb- ",
})  # fmt: skip
_DROPPED = frozenset(["''", "'", "``", "`", '"', "“", "”", *".?!,:;-", "--", "..."])


def ptb_words(text: str) -> list[str]:
    """Lower-cased Penn Treebank words without punctuation, for METEOR, ROUGE-L and CIDEr of E2E.

    On all 51,426 texts of E2E these are the words that Stanford's tokenizer 3.4.1 leaves after the
    official script has dropped quotes and punctuation (brackets stay: the script lists them in
    upper case). On freer text it may differ, at abbreviations above all.
    """
    words: list[str] = []
    for token in _PTB.findall(text.lower().translate(_SPELLED)):
        clitic = _CLITIC.fullmatch(token)
        words += clitic.groups() if clitic else [token]
    return [word for word in words if word not in _DROPPED]


def mteval_words(text: str) -> list[str]:
    """The words of mteval-13a, lower-cased, for NIST; BLEU's are the same."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()(text.rstrip().lower()).split()


def nltk_words(text: str) -> list[str]:
    """NLTK's words of a text taken as one sentence, for METEOR and TER of WebNLG and DART."""
    from nltk.tokenize import NLTKWordTokenizer

    return NLTKWordTokenizer().tokenize(text)


def ngram_counts(words: Words, n: int) -> Counter[Ngram]:
    """How often each n words in a row occur."""
    return Counter(zip(*(words[start:] for start in range(n)), strict=False))
