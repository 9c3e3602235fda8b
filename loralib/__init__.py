"""Low-rank layers for people who write models, with the names of Microsoft's `loralib`.

Example:
    >>> import loralib as lora
    >>> self.query = lora.Linear(768, 768, r=8, lora_alpha=16)  # instead of nn.Linear(768, 768)
    >>> lora.mark_only_lora_as_trainable(model)
    >>> torch.save(lora.lora_state_dict(model), "adapter.pt")
"""

from .base import LoRALayer
from .dylora import (
    DyLoRAEmbedding,
    DyLoRALayer,
    DyLoRALinear,
    DyLoRAMergedLinear,
    at_rank,
    batched_ranks,
    can_batch_ranks,
    get_rank,
    set_rank,
)
from .layers import Conv1d, Conv2d, Conv3d, ConvLoRA, Embedding, Linear, MergedLinear
from .utils import lora_state_dict, mark_only_lora_as_trainable

LINEAR_TYPES = {"lora": Linear, "dylora": DyLoRALinear}  # by a configuration's `lora_type`
MERGED_LINEAR_TYPES = {"lora": MergedLinear, "dylora": DyLoRAMergedLinear}

__all__ = [
    "LINEAR_TYPES",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvLoRA",
    "DyLoRAEmbedding",
    "DyLoRALayer",
    "DyLoRALinear",
    "DyLoRAMergedLinear",
    "Embedding",
    "Linear",
    "LoRALayer",
    "MERGED_LINEAR_TYPES",
    "MergedLinear",
    "at_rank",
    "get_rank",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "batched_ranks",
    "set_rank",
    "can_batch_ranks",
]
