"""DyLoRA (Valipour et al. 2022, Algorithm 1): nested factors, so that one run serves every rank.

    y = x Wᵀ + bias + (α/b)·(drop(x) A[:b]ᵀ) B[:, :b]ᵀ,    1 ≤ b ≤ R,   A (R, in), B (out, R)

A training step samples one rank b for the whole model and uses the first b components only. Mode
"normal" trains all of them; "frozen" trains the b-th, and the ones below act as constants.
Afterwards every b is an ordinary LoRA adapter of rank b with the same α.

    >>> self.query = lora.DyLoRALinear(768, 768, r=8, lora_alpha=16)
    >>> with lora.at_rank(model.eval(), 3):
    ...     model(x)
    >>> torch.save(lora.lora_state_dict(model, rank=3), "rank3.pt")  # lora.Linear(…, r=3) loads it

MatryoshkaLoRA (arXiv 2605.07850) trains all ranks in every step instead of drawing one. The sum of
all nested adapters is one product with a fixed diagonal between the factors,

    Σ_b (α/b)·B[:, :b] A[:b] = B diag(α w) A,    w_i = Σ_{b ≥ i} 1/b

over all ranks b or some (its authors take powers of two), and the adapter of rank b is the first b
components of that sum (`NestedRank.weigh`), so that rank R is what was trained. Its authors' code
leaves the diagonal out at every rank once training is over: `weigh(None)` then.

Ranks are 1-based everywhere. In evaluation mode the rank is R until `set_rank` says otherwise. In
training mode it is the one sampled for the step, where something does so (`peft_custom.attach`), so
evaluating at other ranks never disturbs a training step. The rank is no part of a state dict.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import functional as lora
from .base import LoRALayer, Shapes
from .functional import ActiveRank, Scaling
from .layers import Embedding, Linear, MergedLinear, _LinearLayer


def summed_scales(ranks: Sequence[int], largest: int) -> list[float]:
    """w_i = Σ 1/b over the ranks b ≥ i, for i = 1 … R."""
    return [sum(1.0 / b for b in ranks if b >= i) for i in range(1, largest + 1)]


class NestedRank:
    """Which of the R nested components of a layer act, and which of these learn.

    Attributes:
        largest: R.
        chosen: what `set_rank` sets.
        sampled: the same for training mode, while something samples a rank for every step.
        batched: the ranks of a batch of several, within `batched_ranks`.
        weights: w (R,) fp32, the diagonal over α; None: every component has 1/b at rank b.
        sampling_options: of what samples the ranks (`peft_custom.configure_dylora`), kept for it.
    """

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self.chosen = ActiveRank(0, largest)
        self.sampled: ActiveRank | None = None
        self.batched: BatchedRanks | None = None
        self.weights: Tensor | None = None
        self._scales: dict[tuple[float, torch.device], Tensor] = {}
        self.sampling_options: dict[str, int | str | bool | list[int] | None] = {}

    @property
    def kind(self) -> tuple[int, tuple[float, ...] | None]:
        """What layers have in common whose components have the same scales at every rank."""
        return self.largest, None if self.weights is None else tuple(self.weights.tolist())

    def __getstate__(self) -> dict[str, Any]:
        # What samples the ranks of a model does not drive its copies, nor does a context.
        return {**self.__dict__, "sampled": None, "batched": None}

    def active_rank(self, rank: int, frozen: bool = False) -> ActiveRank:
        """Rank b with all its components trained, or `frozen` the last; an error outside 1 … R."""
        try:
            b = 0 if isinstance(rank, bool) else operator.index(rank)
        except TypeError:
            b = 0
        if not 1 <= b <= self.largest:
            raise ValueError(f"rank={rank!r}: must be a whole number from 1 to R={self.largest}")
        return ActiveRank(b - 1 if frozen else 0, b)

    def current(self, training: bool) -> ActiveRank:
        """The active rank of a layer in this mode."""
        return self.sampled if training and self.sampled is not None else self.chosen

    def weigh(self, weights: Sequence[float] | None) -> None:
        """Sets w, a fixed weight for every component, or None."""
        if weights is not None and len(weights) != self.largest:
            raise ValueError(f"{len(weights)} weights for R={self.largest} components")
        self.weights = None if weights is None else torch.tensor(weights, dtype=torch.float32)
        self._scales.clear()

    def scaling(self, alpha: float, rank: int, device: torch.device) -> Scaling:
        """s at this rank: α/b, or α w (R,)."""
        if self.weights is None:
            return alpha / rank
        key = alpha, device
        if key not in self._scales:
            with torch.inference_mode(False):  # a later training step uses it too
                self._scales[key] = (alpha * self.weights).to(device)
        return self._scales[key]

    def plain_factors(self, A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Factors of the plain adapter of rank b with the same α, whose s is α/b.

        Args:
            A, B: (n R, in) and (m n, R), of n segments.
            rank: b.

        Returns:
            (n b, in) and (m n, b).
        """
        A, B = lora.truncate(A, B, rank)
        return (A, B) if self.weights is None else (A, B * (rank * self.weights[:rank]).to(B))


