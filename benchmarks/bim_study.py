"""What the block mask is worth, on real tasks with a real small model.

    python -m benchmarks.bim_study --model DIR --data_dir DIR/glue --out FILE.jsonl --part tune
    … --part main
    … --part ablation
    … --part collection
    python -m benchmarks.bim_study --out FILE.jsonl --table
    python -m benchmarks.bim_study --out FILE.jsonl --plot FILE.png

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

from benchmarks.study import (
    METRIC,
    Row,
    dots,
    draw_methods,
    in_lanes,
    mean_and_interval,
    metrics_of,
    once,
    paired_difference,
    read,
    run_glue,
)

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
    tried = {
        row["rate"]: row["final"][METRIC[task]]
        for row in rows
        if (row["part"], row.get("method"), row["task"]) == ("tune", method, task)
    }
    if len(tried) < len(RATES[method]):
        raise SystemExit(f"--part tune has not all runs of {method} on {task} yet: do it first")
    return max(tried, key=lambda value: tried[value])


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


def spearman(a, b) -> float:
    """The correlation of ranks; ties share their mean rank."""
    import torch

    from peft_custom.tuners.bim_lora.importance import _ranks

    return float(torch.corrcoef(torch.stack([_ranks(a), _ranks(b)]))[0, 1])


# -- tables ----------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    """Rates, main comparison, ablation and collection, as far as they have run."""
    rows, other = current(rows)
    lines: list[str] = []

    def add(title: str, heads: list[str], cells: list[list[str]]) -> None:
        if cells:
            every = [heads, ["---"] * len(heads), *cells]
            lines.extend([f"**{title}**", "", *(f"| {' | '.join(c)} |" for c in every), ""])

    def last(part: str, task: str, **key: str) -> dict[int, float]:
        wanted = {"part": part, "task": task, **key}
        return {r["seed"]: r["final"][METRIC[task]] for r in rows if wanted.items() <= r.items()}

    every = sorted({rate for rates in RATES.values() for rate in rates})
    tune = [
        [t, m, *(f"{max(v.values()):.4f}" if (v := last("tune", t, method=m, rate=x)) else "–"
                 for x in every)]
        for t, m in itertools.product(EPOCHS, RATES)
    ]  # fmt: skip
    add("Learning rates, 3 epochs", ["task", "method", *map(str, every)], tune)
    main = []
    for task, method in itertools.product(EPOCHS, METHODS):
        values, ours = last("main", task, method=method), last("main", task, method="bim_lora")
        if not values:
            continue
        chosen = [
            row for row in rows if (row["part"], row.get("method")) == ("main", method)
            and row["task"] == task
        ]  # fmt: skip
        main.append([
            task, METRIC[task], method, f"{chosen[0]['rate']:g}", f"{chosen[0]['trainable']:,}",
            mean_and_interval(list(values.values())),
            "" if method == "bim_lora" else paired_difference(ours, values),
            f"{sum(r['train_seconds'] for r in chosen) / len(chosen):.0f}",
        ])  # fmt: skip
    add(
        "BIM-LoRA and LoRA (mean, 95 % interval over seeds)",
        ["task", "metric", "method", "rate", "trained", "result", "BIM-LoRA minus it", "seconds"],
        main,
    )
    untuned: dict[tuple, list[float]] = {}
    for row in other:
        key = row["task"], row["method"], f"{row['rate']:g}"
        untuned.setdefault(key, []).append(row["final"][METRIC[row["task"]]])
    cells = [[*key, mean_and_interval(values)] for key, values in untuned.items()]
    add("The same at other rates", ["task", "method", "rate", "result"], cells)
    full = last("main", "mrpc", method="bim_lora")
    ablation = []
    for start in ABLATION:
        values = full if start == FULL else last("ablation", "mrpc", start=start)
        if values:
            shown = mean_and_interval(list(values.values()))
            gap = "" if start == FULL else paired_difference(values, full)
            ablation.append([start, str(len(values)), shown, gap])
    add("Where the mask starts (MRPC, F1)", ["start", "seeds", "F1", "minus (a)"], ablation)
    names = [f"{n}{w}" for n in ("grad_mean", "grad_var", "act_var", "label")
             for w in ("", "_within")]  # fmt: skip
    found = []
    for steps in STEPS:
        these = [r for r in rows if r["part"] == "collection" and r["steps"] == steps]
        if these:
            means = (sum(r[name] for r in these) / len(these) for name in names)
            found.append([str(steps), str(len(these)), *(f"{v:.3f}" for v in means)])
    title = f"Spearman's ρ of the blocks' ranking with that from {MANY} other batches (MRPC)"
    add(title, ["batches", "seeds", *names], found)
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """The methods on both tasks, the ablation, and the ranking of blocks by number of batches."""
    from examples.plots.canvas import canvas

    rows, _ = current(rows)
    pyplot = canvas()
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    draw_methods(axes[0], rows, EPOCHS, METHODS)
    left, right = axes[1]
    full = {FULL: metrics_of(rows, "main", "mrpc", method="bim_lora")}
    dots(
        left,
        full | {s: metrics_of(rows, "ablation", "mrpc", start=s) for s in ABLATION if s != FULL},
    )
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("tune", "main", "ablation", "collection")
    parser.add_argument("--model")
    parser.add_argument("--data_dir")
    parser.add_argument("--out", type=Path, default=Path("runs/bim_study.jsonl"))
    parser.add_argument("--part", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--seeds", type=lambda t: [int(s) for s in t.split(",")], default=[0, 1, 2])
    parser.add_argument("--tasks", type=lambda t: t.split(","), default=list(EPOCHS))
    parser.add_argument("--lanes", type=int, default=1, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="print the tables and stop")
    parser.add_argument("--plot", type=Path, help="draw into this PNG and stop")
    o, o.more = parser.parse_known_args()
    if o.plot is not None:
        plot(read(o.out), o.plot)
        return
    if not o.table:
        if not o.model or not o.data_dir:
            parser.error("--model and --data_dir are needed")
        o.out.parent.mkdir(parents=True, exist_ok=True)
        go(o)
    print(table(read(o.out)))


if __name__ == "__main__":
    main()
