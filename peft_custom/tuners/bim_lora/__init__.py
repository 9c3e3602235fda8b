"""BIM-LoRA: a low-rank increment whose blocks are gated by a learned, cooling mask."""

from .compat import (
    get_bim_lora_model,
    load_bim_lora_model,
    mark_only_bim_lora_as_trainable,
    save_bim_lora_model,
)
from .config import BimLoraConfig
from .features import FeatureCollector
from .importance import ImplicitMLP
from .layer import BIMLoRALinear
from .model import BimLoraModel
from .monitor import MaskAllocator

__all__ = [
    "BIMLoRALinear",
    "BimLoraConfig",
    "BimLoraModel",
    "FeatureCollector",
    "ImplicitMLP",
    "MaskAllocator",
    "get_bim_lora_model",
    "load_bim_lora_model",
    "mark_only_bim_lora_as_trainable",
    "save_bim_lora_model",
]
