"""Linear layers cut in place, whichever way their weight is stored."""

from __future__ import annotations

from torch import Tensor, nn

from ..targets import is_conv1d


def matrix(layer: nn.Module) -> Tensor:
    """The weight as (out, in), a view."""
    return layer.weight.T if is_conv1d(layer) else layer.weight


def fold_constants(consumer: nn.Module, constant: Tensor, keep: Tensor) -> None:
    """b += W c over the inputs that go.

    Args:
        consumer: the layer that reads them.
        constant: c (in,), what the inputs are, fp64.
        keep: bool (in,), those that stay.
    """
    added = matrix(consumer).double()[:, ~keep] @ constant[~keep]
    if consumer.bias is None:
        if added.any():
            raise ValueError("compact: a layer without a bias cannot take a constant")
        return
    consumer.bias.copy_((consumer.bias.double() + added).to(consumer.bias.dtype))


def take(layer: nn.Module, keep: Tensor, inputs: bool) -> None:
    """Cuts a layer to the inputs (or outputs) to keep: bool, or their places."""
    weight = matrix(layer)
    weight = weight[:, keep] if inputs else weight[keep]
    stored = weight.T if is_conv1d(layer) else weight
    layer.weight = nn.Parameter(stored.contiguous())
    if not inputs and layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[keep])
    sizes = {"nf": 0, "nx": 1} if is_conv1d(layer) else {"out_features": 0, "in_features": 1}
    for name, dimension in sizes.items():
        if hasattr(layer, name):
            setattr(layer, name, weight.shape[dimension])
