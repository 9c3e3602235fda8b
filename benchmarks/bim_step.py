"""One BIM-LoRA training step beside plain LoRA's, and beside one that forms the masked increment.

    python -m benchmarks.bim_step --dtype float32 --block 16
    python -m benchmarks.bim_step --dtype bfloat16 --block 4 --dropout 0.1

RoBERTa-base shapes with random weights, r 16 on all six linear maps of every layer, AdamW, batches
of `--batch` sequences of MRPC's lengths (25 to 89), packed. All models are in one process and take
turns, step by step; seconds are CPU time on a CPU (two cores are rarely idle) and device time on a
GPU. Prints the ratio of every model's step to plain LoRA's (median over the rounds), the same for
one evaluation pass, merged too, and on a GPU the peak memory that a step adds.

    python -m benchmarks.bim_step --memory

trains each model alone in a process of its own instead, and prints the processes' peak resident
memory. As in the runner, glibc keeps large freed blocks.

    LoRA        y = x Wᵀ + s (x Aᵀ) Bᵀ
    BIM-LoRA    as this project computes it
    formed      ΔW = s·repeat(m)∘(B A) by autograd, then x Wᵀ + x ΔWᵀ, as the method was published
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import transformers_patched
from benchmarks.common import devices
from benchmarks.common.models import LONGEST, SHORTEST, classifier, with_frozen_dtype
from benchmarks.common.timing import in_turn, ratio, seconds
from examples.training.memory import keep_freed_memory
from peft_custom import BimLoraConfig, LoraConfig, get_peft_model
from peft_custom.tuners.bim_lora import BIMLoRALinear


def base(o: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": o.layers, "vocab_size": 1000}
    model = classifier(transformers_patched, "roberta-base", **sizes)
    return with_frozen_dtype(model, o.dtype).to(o.device)


def formed(layer: BIMLoRALinear) -> Callable[..., torch.Tensor]:
    """The straightforward forward pass: the mask is repeated and ΔW formed."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        f, weight = layer.factors(), layer.base_layer.weight
        m = torch.sigmoid(f.block_scores / f.temperature)
        m = m.repeat_interleave(f.block, 0).repeat_interleave(f.block, 1)
        delta = f.scaling * m[: layer.out_features, : layer.in_features] * (f.lora_B @ f.lora_A)
        seen = F.dropout(x, f.dropout, layer.training)
        return F.linear(x, weight, layer.base_layer.bias) + F.linear(seen, delta.to(x.dtype))

    return forward


def models(o: argparse.Namespace) -> dict[str, nn.Module]:
    """The contestants, or the one of `--side`."""
    shared = {
        "task_type": "SEQ_CLS", "r": o.r, "lora_alpha": 16, "lora_dropout": o.dropout,
        "target_modules": "all-linear",
    }  # fmt: skip

    def bim() -> nn.Module:
        config = BimLoraConfig(**shared, block_size=o.block, mask_init="constant")
        return get_peft_model(base(o), config)

    def naive() -> nn.Module:
        model = bim()
        for layer in model.modules():
            if isinstance(layer, BIMLoRALinear):
                layer.forward = formed(layer)
        return model

    makers = {
        "LoRA": lambda: get_peft_model(base(o), LoraConfig(**shared)),
        "BIM-LoRA": bim,
        "formed": naive,
    }
    return {name: make() for name, make in makers.items() if o.side in (None, name)}


def batch(o: argparse.Namespace, turn: int) -> dict[str, torch.Tensor | int]:
    draw = torch.Generator().manual_seed(turn)
    lengths = torch.randint(SHORTEST, LONGEST, (o.batch,), generator=draw)
    tokens = int(lengths.sum())
    return {
        "input_ids": torch.randint(5, 1000, (tokens,), generator=draw).to(o.device),
        "cu_seqlens": F.pad(lengths.cumsum(0), (1, 0)).int().to(o.device),
        "max_seqlen": int(lengths.max()),
        "labels": (torch.arange(o.batch) % 2).to(o.device),
    }


