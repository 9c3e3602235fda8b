"""Which parameters of a model train, and which of them make the file one shares.

The names decide, as in Microsoft's `loralib`: a factor's name contains `lora_`.
"""

from __future__ import annotations

from torch import Tensor, nn

from .dylora import DyLoRALayer

BIAS_CHOICES = ("none", "all", "lora_only")


def _chosen(model: nn.Module, bias: str) -> dict[str, nn.Parameter]:
    """The factors, and the biases that go with `bias`; shared parameters under all their names."""
    if bias not in BIAS_CHOICES:
        raise ValueError(f"bias={bias!r}: must be one of {', '.join(map(repr, BIAS_CHOICES))}")
    adapted = {
        f"{name}.bias" if name else "bias"
        for name, module in model.named_modules(remove_duplicate=False)
        if any("lora_" in own for own, _ in module.named_parameters(recurse=False))
    }
    return {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if "lora_" in name
        or (bias == "all" and "bias" in name)
        or (bias == "lora_only" and name in adapted)
    }


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freezes every parameter but the factors and, by `bias`, some biases.

    Args:
        model: any module; a task head that should train is to be unfrozen afterwards.
        bias: "none", "all" (every bias of the model) or "lora_only" (those of adapted layers).
    """
    chosen = _chosen(model, bias)  # checked before anything changes
    for parameter in model.parameters():
        parameter.requires_grad = False
    for parameter in chosen.values():
        parameter.requires_grad = True


def lora_state_dict(
    model: nn.Module, bias: str = "none", rank: int | None = None
) -> dict[str, Tensor]:
    """What `mark_only_lora_as_trainable` leaves trainable, by name; buffers never.

    Load it with `model.load_state_dict(adapter, strict=False)` over the base model's weights.

    Args:
        model: any module.
        bias: as in `mark_only_lora_as_trainable`.
        rank: of DyLoRA layers only the first `rank` components, as plain layers with r=rank and the
            same lora_alpha have them.
    """
    tensors = {name: parameter.detach() for name, parameter in _chosen(model, bias).items()}
    if rank is None:
        return tensors
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, DyLoRALayer) and layer.adapted:
            b = layer.nested.active_rank(rank).rank
            prefix = f"{name}." if name else ""
            factors = tensors[f"{prefix}lora_A"], tensors[f"{prefix}lora_B"]
            A, B = layer.nested.plain_factors(*factors, b)
            tensors |= {f"{prefix}lora_A": A.clone(), f"{prefix}lora_B": B.clone()}
    return tensors
