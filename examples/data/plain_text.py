"""Plain text for a language model: files to documents, tokenizer, and blocks of equal length.

files  →  documents, the last part of each held out  →  ids, an end-of-text token after each
document  →  blocks of n ids, one after another; what is left over at the end is dropped
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from examples.data.encode import EncodedSplit
from examples.errors import DataError
from transformers_patched.tokenization import GPT2Tokenizer, PreTrainedTokenizer

END_OF_TEXT = "<|endoftext|>"
# What Project Gutenberg puts around a book is not the book.
_BEFORE = re.compile(r"^\*{3} ?START OF (THE|THIS) PROJECT GUTENBERG.*$", re.I | re.M)
_AFTER = re.compile(
    r"^(\*{3} ?END OF (THE|THIS) PROJECT GUTENBERG|End of (the )?Project Gutenberg)", re.I | re.M
)


def text_files(paths: Sequence[str]) -> list[Path]:
    """The files among `paths`, and the `*.txt` of folders among them by name.

    Raises:
        DataError: there is nothing of that name, or a folder without text.
    """
    files = []
    for path in (Path(name).expanduser() for name in paths):
        found = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not found:
            raise DataError(f"{path}: there is no *.txt in this folder")
        files += found
    for path in files:
        if not path.is_file():
            raise DataError(f"{path}: no such file or folder")
    return files


def read_document(path: Path, join_lines: int = 0) -> str:
    """The text of a file, without what Project Gutenberg puts around a book.

    Args:
        path: UTF-8.
        join_lines: a line of at least so many characters goes on in the next one: a break set to
            fit a page becomes a blank, one of verse or dialogue stays. 0: every break stays.

    Raises:
        DataError: it cannot be read, or holds no text.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    if start := _BEFORE.search(text):
        text = text[start.end() :]
    if end := _AFTER.search(text):
        text = text[: end.start()]
    if join_lines:
        text = re.sub(rf"(?<=[^\n]{{{join_lines}}})\n(?=\S)", " ", text)
    if not text.strip():
        raise DataError(f"{path}: there is no text in it")
    return text.strip() + "\n"


def hold_out(document: str, share: float) -> tuple[str, str]:
    """The document up to the first line break in its last `share`, and what comes after it."""
    if not share:
        return document, ""
    cut = document.find("\n", int(len(document) * (1 - share))) + 1
    return document[:cut], document[cut:]


def train_tokenizer(documents: Sequence[str], vocabulary: int, max_length: int) -> GPT2Tokenizer:
    """GPT-2's byte-level BPE with merges learned here; any text can be encoded.

    Args:
        documents: to learn from. The same ones give the same tokenizer.
        vocabulary: ids: the end of a text, 256 bytes, and merges.
        max_length: the model's positions.

    Raises:
        DataError: the text has too few different words for so many merges.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    if (size := backend.get_vocab_size()) < vocabulary:
        raise DataError(f"the text gives {size} tokens, not {vocabulary}: lower --vocab_size")
    return GPT2Tokenizer(backend, {"model_max_length": max_length})


def blocks(documents: Sequence[str], tokenizer: PreTrainedTokenizer, length: int) -> EncodedSplit:
    """The ids of all documents, each with an end-of-text token, in rows of `length`.

    Raises:
        DataError: they are fewer than one row.
    """
    backend = tokenizer.backend_tokenizer
    end = np.array([tokenizer.eos_token_id], np.int32)
    encoded = backend.encode_batch_fast(list(documents))
    parts = [part for row in encoded for part in (np.array(row.ids, np.int32), end)]
    tokens = np.concatenate(parts)
    rows = len(tokens) // length
    if not rows:
        raise DataError(f"the text has {len(tokens)} tokens, fewer than one block of {length}")
    sums = {"texts": "\0".join(documents), "tokenizer": tokenizer.fingerprint()}
    return EncodedSplit(
        tokens[: rows * length],
        np.arange(rows + 1, dtype=np.int64) * length,
        np.full(rows, length, np.int32),
        None,
        tokenizer.eos_token_id,
        False,
        {what: hashlib.sha256(text.encode()).hexdigest()[:40] for what, text in sums.items()},
    )
