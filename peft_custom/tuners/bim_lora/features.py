"""Six features of every block, from a pass over data in which nothing of the base moves.

With G_t = ∂L_t/∂W at step t = 1 … T, a = mean_t |G_t| and x the layer's inputs:

    F1 gradient mean      mean over the block of a
    F2 gradient variance  mean over the block of mean_t G_t² - a²
    F3 input variance     mean over the block's columns of Var(x_k) over all tokens
    F4 weight norm        ‖W‖ of the block (Frobenius)
    F5 layer position     (ℓ + 1)/L
    F6 module type        a number per kind of matrix, see `KINDS`

Blocks are in order of module names, then row by row; what a block at the edge has is averaged over
what it has. Σ|G| is kept per element, ΣG² per block only, as the mean over a block of
mean_t G² - a² needs no more; the layer's backward pass hands G over, folds it and lets it go.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...distributed import world_size
from ...files import written_aside
from ..targets import layer_index
from ..tuner_layer import iter_adapters
from . import reference
from .functional import block_counts
from .layer import BIMLoRALinear

NAMES = ("grad_mean", "grad_var", "act_var", "weight_norm", "layer_pos", "module_type")
FLOOR = 1e-8


class Kind(NamedTuple):
    """A kind of matrix: F6, its weight in the labels, and the range of its first masks."""

    code: float
    weight: float
    low: float
    high: float


KINDS = {
    "attention_output": Kind(0.5, 1.8, 0.20, 0.60),
    "output": Kind(0.833, 1.5, 0.20, 0.55),
    "intermediate": Kind(0.667, 1.6, 0.10, 0.40),
    "value": Kind(0.333, 1.4, 0.12, 0.45),
    "key": Kind(0.167, 1.2, 0.05, 0.25),
    "query": Kind(0.0, 1.1, 0.02, 0.20),
    "classifier": Kind(1.0, 0.3, 0.10, 0.50),
    "other": Kind(0.25, 1.0, 0.10, 0.50),
}
_PATTERNS = [  # the first that fits the name decides
    (r"(^|[._])(classifier|pooler|score|qa_outputs|lm_head)($|\.)", "classifier"),
    (r"attention\.output\.dense$|(attn|attention)\.c_proj$|[._](o_proj|out_proj|out_lin)$",
     "attention_output"),
    (r"intermediate\.dense$|\.(c_fc|fc1|lin1|up_proj|gate_proj|wi(_\d)?)$", "intermediate"),
    (r"output\.dense$|mlp\.c_proj$|\.(fc2|lin2|down_proj|wo)$", "output"),
    (r"(^|[._])(value|v)(_proj|_lin)?$", "value"),
    (r"(^|[._])(key|k)(_proj|_lin)?$", "key"),
    (r"(^|[._])(query|q)(_proj|_lin)?$", "query"),
    (r"attention.*\.dense$", "attention_output"),
    (r"\.dense$", "output"),
]  # fmt: skip
_FUSED = re.compile(r"(^|\.)(c_attn|qkv|qkv_proj|Wqkv|in_proj_qkv)$")  # q, k, v one below the other


def kinds_of(name: str) -> tuple[str, ...]:
    """The kinds of a matrix's row segments, equally long: one, or three where q, k, v are fused."""
    if _FUSED.search(name):
        return ("query", "key", "value")
    return (next((kind for p, kind in _PATTERNS if re.search(p, name)), "other"),)


def layer_position(name: str, layers: int) -> float:
    """(ℓ + 1)/L; 1 for a classifier or pooler, 0 for embeddings, else a half."""
    index = layer_index(name, [])
    if index is not None:
        return (index + 1) / layers
    if re.search("classifier|pooler", name):
        return 1.0
    return 0.0 if "embeddings" in name else 0.5


class Block(NamedTuple):
    """Where one matrix's blocks are in the stacked vectors."""

    name: str
    start: int
    p: int
    q: int

    @property
    def rows(self) -> slice:
        """Its rows of a feature matrix."""
        return slice(self.start, self.start + self.p * self.q)

    def view(self, values: Tensor) -> Tensor:
        """Its part of a vector over all blocks, (p, q)."""
        return values[self.rows].view(self.p, self.q)


