"""SPLoPA: pruned blocks whose updates are mixtures of a few low-rank prototypes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from examples.cli.fields import option
from examples.methods.pruning import PruningOptions, with_masks
from examples.methods.registry import AdaptedModel, register_method
from examples.training.file_names import MASK_SHARES

if TYPE_CHECKING:
    from examples.methods.source import ModelSource

# Fields of the configuration -> options; two of them say the opposite.
AGREE = {"num_prototypes": "num_splopa_prototypes", "prototype_rank": "splopa_prototype_rank"}


@dataclass(frozen=True)
class SplopaOptions(PruningOptions):
    num_splopa_prototypes: int = option(64, "prototypes, as many weights for every block", low=1)
    splopa_prototype_rank: int = option(1, "their rank", low=1)
    splopa_prototypes_not_shared: bool = option(False, "every layer has prototypes of its own")
    splopa_pos_weights_shared: bool = option(
        False, "layers with equally many blocks share their weights of the prototypes"
    )
    splopa_init_range: float = option(1e-4, "prototypes start this small; 0: larger", low=0)
    adapter_learning_rate: float | None = option(
        1e-3, "rate of the blocks' weights of the prototypes; none: --learning_rate", low=0
    )
    prototype_learning_rate: float | None = option(
        None, "rate of the prototypes; none: --learning_rate", low=0
    )


def build(source: ModelSource, options: SplopaOptions) -> AdaptedModel:
    """Frozen weights under a mask, with prototypes' mixtures added."""
    from peft_custom import SplopaConfig

    return with_masks(
        source,
        options,
        SplopaConfig,
        agree=AGREE,
        **{field: getattr(options, name) for field, name in AGREE.items()},
        share_prototypes=not options.splopa_prototypes_not_shared,
        share_position_weights=options.splopa_pos_weights_shared,
        init_range=options.splopa_init_range,
        prototype_learning_rate=options.prototype_learning_rate,
    )


register_method(
    "splopa",
    SplopaOptions,
    build,
    "pruned blocks with mixtures of prototypes",
    files=(MASK_SHARES,),
)
