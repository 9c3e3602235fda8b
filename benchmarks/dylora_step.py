"""What nested ranks cost: a DyLoRA step beside a LoRA step at r = R, and 8 ranks beside one.

    python -m benchmarks.dylora_step --size roberta-base --batch 16 --dtype bfloat16

Sequence classification, R = 8 on query and value, the models' dropout 0.1, fused AdamW, packed
batches of `--batch` sequences of 25 to 89 tokens, random weights. All sides live in one process and
take turns on the same batches; a side's figure is the median over rounds of its time divided by
LoRA's in the same round (CPU time on a CPU, which neighbours disturb less, else wall-clock time).

    normal, frozen    DyLoRA by its options, ranks uniform on 1 … 8
    at R              DyLoRA that always draws R
    dense             frozen, but the optimiser may move rows that a step does not train
    eval              8 ranks of every row, in multiples of one rank: stacked in passes of as many
                      rows as the one rank's (as the runner does it), stacked in one pass, in turn
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import transformers_patched
from benchmarks.common import devices
from benchmarks.common.models import SIZES, classifier, packed, token_lists, with_frozen_dtype
from benchmarks.common.timing import in_turn, ratio, seconds
from examples.training import memory
from peft_custom import DyLoraConfig, LoraConfig, attach, get_peft_model

R = 8
SIDES: dict[str, dict[str, Any] | None] = {
    "lora": None,
    "normal": {},
    "frozen": {"dylora_mode": "frozen"},
    "dense": {"dylora_mode": "frozen", "dylora_dense": True},
    "at R": {"r_min": R},
}


def build(o: argparse.Namespace, options: dict[str, Any] | None) -> nn.Module:
    """The adapted model of one side; None is plain LoRA."""
    torch.manual_seed(o.seed)
    base = with_frozen_dtype(classifier(transformers_patched, o.size), o.dtype)
    common = {"task_type": "SEQ_CLS", "r": R, "target_modules": ["query", "value"]}
    made = LoraConfig(**common) if options is None else DyLoraConfig(**common, **options)
    return get_peft_model(base, made).to(o.device)


def trained(o: argparse.Namespace, model: nn.Module, data: list[dict]) -> Callable[[], None]:
    """A function that takes one step on every batch."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    attach(model, optimizer, total_steps=10**6, seed=o.seed)
    labels = torch.arange(o.batch, device=o.device) % 2

    def work() -> None:
        for given in data:
            model(**given, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return work


def evaluated(o: argparse.Namespace, work_list: list[list]) -> dict[str, Callable[[], None]]:
    """Functions that predict every batch at one rank, and at 8 in the three ways."""
    model = build(o, {}).eval()
    one, large = ([packed(b, copies, o.device) for b in work_list] for copies in (1, R))
    share = max(1, o.batch // R)
    small = [
        packed(b[at : at + share], R, o.device) for b in work_list for at in range(0, len(b), share)
    ]

    @torch.inference_mode()
    def single(rank: int = R) -> None:
        with model.at_rank(rank):
            for given in one:
                model(**given)

    @torch.inference_mode()
    def stacked(data: list[dict]) -> None:
        with model.batched_ranks(range(1, R + 1)):
            for given in data:
                model(**given)

    return {
        "one": single,
        "stacked": lambda: stacked(small),
        "in one pass": lambda: stacked(large),
        "in turn": lambda: [single(rank) for rank in range(1, R + 1)],
    }


def compare(sides: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, Any]:
    """Median seconds of the first side, and every other side's time in multiples of it."""
    found = in_turn(
        {name: lambda work=work: seconds(work, device) for name, work in sides.items()},
        rounds,
        warm_up=2,
    )
    devices.print_peaks(sides, device)
    first, *others = sides
    return {
        f"{first}, s": round(statistics.median(found[first]), 4),
        **{name: round(ratio(found[name], found[first]), 3) for name in others},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="roberta-base")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="batches per round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sides", nargs="+", choices=[*SIDES, "eval"], default=[*SIDES, "eval"])
    devices.add_device(parser)
    o = parser.parse_args()
    o.device = devices.device_of(o)
    memory.keep_compiled_kernels()  # what every run keeps in memory
    memory.keep_freed_memory()
    work_list = token_lists(o.size, o.batch, o.steps, [o.seed, 0])
    print(json.dumps({name: getattr(o, name) for name in ("size", "batch", "dtype", "device")}))
    data = [packed(batch, 1, o.device) for batch in work_list]
    chosen = {name: SIDES[name] for name in SIDES if name in o.sides}
    if len(chosen) > 1:
        sides = {name: trained(o, build(o, how), data) for name, how in chosen.items()}
        print("training", json.dumps(compare(sides, o.rounds, o.device)))
    if "eval" in o.sides:
        print("evaluation", json.dumps(compare(evaluated(o, work_list), o.rounds, o.device)))


if __name__ == "__main__":
    main()