def stepper(model: nn.Module) -> Callable[[dict], None]:
    """One training step on a batch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4, fused=True)
    model.train()

    def step(given: dict) -> None:
        model(**given).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_memory(o: argparse.Namespace) -> dict[str, float]:
    """Each model's peak resident memory in GiB, and its ratio to LoRA's."""
    found: dict[str, float] = {}
    for side in ("LoRA", "BIM-LoRA", "formed"):
        command = [sys.executable, "-m", "benchmarks.bim_step", *sys.argv[1:], "--side", side]
        found[side] = float(subprocess.run(command, check=True, capture_output=True).stdout)
    ratios = {f"memory: {s}": round(found[s] / found["LoRA"], 3) for s in found if s != "LoRA"}
    return {"lora_gib": round(found["LoRA"], 3), **ratios}


def serve(o: argparse.Namespace) -> None:
    """Trains one model and prints its process's peak memory in GiB."""
    (model,) = models(o).values()
    step = stepper(model)
    for turn in range(o.rounds + 2):
        step(batch(o, turn))
    print(devices.peak_gib(o.device))


def training(o: argparse.Namespace, sides: dict[str, nn.Module]) -> dict[str, float]:
    """Steps in multiples of LoRA's, and on a GPU what they add to its memory."""
    steps = {name: stepper(model) for name, model in sides.items()}
    peaks: dict[str, int] = {}
    turns = dict.fromkeys(sides, 0)

    def measure(name: str) -> float:
        given = batch(o, turns[name])
        turns[name] += 1
        if o.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        took = seconds(lambda: steps[name](given), o.device)
        if o.device != "cpu":
            peaks[name] = torch.cuda.max_memory_allocated() - before
        return took

    found = in_turn({name: partial(measure, name) for name in sides}, o.rounds, warm_up=2)
    result = {"lora_ms": round(1e3 * statistics.median(found["LoRA"]), 2)}
    for name in ("BIM-LoRA", "formed"):
        result[f"step: {name}"] = round(ratio(found[name], found["LoRA"]), 3)
        if peaks:
            result[f"peak added: {name}"] = round(peaks[name] / peaks["LoRA"], 3)
    return result


def evaluation(o: argparse.Namespace, sides: dict[str, nn.Module]) -> dict[str, float]:
    """Passes without gradients in multiples of those of a model into which LoRA was merged."""
    for model in sides.values():
        model.eval()
    sides = {**sides, "LoRA": copy.deepcopy(sides["LoRA"]).merge_and_unload()}
    if o.dtype == "float32":
        sides["merged"] = copy.deepcopy(sides["BIM-LoRA"]).merge_and_unload()
    turns = dict.fromkeys(sides, 0)

    @torch.no_grad()
    def measure(name: str) -> float:
        given = batch(o, turns[name])
        turns[name] += 1
        return seconds(lambda: sides[name](**given), o.device)

    found = in_turn({name: partial(measure, name) for name in sides}, o.rounds, warm_up=2)
    return {
        f"evaluation over a plain model: {name}": round(ratio(found[name], found["LoRA"]), 3)
        for name in sides
        if name != "LoRA"
    }


def compare(o: argparse.Namespace) -> dict[str, float]:
    sides = models(o)
    return training(o, sides) | evaluation(o, sides)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    devices.add_device(parser)
    parser.add_argument("--memory", action="store_true", help="peak resident memory (CPU)")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    o = parser.parse_args()
    o.device = devices.device_of(o)
    keep_freed_memory()
    if o.side:
        serve(o)
        return
    result = peak_memory(o) if o.memory else compare(o)
    options = {k: v for k, v in vars(o).items() if k not in ("memory", "side")}
    print(json.dumps({**options, **result}), flush=True)


if __name__ == "__main__":
    main()
