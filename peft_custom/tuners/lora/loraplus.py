"""LoRA+ (Hayou et al. 2024): B learns λ times as fast as A.

As in its authors' code (and PEFT's) every trained vector learns as fast as B: biases, a head's
among them, norms and DoRA's magnitudes. Factors of embeddings have a rate of their own.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from loralib.decay import is_norm

from ..tuner_layer import iter_adapters
from .layer import Embedding, LoraLayer


def loraplus_groups(
    model: nn.Module, lr: float, weight_decay: float, ratio: float, lr_embedding: float
) -> list[dict[str, Any]]:
    """The groups of all that does not learn at `lr`.

    Args:
        model: with adapters.
        lr: rate of A and of other matrices.
        weight_decay: of all but biases and norms.
        ratio: λ.
        lr_embedding: rate of embeddings' factors.
    """
    layers = [layer for _, layer in iter_adapters(model) if isinstance(layer, LoraLayer)]
    tables = {id(p) for x in layers if isinstance(x, Embedding) for p in x.adapter_parameters()}
    upper = {id(x.factors(name)[1]) for x in layers for name in x.adapters} - tables
    found: dict[str, list[nn.Parameter]] = {"lora_B": [], "lora_B_no_decay": [], "embedding": []}
    seen: set[int] = set()
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if not p.requires_grad or id(p) in seen:
                continue
            seen.add(id(p))
            if id(p) in tables:
                found["embedding"].append(p)
            elif id(p) in upper or p.dim() == 1:
                plain = is_norm(module) or name == "bias"
                found["lora_B_no_decay" if plain else "lora_B"].append(p)
    rates = {"lora_B": lr * ratio, "lora_B_no_decay": lr * ratio, "embedding": lr_embedding}
    groups = [{"name": name, "params": p, "lr": rates[name]} for name, p in found.items() if p]
    for group in groups:
        group["weight_decay"] = 0.0 if group["name"].endswith("no_decay") else weight_decay
    return groups
