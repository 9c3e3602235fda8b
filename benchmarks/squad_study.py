"""Methods on the real SQuAD 1.1 with a real small model.

    python -m benchmarks.squad_study --model DIR --data_dir DIR --out FILE.jsonl --part tune
    … --part main
    … --part more
    python -m benchmarks.squad_study --table    # of results/squad_study.jsonl

Every run is a process of its own and one line of `--out`; a run that has its line is not repeated.
Unknown options go to `examples.run_squad`. All figures are those of the last weights on the first
1,000 questions of the development set. `--lanes 2` does two runs at a time (with
OMP_NUM_THREADS=1).

    tune    the rates of full and lora, three each, on the first 500 training questions; the
            others have LoRA's best, AdaLoRA twice that
    main    each method at its rate, on the first 1,000 questions
    more    LoRA at its rate, on the first 6,000
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks.common.studies import carry_out, markdown, options
from examples.sweeps.records import Row, in_lanes, once, read, run_program
from examples.sweeps.statistics import mean_and_interval

QUESTIONS = {"tune": 500, "main": 1000, "more": 6000}
RATES = {
    "full": (3e-5, 1e-4, 3e-4),
    "lora": (1e-3, 2e-3, 4e-3),
    "adalora": (8e-3,),
    "dylora": (4e-3,),
    "bim_lora": (4e-3,),
}
SETTINGS = (
    "--num_train_epochs 2 --per_device_train_batch_size 8 --weight_decay 0 --warmup_ratio 0.06 "
    "--max_eval_samples 1000 --load_best_model_at_end false --save_strategy no --eval_strategy no "
    "--packing --group_by_length true"
).split()
ADAPTED = "--lora_modules all-linear --lora_r 8 --lora_alpha 8".split()
METHODS = {
    "full": [],
    "lora": ADAPTED,
    "adalora": (
        "--lora_modules all-linear --lora_alpha 8 --adalora_init_r 12 --adalora_target_r 8 "
        "--adalora_tinit 0.1 --adalora_tfinal 0.4 --adalora_delta_t 5"
    ).split(),
    "dylora": ADAPTED,
    "bim_lora": [*ADAPTED, "--block_size", "16"],
}
METRIC = "f1"


def jobs(part: str, rows: list[Row], seeds: Sequence[int], methods: Sequence[str]) -> Iterator:
    """(key, words) of a part's runs."""
    for method in methods:
        if part == "more" and method != "lora" or part == "tune" and len(RATES[method]) == 1:
            continue
        rates = RATES[method] if part == "tune" else (tuned(rows, method),)
        for seed in seeds if part != "tune" else (100,):
            for rate in rates:
                key = {"part": part, "method": method, "seed": seed, "rate": rate}
                words = ["--method", method, *METHODS[method], "--learning_rate", str(rate)]
                words += ["--seed", str(seed), "--max_train_samples", str(QUESTIONS[part])]
                yield key, words


def tuned(rows: list[Row], method: str) -> float:
    """The rate whose last weights were best on 500 questions, or the only one."""
    if len(RATES[method]) == 1:
        return RATES[method][0]
    own = [row for row in rows if (row["part"], row["method"]) == ("tune", method)]
    tried = {row["rate"]: row["final"][METRIC] for row in own}
    if missing := set(RATES[method]) - set(tried):
        raise SystemExit(f"--part tune has no run of {method} at {missing} yet: do it first")
    return max(RATES[method], key=lambda rate: tried[rate])


def go(o: argparse.Namespace) -> None:
    where = ["--model_name_or_path", o.model, "--data_dir", o.data_dir]

    def do(key: Row, words: list[str]) -> None:
        def run(folder: Path) -> Row:
            command = [*where, *SETTINGS, *words, *o.more]
            return run_program("examples.run_squad", command, folder / "run")

        row = once(o.out, key, run)
        shown = {name: round(row["final"][name], 2) for name in ("exact", "f1")}
        print(json.dumps({**key, **shown}), flush=True)

    for part in o.part:
        every = jobs(part, read(o.out), o.seeds, o.methods)
        in_lanes(o.lanes, [partial(do, key, words) for key, words in every])


# -- tables ----------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    """Rates, and the parts with their costs, as far as they have run."""
    tables = (
        ("F1 at its rates, 500 questions", ["method", "rates", "F1"], tuning(rows)),
        (
            "Methods at their rates (mean, 95 % interval over seeds)",
            ["questions", "method", "rate", "trained", "EM", "F1", "training seconds", "MiB"],
            results(rows),
        ),
    )
    filled = [(title, markdown(heads, lines)) for title, heads, lines in tables if lines]
    return "\n".join(f"**{title}**\n\n{cells}\n" for title, cells in filled)


def tuning(rows: list[Row]) -> list[list[str]]:
    """F1 of each method at each of its rates."""
    lines = []
    for method, rates in RATES.items():
        own = [row for row in rows if (row["part"], row["method"]) == ("tune", method)]
        found = {row["rate"]: f"{row['final'][METRIC]:.2f}" for row in own}
        if found:
            shown = " / ".join(found.get(rate, "–") for rate in rates)
            lines.append([method, " / ".join(f"{rate:g}" for rate in rates), shown])
    return lines


def results(rows: list[Row]) -> list[list[str]]:
    """Both metrics of the other parts, and what they cost."""
    lines = []
    for part in ("main", "more"):
        for method in METHODS:
            own = [row for row in rows if (row["part"], row["method"]) == (part, method)]
            if not own:
                continue
            values = ([row["final"][name] for row in own] for name in ("exact", "f1"))
            metrics = [mean_and_interval(found) for found in values]
            seconds = sum(row["train_seconds"] for row in own) / len(own)
            memory = max(row["peak_memory_bytes"] for row in own) / 2**20
            lines.append([
                f"{QUESTIONS[part]:,}", method, f"{own[0]['rate']:g}", f"{own[0]['trainable']:,}",
                *metrics, f"{seconds:.0f}", f"{memory:,.0f}",
            ])  # fmt: skip
    return lines


def main() -> None:
    parser = options(__doc__, "squad_study")
    parser.set_defaults(seeds=[0])
    parser.add_argument("--part", nargs="+", choices=list(QUESTIONS), default=list(QUESTIONS))
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument("--lanes", type=int, default=1, help="runs at a time")
    carry_out(parser, go, table)


if __name__ == "__main__":
    main()
