"""Block fine-pruning: the weights train under a mask of blocks, heads or units."""

from __future__ import annotations

from typing import TYPE_CHECKING

from examples.methods.pruning import PruningOptions, with_masks
from examples.methods.registry import AdaptedModel, register_method
from examples.training.file_names import MASK_SHARES

if TYPE_CHECKING:
    from examples.methods.source import ModelSource


def build(source: ModelSource, options: PruningOptions) -> AdaptedModel:
    """Every masked matrix trains, in float32."""
    from peft_custom import BlockPruneConfig

    return with_masks(source, options, BlockPruneConfig, frozen=False)


register_method(
    "block_prune",
    PruningOptions,
    build,
    "weights trained under a mask of blocks",
    files=(MASK_SHARES,),
)
