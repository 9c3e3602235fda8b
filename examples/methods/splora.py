"""SPLoRA: low-rank increments of weights whose heads and units are pruned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from examples.cli.fields import option
from examples.methods.pruning import PruningOptions, with_masks
from examples.methods.registry import AdaptedModel, register_method
from examples.training.file_names import MASK_SHARES

if TYPE_CHECKING:
    from examples.methods.source import ModelSource


@dataclass(frozen=True)
class SploraOptions(PruningOptions):
    mask_structure: str = option(
        "linked",
        "linked: heads and feed-forward units; blocks of a matrix; hybrid: both",
        choices=("blocks", "linked", "hybrid"),
    )
    lora_r: int = option(8, "rank of the increments", low=1)
    splora_init_range: float = option(1e-4, "one factor starts this small; 0: larger", low=0)


def build(source: ModelSource, options: SploraOptions) -> AdaptedModel:
    """Frozen weights under a mask, with low-rank increments."""
    from peft_custom import SploraConfig

    return with_masks(
        source,
        options,
        SploraConfig,
        agree={"r": "lora_r"},
        r=options.lora_r,
        init_range=options.splora_init_range,
    )


register_method(
    "splora",
    SploraOptions,
    build,
    "low-rank increments, heads and units pruned",
    files=(MASK_SHARES,),
)