def block_table(layers: Mapping[str, BIMLoRALinear], block: int) -> list[Block]:
    """The matrices in order of their names."""
    table, start = [], 0
    for name in sorted(layers):
        p, q = block_counts(layers[name].out_features, layers[name].in_features, block)
        table.append(Block(name, start, p, q))
        start += p * q
    return table


class Features(NamedTuple):
    """Raw features F1 … F6 of all blocks, (n, 6) fp32, and which block is where.

    `keys` says what they are of: what was collected from -> a key of its content.
    """

    values: Tensor
    table: list[Block]
    block: int
    keys: Mapping[str, str] = {}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes safetensors: the table of blocks is in the names, values are fp32."""
        from safetensors.torch import save_file

        tensors = {
            part.name: self.values[part.rows].view(part.p, part.q, len(NAMES)).contiguous()
            for part in self.table
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            about = {"block_size": str(self.block), "keys": json.dumps(dict(self.keys))}
            save_file(tensors, aside, metadata=about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Features:
        """Reads what `save` wrote."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                block, keys = int(about["block_size"]), dict(json.loads(about.get("keys", "{}")))
                parts = {name: file.get_tensor(name) for name in sorted(file.keys())}  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: no features of blocks ({error})") from error
        table, start = [], 0
        for name, part in parts.items():
            table.append(Block(name, start, part.shape[0], part.shape[1]))
            start += part.shape[0] * part.shape[1]
        values = torch.cat([part.reshape(-1, len(NAMES)) for part in parts.values()])
        return cls(values, table, block, keys)


# --- block arithmetic -----------------------------------------------------------------------------


def block_sums(t: Tensor, block: int) -> Tensor:
    """Sums over the blocks of a matrix, (p, q); the blocks at the edges are smaller."""
    return _sum_rows(_sum_rows(t, block).T, block).T


