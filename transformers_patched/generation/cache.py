"""Keys and values that never move: a pool of slots per context, shared by all its hypotheses.

The context's tokens are stored once. A hypothesis is a row of bits over its context's slots, those
of its ancestors and its own; a child copies the row of its parent and adds one bit. Slots of dead
branches are used again. So attention reads, for all hypotheses of a context, one block of keys:

    context = softmax(Q Kᵀ / sqrt(d) + mask) V,    Q (beams, d),  K, V (slots, d)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..attention import attention
from ..layout import SequenceLayout


class KeyValuePool:
    """Slots of `lanes` contexts; lane i is one context with at most `beams` hypotheses.

    Attributes:
        keys: Per layer (lanes, heads, slots, d); `values` likewise.
        visible: (lanes, beams, slots) bool, the slots that each hypothesis reads.
        width: Slots from the first that are in use in any lane.
    """

    def __init__(
        self, layers: int, heads: int, size: int, lanes: int, beams: int, slots: int, like: Tensor
    ) -> None:
        shape = (lanes, heads, slots, size)
        self.keys = [like.new_zeros(shape) for _ in range(layers)]
        self.values = [like.new_zeros(shape) for _ in range(layers)]
        self.visible = like.new_zeros((lanes, beams, slots), dtype=torch.bool)
        self.heads, self.beams, self.width = heads, beams, 0

    def reserve(self, width: int) -> None:
        """Notes that `width` slots are in use; makes more where there are not so many."""
        self.width = max(self.width, width)
        slots = self.visible.shape[-1]
        if width <= slots:
            return
        more = width + width // 4 - slots
        for store in (self.keys, self.values):
            for layer, old in enumerate(store):
                store[layer] = torch.nn.functional.pad(old, (0, 0, 0, more))
        self.visible = torch.nn.functional.pad(self.visible, (0, more))

    def rows(self, lanes: Tensor, slots: Tensor) -> Tensor:
        """(N·heads,) rows of the stores, (lanes·heads·slots, d), where N tokens belong."""
        head = torch.arange(self.heads, device=lanes.device)
        in_lane = lanes[:, None] * self.heads + head  # (N, heads)
        return (in_lane * self.visible.shape[-1] + slots[:, None]).flatten()

    def write(self, layer: int, rows: Tensor, key: Tensor, value: Tensor) -> None:
        """Stores keys and values (N, heads, d) at `rows`."""
        size = key.shape[-1]
        self.keys[layer].view(-1, size).index_copy_(0, rows, key.reshape(-1, size))
        self.values[layer].view(-1, size).index_copy_(0, rows, value.reshape(-1, size))

    def move(self, source: int, target: int) -> None:
        """Puts lane `source` in place of lane `target`."""
        for store in (*self.keys, *self.values):
            store[target, :, : self.width] = store[source, :, : self.width]
        self.visible[target] = self.visible[source]


class Prefill:
    """A model's cache for whole contexts, packed, that enter lanes from `first_lane` on."""

    def __init__(self, pool: KeyValuePool, first_lane: int, layout: SequenceLayout) -> None:
        self.pool, self.layout = pool, layout
        lengths = layout.cu_seqlens.diff()  # (n,)
        pool.reserve(layout.max_seqlen)
        end = first_lane + len(lengths)
        slots = torch.arange(pool.visible.shape[-1], device=layout.device)
        pool.visible[first_lane:end] = False
        pool.visible[first_lane:end, 0] = slots < lengths[:, None]
        lanes = first_lane + layout.sequence_ids()  # (T,)
        self._rows = pool.rows(lanes, layout.position_ids())

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.pool.write(layer, self._rows, key, value)
        return attention(query, key, value, self.layout, causal=True)


class Step:
    """A model's cache for one new token of every live hypothesis.

    Args:
        pool: Of all lanes.
        lanes: n, those in use: the first n.
        parents: (n, beams) the hypothesis whose row of bits each takes over; any where none lives.
        places: (R,) lane·beams + place of every live hypothesis, ascending.
        slots: (R,) the slot for each one's new token.
    """

    def __init__(
        self, pool: KeyValuePool, lanes: int, parents: Tensor, places: Tensor, slots: Tensor
    ) -> None:
        self.pool, self.lanes, self.places = pool, lanes, places
        self.full = len(places) == lanes * pool.beams
        lane = torch.arange(lanes, device=parents.device)[:, None]
        visible = pool.visible[lane, parents]  # (n, beams, slots)
        visible.flatten(0, 1)[places, slots] = True
        pool.visible[:lanes] = visible
        self._rows = pool.rows(places // pool.beams, slots)
        like = pool.keys[0]
        mask = like.new_zeros(lanes, 1, pool.beams, pool.width)
        mask.masked_fill_(~visible[:, None, :, : pool.width], torch.finfo(like.dtype).min)
        self._mask = mask.expand(-1, pool.heads, -1, -1).flatten(0, 1)  # (n·heads, beams, width)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        pool, n = self.pool, self.lanes
        heads, size = query.shape[1:]
        pool.write(layer, self._rows, key, value)
        if not self.full:
            rows = query.new_zeros(n * pool.beams, heads, size)
            query = rows.index_copy_(0, self.places, query)
        q = query.view(n, pool.beams, heads, size).transpose(1, 2).flatten(0, 1)
        k = pool.keys[layer][:n].flatten(0, 1)[:, : pool.width]  # (n·heads, width, d)
        v = pool.values[layer][:n].flatten(0, 1)[:, : pool.width]
        scores = torch.baddbmm(self._mask, q, k.transpose(1, 2), alpha=1.0 / math.sqrt(size))
        context = torch.softmax(scores, -1) @ v  # (n·heads, beams, d)
        context = context.view(n, heads, pool.beams, size).transpose(1, 2).flatten(0, 1)
        return context if self.full else context.index_select(0, self.places)
