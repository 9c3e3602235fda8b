"""Low-rank layers for people who write models, with the names of Microsoft's `loralib`.

Example:
    >>> import loralib as lora
    >>> self.query = lora.Linear(768, 768, r=8, lora_alpha=16)  # instead of nn.Linear(768, 768)
    >>> lora.mark_only_lora_as_trainable(model)
    >>> torch.save(lora.lora_state_dict(model), "adapter.pt")
"""

from .base import LoRALayer
from .layers import Conv1d, Conv2d, Conv3d, ConvLoRA, Embedding, Linear, MergedLinear
from .utils import lora_state_dict, mark_only_lora_as_trainable

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvLoRA",
    "Embedding",
    "Linear",
    "LoRALayer",
    "MergedLinear",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
]
