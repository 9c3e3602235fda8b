"""What the block mask is worth, on real tasks with a real small model.

    python -m benchmarks.bim_study --model DIR --data_dir DIR/glue --out FILE.jsonl --part tune
    … --part main
    … --part ablation
    … --part collection
    python -m benchmarks.bim_study --table    # of results/bim_study.jsonl
    python -m benchmarks.bim_study --plot FILE.png

Every run is a process of its own and one line of `--out`; a run that has its line is not repeated.
Unknown options go to `examples.run_glue`. All figures are those of the last weights on the
development set. `--lanes 2` does two runs at a time (with OMP_NUM_THREADS=1).

    tune        each method's rate, on each task: 3 epochs of one seed; the others need it
    main        BIM-LoRA of rank 8 (blocks of 16 × 16), LoRA of rank 8, and LoRA of rank 9, which
                trains as many parameters as BIM-LoRA does (380,160 against 379,968 and the head);
                s = 1 for all, the head at the same rate, the same schedule
    ablation    where the mask starts: the network's scores (which `main` has), the heuristic it
                learns, random scores of the same distribution, one constant of the same mean; and
                the mask frozen
    collection  how far the ranking of blocks from few batches agrees with that from many others
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common.studies import (
    METRIC,
    best_rate,
    carry_out,
    comma_separated,
    draw_methods,
    markdown,
    metrics_of,
    options,
)
from examples.sweeps.drawing import dots
from examples.sweeps.records import Row, in_lanes, once, read, run_glue
from examples.sweeps.statistics import mean_and_interval, paired_difference

EPOCHS = {"mrpc": 6, "cola": 8}
RATES = {"bim_lora": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3), "lora_8": (5e-4, 1e-3, 2e-3, 4e-3)}
SETTINGS = (
    "--per_device_train_batch_size 32 --weight_decay 0 --warmup_ratio 0.06 --max_length 128 "
    "--packing --lora_modules all-linear --adam_beta2 0.98 --load_best_model_at_end false "
    "--save_strategy no --eval_strategy no"  # but at the end
).split()
BIM = "--method bim_lora --lora_r 8 --lora_alpha 8 --block_size 16 --head_lr_ratio 1".split()
METHODS = {
    "bim_lora": BIM,
    "lora_8": "--method lora --lora_r 8 --lora_alpha 8".split(),
    "lora_9": "--method lora --lora_r 9 --lora_alpha 9".split(),
}
MEAN_LOGIT = -0.73  # of the network's first masks, whose mean is 0.325
FULL = "(a) network"
ABLATION = {
    FULL: [],  # is the method itself: its runs are those of `main`
    "(b) features": ["--mask_init", "features"],
    "(c) constant": ["--mask_init", "constant", "--initial_block_score", str(MEAN_LOGIT)],
    "(d) random": ["--mask_init", "random"],
    "(e) network, frozen": ["--train_mask", "false"],
    "(f) constant, frozen": [
        "--mask_init", "constant", "--initial_block_score", str(MEAN_LOGIT), "--train_mask", "false"
    ],
}  # fmt: skip
FEATURES = {
    "grad_mean": "F1, mean gradient",
    "grad_var": "F2, its variance",
    "act_var": "F3, variance of activations",
    "label": "the network's label",
}
STEPS, MANY = (2, 5, 10, 20, 35, 70, 150, 300), 300


def jobs(part: str, rows: list[Row], seeds: list[int], tasks: list[str]) -> Iterator[tuple]:
    """(key, words) of a part's runs."""

    def make(task: str, method: str, seed: int, epochs: int, rate: float, **more: str) -> tuple:
        key = {"part": part, "task": task, "method": method, "seed": seed, "rate": rate, **more}
        words = [*METHODS[method], *ABLATION.get(more.get("start", ""), [])]
        words += ["--task_name", task, "--seed", str(seed), "--learning_rate", str(rate)]
        return key, [*words, "--num_train_epochs", str(epochs)]

    if part == "tune":
        for task, (method, rates) in itertools.product(tasks, RATES.items()):
            for rate in rates:
                yield make(task, method, 100, 3, rate)
    elif part == "main":
        for seed, task, method in itertools.product(seeds, tasks, METHODS):
            yield make(task, method, seed, EPOCHS[task], tuned(rows, task, method))
    elif part == "ablation" and "mrpc" in tasks:
        rate = tuned(rows, "mrpc", "bim_lora")
        for seed, start in itertools.product(seeds, ABLATION):
            if start != FULL:
                yield make("mrpc", "bim_lora", seed, EPOCHS["mrpc"], rate, start=start)