def _sum_rows(t: Tensor, block: int) -> Tensor:
    rows, rest = t.shape[0], t.shape[0] % block
    whole = t[: rows - rest].view(rows // block, block, t.shape[1]).sum(1)
    return whole if rest == 0 else torch.cat([whole, t[rows - rest :].sum(0, keepdim=True)])


def block_means(t: Tensor, block: int) -> Tensor:
    """Means over the blocks of a matrix, (p, q)."""
    rows, columns = (_lengths(size, block, t) for size in t.shape)
    return block_sums(t, block) / (rows[:, None] * columns)


def _lengths(size: int, block: int, like: Tensor) -> Tensor:
    lengths = torch.full((-(-size // block),), block, dtype=like.dtype, device=like.device)
    lengths[-1] = size - block * (len(lengths) - 1)
    return lengths


class Moments:
    """Mean and variance of rows, merged chunk by chunk (Chan, Golub, LeVeque 1983), in fp64."""

    def __init__(self) -> None:
        self.count = 0.0
        self.mean: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0  # Σ (x - mean)²

    def merge(self, count: float, mean: Tensor, squares: Tensor) -> None:
        """Takes over another's figures."""
        total = self.count + count
        if total == 0:
            return
        shift = mean - self.mean
        self.squares = self.squares + squares + shift.square() * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total


def moments_of(rows: Tensor) -> tuple[float, Tensor, Tensor]:
    """Count, mean and Σ (x - mean)² of rows (n, features) of any float type."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if len(rows) == 0:
        zero = rows.new_zeros(rows.shape[1], dtype=torch.float64)
        return 0, zero, zero
    mean = rows.mean(0)
    return len(rows), mean.double(), (rows - mean).square_().sum(0).double()


# --- collecting -----------------------------------------------------------------------------------


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
        self.steps = 0
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
        rows, columns = (_lengths(size, self.block, a) for size in a.shape)
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
        self.pending = 1  # backward passes that make one gradient
        self.passes = 0
        self._last: tuple[Tensor, tuple[float, Tensor, Tensor]] | None = None
        self._real: Tensor | None = None  # (batch, length) bool: which tokens are no padding
        self._tokens: int | None = None  # of a packed batch; rows beyond are filler
        self._handles: list[RemovableHandle] = []

    # --- hooks ----------------------------------------------------------------------------------
    def register_hooks(self, bypass: bool = False) -> None:
        """Starts watching; with `bypass` the adapters are left out meanwhile."""
        self.remove_hooks()
        self._handles = [self.model.register_forward_pre_hook(self._note_padding, with_kwargs=True)]
        for name, layer in self.layers.items():
            found = self.statistics.get(name)
            if found is None:
                found = LayerStatistics(layer, self.block, self.reference)
                self.statistics[name] = found
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

    def _note_padding(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        try:
            given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        except TypeError:
            given = kwargs
        given = {**given, **given.get("kwargs", {}), **kwargs}
        mask, bounds = given.get("attention_mask"), given.get("cu_seqlens")
        real = isinstance(mask, Tensor) and mask.dim() == 2 and not self.with_pads
        self._real = mask.bool() if real else None
        ids = given.get("input_ids")
        self._tokens = len(ids) if bounds is not None and ids is not None else None

    def _watcher(self, found: LayerStatistics) -> Callable[[Tensor, Tensor], Tensor]:
        def watch(x: Tensor, y: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return y
            # Recomputation in the backward pass (checkpointing) shows the same inputs again.
            if torch._C._current_graph_task_id() == -1:
                found.inputs.merge(*self._input_moments(x))
            return _Watched.apply(y, x.detach(), found.slot)

        return watch

    @torch.no_grad()
    def _input_moments(self, x: Tensor) -> tuple[float, Tensor, Tensor]:
        """Count, mean and Σ(x - mean)² of an input; for q, k and v, which share it, once."""
        if self._last is None or self._last[0] is not x:
            self._last = (x, moments_of(self._real_rows(x)))
        return self._last[1]

    def _real_rows(self, x: Tensor) -> Tensor:
        if self._real is not None and x.shape[:-1] == self._real.shape:
            return x[self._real]
        if self._tokens is not None and x.dim() == 2 and x.shape[0] > self._tokens:
            return x[: self._tokens]
        return x.reshape(-1, x.shape[-1])

    def _fold(self, found: LayerStatistics) -> Callable[[Tensor], None]:
        """One gradient per `pending` backward passes: their mean, over all processes."""

        def fold(slot: Tensor) -> None:
            if self.passes + 1 < self.pending or slot.grad is None:
                return
            G, slot.grad = slot.grad.detach(), None
            if world_size() > 1:
                dist.all_reduce(G)
            found.fold(G.div_(self.pending * world_size()))

        return fold

    def update(self) -> None:
        """A backward pass is done; call it after every one."""
        self.passes += 1
        self._last = None
        if self.passes >= self.pending:
            self.passes = 0
            self.steps += 1

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


def row_names(table: list[Block]) -> Iterator[dict[str, Any]]:
    """One dictionary per block, as the original keeps them; only `finalize` needs it."""
    for part in table:
        for i in range(part.p * part.q):
            yield {"module_name": part.name, "block_idx": divmod(i, part.q)}


def number_of_layers(model: nn.Module, names: list[str]) -> int:
    """L, from the model's configuration, else from the names."""
    config = getattr(model, "config", None)
    for field in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if isinstance(getattr(config, field, None), int):
            return getattr(config, field)
    found = [index for name in names if (index := layer_index(name, [])) is not None]
    return max(found, default=0) + 1


def normalised(values: Tensor) -> Tensor:
    """F̂: log1p of F1 … F4 over the log1p of their largest, in [0, 1]; F5 and F6 as they are."""
    logs = torch.log1p(values[:, :4])
    largest = torch.log1p(values[:, :4].amax(0)).clamp(min=FLOOR)
    return torch.cat([(logs / largest).clamp(0.0, 1.0), values[:, 4:]], dim=1)
