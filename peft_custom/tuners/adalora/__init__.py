"""AdaLoRA (Zhang et al. 2023) and ViLoRA (Chen and Garner 2024): a rank budget, shared out."""

from .config import AdaLoraConfig, VILoraConfig
from .criteria import CRITERIA, criterion
from .layer import SVDLinear
from .model import AdaLoraModel, VILoraModel

__all__ = [
    "CRITERIA",
    "AdaLoraConfig",
    "AdaLoraModel",
    "SVDLinear",
    "VILoraConfig",
    "VILoraModel",
    "criterion",
]
