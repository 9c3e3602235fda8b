"""Numbers that every head of a layer can do without: what the masks left of rows inside heads.

Of d numbers of a head, number k may go

* from queries and keys, where W_K's row is 0: all keys have b_K there, so that the scores of a
  query move by q_k b_K together, and the softmax does not see it. W_Q's row and b_Q of 0 do as
  well. W_Q's row alone does not: b_Q k_k differs from key to key;
* from values, where W_V's row is 0: W_O takes b_V instead, which goes to the bias; or where W_O's
  column is 0.

All heads of a layer keep the same size: that of the one that needs most. A score is divided by the
root of the new size, so the queries are scaled.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .matrices import fold_constants, matrix, take
from .structures import Link

STEP = 8  # kernels of attention take sizes that are multiples of it


def narrow(model: nn.Module, link: Link, constants: bool = True) -> int:
    """Takes what it can out of one attention, in place.

    Args:
        model: a plain one; its heads are those that stay.
        link: the attention's.
        constants: False leaves the constants of values out, for tests of what they are worth.

    Returns:
        The size of its heads.
    """
    d = link.size
    if "query_proj" in link.producers[0]:  # DeBERTa's scores have positions in them
        return d
    layers = [model.get_submodule(name) for name in link.producers]
    W = torch.cat([matrix(layer) for layer in layers])
    W = W.unflatten(0, (3, -1, d))  # (3, heads, d, in): queries, keys, values
    heads = W.shape[1]
    biases = [layer.bias for layer in layers]
    zeros = W.new_zeros(3 * heads * d)
    b = (zeros if biases[0] is None else torch.cat(biases)).view(3, heads, d)
    consumer = model.get_submodule(link.consumer)
    read = matrix(consumer).ne(0).any(0).view(heads, d)
    rows = W.ne(0).any(3)  # (3, heads, d)
    scored = rows[1] & (rows[0] | b[0].ne(0))
    valued = rows[2] & read
    most = max(int(live.sum(1).max()) for live in (scored, valued))
    n = min(d, max(1, math.ceil(most / STEP)) * STEP)
    if n == d:
        return d
    kept = [_first(scored, n), _first(scored, n), _first(valued, n)]  # (heads, n) each
    keep = torch.zeros(heads, d, dtype=torch.bool).scatter_(1, kept[2].cpu(), True).flatten()
    if constants:
        fold_constants(consumer, b[2].flatten().double(), keep.to(read.device))
    take(consumer, _places(kept[2], d), inputs=True)
    _scale_queries(layers[0], heads * d, math.sqrt(n / d))
    for i, layer in enumerate(layers):
        own = kept if len(layers) == 1 else [kept[i]]
        places = [_places(one, d) + s * heads * d for s, one in enumerate(own)]
        take(layer, torch.cat(places), inputs=False)
    return n


def _first(live: Tensor, n: int) -> Tensor:
    """The places of n numbers of every head, those that live among them, ascending: (heads, n)."""
    return live.byte().argsort(dim=1, descending=True, stable=True)[:, :n].sort(1).values


def _places(kept: Tensor, d: int) -> Tensor:
    """Rows of all heads together, (heads·n,)."""
    return (kept + d * torch.arange(len(kept), device=kept.device)[:, None]).flatten()


def _scale_queries(layer: nn.Module, rows: int, factor: float) -> None:
    matrix(layer)[:rows].mul_(factor)  # a view
    if layer.bias is not None:
        layer.bias[:rows].mul_(factor)
