"""Collects the features of a model's blocks in passes over data, see `features`.

Σ|G| is kept per element, ΣG² per block only, as the mean over a block of mean_t G² - a² needs no
more; the layer's backward pass hands G over, folds it and lets it go.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...distributed import world_size
from ..tuner_layer import iter_adapters
from . import reference
from .features import (
    FLOOR,
    KINDS,
    NAMES,
    Block,
    Features,
    Moments,
    block_lengths,
    block_means,
    block_sums,
    block_table,
    kinds_of,
    layer_position,
    moments_of,
    normalised,
    number_of_layers,
    row_names,
)
from .functional import block_counts
from .layer import BIMLoRALinear


class _Watched(torch.autograd.Function):
    """y as it is; the backward pass also gives gᵀ x to `slot`, a leaf of W's shape.

    `slot` has no memory of its own (an expanded scalar). Autograd adds up what several calls of one
    layer contribute and calls the slot's hook once per backward pass; W itself is left out.
    """

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None, Tensor]:
        (x,) = ctx.saved_tensors
        rows = g.reshape(-1, g.shape[-1])
        G = rows.T @ x.reshape(-1, x.shape[-1]).to(rows.dtype)  # (out, in)
        return g, None, G.float()


class LayerStatistics:
    """What is folded together for one layer."""

    def __init__(self, layer: BIMLoRALinear, block: int, elementwise: bool) -> None:
        shape, device = (layer.out_features, layer.in_features), layer.weight.device
        self.block = block
        self.absolute = torch.zeros(shape, device=device)  # Σ |G|
        self.squares = torch.zeros(
            shape if elementwise else block_counts(*shape, block), device=device
        )  # Σ G², per element or Σ over the block
        self.inputs = Moments()
        self.kept = self.inputs  # as they were before the step under way
        self.steps = 0
        self.tokens: torch.Size | None = None  # how the layer got the tokens of this forward pass
        self.shared = False  # it is then also given rows that are no tokens
        self.slot = torch.zeros((), device=device).expand(shape).detach().requires_grad_()

    def fold(self, G: Tensor) -> None:
        """Takes one step's gradient."""
        self.absolute += G.abs()
        square = G.square()
        whole = self.squares.shape == square.shape
        self.squares += square if whole else block_sums(square, self.block)
        self.steps += 1

    def gradient_features(self, floor: float | None) -> tuple[Tensor, Tensor]:
        """F1 and F2, (p, q); `floor` per element where squares are."""
        a = self.absolute / self.steps
        if self.squares.shape == a.shape:
            v = self.squares / self.steps - a.square()
            return block_means(a, self.block), block_means(v.clamp_(min=floor), self.block)
        rows, columns = (block_lengths(size, self.block, a) for size in a.shape)
        second = self.squares / self.steps / (rows[:, None] * columns)
        v = second - block_means(a.square(), self.block)
        return block_means(a, self.block), v.clamp_(min=0.0)

    def input_feature(self, floor: float | None) -> Tensor:
        """F3 of each block of columns, (q,)."""
        variance = torch.as_tensor(self.inputs.squares / max(self.inputs.count, 1.0))
        if floor is not None:
            variance = variance.clamp(min=floor)
        return block_means(variance.view(1, -1), self.block)[0].float()


class CollectorOptions(Protocol):
    """A `BimLoraConfig`, or an object with the original's fields."""

    block_size: int


