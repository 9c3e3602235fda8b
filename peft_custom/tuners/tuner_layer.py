"""A layer wrapped by named adapters: switching, routing, merging, and the names of its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .modules_to_save import Routes
from .targets import is_conv1d


class BaseTunerLayer(nn.Module):
    """A layer wrapped by named adapters.

    Subclasses list their containers (`ModuleDict`/`ParameterDict` keyed by adapter) in
    `adapter_containers` and implement `increment` and `get_delta_weight`; `bind` and `forward_one`
    are the straight-line path for the common case of one active, unmerged adapter. What `bind`
    returns is the method's own, a NamedTuple by custom. `_modules["base_layer"]` on that path is
    `base_layer` without nn.Module's slow look-up.
    """

    adapter_containers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.active_adapters: list[str] = []
        self.merged_adapters: list[str] = []
        self.adapters_enabled = True
        self._routes: tuple[Routes, ...] | None = None  # by tokens, by samples
        self._kept: Tensor | None = None  # the unmerged base weight, while merged
        self._bound: Any = None  # what forward_one needs; None sends forward the long way
        self._linear_base = False  # whether the base's forward is x Wᵀ + b, hooks aside
        self._live: tuple[str, ...] = ()  # active adapters of this layer, not merged
        self.register_state_dict_post_hook(_store_unmerged_weight)
        self.register_load_state_dict_pre_hook(_unmerge_before_loading)

    # --- what a method implements ---------------------------------------------------------------
    def increment(self, x: Tensor, adapter: str) -> Tensor:
        """The adapter's term on input `x`, added to the base layer's output."""
        raise NotImplementedError

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW in fp32, oriented as the stored weight."""
        raise NotImplementedError

    def bind(self, adapter: str) -> Any:
        """Collects once what `forward_one` needs; None keeps the general path."""
        return None

    def forward_one(self, x: Tensor, bound: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Output with one adapter active; `bound` is what `bind` returned."""
        raise NotImplementedError

    def base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Output of the layer without any adapter."""
        return self.base_layer(x, *args, **kwargs)

    def base_is_plain(self) -> bool:
        """Whether calling the base layer is nothing but x Wᵀ + b at this moment.

        Then one fused map may compute base and increment; otherwise the base must be called, for
        its own forward (quantised layers, subclasses) or its hooks (offloading, FSDP, profilers).
        """
        base = self._modules["base_layer"]
        hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks
        return self._linear_base and not hooked

    @property
    def base_moved(self) -> bool:
        """Whether an adapter's start changed the base weight."""
        return False

    def restore_base(self, adapter: str | None = None) -> None:
        """Undoes what `adapter`, or all of them, did to the base weight; usually nothing."""

    # --- adapters ------------------------------------------------------------------------------
    @property
    def adapters(self) -> list[str]:
        """Names of the adapters this layer has."""
        found = {name: None for box in self.adapter_containers for name in getattr(self, box)}
        return list(found)

    def _tensors(self, adapter: str) -> Iterator[tuple[str, Tensor]]:
        for box in self.adapter_containers:
            content = getattr(self, box)
            if adapter not in content:
                continue
            item = content[adapter]
            if isinstance(item, nn.Module):
                yield from ((f"{box}.{key}", value) for key, value in _own_tensors(item))
            else:
                yield box, item

    def adapter_tensors(self, adapter: str) -> dict[str, Tensor]:
        """The adapter's live tensors under the names PEFT's files use (no adapter name in them)."""
        return dict(self._tensors(adapter))

    def adapter_parameters(self, adapter: str | None = None) -> Iterator[nn.Parameter]:
        """Parameters of one adapter, or of all."""
        for name in self.adapters if adapter is None else [adapter]:
            yield from (t for _, t in self._tensors(name) if isinstance(t, nn.Parameter))

    def set_adapter(self, names: list[str], trainable: list[str] | None = None) -> None:
        """Activates `names`; of all adapters only `trainable` (default: `names`) get gradients."""
        self.active_adapters = list(names)
        trained = names if trainable is None else trainable
        for name in self.adapters:
            for parameter in self.adapter_parameters(name):
                parameter.requires_grad_(name in trained)
        self.rebind()

    def enable_adapters(self, enabled: bool) -> None:
        """Turns every adapter of the layer on or off without touching a weight."""
        if not enabled and self.merged:
            self.unmerge()
        self.adapters_enabled = enabled
        self.rebind()

    def delete_adapter(self, name: str) -> None:
        """Removes adapter `name` from the layer."""
        if name in self.merged_adapters:
            self.unmerge()
        self.restore_base(name)
        for box in self.adapter_containers:
            if name in getattr(self, box):
                del getattr(self, box)[name]
        self.active_adapters = [other for other in self.active_adapters if other != name]
        self.rebind()

    def rebind(self) -> None:
        """Recomputes the forward path; called after every change of what is active."""
        # what is merged acts through the weight
        apart = [name for name in self.adapters if name not in self.merged_adapters]
        on = self.adapters_enabled
        self._live = tuple(name for name in self.active_adapters if on and name in apart)
        base = self.base_layer
        linear = type(base).forward is nn.Linear.forward or is_conv1d(base)
        self._linear_base = linear and "forward" not in base.__dict__
        single = len(self._live) == 1 and self._routes is None
        self._bound = self.bind(self._live[0]) if single else None

    # --- computing -----------------------------------------------------------------------------
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        bound = self._bound
        if bound is not None:
            return self.forward_one(x, bound, *args, **kwargs)
        if self._routes is not None:
            return self._forward_routed(x, *args, **kwargs)
        return self.forward_several(x, self._live, *args, **kwargs)

    def forward_several(
        self, x: Tensor, adapters: tuple[str, ...], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Base output plus the increments of `adapters`."""
        out = self.base_output(x, *args, **kwargs)
        for adapter in adapters:
            out = out + self.increment(x, adapter).to(out.dtype)
        return out

    def _forward_routed(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        total = x.shape[0]
        sizes = [sum(len(rows) for _, rows in routes) for routes in self._routes or ()]
        if total not in sizes:
            raise ValueError(
                f"adapter_names routes {sizes[0]} rows, but an adapted layer got an input of "
                f"{total} rows: a layer applied to something other than the batch (position "
                "embeddings, say) cannot be routed; run the adapters one at a time"
            )
        out: Tensor | None = None
        for name, rows in self._routes[sizes.index(total)]:
            names = (name,) if name in self.adapters else ()
            part = self.forward_several(x[rows], names, *args, **kwargs)
            out = part.new_empty((total, *part.shape[1:])) if out is None else out
            out[rows] = part
        assert out is not None
        return out

    def route(self, routes: tuple[Routes, ...] | None) -> None:
        """Sends rows through adapters of their own, until called with None.

        Of several routes an input takes the one of as many rows: a layer may see all tokens of a
        packed batch, or the first token of every sample.
        """
        if routes is not None and (self.training or self.merged):
            state = "in training mode" if self.training else "merged"
            raise ValueError(
                f"adapter_names needs eval mode and no merged adapter; a layer is {state}"
            )
        self._routes = routes
        self.rebind()

    # --- merging -------------------------------------------------------------------------------
    @property
    def merged(self) -> bool:
        """Whether the base weight currently contains adapters."""
        return bool(self.merged_adapters)

    def merged_weight(self, names: list[str]) -> Tensor:
        """W + Σ ΔW in fp32 (fp64 for a fp64 base), W the unmerged base weight."""
        weight = self.base_layer.weight.detach() if self._kept is None else self._kept
        total = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for name in names:
            total += self.get_delta_weight(name).to(total)
        return total

    def merged_with(self, names: list[str]) -> list[str]:
        """The adapters that the weight contains once `names` are merged as well."""
        fresh = [n for n in names if n in self.adapters and n not in self.merged_adapters]
        return [*self.merged_adapters, *fresh]

    @torch.no_grad()
    def finite_merged_weight(self, names: list[str]) -> Tensor:
        """As `merged_weight`; one that is not finite is an error."""
        merged = self.merged_weight(names)
        if not torch.isfinite(merged).all():
            raise ValueError(f"merging {names}: the merged weight is not finite")
        return merged

    @torch.no_grad()
    def merge(self, names: list[str] | None = None, keep: bool = True) -> float:
        """Folds adapters (default: the active ones) into the base weight.

        Args:
            names: adapters to fold in, beside those already merged.
            keep: keep the original weight, so that `unmerge` is exact; False only before unloading.

        Returns:
            The part of the increment lost to rounding, ‖round(W + Δ) − (W + Δ)‖ / ‖Δ‖.
        """
        everything = self.merged_with(self.active_adapters if names is None else names)
        if everything == self.merged_adapters:
            return 0.0
        weight = self.base_layer.weight
        merged = self.finite_merged_weight(everything)
        before = weight.detach().to(merged.dtype)
        change = torch.linalg.vector_norm(merged - before)
        if keep and self._kept is None:
            self._kept = weight.detach().clone()
        weight.copy_(merged)  # seen by layers that keep what follows from their weight
        lost = torch.linalg.vector_norm(merged - weight.detach().to(merged.dtype))
        self.merged_adapters = everything
        self.rebind()
        return float(lost / change) if change > 0 else 0.0

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the kept original weight back, bit for bit."""
        if self._kept is not None:
            self.base_layer.weight.copy_(self._kept)
            self._kept = None
        self.merged_adapters = []
        self.rebind()

    # --- the base layer seen through the wrapper -------------------------------------------------
    def get_base_layer(self) -> nn.Module:
        """The wrapped layer."""
        return self.base_layer

    @property
    def weight(self) -> Tensor:
        """The base layer's weight."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    persistent = module.state_dict(keep_vars=True)
    yield from ((name, value) for name, value in module.named_buffers() if name in persistent)


def _store_unmerged_weight(
    layer: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    if layer._kept is not None:  # a state dict never holds a merged weight
        state[f"{prefix}base_layer.weight"] = layer._kept


def _unmerge_before_loading(layer: nn.Module, *unused: Any) -> None:
    if layer.merged:
        layer.unmerge()


def iter_adapters(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Name and layer of every adapted module in `model`."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def disable_fast_path(model: nn.Module) -> list[tuple[nn.Module, int]]:
    """Stops `nn.TransformerEncoderLayer` from computing past its adapters.

    In eval mode that class computes from its linear layers' weights without calling them. A flag of
    its own keeps it on the path that calls them; the flags' values are returned, to be put back.
    """
    changed = []
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and module.activation_relu_or_gelu:
            if any(isinstance(child, BaseTunerLayer) for child in module.modules()):
                changed.append((module, module.activation_relu_or_gelu))
                module.activation_relu_or_gelu = 0
    return changed
