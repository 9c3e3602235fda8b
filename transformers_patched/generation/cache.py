"""Keys and values that never move: a pool of slots per context, shared by all its hypotheses.

The context's tokens are stored once. A hypothesis is a row of bits over its context's slots, those
of its ancestors and its own; a child copies the row of its parent and adds one bit. Slots of dead
branches are used again. So attention reads, for all hypotheses of a context, one block of keys:

    context = softmax(Q Kᵀ / sqrt(d) + mask) V,    Q (beams, d),  K, V (slots, d)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import attention
from ..layout import SequenceLayout


class KeyValuePool:
    """Slots of `lanes` contexts; lane i is one context with at most `beams` hypotheses.

    Attributes:
        keys: Per layer (lanes, slots, heads, d), its own heads; `values` likewise.
        visible: (lanes, beams, slots) bool, the slots that each hypothesis reads.
        width: Slots from the first that are in use in any lane.
    """

    def __init__(
        self, heads: Sequence[tuple[int, int]], lanes: int, beams: int, slots: int, like: Tensor
    ) -> None:
        """Empty; `heads` is every layer's number of heads and their size."""
        self.keys = [like.new_zeros(lanes, slots, *shape) for shape in heads]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.visible = like.new_zeros((lanes, beams, slots), dtype=torch.bool)
        self.beams, self.width = beams, 0

    def reserve(self, width: int) -> None:
        """Notes that `width` slots are in use; makes more where there are not so many."""
        self.width = max(self.width, width)
        slots = self.visible.shape[-1]
        if width <= slots:
            return
        more = width + width // 4 - slots
        for store in (self.keys, self.values):
            for layer, old in enumerate(store):
                store[layer] = F.pad(old, (0, 0, 0, 0, 0, more))
        self.visible = F.pad(self.visible, (0, more))

    def write(self, layer: int, lanes: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Stores keys and values (N, heads, d) of N tokens at `slots` (N,) of `lanes` (N,)."""
        self.keys[layer][lanes, slots] = key
        self.values[layer][lanes, slots] = value

    def move(self, source: int, target: int) -> None:
        """Puts lane `source` in place of lane `target`."""
        for store in (*self.keys, *self.values):
            store[target, : self.width] = store[source, : self.width]
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
        self._places = first_lane + layout.sequence_ids(), layout.position_ids()  # (T,) each

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.pool.write(layer, *self._places, key, value)
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
        self._lanes_of, self._slots = places // pool.beams, slots
        mask = pool.keys[0].new_zeros(lanes, 1, pool.beams, pool.width)
        lowest = torch.finfo(mask.dtype).min
        self._mask = mask.masked_fill_(~visible[:, None, :, : pool.width], lowest)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        pool, n = self.pool, self.lanes
        pool.write(layer, self._lanes_of, self._slots, key, value)
        if not self.full:
            rows = query.new_zeros(n * pool.beams, *query.shape[1:])
            query = rows.index_copy_(0, self.places, query)
        q = query.view(n, pool.beams, *query.shape[1:]).transpose(1, 2)  # (n, heads, beams, d)
        k, v = (
            store[layer][:n, : pool.width].transpose(1, 2)  # (n, heads, width, d)
            for store in (pool.keys, pool.values)
        )
        context = F.scaled_dot_product_attention(q, k, v, self._mask)
        context = context.transpose(1, 2).flatten(0, 1)  # (n·beams, heads, d)
        return context if self.full else context.index_select(0, self.places)
