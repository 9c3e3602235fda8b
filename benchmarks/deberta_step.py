"""A LoRA step of DeBERTa-v3-small's shape beside Transformers with PEFT: seconds, and ratios.

    python -m benchmarks.deberta_step [--longest 128] [--batch 16] [--dtype bfloat16] [--rounds 3]
    python -m benchmarks.deberta_step --layers 12        # DeBERTa-v3-base's shape

Forward and backward in training mode with the model's own dropout, LoRA (r 8) on all linear layers,
random weights, sequences of a third of the longest to the longest. The peer gets them padded; ours
padded and packed. All take turns in one process on one thread, and the fastest round counts.
"""

from __future__ import annotations

import argparse
import math
from functools import partial

import torch
from torch import nn

import peft_custom
import transformers_patched as ours
from benchmarks.common import devices, peers
from benchmarks.common.timing import in_turn, seconds
from benchmarks.packed_batch import padded_and_packed

SHAPE = {
    "vocab_size": 128100, "hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12,
    "intermediate_size": 3072, "relative_attention": True, "position_buckets": 256,
    "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
}  # fmt: skip
LORA = {
    "task_type": "SEQ_CLS",
    "r": 8,
    "target_modules": ["query_proj", "key_proj", "value_proj", "dense"],
}


def models(dtype: torch.dtype, layers: int) -> tuple[nn.Module | None, nn.Module]:
    """The peer's, if it is there, and ours, with the same frozen weights in `dtype`."""
    shape, theirs = {**SHAPE, "num_hidden_layers": layers}, None
    mine = ours.DebertaV2ForSequenceClassification(ours.DebertaV2Config(**shape))
    if peers.importable():
        import peft
        import transformers as hf

        theirs = hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**shape))
        mine.load_state_dict(theirs.state_dict())
        theirs = peft.get_peft_model(theirs.to(dtype), peft.LoraConfig(**LORA)).to(dtype).train()
    mine = peft_custom.get_peft_model(mine.to(dtype), peft_custom.LoraConfig(**LORA)).train()
    for parameter in mine.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # trained weights are always fp32 here
    return theirs, mine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--longest", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6)
    devices.add_device(parser)
    options = parser.parse_args()
    device = devices.device_of(options)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lengths = torch.randint(options.longest // 3, options.longest, (options.batch,)).tolist()
    lengths[0] = options.longest
    batch = padded_and_packed([torch.randint(5, 128000, (n,)).tolist() for n in lengths])
    batch = {form: devices.on(device, given) for form, given in batch.items()}
    theirs, mine = models(getattr(torch, options.dtype), options.layers)

    def step(model: nn.Module, form: str) -> None:
        model(**batch[form]).loss.backward()
        model.zero_grad()

    sides = {"peer": (theirs, "padded"), "padded": (mine, "padded"), "packed": (mine, "packed")}
    work = {
        name: partial(step, model.to(device), form)
        for name, (model, form) in sides.items()
        if model is not None
    }
    times = in_turn(
        {name: partial(seconds, run, device) for name, run in work.items()}, options.rounds
    )
    best = {name: min(own) for name, own in times.items()}
    for name, own in best.items():
        took = f"{own:6.2f} CPU s" if device == "cpu" else f"{1e3 * own:7.2f} ms"
        print(f"{name:7} {took}  {best.get('peer', math.nan) / own:5.2f}x")
    devices.print_peaks(work, device)


if __name__ == "__main__":
    main()
