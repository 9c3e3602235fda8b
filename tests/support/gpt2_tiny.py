"""A random GPT-2 with a tokenizer of bytes, as a checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel

from transformers_patched import GPT2Config, GPT2LMHeadModel

SIZES = {"n_embd": 24, "n_head": 2, "n_layer": 2, "n_positions": 256}
END = "<|endoftext|>"


def tiny_gpt2(folder: Path, **config: object) -> Path:
    """Every byte is a token, and the last one ends a text; there is no padding token."""
    folder.mkdir(parents=True, exist_ok=True)
    symbols = sorted(ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*symbols, END])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    kind = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": SIZES["n_positions"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind), encoding="utf-8")
    end = len(symbols)
    torch.manual_seed(0)
    fields = {"vocab_size": end + 1, "bos_token_id": end, "eos_token_id": end, **SIZES, **config}
    GPT2LMHeadModel(GPT2Config(**fields)).save_pretrained(folder)
    return folder
