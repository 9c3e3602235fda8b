"""The covariance of what layers are given in some batches, and its principal directions."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ...distributed import reduce_mean, world_size
from ...rng import generator

SMALL = 1024  # up to so many inputs the whole spectrum is computed
SPARE, ROUNDS = 10, 12  # of subspace iteration beyond
NOISE = 1e-6  # eigenvalues below this part of the first one are rounding


class _Sums:
    """Σ 1, Σ x and Σ x xᵀ over the rows x that a layer was given."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.count = torch.zeros(1, device=device)
        self.sum = torch.zeros(width, device=device)
        self.products = torch.zeros(width, width, device=device)

    def add(self, rows: Tensor) -> None:
        """Rows (N, in) in fp32."""
        self.count += rows.shape[0]
        self.sum += rows.sum(0)
        self.products.addmm_(rows.T, rows)


class InputMoments:
    """Watches the inputs of layers within its context, padding left out.

    Layers that are given one and the same tensor (query, key and value) share their sums.

    Args:
        layers: adapted ones, by name.

    Attributes:
        counts: False for a batch that only keeps processes in step.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers, self.counts = dict(layers), True
        self.sums: dict[str, _Sums] = {}
        self.same_as: dict[str, str] = {}
        self._masks: list[Tensor] = []
        self._last: tuple[str, Tensor] | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> InputMoments:
        for name, layer in self.layers.items():
            watch = self._watcher(name)
            self._handles.append(layer.register_forward_pre_hook(watch))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._last = None

    def begin(self, batch: Any) -> None:
        """A forward pass over `batch` follows: which of its tokens are real, and scored."""
        given = batch if isinstance(batch, Mapping) else {}
        mask, labels = given.get("attention_mask"), given.get("labels")
        ids = given.get("input_ids")
        self._masks = [] if mask is None else [mask.bool()]
        if labels is not None and ids is not None and labels.shape == ids.shape:
            self._masks.append(labels != -100)  # a language model's
        self._last = None

    def _watcher(self, name: str) -> Any:
        def watch(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not self.counts:
                return
            x = args[0]
            if self._last is not None and self._last[1] is x:
                self.same_as.setdefault(name, self._last[0])
                return
            self._last = name, x
            if name in self.same_as:
                return
            if name not in self.sums:
                self.sums[name] = _Sums(x.shape[-1], x.device)
            masks = [mask for mask in self._masks if mask.shape == x.shape[:-1]]
            real = masks[0] & masks[-1] if masks else None
            rows = x.reshape(-1, x.shape[-1]) if real is None else x[real]  # (N, in)
            self.sums[name].add(rows.float())

        return watch

    def scatters(self) -> dict[str, Tensor]:
        """Σ (x − x̄)(x − x̄)ᵀ (in, in) by layer, over the rows of all processes.

        Raises:
            ValueError: a layer was given nothing.
        """
        silent = [name for name in self.layers if name not in self.sums | self.same_as]
        if silent:
            raise ValueError(f"rank_from: {', '.join(silent[:3])} got no input in the batches")
        found = {}
        for name, sums in self.sums.items():
            parts = reduce_mean([sums.count, sums.sum, sums.products])
            count, total, products = (part * world_size() for part in parts)
            found[name] = products - torch.outer(total, total / count)
        return {name: found[self.same_as.get(name, name)] for name in self.layers}


def principal_directions(scatter: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first eigenvectors of a scatter matrix, and each one's share of its trace.

    Args:
        scatter: (in, in), symmetric.
        k: how many, at most in.

    Returns:
        (k,) shares, descending, and (k, in) rows of length 1, whose largest entry is positive.
        Where there are fewer directions, shares are 0 and rows are drawn, orthogonal to the others.
    """
    C = scatter.double()
    n = C.shape[0]
    if n <= SMALL:
        values, vectors = torch.linalg.eigh(C)
        values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k]
    else:
        start = torch.randn(n, min(n, k + SPARE), generator=generator(0, n), dtype=C.dtype)
        Q = torch.linalg.qr(C @ start.to(C.device)).Q
        for _ in range(ROUNDS):
            Q = torch.linalg.qr(C @ Q).Q
        values, small = torch.linalg.eigh(Q.T @ C @ Q)
        values, vectors = values.flip(0)[:k], (Q @ small.flip(1))[:, :k]
    # what rounding alone distinguishes would differ between machines and numbers of processes
    sure = int((values > NOISE * values[0]).sum())
    values[sure:] = 0.0
    fill = torch.randn(n, k - sure, generator=generator(1, n), dtype=C.dtype).to(C.device)
    vectors = torch.cat((vectors[:, :sure], fill), dim=1)
    if sure < k:
        vectors = torch.cat((vectors[:, :sure], torch.linalg.qr(vectors).Q[:, sure:]), dim=1)
    rows = vectors.T
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))  # (k, 1)
    shares = values.clamp(min=0.0) / C.trace().clamp(min=torch.finfo(C.dtype).tiny)
    return shares, (rows * largest.sign()).float().contiguous()
