"""The posterior by name, for files and logs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .flat import Bucket

if TYPE_CHECKING:
    from .optimizer import IVON

KEY = "ivon_posterior"
STATISTICS = ("mean", "std", "min", "median", "max")


@torch.no_grad()
def hess_stats(buckets: list[Bucket], groups: int) -> list[dict[str, float]]:
    """Statistics of h per group, with one transfer to the host."""
    device = buckets[0].device
    rows = []
    for index in range(groups):
        parts = [b.hess.vector for b in buckets if b.group == index]
        h = torch.cat([part.to(device) for part in parts]) if parts else torch.zeros(0)
        if h.numel() == 0:
            rows.append(torch.full((5,), torch.nan, device=device, dtype=torch.float64))
            continue
        spread = h.std(correction=0)
        rows.append(torch.stack([h.mean(), spread, h.min(), h.median(), h.max()]).double())
    return [dict(zip(STATISTICS, row, strict=True)) for row in torch.stack(rows).tolist()]


def own_names(
    optimizer: IVON, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> dict[str, nn.Parameter]:
    """The optimiser's parameters by name, in the order given.

    Raises:
        ValueError: some have no name.
    """
    own = {p for group in optimizer.param_groups for p in group["params"]}
    named = {name: p for name, p in named_parameters if p in own}
    if unnamed := own.difference(named.values()):
        shapes = ", ".join(str(tuple(p.shape)) for p in list(unnamed)[:3])
        raise ValueError(
            f"{len(unnamed)} of the optimiser's {len(own)} parameters are not among the named ones "
            f"(shapes {shapes}): pass named_parameters() of the whole model"
        )
    return named


def _settings(optimizer: IVON) -> dict[nn.Parameter, tuple[float, float]]:
    return {
        p: (float(group["ess"]), float(group["weight_decay"]))
        for group in optimizer.param_groups
        for p in group["params"]
    }


def metadata(optimizer: IVON, named: dict[str, nn.Parameter]) -> dict[str, str]:
    """ess and weight decay, and the names they are of, as JSON."""
    names: dict[tuple[float, float], list[str]] = {}
    settings = _settings(optimizer)
    for name, p in named.items():
        names.setdefault(settings[p], []).append(name)
    groups = [{"ess": e, "weight_decay": d, "parameters": n} for (e, d), n in names.items()]
    return {KEY: json.dumps(groups)}


def check(
    optimizer: IVON,
    named: dict[str, nn.Parameter],
    tensors: dict[str, Tensor],
    saved_metadata: dict[str, str],
) -> None:
    """Raises ValueError where a saved posterior is not one of these parameters."""
    if KEY not in saved_metadata:
        raise ValueError(f"no posterior of an IVON: the metadata has no {KEY!r}")
    if differing := sorted(named.keys() ^ tensors.keys()):
        name = differing[0]
        where = "only saved" if name in tensors else "not saved"
        raise ValueError(f"{len(differing)} names differ, among them {name}, which is {where}")
    saved = {
        name: {"ess": group["ess"], "weight_decay": group["weight_decay"]}
        for group in json.loads(saved_metadata[KEY])
        for name in group["parameters"]
    }
    settings = _settings(optimizer)
    valid = []
    for name, p in named.items():
        tensor, (ess, weight_decay) = tensors[name], settings[p]
        if tensor.shape != p.shape:
            raise ValueError(
                f"{name}: the saved Hessian has shape {tuple(tensor.shape)}, the parameter "
                f"{tuple(p.shape)}"
            )
        for option, now in (("ess", ess), ("weight_decay", weight_decay)):
            was = saved.get(name, {}).get(option)
            if was != now:
                raise ValueError(
                    f"{name}: the posterior was learned with {option}={was}, the optimiser has "
                    f"{now:g}; its Hessian means another σ there. Set {option}={was}"
                )
        valid.append((tensor.double() + weight_decay > 0).all().cpu())  # False for NaN
    for name, fine in zip(named, valid, strict=True):
        if not fine:
            raise ValueError(f"{name}: the saved Hessian has entries of no positive precision")
