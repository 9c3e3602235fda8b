"""What sampling and stepping cost without the model: IVON beside ivon-opt 0.1.3 and AdamW.

    python -m benchmarks.ivon_step                  # 2 threads
    OMP_NUM_THREADS=1 python -m benchmarks.ivon_step
    python -m benchmarks.ivon_step --device cuda

Work: the trainable parameters of AdaLoRA with r 12 on all 72 linear maps of RoBERTa-base and its
classifier, 220 tensors, 2.6 million numbers, fp32. A sample is one `sampled_params(train=True)` in
which gradients are given; a step follows. Gradients are given to AdamW as well. ivon-opt takes its
turns in a process of its own because it has our name, where
`pip install --no-deps --target .peers/ivon ivon-opt==0.1.3` was run. Prints milliseconds, of the
processor for one thread on a CPU and else of the clock, and how many times ours they are; the share
of drawing random numbers, which both sides do alike; and the operators dispatched, views apart. On
a GPU ours runs with host synchronisation forbidden.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import peers
from benchmarks.common.timing import ratio, seconds

PEER = peers.PEERS / "ivon"
R, HIDDEN, INNER = 12, 768, 3072
OPTIONS = {"lr": 0.1, "ess": 3668.0, "clip_radius": 1e-3, "weight_decay": 1e-8}


def shapes(modules: int) -> list[tuple[int, ...]]:
    """A, E, B of every module, six a layer, and the classification head."""
    found: list[tuple[int, ...]] = []
    maps = [(HIDDEN, HIDDEN)] * 4 + [(INNER, HIDDEN), (HIDDEN, INNER)]
    for i in range(modules):
        rows, columns = maps[i % 6]
        found += [(R, columns), (R, 1), (rows, R)]
    return [*found, (HIDDEN, HIDDEN), (HIDDEN,), (2, HIDDEN), (2,)]


def parameters(modules: int, device: str) -> tuple[list[nn.Parameter], list[Tensor]]:
    made = [torch.randn(shape, device=device) for shape in shapes(modules)]
    return [nn.Parameter(0.02 * t) for t in made], [1e-3 * t for t in made]


def give(params: list[nn.Parameter], gradients: list[Tensor]) -> None:
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = gradient


def contestants(side: str, modules: int, device: str) -> dict[str, Callable[[], None]]:
    """What is timed, in order: a step must follow its sample."""
    import ivon

    params, gradients = parameters(modules, device)
    optimizer: Any = ivon.IVON(params, **OPTIONS)

    def sample() -> None:
        with optimizer.sampled_params(train=True):
            give(params, gradients)

    found: dict[str, Callable[[], None]] = {
        f"{side}: sample": sample,
        f"{side}: step": lambda: optimizer.step(),
    }
    if side == "ours":
        numbers = sum(p.numel() for p in params)
        found["randn"] = lambda: torch.randn(numbers, device=device)
        for name in ("fused", "foreach"):
            others, theirs = parameters(modules, device)
            give(others, theirs)
            adamw = torch.optim.AdamW(others, lr=1e-4, **{name: True})
            found[f"AdamW, {name}"] = lambda adamw=adamw: adamw.step()
    return found


class Count(TorchDispatchMode):
    """Counts dispatched operators that compute something."""

    VIEWS = ("detach", "view", "split", "slice", "reshape", "alias", "unsqueeze", "select")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += not any(view in name for view in self.VIEWS)
        return func(*args, **(kwargs or {}))


def operators(side: str, modules: int, device: str) -> dict[str, int]:
    made = contestants(side, modules, device)
    pair = {name: made[name] for name in (f"{side}: sample", f"{side}: step")}
    for run in pair.values():  # the first time builds what is kept
        run()
    counts = {}
    for name, run in pair.items():
        with Count() as count:
            run()
        counts[name] = count.count
    return counts


def milliseconds(run: Callable[[], None], device: str) -> float:
    alone = device == "cpu" and torch.get_num_threads() == 1
    return 1e3 * seconds(run, device, time.process_time if alone else time.perf_counter)


def serve(o: argparse.Namespace) -> None:
    """A worker: first its operator counts, then times for every request."""
    few, many = (operators(o.side, n, o.device) for n in (o.modules // 6, o.modules))
    peers.tell({name: [few[name], many[name]] for name in many})
    made = contestants(o.side, o.modules, o.device)
    if o.device != "cpu" and o.side == "ours":
        for run in made.values():
            run()
        torch.cuda.set_sync_debug_mode("error")
        made["ours: sample"]()
        made["ours: step"]()
        torch.cuda.set_sync_debug_mode("default")
    for _ in peers.requests():
        times: dict[str, float] = dict.fromkeys(made, 0.0)
        for _ in range(o.repeats):
            for name, run in made.items():
                times[name] += milliseconds(run, o.device) / o.repeats
        peers.tell(times)


def report(rounds: list[dict[str, float]], counts: dict[str, list[int]], blocks: int) -> None:
    sides = [side for side in ("ours", "ivon-opt") if f"{side}: step" in rounds[0]]
    for times in rounds:
        for side in sides:
            times[f"{side}: both"] = times[f"{side}: sample"] + times[f"{side}: step"]
            times[f"{side}: both, randn apart"] = times[f"{side}: both"] - times["randn"]
    print(f"{'':28} fastest  median   × ours: both (median of ratios)")
    for name in sorted(rounds[0], key=lambda name: name.split(":")[0] not in sides):
        found = [times[name] for times in rounds]
        times_ours = ratio(found, [times["ours: both"] for times in rounds])
        print(f"{name:28} {min(found):7.2f} {statistics.median(found):7.2f}   {times_ours:5.2f}")
    if len(sides) == 2:
        apart = [t["ivon-opt: both, randn apart"] / t["ours: both, randn apart"] for t in rounds]
        print(f"ivon-opt/ours, randn apart: {statistics.median(apart):.2f}")
    share = statistics.median(times["randn"] / times["ours: both"] for times in rounds)
    print(f"randn is {share:.0%} of ours")
    for name, (few, many) in counts.items():
        print(f"{name}: {many} operators; {few} for a sixth of the modules")
    print(f"ours works in {blocks} blocks (a CPU's caches); one block on a GPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--modules", type=int, default=72)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=5, help="samples and steps per turn")
    parser.add_argument("--side", choices=("ours", "ivon-opt"), help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.side:
        serve(o)
        return
    from ivon.flat import BLOCK

    words = ["--device", o.device, "--modules", o.modules, "--repeats", o.repeats]
    sides = {"ours": None, "ivon-opt": PEER} if PEER.exists() else {"ours": None}
    workers = {
        side: peers.Worker("benchmarks.ivon_step", *words, "--side", side, peer=path)
        for side, path in sides.items()
    }
    counts = {name: found for w in workers.values() for name, found in w.answer().items()}
    turns = peers.in_turn(workers, o.rounds)
    rounds = [{k: v for times in turn.values() for k, v in times.items()} for turn in turns]
    numbers = sum(math.prod(shape) for shape in shapes(o.modules))
    block = BLOCK * torch.get_num_threads() if o.device == "cpu" else numbers
    report(rounds, counts, math.ceil(numbers / block))


if __name__ == "__main__":
    main()
