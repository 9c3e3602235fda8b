"""Where a benchmark computes: on the processor, or on one GPU; and how much memory it takes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from typing import Any


def add_device(parser: argparse.ArgumentParser) -> None:
    """`--device`: where to compute; unless given, on a GPU where there is one."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")


def device_of(o: argparse.Namespace) -> str:
    """The device that was asked for, or that there is."""
    import torch

    return o.device or ("cuda" if torch.cuda.is_available() else "cpu")


def on(device: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A batch's arguments with the tensors on the device."""
    return {k: v.to(device) if hasattr(v, "to") else v for k, v in given.items()}


def synchronize(device: str) -> None:
    """Waits for what was started on a GPU."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def peak_gib(device: str = "cpu") -> float:
    """GiB: the most a GPU had allocated, else the most this process had resident."""
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def print_peaks(sides: Mapping[str, Callable[[], object]], device: str) -> None:
    """On a GPU: runs every side once more and prints the MiB that this adds at its peak.

    What sides that share a process hold between steps, weights above all, is not in it; on a CPU
    no such figure is to be had, and nothing is printed.
    """
    if device == "cpu":
        return
    import torch

    found = {}
    for name, work in sides.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        found[name] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    print("MiB added at the peak:", json.dumps(found), flush=True)
