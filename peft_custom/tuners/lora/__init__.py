"""LoRA (Hu et al. 2021) injected into existing layers."""

from .config import LoraConfig
from .layer import LoraLayer
from .model import LoraModel

__all__ = ["LoraConfig", "LoraLayer", "LoraModel"]
