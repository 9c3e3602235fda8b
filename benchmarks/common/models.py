"""Random models and batches of published sizes."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SIZES = {
    "minilm": {
        "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
        "intermediate_size": 1536, "vocab_size": 30522,
    },
    "roberta-base": {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "vocab_size": 50265, "max_position_embeddings": 514,
        "type_vocab_size": 1, "pad_token_id": 1,
    },
    "bert-base": {"vocab_size": 30522},  # BertConfig's own defaults otherwise
}  # fmt: skip
SHORTEST, LONGEST = 25, 90  # tokens of MRPC's rows; the longest is not drawn
SIX_MAPS = [
    "query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense",
]  # fmt: skip

Tokens = list[list[int]]


def token_lists(size: str, rows: int, count: int, seed: Sequence[int]) -> list[Tokens]:
    """`count` batches of `rows` token lists, whose lengths are uniform on 25 … 89."""
    draw = np.random.default_rng(seed)
    vocabulary = SIZES[size]["vocab_size"]
    return [
        [
            draw.integers(5, vocabulary, size=draw.integers(SHORTEST, LONGEST)).tolist()
            for _ in range(rows)
        ]
        for _ in range(count)
    ]


def classifier(library: ModuleType, size: str, **options: Any) -> nn.Module:
    """A random classifier: MiniLM is a BERT, RoBERTa-base a RoBERTa.

    Args:
        library: `transformers` or `transformers_patched`.
        size: one of SIZES.
        options: for its configuration, in place of the size's own.
    """
    kind = "Bert" if size == "minilm" else "Roberta"
    config = getattr(library, f"{kind}Config")(**{**SIZES[size], **options})
    return getattr(library, f"{kind}ForSequenceClassification")(config)


def with_frozen_dtype(model: nn.Module, dtype: str) -> nn.Module:
    """The model with all but its head, which trains, in "bfloat16", or as it is."""
    if dtype == "bfloat16":
        model.to(torch.bfloat16)
        model.classifier.float()
    return model


def packed(batch: Tokens, copies: int = 1, device: str = "cpu") -> dict[str, Any]:
    """The batch's tokens one after the other (T,), all of it `copies` times."""
    lengths = torch.tensor([0] + [len(row) for row in batch] * copies)
    ids = torch.tensor([token for row in batch for token in row])
    return {
        "input_ids": ids.repeat(copies).to(device),
        "cu_seqlens": lengths.cumsum(0).int().to(device),
        "max_seqlen": int(lengths.max()),
    }


def padded(batch: Tokens, pad: int, longest: int = 0) -> dict[str, Tensor]:
    """The batch's tokens as rows (B, L), filled with `pad`; L is the longest row or `longest`."""
    longest = max([longest, *map(len, batch)])
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in batch]
    return {
        "input_ids": torch.tensor([row + [pad] * (longest - len(row)) for row in batch]),
        "attention_mask": torch.tensor(mask),
    }


def full_rows(rows: int, length: int) -> dict[str, Tensor]:
    """A batch without padding, with labels, for RoBERTa-base's vocabulary."""
    torch.manual_seed(1)
    return {
        "input_ids": torch.randint(5, SIZES["roberta-base"]["vocab_size"], (rows, length)),
        "attention_mask": torch.ones(rows, length, dtype=torch.long),
        "labels": torch.randint(0, 2, (rows,)),
    }
