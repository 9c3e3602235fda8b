"""Which parameters of the base model train beside an adapter's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from .modules_to_save import ModulesToSaveWrapper
from .tuner_layer import iter_adapters


def trained_biases(model: nn.Module, mode: str, adapter: str) -> dict[str, nn.Parameter]:
    """The base model's biases that `bias=mode` trains beside adapter `adapter`, by name.

    Raises:
        ValueError: one of them is in half precision; what is trained must be fp32.
    """
    if mode == "none":
        return {}
    if mode == "all":
        adapters = [p for _, layer in iter_adapters(model) for p in layer.adapter_parameters()]
        wrappers = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
        # an adapter's own bias, or a saved module's, is saved with that and trains in any case
        others = {id(p) for p in adapters} | {id(p) for w in wrappers for p in w.parameters()}
        found = {
            name: p
            for name, p in model.named_parameters()
            if name.rsplit(".", 1)[-1] == "bias" and id(p) not in others
        }
    else:
        found = {
            f"{name}.base_layer.bias": layer.base_layer.bias
            for name, layer in iter_adapters(model)
            if adapter in layer.adapters and getattr(layer.base_layer, "bias", None) is not None
        }
    _refuse_half(mode, found)
    return found


def check_biases(
    model: nn.Module, mode: str, chosen: Iterable[nn.Module], saved: Iterable[nn.Module]
) -> None:
    """Raises where `bias=mode` is going to train a bias in half precision.

    Args:
        model: before the adapter is added.
        mode: the option.
        chosen: the modules to adapt, whose biases "lora_only" trains.
        saved: the modules to train in full, as fp32 copies.
    """
    if mode == "none":
        return
    copied = {id(p) for module in saved for p in module.parameters()}
    own = {id(getattr(module, "bias", None)) for module in chosen}
    found = {
        name: p
        for name, p in model.named_parameters()
        if name.rsplit(".", 1)[-1] == "bias"
        and id(p) not in copied
        and (mode == "all" or id(p) in own)
    }
    _refuse_half(mode, found)


def _refuse_half(mode: str, biases: Mapping[str, nn.Parameter]) -> None:
    for name, p in biases.items():
        if p.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"bias={mode!r}: {name} is {p.dtype}, and what is trained must be float32; load "
                "the base in float32 or use bias='none'"
            )
