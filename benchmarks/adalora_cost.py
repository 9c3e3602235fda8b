"""What adaptive ranks cost per step: AdaLoRA here beside PEFT 0.11.1, and beside plain LoRA.

    python -m benchmarks.adalora_cost                     # PEFT 0.11.1 expected in .peers/peft011
    python -m benchmarks.adalora_cost --part step         # AdaLoRA's step over LoRA's, ours

Part `adapt`: the adapters of a RoBERTa-base (72 matrices: 48 of 768×768, 12 of 3072×768, 12 of
768×3072, rank 12), no model around them. Per step the regulariser with its gradient, the
sensitivity's averages and a cut. Each side in a process of its own, taking turns, in CPU time;
PEFT's as `tests/golden/make_peft011.py` installs it. Then the number of tensor operators of ours,
views left out, for 72 and for 36 matrices, and those that wait for the device.

Part `step`: one training step of a RoBERTa-base-size classifier with AdaLoRA (a cut at every step)
and with LoRA on the same six linear maps of every layer, same rank; they take turns.
"""

from __future__ import annotations

import argparse
import statistics
import types
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.adapter_step import Counter, roberta, step
from benchmarks.common import devices, peers
from benchmarks.common.models import SIX_MAPS, full_rows
from benchmarks.common.timing import in_turn, ratio, seconds

OLD = peers.PEERS / "peft011"
SYNCS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "unique")
RANK = 12
UNIT = {"cpu": "CPU ms", "cuda": "ms"}


class Maps(nn.Module):
    """The linear maps of a RoBERTa-base's layers, without a forward pass."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(model_type="maps", to_dict=lambda: {})
        shapes = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]
        self.maps = nn.ModuleList(nn.Linear(*shape) for _ in range(layers) for shape in shapes)

    def forward(self) -> Any:
        return types.SimpleNamespace(loss=torch.zeros((), requires_grad=True) * 1.0)


def adapted(library: types.ModuleType, layers: int) -> nn.Module:
    """The maps with fresh adapters that have gradients."""
    torch.manual_seed(0)
    config = library.AdaLoraConfig(
        target_modules=[f"maps.{i}" for i in range(6 * layers)],
        init_r=RANK, target_r=RANK // 2, tinit=0, tfinal=1, deltaT=1, total_step=100_000,
        task_type="FEATURE_EXTRACTION",
    )  # fmt: skip
    model = library.get_peft_model(Maps(layers), config).train()
    for p in model.parameters():
        if p.requires_grad:
            p.grad = 1e-3 * torch.randn_like(p)
    return model


def ours(layers: int = 12) -> Callable[[], None]:
    """One step's hooks."""
    import peft_custom

    model = adapted(peft_custom, layers)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    hooks = peft_custom.attach(model, optimizer, total_steps=100_000)

    def once() -> None:
        hooks.before_step()
        hooks.after_step()

    once.model = model  # type: ignore[attr-defined]  # keeps what the hooks refer to alive
    return once


def theirs(layers: int = 12) -> Callable[[], None]:
    """The regulariser in PEFT's forward, its backward pass, and the allocation."""
    import peft

    tuner = adapted(peft, layers).base_model
    t = iter(range(1, 100_000))

    def once() -> None:
        tuner().loss.backward()
        tuner.update_and_allocate(next(t))

    return once


def milliseconds(once: Callable[[], None], n: int = 1, device: str = "cpu") -> float:
    """Milliseconds of a call, mean of n: of the processor, or on a GPU of the clock."""
    return 1e3 * seconds(lambda: [once() for _ in range(n)], device) / n


def serve(side: str, n: int) -> None:
    """A side's process: measures at every request."""
    once = {"ours": ours, "PEFT 0.11.1": theirs}[side]()
    milliseconds(once, 3)
    peers.tell("ready")
    for _ in peers.requests():
        peers.tell(milliseconds(once, n))


def compare_adapting(o: argparse.Namespace) -> None:
    sides = {"ours": None, "PEFT 0.11.1": OLD} if OLD.is_dir() else {"ours": None}
    workers = {}
    for side, path in sides.items():
        words = ["--worker", side, "--steps", o.steps]
        workers[side] = peers.Worker("benchmarks.adalora_cost", *words, peer=path)
        assert workers[side].answer() == "ready"
    rounds = peers.in_turn(workers, o.rounds, warm_up=0)
    times = {side: [turn[side] for turn in rounds] for side in sides}
    print(f"regulariser + sensitivity + cut, {torch.get_num_threads()} thread(s), CPU ms per step")
    show(times)
    if len(sides) > 1:
        a, b = times.values()
        middle = statistics.median(b) / statistics.median(a)
        print(f"  ratio {middle:.2f} (medians), {min(b) / min(a):.2f}")
    for layers in (12, 6):
        names = operators(ours(layers))
        waits = [name for name in names if any(s in name for s in SYNCS)]
        print(f"  operators of ours, {6 * layers} matrices: {len(names)}; waiting: {len(waits)}")


def show(times: dict[str, list[float]]) -> None:
    for side, values in times.items():
        print(f"  {side:12} fastest {min(values):7.2f}   median {statistics.median(values):7.2f}")


class Names(Counter):
    """The operators that do something, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operators(once: Callable[[], None]) -> list[str]:
    """Names of the operators of one call."""
    once()
    with Names() as names:
        once()
    return names.names


def compare_steps(o: argparse.Namespace) -> None:
    import peft_custom

    device = devices.device_of(o)
    shared = {"task_type": "SEQ_CLS", "target_modules": SIX_MAPS, "lora_alpha": 16}
    configs = {
        "LoRA": peft_custom.LoraConfig(r=RANK, **shared),
        "AdaLoRA": peft_custom.AdaLoraConfig(init_r=RANK, target_r=6, tfinal=1, **shared),
    }
    sides = {
        name: peft_custom.get_peft_model(roberta(o.layers), config).train().to(device)
        for name, config in configs.items()
    }
    optimizers = {
        name: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-4, fused=True)
        for name, m in sides.items()
    }
    for name, model in sides.items():
        peft_custom.attach(model, optimizers[name], total_steps=100_000)
    batch = devices.on(device, full_rows(o.batch, o.length))
    work = {name: partial(step, sides[name], batch, optimizers[name]) for name in sides}

    def measure(name: str) -> float:
        return milliseconds(work[name], device=device)

    times = in_turn({name: partial(measure, name) for name in sides}, o.rounds)
    print(f"\na training step, {o.layers} layers, {o.batch} × {o.length} tokens", end="")
    print(f", r {RANK}, {UNIT[device]}")
    show(times)
    fastest = min(times["AdaLoRA"]) / min(times["LoRA"])
    middle = ratio(times["AdaLoRA"], times["LoRA"])
    print(f"  ratio {middle:.3f} (median of pairs), {fastest:.3f} (fastest)")
    devices.print_peaks(work, device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=["adapt", "step"])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20, help="steps per turn of part adapt")
    devices.add_device(parser)  # of part step
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    o = parser.parse_args()
    warnings.simplefilter("ignore")
    if o.worker:
        serve(o.worker, o.steps)
        return
    if o.part != "step":
        compare_adapting(o)
    if o.part != "adapt":
        compare_steps(o)


if __name__ == "__main__":
    main()
