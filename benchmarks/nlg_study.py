"""What ways of fine-tuning make of a small GPT-2: E2E by beam search, BoolQ by two ways.

    python -m benchmarks.nlg_study --data_dir DIR --part tune main boolq --lanes 2
    python -m benchmarks.nlg_study --table              # of results/nlg_study.jsonl
    python -m benchmarks.nlg_study --texts --data_dir DIR    # ten outputs beside a reference each

DIR has the folders `e2e` (train.txt, valid.txt, test.txt) and `boolq` (dev.jsonl). Every run is a
process of `examples.run_nlg` and one line of `--out`; a run that has its line is not repeated.
Unknown options go to `examples.run_nlg`. All figures are those of the last weights. `--lanes 2`
does two runs at a time (with OMP_NUM_THREADS=1).

    tune    the rates of LoRA and of full fine-tuning on a part of the data, by the loss of held-out
            texts; the other methods have LoRA's
    main    every method on E2E: the 630 contexts of the test set by beam search, the five metrics
    boolq   LoRA and full fine-tuning on the split of dev.jsonl by line (not the official split):
            answers written, and the likelihood of true against false
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.common.studies import RESULTS, markdown
from examples.data.nlg import instances, read_pairs
from examples.data.tasks.nlg import NLG_TASKS
from examples.sweeps.records import Row, call, in_lanes, once, read
from examples.sweeps.statistics import mean_and_interval

MODEL = Path(__file__).resolve().parents[1] / "models" / "gpt2-mini"
METRICS = ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr")
SHOWN = tuple(range(30, 630, 60))  # contexts of E2E's test set whose texts are kept and shown
ROWS = {"tune": 2000, "main": 10_000}  # of E2E's training set, the first ones: it is in no order
RATES = {"lora": (2e-3, 5e-3, 1e-2), "full": (5e-4, 1e-3, 2e-3)}
RANKS = {"": 4, "r1": 1, "r2": 2}  # variant of a DyLoRA run -> rank
RANDOM = "lora, random weights"
INCREMENTS = "--lora_r 4 --lora_alpha 32 --lora_modules all-linear".split()
METHODS = {
    "lora": ["--method", "lora", *INCREMENTS],
    "full": ["--method", "full"],
    "dylora": ["--method", "dylora", *INCREMENTS, "--dylora_eval_ranks", "1,2"],
    "adalora": (  # mean rank 4 at the end; increments scaled by 8, as the others'
        "--method adalora --adalora_init_r 6 --adalora_target_r 4 --lora_alpha 48 "
        "--adalora_tinit 0.12 --adalora_tfinal 0.5 --adalora_delta_t 10 --lora_modules all-linear"
    ).split(),
    "bim_lora": ["--method", "bim_lora", *INCREMENTS, "--block_size", "16"],
    RANDOM: ["--method", "lora", *INCREMENTS],
    "lora, rank 32": "--method lora --lora_r 32 --lora_alpha 128 --lora_modules all-linear".split(),
}
COMMON = (
    "--packing --per_device_train_batch_size 8 --weight_decay 0.01 --warmup_ratio 0.06 "
    "--load_best_model_at_end false --save_strategy no --eval_strategy no --logging_steps 100"
).split()
E2E = (
    "--task_name e2e --max_eval_samples 500 --num_train_epochs 1 --num_beams 10 "
    "--length_penalty 0.8 --no_repeat_ngram_size 4 --max_new_tokens 100"
).split()
BOOLQ = "--task_name boolq --num_train_epochs 2 --num_beams 1 --max_new_tokens 4".split()


def jobs(part: str, rows: list[Row], seeds: list[int]) -> Iterator[tuple[Row, list[str]]]:
    """(key, words) of a part's runs; what LoRA is compared with comes before its other seeds."""

    def make(task: str, method: str, seed: int, rate: float, *words: str) -> tuple[Row, list[str]]:
        key = {"part": part, "task": task, "method": method, "seed": seed, "rate": rate}
        own = ["--seed", str(seed), "--learning_rate", str(rate)]
        return key, [*METHODS[method], *own, *words]

    if part == "tune":
        for method, rates in RATES.items():
            for rate in rates:
                rows_used = ["--max_train_samples", str(ROWS["tune"])]
                yield make("e2e", method, 100, rate, *E2E, *rows_used)
    elif part == "main":
        for method, seed in [*((m, seeds[0]) for m in METHODS), *(("lora", s) for s in seeds[1:])]:
            words = [*E2E, "--max_train_samples", str(ROWS["main"]), "--do_predict"]
            yield make("e2e", method, seed, tuned(rows, method), *words)
    else:
        for method in RATES:
            yield make("boolq", method, seeds[0], tuned(rows, method), *BOOLQ, "--do_predict")