class FeatureCollector:
    """Collects the features of a model's adapted layers; the model and its gradients stay as found.

    Usage:
        collector = FeatureCollector(model, config)
        collector.register_hooks()
        for batch in batches:
            model(**batch).loss.backward()
            collector.update()              # after the backward passes of one optimiser step
        values, metadata = collector.finalize()

    Args:
        model: has `BIMLoRALinear` layers.
        config: `block_size`, `reference_compat`, `collect_pads`, or the original's fields.
        layers: the layers by name (default: those of `model`).
    """

    def __init__(
        self,
        model: nn.Module,
        config: CollectorOptions,
        layers: Mapping[str, BIMLoRALinear] | None = None,
    ) -> None:
        if layers is None:
            layers = {n: m for n, m in iter_adapters(model) if isinstance(m, BIMLoRALinear)}
        if not layers:
            raise ValueError("FeatureCollector: this model has no BIMLoRALinear layer")
        self.model, self.layers = model, dict(layers)
        self.block = int(config.block_size)
        self.reference = bool(getattr(config, "reference_compat", False))
        self.with_pads = bool(getattr(config, "collect_pads", False)) or self.reference
        self.statistics: dict[str, LayerStatistics] = {}
        self.steps = 0
        self.pending = 1  # backward passes that make one gradient, their mean
        self.weighted = False  # or, where the losses carry weights, their sum
        self.counts_inputs = True  # False for a batch that only keeps processes in step
        self.passes = 0
        self._last: tuple[Tensor, tuple[float, Tensor, Tensor]] | None = None
        self._real: Tensor | None = None  # (batch, length) bool: which tokens are no padding
        self._shape: torch.Size | None = None  # of the tokens: (batch, length), packed (T,)
        self._handles: list[RemovableHandle] = []

    # --- hooks ----------------------------------------------------------------------------------
    def register_hooks(self, bypass: bool = False) -> None:
        """Starts watching; with `bypass` the adapters are left out meanwhile."""
        self.remove_hooks()
        self._handles = [self.model.register_forward_pre_hook(self._note_tokens, with_kwargs=True)]
        shared = set()
        for module in self.model.modules():
            shared |= {getattr(module, n) for n in getattr(module, "shared_row_layers", ())}
            if _takes(module, "first_only"):
                hook = module.register_forward_pre_hook(_ask_for_all_tokens, with_kwargs=True)
                self._handles.append(hook)
        for name, layer in self.layers.items():
            found = self.statistics.get(name)
            if found is None:
                found = LayerStatistics(layer, self.block, self.reference)
                self.statistics[name] = found
            found.shared = layer in shared
            layer.watch, layer.bypass = self._watcher(found), bypass
            self._handles.append(found.slot.register_post_accumulate_grad_hook(self._fold(found)))
            layer.rebind()

    def remove_hooks(self) -> None:
        """Stops watching; what was collected stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._last = None
        for layer in self.layers.values():
            if layer.watch is not None:
                layer.watch, layer.bypass = None, False
                layer.rebind()

    def _note_tokens(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        try:
            given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        except TypeError:
            given = kwargs
        given = {**given, **given.get("kwargs", {}), **kwargs}
        mask, ids = given.get("attention_mask"), given.get("input_ids")
        self._real = self._shape = None
        if given.get("cu_seqlens") is not None:
            self._shape = None if ids is None else ids.shape
        elif isinstance(mask, Tensor) and mask.dim() in (2, 3):  # (questions, choices, length)
            mask = mask.flatten(0, -2)
            self._shape = mask.shape
            self._real = None if self.with_pads else mask.bool()
        for found in self.statistics.values():
            found.tokens = None

    def _watcher(self, found: LayerStatistics) -> Callable[[Tensor, Tensor], Tensor]:
        def watch(x: Tensor, y: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return y
            # Recomputation in the backward pass (checkpointing) shows the same inputs again.
            again = torch._C._current_graph_task_id() != -1
            if self.counts_inputs and not again and self._is_of_the_batch(x, found):
                found.inputs.merge(*self._input_moments(x))
            return _Watched.apply(y, x.detach(), found.slot)

        return watch

    def _is_of_the_batch(self, x: Tensor, found: LayerStatistics) -> bool:
        """Whether the rows of x are the data's.

        A layer that has got a pass's tokens may be given a table of relative positions as well,
        whose rows are the same in every pass: how often they counted would depend on the batches.
        """
        shape = x.shape[:-1]
        if found.tokens is not None:
            return shape == found.tokens and not found.shared
        if shape == self._shape or self._is_packed(x):
            found.tokens = shape
        return True

    def _is_packed(self, x: Tensor) -> bool:
        """Whether x (T or more, features) has packed tokens; rows beyond T are filler."""
        packed = self._shape is not None and len(self._shape) == 1
        return packed and x.dim() == 2 and len(x) >= self._shape[0]

    @torch.no_grad()
    def _input_moments(self, x: Tensor) -> tuple[float, Tensor, Tensor]:
        """Count, mean and Σ(x - mean)² of an input; for q, k and v, which share it, once."""
        if self._last is None or self._last[0] is not x:
            self._last = (x, moments_of(self._real_rows(x)))
        return self._last[1]

    def _real_rows(self, x: Tensor) -> Tensor:
        if self._real is not None and x.shape[:-1] == self._real.shape:
            return x[self._real]
        if self._is_packed(x):
            return x[: self._shape[0]]
        return x.reshape(-1, x.shape[-1])

    def _fold(self, found: LayerStatistics) -> Callable[[Tensor], None]:
        """Folds a gradient as soon as it is whole, so that no two layers' are held at once."""

        def fold(slot: Tensor) -> None:
            if self.passes + 1 >= self.pending:
                self._take(found)

        return fold

    def _take(self, found: LayerStatistics) -> None:
        """The gradient in the slot, over all processes."""
        G, found.slot.grad = found.slot.grad.detach(), None
        if world_size() > 1:
            dist.all_reduce(G)
        found.fold(G.div_(world_size() * (1 if self.weighted else self.pending)))

    def begin(self, passes: int, weighted: bool) -> None:
        """The next `passes` backward passes make one gradient.

        Args:
            passes: how many.
            weighted: the losses carry weights, which add up to the number of processes over all of
                them; else the gradient is the passes' mean.
        """
        self.pending, self.weighted = passes, weighted
        for found in self.statistics.values():
            found.kept = copy.copy(found.inputs)

    def update(self) -> None:
        """A backward pass is done; call it after every one."""
        self.passes += 1
        self._last = None
        if self.passes < self.pending:
            return
        for found in self.statistics.values():
            if found.slot.grad is not None:  # the last pass has not reached this layer
                self._take(found)
        self.passes = 0
        self.steps += 1

    def drop(self) -> None:
        """Forgets the step under way, from `begin` on."""
        self.passes, self._last = 0, None
        for found in self.statistics.values():
            found.inputs, found.slot.grad = found.kept, None

    # --- results --------------------------------------------------------------------------------
    def layer_gradients(self) -> dict[str, float]:
        """mean_t mean |G_t| of every layer."""
        return {
            name: float(s.absolute.mean() / max(s.steps, 1)) for name, s in self.statistics.items()
        }

    def collected(self) -> Features:
        """Raw features of all blocks, equal on all processes; the hooks are removed.

        Raises:
            ValueError: a layer had no gradient, or one that is not finite.
        """
        self.remove_hooks()
        self._merge_inputs()
        table = block_table(self.layers, self.block)
        layers = number_of_layers(self.model, [part.name for part in table])
        floor = FLOOR if self.reference else None
        columns = []
        for part in table:
            found, layer = self.statistics.get(part.name), self.layers[part.name]
            if found is None or found.steps == 0:
                raise ValueError(
                    f"{part.name}: no gradient reached this layer while features were collected; "
                    "is it part of what the loss depends on?"
                )
            F1, F2 = found.gradient_features(floor)  # (p, q) each
            F3 = found.input_feature(floor).to(F1).expand(part.p, part.q)
            W = layer.weight.detach().float()
            W = W.T.contiguous() if layer.fan_in_fan_out else W
            F4 = block_sums(W.square(), self.block).sqrt()
            F5 = torch.full_like(F1, layer_position(part.name, layers))
            F6 = self._codes(part, layer).to(F1)[:, None].expand(part.p, part.q)
            # (p q, 6)
            stacked = torch.stack([F1, F2, F3, F4, F5, F6], dim=-1).view(-1, len(NAMES))
            if not bool(stacked.isfinite().all()):
                raise ValueError(
                    f"{part.name}: gradients or inputs were not finite while features were "
                    "collected; train in bfloat16 or float32, or look at the data"
                )
            columns.append(stacked)
        return Features(torch.cat(columns), table, self.block)

    def _codes(self, part: Block, layer: BIMLoRALinear) -> Tensor:
        """F6 of every row of blocks, (p,)."""
        kinds = kinds_of(part.name)
        middle = (torch.arange(part.p) * self.block + self.block // 2).clamp(
            max=layer.out_features - 1
        )
        codes = torch.tensor([KINDS[kind].code for kind in kinds])
        if self.reference and kinds == ("other",):
            codes = torch.tensor([reference.OTHER_CODE])
        return codes[middle * len(kinds) // layer.out_features]

    def _merge_inputs(self) -> None:
        """Merges the processes' input moments, by one collective."""
        world = world_size()
        if world == 1:
            return
        names = sorted(self.statistics)
        moments = [self.statistics[name].inputs for name in names]
        device = self.statistics[names[0]].absolute.device
        own = torch.cat(
            [
                torch.cat([
                    torch.tensor([m.count], dtype=torch.float64, device=device),
                    torch.as_tensor(m.mean, dtype=torch.float64, device=device).expand(width),
                    torch.as_tensor(m.squares, dtype=torch.float64, device=device).expand(width),
                ])
                for m, width in zip(
                    moments, [self.layers[name].in_features for name in names], strict=True
                )
            ]
        )  # fmt: skip
        gathered = [torch.empty_like(own) for _ in range(world)]
        dist.all_gather(gathered, own)
        widths = [1 + 2 * self.layers[name].in_features for name in names]
        parts = [one.split(widths) for one in gathered]
        for i, name in enumerate(names):
            merged, width = Moments(), self.layers[name].in_features
            for one in parts:
                count, mean, squares = one[i].split([1, width, width])
                merged.merge(float(count), mean, squares)
            self.statistics[name].inputs = merged

    def finalize(self) -> tuple[Tensor, list[dict[str, Any]]]:
        """Normalised features (n, 6) and what each row is of.

        The original's interface, as `save_features` and `load_features` are; training does without.
        """
        features = self.collected()
        return normalised(features.values), list(row_names(features.table))

    def save_features(self, path: str | os.PathLike[str]) -> None:
        """Writes the raw features as safetensors (the original's interface)."""
        self.collected().save(path)

    def load_features(self, path: str | os.PathLike[str]) -> tuple[Tensor, list[dict[str, Any]]]:
        """Reads features and returns them as `finalize` does (the original's interface)."""
        features = Features.load(path)
        return normalised(features.values), list(row_names(features.table))


def _ask_for_all_tokens(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The last layer is computed for all tokens, though the head reads the first ones only."""
    return (args, {**kwargs, "first_only": False}) if kwargs.get("first_only") else None


def _takes(module: nn.Module, argument: str) -> bool:
    try:
        return argument in inspect.signature(module.forward).parameters
    except ValueError:  # a forward that is not written in Python
        return False
