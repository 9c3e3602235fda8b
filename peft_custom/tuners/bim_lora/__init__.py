"""BIM-LoRA: a low-rank increment, gated block by block by a learned mask of falling temperature."""

from .collector import FeatureCollector
from .config import BimLoraConfig
from .importance import ImplicitMLP
from .layer import BIMLoRALinear
from .model import BimLoraModel
from .monitor import MaskAllocator
from .reference import (
    get_bim_lora_model,
    load_bim_lora_model,
    mark_only_bim_lora_as_trainable,
    save_bim_lora_model,
)

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
