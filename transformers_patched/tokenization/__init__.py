"""Tokenizers for BERT, RoBERTa, DeBERTa and GPT-2 on the `tokenizers` library.

    tokenizer = AutoTokenizer.from_pretrained("folder or hub id")
    batch = tokenizer(["a sentence"], ["its pair"], truncation=True, max_length=128, padding=True)

A folder holds either `tokenizer.json`, or `vocab.txt` (BERT: WordPiece), or `vocab.json` and
`merges.txt` (RoBERTa, GPT-2: byte-level BPE), or `spm.model` (DeBERTa-v2, v3: SentencePiece's);
`tokenizer_config.json` in it states lower-casing, the special tokens and `model_max_length`.
Calls, fields and numbers are those of Hugging Face's tokenizers, and
`save_pretrained` writes what Transformers loads. Truncation and padding settings baked into a
`tokenizer.json` are ignored, as Transformers ignores them: each call states its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from ..configuration import model_type
from . import files
from .base import PreTrainedTokenizer
from .encoding import BatchEncoding

__all__ = [
    "AutoTokenizer",
    "BatchEncoding",
    "BertTokenizer",
    "BertTokenizerFast",
    "DebertaV2Tokenizer",
    "DebertaV2TokenizerFast",
    "GPT2Tokenizer",
    "GPT2TokenizerFast",
    "PreTrainedTokenizer",
    "PreTrainedTokenizerFast",
    "RobertaTokenizer",
    "RobertaTokenizerFast",
]


class BertTokenizer(PreTrainedTokenizer):
    """WordPiece: `[CLS] a [SEP]` and `[CLS] a [SEP] b [SEP]`, types 0 and 1."""

    defaults = {
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    }
    vocab_files = ("vocab.txt",)
    algorithm = models.WordPiece

    @classmethod
    def _build(cls, folder: Path, config: dict[str, Any]) -> Tokenizer:
        return files.build_wordpiece(folder, config, cls.defaults)

    @classmethod
    def _apply_config(cls, backend: Tokenizer, config: dict[str, Any]) -> None:
        normalizer = backend.normalizer
        if not isinstance(normalizer, normalizers.BertNormalizer):
            return
        wanted = {
            "lowercase": "do_lower_case",
            "strip_accents": "strip_accents",
            "handle_chinese_chars": "tokenize_chinese_chars",
        }
        for ours, theirs in wanted.items():
            if theirs in config and getattr(normalizer, ours) != config[theirs]:
                setattr(normalizer, ours, config[theirs])
        backend.normalizer = normalizer


class RobertaTokenizer(PreTrainedTokenizer):
    """Byte-level BPE: `<s> a </s>` and `<s> a </s></s> b </s>`; all types 0, so none returned."""

    defaults = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "cls_token": "<s>",
        "mask_token": "<mask>",
    }
    model_input_names = ["input_ids", "attention_mask"]
    vocab_files = ("vocab.json", "merges.txt")
    algorithm = models.BPE

    @classmethod
    def _build(cls, folder: Path, config: dict[str, Any]) -> Tokenizer:
        return files.build_byte_bpe(folder, config, cls.defaults)

    @classmethod
    def _apply_config(cls, backend: Tokenizer, config: dict[str, Any]) -> None:
        _apply_prefix_space(backend, config)


class GPT2Tokenizer(PreTrainedTokenizer):
    """Byte-level BPE: the text alone, no tokens around it; there is no padding token."""

    defaults = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    model_input_names = ["input_ids", "attention_mask"]
    vocab_files = ("vocab.json", "merges.txt")
    algorithm = models.BPE

    @classmethod
    def _build(cls, folder: Path, config: dict[str, Any]) -> Tokenizer:
        return files.build_gpt2(folder, config, cls.defaults)

    @classmethod
    def _apply_config(cls, backend: Tokenizer, config: dict[str, Any]) -> None:
        _apply_prefix_space(backend, config)


class DebertaV2Tokenizer(PreTrainedTokenizer):
    """SentencePiece unigram: `[CLS] a [SEP]` and `[CLS] a [SEP] b [SEP]`, types 0 and 1.

    Built from `spm.model`, text is normalised as SentencePiece does: the characters of NFKC, and
    one blank between words. (Transformers 5 leaves the first of these out: there `½` and `…` are
    unknown; Transformers 4 and the models' own training have them.)
    """

    defaults = {
        "bos_token": "[CLS]",
        "eos_token": "[SEP]",
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    }
    model_input_names = ["input_ids", "attention_mask", "token_type_ids"]
    vocab_files = ("spm.model",)
    algorithm = models.Unigram

    @classmethod
    def _build(cls, folder: Path, config: dict[str, Any]) -> Tokenizer:
        return files.build_unigram(folder, config, cls.defaults)

    @classmethod
    def _apply_config(cls, backend: Tokenizer, config: dict[str, Any]) -> None:
        lowers = "Lowercase" in str(backend.normalizer)
        wanted = bool(config.get("do_lower_case", lowers))
        if wanted and not lowers:
            rest = [backend.normalizer] if backend.normalizer else []
            backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *rest])
        elif lowers and not wanted:
            raise ValueError(
                "do_lower_case=False, but tokenizer.json lower-cases: remove it to use spm.model, "
                "or leave do_lower_case out"
            )


PreTrainedTokenizerFast = PreTrainedTokenizer
BertTokenizerFast = BertTokenizer
RobertaTokenizerFast = RobertaTokenizer
GPT2TokenizerFast = GPT2Tokenizer
DebertaV2TokenizerFast = DebertaV2Tokenizer
CLASSES: dict[str, type[PreTrainedTokenizer]] = {
    "bert": BertTokenizer,
    "roberta": RobertaTokenizer,
    "deberta-v2": DebertaV2Tokenizer,
    "gpt2": GPT2Tokenizer,
}


def _apply_prefix_space(backend: Tokenizer, config: dict[str, Any]) -> None:
    """Lets the configuration decide whether a blank is put before the first word."""
    splitter = backend.pre_tokenizer
    wanted = config.get("add_prefix_space")
    if (
        wanted is not None
        and isinstance(splitter, pre_tokenizers.ByteLevel)
        and splitter.add_prefix_space != wanted
    ):
        splitter.add_prefix_space = bool(wanted)
        backend.pre_tokenizer = splitter


class AutoTokenizer(PreTrainedTokenizer):
    """`AutoTokenizer.from_pretrained(folder or hub id)` gives the class the files belong to."""

    @classmethod
    def _from_folder(
        cls, folder: Path, config: dict[str, Any], name_or_path: str
    ) -> PreTrainedTokenizer:
        return _class_for(folder, config)._from_folder(folder, config, name_or_path)


def _class_for(folder: Path, config: dict[str, Any]) -> type[PreTrainedTokenizer]:
    """By the class that was saved, the model in the folder, or the vocabulary files present."""
    saved = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    for kind in CLASSES.values():
        if kind.__name__ == saved:
            return kind
    own = folder / "tokenizer.json"
    if saved and saved not in ("PreTrainedTokenizer", "TokenizersBackend"):
        if own.exists():
            return PreTrainedTokenizer
        known = ", ".join(kind.__name__ for kind in CLASSES.values())
        raise ValueError(
            f"{folder}: tokenizer_class {saved!r} needs a tokenizer.json; without "
            f"one only {known} are supported"
        )
    if (folder / "config.json").exists():
        kind = CLASSES.get(str(model_type(files.read_json(folder / "config.json"))))
        if kind is not None:
            return kind
    if own.exists():
        # A tokenizer.json on its own: its algorithm with known special tokens means a known class.
        backend = files.read_tokenizer(own)
        present = {token.content for token in backend.get_added_tokens_decoder().values()}
        for kind in CLASSES.values():
            if isinstance(backend.model, kind.algorithm) and present >= set(kind.defaults.values()):
                return kind
        return PreTrainedTokenizer
    for kind in CLASSES.values():
        if all((folder / name).exists() for name in kind.vocab_files):
            return GPT2Tokenizer if kind is RobertaTokenizer and _is_gpt2(folder) else kind
    return PreTrainedTokenizer


def _is_gpt2(folder: Path) -> bool:
    """RoBERTa's two files have the names of GPT-2's; only GPT-2's has no `<s>` in it."""
    vocab = files.read_json(folder / "vocab.json")
    return GPT2Tokenizer.defaults["eos_token"] in vocab and "<s>" not in vocab