def tuned(rows: list[Row], method: str) -> float:
    """The rate with the smallest held-out loss; that of LoRA for all but full fine-tuning."""
    method = method if method in RATES else "lora"
    tried = {
        row["rate"]: row["final"]["eval_loss"]
        for row in rows
        if (row["part"], row["method"]) == ("tune", method)
    }
    if missing := set(RATES[method]) - tried.keys():
        raise SystemExit(f"--part tune has not all runs of {method} yet: do it first ({missing})")
    return min(RATES[method], key=lambda rate: tried[rate])


# -- one run ---------------------------------------------------------------------------------------


def go(o: argparse.Namespace) -> None:
    """Does the runs that are missing."""
    work = Path(f"{o.out}.work")
    work.mkdir(parents=True, exist_ok=True)
    data = {"e2e": Path(o.data_dir) / "e2e", "boolq": boolq_split(Path(o.data_dir), work)}
    random = random_model(work)

    def do(key: Row, words: list[str]) -> None:
        model = random if key["method"] == RANDOM else MODEL
        where = ["--model_name_or_path", str(model), "--data_dir", str(data[key["task"]])]
        row = once(o.out, key, lambda folder: run([*where, *COMMON, *words, *o.more], folder))
        print(json.dumps({**key, **row["final"]}), flush=True)

    for part in o.part:
        in_lanes(o.lanes, [partial(do, *job) for job in jobs(part, read(o.out), o.seeds)])
    shutil.rmtree(work)


def boolq_split(data_dir: Path, work: Path) -> Path:
    """The folder of BoolQ's dev.jsonl cut by line into train, valid and test."""
    folder = work / "boolq"
    if not folder.exists():
        module = [sys.executable, "-m", "examples.data.prepare_nlg", "boolq", "--split_dev"]
        where = ["--data_dir", str(data_dir), "--tokenizer", str(MODEL)]
        call([*module, *where, "--output_dir", str(folder)])
    return folder


def random_model(work: Path) -> Path:
    """The folder of a model of the same sizes that nothing has trained."""
    import torch

    from transformers_patched import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = work / "random"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODEL)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return folder


def run(words: list[str], folder: Path) -> Row:
    """Runs `examples.run_nlg`; its figures, and some of its texts."""
    out = folder / "run"
    call([sys.executable, "-m", "examples.run_nlg", *words, "--output_dir", str(out)])
    results = json.loads((out / "all_results.json").read_text())
    texts = {}
    for path in sorted((out / "submission").rglob("test_predictions.txt")):
        variant = path.parent.relative_to(out / "submission").as_posix().strip(".")
        lines = path.read_text("utf-8").splitlines()
        texts[variant] = [lines[i] for i in SHOWN if i < len(lines)]
    return {
        "final": {k: v for k, v in results.items() if k.startswith(("eval_", "test_"))},
        "train_seconds": results["train_seconds"],
        "trainable": results["trainable_parameters"],
        "peak_memory_bytes": results["peak_memory_bytes"],
        "texts": texts,
    }


