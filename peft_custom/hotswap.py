"""Another adapter's weights in an adapter's place, without touching a module of the model."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .config import PeftConfig
from .hooks.owners import refuse_if_attached
from .save_and_load import (
    PREFIX,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
    tuner_of,
)
from .tuners.base import BaseTuner, iter_adapters
from .tuners.lora import LoraConfig, LoraLayer
from .tuners.lora.base_starts import moves_base
from .tuners.targets import pattern_value


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str = "default",
    torch_device: str | None = None,
    subfolder: str | None = None,
    **hub: Any,
) -> None:
    """Puts a saved LoRA adapter of the same modules into adapter `adapter_name`, under that name.

    Of equal ranks tensors are overwritten in place, so that a compiled model stays compiled; ranks,
    α and dropout may differ.

    Args:
        model: with a LoRA adapter, wrapped or injected.
        model_name_or_path: folder or hub id of the other adapter.
        adapter_name: which one to replace.
        torch_device: accepted for PEFT's sake; the tensors go where the adapter's are.
        subfolder: folder below it.
        hub: `revision=`, `token=` and the like for hub ids.

    Raises:
        ValueError: the two do not fit, or an optimiser drives the adapter; nothing has changed.
    """
    del torch_device
    tuner = tuner_of(model)
    refuse_if_attached(tuner, "hotswap_adapter")
    current = tuner.adapter_config(adapter_name)
    config = PeftConfig.from_pretrained(model_name_or_path, subfolder, **hub)
    state = load_peft_weights(model_name_or_path, None, subfolder, **hub)
    source = str(model_name_or_path)
    _check(tuner, adapter_name, current, config, state, source)
    _check_heads(get_peft_model_state_dict(model, adapter_name=adapter_name), state, source)
    for name, layer in iter_adapters(tuner.model):
        if adapter_name in layer.merged_adapters:
            layer.unmerge()
        if adapter_name in layer.adapters:
            assert isinstance(layer, LoraLayer)
            layer.refit(
                adapter_name,
                pattern_value(config.rank_pattern, name, config.r),
                pattern_value(config.alpha_pattern, name, config.lora_alpha),
                config.lora_dropout,
                config.use_rslora,
            )
    set_peft_model_state_dict(model, state, adapter_name, source=source)
    taken = copy.deepcopy(config)
    taken.target_modules, taken.inference_mode = current.target_modules, current.inference_mode
    tuner.peft_config[adapter_name] = taken


def _check(
    tuner: BaseTuner,
    adapter: str,
    current: PeftConfig,
    config: PeftConfig,
    state: Mapping[str, Tensor],
    source: str,
) -> None:
    """Raises where the file's adapter is of another kind, or of other modules."""
    for which in (current, config):
        if type(which) is not LoraConfig or moves_base(which.init_lora_weights):
            raise ValueError(f"{source}: hotswap_adapter is for LoRA adapters of an unchanged base")
    if current.rank_from is not None:
        raise ValueError("hotswap_adapter: save the adapter whose ranks come from data, load that")
    for option in ("use_dora", "bias"):
        ours, theirs = getattr(current, option), getattr(config, option)
        if ours != theirs:
            raise ValueError(f"{source}: {option}={theirs!r}, the adapter in place has {ours!r}")
    own = {f"{PREFIX}{name}" for name in tuner.live_tensors(adapter)}
    given = {name for name in state if ".lora_" in name}
    if own != given:
        differing = ", ".join(sorted(own ^ given)[:4])
        raise ValueError(f"{source} is of other modules: only one of the two has {differing}")
    for name, tensor in tuner.live_tensors(adapter).items():
        shape = list(tensor.shape)
        if tensor.dim() > 1:
            module, _, factor = name.rpartition(".lora_")
            dim = 1 if factor.startswith(("B", "embedding_B")) else 0
            shape[dim] = pattern_value(config.rank_pattern, module, config.r)
        if list(state[f"{PREFIX}{name}"].shape) != shape:
            found = tuple(state[f"{PREFIX}{name}"].shape)
            raise ValueError(f"{source}: {name}: file {found}, model {tuple(shape)}")


def _check_heads(own: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """Raises where what is saved in full beside the factors differs in names or shapes."""
    ours, theirs = (
        {name: tuple(tensor.shape) for name, tensor in state.items() if ".lora_" not in name}
        for state in (own, given)
    )
    if ours != theirs:
        differing = dict(sorted(set(ours.items()) ^ set(theirs.items())))
        raise ValueError(f"{source}: what it trained in full is not the same here: {differing}")
