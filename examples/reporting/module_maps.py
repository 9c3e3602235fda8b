"""Ranks of a saved adapter, from the header of its file; values of modules laid out by layer."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_A(?:\.weight)?$")
LARGEST_HEADER = 100 * 2**20  # bytes; the format's own limit


def ranks(run: Path) -> dict[str, int]:
    """Module -> rows of its A; nothing where the run's result has no such factors."""
    shapes = _shapes(run)
    found = {match[1]: shape[0] for key, shape in shapes.items() if (match := FACTOR.match(key))}
    return {name.removesuffix(".bim"): rank for name, rank in found.items()}


def _shapes(run: Path) -> dict[str, list[int]]:
    """Tensor -> shape, of a .safetensors file: 8 bytes of length, then JSON."""
    path = run / "adapter" / "adapter_model.safetensors"
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= LARGEST_HEADER else {}
        return {key: entry["shape"] for key, entry in header.items() if key != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def grid(
    seeds: Sequence[Mapping[str, float]],
) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Layers, the last one above; kinds of modules; the mean of each over seeds.

    Args:
        seeds: for every run, module -> its rank, or what its mask keeps.
    """
    from examples.plots.ranks import split_name  # numpy with it, and only a picture needs it

    places = {name: split_name(name) for own in seeds for name in own}
    layers = sorted({layer for layer, _ in places.values()}, reverse=True)
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    names = {place: name for name, place in places.items()}
    cells: list[list[float | None]] = []
    for layer in layers:
        own = [[s[n] for s in seeds if (n := names.get((layer, k))) in s] for k in kinds]
        cells.append([statistics.mean(values) if values else None for values in own])
    shown = [_brief(kind) for kind in kinds]
    return ["–" if n < 0 else f"layer {n}" for n in layers], shown, cells


def _brief(kind: str) -> str:
    """`attention.self.query` -> `query`; `attention.output.dense` -> `attention.output`."""
    return kind.removeprefix("attention.self.").removesuffix(".dense")
