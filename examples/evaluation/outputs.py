"""A model's output as what is scored: logits with one label each, whatever the head.

A classifier's logits are (b, classes) and its labels (b,). A span head's are (b, 2, L), those of
starts and of ends, and its labels (b, 2), the positions. So the last dimension is always the one of
a softmax.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transformers_patched.heads import classification_loss

SPAN = ("start_positions", "end_positions")
LABELS = ("labels", *SPAN)  # the model's arguments that are no input


def logits_of(output: Any, arguments: Mapping[str, Any]) -> Tensor:
    """The logits; a span's are padded to (b, 2, L) with -inf, as they are where tokens are packed.

    Args:
        output: of the model, or of a predictor.
        arguments: of the model.
    """
    starts = getattr(output, "start_logits", None) if hasattr(output, "keys") else None
    if starts is None:
        return output.logits
    spans = torch.stack((starts, output.end_logits), -1).float()  # (b, L, 2) or (T, 2)
    if "cu_seqlens" not in arguments:
        mask = arguments.get("attention_mask")  # (b, L)
        if mask is not None:
            spans = spans.masked_fill(mask[..., None] == 0, -torch.inf)
        return spans.transpose(1, 2)
    ends = arguments["cu_seqlens"].long()
    lengths = ends.diff()  # (b,)
    inside = torch.arange(arguments["max_seqlen"], device=spans.device) < lengths[:, None]  # (b, L)
    padded = spans.new_full((*inside.shape, 2), -torch.inf)
    padded[inside] = spans  # both run sequence by sequence
    return padded.transpose(1, 2)


def inputs_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The model's arguments without the labels, but where labels are themselves what is scored."""
    if arguments.get("score_sequences"):
        return dict(arguments)
    return {name: value for name, value in arguments.items() if name not in LABELS}


def labels_of(arguments: Mapping[str, Any]) -> Tensor | None:
    """(b,) labels, or (b, 2) positions of spans; None where there are none."""
    if arguments.get("score_sequences"):
        return None
    if SPAN[0] in arguments:
        return torch.stack([arguments[name] for name in SPAN], 1)
    return arguments.get("labels")


def loss_of(logits: Tensor, arguments: Mapping[str, Any], config: Any) -> Tensor | None:
    """The mean loss of `logits_of` a batch; None where it has no labels."""
    labels = labels_of(arguments)
    if labels is None:
        return None
    if SPAN[0] in arguments:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    return classification_loss(logits, labels, config)