def tuned(rows: list[Row], task: str, method: str) -> float:
    """The rate whose last weights were best on the task; LoRA's is that of rank 8."""
    method = "bim_lora" if method == "bim_lora" else "lora_8"
    wanted = ("tune", method, task)
    own = [row for row in rows if (row["part"], row.get("method"), row["task"]) == wanted]
    return best_rate(own, task, RATES[method], f"{method} on {task}")


def current(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Rows without the runs of other parts at a rate that is not the tuned one; and those."""
    kept, other = [], []
    for row in rows:
        old = row["part"] in ("main", "ablation") and row["rate"] != tuned(
            rows, row["task"], row["method"]
        )
        (other if old else kept).append(row)
    return kept, other


def go(o: argparse.Namespace) -> None:
    where = ["--model_name_or_path", o.model, "--data_dir", o.data_dir]

    def do(key: Row, words: list[str]) -> None:
        def run(folder: Path) -> Row:
            return run_glue([*where, *SETTINGS, *words, *o.more], folder / "run")

        row = once(o.out, key, run)
        shown = round(row["final"][METRIC[row["task"]]], 4)
        print(json.dumps({**key, METRIC[row["task"]]: shown}), flush=True)

    for part in o.part:
        if part == "collection":
            collection(o, where)
            continue
        every = jobs(part, read(o.out), o.seeds, o.tasks)
        in_lanes(o.lanes, [partial(do, key, words) for key, words in every])


# -- few batches or many ---------------------------------------------------------------------------


def collection(o: argparse.Namespace, where: list[str]) -> None:
    """Features from STEPS batches of each seed, beside those from MANY batches of another seed."""
    kept = Path(f"{o.out}.features")
    kept.mkdir(parents=True, exist_ok=True)

    def features(steps: int, seed: int) -> Path:
        path = kept / f"{seed}_{steps}.safetensors"
        if not path.exists():
            words = [*BIM, "--task_name", "mrpc", "--seed", str(seed), "--max_train_steps", "1"]
            words += ["--collection_steps", str(steps), "--features_path", str(path)]
            run_glue(
                [
                    *where,
                    *SETTINGS,
                    *words,
                    "--max_eval_samples",
                    "64",
                    "--overwrite_output_dir",
                    *o.more,
                ],
                kept / "run",
            )
            shutil.rmtree(kept / "run")
        return path

    reference = features(MANY, 999)
    for seed, steps in itertools.product(o.seeds, STEPS):
        key = {"part": "collection", "task": "mrpc", "steps": steps, "seed": seed}
        path = features(steps, seed)
        row = once(o.out, key, lambda folder, path=path: agreement(path, reference))
        print(json.dumps(row), flush=True)


def agreement(few: Path, many: Path) -> Row:
    """Spearman's ρ of F1, F2, F3 and the heuristic: over all blocks, and within the matrices."""
    from peft_custom.tuners.bim_lora.features import Features, normalised
    from peft_custom.tuners.bim_lora.importance import soft_labels

    one, other = Features.load(few), Features.load(many)
    columns = {"grad_mean": 0, "grad_var": 1, "act_var": 2}
    pairs = {name: (one.values[:, k], other.values[:, k]) for name, k in columns.items()}
    pairs["label"] = tuple(soft_labels(normalised(f.values)) for f in (one, other))
    found: Row = {}
    for name, (a, b) in pairs.items():
        found[name] = round(spearman(a, b), 4)
        within = [spearman(a[part.rows], b[part.rows]) for part in one.table]
        found[f"{name}_within"] = round(sum(within) / len(within), 4)
    return found


def spearman(a: Any, b: Any) -> float:
    """The correlation of ranks; ties share their mean rank."""
    from scipy.stats import spearmanr

    return float(spearmanr(a.numpy(), b.numpy()).statistic)


# -- tables ----------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    """Rates, main comparison, ablation and collection, as far as they have run."""
    rows, other = current(rows)
    rates = sorted({rate for rates in RATES.values() for rate in rates})
    names = [f"{n}{w}" for n in FEATURES for w in ("", "_within")]
    tables = (
        ("Learning rates, 3 epochs", ["task", "method", *map(str, rates)], tuning(rows, rates)),
        (
            "BIM-LoRA and LoRA (mean, 95 % interval over seeds)",
            ["task", "metric", "method", "rate", "trained", "result", "BIM-LoRA minus it",
             "seconds"],
            methods(rows),
        ),
        ("The same at other rates", ["task", "method", "rate", "result"], untuned(other)),
        (
            "Where the mask starts (MRPC, F1)",
            ["start", "seeds", "F1", "minus (a)"],
            starts(rows),
        ),
        (
            f"Spearman's ρ of the blocks' ranking with that from {MANY} other batches (MRPC)",
            ["batches", "seeds", *names],
            rankings(rows, names),
        ),
    )  # fmt: skip
    filled = [(title, markdown(heads, lines)) for title, heads, lines in tables if lines]
    return "\n".join(f"**{title}**\n\n{cells}\n" for title, cells in filled)


Cells = list[list[str]]


def tuning(rows: list[Row], rates: list[float]) -> Cells:
    """Each method's metric at every rate, on each task."""
    lines = []
    for task, method in itertools.product(EPOCHS, RATES):
        found = [metrics_of(rows, "tune", task, method=method, rate=rate) for rate in rates]
        lines.append([task, method, *(f"{max(v.values()):.4f}" if v else "–" for v in found)])
    return lines


def methods(rows: list[Row]) -> Cells:
    """The methods at their rates, and by how much BIM-LoRA is ahead of each within a seed."""
    lines = []
    for task, method in itertools.product(EPOCHS, METHODS):
        values = metrics_of(rows, "main", task, method=method)
        if not values:
            continue
        ours = metrics_of(rows, "main", task, method="bim_lora")
        wanted = {"part": "main", "task": task, "method": method}
        chosen = [row for row in rows if wanted.items() <= row.items()]
        lines.append([
            task, METRIC[task], method, f"{chosen[0]['rate']:g}", f"{chosen[0]['trainable']:,}",
            mean_and_interval(list(values.values())),
            "" if method == "bim_lora" else paired_difference(ours, values),
            f"{sum(r['train_seconds'] for r in chosen) / len(chosen):.0f}",
        ])  # fmt: skip
    return lines


def untuned(rows: list[Row]) -> Cells:
    """Runs at rates that are not the tuned ones."""
    found: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        key = row["task"], row["method"], f"{row['rate']:g}"
        found.setdefault(key, []).append(row["final"][METRIC[row["task"]]])
    return [[*key, mean_and_interval(values)] for key, values in found.items()]


def by_start(rows: list[Row]) -> dict[str, dict[int, float]]:
    """start of the mask -> seed -> F1; the network's runs are those of `main`."""
    return {
        start: metrics_of(rows, "main", "mrpc", method="bim_lora")
        if start == FULL
        else metrics_of(rows, "ablation", "mrpc", start=start)
        for start in ABLATION
    }


def starts(rows: list[Row]) -> Cells:
    found = by_start(rows)
    return [
        [
            start, str(len(values)), mean_and_interval(list(values.values())),
            "" if start == FULL else paired_difference(values, found[FULL]),
        ]
        for start, values in found.items()
        if values
    ]  # fmt: skip


def rankings(rows: list[Row], names: list[str]) -> Cells:
    """Mean over the seeds of each correlation, by the number of batches."""
    lines = []
    for steps in STEPS:
        these = [r for r in rows if r["part"] == "collection" and r["steps"] == steps]
        if these:
            means = (sum(r[name] for r in these) / len(these) for name in names)
            lines.append([str(steps), str(len(these)), *(f"{v:.3f}" for v in means)])
    return lines


def plot(rows: list[Row], path: Path) -> None:
    """The methods on both tasks, the ablation, and the ranking of blocks by number of batches."""
    from examples.plots.canvas import canvas

    rows, _ = current(rows)
    pyplot = canvas()
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    draw_methods(axes[0], rows, EPOCHS, METHODS)
    left, right = axes[1]
    dots(left, {start: list(values.values()) for start, values in by_start(rows).items()})
    left.set_title("where the mask starts (mrpc)", fontsize="medium")
    left.set_ylabel("f1")
    found = [row for row in rows if row["part"] == "collection"]
    for name, label in FEATURES.items():
        steps = sorted({row["steps"] for row in found})
        means = [
            statistics.mean(row[name] for row in found if row["steps"] == count) for count in steps
        ]
        right.plot(steps, means, "o-", ms=4, label=label)
    right.set_xscale("log")
    right.set_xlabel("batches")
    right.set_ylabel(f"Spearman's ρ with {MANY} other batches")
    right.set_title("how soon the ranking of blocks is known", fontsize="medium")
    right.legend(fontsize="small", frameon=False)
    right.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = options(__doc__, "bim_study")
    parts = ("tune", "main", "ablation", "collection")
    parser.add_argument("--part", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--tasks", type=comma_separated, default=list(EPOCHS))
    parser.add_argument("--lanes", type=int, default=1, help="runs at a time")
    carry_out(parser, go, table, plot)


if __name__ == "__main__":
    main()
