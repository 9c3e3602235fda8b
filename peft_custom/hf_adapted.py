"""What adapts a model of Transformers, and its trained weights in the `Trainer`'s folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .files import written_aside
from .peft_model import PeftModel
from .save_and_load import UNREADABLE
from .tuners.base import BaseTunerLayer, iter_adapters

TRAINED_NAME = "trained.safetensors"


def adapters_of(model: object) -> PeftModel | None:
    """The wrapper that `add_adapter` made around a model; None without adapters.

    It has what Transformers has no word for: `adapters_of(model).merge_and_unload()` gives the
    plain model back.
    """
    kept = getattr(model, "__dict__", {}).get("_adapted")
    if kept and not model.__dict__.get("_injecting_tuners"):  # unloaded through the wrapper
        keep_adapters(kept[0].get_base_model(), None)
        return None
    return kept[0] if kept else None


def keep_adapters(model: nn.Module, adapted: PeftModel | None) -> None:
    """Notes on a model what adapts it, in the attributes that Transformers reads; None: nothing."""
    model._hf_peft_config_loaded = adapted is not None
    if adapted is None:
        for name in ("_adapted", "_injecting_tuners", "peft_config"):
            model.__dict__.pop(name, None)
        return
    # plain lists: no cycle of registered modules
    model.__dict__["_adapted"] = [adapted]
    model.__dict__["_injecting_tuners"] = [adapted.base_model]
    model.__dict__["peft_config"] = adapted.peft_config


def save_trained(model: nn.Module, folder: Path) -> None:
    """Writes what training changes as it is: an adapter's own files have its final form."""
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in _trained(model).items()}
    with written_aside(folder / TRAINED_NAME) as aside:
        save_file(tensors, aside, metadata={"format": "pt"})


def load_trained(model: nn.Module, folder: Path) -> None:
    """Puts back what `save_trained` wrote.

    Raises:
        ValueError: the file is missing, damaged, or of other adapters than the model's, or the
            model's have split the base weights in another way.
    """
    path = Path(folder) / TRAINED_NAME
    try:
        tensors = load_file(path)
    except UNREADABLE as error:
        raise ValueError(
            f"{path}: missing or damaged ({error}). A Trainer writes it beside the adapter after "
            "patch_transformers(); without it training cannot go on where it was"
        ) from error
    here = {name: tuple(tensor.shape) for name, tensor in _trained(model).items()}
    there = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if here != there:
        other = sorted(n for n in {*here, *there} if here.get(n) != there.get(n))
        raise ValueError(
            f"{path}: of other adapters than the model's: {len(other)} tensors differ, the first "
            f"{other[0]!r}, {there.get(other[0], 'missing')} there and "
            f"{here.get(other[0], 'missing')} here"
        )
    moved = {f"{name}.base_layer.weight" for name, layer in _moved(model)}
    for name in moved & tensors.keys():
        if not torch.equal(model.get_parameter(name).cpu(), tensors[name]):
            raise ValueError(
                f"{path}: {name!r} was split in another way: draw the adapter's start as in the "
                "first run, with the same set_seed before add_adapter"
            )
    model.load_state_dict(tensors, strict=False)


def _moved(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    return ((name, layer) for name, layer in iter_adapters(model) if layer.base_moved)


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """The live state but for frozen weights; those that an adapter's start has moved count."""
    moved = {id(layer.base_layer.weight) for _, layer in _moved(model)}
    frozen = {id(p) for p in model.parameters() if not p.requires_grad} - moved
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if id(tensor) not in frozen}
