"""DyLoRA (Valipour et al. 2022): nested ranks, so that one run gives an adapter at every rank."""

from .config import DyLoraConfig
from .layer import DyLoraLayer
from .loralib_layers import configure_dylora
from .model import DyLoraModel

__all__ = ["DyLoraConfig", "DyLoraLayer", "DyLoraModel", "configure_dylora"]
