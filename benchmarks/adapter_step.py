"""One LoRA training step on the same Hugging Face model: our adapters beside the newest PEFT's.

    python -m benchmarks.adapter_step --layers 12 --batch 8 --length 64

A RoBERTa-base-size classifier with random weights, r 8 on all six linear maps of every layer, fp32,
AdamW. Both sides share the model code, so the difference is the adapter layers alone. Prints, with
and without LoRA dropout: operators dispatched in forward and backward, MiB kept for backward (each
storage once, parameters left out), and milliseconds of a step, the two sides taking turns (fastest
and median round) with their ratio.
"""

from __future__ import annotations

import argparse
import importlib
import math
import statistics
import time
import warnings
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import devices, peers
from benchmarks.common.models import SIX_MAPS, classifier, full_rows
from benchmarks.common.timing import in_turn, seconds


class Counter(TorchDispatchMode):
    """Counts the operators that reach the backend."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def roberta(layers: int) -> nn.Module:
    """A Hugging Face RoBERTa-base (ours, where that is missing), random, no dropout."""
    library = importlib.import_module(
        "transformers" if peers.importable() else "transformers_patched"
    )
    torch.manual_seed(0)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return classifier(library, "roberta-base", num_hidden_layers=layers, **still)


def build(library: ModuleType, layers: int, dropout: float) -> nn.Module:
    """The adapted model of one side."""
    options = {"task_type": "SEQ_CLS", "r": 8, "lora_alpha": 16, "lora_dropout": dropout}
    config = library.LoraConfig(target_modules=SIX_MAPS, **options)
    return library.get_peft_model(roberta(layers), config).train()


def step(model: nn.Module, batch: dict[str, torch.Tensor], optimizer: Any) -> None:
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def kept_bytes(model: nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """Bytes that autograd holds between forward and backward."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    total = sum(seen.values())
    loss.backward()
    model.zero_grad()
    return total


def dispatched(model: nn.Module, batch: dict[str, torch.Tensor]) -> int:
    with Counter() as counter:
        model(**batch).loss.backward()
    model.zero_grad()
    return counter.count


def compare(o: argparse.Namespace, dropout: float) -> None:
    names = {"ours": "peft_custom", **({"PEFT": "peft"} if peers.importable() else {})}
    batch = devices.on(o.device, full_rows(o.batch, o.length))
    libraries = {side: importlib.import_module(name) for side, name in names.items()}
    sides = {
        name: build(library, o.layers, dropout).to(o.device) for name, library in libraries.items()
    }
    optimizers = {
        name: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-4)
        for name, m in sides.items()
    }

    work = {name: partial(step, sides[name], batch, optimizers[name]) for name in sides}

    def measure(name: str) -> float:
        return 1e3 * seconds(work[name], o.device, time.perf_counter)

    times = in_turn({name: partial(measure, name) for name in sides}, o.rounds)
    print(f"\nLoRA dropout {dropout}; {o.layers} layers, {o.batch} × {o.length} tokens")
    rows = {
        "operators, forward + backward": {n: dispatched(m, batch) for n, m in sides.items()},
        "MiB kept for backward": {n: kept_bytes(m, batch) / 2**20 for n, m in sides.items()},
        "ms per step, fastest": {n: min(t) for n, t in times.items()},
        "ms per step, median": {n: statistics.median(t) for n, t in times.items()},
    }
    for label, row in rows.items():
        peer = row.get("PEFT", math.nan)
        ratio = peer / row["ours"]
        print(f"{label:32} ours {row['ours']:9.1f}   PEFT {peer:9.1f}   ratio {ratio:.2f}")
    devices.print_peaks(work, o.device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    devices.add_device(parser)
    o = parser.parse_args()
    o.device = devices.device_of(o)
    warnings.simplefilter("ignore")
    for dropout in (0.0, 0.1):
        compare(o, dropout)


if __name__ == "__main__":
    main()
