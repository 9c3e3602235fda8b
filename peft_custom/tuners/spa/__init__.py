"""Structured pruning adapters: SPLoRA, SPPaRA, SPLoPA, and block fine-pruning beside them."""

from .config import BlockPruneConfig, SpaConfig, SplopaConfig, SploraConfig, SpparaConfig
from .layer import SpaLayer
from .model import BlockPruneModel, SpaModel, SplopaModel, SploraModel, SpparaModel

__all__ = [
    "BlockPruneConfig",
    "BlockPruneModel",
    "SpaConfig",
    "SpaLayer",
    "SpaModel",
    "SplopaConfig",
    "SplopaModel",
    "SploraConfig",
    "SploraModel",
    "SpparaConfig",
    "SpparaModel",
]
