"""Adaptive ranks and a posterior on real tasks: full, LoRA, AdaLoRA, AdaLoRA with IVON, ViLoRA.

    python -m benchmarks.adaptive_study --model DIR --data_dir DIR/glue --out FILE.jsonl
    python -m benchmarks.adaptive_study --table    # of results/adaptive_study.jsonl
    python -m benchmarks.adaptive_study --plot FILE.png

Parts, in this order unless `--part` names some:

    tune      each optimiser's learning rate, once: CoLA, 1 seed, 3 epochs, by the last weights
    main      MRPC 5 epochs, CoLA 8; mean rank 4 from 6; 3 seeds
    criteria  CoLA, 5 epochs, 2 seeds: what else could rank the triplets
    budget    CoLA, 5 epochs, 2 seeds: mean rank 2 from 3
    sigma     CoLA, 3 epochs, all triplets kept: IVON's settings, what they do to σ, and what that
              does to the criteria; the first and the last setting with 2 seeds
    moved     as `criteria`, with the setting under which σ differs most between weights

Each run is a process of its own and one line of `--out`; a run that has its line is not repeated.
`--lanes 2` does two at a time (with OMP_NUM_THREADS=1, the cheapest use of two cores).
Unknown options go to `examples.run_glue`. Adapted are the six linear maps of every layer (36 in
MiniLM). All figures are those of the last weights on the development set: nothing is chosen by
looking at it but the rates. IVON predicts by 16 samples of the weights, and at their mean.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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
from benchmarks.posterior_figures import adapter_figures, agreement
from examples.sweeps.drawing import dots
from examples.sweeps.records import Row, in_lanes, once, read, run_glue
from examples.sweeps.statistics import mean_and_interval, paired_difference

EPOCHS = {"mrpc": 5, "cola": 8}
TUNED_ON = "cola"  # whose 804 steps of 3 epochs lie between the 575 and 2,144 of `main`
SETTINGS = (
    "--per_device_train_batch_size 32 --weight_decay 0 --max_grad_norm 0 --warmup_ratio 0.06 "
    "--max_length 128 --packing --load_best_model_at_end false --save_strategy no --calibration "
    "--eval_strategy no"  # but at the end
).split()
LORA = "--base_dtype bfloat16 --lora_modules query,key,value,output.dense,intermediate.dense"
SVD = f"{LORA} --adalora_tinit 0.15 --adalora_tfinal 0.4 --adalora_delta_t 10"
SVD += " --adalora_orth_reg_weight 0.1 --lora_alpha 32"
IVON = "--optimizer ivon --ivon_infer_mc_samples 16"
METHODS = {
    "full": "--method full --mixed_precision bf16",
    "lora": f"--method lora {LORA} --lora_alpha 32",
    "adalora": f"--method adalora {SVD}",
    "adalora_ivon": f"--method adalora {SVD} {IVON}",
    "vilora": f"--method vilora {SVD} {IVON}",
}
RATES = {  # tried; what has none here takes those of another
    "full": (2e-5, 5e-5, 1e-4, 2e-4),
    "lora": (2e-4, 5e-4, 1e-3, 2e-3),
    "adalora": (1e-3, 2e-3, 4e-3),
    "adalora_ivon": (1.0, 2.0, 4.0, 8.0),
}
CRITERIA = ("SNR_mean_abs", "SNR", "mean", "sigma", "E_mean_abs")
RANKS = {4: 6, 2: 3, 6: 6}  # mean rank at the end: at the start
# h₀ and β₂; ess = N/h₀ and rate = tuned/h₀ keep σ at the start and the largest step as they are
SIGMA = {
    "published": (1.0, 0.99999),
    "β₂ 0.999": (1.0, 0.999),
    "h₀ 0.01, β₂ 0.999": (0.01, 0.999),
    "h₀ 0.001, β₂ 0.999": (0.001, 0.999),
    "h₀ 0.001, β₂ 0.99": (0.001, 0.99),
}
MOVED = "h₀ 0.001, β₂ 0.99"
CAPTION = {"criteria": "IVON as published", "moved": f"with {MOVED}"}
PAIRS = (("SNR", "mean"), ("SNR", "sigma"), ("mean", "sigma"), ("SNR_mean_abs", "mean"))
ROWS = {"mrpc": 3668, "cola": 8551}


@dataclass(frozen=True)
class Job:
    """One run: what tells it from the others, and the words for the program."""

    key: Row
    words: tuple[str, ...]

    @classmethod
    def make(
        cls, part: str, task: str, method: str, seed: int, epochs: int, rate: float, rank: int = 4,
        **more: object,
    ) -> Job:  # fmt: skip
        words = [*METHODS[method].split(), "--learning_rate", str(rate), "--seed", str(seed)]
        words += ["--num_train_epochs", str(epochs), "--task_name", task]
        if method == "lora":
            words += ["--lora_r", str(rank)]
        elif method != "full":
            start = more.pop("start", RANKS[rank])
            words += ["--adalora_target_r", str(rank), "--adalora_init_r", str(start)]
        for name, value in more.items():
            if name != "setting":
                words += [f"--{name}", str(value)]
        key = {"part": part, "task": task, "method": method, "seed": seed, "epochs": epochs}
        return cls({**key, "rate": rate, "rank": rank, **more}, tuple(words))


def jobs(part: str, rows: list[Row], seeds: list[int]) -> Iterator[Job]:
    """The runs of a part; those after `tune` need its rows."""
    rate = tuned(rows)
    if part == "tune":
        for method, values in RATES.items():
            for value in values:
                yield Job.make(part, TUNED_ON, method, 0, 3, value)
    elif part == "main":
        for seed, (task, epochs) in itertools.product(seeds, EPOCHS.items()):
            for method in METHODS:
                yield Job.make(part, task, method, seed, epochs, rate(method))
    elif part == "criteria":
        for seed in seeds[:2]:
            yield Job.make(part, "cola", "adalora_ivon", seed, 5, rate("vilora"))
            for name in CRITERIA:
                more = {"vilora_criterion": name}
                yield Job.make(part, "cola", "vilora", seed, 5, rate("vilora"), **more)
    elif part == "budget":
        for seed in seeds[:2]:
            for method in ("lora", "adalora", "adalora_ivon", "vilora"):
                yield Job.make(part, "cola", method, seed, 5, rate(method), rank=2)
    elif part == "sigma":
        again = ("published", MOVED)
        for seed, setting in [(0, name) for name in SIGMA] + [(1, name) for name in again]:
            value = rate("vilora") / SIGMA[setting][0]
            more = ivon_setting(setting, "cola")
            yield Job.make(part, "cola", "vilora", seed, 3, value, rank=6, **more)
    elif part == "moved":
        for seed, name in itertools.product(seeds[:2], CRITERIA):
            more = {**ivon_setting(MOVED, "cola"), "vilora_criterion": name}
            value = rate("vilora") / SIGMA[MOVED][0]
            yield Job.make(part, "cola", "vilora", seed, 5, value, **more)


def ivon_setting(name: str, task: str) -> Row:
    h0, beta2 = SIGMA[name]
    return {
        "setting": name,
        "ivon_hess_init": h0,
        "ivon_beta2": beta2,
        "ivon_ess": ROWS[task] / h0,
    }


def tuned(rows: list[Row]) -> Callable[[str], float]:
    """method -> the rate whose last weights were best."""

    def rate(method: str) -> float:
        method = method if method in RATES else "adalora_ivon"
        own = [row for row in rows if (row["part"], row["method"]) == ("tune", method)]
        return best_rate(own, TUNED_ON, RATES[method], method)

    return rate


def go(o: argparse.Namespace) -> None:
    def do(job: Job) -> None:
        def run(folder: Path) -> Row:
            where = ["--model_name_or_path", o.model, "--data_dir", o.data_dir]
            row = run_glue([*where, *SETTINGS, *job.words, *o.more], folder / "run")
            return {**row, **adapter_figures(folder / "run" / "adapter")}

        row = once(o.out, job.key, run)
        shown = {name: round(row["final"][name], 4) for name in (METRIC[row["task"]], "nll")}
        print(json.dumps({**job.key, **shown, "cpu": row["cpu_seconds"]}), flush=True)

    for parts in [["tune"]] * ("tune" in o.part) + [[p for p in o.part if p != "tune"]]:
        every = [job for part in parts for job in jobs(part, read(o.out), o.seeds)]
        in_lanes(o.lanes, [partial(do, job) for job in every if job.key["task"] in o.tasks])


# -- tables ---------------------------------------------------------------------------------------


def figures(rows: list[Row], reference: Sequence[Row] = ()) -> list[str]:
    """Metric, its distance from that of `reference`, NLL, calibration error, entropy, CPU seconds
    of the runs of one configuration."""

    def mean(name: str) -> str:
        return mean_and_interval([row["final"][name] for row in rows if name in row["final"]])

    metric = METRIC[rows[0]["task"]]
    at_mean = f"mean_{metric}" in rows[0]["final"]
    by_seed = [{row["seed"]: row["final"][metric] for row in some} for some in (rows, reference)]
    gap = "" if rows is reference else paired_difference(*by_seed)
    cells = [mean(metric), gap, mean(f"mean_{metric}") if at_mean else ""]
    cells += [mean(name) for name in ("nll", "ece", "entropy")]
    cells.append(mean("mean_nll") if at_mean else "")
    seconds = statistics.mean(row["cpu_seconds"] for row in rows)
    return [str(len(rows)), *cells, f"{seconds:.0f}"]


HEADS = ["at the mean", "NLL", "ECE", "entropy", "NLL at the mean", "CPU s"]


def compared_with(group: list[Row], groups: dict[tuple, list[Row]]) -> list[Row]:
    """The reference of a configuration: AdaLoRA with AdamW on the same task, else the first."""
    same = [rows for rows in groups.values() if rows[0]["task"] == group[0]["task"]]
    return next((rows for rows in same if rows[0]["method"] == "adalora"), same[0])


def grouped(rows: list[Row], *names: str) -> dict[tuple, list[Row]]:
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(name, "") for name in names), []).append(row)
    return found


def table(rows: list[Row]) -> str:
    """All parts there are."""
    text = []
    for part, own in grouped(rows, "part").items():
        text += ["", f"## {part[0]}", ""]
        own.sort(key=lambda row: (row["task"], list(METHODS).index(row["method"]), row["rate"]))
        if part[0] == "tune":
            lines = [[*map(str, key), *figures(group)[1:2]] for key, group in
                     grouped(own, "task", "method", "rate").items()]  # fmt: skip
            text.append(markdown(["task", "method", "rate", "metric"], lines))
            continue
        names = ("task", "epochs", "rank", "method", "vilora_criterion", "setting")
        names = [name for name in names if len({row.get(name) for row in own}) > 1]
        groups = grouped(own, *names)
        lines = [[*map(str, key), *figures(group, compared_with(group, groups))]
                 for key, group in groups.items()]  # fmt: skip
        first = compared_with(own, groups)[0]
        name = next(first[name] for name in reversed(names) if name in first)
        heads = [*names, "seeds", "metric", f"minus {name}", *HEADS]
        text += [markdown(heads, lines), "", *spreads(groups)]
    return "\n".join(text)


def spreads(groups: dict[tuple, list[Row]]) -> Iterator[str]:
    """What became of ranks, σ and criteria, where there is a posterior."""
    lines = []
    for key, rows in groups.items():
        posteriors = [row["posterior"] for row in rows if row.get("posterior")]
        if not posteriors:
            continue
        first = posteriors[0]
        spread = " · ".join(f"{k} {v['variation']:.2g}" for k, v in first["sigma"].items())
        every = first["sigma"]["all"]
        width = f"{every['mean']:.4g} ({every['min']:.3g} … {every['max']:.3g})"
        likeness = [f"{a}~{b} {first['spearman'][a][b]:+.2f}" for a, b in PAIRS]
        shared = " ".join(f"{name} {v:.2f}" for name, v in first["kept_like_mean"].items())
        seeds = f"{agreement(posteriors):+.2f}" if len(posteriors) > 1 else ""
        name = " ".join(str(part) for part in key if part != "")
        lines.append([name, width, spread, ", ".join(likeness), shared, seeds])
    if lines:
        yield markdown(
            ["run", "σ: mean (relative min … max)", "s.d./mean of σ", "Spearman of triplet scores",
             "share of the best 2/3 also in mean's", "1/σ of modules, between seeds"],
            lines,
        )  # fmt: skip


def plot(rows: list[Row], path: Path) -> None:
    """The methods on both tasks; the criteria under two settings of IVON; what σ did."""
    from examples.plots.canvas import canvas

    pyplot = canvas()
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    draw_methods(axes[0], rows, EPOCHS, METHODS)
    left, right = axes[1]
    for part, colour, shift in (("criteria", "tab:blue", -0.15), ("moved", "tab:red", 0.15)):
        found = {name: metrics_of(rows, part, "cola", vilora_criterion=name) for name in CRITERIA}
        dots(left, {name: list(values.values()) for name, values in found.items()}, colour, shift)
        left.plot([], [], "o", color=colour, label=CAPTION[part])
    left.legend(fontsize="small", frameon=False)
    left.set_title("ViLoRA's criterion, cola, 5 epochs", fontsize="medium")
    left.set_ylabel(METRIC["cola"].replace("_", " "))
    posteriors = {
        row["setting"]: row["posterior"]
        for row in rows
        if row["part"] == "sigma" and row["seed"] == 0
    }
    names = [name for name in SIGMA if name in posteriors]
    heights = [posteriors[name]["sigma"]["all"]["variation"] for name in names]
    right.bar(range(len(names)), heights, color="0.6")
    right.set_yscale("log")
    right.set_xticks(range(len(names)), names, rotation=25, ha="right", fontsize="small")
    for place, name in enumerate(names):
        rho = posteriors[name]["spearman"]["SNR"]["mean"]
        right.annotate(f"ρ {rho:.2f}", (place, heights[place]), ha="center", va="bottom")
    right.set_title("IVON's setting: spread of σ; ρ of |μ|/σ with |μ|", fontsize="medium")
    right.set_ylabel("s.d. / mean of σ over all weights")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = options(__doc__, "adaptive_study")
    parts = ["tune", "main", "criteria", "budget", "sigma", "moved"]
    parser.add_argument("--part", default=parts, type=comma_separated)
    parser.add_argument("--tasks", default=list(EPOCHS), type=comma_separated)
    parser.add_argument("--lanes", type=int, default=1, help="runs at a time")
    carry_out(parser, go, table, plot)


if __name__ == "__main__":
    main()
