"""`compact`: what the masks have made useless is taken out; the outputs stay (in evaluation).

A unit may go where

* its columns in the consumer are 0: nobody reads it;
* its rows are 0: it gives the constant c = act(b) whatever comes in, and W_out c goes to the bias.
  An attention head's value rows are 0: its attention weights sum to 1, so that c = b_V.

Queries or keys of 0 do not make a head useless: it then averages. Inside the heads that stay,
`head_sizes` takes out what none of a layer needs; layers of scattered blocks compute with those
that are left, see `loralib.block_sparse`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from loralib.block_sparse import BlockSparseLinear

from ..base import BaseTuner
from .head_sizes import narrow
from .matrices import fold_constants, matrix, take
from .structures import Link, head_size, links

ACTIVATIONS = ("activation", "intermediate_act_fn", "act")  # names in the modules of feed-forwards


@torch.no_grad()
def compacted(tuner: BaseTuner, adapter: str) -> nn.Module:
    """A smaller model with the adapter's outputs, a copy: merged, cut, every weight trainable."""
    own = copy.deepcopy(tuner)
    own.unmerge_adapter()
    own.set_adapter(adapter)
    own.merge_adapter([adapter], keep=False)
    masked = {name: layer.spa[adapter].blocks for name, layer in own.spa_layers(adapter)}
    blocks = {name: mask.size for name, mask in masked.items() if mask is not None}
    model = own.unload()
    cut(model)
    leave_out_blocks(model, blocks)
    return model.requires_grad_(True)


@torch.no_grad()
def cut(model: nn.Module, fold: bool = True) -> None:
    """Takes the useless heads and units out of a plain model, in place.

    Args:
        model: with the module names of BERT, RoBERTa, DeBERTa-v2 or GPT-2.
        fold: False leaves the constants of removed units out, for tests of what they are worth.
    """
    names = [name for name, _ in model.named_modules()]
    shapes: dict[str, list[int]] = {}  # prefix of a layer → [heads, units, size of a head]
    for link in links(model, names, "linked"):
        keep, constant = _useful(model, link)
        consumer = model.get_submodule(link.consumer)
        if fold:
            fold_constants(consumer, constant, keep.repeat_interleave(link.size))
        _take_rows(model, link, keep)
        take(consumer, keep.repeat_interleave(link.size), inputs=True)
        shape = shapes.setdefault(link.prefix, [0, 0])
        shape[0 if link.kind.heads else 1] = int(keep.sum())
        if link.kind.heads and hasattr(getattr(model, "config", None), "layer_shapes"):
            size = narrow(model, link, fold)
            shape += [size] if size < head_size(model) else []
    if not shapes:
        raise ValueError(
            f"compact: {type(model).__name__} has no heads or feed-forward units that are known; "
            "merge_and_unload() gives the dense model"
        )
    _note_shapes(model, list(shapes.values()))


def _useful(model: nn.Module, link: Link) -> tuple[Tensor, Tensor]:
    """Which units stay (n,), and what the rows of those that go give (n·size,) in fp64.

    At least one stays, as no layer can be built of none.
    """
    columns = matrix(model.get_submodule(link.consumer))  # (out, n·size)
    last = model.get_submodule(link.producers[-1])  # of a head the values
    rows, bias = matrix(last), last.bias
    width = columns.shape[1]
    rows = rows[-width:]  # of q, k, v in one matrix the last
    constant = torch.zeros(width, dtype=torch.float64, device=rows.device)
    if bias is not None:
        constant = bias[-width:].double()
    act = (lambda c: c) if link.kind.heads else _activation(model, link)
    read = columns.ne(0).any(0).view(-1, link.size).any(1)
    varies = rows.ne(0).any(1).view(-1, link.size).any(1)
    if act is None:  # what the constants become is unknown
        varies = torch.ones_like(varies)
    keep = read & varies
    keep[0] |= ~keep.any()
    return keep, constant if act is None else act(constant)


def _activation(model: nn.Module, link: Link) -> Callable[[Tensor], Tensor] | None:
    parent = model.get_submodule(link.producers[0].rpartition(".")[0])
    return next((getattr(parent, name) for name in ACTIVATIONS if hasattr(parent, name)), None)


def _take_rows(model: nn.Module, link: Link, keep: Tensor) -> None:
    """Only the rows of units that stay, in every producer."""
    rows = keep.repeat_interleave(link.size).repeat(link.kind.segments)
    for name in link.producers:
        take(model.get_submodule(name), rows, inputs=False)
    parent = model.get_submodule(link.producers[0].rpartition(".")[0])
    if not link.kind.heads:
        return
    for name in ("pos_key_proj", "pos_query_proj"):  # DeBERTa's, of relative positions
        if isinstance(getattr(parent, name, None), nn.Module):
            take(getattr(parent, name), rows, inputs=False)
    for name in ("num_heads", "num_attention_heads"):
        if hasattr(parent, name):
            setattr(parent, name, int(keep.sum()))
    if hasattr(parent, "all_head_size"):
        parent.all_head_size = int(keep.sum()) * link.size


def _note_shapes(model: nn.Module, shapes: list[list[int]]) -> None:
    """Writes the sizes into the configuration, from which the model is built when it is loaded."""
    config = getattr(model, "config", None)
    if hasattr(config, "layer_shapes"):
        config.layer_shapes = shapes
        return
    warnings.warn(
        f"compact: {type(config).__name__} has no field for layers of different sizes, so that "
        "the smaller model cannot be loaded by from_pretrained; load the base with "
        "transformers_patched for that",
        stacklevel=5,
    )


def leave_out_blocks(model: nn.Module, blocks: Mapping[str, tuple[int, ...]]) -> None:
    """Linear layers skip their zero blocks, where that is faster for any of them.

    Args:
        model: a plain one. Only those of `transformers_patched` can say so in their files, and
            become other layers.
        blocks: module → rows and columns of a block.
    """
    config, sizes = getattr(model, "config", None), set(blocks.values())
    if len(sizes) != 1 or not hasattr(config, "sparse_blocks"):
        return
    [size] = sizes
    layers = {n: m for n in blocks if type(m := model.get_submodule(n)) is nn.Linear}
    found = {name: BlockSparseLinear.of(layer, size) for name, layer in layers.items()}
    if not any(layer.is_sparse() for layer in found.values()):
        return
    for name, layer in found.items():
        model.set_submodule(name, layer)
    config.sparse_blocks = list(size)
