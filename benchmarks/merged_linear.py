"""What a low-rank update of q and v costs on top of GPT-2's frozen q/k/v projection.

    python -m benchmarks.merged_linear                    # the fp32 row of the README
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
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PEER = Path(__file__).resolve().parent.parent / ".peers" / "loralib"
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
    for name, layer in made.items():
        layer.weight.data = layer.weight.data.to(o.dtype)
        layer.bias.data = layer.bias.data.to(o.dtype)
        for parameter in (layer.weight, layer.bias):
            parameter.requires_grad = False
        if name.startswith("microsoft"):
            layer.to(o.dtype)  # it multiplies all in one type
    return made


def milliseconds(layer: nn.Module, x: Tensor, grad: Tensor, repeats: int) -> float:
    """Mean time of one forward and backward pass."""
    started = time.perf_counter()
    for _ in range(repeats):
        x.grad = None
        for parameter in layer.parameters():
            parameter.grad = None
        layer(x).backward(grad)
    if x.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats * 1e3


def serve(o: argparse.Namespace, names: list[str]) -> None:
    """A worker: for every line on standard input, times each of its contestants once."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    contestants = {name: layer.to(device) for name, layer in layers(o, names).items()}
    x = torch.randn(o.batch, o.length, IN, device=device, dtype=o.dtype, requires_grad=True)
    grad = torch.randn(o.batch, o.length, OUT, device=device, dtype=o.dtype)
    for _ in sys.stdin:
        times = {k: milliseconds(v, x, grad, o.repeats) for k, v in contestants.items()}
        print(json.dumps(times), flush=True)


def start(peer: bool) -> subprocess.Popen:
    """A worker process with this command's options; the peer's finds the other `loralib` first."""
    command = "import sys; sys.path.insert(0, sys.argv.pop(1)); sys.path.append(sys.argv.pop(1));"
    command += "from benchmarks.merged_linear import main; main()"
    here = str(Path(__file__).resolve().parent.parent)
    paths = [str(PEER), here] if peer else [here, here]
    side = "peer" if peer else "ours"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", command, *paths, *sys.argv[1:], "--side", side],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


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
    o.dtype = getattr(torch, o.dtype)
    if o.side:
        mine = ["frozen", "ours", "ours, stored (in, out)", "dense"]
        theirs = ["microsoft", "microsoft, stored (in, out)"]
        serve(o, mine if o.side == "ours" else theirs)
        return
    workers = [start(peer) for peer in ((False, True) if PEER.exists() else (False,))]
    rounds: list[dict[str, float]] = []
    for _ in range(o.rounds + 2):
        times: dict[str, float] = {}
        for worker in workers:
            print("go", file=worker.stdin, flush=True)
            times |= json.loads(worker.stdout.readline())
        rounds.append(times)
    for worker in workers:
        worker.stdin.close()
        worker.wait()
    del rounds[:2]  # the first ones warm up
    for name in rounds[0]:
        middle = statistics.median(times[name] for times in rounds)
        ratio = statistics.median(times[name] / times["frozen"] for times in rounds)
        print(f"{name:30} {middle:8.2f} ms   {ratio:5.2f} × frozen")


if __name__ == "__main__":
    main()
