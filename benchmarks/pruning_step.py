"""A training step of SPLoPA beside block fine-pruning's and LoRA's on the same six matrices.

    python -m benchmarks.pruning_step
    python -m benchmarks.pruning_step --memory

BERT-base shapes with random weights, a few layers of them, all tokens real, no dropout, fp32,
AdamW, pruning hooks attached and in mid-schedule (topK, half of the blocks), r 8 for LoRA, K 64 for
SPLoPA. Models take turns, step by step, on one thread; printed are CPU time in multiples of LoRA's
(median over the rounds), and the share of SPLoPA's step that goes into masks. With `--memory` every
model trains in a process of its own, whose peak resident memory is printed, less that of a process
that has built the model alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.common import devices
from benchmarks.common.timing import in_turn, ratio, seconds
from examples.training.memory import keep_freed_memory
from peft_custom import (
    BlockPruneConfig,
    LoraConfig,
    PeftModel,
    SplopaConfig,
    TrainingHooks,
    attach,
    get_peft_model,
)
from transformers_patched import BertConfig, BertForSequenceClassification

MATRICES = [
    "query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense",
]  # fmt: skip
SIDES = ("LoRA", "block_prune", "SPLoPA")
STEPS = 1000  # of the schedule


def adapted(side: str, o: argparse.Namespace) -> PeftModel:
    """The model of one side."""
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=o.layers, vocab_size=1000, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    shared = {"task_type": "SEQ_CLS", "target_modules": MATRICES}
    pruning = {
        **shared, "initial_threshold": o.density, "final_threshold": o.density,
        "pruning_method": o.method, "mask_init": "uniform", "mask_scale": 0.1,
        "mask_structure": o.structure,
    }  # fmt: skip
    configs = {
        "LoRA": partial(LoraConfig, **shared, r=8),
        "block_prune": partial(BlockPruneConfig, **pruning),
        "SPLoPA": partial(SplopaConfig, **pruning, num_prototypes=o.prototypes),
    }
    return (
        get_peft_model(BertForSequenceClassification(config), configs[side]()).train().to(o.device)
    )


def stepper(
    model: PeftModel, o: argparse.Namespace
) -> tuple[Callable[[], None], TrainingHooks | None]:
    """One training step, and the hooks that choose the masks."""
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-4, 0.0), 1e-4, fused=True)
    hooks = attach(model, optimizer, total_steps=STEPS)
    batch = devices.on(o.device, {
        "input_ids": torch.randint(5, 1000, (o.batch, o.length)),
        "labels": torch.arange(o.batch) % 2,
    })  # fmt: skip

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, next(iter(getattr(hooks, "parts", ())), None)


def compare(o: argparse.Namespace) -> dict[str, float]:
    """Steps in multiples of LoRA's."""
    made = {side: stepper(adapted(side, o), o) for side in SIDES}
    timed = {side: partial(seconds, step, o.device) for side, (step, _) in made.items()}
    timed["masks"] = partial(seconds, made["SPLoPA"][1].begin_step, o.device)
    found = in_turn(timed, o.rounds, warm_up=2)
    devices.print_peaks({side: step for side, (step, _) in made.items()}, o.device)
    result = {"lora_ms": round(1e3 * statistics.median(found["LoRA"]), 1)}
    for side in SIDES[1:]:
        result[side] = round(ratio(found[side], found["LoRA"]), 3)
    result["SPLoPA / block_prune"] = round(ratio(found["SPLoPA"], found["block_prune"]), 3)
    result["masks, share of SPLoPA"] = round(ratio(found["masks"], found["SPLoPA"]), 4)
    return result


def peak_memory(o: argparse.Namespace) -> dict[str, float]:
    """MiB that training adds to each model's process."""
    found = {}
    for side in SIDES:
        command = [sys.executable, "-m", "benchmarks.pruning_step", *sys.argv[1:], "--side", side]
        built, trained = (
            float(subprocess.run([*command, *more], check=True, capture_output=True).stdout)
            for more in (["--rounds", "0"], [])
        )
        found[f"{side}, built"] = round(built)
        found[f"{side}, training adds"] = round(trained - built)
    return found


def serve(o: argparse.Namespace) -> None:
    """Trains one model for some steps and prints its process's peak memory in MiB."""
    step, _ = stepper(adapted(o.side, o), o)
    for _ in range(o.rounds):
        step()
    print(2**10 * devices.peak_gib(o.device))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--prototypes", type=int, default=64)
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--method", default="topK")
    parser.add_argument("--structure", default="blocks")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", action="store_true", help="peak resident memory")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    devices.add_device(parser)
    o = parser.parse_args()
    o.device = devices.device_of(o)
    torch.set_num_threads(1)
    keep_freed_memory()
    if o.side:
        serve(o)
        return
    result = peak_memory(o) if o.memory else compare(o)
    options = {k: v for k, v in vars(o).items() if k not in ("memory", "side")}
    print(json.dumps({**options, **result}), flush=True)


if __name__ == "__main__":
    main()
