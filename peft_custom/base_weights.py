"""Which base an adapter was trained over: a key of its weights, beside the adapter.

An adapter fits every model of its base's shapes, and is worth nothing over another one. So a run
writes `base_weights.json` into its adapter's folder, and loading it over other weights is an error.
Heads are left out: an adapter may move to another task.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from .digest import digest
from .files import read_json

FILE = "base_weights.json"


class OtherBaseError(ValueError):
    """An adapter is loaded over weights that it was not trained over."""


@dataclass(frozen=True)
class BaseWeights:
    """What is known of a base.

    Attributes:
        name: folder or hub id.
        dtype: of its weights.
        digest: of all but those of `without`.
        without: names that its checkpoint lacks, so that they are random.
    """

    name: str
    dtype: str
    digest: str
    without: tuple[str, ...] = ()


def describe(
    model: nn.Module, name: str, *, without: Collection[str] = (), dtype: torch.dtype | None = None
) -> BaseWeights:
    """The weights of a model without its head.

    Args:
        model: not adapted; its `base_model_prefix`, where it has one, says where the base is.
        name: folder or hub id.
        without: names in the model that do not count.
        dtype: weights are taken in this type; None: as they are.
    """
    prefix = _prefix(model)
    tensors = {
        key.removeprefix(prefix): tensor
        for key, tensor in model.state_dict().items()
        if key.startswith(prefix) and key not in without
    }
    floating = next(t.dtype for t in tensors.values() if t.is_floating_point())
    if dtype is not None:
        tensors = {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}
    missing = sorted(key.removeprefix(prefix) for key in without if key.startswith(prefix))
    return BaseWeights(name, str(dtype or floating), digest(tensors), tuple(missing))


def write(folder: Path, base: BaseWeights) -> None:
    """Writes the file beside an adapter."""
    (folder / FILE).write_text(json.dumps(asdict(base), indent=2) + "\n", "utf-8")


def refuse_other_base(
    folder: str | os.PathLike[str], model: nn.Module, *, without: Collection[str] = ()
) -> None:
    """Compares a model with what is written beside an adapter, if anything is.

    Weights that are here in bfloat16 say nothing about those in float32 that the adapter was
    trained over; the other way round they are rounded first.

    Args:
        folder: of the adapter.
        model: that is to carry it, not adapted yet, or its layers with fresh factors.
        without: names in the model that do not count.

    Raises:
        OtherBaseError: the base's weights are others.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return
    try:
        saved = BaseWeights(**read_json(path))
    except TypeError as error:
        raise ValueError(f"{path}: not what a run writes there ({error})") from error
    prefix = _prefix(model)
    names = {*without, *(prefix + name for name in saved.without)}
    now = describe(model, "", without=names)
    if now.dtype != saved.dtype:
        if now.dtype != "torch.float32":
            return
        dtype = getattr(torch, saved.dtype.removeprefix("torch."))
        now = describe(model, "", without=names, dtype=dtype)
    if now.digest != saved.digest:
        raise OtherBaseError(
            f"{folder}: this adapter was trained over other base weights ({saved.name}) than the "
            "model's: load that base; if the model is meant to be another one, delete "
            f"{path.name} there"
        )


def _prefix(model: nn.Module) -> str:
    """Of the names of the base in a model with a head; "" where there is none."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and hasattr(model, prefix) else ""
