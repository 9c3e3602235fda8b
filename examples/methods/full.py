"""Full fine-tuning: every weight is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from examples.methods.registry import AdaptedModel, register_method

if TYPE_CHECKING:
    from examples.methods.source import ModelSource


@dataclass(frozen=True)
class FullOptions:
    """Full fine-tuning has no options of its own."""


def build(source: ModelSource, options: FullOptions) -> AdaptedModel:
    """Every parameter trains, in float32."""
    if source.base_dtype == "bfloat16":
        raise ValueError(
            "--base_dtype bfloat16 is for frozen weights, and full fine-tuning has none: leave it "
            "out; --mixed_precision bf16 computes in bfloat16"
        )
    model = source.load(frozen=False)
    return AdaptedModel(model, model.save_pretrained)


register_method("full", FullOptions, build, "every weight is trained", folder="model")
