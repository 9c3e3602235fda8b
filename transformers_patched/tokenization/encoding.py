"""What goes into a tokenizer's call and what comes out of it: lists, arrays, `BatchEncoding`."""

from __future__ import annotations

import warnings
from collections import UserDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tokenizers import Encoding

TRUNCATION = ("longest_first", "only_first", "only_second", "do_not_truncate")
PADDING = ("longest", "max_length", "do_not_pad")
# What WordPiece decoding undoes: the blanks that splitting put around punctuation.
CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
FIELDS: dict[str, Callable[[Encoding], Any]] = {
    "input_ids": lambda row: row.ids,
    "token_type_ids": lambda row: row.type_ids,
    "attention_mask": lambda row: row.attention_mask,
    "special_tokens_mask": lambda row: row.special_tokens_mask,
    "offset_mapping": lambda row: row.offsets,
    "length": lambda row: len(row.ids),
}


class BatchEncoding(UserDict):
    """A dict of model inputs; its entries are attributes too (`enc.input_ids`).

    `encodings` keeps the library's objects, one per sequence: words, characters and offsets.
    """

    def __init__(self, data: Mapping[str, Any], encodings: list[Encoding] | None = None) -> None:
        super().__init__(data)
        self.encodings = encodings

    def __getattr__(self, name: str) -> Any:
        # `data` itself is looked up here only while unpickling, before it exists.
        if name != "data" and name in self.data:
            return self.data[name]
        raise AttributeError(name)

    def to(self, device: Any) -> BatchEncoding:
        """Moves every tensor to `device`, in place, and returns itself."""
        self.data = {k: v.to(device) if hasattr(v, "to") else v for k, v in self.data.items()}
        return self

    def tokens(self, index: int = 0) -> list[str]:
        return self._encoding(index).tokens

    def word_ids(self, index: int = 0) -> list[int | None]:
        return self._encoding(index).word_ids

    def sequence_ids(self, index: int = 0) -> list[int | None]:
        """Per token: 0 for the first sentence, 1 for the second, None for special tokens."""
        return self._encoding(index).sequence_ids

    def char_to_token(self, index: int, char: int, sequence_index: int = 0) -> int | None:
        return self._encoding(index).char_to_token(char, sequence_index)

    def token_to_chars(self, index: int, token: int) -> tuple[int, int] | None:
        return self._encoding(index).token_to_chars(token)

    def _encoding(self, index: int) -> Encoding:
        if not self.encodings:
            raise ValueError(
                "this batch was padded or built from plain lists: only the result of "
                "calling a tokenizer knows its words and characters"
            )
        return self.encodings[index]


def inputs(text: Any, pair: Any, words: bool) -> tuple[list[Any], bool]:
    """One list for the library, and whether the caller gave a single input."""
    if words:
        single = not text or isinstance(text[0], str)
    else:
        single = isinstance(text, str)
        if not single and not isinstance(text, (list, tuple, np.ndarray)):
            raise TypeError(f"text must be a string or a list of them, not {type(text).__name__}")
    if single:
        return ([text] if pair is None else [(text, pair)]), True
    if pair is None:
        if not words and any(isinstance(item, list) for item in text):
            return [tuple(item) if isinstance(item, list) else item for item in text], False
        return list(text), False
    if isinstance(pair, str):
        raise TypeError("text is a list but text_pair is one string: give a pair for each")
    if len(pair) != len(text):
        raise ValueError(f"{len(text)} sentences but {len(pair)} pairs: give one for each")
    return list(zip(text, pair, strict=True)), False


def flatten(encoded: list[Encoding], overflow: bool) -> tuple[list[Encoding], list[int]]:
    """One row per piece, and the number of the input that each piece is of."""
    if not overflow:
        return encoded, list(range(len(encoded)))
    rows, owner = [], []
    for index, item in enumerate(encoded):
        pieces = [item, *item.overflowing]
        rows += pieces
        owner += [index] * len(pieces)
    return rows, owner


def columns(encodings: Any) -> dict[str, Any]:
    """A list of encodings, or a dict of lists, as a dict of lists."""
    if isinstance(encodings, (Mapping, UserDict)):
        return dict(encodings)
    found: dict[str, Any] = {}
    for row in encodings:
        for key, value in row.items():
            found.setdefault(key, []).append(value)
    return found


def plain(value: Any) -> Any:
    """Arrays and tensors, also those in a list, as lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [plain(item) for item in value] if isinstance(value, list) else value


def tensors(data: dict[str, Any], kind: str | None) -> dict[str, Any]:
    """The lists of `data` as torch tensors ("pt"), numpy arrays ("np"), or as they are (None)."""
    if kind is None:
        return data
    if kind not in ("pt", "np"):
        raise ValueError(f"return_tensors={kind!r}: choose 'pt', 'np' or None")
    arrays = {}
    for key, value in data.items():
        try:
            arrays[key] = np.asarray(value)
        except ValueError as error:
            raise ValueError(
                f"{key}: rows of different lengths make no tensor; pass padding=True "
                "and truncation=True"
            ) from error
    if kind == "np":
        return arrays
    import torch

    return {key: torch.from_numpy(value) for key, value in arrays.items()}


def truncation_strategy(
    truncation: bool | str | None, max_length: int | None, padding: bool | str
) -> str:
    """The strategy by name; a bare `max_length` without padding truncates too, as ever."""
    if truncation is None and max_length is not None and padding is False:
        warnings.warn(
            "max_length is given without truncation: sequences are cut at it, the "
            "longest of a pair first; pass truncation=True to say so",
            stacklevel=4,
        )
        return "longest_first"
    if truncation is None or truncation is False:
        return "do_not_truncate"
    name = "longest_first" if truncation is True else truncation
    if name not in TRUNCATION:
        raise ValueError(
            f"truncation={truncation!r}: choose True, False or one of {', '.join(TRUNCATION)}"
        )
    return name


def padding_kind(padding: bool | str) -> str:
    """The padding by name: `longest`, `max_length` or `do_not_pad`."""
    name = {True: "longest", False: "do_not_pad"}.get(padding, padding)  # type: ignore[call-overload]
    if name not in PADDING:
        raise ValueError(f"padding={padding!r}: choose True, False or one of {', '.join(PADDING)}")
    return str(name)


def clean_up(text: str) -> str:
    """Takes the blanks before punctuation away."""
    for old, new in CLEAN_UP:
        text = text.replace(old, new)
    return text
