"""Beam search on a CPU: ours beside Transformers' `generate`, a loop per context, and CTranslate2.

    pip install --no-deps --target .peers/ctranslate2 ctranslate2
    OMP_NUM_THREADS=1 python -m benchmarks.beam_search --data_dir DATA --tokenizer DIR

GPT-2 small's shape with random weights whose end depends on the position, beam 10, length penalty
0.8, no repeated 4-gram (the E2E recipe), fp32, one thread, CPU time. Every side gets the same
distinct contexts of E2E's test set, and as many new tokens at most. Each side has a process of its
own, so that peak memory is its own too, and the sides take turns, round by round; medians and
ranges are printed. Hypotheses are compared with Transformers' on one context at a time
(`transformers:1`, which `--once` runs in the first round alone).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.common import devices, e2e, peers
from benchmarks.common.timing import ratio, seconds

SETTINGS = {"num_beams": 10, "length_penalty": 0.8, "no_repeat_ngram_size": 4}
EOS = e2e.EOS
PEER = peers.PEERS / "ctranslate2"


def make_model(folder: Path, layers: int) -> None:
    """Random weights; from some position on, the last state leans towards EOS more and more."""
    import torch

    from transformers_patched import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0))
    body = model.transformer
    with torch.no_grad():
        for block in body.h:
            for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
                layer.weight.mul_(4.0)
        body.wte.weight.mul_(6.0)
        direction = body.wte.weight[EOS] / body.wte.weight[EOS].norm()
        positions = torch.arange(1024)[:, None]
        body.wpe.weight += (positions - 40).clamp(min=0) * 0.7 * direction
    model.save_pretrained(folder)


# ---------------------------------------------------------------------- the sides


def ours(folder: Path, contexts: list[list[int]], new: int, batch: int, device: str) -> Callable:
    from transformers_patched import GPT2LMHeadModel
    from transformers_patched.generation import generate

    model = GPT2LMHeadModel.from_pretrained(folder).to(device)
    return lambda: generate(
        model, contexts, max_new_tokens=new, rules="transformers", batch_size=batch or None,
        **SETTINGS,
    )  # fmt: skip


def transformers(
    folder: Path, contexts: list[list[int]], new: int, batch: int, device: str
) -> Callable:
    """`generate` on left-padded batches; a context alone (batch 1) needs no padding."""
    import torch
    import transformers as hf

    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    model = hf.GPT2LMHeadModel.from_pretrained(folder).eval().to(device)

    def run() -> list[list[int]]:
        found = []
        for start in range(0, len(contexts), batch):
            part = contexts[start : start + batch]
            longest = max(map(len, part))
            ids = torch.tensor([[EOS] * (longest - len(c)) + c for c in part]).to(device)
            mask = torch.tensor([[0] * (longest - len(c)) + [1] * len(c) for c in part])
            mask = mask.to(device)
            with torch.inference_mode():
                out = model.generate(
                    ids, attention_mask=mask, max_new_tokens=new, eos_token_id=EOS,
                    pad_token_id=EOS, do_sample=False, **SETTINGS,
                )[:, longest:]  # fmt: skip
            found += [cut(row) for row in out.tolist()]
        return found

    return run


def loop(folder: Path, contexts: list[list[int]], new: int, batch: int, device: str) -> Callable:
    """Ours, one context after the other: what keeping many alive is worth."""
    return ours(folder, contexts, new, 1, device)


def ctranslate2(
    folder: Path, contexts: list[list[int]], new: int, batch: int, device: str
) -> Callable:
    """Its search has other rules: hypotheses need not agree."""
    import ctranslate2 as ct2
    from ctranslate2.converters import TransformersConverter

    vocabulary = {f"t{i}": i for i in range(EOS + 1)}

    class Tokenless(TransformersConverter):
        def load_tokenizer(self, tokenizer_class: type, path: str, **options: object) -> object:
            return type("Tokens", (), {
                "get_vocab": lambda self: vocabulary, "bos_token": f"t{EOS}",
                "eos_token": f"t{EOS}", "unk_token": f"t{EOS}",
            })()  # fmt: skip

    with tempfile.TemporaryDirectory() as converted:
        Tokenless(str(folder)).convert(converted, force=True)
        generator = ct2.Generator(converted, device=device, compute_type="float32", intra_threads=1)
    prompts = [[f"t{i}" for i in context] for context in contexts]

    def run() -> list[list[int]]:
        results = generator.generate_batch(
            prompts, max_batch_size=batch, batch_type="examples", beam_size=SETTINGS["num_beams"],
            length_penalty=SETTINGS["length_penalty"], max_length=new,
            no_repeat_ngram_size=SETTINGS["no_repeat_ngram_size"], end_token=f"t{EOS}",
            include_prompt_in_result=False, return_end_token=True,
        )  # fmt: skip
        return [cut(result.sequences_ids[0]) for result in results]

    return run


SIDES = {f.__name__: f for f in (ours, transformers, loop, ctranslate2)}


def cut(tokens: list[int]) -> list[int]:
    """Up to the first EOS, with it."""
    return tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens


# ---------------------------------------------------------------------- running them


def serve(o: argparse.Namespace) -> None:
    """A worker: for every request, decodes once and answers."""
    import torch

    torch.set_num_threads(1)
    device = devices.device_of(o)
    contexts = e2e.contexts(o, o.contexts)
    run = SIDES[o.side](o.folder, contexts, o.new, o.batch, device)
    found: list[list[list[int]]] = []
    for _ in peers.requests():
        took = seconds(lambda: found.append(run()), device)
        peak = 2**10 * devices.peak_gib(device)
        peers.tell({"seconds": took, "megabytes": peak, "tokens": found.pop()})


def measure(o: argparse.Namespace, folder: Path) -> dict[str, list[dict]]:
    """Every side's answers, by its words `name:batch`; those of `--once` have one."""
    workers = {}
    for side in (*o.sides, *o.once):
        name, batch = side.split(":")
        workers[side] = peers.Worker(
            "benchmarks.beam_search", "--side", name, "--batch", batch, "--folder", folder,
            "--contexts", o.contexts, "--new", o.new, *e2e.words(o),
            *["--device", o.device] * bool(o.device), peer=PEER if name == "ctranslate2" else None,
        )  # fmt: skip
    found: dict[str, list[dict]] = {side: [] for side in workers}
    for turn in range(o.rounds):
        for side, worker in workers.items():
            if turn == 0 or side in o.sides:
                found[side].append(worker.ask())
                print(f"round {turn + 1}, {side}: {found[side][-1]['seconds']:.1f} s", flush=True)
    for worker in workers.values():
        worker.close()
    return found


