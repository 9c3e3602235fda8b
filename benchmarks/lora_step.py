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
import json
import statistics
import subprocess
import sys
import time

SIZES = {
    "minilm": {
        "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
        "intermediate_size": 1536, "vocab_size": 30522,
    },
    "roberta-base": {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "vocab_size": 50265, "max_position_embeddings": 514,
        "type_vocab_size": 1, "pad_token_id": 1,
    },
}  # fmt: skip
SHORTEST, LONGEST = 25, 90
WARM_UP = 2  # rounds
LEARNING_RATE = 1e-3


def batches(o: argparse.Namespace, turn: int) -> list[list]:
    """The batches of a turn as token lists without padding; every turn's are new, as in a run."""
    import numpy as np

    draw = np.random.default_rng([o.seed, turn])
    vocabulary = SIZES[o.size]["vocab_size"]
    return [
        [
            draw.integers(5, vocabulary, size=draw.integers(SHORTEST, LONGEST)).tolist()
            for _ in range(o.batch)
        ]
        for _ in range(o.steps)
    ]


def our_side(o: argparse.Namespace):
    """The model, and what makes its inputs of a batch."""
    import torch

    import transformers_patched as patched
    from peft_custom import LoraConfig, get_peft_model

    kind = "Bert" if o.size == "minilm" else "Roberta"
    config = getattr(patched, f"{kind}Config")(**SIZES[o.size])
    model = getattr(patched, f"{kind}ForSequenceClassification")(config)
    if o.dtype == "bfloat16":
        model.to(torch.bfloat16)
        model.classifier.float()
    targets = o.targets.split(",")
    model = get_peft_model(
        model, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=targets)
    )

    def inputs(batch: list[list[int]]) -> dict:
        lengths = torch.tensor([0] + [len(row) for row in batch])
        return {
            "input_ids": torch.tensor([token for row in batch for token in row]),
            "cu_seqlens": lengths.cumsum(0).int(),
            "max_seqlen": int(lengths.max()),
        }

    return model, inputs


def peer_side(o: argparse.Namespace):
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    kind = "Bert" if o.size == "minilm" else "Roberta"
    config = getattr(transformers, f"{kind}Config")(**SIZES[o.size], attn_implementation="sdpa")
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    targets = o.targets.split(",")
    model = get_peft_model(
        model, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=targets)
    )
    pad = config.pad_token_id or 0

    def inputs(batch: list[list[int]]) -> dict:
        longest = max(map(len, batch))
        return {
            "input_ids": torch.tensor([row + [pad] * (longest - len(row)) for row in batch]),
            "attention_mask": torch.tensor(
                [[1] * len(row) + [0] * (longest - len(row)) for row in batch]
            ),
        }

    return model, inputs


def work(o: argparse.Namespace) -> None:
    """A worker: for every line on standard input, takes a turn of training steps and answers."""
    import resource

    if o.side == "ours":
        from examples.training import memory  # as every run does, before torch is imported

        memory.keep_compiled_kernels()
        memory.keep_freed_memory()

    import torch

    torch.manual_seed(o.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, inputs = (our_side if o.side == "ours" else peer_side)(o)
    model.to(device).train()
    if o.compile:
        model = torch.compile(model, dynamic=True)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, fused=o.side == "ours")
    labels = torch.arange(o.batch, device=device) % 2
    autocast = torch.autocast(
        device, torch.bfloat16, enabled=o.side == "peer" and o.dtype == "bfloat16"
    )
    clock = time.process_time if o.clock == "cpu" else time.perf_counter
    for turn, _ in enumerate(sys.stdin):
        work_list = batches(o, turn)
        tokens = sum(len(row) for batch in work_list for row in batch)
        started = clock()
        for batch in work_list:
            given = {k: v.to(device) if torch.is_tensor(v) else v for k, v in inputs(batch).items()}
            with autocast:
                loss = model(**given, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = clock() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if device == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
        print(json.dumps({"tokens_per_second": tokens / seconds, "peak_gib": peak}), flush=True)


def measure(o: argparse.Namespace) -> dict:
    """Lets both sides take turns; medians over the rounds."""
    command = [sys.executable, "-m", "benchmarks.lora_step"]
    for name in ("size", "batch", "dtype", "targets", "steps", "seed", "clock"):
        command += [f"--{name}", str(getattr(o, name))]
    workers = {
        side: subprocess.Popen(
            [*command, *["--compile"] * o.compile, "--side", side],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for side in ("ours", "peer")
    }
    speeds: dict[str, list[float]] = {side: [] for side in workers}
    peak = {}
    for turn in range(WARM_UP + o.rounds):
        for side, worker in workers.items():
            print("go", file=worker.stdin, flush=True)
            answer = json.loads(worker.stdout.readline())
            peak[side] = answer["peak_gib"]
            if turn >= WARM_UP:
                speeds[side].append(answer["tokens_per_second"])
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return {
        "tokens": {side: statistics.median(found) for side, found in speeds.items()},
        "faster": statistics.median(
            a / b for a, b in zip(speeds["ours"], speeds["peer"], strict=True)
        ),
        "peak": peak,
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
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.side:
        work(o)
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
