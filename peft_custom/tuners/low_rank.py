"""What layers of low-rank increments share, however the increment is made of its factors."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from .targets import is_conv1d
from .tuner_layer import BaseTunerLayer


class RankMask(nn.Module):
    """m (r,), ones and zeros: which components there are; a module, so that it moves along."""

    keep: Tensor

    def __init__(self, r: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("keep", torch.ones(r, device=device))


class LowRankLayer(BaseTunerLayer):
    """A layer whose adapters are s·ΔW with ΔW of rank r: ranks, α, dropout and scales by adapter.

    A subclass makes the containers and parameters and defines s. Its `add_adapter` takes the
    method's own options.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self._scaling: dict[str, float] = {}
        self._make_containers()

    # --- what a method implements ---------------------------------------------------------------
    def _make_containers(self) -> None:
        """Creates the empty containers that `adapter_containers` names."""
        raise NotImplementedError

    def _create(self, adapter: str, r: int) -> None:
        """Adds zero factors of rank r."""
        raise NotImplementedError

    def set_scale(self, adapter: str, factor: float) -> None:
        """Sets s to `factor` times the adapter's own scale."""
        raise NotImplementedError

    # --- what a method uses ---------------------------------------------------------------------
    def _register(self, adapter: str, r: int, lora_alpha: float, lora_dropout: float) -> None:
        """Creates the adapter's factors, notes its options and sets its scale."""
        self._create(adapter, r)
        self.r[adapter] = r
        self.lora_alpha[adapter] = lora_alpha
        self.lora_dropout[adapter] = lora_dropout
        self.set_scale(adapter, 1.0)

    @property
    def scaling(self) -> Mapping[str, float]:
        """s by adapter, read-only: change it with `set_scale`."""
        return MappingProxyType(self._scaling)

    def dropout_now(self, adapter: str) -> float:
        """The dropout probability at present: 0 in eval mode."""
        return self.lora_dropout[adapter] if self.training else 0.0

    def delete_adapter(self, name: str) -> None:
        super().delete_adapter(name)
        for values in (self.r, self.lora_alpha, self.lora_dropout, self._scaling):
            values.pop(name, None)


def two_sides(weight: Tensor) -> int:
    """Numbers in A and B for rank 1: a weight's first dimension, and all others together."""
    return weight.shape[0] + weight[0].numel()


def linear_geometry(base: nn.Module) -> tuple[int, int, bool]:
    """(in_features, out_features, stored as (in, out)?) of an `nn.Linear` or `Conv1D`."""
    fan_in_fan_out = is_conv1d(base) or bool(getattr(base, "fan_in_fan_out", False))
    rows, columns = base.weight.shape
    return (rows, columns, True) if fan_in_fan_out else (columns, rows, False)
