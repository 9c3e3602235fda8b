"""Tokenizers for BERT (WordPiece) and RoBERTa (byte-level BPE) on the `tokenizers` library.

    tokenizer = AutoTokenizer.from_pretrained("folder or hub id")
    batch = tokenizer(["a sentence"], ["its pair"], truncation=True, max_length=128, padding=True)

A folder holds either `tokenizer.json`, or `vocab.txt` (BERT), or `vocab.json` and `merges.txt`
(RoBERTa); `tokenizer_config.json` beside them says lower-casing, the special tokens and
`model_max_length`. Calls, fields and numbers are those of Hugging Face's tokenizers, and
`save_pretrained` writes what Transformers loads. Truncation and padding settings baked into a
`tokenizer.json` are ignored, as Transformers ignores them: each call states its own.
"""

import json
import os
import warnings
from collections import UserDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Encoding, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers, processors

NO_LIMIT = int(1e30)  # model_max_length where no file states one, as in Transformers
TRUNCATION = ("longest_first", "only_first", "only_second", "do_not_truncate")
PADDING = ("longest", "max_length", "do_not_pad")
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
           "mask_token")
FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer_config.json",
         "special_tokens_map.json", "added_tokens.json", "config.json")
# What WordPiece decoding undoes: the blanks that splitting put around punctuation.
CLEAN_UP = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
            (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))


