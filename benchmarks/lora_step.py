"""One LoRA training step, this project beside the newest Transformers + PEFT, in one process tree.

    python -m benchmarks.lora_step --size roberta-base --batch 16 --dtype bfloat16
    python -m benchmarks.lora_step --all

Work: sequence classification, LoRA r 8 on query and value, the models' default dropout 0.1, AdamW,
batches of `--batch` sequences whose lengths are uniform on 25..89 (MRPC's), random weights. Each
side runs in a worker process of its own; the workers take turns, round by round, so that both meet
the same machine. The peer has its best attention ("sdpa"), dynamic padding and, for bfloat16,
autocast over fp32 weights; ours packs the tokens, keeps in memory what the runner keeps, and for
bfloat16 keeps the frozen weights in it. Prints a row of a Markdown table: real (non-padding) tokens
per second and peak resident memory of both sides, medians over the rounds, and the ratios. `--all`
prints the table of both sizes, dtypes and batches. On a machine with other work set
OMP_NUM_THREADS=1 and `--clock cpu`: seconds are then those that the process computed.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.common import devices, peers
from benchmarks.common.timing import ratio

SIZES = ("minilm", "roberta-base")
LEARNING_RATE = 1e-3


def side(o: argparse.Namespace) -> tuple[Any, Callable[[list], dict]]:
    """The side's adapted model, and what makes its inputs of a batch of token lists."""
    from benchmarks.common import models

    adapter = {"task_type": "SEQ_CLS", "r": 8, "lora_alpha": 16}
    adapter["target_modules"] = o.targets.split(",")
    if o.side == "ours":
        import peft_custom
        import transformers_patched

        base = models.classifier(transformers_patched, o.size)
        base = models.with_frozen_dtype(base, o.dtype)
        model = peft_custom.get_peft_model(base, peft_custom.LoraConfig(**adapter))
        return model, models.packed
    import peft
    import transformers

    base = models.classifier(transformers, o.size, attn_implementation="sdpa")
    pad = base.config.pad_token_id or 0
    model = peft.get_peft_model(base, peft.LoraConfig(**adapter))
    return model, lambda batch: models.padded(batch, pad)


def serve(o: argparse.Namespace) -> None:
    """A worker: for every request, takes a turn of training steps and answers."""
    from benchmarks.common.models import token_lists

    def build(device: str) -> tuple[Any, Callable[[list], Any]]:
        import torch

        model, inputs = side(o)
        model.to(device)
        if o.compile:
            model = torch.compile(model, dynamic=True)
        labels = torch.arange(o.batch, device=device) % 2
        bf16 = o.side == "peer" and o.dtype == "bfloat16"
        autocast = torch.autocast(device, torch.bfloat16, enabled=bf16)

        def loss(batch: list[list[int]]) -> Any:
            given = devices.on(device, inputs(batch))
            with autocast:
                return model(**given, labels=labels).loss

        return model, loss

    def turns() -> Iterator[tuple[list, int, dict]]:
        for turn in peers.requests():  # every turn's batches are new, as in a run
            batches = token_lists(o.size, o.batch, o.steps, [o.seed, turn])
            yield batches, sum(len(row) for batch in batches for row in batch), {}

    peers.serve_steps(o, build, turns(), LEARNING_RATE)


def measure(o: argparse.Namespace) -> dict:
    """Lets both sides take turns; medians over the rounds."""
    words: list[object] = ["--compile"] * o.compile + ["--device", o.device] * bool(o.device)
    for name in ("size", "batch", "dtype", "targets", "steps", "seed", "clock"):
        words += [f"--{name}", getattr(o, name)]
    workers = peers.step_workers("benchmarks.lora_step", words, ("ours", "peer"))
    rounds = peers.in_turn(workers, o.rounds)
    speeds = {side: [turn[side]["tokens_per_second"] for turn in rounds] for side in workers}
    return {
        "tokens": {side: statistics.median(found) for side, found in speeds.items()},
        "faster": ratio(speeds["ours"], speeds["peer"]),
        "peak": {side: rounds[-1][side]["peak_gib"] for side in workers},
    }


def print_row(o: argparse.Namespace) -> None:
    found = measure(o)
    tokens, peak = found["tokens"], found["peak"]
    print(
        f"| {o.size} | {o.batch} | {o.dtype} | {tokens['ours']:,.0f} | {tokens['peer']:,.0f} "
        f"| {found['faster']:.2f}× | {peak['ours']:.2f} / {peak['peer']:.2f} "
        f"| {peak['ours'] / peak['peer']:.2f}× |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="both sizes, dtypes and batches")
    parser.add_argument("--size", choices=SIZES, default="roberta-base")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--targets", default="query,value")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6, help="training steps per round")
    parser.add_argument("--seed", type=int, default=0)
    devices.add_device(parser)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.side:
        serve(o)
        return
    print("| model size | batch | dtype | ours | peer | speed | memory ours / peer, GiB | memory |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    if not o.all:
        print_row(o)
        return
    for size, dtype, batch in itertools.product(SIZES, ("bfloat16", "float32"), (16, 32)):
        case = {"size": size, "dtype": dtype, "batch": batch}
        print_row(argparse.Namespace(**{**vars(o), **case}))


if __name__ == "__main__":
    main()