class BatchedRanks:
    """K ranks for a batch of K equal parts: part k is computed with rank b_k.

    Args:
        ranks: b_1 … b_K.
        nested: says R and the components' weights.
        tokens: of one part; needed only where an encoder appends filler rows.
    """

    def __init__(self, ranks: Sequence[int], nested: NestedRank, tokens: int | None) -> None:
        b = torch.tensor(ranks)[:, None]  # (K, 1)
        acts = torch.arange(nested.largest) < b
        self.table = acts / b if nested.weights is None else acts * nested.weights  # (K, R) fp32
        self.tokens = tokens
        self._expanded: dict[tuple, Tensor] = {}

    def scales(self, x: Tensor, rows: int) -> Tensor:
        """`rank_scales` of `functional.lora_batched_ranks`, (rows, R), where α is the scale.

        `rows` is how many tokens x has, over all its leading dimensions. Made once for all layers.
        """
        key = rows, x.device, torch.is_inference_mode_enabled()
        if key not in self._expanded:
            parts = len(self.table)
            each = self.tokens
            if each is None or parts * each > rows:
                if x.shape[0] % parts:
                    raise ValueError(
                        f"batched_ranks: {parts} ranks cannot share an input of shape "
                        f"{tuple(x.shape)}: its first dimension must be {parts} equal parts, the "
                        "batch once for every rank"
                    )
                each = rows // parts
            made = torch.zeros(rows, self.table.shape[1])  # filler rows at the end keep 0
            made[: parts * each] = self.table.repeat_interleave(each, dim=0)
            self._expanded[key] = made.to(x.device)
        return self._expanded[key]


class NestedLayer:
    """A module with nested factors: what `set_rank` and `batched_ranks` look for in a model."""

    training: bool
    merged: bool  # whether the stored weight contains the update

    def nested_ranks(self) -> list[NestedRank]:
        """The ranks that follow the model's."""
        raise NotImplementedError

    def rank_changed(self) -> None:
        """Called after `chosen` of one of them changed: a merged layer merges again."""
        raise NotImplementedError


class DyLoRALayer(NestedLayer, LoRALayer):
    """What the three layers share; mixed in before loralib's own layer."""

    def _init_lora(
        self,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        merge_weights: bool,
        shapes: Shapes | None,
    ) -> None:
        self.nested = NestedRank(r)
        super()._init_lora(r, lora_alpha, lora_dropout, merge_weights, shapes)

    def nested_ranks(self) -> list[NestedRank]:
        return [self.nested] if self.adapted else []

    def rank_changed(self) -> None:
        self.scaling = self.lora_alpha / self.nested.chosen.rank
        if self.merged:  # from the kept weight, so that nothing of the former rank stays
            self.unmerge()
            self.merge()

    def _acting(self) -> tuple[Tensor, Tensor]:
        return self.nested.plain_factors(self.lora_A, self.lora_B, self.nested.chosen.rank)

    def weigh(self, weights: Sequence[float] | None) -> None:
        """As `NestedRank.weigh`; a merged layer is merged again."""
        self.nested.weigh(weights)
        self._cached = None
        self.rank_changed()

    def _evaluation_weight(self, x: Tensor) -> Tensor | None:
        if self.nested.batched is not None and not torch.is_grad_enabled():
            return None
        return super()._evaluation_weight(x)

    def extra_repr(self) -> str:
        rank = f", rank={self.nested.chosen.rank}" if self.adapted else ""
        return super().extra_repr() + rank


class _DyLoRALinear(DyLoRALayer, _LinearLayer):
    def _adapted(self, x: Tensor) -> Tensor:
        factors = self.weight, self.bias, self.lora_A, self.lora_B
        batched, segments, transposed = self.nested.batched, self.segments, self.fan_in_fan_out
        if batched is not None:
            rank_scales = batched.scales(x, x.shape[:-1].numel())
            return lora.lora_batched_ranks(
                x, *factors, self.lora_alpha, rank_scales, segments, transposed
            )
        active = self.nested.current(self.training)
        scaling = self.nested.scaling(self.lora_alpha, active.rank, x.device)
        return lora.lora_merged_linear(
            x, *factors, scaling, segments, self.dropout_now, transposed, active
        )


class DyLoRALinear(_DyLoRALinear, Linear):
    """`Linear` with nested factors; the arguments are `Linear`'s, r is R."""


class DyLoRAMergedLinear(_DyLoRALinear, MergedLinear):
    """`MergedLinear` with nested factors, one rank for all segments; its arguments, r is R."""


