"""The files of a tokenizer: finding them, reading them, building the `tokenizers` object.

Every damaged or missing file ends in one error that names it.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from ..files import find_on_hub, local_folder
from .spm import CONTROL, USER_DEFINED, read_spm

SPECIAL = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "config.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spm.model",
)
_VOCABULARIES = (
    "vocab.txt (BERT), vocab.json and merges.txt (RoBERTa, GPT-2), or spm.model (DeBERTa)"
)


def locate(
    name_or_path: str | os.PathLike[str], revision: str | None, local_files_only: bool
) -> Path:
    """The folder itself, or the folder a hub id's tokenizer files were downloaded to."""
    folder = local_folder(name_or_path)
    if folder is not None:
        return folder
    name = str(name_or_path)
    found = [find_on_hub(name, file, revision, local_files_only) for file in FILES]
    folders = [file.parent for file in found if file is not None]
    if not folders:
        raise FileNotFoundError(
            f"{name} on the hub holds no tokenizer: looked for tokenizer.json, {_VOCABULARIES}"
        )
    return folders[0]


def nothing_found(folder: Path, vocab_files: tuple[str, ...]) -> FileNotFoundError:
    """The error for a folder without a tokenizer: what was looked for, and what is there."""
    choices = f"or {' and '.join(vocab_files)}" if vocab_files else _VOCABULARIES
    here = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
    return FileNotFoundError(
        f"no tokenizer in {folder}: looked for tokenizer.json, {choices}; the folder holds {here}"
    )


def read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; the file is damaged") from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, not JSON ({error})") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: a JSON object is expected, found a {type(data).__name__}")
    return data


def read_config(folder: Path) -> dict[str, Any]:
    """`special_tokens_map.json` under `tokenizer_config.json`, which wins."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            data = read_json(folder / name)
            config |= {k: v for k, v in data.items() if v is not None or k not in SPECIAL}
    return config


def read_tokenizer(path: Path) -> Tokenizer:
    """The library's object from `tokenizer.json`."""
    # Through text: the library itself reports a missing and a damaged file alike.
    text = read_text(path)
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(
            f"{path}: damaged or not a tokenizer file ({error}); download it again, or remove it "
            "to use vocabulary files"
        ) from error


