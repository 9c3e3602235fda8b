"""Beam search on a CPU: ours beside Transformers' `generate`, a loop per context, and CTranslate2.

    python -m benchmarks.beam_search --contexts 24 --rounds 3

GPT-2 small's shape with random weights whose end depends on the position, beam 10, up to 64 new
tokens, length penalty 0.8, no repeated 4-gram (the E2E recipe), fp32, one thread. Every side gets
the same distinct contexts, of 20 to 47 tokens as E2E's are. Sides run in turn, each in a process of
its own, so that peak memory is its own too; medians of the rounds are printed. Hypotheses are
compared with Transformers' on one context at a time.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

SETTINGS = {"num_beams": 10, "length_penalty": 0.8, "no_repeat_ngram_size": 4}
EOS = 50256


def make_contexts(count: int) -> list[list[int]]:
    """Random ids, 20 to 47 of them, as many as E2E's contexts have."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(20, 48, (count,), generator=generator).tolist()
    return [torch.randint(0, EOS, (n,), generator=generator).tolist() for n in lengths]


def make_model(folder: Path, layers: int) -> None:
    """Random weights; from some position on, the last state leans towards EOS more and more."""
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


def ours(folder: Path, contexts: list[list[int]], new: int, batch: int) -> Callable:
    from transformers_patched import GPT2LMHeadModel
    from transformers_patched.generation import generate

    model = GPT2LMHeadModel.from_pretrained(folder)
    return lambda: generate(
        model, contexts, max_new_tokens=new, rules="transformers", batch_size=batch or None,
        **SETTINGS,
    )  # fmt: skip


def transformers(folder: Path, contexts: list[list[int]], new: int, batch: int) -> Callable:
    """`generate` on left-padded batches; a context alone (batch 1) needs no padding."""
    import transformers as hf

    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    model = hf.GPT2LMHeadModel.from_pretrained(folder).eval()

    def run() -> list[list[int]]:
        found = []
        for start in range(0, len(contexts), batch):
            part = contexts[start : start + batch]
            longest = max(map(len, part))
            ids = torch.tensor([[EOS] * (longest - len(c)) + c for c in part])
            mask = torch.tensor([[0] * (longest - len(c)) + [1] * len(c) for c in part])
            with torch.inference_mode():
                out = model.generate(
                    ids, attention_mask=mask, max_new_tokens=new, eos_token_id=EOS,
                    pad_token_id=EOS, do_sample=False, **SETTINGS,
                )[:, longest:]  # fmt: skip
            found += [cut(row) for row in out.tolist()]
        return found

    return run


def loop(folder: Path, contexts: list[list[int]], new: int, batch: int) -> Callable:
    """Ours, one context after the other: what keeping many alive is worth."""
    return ours(folder, contexts, new, 1)


def ctranslate2(folder: Path, contexts: list[list[int]], new: int, batch: int) -> Callable:
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
        generator = ct2.Generator(converted, device="cpu", compute_type="float32", intra_threads=1)
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


def run_side(name: str, batch: int, folder: Path, contexts: int, new: int) -> dict:
    """Decodes once in this process; processor seconds, peak memory and the hypotheses."""
    torch.set_num_threads(1)
    run = SIDES[name](folder, make_contexts(contexts), new, batch)
    wall, start = time.perf_counter(), time.process_time()
    tokens = run()
    return {
        "seconds": time.process_time() - start,
        "wall": time.perf_counter() - wall,
        "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "tokens": tokens,
    }


def in_a_process(name: str, batch: int, folder: Path, options: argparse.Namespace) -> dict | None:
    command = [
        sys.executable, "-m", "benchmarks.beam_search", "--side", name, "--batch", str(batch),
        "--folder", str(folder), "--contexts", str(options.contexts), "--new", str(options.new),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{name} {batch}: {done.stderr.strip().splitlines()[-1]}")
        return None
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, default=24)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--sides", nargs="+", default=["ours:0", "transformers:1", "transformers:4",
                                       "transformers:8", "loop:1", "ctranslate2:8"],
        help="name:batch, where 0 lets ours choose",
    )  # fmt: skip
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        sizes = options.folder, options.contexts, options.new
        print(json.dumps(run_side(options.side, options.batch, *sizes)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), options.layers)
        compare(Path(folder), options)


def compare(folder: Path, options: argparse.Namespace) -> None:
    """Runs the sides in turn and prints medians, ratios to ours, and how many tokens agree."""
    sides = [(name, int(batch)) for name, batch in (side.split(":") for side in options.sides)]
    runs: dict[tuple[str, int], list[dict]] = {side: [] for side in sides}
    for _ in range(options.rounds):
        for side in sides:
            if (result := in_a_process(*side, folder, options)) is not None:
                runs[side].append(result)
    done = {side: results for side, results in runs.items() if results}
    reference = done.get(("transformers", 1)) or next(iter(done.values()))
    expected = reference[0]["tokens"]
    mean = sum(map(len, expected)) / len(expected)
    print(f"{options.contexts} contexts, hypotheses of {mean:.1f} tokens in the mean")
    print(f"{'side':>14} {'batch':>5} {'CPU s':>7} {'to ours':>8} {'MB':>6}  same hypotheses")
    base = statistics.median(r["seconds"] for r in next(iter(done.values())))
    for (name, batch), results in done.items():
        seconds = statistics.median(r["seconds"] for r in results)
        memory = statistics.median(r["megabytes"] for r in results)
        pairs = zip(results[0]["tokens"], expected, strict=True)
        same = sum(a == b for a, b in pairs)
        ratio = seconds / base
        print(f"{name:>14} {batch:>5} {seconds:>7.1f} {ratio:>8.2f} {memory:>6.0f}  {same}")


if __name__ == "__main__":
    main()
