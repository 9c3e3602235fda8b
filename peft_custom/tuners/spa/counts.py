"""How many weights the masks keep, and how many numbers an adapter is. Nothing is touched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..modules_to_save import ModulesToSaveWrapper
from ..tuner_layer import BaseTunerLayer
from .increments import Dense, LowRank, Mixture
from .layer import Factors, SpaLayer
from .masks import Mask, Masks

Values = dict[Mask, Tensor]


@torch.no_grad()
def summary(
    model: nn.Module,
    layers: Mapping[str, SpaLayer],
    masks: Masks,
    adapter: str,
    threshold: float | None,
) -> dict[str, int | float]:
    """Counts at a threshold.

    Args:
        model: with its adapters.
        layers: those that have the adapter, by name.
        masks: of the adapter.
        adapter: its name.
        threshold: τ; None: the final one.

    Returns:
        `encoder_weights`: weights, biases and norms of the layers that are adapted, before pruning;
        `encoder_kept`: those of them that the masks leave, biases of pruned units left out;
        `density`: the latter over the former;
        `adapter_kept`: numbers of the increments in what is left, shared prototypes once;
        `task_parameters`: these, and biases, norms, head: what one task adds to a common base;
        `trainable_parameters`: numbers that get gradients now, scores included, nothing pruned;
        `mask_bits`: entries of the masks.
    """
    if threshold is None:
        threshold = masks.config.final_threshold
    values: Values = dict(zip(masks, masks.compute(threshold), strict=True))
    encoder = _encoder(model, list(layers))
    total = sum(p.numel() for p in encoder)
    pruned = sum(_pruned(layer, layer.spa[adapter], values) for layer in layers.values())
    kept_adapter = sum(_adapter(layer, layer.spa[adapter], values) for layer in layers.values())
    kept_adapter += _prototypes(layer.spa[adapter] for layer in layers.values())
    biases = sum(
        _rows(layer, f, values)
        for layer in layers.values()
        if (f := layer.spa[adapter]).bias is not None
    )
    saved = [
        p
        for module in model.modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save
        for p in module.modules_to_save[adapter].parameters()
    ]
    return {
        "encoder_weights": total,
        "encoder_kept": total - pruned,
        "density": (total - pruned) / total,
        "adapter_kept": kept_adapter,
        "task_parameters": kept_adapter + biases + sum(p.numel() for p in saved),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "mask_bits": sum(m.numel() for m in values.values()),
    }


def _encoder(model: nn.Module, names: list[str]) -> list[nn.Parameter]:
    """The base's parameters below what the adapted modules' names have in common."""
    common = names[0].split(".")
    for name in names[1:]:
        parts = name.split(".")
        same = [a == b for a, b in zip(common, parts, strict=False)]
        common = common[: same.index(False) if False in same else len(same)]
    root = model.get_submodule(".".join(common))
    found: dict[int, nn.Parameter] = {}
    inside: set[int] = set()
    for module in root.modules():
        own = {id(p) for p in module.parameters()}
        if isinstance(module, BaseTunerLayer):
            found |= {id(p): p for p in module.base_layer.parameters()}
            inside |= own
        elif isinstance(module, ModulesToSaveWrapper):
            found |= {id(p): p for p in module.original_module.parameters()}
            inside |= own
    found |= {id(p): p for p in root.parameters() if id(p) not in inside}
    return list(found.values())


def _open(mask: Tensor) -> int:
    return int((mask > 0).sum())


def _rows(layer: SpaLayer, f: Factors, values: Values) -> int:
    """Rows of the matrix that are left."""
    mask, segments = (f.outputs, 1) if f._rows is None else f._rows
    return layer.out_features if mask is None else _open(values[mask]) * mask.size[0] * segments


def _columns(layer: SpaLayer, f: Factors, values: Values) -> int:
    if f.inputs is None:
        return layer.in_features
    return _open(values[f.inputs]) * f.inputs.size[0]


def _weights(layer: SpaLayer, f: Factors, values: Values) -> int:
    """Weights of the layer that are left."""
    if f.blocks is not None:
        p, q = f.blocks.size
        return _open(values[f.blocks]) * p * q
    kernel = layer.matrix_size // (layer.out_features * layer.in_features)
    return _rows(layer, f, values) * _columns(layer, f, values) * kernel


def _pruned(layer: SpaLayer, f: Factors, values: Values) -> int:
    """Weights and biases that are not left."""
    bias = layer.base_layer.bias is not None
    rows = layer.out_features - _rows(layer, f, values) if bias else 0
    return layer.matrix_size - _weights(layer, f, values) + rows


def _adapter(layer: SpaLayer, f: Factors, values: Values) -> int:
    """Numbers of the increment that act on what is left, without prototypes."""
    increment = f.increment
    if isinstance(increment, Dense):
        return _weights(layer, f, values)
    if isinstance(increment, LowRank):
        return increment.rows.shape[0] * (_rows(layer, f, values) + _columns(layer, f, values))
    if isinstance(increment, Mixture):
        if "positions" not in increment._modules:
            return 0  # an earlier layer's
        B = increment.positions.position_weights
        return B.shape[0] * _open(_grid(layer, f, values, B.shape[1:]))
    return _rows(layer, f, values) * _columns(layer, f, values)


def _grid(layer: SpaLayer, f: Factors, values: Values, grid: torch.Size) -> Tensor:
    """(o/p, i/q): which blocks of the increment have a weight that is left."""
    if f.blocks is not None:
        return values[f.blocks]
    rows, columns = torch.ones(layer.out_features), torch.ones(layer.in_features)
    mask, segments = (f.outputs, 1) if f._rows is None else f._rows
    if mask is not None:
        rows = (values[mask].cpu() > 0).float().repeat_interleave(mask.size[0]).repeat(segments)
    if f.inputs is not None:
        columns = (values[f.inputs].cpu() > 0).float().repeat_interleave(f.inputs.size[0])
    return rows.view(grid[0], -1).amax(1)[:, None] * columns.view(grid[1], -1).amax(1)


def _prototypes(factors: Iterable[Factors]) -> int:
    """Numbers in the prototypes, each tensor once."""
    found = {
        id(p): p.numel()
        for f in factors
        if isinstance(f.increment, Mixture)
        for p in f.increment._parts[1].parameters()
    }
    return sum(found.values())
