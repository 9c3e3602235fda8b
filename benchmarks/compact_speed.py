"""Encoder time of compacted models beside the dense one, under random masks of heads and units.

    python -m benchmarks.compact_speed --size minilm
    python -m benchmarks.compact_speed --size bert-base --batch 1 8 --rounds 3
    python -m benchmarks.compact_speed --structure blocks --batch 8

A random model for question answering is given `splora` adapters with linked masks: every layer
keeps the same share of its heads and units (`even`), or the first layers keep more than the last
(`uneven`, by one ranking over the model), as training leaves it. `compact()` makes a model of it.
Encoders take turns, batch by batch, all tokens real, one thread, CPU time; printed is dense over
compacted, the median over the rounds. In the same call the logits of the compacted and the masked
model are compared, and the sizes of the saved files: `density` is the share of the encoder's
weights that is left, `encoder_file` that of its bytes in the file, `file` that of the whole file,
embeddings included (zero blocks are in it). `--structure blocks` masks blocks of 32 × 32 at random
places, so that hardly anything can be removed. `--masked` times the masked model of density 0.5
too, still in full size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.common import devices
from benchmarks.common.timing import in_turn, ratio, seconds
from examples.training.memory import keep_freed_memory
from peft_custom import PeftModel, SploraConfig, get_peft_model
from transformers_patched import BertConfig, BertForQuestionAnswering
from transformers_patched.layout import SequenceLayout

SIZES = {"minilm": (384, 6, 12, 1536), "bert-base": (768, 12, 12, 3072)}
DENSITIES = (0.5, 0.3, 0.1)
VOCABULARY = 30522


def base(size: str) -> nn.Module:
    """A random model whose biases are random too, so that they have to be folded."""
    torch.manual_seed(0)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    config = BertConfig(vocab_size=VOCABULARY, **dict(zip(names, SIZES[size], strict=True)))
    model = BertForQuestionAnswering(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.02)
    return model


def masked(size: str, density: float, spread: str, structure: str, device: str) -> PeftModel:
    """The model under random masks."""
    uneven = spread == "uneven"
    config = SploraConfig(
        task_type="QUESTION_ANS", r=8, init_range=0.02, final_threshold=density,
        mask_init="uniform", mask_scale=1.0, global_topk=uneven, mask_structure=structure,
    )  # fmt: skip
    model = get_peft_model(base(size), config).eval().to(device)
    if uneven:
        layers = SIZES[size][1]
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("mask_scores"):
                    layer = int(name.partition("layer.")[2].partition(".")[0])
                    p += 1.0 - 2.0 * layer / (layers - 1)  # U(-1, 1) moved by 1 to -1
    return model


def ids(batch: int, length: int) -> Tensor:
    draw = torch.Generator().manual_seed(batch * length)
    return torch.randint(5, VOCABULARY, (batch, length), generator=draw)


@torch.no_grad()
def difference(model: nn.Module, other: nn.Module) -> float:
    """Largest difference of two models' logits on 4 rows of 96 tokens."""
    given = ids(4, 96).to(next(model.parameters()).device)
    one, two = (m(given) for m in (model, other))
    parts = ("start_logits", "end_logits")
    return max(float((getattr(one, p) - getattr(two, p)).abs().max()) for p in parts)


def file_bytes(model: nn.Module) -> int:
    """Size of the saved weights."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return (Path(folder) / "model.safetensors").stat().st_size


def compacted(o: argparse.Namespace, spread: str, dense: nn.Module) -> dict[str, nn.Module]:
    """Encoders to time; prints how far the compacted models are from what they came from."""
    encoders = {"dense": dense.bert.encoder}
    whole = file_bytes(dense)
    elsewhere = whole - 4 * sum(p.numel() for p in dense.bert.encoder.parameters())
    for density in DENSITIES:
        model = masked(o.size, density, spread, o.structure, o.device)
        small = model.compact()
        left, bytes_left = model.pruning_summary()["density"], file_bytes(small)
        found = {
            "size": o.size, "structure": o.structure, "spread": spread, "asked": density,
            "density": round(left, 4),
            "encoder_file": round((bytes_left - elsewhere) / (whole - elsewhere), 4),
            "file": round(bytes_left / whole, 4), "logits": difference(model, small),
            "layer_shapes": small.config.layer_shapes,
        }  # fmt: skip
        print(json.dumps(found), flush=True)
        encoders[str(density)] = small.bert.encoder
        if o.masked and density == 0.5:
            encoders["masked"] = model.get_base_model().bert.encoder
    return encoders


def measure(
    encoders: dict[str, nn.Module], width: int, batch: int, length: int, rounds: int, device: str
) -> dict[str, float]:
    """Dense over compacted encoder time."""
    hidden = torch.randn(batch, length, width).to(device)
    layout = SequenceLayout.padded(None, batch, length, hidden.device)

    @torch.no_grad()
    def once(name: str) -> None:
        encoders[name](hidden, layout, False, False, False)

    work = {name: partial(once, name) for name in encoders}
    found = in_turn({name: partial(seconds, run, device) for name, run in work.items()}, rounds)
    devices.print_peaks(work, device)
    ratios = {n: round(ratio(found["dense"], t), 2) for n, t in found.items() if n != "dense"}
    return {"dense_ms": round(1e3 * statistics.median(found["dense"]), 1), **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="minilm")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--length", type=int, nargs="+", default=[128, 384])
    parser.add_argument("--spread", choices=("even", "uneven"), nargs="+", default=["even"])
    parser.add_argument("--structure", choices=("linked", "blocks", "hybrid"), default="linked")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--masked", action="store_true", help="time a masked model too")
    devices.add_device(parser)
    o = parser.parse_args()
    o.device = devices.device_of(o)
    torch.set_num_threads(1)
    keep_freed_memory()
    dense = base(o.size).to(o.device)
    for spread in o.spread:
        encoders = compacted(o, spread, dense)
        for batch in o.batch:
            for length in o.length:
                found = measure(encoders, SIZES[o.size][0], batch, length, o.rounds, o.device)
                row = {"size": o.size, "structure": o.structure, "spread": spread}
                row |= {"batch": batch, "length": length}
                print(json.dumps(row | found), flush=True)


if __name__ == "__main__":
    main()
