"""What LoRA's switches cost: DoRA's and Matryoshka's steps beside LoRA's, and PEFT's DoRA.

    python -m benchmarks.dora_step --layers 2 --batch 8 --length 64

A RoBERTa-base-size classifier of Transformers with random weights on all sides, r 8 on all six
linear maps of every layer, fp32, no dropout, AdamW. The sides take turns in one process; a figure
is the median over rounds of a side's time over that of LoRA here, in CPU time on a CPU.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.adapter_step import roberta, step
from benchmarks.common import devices, peers
from benchmarks.common.models import SIX_MAPS, full_rows
from benchmarks.common.timing import in_turn, ratio, seconds

SIDES: dict[str, tuple[str, str, dict[str, Any]]] = {  # side -> library, configuration, options
    "LoRA": ("peft_custom", "LoraConfig", {}),
    "DoRA": ("peft_custom", "LoraConfig", {"use_dora": True}),
    "Matryoshka": ("peft_custom", "DyLoraConfig", {"dylora_mode": "matryoshka"}),
    "PEFT's LoRA": ("peft", "LoraConfig", {}),
    "PEFT's DoRA": ("peft", "LoraConfig", {"use_dora": True}),
}


def build(side: str, layers: int) -> nn.Module:
    """The adapted model of one side."""
    library, config, options = SIDES[side]
    module = __import__(library)
    made = getattr(module, config)(
        task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=SIX_MAPS, **options
    )
    return module.get_peft_model(roberta(layers), made).train()


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
    device = devices.device_of(o)
    warnings.simplefilter("ignore")
    batch = devices.on(device, full_rows(o.batch, o.length))
    work = {}
    for side in [name for name in SIDES if SIDES[name][0] != "peft" or peers.importable()]:
        model = build(side, o.layers).to(device)
        parameters = [p for p in model.parameters() if p.requires_grad]
        work[side] = partial(step, model, batch, torch.optim.AdamW(parameters, lr=1e-4))
    found = in_turn({side: partial(seconds, run, device) for side, run in work.items()}, o.rounds)
    print(f"{o.layers} layers, {o.batch} × {o.length} tokens")
    for side, times in found.items():
        beside = ratio(times, found["LoRA"])
        print(f"{side:12}  {1e3 * statistics.median(times):9.1f} ms   {beside:.3f} × LoRA here")
    if "PEFT's DoRA" in found:
        theirs = ratio(found["PEFT's DoRA"], found["DoRA"])
        print(f"PEFT's DoRA over DoRA here: {theirs:.2f}")
    devices.print_peaks(work, device)


if __name__ == "__main__":
    main()