def rows(o: argparse.Namespace, found: dict[str, list[dict]]) -> list[dict]:
    """One row per side: seconds of every round, their ratios to ours in the same round, memory."""
    reference = found.get("transformers:1") or next(iter(found.values()))
    expected = reference[0]["tokens"]
    first = [turn["seconds"] for turn in next(iter(found.values()))]
    result = []
    for side, turns in found.items():
        took = [turn["seconds"] for turn in turns]
        ratios = [a / b for a, b in zip(took, first, strict=False)]
        pairs = zip(turns[0]["tokens"], expected, strict=True)
        result.append({
            "what": "beam_search", "side": side, "contexts": o.contexts, "new": o.new,
            "layers": o.layers, "seconds": took, "to_ours": ratio(took, first[: len(turns)]),
            "range": [min(ratios), max(ratios)], "same_hypotheses": sum(a == b for a, b in pairs),
            "megabytes": statistics.median(turn["megabytes"] for turn in turns),
            "tokens": sum(map(len, turns[0]["tokens"])) / o.contexts,
        })  # fmt: skip
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    e2e.add_options(parser)
    parser.add_argument("--contexts", type=int, default=24)
    parser.add_argument("--new", type=int, default=64, help="new tokens at most")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    devices.add_device(parser)
    parser.add_argument(
        "--sides", nargs="+", default=["ours:0", "transformers:4", "ctranslate2:8", "loop:1"],
        help="name:batch, where 0 lets ours choose; the first one is what others are compared with",
    )  # fmt: skip
    once = ["transformers:1", "transformers:2", "transformers:8"]
    parser.add_argument("--once", nargs="*", default=once, help="sides of the first round alone")
    parser.add_argument("--out", type=Path, help="append the figures to this file as JSON lines")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    o = parser.parse_args()
    e2e.check(parser, o)
    o.sides, o.once = (
        [side for side in sides if not side.startswith("transformers:") or peers.importable()]
        for sides in (o.sides, o.once)
    )
    if o.side:
        serve(o)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), o.layers)
        table = rows(o, measure(o, Path(folder)))
    unit, places = ("CPU s", 1) if devices.device_of(o) == "cpu" else ("s", 3)
    print(f"| side | {unit} | to ours | MB | tokens | same hypotheses |\n|---|---|---|---|---|---|")
    for row in table:
        low, high = row["range"]
        took = f"{statistics.median(row['seconds']):.{places}f}"
        print(
            f"| {row['side']} | {took} | {row['to_ours']:.2f}× "
            f"({low:.2f}–{high:.2f}) | {row['megabytes']:.0f} | {row['tokens']:.1f} "
            f"| {row['same_hypotheses']} of {o.contexts} |"
        )
    if o.out:
        with o.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in table)


if __name__ == "__main__":
    main()