# -- tables ----------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    """Rates, E2E and BoolQ, as far as they have run."""
    tables = (
        ("Learning rates: held-out loss per token", *tuning(rows)),
        ("E2E, 630 test contexts, beam 10", *main_table(rows)),
        ("BoolQ, 500 questions of dev.jsonl, not the official split", *boolq_table(rows)),
    )
    filled = [(title, markdown(heads, lines)) for title, heads, lines in tables if lines]
    return "\n".join(f"**{title}**\n\n{cells}\n" for title, cells in filled)


Cells = list[list[str]]


def tuning(rows: list[Row]) -> tuple[list[str], Cells]:
    """Every rate that was tried."""
    found = [row for row in rows if row["part"] == "tune"]
    heads = ["method", "rate", "loss", "seconds"]
    return heads, [
        [
            r["method"],
            f"{r['rate']:g}",
            f"{r['final']['eval_loss']:.4f}",
            f"{r['train_seconds']:.0f}",
        ]
        for r in found
    ]


def main_table(rows: list[Row]) -> tuple[list[str], Cells]:
    """Every method, and DyLoRA at every rank, with the mean and interval where there are seeds."""
    heads = ["method", "rate", "trained", "seeds", "loss", *METRICS, "seconds of training"]
    lines = []
    for method in METHODS:
        own = [r for r in rows if (r["part"], r["method"]) == ("main", method)]
        if not own:
            continue
        for variant, rank in RANKS.items() if method == "dylora" else [("", 0)]:
            at = f"{variant}_" if variant else ""
            names = [f"eval_{at}loss", *(f"test_{at}{name}" for name in METRICS)]
            values = [[row["final"][name] for row in own] for name in names]
            lines.append([
                f"{method} at rank {rank}" if rank else method, f"{own[0]['rate']:g}",
                f"{own[0]['trainable']:,}", str(len(own)), *map(mean_and_interval, values),
                f"{sum(r['train_seconds'] for r in own) / len(own):.0f}",
            ])  # fmt: skip
    return heads, lines


def boolq_table(rows: list[Row]) -> tuple[list[str], Cells]:
    """Both ways to answer."""
    found = [row for row in rows if row["part"] == "boolq"]
    names = sorted({k for r in found for k in r["final"] if "accuracy" in k})
    heads = ["method", "rate", *names, "seconds of training"]
    return heads, [
        [r["method"], f"{r['rate']:g}", *(f"{r['final'][k]:.4f}" for k in names),
         f"{r['train_seconds']:.0f}"]
        for r in found
    ]  # fmt: skip


def texts(rows: list[Row], data_dir: Path) -> str:
    """Ten contexts of E2E's test set, a reference of each, and what the methods made of them."""
    found = instances(read_pairs(NLG_TASKS["e2e"], data_dir / "e2e" / "test.txt"))
    own = [r for r in rows if r["part"] == "main" and r["seed"] == 0]
    lines = []
    for place, number in enumerate(SHOWN):
        instance = found[number]
        lines += [f"**{instance.context}**\n", f"- reference: {instance.references[0]}"]
        lines += [f"- {r['method']}: {r['texts'][''][place]}" for r in own]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("tune", "main", "boolq")
    parser.add_argument("--data_dir", help="has the folders e2e and boolq")
    parser.add_argument("--part", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--seeds", default=[0, 1, 2], type=lambda t: [*map(int, t.split(","))])
    parser.add_argument("--lanes", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=RESULTS / "nlg_study.jsonl")
    parser.add_argument("--table", action="store_true", help="print the tables and stop")
    parser.add_argument("--texts", action="store_true", help="print ten outputs and stop")
    o, o.more = parser.parse_known_args()
    if not o.table and not o.data_dir:
        parser.error("--data_dir is needed (or --table, for the runs there are)")
    if o.texts:
        print(texts(read(o.out), Path(o.data_dir)))
        return
    if not o.table:
        go(o)
    print(table(read(o.out)))


if __name__ == "__main__":
    main()