class BatchEncoding(UserDict):
    """A dict of model inputs whose entries are attributes too (`enc.input_ids`).

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

    def to(self, device: Any) -> "BatchEncoding":
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
            raise ValueError("this batch was padded or built from plain lists: only the result of "
                             "calling a tokenizer knows its words and characters")
        return self.encodings[index]


def _token_property(name: str) -> property:
    def get(self: "PreTrainedTokenizer") -> str | None:
        return self._special.get(name)

    def put(self: "PreTrainedTokenizer", token: "str | AddedToken | None") -> None:
        self._set_special(name, token)

    return property(get, put, doc=f"The {name}, or None.")


def _id_property(name: str) -> property:
    def get(self: "PreTrainedTokenizer") -> int | None:
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

    bos_token, eos_token, unk_token = map(_token_property, SPECIAL[:3])
    sep_token, pad_token, cls_token, mask_token = map(_token_property, SPECIAL[3:])
    bos_token_id, eos_token_id, unk_token_id = map(_id_property, SPECIAL[:3])
    sep_token_id, pad_token_id, cls_token_id, mask_token_id = map(_id_property, SPECIAL[3:])

    def __init__(self, backend: Tokenizer, config: Mapping[str, Any] | None = None,
                 name_or_path: str = "") -> None:
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
        backend.no_truncation()
        backend.no_padding()
        self._settings: tuple[Any, Any] = (None, None)

    # -- reading and writing ------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], *, revision: str | None = None,
                        local_files_only: bool = False, **overrides: Any) -> "PreTrainedTokenizer":
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
        folder = _folder(name_or_path, revision, local_files_only)
        config = _read_config(folder) | overrides
        kind = cls if cls.vocab_files else _class_for(folder, config)
        backend = kind._read_backend(folder, config)
        return kind(backend, config, str(name_or_path))

    @classmethod
    def _read_backend(cls, folder: Path, config: dict[str, Any]) -> Tokenizer:
        path = folder / "tokenizer.json"
        if path.exists():
            try:
                # Through text: the library reports a missing and a damaged file alike.
                backend = Tokenizer.from_str(_read_text(path))
            except ValueError:
                raise
            except Exception as error:  # the library raises bare Exception
                raise ValueError(f"{path}: damaged or not a tokenizer file ({error}); "
                                 "download it again, or remove it to use vocab files") from error
            cls._apply_config(backend, config)
            return backend
        if cls.vocab_files and all((folder / name).exists() for name in cls.vocab_files):
            return cls._build(folder, config)
        raise _nothing_found(folder, cls.vocab_files)

    @classmethod
    def _build(cls, folder: Path, config: dict[str, Any]) -> Tokenizer:
        raise _nothing_found(folder, cls.vocab_files)

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
        self._apply_settings(None, None)
        self.backend_tokenizer.save(str(target / "tokenizer.json"))
        written = [str(target / "tokenizer.json")]
        plain = {k: v for k, v in self._config.items() if k not in (*SPECIAL, "name_or_path")}
        config = plain | self._special | {
            "tokenizer_class": type(self).__name__, "model_max_length": self.model_max_length,
            "padding_side": self.padding_side, "truncation_side": self.truncation_side,
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
        }
        for name, data in (("tokenizer_config.json", config),
                           ("special_tokens_map.json", self._special)):
            text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False, default=str)
            (target / name).write_text(text + "\n", encoding="utf-8")
            written.append(str(target / name))
        return tuple(written + self.backend_tokenizer.model.save(str(target)))

    # -- encoding -----------------------------------------------------------------------------

    def __call__(self, text: Any, text_pair: Any = None, *, add_special_tokens: bool = True,
                 padding: bool | str = False, truncation: bool | str | None = None,
                 max_length: int | None = None, stride: int = 0,
                 is_split_into_words: bool = False, pad_to_multiple_of: int | None = None,
                 return_tensors: str | None = None, return_token_type_ids: bool | None = None,
                 return_attention_mask: bool | None = None,
                 return_overflowing_tokens: bool = False,
                 return_special_tokens_mask: bool = False, return_offsets_mapping: bool = False,
                 return_length: bool = False) -> BatchEncoding:
        """Encodes a sentence, a pair, or a batch of either.

        Args:
            text: a string, a list of strings, a list of pairs; with `is_split_into_words` a list
                of words or a list of such lists.
            text_pair: the second sentences, in the same shape as `text`.
            padding: False, True or "longest" (of the batch), or "max_length".
            truncation: False, True or "longest_first", "only_first", "only_second"; left out, a
                stated `max_length` truncates, with a warning.
            max_length: tokens per sequence, special tokens included; default `model_max_length`.
            stride: tokens that an overflowing piece repeats from the one before it.
            pad_to_multiple_of: rounds the padded length up.
            return_tensors: None for lists, "pt" or "np" for arrays.
            return_overflowing_tokens: what truncation cut becomes further rows;
                `overflow_to_sample_mapping` says whose. The result is then always a batch.

        Returns:
            `input_ids`, `attention_mask` and, where the model takes them, `token_type_ids`, plus
            what the `return_` flags ask for. Lists for one input, lists of lists for a batch.
        """
        inputs, single = _inputs(text, text_pair, is_split_into_words)
        pair = bool(inputs) and isinstance(inputs[0], tuple)
        self._configure(padding, truncation, max_length, stride, pad_to_multiple_of,
                        add_special_tokens, pair)
        try:
            encoded = self.backend_tokenizer.encode_batch(
                inputs, add_special_tokens=add_special_tokens,
                is_pretokenized=is_split_into_words)
        except TypeError as error:
            raise TypeError("text must be a string, a list of strings or a list of pairs of "
                            f"strings; the tokenizer says: {error}") from error
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"cannot encode: {error}") from error
        rows, owner = _flatten(encoded, return_overflowing_tokens)
        names = self.model_input_names
        types = return_token_type_ids if return_token_type_ids is not None else (
            "token_type_ids" in names)
        mask = return_attention_mask if return_attention_mask is not None else (
            "attention_mask" in names)
        data: dict[str, Any] = {"input_ids": [row.ids for row in rows]}
        if types:
            data["token_type_ids"] = [row.type_ids for row in rows]
        if mask:
            data["attention_mask"] = [row.attention_mask for row in rows]
        if return_special_tokens_mask:
            data["special_tokens_mask"] = [row.special_tokens_mask for row in rows]
        if return_offsets_mapping:
            data["offset_mapping"] = [row.offsets for row in rows]
        if return_length:
            data["length"] = [len(row.ids) for row in rows]
        if return_overflowing_tokens:
            data["overflow_to_sample_mapping"] = owner
        elif single and return_tensors is None:
            data = {key: value[0] for key, value in data.items()}
        self._warn_if_too_long(rows, max_length)
        return BatchEncoding(_tensors(data, return_tensors), rows)

    def encode(self, text: Any, text_pair: Any = None, **options: Any) -> list[int]:
        """The ids alone."""
        return self(text, text_pair, **options)["input_ids"]

    def tokenize(self, text: str, pair: str | None = None,
                 add_special_tokens: bool = False) -> list[str]:
        """The tokens as strings; by default without the special ones."""
        return self(text, pair, add_special_tokens=add_special_tokens).tokens()

    def pad(self, encoded_inputs: Any, padding: bool | str = True, max_length: int | None = None,
            pad_to_multiple_of: int | None = None,
            return_tensors: str | None = None) -> BatchEncoding:
        """Pads encodings to one length.

        Args:
            encoded_inputs: a list of encodings (dicts with `input_ids`), a dict of lists, or one
                encoding. Entries that are not per token (labels) pass through.
            padding, max_length, pad_to_multiple_of, return_tensors: as in a call.
        """
        columns = _columns(encoded_inputs)
        if "input_ids" not in columns:
            raise ValueError(f"pad needs input_ids; the encodings have {sorted(columns)}")
        single = bool(len(columns["input_ids"])) and not isinstance(
            columns["input_ids"][0], (list, tuple, np.ndarray)) and not hasattr(
            columns["input_ids"][0], "tolist")
        if single:
            columns = {key: [value] for key, value in columns.items()}
        columns = {key: [v.tolist() if hasattr(v, "tolist") else v for v in value]
                   for key, value in columns.items()}
        ids = columns["input_ids"]
        if "attention_mask" in self.model_input_names:
            columns.setdefault("attention_mask", [[1] * len(row) for row in ids])
        width = self._padded_width(_padding(padding), max((len(row) for row in ids), default=0),
                                   max_length, pad_to_multiple_of)
        lengths = [len(row) for row in ids]
        for key, value in self._fillers().items():
            if key in columns:
                columns[key] = [self._fill(row, width, value) for row in columns[key]]
        if any(length != width for length in lengths) and self.pad_token_id is None:
            raise ValueError("this tokenizer has no pad_token: set one before padding")
        if single and return_tensors is None:
            columns = {key: value[0] for key, value in columns.items()}
        return BatchEncoding(_tensors(columns, return_tensors))

    def _fillers(self) -> dict[str, Any]:
        return {"input_ids": self.pad_token_id, "attention_mask": 0, "special_tokens_mask": 1,
                "token_type_ids": self.pad_token_type_id, "offset_mapping": (0, 0)}

    def _fill(self, row: list[Any], width: int | None, value: Any) -> list[Any]:
        if width is None:
            return row
        extra = [value] * (width - len(row))
        return list(row) + extra if self.padding_side == "right" else extra + list(row)

    def _padded_width(self, padding: str, longest: int, max_length: int | None,
                      multiple: int | None) -> int | None:
        if padding == "do_not_pad":
            return None
        width = longest
        if padding == "max_length":
            limit = max_length if max_length is not None else self.model_max_length
            if limit >= NO_LIMIT:
                warnings.warn("padding to max_length asked for, but neither max_length nor "
                              "model_max_length is set: nothing is padded", stacklevel=3)
                return None
            width = max(longest, limit)
        return -(-width // multiple) * multiple if multiple else width

    def _configure(self, padding: bool | str, truncation: bool | str | None,
                   max_length: int | None, stride: int, multiple: int | None,
                   special: bool, pair: bool) -> None:
        """Sets the library's truncation and padding to what this call asks for."""
        strategy = _truncation(truncation, max_length)
        cut = None
        if strategy != "do_not_truncate":
            limit = self.model_max_length if max_length is None else max_length
            if limit >= NO_LIMIT:
                warnings.warn("truncation asked for, but neither max_length nor model_max_length "
                              "is set: nothing is truncated", stacklevel=3)
            else:
                room = limit - (self.num_special_tokens_to_add(pair) if special else 0)
                if room < 0:
                    raise ValueError(f"max_length={limit} leaves no room for the "
                                     f"{limit - room} special tokens; use a larger one")
                if stride < 0 or (stride and stride >= room):
                    raise ValueError(f"stride={stride} must be smaller than the {room} tokens "
                                     f"that max_length={limit} leaves for text")
                cut = (limit, stride, strategy, self.truncation_side)
        fill = None
        kind = _padding(padding)
        if kind != "do_not_pad":
            if self.pad_token_id is None:
                raise ValueError("this tokenizer has no pad_token: set one before padding")
            length = self._padded_width(kind, 0, max_length, None) if kind == "max_length" else None
            if kind == "longest" or length is not None:
                fill = (self.padding_side, self.pad_token_id, self.pad_token_type_id,
                        self.pad_token, length, multiple)
        self._apply_settings(cut, fill)

    def _apply_settings(self, cut: Any, fill: Any) -> None:
        """Touches the library object only where a setting changes (each change costs a copy)."""
        backend = self.backend_tokenizer
        if cut != self._settings[0]:
            if cut is None:
                backend.no_truncation()
            else:
                backend.enable_truncation(cut[0], stride=cut[1], strategy=cut[2],
                                          direction=cut[3])
        if fill != self._settings[1]:
            if fill is None:
                backend.no_padding()
            else:
                backend.enable_padding(direction=fill[0], pad_id=fill[1], pad_type_id=fill[2],
                                       pad_token=fill[3], length=fill[4],
                                       pad_to_multiple_of=fill[5])
        self._settings = (cut, fill)

    def _warn_if_too_long(self, rows: list[Encoding], max_length: int | None) -> None:
        if max_length is not None or self._settings[0] is not None or not rows:
            return
        longest = max(len(row) for row in rows)
        if longest > self.model_max_length:
            warnings.warn(f"a sequence has {longest} tokens and this model takes "
                          f"{self.model_max_length}: pass truncation=True", stacklevel=3)

    # -- decoding -----------------------------------------------------------------------------

    def decode(self, token_ids: Any, skip_special_tokens: bool = False,
               clean_up_tokenization_spaces: bool | None = None) -> Any:
        """Text of one sequence of ids (list, array, tensor or a single id), or of each row."""
        if hasattr(token_ids, "tolist"):
            token_ids = token_ids.tolist()
        if isinstance(token_ids, int):
            token_ids = [token_ids]
        token_ids = list(token_ids)
        if token_ids and not isinstance(token_ids[0], (int, np.integer)):
            return self.batch_decode(token_ids, skip_special_tokens, clean_up_tokenization_spaces)
        text = self.backend_tokenizer.decode([int(i) for i in token_ids],
                                             skip_special_tokens=skip_special_tokens)
        wanted = clean_up_tokenization_spaces
        if wanted is None:
            wanted = self.clean_up_tokenization_spaces
        return self.clean_up_tokenization(text) if wanted else text

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False,
                     clean_up_tokenization_spaces: bool | None = None) -> list[str]:
        """`decode` of each sequence."""
        return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces)
                for row in sequences]

    def clean_up_tokenization(self, text: str) -> str:
        """Takes the blanks before punctuation away; byte-level BPE text has none to take."""
        if isinstance(self.backend_tokenizer.model, models.BPE):
            return text
        for old, new in CLEAN_UP:
            text = text.replace(old, new)
        return text

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The token of an id (None outside the vocabulary), or the list of tokens of many."""
        if isinstance(ids, (int, np.integer)):
            return self.backend_tokenizer.id_to_token(int(ids))
        skip = set(self.all_special_ids) if skip_special_tokens else set()
        return [self.backend_tokenizer.id_to_token(int(i)) for i in ids if int(i) not in skip]

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        """The id of a token (the unknown token's for strangers), or the list of ids of many."""
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
        """Each special token once, in the order of SPECIAL."""
        return list(dict.fromkeys(self._special.values()))

    @property
    def all_special_ids(self) -> list[int]:
        return [self.backend_tokenizer.token_to_id(token) for token in self.all_special_tokens]

    def fingerprint(self) -> str:
        """A string that is equal for two tokenizers only if they encode alike."""
        self._apply_settings(None, None)
        return f"{self.truncation_side} {self.backend_tokenizer.to_str()}"

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return self.backend_tokenizer.num_special_tokens_to_add(pair)

    def add_tokens(self, tokens: str | AddedToken | Sequence[str | AddedToken],
                   special_tokens: bool = False) -> int:
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
        added = _added_token(token)
        if self.backend_tokenizer.token_to_id(added.content) is None or isinstance(token, dict) \
                or not _is_special(self.backend_tokenizer, added.content):
            self.backend_tokenizer.add_special_tokens([added])
        self._special[name] = added.content

    def __repr__(self) -> str:
        return (f"{type(self).__name__}(name_or_path={self.name_or_path!r}, "
                f"vocab_size={self.vocab_size}, model_max_length={self.model_max_length}, "
                f"special_tokens={self._special})")


class BertTokenizer(PreTrainedTokenizer):
    """WordPiece: `[CLS] a [SEP]` and `[CLS] a [SEP] b [SEP]`, types 0 and 1."""

    defaults = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]",
                "cls_token": "[CLS]", "mask_token": "[MASK]"}
    vocab_files = ("vocab.txt",)

    @classmethod
    def _build(cls, folder: Path, config: dict[str, Any]) -> Tokenizer:
        path = folder / "vocab.txt"
        lines = _read_text(path).replace("\r\n", "\n").split("\n")
        vocab = {token: index for index, token in enumerate(lines[:-1] if not lines[-1] else lines)}
        tokens = {name: _text(config.get(name, token)) for name, token in cls.defaults.items()}
        lacking = [token for token in tokens.values() if token not in vocab]
        if lacking:
            raise ValueError(f"{path}: not a BERT vocabulary, it lacks {', '.join(lacking)}")
        if "do_lower_case" not in config and "The" in vocab:
            warnings.warn(f"{path} has upper-case words but no tokenizer_config.json says "
                          "do_lower_case: text is lower-cased; pass do_lower_case=False for a "
                          "cased model", stacklevel=4)
        backend = Tokenizer(models.WordPiece(vocab, unk_token=tokens["unk_token"]))
        lower = config.get("do_lower_case", True)
        backend.normalizer = normalizers.BertNormalizer(
            clean_text=True, handle_chinese_chars=config.get("tokenize_chinese_chars", True),
            strip_accents=config.get("strip_accents"), lowercase=lower)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        cls_token, sep = tokens["cls_token"], tokens["sep_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{cls_token}:0 $A:0 {sep}:0",
            pair=f"{cls_token}:0 $A:0 {sep}:0 $B:1 {sep}:1",
            special_tokens=[(cls_token, vocab[cls_token]), (sep, vocab[sep])])
        backend.decoder = decoders.WordPiece(prefix="##")
        return backend

    @classmethod
    def _apply_config(cls, backend: Tokenizer, config: dict[str, Any]) -> None:
        normalizer = backend.normalizer
        if not isinstance(normalizer, normalizers.BertNormalizer):
            return
        wanted = {"lowercase": "do_lower_case", "strip_accents": "strip_accents",
                  "handle_chinese_chars": "tokenize_chinese_chars"}
        for ours, theirs in wanted.items():
            if theirs in config and getattr(normalizer, ours) != config[theirs]:
                setattr(normalizer, ours, config[theirs])
        backend.normalizer = normalizer


