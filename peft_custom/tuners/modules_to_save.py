"""Modules trained in full beside an adapter: one copy per adapter, the original kept aside."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

Routes = list[tuple[str, Tensor]]  # (adapter name or BASE, indices of its rows)
BASE = "__base__"


class ModulesToSaveWrapper(nn.Module):
    """Holds `original_module` (frozen) and `modules_to_save[adapter]` (trained copies, in fp32)."""

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.active_adapter: str | None = None
        self.adapters_enabled = True
        self.routes: tuple[Routes, Routes] | None = None  # by samples, by tokens
        self._current: tuple[nn.Module] = (original_module,)  # a tuple: not registered

    def add_adapter(self, name: str) -> None:
        """Copies the original module for adapter `name`; floating parameters become fp32."""
        self.original_module.requires_grad_(False)
        fresh = copy.deepcopy(self.original_module)
        for tensor in [*fresh.parameters(), *fresh.buffers()]:
            if tensor.dtype in (torch.float16, torch.bfloat16):
                tensor.data = tensor.data.float()
        self.modules_to_save[name] = fresh
        self._bind()

    def delete_adapter(self, name: str) -> None:
        """Forgets adapter `name`'s copy, if there is one."""
        if name in self.modules_to_save:
            del self.modules_to_save[name]
        if self.active_adapter == name:
            self.active_adapter = None
        self._bind()

    def set_adapter(self, names: list[str], trainable: list[str] | None = None) -> None:
        """Activates the copy that one of `names` has here; `trainable` ones get gradients."""
        self.active_adapter = self.copy_of(names)
        for name, module in self.modules_to_save.items():
            module.requires_grad_(name in (names if trainable is None else trainable))
        self._bind()

    def copy_of(self, names: list[str]) -> str | None:
        """The one of `names` that has a copy here; several are an error."""
        present = [name for name in names if name in self.modules_to_save]
        if len(present) > 1:
            raise ValueError(
                f"adapters {present} each bring their own copy of this module; only one of them "
                "can be active"
            )
        return present[0] if present else None

    def enable_adapters(self, enabled: bool) -> None:
        """Chooses between the active copy and the original module."""
        self.adapters_enabled = enabled
        self._bind()

    def current_module(self) -> nn.Module:
        """The module that `forward` runs: the active copy, or the original."""
        return self._current[0]

    def plain_module(self) -> nn.Module:
        """The module in use, in the dtypes of the original: without the wrapper nothing casts."""
        module = self.current_module()
        wanted = {**dict(self.original_module.named_parameters()),
                  **dict(self.original_module.named_buffers())}  # fmt: skip
        own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        if all(tensor.dtype == wanted[name].dtype for name, tensor in own.items()):
            return module
        module = copy.deepcopy(module)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            tensor.data = tensor.data.to(wanted[name].dtype)
        return module

    def _bind(self) -> None:
        use = self.adapters_enabled and self.active_adapter is not None
        self._current = (
            self.modules_to_save[self.active_adapter] if use else self.original_module,
        )

    @property
    def weight(self) -> Tensor:
        """The weight in use (models look at `classifier.weight` for its dtype)."""
        return self.current_module().weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the active copy, or each row through the copy of its own adapter."""
        if self.routes is not None:
            return self._forward_routed(*args, **kwargs)
        return run_in_own_dtype(self._current[0], args, kwargs)

    def _forward_routed(self, *args: Any, **kwargs: Any) -> Tensor:
        """Runs every copy on the whole batch and takes each row from the copy of its own adapter.

        The input is not cut by rows beforehand: a packed batch's rows belong together.
        """
        out: Tensor | None = None
        for i, (name, _) in enumerate(self.routes[0]):
            module = self.modules_to_save[name] if name in self.modules_to_save else None
            part = run_in_own_dtype(module or self.original_module, args, kwargs)
            if not isinstance(part, Tensor):
                raise TypeError("mixed batches need saved modules that return one tensor")
            fitting = [r for r in self.routes if sum(len(rows) for _, rows in r) == part.shape[0]]
            if not fitting:
                raise ValueError(
                    f"adapter_names: a saved module returns {part.shape[0]} rows, which are "
                    "neither the batch's samples nor its tokens"
                )
            rows = fitting[0][i][1]
            out = torch.empty_like(part) if out is None else out
            out[rows] = part[rows]
        assert out is not None
        return out


def run_in_own_dtype(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls `module`, its input cast to its parameters' dtype (a fp32 head on a bf16 body)."""
    weight = next(module.parameters(), None)
    if weight is None or not args or not isinstance(args[0], Tensor):
        return module(*args, **kwargs)
    x = args[0]
    if x.dtype != weight.dtype and x.is_floating_point() and weight.is_floating_point():
        if not torch.is_autocast_enabled(x.device.type):
            args = (x.to(weight.dtype), *args[1:])
    return module(*args, **kwargs)
