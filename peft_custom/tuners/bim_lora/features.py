"""Six features of every block, from a pass over data in which nothing of the base moves.

With G_t = ∂L_t/∂W at step t = 1 … T, a = mean_t |G_t| and x the layer's inputs:

    F1 gradient mean      mean over the block of a
    F2 gradient variance  mean over the block of mean_t G_t² - a²
    F3 input variance     mean over the block's columns of Var(x_k) over all tokens
    F4 weight norm        ‖W‖ of the block (Frobenius)
    F5 layer position     (ℓ + 1)/L
    F6 module type        a number per kind of matrix, see `KINDS`

Blocks are in order of module names, then row by row; what a block at the edge has is averaged over
what it has. `collector` gathers them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...files import written_aside
from ..targets import layer_index
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
    rows, columns = (block_lengths(size, block, t) for size in t.shape)
    return block_sums(t, block) / (rows[:, None] * columns)


def block_lengths(size: int, block: int, like: Tensor) -> Tensor:
    """How long each block along a side is, (⌈size/block⌉,): the last may be shorter."""
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
    rest = rows - mean
    left = rest.mean(0).double()  # what rounding has left of the mean, which may be large
    squares = rest.square_().sum(0).double() - len(rows) * left.square()
    return len(rows), mean.double() + left, squares


# --- names and scales -----------------------------------------------------------------------------


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