class RobertaTokenizer(PreTrainedTokenizer):
    """Byte-level BPE: `<s> a </s>` and `<s> a </s></s> b </s>`; all types 0, so none returned."""

    defaults = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
                "sep_token": "</s>", "pad_token": "<pad>", "cls_token": "<s>",
                "mask_token": "<mask>"}
    model_input_names = ["input_ids", "attention_mask"]
    vocab_files = ("vocab.json", "merges.txt")

    @classmethod
    def _build(cls, folder: Path, config: dict[str, Any]) -> Tokenizer:
        path = folder / "vocab.json"
        vocab = _read_json(path)
        tokens = {name: _text(config.get(name, token)) for name, token in cls.defaults.items()}
        lacking = sorted({token for token in tokens.values() if token not in vocab})
        if lacking:
            raise ValueError(f"{path}: not a RoBERTa vocabulary, it lacks {', '.join(lacking)}")
        prefix = bool(config.get("add_prefix_space", False))
        trim = bool(config.get("trim_offsets", True))
        try:
            backend = Tokenizer(models.BPE(vocab, _read_merges(folder / "merges.txt")))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{folder / 'merges.txt'} does not belong to vocab.json beside it "
                             f"({error})") from error
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        backend.decoder = decoders.ByteLevel()
        backend.post_processor = processors.RobertaProcessing(
            (tokens["sep_token"], vocab[tokens["sep_token"]]),
            (tokens["cls_token"], vocab[tokens["cls_token"]]),
            trim_offsets=trim, add_prefix_space=prefix)
        if isinstance(config.get("mask_token", "<mask>"), str):
            # The published RoBERTa tokenizers let the mask swallow the blank before it.
            backend.add_special_tokens([AddedToken(tokens["mask_token"], lstrip=True,
                                                   normalized=False, special=True)])
        return backend

    @classmethod
    def _apply_config(cls, backend: Tokenizer, config: dict[str, Any]) -> None:
        splitter = backend.pre_tokenizer
        wanted = config.get("add_prefix_space")
        if wanted is not None and isinstance(splitter, pre_tokenizers.ByteLevel) \
                and splitter.add_prefix_space != wanted:
            splitter.add_prefix_space = bool(wanted)
            backend.pre_tokenizer = splitter


