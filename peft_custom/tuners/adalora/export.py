"""What goes into files: cut tensors with their rank pattern, or a plain LoRA adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ...hooks import TrainingHooks
from ...patterns import matches
from ..lora import LoraConfig
from ..modules_to_save import ModulesToSaveWrapper
from ..targets import as_list, name_matches
from .config import AdaLoraConfig
from .layer import SVDLinear

Layers = Iterable[tuple[str, SVDLinear]]
FORMATS = ("adalora", "lora")


@torch.no_grad()
def cut_tensors(layers: Layers, adapter: str) -> dict[str, Tensor]:
    """A and E row by row, B column by column, without what the masks have pruned.

    Tensors of which nothing is pruned are the live ones.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in layers:
        A, E, B = layer.triplets(adapter)
        kept = layer.mask(adapter) != 0
        if not bool(kept.all()):
            A, E, B = A[kept], E[kept], B[:, kept]
        tensors.update({f"{name}.lora_A": A, f"{name}.lora_E": E, f"{name}.lora_B": B})
    return tensors


def rank_pattern(layers: Layers, adapter: str) -> dict[str, list[bool]]:
    """`"<module>.lora_E"` → which of init_r components are left, as PEFT's files have it."""
    return {f"{name}.lora_E": list(layer.pattern(adapter)) for name, layer in layers}


@torch.no_grad()
def as_plain_lora(
    layers: Layers, adapter: str, config: AdaLoraConfig, rank: int | None = None
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The same increment as a LoRA adapter of one rank R for all modules, α = R.

    A' = [A; 0] and B' = [s·B diag(E ∘ m), 0], the pruned components left out, so that B'A' = ΔW.

    Args:
        layers: names and layers.
        adapter: which adapter.
        config: its options.
        rank: R, for servers that want 8, 16, …; None takes the largest rank there is.

    Raises:
        ValueError: a module has more than `rank` components.
    """
    live = [
        (name, layer, (layer.mask(adapter) * layer.lora_E[adapter][:, 0]), layer.mask(adapter) != 0)
        for name, layer in layers
    ]
    largest = max(1, *(int(kept.sum()) for *_, kept in live))
    R = largest if rank is None else rank
    if R < largest:
        raise ValueError(f"rank={rank}: one module has {largest} components, so {largest} or more")
    tensors: dict[str, Tensor] = {}
    for name, layer, e, kept in live:
        A, B = layer.factors(adapter)
        A, B = A[kept], (B * (e * layer.scaling[adapter]))[:, kept]  # (k, in), (out, k)
        wide_A, wide_B = A.new_zeros(R, A.shape[1]), B.new_zeros(B.shape[0], R)
        wide_A[: A.shape[0]], wide_B[:, : B.shape[1]] = A, B
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = wide_A, wide_B
    shared = {f.name for f in dataclasses.fields(LoraConfig)} - {"peft_type", "rank_pattern"}
    values = {name: getattr(config, name) for name in shared}
    plain = LoraConfig(**{**values, "r": R, "lora_alpha": R, "init_lora_weights": True})
    return plain, tensors


def name_targets(model: nn.Module, config: AdaLoraConfig, names: list[str]) -> None:
    """Names the adapted modules one by one where PEFT 0.11 would choose others by `config`.

    It does not know `exclude_modules`, and adapts within modules that are saved in full.
    """
    saved = [(n, m) for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    inside = [
        (f"{name}.{inner}", module)
        for name, wrapper in saved
        for inner, module in wrapper.original_module.named_modules()
    ]
    reached = [
        name
        for name, _ in inside
        if (
            matches(config.target_modules, name)
            if isinstance(config.target_modules, str)
            else any(name_matches(name, entry) for entry in as_list(config.target_modules))
        )
    ]
    if reached or config.exclude_modules is not None:
        config.target_modules = sorted(names)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def stock(config: AdaLoraConfig) -> AdaLoraConfig:
    """The options as PEFT knows them: type ADALORA, and none of ours."""
    names = {f.name for f in dataclasses.fields(AdaLoraConfig)} - AdaLoraConfig.omit_at_default
    values = {name: getattr(config, name) for name in names}
    if config.total_step is None:  # today's PEFT reads no file without, and has its own idea of T
        values.update(tinit=0, tfinal=0, deltaT=1, total_step=1)
    else:  # it counts steps, and knows no fractions
        resolved = TrainingHooks(config.total_step)
        for name, least in (("tinit", 0), ("tfinal", 0), ("deltaT", 1)):
            values[name] = resolved.steps(name, min(values[name], config.total_step), least)
    return AdaLoraConfig(**{**values, "peft_type": "ADALORA"})
