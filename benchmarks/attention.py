"""Ways to compute attention on this CPU: the table behind the rule in `attention/__init__.py`.

    python -m benchmarks.attention [--rounds 9] [--dtype bfloat16]

For each shape (sequences, lengths, heads, head size, dropout) the contenders take turns, and the
fastest round of each counts; milliseconds of forward + backward, then of forward alone:

    one group      batched products, every sequence as long as the longest
    groups         batched products over groups of similar length (what packed tokens get)
    fused          torch's scaled-dot-product kernel on the padded form; it has no dropout on a CPU,
                   so with dropout this column is the formula in plain torch operations
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.common.timing import in_turn, seconds
from transformers_patched.attention import grouped
from transformers_patched.attention.padded import padded_attention
from transformers_patched.layout import SequenceLayout

# (sequences, shortest, longest, heads, head size, dropout): MRPC-like batches of MiniLM's 12 heads
# of 32 and RoBERTa-base's 12 of 64, then longer ones.
SHAPES = [
    *[(b, 25, 90, 12, d, p) for d in (32, 64) for b in (16, 32) for p in (0.0, 0.1)],
    *[(4, n // 2, n, 12, d, 0.0) for d in (32, 64) for n in (128, 256, 512)],
]
Contender = Callable[[Tensor, Tensor, Tensor], Tensor]


def offsets(sequences: int, shortest: int, longest: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(shortest, longest + 1, (sequences,), generator=generator)
    return torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()


def contenders(cu_seqlens: Tensor, longest: int, query: Tensor, p: float) -> dict[str, Contender]:
    """The three ways as functions of packed q, k, v (T, heads, d)."""
    chosen = grouped._cut
    plans = {}
    for name, cut in (("one group", lambda order, *_: [order]), ("groups", chosen)):
        grouped._cut = cut
        plans[name] = grouped.grouped_products(SequenceLayout.packed(cu_seqlens, longest), query)
    layout = SequenceLayout.packed(cu_seqlens, longest)

    def products(name: str) -> Contender:
        return lambda q, k, v: grouped.GroupedAttention.apply(q, k, v, plans[name], p)

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        padded = [layout.pad(x).transpose(1, 2) for x in (q, k, v)]  # (B, heads, L, d)
        scale, bias = q.shape[-1] ** -0.5, layout.bias(q.dtype)
        return padded_attention(*padded, bias, layout, scale, p, len(q))

    return {"one group": products("one group"), "groups": products("groups"), "fused": fused}


def milliseconds(
    ways: dict[str, Contender], qkv: list[Tensor], rounds: int, train: bool
) -> dict[str, float]:
    """The fastest of `rounds` rounds, in each of which every contender has its turn."""
    gradient = torch.randn_like(qkv[0])

    def turn(way: Contender) -> None:
        if train:
            way(*qkv).backward(gradient)
        else:
            with torch.no_grad():
                way(*qkv)

    def measure(way: Contender) -> float:
        return 1e3 * seconds(partial(turn, way), clock=time.perf_counter)

    times = in_turn({name: partial(measure, way) for name, way in ways.items()}, rounds)
    return {name: min(own) for name, own in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], action="append")
    options = parser.parse_args()
    names = "".join(f"{name:>11s}" for name in ("one group", "groups", "fused"))
    print(f"{'':35s}{'forward + backward, ms':>33s}{'forward, ms':>33s}")
    print(f"{'dtype':9s}{'seqs':>5s}{'lengths':>9s}{'heads':>8s}{'p':>5s}{names}{names}")
    for name in options.dtype or ["bfloat16", "float32"]:
        for sequences, shortest, longest, heads, d, p in SHAPES:
            cu_seqlens = offsets(sequences, shortest, longest)
            shape = (int(cu_seqlens[-1]), heads, d)
            qkv = [torch.randn(shape).to(getattr(torch, name)).requires_grad_() for _ in range(3)]
            ways = contenders(cu_seqlens, longest, qkv[0], p)
            both = milliseconds(ways, qkv, options.rounds, train=True)
            alone = milliseconds(ways, qkv, options.rounds, train=False)
            lengths = f"{shortest}-{longest}"
            cells = "".join(f"{x:11.2f}" for x in (*both.values(), *alone.values()))
            print(f"{name:9s}{sequences:5d}{lengths:>9s}{heads:5d}x{d}{p:5.1f}{cells}", flush=True)


if __name__ == "__main__":
    main()