PreTrainedTokenizerFast = PreTrainedTokenizer
BertTokenizerFast = BertTokenizer
RobertaTokenizerFast = RobertaTokenizer
CLASSES: dict[str, type[PreTrainedTokenizer]] = {"bert": BertTokenizer, "roberta": RobertaTokenizer}


class AutoTokenizer:
    """`AutoTokenizer.from_pretrained(folder or hub id)` -> the right tokenizer."""

    from_pretrained = PreTrainedTokenizer.from_pretrained


# -- choosing and reading files -----------------------------------------------------------------


def _folder(name_or_path: str | os.PathLike[str], revision: str | None,
            local_files_only: bool) -> Path:
    """The folder itself, or a download of the tokenizer files of a hub id."""
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if path.is_file():
        raise NotADirectoryError(f"{path} is a file: name the folder that holds it")
    name = str(name_or_path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{name}: no such folder (looked there for tokenizer.json, "
                                "vocab.txt, or vocab.json and merges.txt)")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES),
                                      local_files_only=local_files_only, etag_timeout=5))
    except Exception as error:
        raise OSError(f"{name}: no folder of that name here, and the hub did not give tokenizer "
                      f"files for it ({type(error).__name__}: {error})") from error


def _read_config(folder: Path) -> dict[str, Any]:
    """`special_tokens_map.json` under `tokenizer_config.json`, which wins."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            config |= {k: v for k, v in _read_json(folder / name).items() if v is not None
                       or k not in SPECIAL}
    return config


def _class_for(folder: Path, config: dict[str, Any]) -> type[PreTrainedTokenizer]:
    """By the class that was saved, the model beside it, or the vocabulary files present."""
    saved = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    for kind in CLASSES.values():
        if kind.__name__ == saved:
            return kind
    if saved and saved not in ("PreTrainedTokenizer", "TokenizersBackend"):
        if not (folder / "tokenizer.json").exists():
            raise ValueError(f"{folder}: tokenizer_class {saved!r} is not supported here without a "
                             "tokenizer.json; supported: "
                             + ", ".join(kind.__name__ for kind in CLASSES.values()))
        return PreTrainedTokenizer
    if (folder / "config.json").exists():
        kind = CLASSES.get(_read_json(folder / "config.json").get("model_type"))
        if kind is not None:
            return kind
    if (folder / "tokenizer.json").exists():
        return _class_of_backend(_read_json(folder / "tokenizer.json"))
    for kind in CLASSES.values():
        if all((folder / name).exists() for name in kind.vocab_files):
            return kind
    return PreTrainedTokenizer


def _class_of_backend(data: dict[str, Any]) -> type[PreTrainedTokenizer]:
    """A `tokenizer.json` on its own: known special tokens mean a known class."""
    added = {token.get("content") for token in data.get("added_tokens") or []}
    for kind in CLASSES.values():
        if set(kind.defaults.values()) <= added:
            return kind
    return PreTrainedTokenizer


def _nothing_found(folder: Path, vocab_files: tuple[str, ...]) -> FileNotFoundError:
    choices = " and ".join(vocab_files) if vocab_files else (
        "vocab.txt (BERT), or vocab.json and merges.txt (RoBERTa)")
    here = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
    return FileNotFoundError(f"no tokenizer in {folder}: looked for tokenizer.json, or {choices}; "
                             f"the folder holds {here}")


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; the file is damaged") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, not JSON ({error})") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: a JSON object is expected, found a {type(data).__name__}")
    return data


def _read_merges(path: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        line = line.rstrip("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2:
            raise ValueError(f"{path}, line {number}: a merge is two tokens and one blank, "
                             f"found {line[:60]!r}")
        merges.append((parts[0], parts[1]))
    return merges


def _text(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def _added_token(token: Any) -> AddedToken:
    if isinstance(token, AddedToken):
        return token
    if isinstance(token, dict):
        flags = {key: bool(token[key]) for key in ("single_word", "lstrip", "rstrip", "normalized")
                 if key in token}
        return AddedToken(token["content"], special=True, **flags)
    return AddedToken(str(token), normalized=False, special=True)


def _is_special(backend: Tokenizer, token: str) -> bool:
    return any(known.content == token and known.special
               for known in backend.get_added_tokens_decoder().values())


# -- inputs and outputs -------------------------------------------------------------------------


def _truncation(truncation: bool | str | None, max_length: int | None) -> str:
    if truncation is None and max_length is not None:
        warnings.warn("max_length is given without truncation: sequences are cut at it, the "
                      "longest of a pair first; pass truncation=True to say so", stacklevel=4)
        return "longest_first"
    if truncation is None or truncation is False:
        return "do_not_truncate"
    name = "longest_first" if truncation is True else truncation
    if name not in TRUNCATION:
        raise ValueError(f"truncation={truncation!r}: choose True, False or one of "
                         f"{', '.join(TRUNCATION)}")
    return name


def _padding(padding: bool | str) -> str:
    name = {True: "longest", False: "do_not_pad"}.get(padding, padding)  # type: ignore[call-overload]
    if name not in PADDING:
        raise ValueError(f"padding={padding!r}: choose True, False or one of {', '.join(PADDING)}")
    return str(name)


def _inputs(text: Any, pair: Any, words: bool) -> tuple[list[Any], bool]:
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
    if isinstance(pair, str) or len(pair) != len(text):
        raise ValueError(f"{len(text)} sentences but "
                         f"{1 if isinstance(pair, str) else len(pair)} pairs: give one each")
    return list(zip(text, pair, strict=True)), False


def _flatten(encoded: list[Encoding], overflow: bool) -> tuple[list[Encoding], list[int]]:
    if not overflow:
        return encoded, list(range(len(encoded)))
    rows, owner = [], []
    for index, item in enumerate(encoded):
        pieces = [item, *item.overflowing]
        rows += pieces
        owner += [index] * len(pieces)
    return rows, owner


def _columns(encodings: Any) -> dict[str, Any]:
    if isinstance(encodings, (Mapping, UserDict)):
        return dict(encodings)
    rows: Iterator[Any] = iter(encodings)
    columns: dict[str, Any] = {}
    for row in rows:
        for key, value in row.items():
            columns.setdefault(key, []).append(value)
    return columns


def _tensors(data: dict[str, Any], kind: str | None) -> dict[str, Any]:
    if kind is None:
        return data
    if kind not in ("pt", "np"):
        raise ValueError(f"return_tensors={kind!r}: choose 'pt', 'np' or None")
    arrays = {}
    for key, value in data.items():
        try:
            arrays[key] = np.asarray(value)
        except ValueError as error:
            raise ValueError(f"{key}: rows of different lengths make no tensor; pass padding=True "
                             "and truncation=True") from error
    if kind == "np":
        return arrays
    import torch
    return {key: torch.from_numpy(value) for key, value in arrays.items()}
