"""Reports which adapters of a model are active, merged and trainable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .tuners.base import iter_adapters


@dataclass(frozen=True)
class LayerStatus:
    """State of one adapted layer."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    available_adapters: list[str]
    requires_grad: dict[str, bool]


@dataclass(frozen=True)
class ModelStatus:
    """State of all adapted layers; "irregular" where the layers differ."""

    adapter_layers: int
    trainable_params: int
    total_params: int
    enabled: bool | str
    active_adapters: list[str] | str
    merged_adapters: list[str] | str
    available_adapters: list[str]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) numbers of parameters."""
    trainable = total = 0
    for parameter in model.parameters():
        total += parameter.numel()
        trainable += parameter.numel() if parameter.requires_grad else 0
    return trainable, total


def get_layer_status(model: nn.Module) -> list[LayerStatus]:
    """One entry per adapted layer, in model order."""
    return [
        LayerStatus(
            name=name,
            module_type=type(layer).__name__,
            enabled=layer.adapters_enabled,
            active_adapters=[a for a in layer.active_adapters if a in layer.adapters],
            merged_adapters=list(layer.merged_adapters),
            available_adapters=sorted(layer.adapters),
            requires_grad={
                a: any(p.requires_grad for p in layer.adapter_parameters(a)) for a in layer.adapters
            },
        )
        for name, layer in iter_adapters(model)
    ]


def get_model_status(model: nn.Module) -> ModelStatus:
    """The state of all adapted layers together; "irregular" where they differ."""
    layers = get_layer_status(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no adapted layer")

    def common(field: str) -> Any:
        values = [getattr(layer, field) for layer in layers]
        return values[0] if all(value == values[0] for value in values) else "irregular"

    trainable, total = count_parameters(model)
    return ModelStatus(
        adapter_layers=len(layers),
        trainable_params=trainable,
        total_params=total,
        enabled=common("enabled"),
        active_adapters=common("active_adapters"),
        merged_adapters=common("merged_adapters"),
        available_adapters=sorted({a for layer in layers for a in layer.available_adapters}),
    )
