"""A LoRA training step of GPT-2 small on E2E, beside Transformers + PEFT, in one process tree.

    python -m benchmarks.gpt2_step --data_dir DATA --tokenizer DIR --batch 32 --clock cpu
    python -m benchmarks.gpt2_step --random              # tokens, of E2E's lengths

Work: real rows of E2E's training set in random order, loss on the completions alone, r 4 on the
query and value of c_attn (the peer: r 4 on c_attn, as many parameters), LoRA dropout 0.1 and no
other as in the recipe, fp32, AdamW, random weights. Each side runs in a worker process of its own;
the workers take turns, round by round. The peer has its "sdpa" attention and dynamic padding, and
forms logits at every place; ours packs the tokens and forms logits at the scored places. Prints a
row of a Markdown table: real tokens per second and peak resident memory of both sides, medians over
the rounds with their range, the ratios, and the bound: what leaving out padding and logits that
carry no loss gives by arithmetic, attention not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import devices, e2e, peers
from benchmarks.common.timing import ratio

HIDDEN, VOCABULARY = 768, 50257
LEARNING_RATE, RANK, ALPHA, DROPOUT = 2e-4, 4, 32, 0.1
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


def ours(o: argparse.Namespace) -> tuple[Any, Callable[[list[e2e.Row]], dict]]:
    """The adapted model, and what makes its inputs of rows."""
    import torch

    from benchmarks.common.models import packed
    from loralib import mark_only_lora_as_trainable
    from transformers_patched import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(
        n_layer=o.layers, apply_lora=True, lora_r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT,
        **NO_DROPOUT,
    ))  # fmt: skip
    mark_only_lora_as_trainable(model)

    def inputs(rows: list[e2e.Row]) -> dict:
        labels = [x for first, second in rows for x in [-100] * len(first) + second]
        return {**packed([a + b for a, b in rows]), "labels": torch.tensor(labels)}

    return model, inputs


def peer(o: argparse.Namespace) -> tuple[Any, Callable[[list[e2e.Row]], dict]]:
    import peft
    import torch
    import transformers

    from benchmarks.common.models import padded

    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_layer=o.layers, attn_implementation="sdpa", **NO_DROPOUT
    ))  # fmt: skip
    model = peft.get_peft_model(base, peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=["c_attn"],
        fan_in_fan_out=True, task_type="CAUSAL_LM",
    ))  # fmt: skip

    def inputs(rows: list[e2e.Row]) -> dict:
        given = padded([a + b for a, b in rows], e2e.EOS)
        labels = torch.full_like(given["input_ids"], -100)
        for label, (first, second) in zip(labels, rows, strict=True):
            label[len(first) : len(first) + len(second)] = torch.tensor(second)
        return {**given, "labels": labels, "use_cache": False}

    return model, inputs


SIDES = {"ours": ours, "peer": peer}


def serve(o: argparse.Namespace) -> None:
    """A worker: for every request, takes a turn of training steps and answers."""

    def build(device: str) -> tuple[Any, Callable[[list[e2e.Row]], Any]]:
        model, inputs = SIDES[o.side](o)
        model.to(device)
        return model, lambda rows: model(**devices.on(device, inputs(rows))).loss

    def answers() -> Iterator[tuple[list, int, dict]]:
        for batches in turns(o):
            tokens = sum(len(a) + len(b) for rows in batches for a, b in rows)
            yield batches, tokens, {"bound": bound(batches, o.layers)}

    peers.serve_steps(o, build, answers(), LEARNING_RATE, clip=False)


def turns(o: argparse.Namespace) -> Any:
    """Every request's batches, new ones as in a run and the same on both sides."""
    size = o.batch * o.steps
    count = size * (o.rounds + o.warm_up)
    rows = e2e.training_rows(o, count, o.seed)
    for turn in peers.requests():
        mine = rows[turn * size : (turn + 1) * size]
        yield [mine[i : i + o.batch] for i in range(0, size, o.batch)]


def bound(batches: list[list[e2e.Row]], layers: int) -> float:
    """Multiplications of the padded step over those of the packed one: weights and logits alone.

    Both pass twice, forward and to the inputs; frozen weights have no gradients.
    """
    body, head = 12 * layers * HIDDEN**2, HIDDEN * VOCABULARY  # per token, per logit row
    full = lean = 0
    for rows in batches:
        places = len(rows) * max(len(a) + len(b) for a, b in rows)
        full += places * (body + head)
        lean += sum(len(a) + len(b) for a, b in rows) * body + sum(len(b) for _, b in rows) * head
    return full / lean


def measure(o: argparse.Namespace) -> dict:
    """Lets both sides take turns; medians and ranges over the rounds."""
    words: list[object] = [*["--device", o.device] * bool(o.device), *e2e.words(o)]
    for name in ("batch", "layers", "steps", "seed", "clock", "rounds", "warm_up"):
        words += [f"--{name}", getattr(o, name)]
    workers = peers.step_workers("benchmarks.gpt2_step", words, SIDES)
    rounds = peers.in_turn(workers, o.rounds, o.warm_up)
    speeds = {side: [turn[side]["tokens_per_second"] for turn in rounds] for side in workers}
    each = [a / b for a, b in zip(speeds["ours"], speeds["peer"], strict=True)]
    return {
        "what": "gpt2_step", "batch": o.batch, "layers": o.layers, "steps": o.steps,
        "clock": o.clock, "trainable": rounds[-1]["ours"]["trainable"],
        "tokens_per_second": speeds, "faster": ratio(speeds["ours"], speeds["peer"]),
        "range": [min(each), max(each)],
        "bound": statistics.mean(turn["ours"]["bound"] for turn in rounds),
        "peak_gib": {side: rounds[-1][side]["peak_gib"] for side in workers},
    }  # fmt: skip


def print_row(found: dict) -> None:
    speed = {side: statistics.median(all) for side, all in found["tokens_per_second"].items()}
    peak, (low, high) = found["peak_gib"], found["range"]
    print(
        f"| {found['layers']} | {found['batch']} | {speed['ours']:,.0f} | {speed['peer']:,.0f} "
        f"| {found['faster']:.2f}× ({low:.2f}–{high:.2f}) | {found['bound']:.2f}× "
        f"| {peak['ours']:.2f} / {peak['peer']:.2f} | {peak['ours'] / peak['peer']:.2f}× |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    e2e.add_options(parser)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm_up", type=int, default=1, help="rounds that do not count")
    parser.add_argument("--steps", type=int, default=2, help="training steps per round")
    parser.add_argument("--seed", type=int, default=0)
    devices.add_device(parser)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--out", type=Path, help="append the figures to this file, a JSON line")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    o = parser.parse_args()
    e2e.check(parser, o)
    if o.side:
        serve(o)
        return
    print("| layers | batch | ours | peer | speed | bound | memory ours / peer, GiB | memory |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    found = measure(o)
    print_row(found)
    if o.out:
        with o.out.open("a") as file:
            print(json.dumps(found), file=file)


if __name__ == "__main__":
    main()
