"""Reads a SentencePiece model (`spm.model`): a protocol buffer of which a tokenizer needs little.

ModelProto       1: pieces (SentencePiece, repeated)   2: TrainerSpec   3: NormalizerSpec
SentencePiece    1: piece (string)   2: score (float)   3: type
TrainerSpec      3: model_type
NormalizerSpec   2: precompiled_charsmap (bytes)   3: add_dummy_prefix   4: remove_extra_whitespaces
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

UNIGRAM, ALGORITHMS = 1, {1: "unigram", 2: "BPE", 3: "word", 4: "char"}
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # types of pieces; 1 is an ordinary one
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class SentencePieceModel:
    """The contents of a unigram model.

    Attributes:
        pieces: (piece, log probability); the place in the list is the id.
        types: The type of every piece.
        charsmap: Which characters become which, compiled; empty where none are changed.
    """

    pieces: list[tuple[str, float]]
    types: list[int]
    charsmap: bytes

    @property
    def unk_id(self) -> int:
        return self.types.index(UNKNOWN)


def read_spm(path: Path) -> SentencePieceModel:
    """Reads a unigram model.

    Raises:
        ValueError: The file is damaged, or of an algorithm or with settings that are not supported.
    """
    data = path.read_bytes()
    try:
        pieces, types, algorithm, normalizer = _parse(data)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        start = data[:24]
        if start.startswith(b"version https://git-lfs"):
            raise ValueError(f"{path} is a Git LFS pointer: run `git lfs pull` there") from None
        raise ValueError(f"{path}: damaged, or no SentencePiece model ({error})") from None
    if algorithm != UNIGRAM:
        found = ALGORITHMS.get(algorithm, algorithm)
        raise ValueError(f"{path} is a SentencePiece {found} model; DeBERTa's are unigram models")
    if UNKNOWN not in types:
        raise ValueError(f"{path} has no piece for unknown text")
    if not (normalizer.get(3, 1) and normalizer.get(4, 1)):
        raise ValueError(
            f"{path} keeps blanks as they are (add_dummy_prefix or remove_extra_whitespaces is "
            "off), which is not supported"
        )
    return SentencePieceModel(pieces, types, normalizer.get(2, b""))


def _parse(data: bytes) -> tuple[list[tuple[str, float]], list[int], int, dict[int, int | bytes]]:
    pieces, types, algorithm, normalizer = [], [], UNIGRAM, {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0]
            pieces.append((piece[1].decode("utf-8"), score))
            types.append(piece.get(3, 1))
        elif number == 2:
            algorithm = dict(_fields(value)).get(3, UNIGRAM)
        elif number == 3:
            normalizer = dict(_fields(value))
    if not pieces:
        raise ValueError("it holds no pieces")
    return pieces, types, algorithm, normalizer


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The (number, value) of every field of a message; a repeated one comes several times."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
        else:
            if kind == _BYTES:
                size, at = _varint(data, at)
            elif kind in (_FIXED32, _FIXED64):
                size = 4 if kind == _FIXED32 else 8
            else:
                raise ValueError(f"a field of kind {kind} at byte {at}")
            if at + size > len(data):
                raise ValueError(f"it ends within a field at byte {at}")
            value, at = data[at : at + size], at + size
        yield number, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The integer at `at`, seven bits per byte and the lowest first, and where it ends."""
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError(f"it ends within a number at byte {at}")
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
