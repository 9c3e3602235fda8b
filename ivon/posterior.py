"""The posterior: its standard deviations, and by name for files and logs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from . import rule
from .flat import Bucket, Group

KEY = "ivon_posterior"
STATISTICS = ("mean", "std", "min", "median", "max")


class StdCache:
    """σ of every parameter, computed for a whole bucket when one of its parameters is asked for.

    It is computed anew, in new memory, after a step or a change of ess or weight decay.
    """

    def __init__(self) -> None:
        self.step = 0
        self._found: dict[Bucket, tuple[tuple[int, float, float], list[Tensor]]] = {}

    def clear(self) -> None:
        self._found.clear()

    def __contains__(self, bucket: Bucket) -> bool:
        return bucket in self._found

    def of(self, bucket: Bucket, group: Group) -> list[Tensor]:
        """σ of the bucket's parameters, in their order and shapes, in its wide dtype."""
        key = self.step, group["ess"], group["weight_decay"]
        if bucket not in self._found or self._found[bucket][0] != key:
            vector = rule.std(bucket.hess.vector, group["ess"], group["weight_decay"])  # (n,)
            pieces = vector.split([p.numel() for p in bucket.params])  # (size,) each
            views = [piece.view(p.shape) for piece, p in zip(pieces, bucket.params, strict=True)]
            self._found[bucket] = key, views
        return self._found[bucket][1]


@torch.no_grad()
def hess_stats(buckets: list[Bucket], groups: int) -> list[dict[str, float]]:
    """Statistics of h per group, with one transfer to the host; NaN for a group of nothing."""
    device = buckets[0].device
    rows = []
    for index in range(groups):
        parts = [b.hess.vector for b in buckets if b.group == index]
        h = torch.cat([part.to(device) for part in parts]) if parts else torch.zeros(0)  # (n,)
        if h.numel() == 0:
            rows.append(torch.full((5,), torch.nan, device=device, dtype=torch.float64))
            continue
        spread = h.std(correction=0)
        five = torch.stack([h.mean(), spread, h.min(), h.median(), h.max()])  # (5,)
        rows.append(five.double())
    return [dict(zip(STATISTICS, row, strict=True)) for row in torch.stack(rows).tolist()]


def own_names(
    groups: Sequence[Group], named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> dict[str, nn.Parameter]:
    """The groups' parameters by name, in the order given.

    Raises:
        ValueError: some have no name.
    """
    own = {p for group in groups for p in group["params"]}
    named = {name: p for name, p in named_parameters if p in own}
    if unnamed := own.difference(named.values()):
        shapes = ", ".join(str(tuple(p.shape)) for p in list(unnamed)[:3])
        raise ValueError(
            f"{len(unnamed)} of the optimiser's {len(own)} parameters are not among the named ones "
            f"(shapes {shapes}): pass named_parameters() of the whole model"
        )
    return named


def _settings(groups: Sequence[Group]) -> dict[nn.Parameter, tuple[float, float]]:
    return {
        p: (float(group["ess"]), float(group["weight_decay"]))
        for group in groups
        for p in group["params"]
    }


def metadata(groups: Sequence[Group], named: dict[str, nn.Parameter]) -> dict[str, str]:
    """ess and weight decay, and the names they are of, as JSON."""
    names: dict[tuple[float, float], list[str]] = {}
    settings = _settings(groups)
    for name, p in named.items():
        names.setdefault(settings[p], []).append(name)
    saved = [{"ess": e, "weight_decay": d, "parameters": n} for (e, d), n in names.items()]
    return {KEY: json.dumps(saved)}


def check(
    groups: Sequence[Group],
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
    settings = _settings(groups)
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
