"""The tokenizer every model's tokenizer derives from: calls, padding, decoding, vocabulary."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Encoding, Tokenizer, models

from ..files import write_atomically
from . import files
from .encoding import (
    FIELDS,
    BatchEncoding,
    clean_up,
    columns,
    flatten,
    inputs,
    padding_kind,
    plain,
    tensors,
    truncation_strategy,
)
from .files import SPECIAL

NO_LIMIT = int(1e30)  # model_max_length where no file states one, as in Transformers


def _token_property(name: str) -> property:
    def get(self: PreTrainedTokenizer) -> str | None:
        return self._special.get(name)

    def put(self: PreTrainedTokenizer, token: str | AddedToken | None) -> None:
        self._set_special(name, token)

    return property(get, put, doc=f"The {name}, or None.")


def _id_property(name: str) -> property:
    def get(self: PreTrainedTokenizer) -> int | None:
        token = self._special.get(name)
        return None if token is None else self.backend_tokenizer.token_to_id(token)

    return property(get, doc=f"The id of the {name}, or None.")


class PreTrainedTokenizer:
    """A tokenizer read from files; the subclasses know how to build one from a bare vocabulary.

    Args:
        backend: the `tokenizers` object; its own truncation and padding settings are dropped.
        config: the contents of `tokenizer_config.json`; keys not known here are kept and saved.
        name_or_path: where it came from, for messages.
    """

    defaults: dict[str, str] = {}
    model_input_names: list[str] = ["input_ids", "token_type_ids", "attention_mask"]
    vocab_files: tuple[str, ...] = ()
    algorithm: type[models.Model] = models.Model

    bos_token, eos_token, unk_token = map(_token_property, SPECIAL[:3])
    sep_token, pad_token, cls_token, mask_token = map(_token_property, SPECIAL[3:])
    bos_token_id, eos_token_id, unk_token_id = map(_id_property, SPECIAL[:3])
    sep_token_id, pad_token_id, cls_token_id, mask_token_id = map(_id_property, SPECIAL[3:])

    def __init__(
        self, backend: Tokenizer, config: Mapping[str, Any] | None = None, name_or_path: str = ""
    ) -> None:
        config = dict(config or {})
        self.backend_tokenizer = backend
        self.name_or_path = name_or_path
        self.model_max_length = int(config.get("model_max_length") or NO_LIMIT)
        self.padding_side: str = config.get("padding_side", "right")
        self.truncation_side: str = config.get("truncation_side", "right")
        self.clean_up_tokenization_spaces = bool(config.get("clean_up_tokenization_spaces", False))
        self.pad_token_type_id = 0
        if "model_input_names" in config:
            self.model_input_names = list(config["model_input_names"])
        self._config = config
        self._special: dict[str, str] = {}
        for name in SPECIAL:
            self._set_special(name, config.get(name, self.defaults.get(name)))
        self._extra = self._add_extra(config)
        backend.no_truncation()
        backend.no_padding()
        self._settings: tuple[Any, Any] = (None, None)

    def _add_extra(self, config: Mapping[str, Any]) -> list[str]:
        """Adds tokens that only the config names; returns the special ones among them."""
        backend = self.backend_tokenizer
        decoder = config.get("added_tokens_decoder") or {}
        for _, token in sorted((int(key), value) for key, value in decoder.items()):
            if backend.token_to_id(token["content"]) is None:
                add = backend.add_special_tokens if token.get("special") else backend.add_tokens
                add([files.added_token(token)])
        extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or ()
        tokens = [files.added_token(t) for t in (extra if not isinstance(extra, dict) else ())]
        backend.add_special_tokens([t for t in tokens if not _is_special(backend, t.content)])
        return [token.content for token in tokens]

    # -- reading and writing ------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> PreTrainedTokenizer:
        """Reads a tokenizer from a folder, or from the hub where no such folder exists.

        Args:
            name_or_path: a folder or a hub id.
            revision: branch, tag or commit on the hub.
            local_files_only: never ask the hub.
            **overrides: entries that win over `tokenizer_config.json`, e.g. `do_lower_case=False`.

        Raises:
            OSError: nothing to read; the message lists the files looked for and the folder.
            ValueError: a file is damaged; the message names it.
        """
        folder = files.locate(name_or_path, revision, local_files_only)
        config = files.read_config(folder) | overrides
        return cls._from_folder(folder, config, str(name_or_path))

    @classmethod
    def _from_folder(
        cls, folder: Path, config: dict[str, Any], name_or_path: str
    ) -> PreTrainedTokenizer:
        return cls(cls._read_backend(folder, config), config, name_or_path)

    @classmethod
    def _read_backend(cls, folder: Path, config: dict[str, Any]) -> Tokenizer:
        if (folder / "tokenizer.json").exists():
            backend = files.read_tokenizer(folder / "tokenizer.json")
            cls._apply_config(backend, config)
            return backend
        if cls.vocab_files and all((folder / name).exists() for name in cls.vocab_files):
            return cls._build(folder, config)
        raise files.nothing_found(folder, cls.vocab_files)

    @classmethod
    def _build(cls, folder: Path, config: dict[str, Any]) -> Tokenizer:
        raise files.nothing_found(folder, cls.vocab_files)

    @classmethod
    def _apply_config(cls, backend: Tokenizer, config: dict[str, Any]) -> None:
        """Lets `tokenizer_config.json` (or a keyword) win over what `tokenizer.json` says."""

    def save_pretrained(self, folder: str | os.PathLike[str]) -> tuple[str, ...]:
        """Writes `tokenizer.json`, its two config files and the vocabulary files.

        Returns:
            The paths written; Transformers, and `from_pretrained` here, read them back.
        """
        target = Path(folder)
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(f"{target} is a file: name a folder to save the tokenizer in")
        target.mkdir(parents=True, exist_ok=True)
        plain = {k: v for k, v in self._config.items() if k not in (*SPECIAL, "name_or_path")}
        config = (
            plain
            | self._special
            | {
                "tokenizer_class": type(self).__name__,
                "model_max_length": self.model_max_length,
                "padding_side": self.padding_side,
                "truncation_side": self.truncation_side,
                "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
            }
        )
        self._apply_settings(None, None)
        with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=target) as made:
            aside = Path(made)
            self.backend_tokenizer.save(str(aside / "tokenizer.json"))
            for name, data in (
                ("tokenizer_config.json", config),
                ("special_tokens_map.json", self._special),
            ):
                text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False, default=str)
                (aside / name).write_text(text + "\n", encoding="utf-8")
            vocabulary = self.backend_tokenizer.model.save(str(aside))
            names = [
                "tokenizer.json",
                "tokenizer_config.json",
                "special_tokens_map.json",
                *(Path(path).name for path in vocabulary),
            ]
            for name in names:  # all of them are written before the first one takes its name
                write_atomically(target / name, partial(os.replace, aside / name))
        return tuple(str(target / name) for name in names)

    # -- encoding -----------------------------------------------------------------------------

    def __call__(
        self,
        text: Any,
        text_pair: Any = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
    ) -> BatchEncoding:
        """Encodes a sentence, a pair (a list per field), or a batch of either (lists of lists).

        Args:
            text: a string, a list of strings or of pairs; with `is_split_into_words` a list of
                words or a list of such lists. `text_pair` has the same shape.
            padding: False, True or "longest" (of the batch), or "max_length".
            truncation: False, True or "longest_first", "only_first", "only_second"; left out, a
                stated `max_length` truncates, with a warning.
            max_length: tokens per sequence, special tokens included; default `model_max_length`.
            stride: tokens that an overflowing piece repeats from the one before it.
            pad_to_multiple_of: rounds the padded length up.
            return_tensors: None for lists, "pt" or "np" for arrays.
            return_overflowing_tokens: what truncation cut becomes further rows;
                `overflow_to_sample_mapping` has the input of each. The result is always a batch.
        """
        texts, single = inputs(text, text_pair, is_split_into_words)
        pair = bool(texts) and isinstance(texts[0], tuple)
        cut = self._cut(padding, truncation, max_length, stride, add_special_tokens, pair)
        self._apply_settings(cut, self._fill_up(padding, max_length, pad_to_multiple_of))
        encoded = self._encode_batch(texts, add_special_tokens, is_split_into_words)
        rows, owner = flatten(encoded, return_overflowing_tokens)
        self._warn_if_too_long(rows, max_length)
        names = self.model_input_names
        wanted = {
            "input_ids": True,
            "token_type_ids": _or(return_token_type_ids, "token_type_ids" in names),
            "attention_mask": _or(return_attention_mask, "attention_mask" in names),
            "special_tokens_mask": return_special_tokens_mask,
            "offset_mapping": return_offsets_mapping,
            "length": return_length,
        }
        data: dict[str, Any] = {
            name: [FIELDS[name](row) for row in rows] for name, asked in wanted.items() if asked
        }
        if return_overflowing_tokens:
            data["overflow_to_sample_mapping"] = owner
        elif single and return_tensors is None:
            data = {key: value[0] for key, value in data.items()}
        return BatchEncoding(tensors(data, return_tensors), rows)

    def _encode_batch(self, texts: list[Any], special: bool, words: bool) -> list[Encoding]:
        try:
            return self.backend_tokenizer.encode_batch(
                texts, add_special_tokens=special, is_pretokenized=words
            )
        except TypeError as error:
            raise TypeError(
                "text must be a string, a list of strings or a list of pairs of strings; "
                f"the tokenizer says: {error}"
            ) from error
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"cannot encode: {error}") from error
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"cannot encode: {error}") from None

    def encode(self, text: Any, text_pair: Any = None, **options: Any) -> list[int]:
        """The ids alone."""
        return self(text, text_pair, **options)["input_ids"]

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False
    ) -> list[str]:
        """The tokens as strings; by default without the special ones."""
        return self(text, pair, add_special_tokens=add_special_tokens).tokens()

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Pads encodings to one length.

        Args:
            encoded_inputs: a list of encodings (dicts with `input_ids`), a dict of lists, or one
                encoding. Entries that are not per token (labels) pass through.
            padding, max_length, pad_to_multiple_of, return_tensors: as in a call.
        """
        data = columns(encoded_inputs)
        if "input_ids" not in data:
            raise ValueError(f"pad needs input_ids; the encodings have {sorted(data)}")
        data = {key: plain(value) for key, value in data.items()}
        single = bool(data["input_ids"]) and isinstance(data["input_ids"][0], int)
        if single:
            data = {key: [value] for key, value in data.items()}
        lengths = [len(row) for row in data["input_ids"]]
        if "attention_mask" in self.model_input_names:
            data.setdefault("attention_mask", [[1] * length for length in lengths])
        width = self._padded_width(
            padding_kind(padding), max(lengths, default=0), max_length, pad_to_multiple_of
        )
        if width is not None and any(length < width for length in lengths):
            self._need_pad_token()
            for key, value in self._fillers().items():
                if key in data:
                    data[key] = [self._fill(row, width, value) for row in data[key]]
        if single and return_tensors is None:
            data = {key: value[0] for key, value in data.items()}
        return BatchEncoding(tensors(data, return_tensors))

    def _need_pad_token(self) -> None:
        if self.pad_token_id is None:
            raise ValueError("this tokenizer has no pad_token: set one before padding")

    def _fillers(self) -> dict[str, Any]:
        return {
            "input_ids": self.pad_token_id,
            "attention_mask": 0,
            "special_tokens_mask": 1,
            "token_type_ids": self.pad_token_type_id,
            "offset_mapping": (0, 0),
        }

    def _fill(self, row: list[Any], width: int, value: Any) -> list[Any]:
        extra = [value] * (width - len(row))
        return list(row) + extra if self.padding_side == "right" else extra + list(row)

    def _padded_width(
        self, padding: str, longest: int, max_length: int | None, multiple: int | None
    ) -> int | None:
        if padding == "do_not_pad":
            return None
        width = longest
        if padding == "max_length":
            limit = max_length if max_length is not None else self.model_max_length
            if limit >= NO_LIMIT:
                warnings.warn(
                    "padding to max_length asked for, but neither max_length nor "
                    "model_max_length is set: nothing is padded",
                    stacklevel=3,
                )
                return None
            width = max(longest, limit)
        return -(-width // multiple) * multiple if multiple else width

    def _cut(
        self,
        padding: bool | str,
        truncation: bool | str | None,
        max_length: int | None,
        stride: int,
        special: bool,
        pair: bool,
    ) -> tuple[Any, ...] | None:
        """The library's truncation settings for a call; None where it does not truncate."""
        strategy = truncation_strategy(truncation, max_length, padding)
        if strategy == "do_not_truncate":
            return None
        limit = self.model_max_length if max_length is None else max_length
        if limit >= NO_LIMIT:
            warnings.warn(
                "truncation asked for, but neither max_length nor model_max_length is set: "
                "nothing is truncated",
                stacklevel=3,
            )
            return None
        room = limit - (self.num_special_tokens_to_add(pair) if special else 0)
        if room < 0:
            raise ValueError(
                f"max_length={limit} leaves no room for the {limit - room} special tokens; "
                "use a larger one"
            )
        if stride < 0 or (stride and stride >= room):
            raise ValueError(
                f"stride={stride} must be smaller than the {room} tokens that "
                f"max_length={limit} leaves for text"
            )
        return limit, stride, strategy, self.truncation_side

    def _fill_up(
        self, padding: bool | str, max_length: int | None, multiple: int | None
    ) -> tuple[Any, ...] | None:
        """The library's padding settings for a call; None where it does not pad."""
        kind = padding_kind(padding)
        if kind == "do_not_pad":
            return None
        self._need_pad_token()
        length = None
        if kind == "max_length":
            length = self._padded_width(kind, 0, max_length, None)
            if length is None:
                return None
        pad = (self.pad_token_id, self.pad_token_type_id, self.pad_token)
        return (self.padding_side, *pad, length, multiple)

    def _apply_settings(self, cut: Any, fill: Any) -> None:
        """Touches the library object only where a setting changes (each change costs a copy)."""
        backend = self.backend_tokenizer
        if cut != self._settings[0]:
            if cut is None:
                backend.no_truncation()
            else:
                backend.enable_truncation(cut[0], stride=cut[1], strategy=cut[2], direction=cut[3])
        if fill != self._settings[1]:
            if fill is None:
                backend.no_padding()
            else:
                backend.enable_padding(
                    direction=fill[0],
                    pad_id=fill[1],
                    pad_type_id=fill[2],
                    pad_token=fill[3],
                    length=fill[4],
                    pad_to_multiple_of=fill[5],
                )
        self._settings = (cut, fill)

    def _warn_if_too_long(self, rows: list[Encoding], max_length: int | None) -> None:
        if max_length is not None or self._settings[0] is not None or not rows:
            return
        longest = max(len(row) for row in rows)
        if longest > self.model_max_length:
            warnings.warn(
                f"a sequence has {longest} tokens and this model takes "
                f"{self.model_max_length}: pass truncation=True",
                stacklevel=3,
            )

    # -- decoding -----------------------------------------------------------------------------

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> Any:
        """Text of one sequence of ids (list, array, tensor or a single id), or of each row."""
        if hasattr(token_ids, "tolist"):
            token_ids = token_ids.tolist()
        if isinstance(token_ids, int):
            token_ids = [token_ids]
        token_ids = list(token_ids)
        if token_ids and not isinstance(token_ids[0], (int, np.integer)):
            return self.batch_decode(token_ids, skip_special_tokens, clean_up_tokenization_spaces)
        text = self.backend_tokenizer.decode(
            [int(i) for i in token_ids], skip_special_tokens=skip_special_tokens
        )
        wanted = clean_up_tokenization_spaces
        if wanted is None:
            wanted = self.clean_up_tokenization_spaces
        return self.clean_up_tokenization(text) if wanted else text

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """`decode` of each sequence."""
        return [
            self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in sequences
        ]

    def clean_up_tokenization(self, text: str) -> str:
        """Takes the blanks before punctuation away; byte-level BPE text has none to take."""
        return text if isinstance(self.backend_tokenizer.model, models.BPE) else clean_up(text)

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The token of an id (None outside the vocabulary), or the list of tokens of many."""
        if isinstance(ids, (int, np.integer)):
            return self.backend_tokenizer.id_to_token(int(ids))
        skip = set(self.all_special_ids) if skip_special_tokens else set()
        return [self.backend_tokenizer.id_to_token(int(i)) for i in ids if int(i) not in skip]

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        """The id of a token (the unknown token's where it has none), or the list of ids of many."""
        if isinstance(tokens, str):
            found = self.backend_tokenizer.token_to_id(tokens)
            return self.unk_token_id if found is None else found
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        decoder = self.backend_tokenizer.decoder
        return decoder.decode(tokens) if decoder is not None else " ".join(tokens)

    # -- vocabulary ---------------------------------------------------------------------------

    def __len__(self) -> int:
        """Size with added tokens: what an embedding must have."""
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Size without added tokens."""
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=False)

    def get_vocab(self) -> dict[str, int]:
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    @property
    def vocab(self) -> dict[str, int]:
        return self.get_vocab()

    @property
    def special_tokens_map(self) -> dict[str, str]:
        return dict(self._special)

    @property
    def all_special_tokens(self) -> list[str]:
        """Each special token once, in the order of SPECIAL, then those without a role."""
        return list(dict.fromkeys([*self._special.values(), *self._extra]))

    @property
    def all_special_ids(self) -> list[int]:
        return [self.backend_tokenizer.token_to_id(token) for token in self.all_special_tokens]

    def fingerprint(self) -> str:
        """A string that is equal for two tokenizers only if they encode alike."""
        self._apply_settings(None, None)
        return f"{self.truncation_side} {self.backend_tokenizer.to_str()}"

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return self.backend_tokenizer.num_special_tokens_to_add(pair)

    def add_tokens(
        self, tokens: str | AddedToken | Sequence[str | AddedToken], special_tokens: bool = False
    ) -> int:
        """Adds tokens to the vocabulary; the caller resizes the model's embedding.

        Returns:
            How many were new.
        """
        many = [tokens] if isinstance(tokens, (str, AddedToken)) else list(tokens)
        if special_tokens:
            return self.backend_tokenizer.add_special_tokens(many)
        return self.backend_tokenizer.add_tokens(many)

    def add_special_tokens(self, tokens: Mapping[str, str | AddedToken]) -> int:
        """`{"pad_token": "[PAD]"}`: names special tokens, adding those the vocabulary lacks."""
        before = len(self)
        for name, token in tokens.items():
            if name not in SPECIAL:
                raise ValueError(f"{name!r} is no special token; choose among {', '.join(SPECIAL)}")
            self._set_special(name, token)
        return len(self) - before

    def _set_special(self, name: str, token: Any) -> None:
        if token is None:
            self._special.pop(name, None)
            return
        added = files.added_token(token)
        if (
            self.backend_tokenizer.token_to_id(added.content) is None
            or isinstance(token, dict)
            or not _is_special(self.backend_tokenizer, added.content)
        ):
            self.backend_tokenizer.add_special_tokens([added])
        self._special[name] = added.content

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(name_or_path={self.name_or_path!r}, "
            f"vocab_size={self.vocab_size}, model_max_length={self.model_max_length}, "
            f"special_tokens={self._special})"
        )


def _is_special(backend: Tokenizer, token: str) -> bool:
    return any(
        known.content == token and known.special
        for known in backend.get_added_tokens_decoder().values()
    )


def _or(asked: bool | None, default: bool) -> bool:
    return default if asked is None else asked
