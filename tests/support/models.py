"""What the tests of the model files share: heads, DeBERTa's settings, batches, comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import transformers_patched as ours

HEADS = (
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)
SIZES = dict(
    vocab_size=31,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=20,
    max_position_embeddings=16,
    initializer_range=0.3,
)
V3 = dict(  # the settings of deberta-v3-small, base and large
    hidden_size=36,
    num_attention_heads=3,
    intermediate_size=37,
    relative_attention=True,
    position_buckets=6,
    max_relative_positions=-1,
    norm_rel_ebd="layer_norm",
    share_att_key=True,
    pos_att_type=["p2c", "c2p"],
    position_biased_input=False,
)
CONV = dict(conv_kernel_size=3, conv_act="gelu")  # deberta-v2-xlarge and -xxlarge have it
V2 = {**V3, **CONV, "pos_att_type": "p2c|c2p", "legacy": False}


def batch(head: str, config: Any, lengths: tuple[int, int, int]) -> dict[str, Tensor]:
    """Three rows (of two choices) of so many real tokens, none of them the padding's id.

    Args:
        head: of the model.
        config: says the padding's id and the number of token types.
        lengths: the longest first.
    """
    longest = lengths[0]
    shape = (3, 2, longest) if head == "ForMultipleChoice" else (3, longest)
    ids = torch.randint(4, 61, shape)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, ..., length:] = 0
    return {
        "input_ids": ids.where(mask.bool(), config.pad_token_id),
        "attention_mask": mask,
        "token_type_ids": torch.randint(0, max(1, config.type_vocab_size), shape),
    }


def labels_of_heads(longest: int) -> dict[str, dict[str, Tensor]]:
    """head -> labels for such a batch."""
    words = torch.randint(0, 61, (3, longest))
    return {
        "ForSequenceClassification": {"labels": torch.tensor([2, 0, 1])},
        "ForMultipleChoice": {"labels": torch.tensor([1, 0, 1])},
        "ForMaskedLM": {"labels": words.masked_fill(torch.rand(3, longest) < 0.7, -100)},
        "ForQuestionAnswering": {
            "start_positions": torch.tensor([0, 5, 40]),  # the last lies outside and is ignored
            "end_positions": torch.tensor([3, 16, 2]),
        },
    }


def assert_same(ours_out: Any, peer_out: Any, mask: Tensor) -> None:
    """Within 1e-5·max(1, max|x|), and nothing asked of padding tokens."""
    real = mask.bool()
    assert list(ours_out) == list(peer_out)
    for name in ours_out:
        a, b = ours_out[name], peer_out[name]
        pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
        for x, y in pairs:
            assert x.shape == y.shape, name
            if x.shape[: real.dim()] == real.shape:  # one value or vector per token
                x, y = x[real], y[real]
            assert (x - y).abs().max() <= 1e-5 * max(1.0, y.abs().max()), name


def assert_both_ways(theirs: nn.Module, lengths: tuple[int, int, int], folder: Path) -> None:
    """Our class reads Transformers' checkpoint and computes the same; theirs reads ours."""
    theirs.save_pretrained(folder / "theirs")
    name = type(theirs).__name__
    model, report = getattr(ours, name).from_pretrained(folder / "theirs", output_loading_info=True)
    assert not report.missing and not report.unexpected
    head = next(head for head in HEADS if name.endswith(head))
    inputs = batch(head, model.config, lengths)
    with torch.no_grad():
        expected, got = theirs(**inputs), model(**inputs)
    assert_same(got, expected, inputs["attention_mask"])

    model.save_pretrained(folder / "ours")
    back, info = type(theirs).from_pretrained(folder / "ours", output_loading_info=True)
    assert not any(info.values()), info
    for key, weight in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[key], weight), key
