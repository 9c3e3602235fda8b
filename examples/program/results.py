"""The end of a run: the final table, and the memory it took."""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch


def table(title: str, results: dict[str, Any], more: dict[str, Any]) -> str:
    """The end of a run, for people; `more` are the method's own figures."""
    lines: list[tuple[str, str]] = []
    for name, value in results.items():
        if name.startswith(("eval_", "test_")):
            lines.append((name, f"{value:.4f}"))
    for name, value in more.items():
        lines.append((name.replace("_", " "), f"{value:,}" if type(value) is int else f"{value:g}"))
    if results.get("best_epoch") is not None:
        lines.append(("best epoch", f"{results['best_epoch']:g} of {results['epochs']:g}"))
    share = 100 * results["trainable_share"]
    lines.append(("trainable parameters", f"{results['trainable_parameters']:,} ({share:.2f} %)"))
    if "train_seconds" in results:
        lines.append(("training seconds", f"{results['train_seconds']:.1f}"))
        if results["tokens_per_second"]:
            lines.append(("real tokens per second", f"{results['tokens_per_second']:,.0f}"))
    lines.append(("wall seconds", f"{results['wall_seconds']:.1f}"))
    lines.append(("peak memory", f"{results['peak_memory_bytes'] / 2**20:,.0f} MiB"))
    width = max(len(name) for name, _ in lines)
    rule = "─" * max(48, len(title))
    return "\n".join(["", title, rule, *(f"  {n:<{max(width, 20)}}  {v}" for n, v in lines)])


def peak_memory(device: str) -> int:
    """Bytes: the most a GPU had allocated, else the most this process had resident."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
