"""What a low-rank update of q and v costs on top of GPT-2's frozen q/k/v projection.

    python -m benchmarks.merged_linear                    # a row of results/merged_linear.md
    python -m benchmarks.merged_linear --dtype bfloat16 --dropout 0.1

Work: forward and backward, input gradient included, of a 768 -> 2304 linear layer, rank 4 on q and
v, 8 × 64 tokens. In turn, round by round: the frozen linear layer alone, `loralib.MergedLinear` in
both orientations of the stored weight, and the update written naively, by forming ΔW. Microsoft's
package takes its turns too, in a process of its own because it has our name, where
`pip install --no-deps --target .peers/loralib loralib==0.1.2` was run. Prints for each the median
milliseconds and the median of the round-by-round ratios to the frozen layer. Counting
multiplications, the update adds 1 % to the frozen layer's forward and input gradient.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import peers
from benchmarks.common.timing import ratio, seconds

PEER = peers.PEERS / "loralib"
IN, OUT, ENABLED = 768, 2304, (True, False, True)


class DenseUpdate(nn.Linear):
    """x (W + ΔW)ᵀ the naive way: ΔW formed at every call, and a full-size product with it."""

    def __init__(self, r: int, p: float) -> None:
        super().__init__(IN, OUT)
        self.weight.requires_grad = False
        m = OUT // len(ENABLED)
        self.A = nn.Parameter(torch.randn(sum(ENABLED) * r, IN))
        self.B = nn.Parameter(torch.randn(sum(ENABLED) * m, r))
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        n = sum(ENABLED)
        blocks = iter(b @ a for a, b in zip(self.A.chunk(n), self.B.chunk(n), strict=True))
        zeros = self.A.new_zeros(OUT // len(ENABLED), IN)
        delta = torch.cat([next(blocks) if on else zeros for on in ENABLED])
        update = F.linear(F.dropout(x, self.p, self.training), delta.to(x.dtype))
        return super().forward(x) + update


def layers(o: argparse.Namespace, names: list[str]) -> dict[str, nn.Module]:
    """The contestants, in training mode, with the base weight in the type asked for."""
    import loralib

    def merged(**options: bool) -> nn.Module:
        return loralib.MergedLinear(
            IN,
            OUT,
            r=o.r,
            lora_alpha=32,
            lora_dropout=o.dropout,
            enable_lora=list(ENABLED),
            **options,
        )

    makers: dict[str, Callable[[], nn.Module]] = {
        "frozen": lambda: nn.Linear(IN, OUT),
        "ours": merged,
        "ours, stored (in, out)": lambda: merged(fan_in_fan_out=True),
        "dense": lambda: DenseUpdate(o.r, o.dropout),
        "microsoft": merged,
        "microsoft, stored (in, out)": lambda: merged(fan_in_fan_out=True),
    }
    made = {name: makers[name]() for name in names}
    dtype = getattr(torch, o.dtype)
    for name, layer in made.items():
        layer.weight.data = layer.weight.data.to(dtype)
        layer.bias.data = layer.bias.data.to(dtype)
        for parameter in (layer.weight, layer.bias):
            parameter.requires_grad = False
        if name.startswith("microsoft"):
            layer.to(dtype)  # it multiplies all in one type
    return made


def milliseconds(layer: nn.Module, x: Tensor, grad: Tensor, repeats: int) -> float:
    """Mean time of one forward and backward pass."""

    def passes() -> None:
        for _ in range(repeats):
            x.grad = None
            for parameter in layer.parameters():
                parameter.grad = None
            layer(x).backward(grad)

    return seconds(passes, x.device.type, time.perf_counter) / repeats * 1e3


def serve(o: argparse.Namespace, names: list[str]) -> None:
    """A worker: for every request, times each of its contestants once."""
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, o.dtype)
    contestants = {name: layer.to(device) for name, layer in layers(o, names).items()}
    x = torch.randn(o.batch, o.length, IN, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(o.batch, o.length, OUT, device=device, dtype=dtype)
    for _ in peers.requests():
        peers.tell({k: milliseconds(v, x, grad, o.repeats) for k, v in contestants.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--r", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=10, help="passes per turn")
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.side:
        mine = ["frozen", "ours", "ours, stored (in, out)", "dense"]
        theirs = ["microsoft", "microsoft, stored (in, out)"]
        serve(o, mine if o.side == "ours" else theirs)
        return
    words: list[object] = []
    for name in ("dtype", "batch", "length", "r", "dropout", "repeats"):
        words += [f"--{name}", getattr(o, name)]
    sides = {"ours": None, "peer": PEER} if PEER.exists() else {"ours": None}
    workers = {
        side: peers.Worker("benchmarks.merged_linear", *words, "--side", side, peer=path)
        for side, path in sides.items()
    }
    turns = peers.in_turn(workers, o.rounds)
    rounds = [{k: v for times in turn.values() for k, v in times.items()} for turn in turns]
    frozen = [times["frozen"] for times in rounds]
    for name in rounds[0]:
        own = [times[name] for times in rounds]
        print(f"{name:30} {statistics.median(own):8.2f} ms   {ratio(own, frozen):5.2f} × frozen")


if __name__ == "__main__":
    main()