def _read_merges(path: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        line = line.rstrip("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2:
            raise ValueError(
                f"{path}, line {number}: a merge is two tokens and one blank, found {line[:60]!r}"
            )
        merges.append((parts[0], parts[1]))
    return merges


def build_wordpiece(
    folder: Path, config: Mapping[str, Any], defaults: Mapping[str, str]
) -> Tokenizer:
    """BERT's tokenizer from `vocab.txt`: one token per line, its number is its id."""
    path = folder / "vocab.txt"
    lines = read_text(path).replace("\r\n", "\n").removesuffix("\n").split("\n")
    vocab = {token: index for index, token in enumerate(lines)}
    tokens = _check_special(path, "BERT", vocab, config, defaults)
    if "do_lower_case" not in config and "The" in vocab:
        warnings.warn(
            f"{path} has upper-case words but nothing says do_lower_case: text is lower-cased; "
            "pass do_lower_case=False for a cased model",
            stacklevel=6,
        )
    backend = Tokenizer(models.WordPiece(vocab, unk_token=tokens["unk_token"]))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = _types_0_and_1(tokens["cls_token"], tokens["sep_token"], vocab)
    backend.decoder = decoders.WordPiece(prefix="##")
    return backend


def _types_0_and_1(
    cls_token: str, sep: str, vocab: Mapping[str, int]
) -> processors.TemplateProcessing:
    """`[CLS] a [SEP]` of type 0, and `b [SEP]` of type 1."""
    return processors.TemplateProcessing(
        single=f"{cls_token}:0 $A:0 {sep}:0",
        pair=f"{cls_token}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(cls_token, vocab[cls_token]), (sep, vocab[sep])],
    )


def _byte_bpe(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, int], Tokenizer]:
    """The vocabulary, and byte-level BPE without special tokens around a text."""
    vocab = read_json(folder / "vocab.json")
    try:
        backend = Tokenizer(models.BPE(vocab, _read_merges(folder / "merges.txt")))
    except ValueError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise ValueError(
            f"{folder / 'merges.txt'} does not belong to the vocab.json beside it ({error})"
        ) from error
    prefix = bool(config.get("add_prefix_space", False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    return vocab, backend


def build_gpt2(folder: Path, config: Mapping[str, Any], defaults: Mapping[str, str]) -> Tokenizer:
    """GPT-2's tokenizer from `vocab.json` and `merges.txt`: the text's tokens and no others."""
    vocab, backend = _byte_bpe(folder, config)
    _check_special(folder / "vocab.json", "GPT-2", vocab, config, defaults)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def build_byte_bpe(
    folder: Path, config: Mapping[str, Any], defaults: Mapping[str, str]
) -> Tokenizer:
    """RoBERTa's tokenizer from `vocab.json` and `merges.txt`."""
    vocab, backend = _byte_bpe(folder, config)
    tokens = _check_special(folder / "vocab.json", "RoBERTa", vocab, config, defaults)
    prefix = bool(config.get("add_prefix_space", False))
    cls_token, sep = tokens["cls_token"], tokens["sep_token"]
    backend.post_processor = processors.RobertaProcessing(
        (sep, vocab[sep]),
        (cls_token, vocab[cls_token]),
        trim_offsets=bool(config.get("trim_offsets", True)),
        add_prefix_space=prefix,
    )
    if isinstance(config.get("mask_token", "<mask>"), str):
        # The published RoBERTa tokenizers let the mask swallow the blank before it.
        mask = AddedToken(tokens["mask_token"], lstrip=True, normalized=False, special=True)
        backend.add_special_tokens([mask])
    return backend


def build_unigram(
    folder: Path, config: Mapping[str, Any], defaults: Mapping[str, str]
) -> Tokenizer:
    """DeBERTa's tokenizer from `spm.model`, with SentencePiece's own normalisation.

    The mask is not among the pieces of the published models; it gets the first id after them.
    """
    path = folder / "spm.model"
    model = read_spm(path)
    vocab = {piece: index for index, (piece, _) in enumerate(model.pieces)}
    needed = {name: text for name, text in defaults.items() if name != "mask_token"}
    tokens = _check_special(path, "DeBERTa", vocab, config, needed)
    backend = Tokenizer(models.Unigram(model.pieces, unk_id=model.unk_id, byte_fallback=False))
    backend.add_tokens(
        [
            AddedToken(piece, normalized=False, special=kind == CONTROL)
            for (piece, _), kind in zip(model.pieces, model.types, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    lower = [normalizers.Lowercase()] if config.get("do_lower_case") else []
    charsmap = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    blanks = [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip(left=False)]
    backend.normalizer = normalizers.Sequence([*lower, *charsmap, *blanks])
    words = pre_tokenizers.Metaspace(
        "▁", "always" if config.get("add_prefix_space", True) else "first"
    )
    marks = [pre_tokenizers.Punctuation("isolated")] if config.get("split_by_punct") else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*marks, words])
    backend.decoder = decoders.Metaspace("▁", "always")
    backend.post_processor = _types_0_and_1(tokens["cls_token"], tokens["sep_token"], vocab)
    return backend


def _check_special(
    path: Path,
    model: str,
    vocab: Mapping[str, int],
    config: Mapping[str, Any],
    defaults: Mapping[str, str],
) -> dict[str, str]:
    tokens = {name: added_token(config.get(name, text)).content for name, text in defaults.items()}
    lacking = sorted({token for token in tokens.values() if token not in vocab})
    if lacking:
        raise ValueError(f"{path}: not a {model} vocabulary, it lacks {', '.join(lacking)}")
    return tokens


def added_token(token: Any) -> AddedToken:
    """A special token as files spell it: a string, or an object with flags."""
    if isinstance(token, AddedToken):
        return token
    if isinstance(token, Mapping):
        names = ("single_word", "lstrip", "rstrip", "normalized")
        flags = {name: bool(token[name]) for name in names if name in token}
        return AddedToken(token["content"], special=True, **flags)
    return AddedToken(str(token), normalized=False, special=True)
