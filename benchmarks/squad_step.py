"""A LoRA training step on SQuAD's windows beside Transformers + PEFT, in one process tree.

    python -m benchmarks.squad_step --data_dir DATA --vocabulary DIR --size minilm --clock cpu
    python -m benchmarks.squad_step --random             # tokens, lengths much like SQuAD's

Work: real windows of at most 384 tokens of SQuAD's training set in random order, BERT's vocabulary,
question answering, LoRA r 8 on query and value, dropout 0.1, fp32, AdamW, random weights. Each side
runs in a worker process of its own; the workers take turns, round by round. "peer" pads a batch to
its longest row, "peer, 384" pads every row to 384 tokens, which is the default of Transformers'
example; both have the "sdpa" attention. Ours packs the tokens. Prints rows of a Markdown table:
real tokens per second and peak resident memory of all sides, medians over the rounds, and the
ratios of ours to each peer. On a machine with other work set OMP_NUM_THREADS=1 and `--clock cpu`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import devices, models, peers
from benchmarks.common.timing import ratio

LENGTH, LEARNING_RATE = 384, 1e-3
SIDES = ("ours", "peer", "peer, 384")

Windows = tuple[models.Tokens, np.ndarray]  # token lists, and first and last place (rows, 2)


def side(o: argparse.Namespace) -> tuple[Any, Callable[[models.Tokens], dict]]:
    """The side's adapted model, and what makes its inputs of a batch of token lists."""
    adapter = {"task_type": "QUESTION_ANS", "r": 8, "lora_alpha": 16}
    adapter["target_modules"] = ["query", "value"]
    if o.side == "ours":
        import peft_custom
        import transformers_patched as library

        return _adapted(library, peft_custom, o.size, adapter), models.packed
    import peft
    import transformers as library

    model = _adapted(library, peft, o.size, adapter, attn_implementation="sdpa")
    longest = LENGTH if o.side == "peer, 384" else 0
    return model, lambda batch: models.padded(batch, 0, longest)


def _adapted(library: Any, adapters: Any, size: str, adapter: dict, **options: Any) -> Any:
    config = library.BertConfig(**{**models.SIZES[size], **options})
    base = library.BertForQuestionAnswering(config)
    return adapters.get_peft_model(base, adapters.LoraConfig(**adapter))


def turns(o: argparse.Namespace) -> Iterator[list[Windows]]:
    """Every request's batches, new ones as in a run and the same on all sides."""
    return (random_windows(o, turn) for turn in peers.requests()) if o.random else real_windows(o)


def random_windows(o: argparse.Namespace, turn: int) -> list[Windows]:
    """A turn's batches of random tokens, whose lengths have the mean of SQuAD's, 172."""
    draw = np.random.default_rng([o.seed, turn])
    found = []
    for _ in range(o.steps):
        lengths = draw.gamma(4.0, 43.0, o.batch).astype(int).clip(16, LENGTH)
        rows = [draw.integers(999, models.SIZES[o.size]["vocab_size"], n).tolist() for n in lengths]
        found.append((rows, np.sort(draw.integers(0, lengths[:, None], (o.batch, 2)))))
    return found


def real_windows(o: argparse.Namespace) -> Iterator[list[Windows]]:
    """Of every request."""
    from examples.data.squad import read_squad
    from examples.data.squad_features import featurise
    from transformers_patched import BertTokenizer

    raw = read_squad(o.data_dir / "squad" / "train-v1.1.json")
    size = o.batch * o.steps
    count = size * (o.rounds + o.warm_up)
    draw = np.random.default_rng(o.seed)
    raw = raw.take(draw.permutation(len(raw))[:count].tolist())
    tokenizer = BertTokenizer.from_pretrained(o.vocabulary, do_lower_case=True)
    found = featurise(raw, tokenizer, cache=False)
    bounds, order = found.offsets, draw.permutation(len(found))[:count]
    for turn in peers.requests():
        rows = order[turn * size : (turn + 1) * size].reshape(o.steps, o.batch)
        yield [
            ([found.tokens[bounds[i] : bounds[i + 1]].tolist() for i in own], found.spans[own])
            for own in rows
        ]


def serve(o: argparse.Namespace) -> None:
    """A worker: for every request, takes a turn of training steps and answers."""

    def build(device: str) -> tuple[Any, Callable[[Windows], Any]]:
        import torch

        model, inputs = side(o)
        model.to(device)

        def loss(windows: Windows) -> Any:
            rows, spans = windows
            first, last = torch.from_numpy(spans.astype(np.int64)).unbind(1)
            given = {**inputs(rows), "start_positions": first, "end_positions": last}
            return model(**devices.on(device, given)).loss

        return model, loss

    def answers() -> Iterator[tuple[list, int, dict]]:
        for batches in turns(o):
            yield batches, sum(len(row) for rows, _ in batches for row in rows), {}

    peers.serve_steps(o, build, answers(), LEARNING_RATE)


def print_row(o: argparse.Namespace) -> None:
    """Lets the sides take turns and prints what they did."""
    words: list[object] = [*["--device", o.device] * bool(o.device), *["--random"] * o.random]
    if not o.random:
        words += ["--data_dir", o.data_dir, "--vocabulary", o.vocabulary]
    for name in ("size", "batch", "steps", "seed", "clock", "rounds", "warm_up"):
        words += [f"--{name}", getattr(o, name)]
    workers = peers.step_workers("benchmarks.squad_step", words, SIDES)
    rounds = peers.in_turn(workers, o.rounds, o.warm_up)
    speeds = {name: [turn[name]["tokens_per_second"] for turn in rounds] for name in SIDES}
    peak = {name: rounds[-1][name]["peak_gib"] for name in SIDES}
    for name in SIDES:
        print(
            f"| {o.size} | {o.batch} | {name} | {statistics.median(speeds[name]):,.0f} "
            f"| {ratio(speeds['ours'], speeds[name]):.2f}× | {peak[name]:.2f} "
            f"| {peak['ours'] / peak[name]:.2f}× |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, help="has squad/train-v1.1.json")
    parser.add_argument("--vocabulary", type=Path, help="has BERT's vocab.txt")
    parser.add_argument("--random", action="store_true", help="tokens, in place of the data")
    parser.add_argument("--size", choices=("minilm", "bert-base"), default="minilm")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--warm_up", type=int, default=1, help="rounds before them")
    parser.add_argument("--steps", type=int, default=2, help="training steps per round")
    parser.add_argument("--seed", type=int, default=0)
    devices.add_device(parser)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if not o.random and (o.data_dir is None or o.vocabulary is None):
        parser.error("--data_dir and --vocabulary are needed, or --random")
    if o.side:
        serve(o)
        return
    print("| size | batch | side | real tokens per second | ours is | peak GiB | ours has |")
    print("|---|---|---|---|---|---|---|", flush=True)
    print_row(o)


if __name__ == "__main__":
    main()
