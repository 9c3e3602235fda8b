"""Where ranks come from: one for all, some batches before training, a schedule, a cut after it.

    python -m benchmarks.ranks_study --model DIR --data_dir DIR/glue --out FILE.jsonl
    python -m benchmarks.ranks_study --table    # of results/ranks_study.jsonl

CoLA's first 3,000 training rows, 3 epochs of batches of 16, adapters on all six maps of a layer,
mean rank 4 at the end for every method. Every run is a process of its own and one line of `--out`;
a run that has its line is not repeated. Unknown options go to `examples.run_glue`. All figures are
those of the last weights on the development set.

    tune    each method at three rates, one seed of its own
    main    each method at the best of them, `--seeds`

    lora                    rank 4 everywhere
    activations, gradients  LoRA with --rank_from
    adalora                 mean rank 6, cut to 4 while it trains
    cut                     LoRA of rank 6, cut to mean rank 4 by one threshold on all singular
                            values; `uniform` in its rows: cut to rank 4 everywhere
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks.common.studies import METRIC, best_rate, carry_out, markdown, metrics_of, options
from examples.sweeps.records import Row, call, in_lanes, once, read, run_glue
from examples.sweeps.statistics import mean_and_interval, paired_difference

TASK, MODULES, RANK, START = "cola", 36, 4, 6
MAPS = "--lora_modules query,key,value,output.dense,intermediate.dense"
SETTINGS = (
    "--task_name cola --max_train_samples 3000 --num_train_epochs 3 --max_length 128 --packing "
    "--per_device_train_batch_size 16 --weight_decay 0 --warmup_ratio 0.06 --base_dtype float32 "
    "--load_best_model_at_end false --save_strategy no --eval_strategy no"  # but at the end
).split()
LORA = f"--method lora {MAPS} --lora_r {RANK} --lora_alpha {2 * RANK}"
METHODS = {
    "lora": LORA,
    "activations": f"{LORA} --rank_from activations",
    "gradients": f"{LORA} --rank_from gradients",
    "adalora": f"--method adalora {MAPS} --lora_alpha {2 * RANK} --adalora_init_r {START} "
    f"--adalora_target_r {RANK} --adalora_tinit 0.15 --adalora_tfinal 0.4 --adalora_delta_t 10 "
    "--adalora_orth_reg_weight 0.1",
    "cut": f"--method lora {MAPS} --lora_r {START} --lora_alpha {2 * START}",
}
RATES = {method: (5e-4, 1e-3, 2e-3) for method in METHODS} | {"adalora": (1e-3, 2e-3, 4e-3)}
TUNING_SEED = 100


def jobs(part: str, rows: list[Row], seeds: Sequence[int]) -> Iterator[tuple[Row, list[str]]]:
    """(key, words) of a part's runs; those of main need the rows of tune."""
    for seed in [TUNING_SEED] if part == "tune" else seeds:
        for method, words in METHODS.items():
            for rate in RATES[method] if part == "tune" else [tuned(rows, method)]:
                key = {"part": part, "task": TASK, "method": method, "seed": seed, "rate": rate}
                yield key, [*words.split(), "--learning_rate", str(rate), "--seed", str(seed)]


def tuned(rows: list[Row], method: str) -> float:
    own = [row for row in rows if (row["part"], row["method"]) == ("tune", method)]
    return best_rate(own, TASK, RATES[method], method)


def cut(common: list[str], words: list[str], folder: Path) -> Row:
    """Trains, and evaluates what cuts to every budget leave, by one threshold and one rank."""
    row = run_glue([*common, *words], folder / "run")
    export = ["-m", "examples.export", folder / "run", "--curve", "--out", folder / "curve"]
    call([sys.executable, *map(str, export)])
    curve = json.loads((folder / "curve" / "budget_curve.json").read_text())
    at, name = curve["budgets"].index(RANK * MODULES), METRIC[TASK]
    found = {rule: {name: curve[rule]["values"][at]} for rule in ("global", "uniform")}
    return {**row, "whole": row["final"], "final": found["global"], "uniform": found["uniform"]}


def go(o: argparse.Namespace) -> None:
    common = ["--model_name_or_path", o.model, "--data_dir", o.data_dir, *SETTINGS, *o.more]

    def do(key: Row, words: list[str]) -> None:
        def run(folder: Path) -> Row:
            if key["method"] == "cut":
                return cut(common, words, folder)
            return run_glue([*common, *words], folder / "run")

        row = once(o.out, key, run)
        print(json.dumps({**key, METRIC[TASK]: row["final"][METRIC[TASK]]}), flush=True)

    for part in o.part:
        in_lanes(o.lanes, [partial(do, *job) for job in jobs(part, read(o.out), o.seeds)])


# -- tables ----------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    """Rates, then the methods beside LoRA of the same number of ranks, as far as they have run."""
    tuning = []
    for method, rates in RATES.items():
        found = [metrics_of(rows, "tune", TASK, method=method, rate=rate) for rate in rates]
        shown = " / ".join(f"{max(v.values()):.3f}" if v else "–" for v in found)
        tuning.append([method, " / ".join(f"{rate:g}" for rate in rates), shown])
    main = {method: metrics_of(rows, "main", TASK, method=method) for method in METHODS}
    seconds = {m: [r["train_seconds"] for r in _main(rows, m)] for m in METHODS}
    for name, title in (("uniform", "cut, uniform"), ("whole", "LoRA of rank 6, not cut")):
        own = _main(rows, "cut")
        main[title] = {row["seed"]: row[name][METRIC[TASK]] for row in own}
    lines = [
        [method, mean_and_interval(list(values.values())), paired_difference(values, main["lora"]),
         f"{statistics.mean(seconds[method]):.0f}" if seconds.get(method) else ""]
        for method, values in main.items() if values
    ]  # fmt: skip
    heads = ["ranks from", "Matthews correlation", "beside lora, paired", "training seconds"]
    parts = ["**Learning rates** (one seed)", markdown(["method", "rates", "found"], tuning)]
    return "\n\n".join([*parts, *(["**Methods**", markdown(heads, lines)] if lines else [])])


def _main(rows: list[Row], method: str) -> list[Row]:
    return [row for row in rows if (row["part"], row["method"]) == ("main", method)]


def main() -> None:
    parser = options(__doc__, "ranks_study")
    parser.add_argument("--part", nargs="+", choices=("tune", "main"), default=["tune", "main"])
    parser.add_argument("--lanes", type=int, default=1, help="runs at a time")
    carry_out(parser, go, table)


if __name__ == "__main__":
    main()