class DyLoRAEmbedding(DyLoRALayer, Embedding):
    """`Embedding` with nested factors; its arguments (but no `max_norm`), r is R."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, r, lora_alpha, merge_weights, **kwargs)
        if self.adapted and self.max_norm is not None:
            raise ValueError(
                f"DyLoRAEmbedding(max_norm={self.max_norm!r}): the looked-up rows of A would be "
                "shortened by their norm at one rank, for all ranks; leave it out"
            )

    def _update(self, ids: Tensor, **options: int | float | None) -> Tensor:
        factors, batched = (self.lora_A, self.lora_B), self.nested.batched
        if batched is not None:
            rank_scales = batched.scales(ids, ids.numel())
            return lora.lora_embedding(
                ids, *factors, self.lora_alpha, rank_scales=rank_scales, **options
            )
        active = self.nested.current(self.training)
        scaling = self.nested.scaling(self.lora_alpha, active.rank, ids.device)
        return lora.lora_embedding(ids, *factors, scaling, active=active, **options)


# --- a whole model --------------------------------------------------------------------------------
def nested_layers(model: nn.Module) -> list[NestedLayer]:
    """The model's layers with nested factors; an error where there are none."""
    found = [m for m in model.modules() if isinstance(m, NestedLayer) and m.nested_ranks()]
    if not found:
        raise ValueError(f"{type(model).__name__} has no layers with nested factors (DyLoRA)")
    return found


def set_rank(model: nn.Module, rank: int, frozen: bool = False) -> None:
    """Computes with rank `rank` from now on; a merged layer is merged again at that rank.

    Args:
        model: any module with DyLoRA layers, this package's or `peft_custom`'s.
        rank: b, from 1 to R.
        frozen: in training, only the b-th component gets a gradient.

    Raises:
        ValueError: there is no such rank, or no such layer; nothing has changed then.
    """
    layers = nested_layers(model)
    wanted = [(n, n.active_rank(rank, frozen)) for layer in layers for n in layer.nested_ranks()]
    _choose(layers, wanted)


def _choose(layers: list[NestedLayer], wanted: list[tuple[NestedRank, ActiveRank]]) -> None:
    for nested, active in wanted:
        nested.chosen = active
    for layer in layers:
        layer.rank_changed()


def get_rank(model: nn.Module) -> int:
    """The rank that the model computes with in its present mode; an error where layers differ."""
    found = {
        nested.current(layer.training).rank
        for layer in nested_layers(model)
        for nested in layer.nested_ranks()
    }
    if len(found) > 1:
        raise ValueError(f"the layers have different ranks: {sorted(found)}; call set_rank")
    return found.pop()


@contextlib.contextmanager
def at_rank(model: nn.Module, rank: int) -> Iterator[None]:
    """Within the context the model evaluates with this rank; afterwards as before."""
    layers = nested_layers(model)
    before = [(n, n.chosen) for layer in layers for n in layer.nested_ranks()]
    set_rank(model, rank)
    try:
        yield
    finally:
        _choose(layers, before)


def can_batch_ranks(model: nn.Module) -> bool:
    """Whether nested layers read nothing but rows of the batch, as `batched_ranks` has to assume.

    A module that also feeds one of its layers with rows that all sequences share (DeBERTa's
    attention with its relative positions) has its name in `shared_row_layers`.
    """
    layers = nested_layers(model)
    shared = [
        getattr(module, name)
        for module in model.modules()
        for name in getattr(module, "shared_row_layers", ())
    ]
    return not any(layer is other for layer in layers for other in shared)


@contextlib.contextmanager
def batched_ranks(
    model: nn.Module, ranks: Sequence[int], tokens: int | None = None
) -> Iterator[None]:
    """Within the context a batch that holds the same rows K times is computed at K ranks at once.

        with lora.batched_ranks(model, [1, 2, 8]):
            logits = model(x.repeat(3, 1, 1)).chunk(3)  # of rank 1, of rank 2, of rank 8

    The batch is padded (K·n, L, …) or packed (K·t, …), the part of rank b_1 first.

    Args:
        model: in evaluation mode and not merged.
        ranks: b_1 … b_K.
        tokens: t or n·L, the tokens of one part; only for encoders that append filler rows.

    Raises:
        ValueError: a rank outside of 1 … R, a layer in training mode or merged, a model
            that `can_batch_ranks` refuses.
    """
    layers = nested_layers(model)
    if not ranks:
        raise ValueError("batched_ranks: no ranks given")
    if not can_batch_ranks(model):
        raise ValueError(
            f"batched_ranks: a nested layer of {type(model).__name__} also reads rows that belong "
            "to no part of the batch (relative positions): compute one rank at a time, at_rank"
        )
    for layer in layers:
        if layer.training or layer.merged:
            state = "in training mode" if layer.training else "merged"
            raise ValueError(
                f"batched_ranks needs eval mode and no merged layer; a layer is {state}"
            )
    states = [nested for layer in layers for nested in layer.nested_ranks()]
    tables: dict[tuple, BatchedRanks] = {}  # one for all layers that are alike
    for nested in states:
        checked = [nested.active_rank(rank).rank for rank in ranks]
        if nested.kind not in tables:
            tables[nested.kind] = BatchedRanks(checked, nested, tokens)
    before = [nested.batched for nested in states]
    for nested in states:
        nested.batched = tables[nested.kind]
    try:
        yield
    finally:
        for nested, batched in zip(states, before, strict=True):
            nested.batched = batched
