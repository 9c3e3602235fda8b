"""What every rank is worth: DyLoRA in both modes, LoRA cut down, and LoRA trained at each rank.

    python -m benchmarks.dylora_study --model DIR --data_dir DIR/glue --out FILE.jsonl
    python -m benchmarks.dylora_study --table    # of results/dylora_study.jsonl
    python -m benchmarks.dylora_study --plot FILE.png

Per task and seed seven runs (`--runs` names some), each a process of its own and one line of
`--out`; a run that has its line is not repeated. Unknown options go to `examples.run_glue`. All
figures are those of the last weights on the development set: no epoch is chosen by looking at it.

    normal, frozen     DyLoRA, R = 8, evaluated at every rank b
    matryoshka         the same nested factors without a draw, all ranks trained in every step
    cut, cut_kept      the LoRA of rank 8, of which the first b components are kept: scaled by
                       alpha / b, as DyLoRA does it, or by its own alpha / 8
    separate           LoRA trained at b = 1, 2, 4 and 8
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from benchmarks.common.studies import METRIC, carry_out, comma_separated, markdown, options
from examples.cli.fields import option
from examples.methods import lora
from examples.methods.dylora_ranks import areas
from examples.methods.registry import register_method
from examples.sweeps.records import Row, once, run_glue
from examples.sweeps.statistics import half_interval, mean_and_interval

R, ALPHA = 8, 16
RANKS, SEPARATE = range(1, R + 1), (1, 2, 4, 8)
SETTINGS = (
    "--learning_rate 1e-3 --per_device_train_batch_size 32 --weight_decay 0 --warmup_ratio 0.06 "
    f"--max_length 128 --packing --group_by_length --base_dtype bfloat16 --lora_alpha {ALPHA} "
    "--load_best_model_at_end false --save_strategy no"
).split()
RUNS = {
    "dylora_normal": ["--method", "dylora", "--lora_r", str(R), "--dylora_mode", "normal"],
    "dylora_frozen": ["--method", "dylora", "--lora_r", str(R), "--dylora_mode", "frozen"],
    # fp32: these ran on a processor without bf16
    "dylora_matryoshka": [
        *("--method", "dylora", "--lora_r", str(R), "--dylora_mode", "matryoshka"),
        *("--base_dtype", "float32"),
    ],
    **{f"lora_{b}": ["--method", "lora", "--lora_r", str(b)] for b in (8, 1, 2, 4)},
}
TITLE = {"mrpc": "MRPC", "cola": "CoLA"}
COLOURS = {
    "normal": "tab:blue", "frozen": "tab:cyan", "matryoshka": "tab:green", "cut": "tab:red",
    "cut_kept": "tab:orange", "separate": "0.25",
}  # fmt: skip
CURVES = {
    "normal": "DyLoRA",
    "frozen": "DyLoRA, frozen",
    "matryoshka": "matryoshka",
    "cut": "LoRA of rank 8, cut to b, scale α/b",
    "cut_kept": "LoRA of rank 8, cut to b, scale α/8",
    "separate": "LoRA trained at b",
}


# -- LoRA cut down, as a method of the runner that only evaluates ----------------------------------


@dataclass(frozen=True)
class CutOptions(lora.LoraOptions):
    cut_file: str = option("", "where the metrics go")


class CutPredictor:
    """Variants `r<b>` and `kept<b>`: the first b components, scaled by alpha / b or alpha / R."""

    probabilistic = False
    stacked = False

    def __init__(self, model: Any) -> None:
        from peft_custom.save_and_load import adapter_tensors

        self.factors = [p for n, p in adapter_tensors(model).items() if n.endswith("lora_B.weight")]

    def variants(self, final: bool) -> list[str]:
        return [*(f"kept{b}" for b in RANKS), *(f"r{b}" for b in RANKS)]

    def outputs(self, model: Any, arguments: dict[str, Any], variants: list[str]) -> list[Any]:
        whole = [B.clone() for B in self.factors]
        found = []
        for variant in variants:
            b = int(variant.lstrip("kept").lstrip("r"))
            for B, kept in zip(self.factors, whole, strict=True):
                B.zero_()
                B[:, :b] = kept[:, :b] * (1.0 if variant.startswith("kept") else R / b)
            found.append(model(**arguments))
        for B, kept in zip(self.factors, whole, strict=True):
            B.copy_(kept)
        return found


def cut(source: Any, options: CutOptions) -> Any:
    adapted = lora.build(source, options)
    adapted.predictor = CutPredictor(adapted.model)

    def summarize(metrics: Row, *_: object) -> Row:
        Path(options.cut_file).write_text(json.dumps(metrics), "utf-8")
        return {}

    adapted.summarize = summarize
    return adapted


register_method("cut", CutOptions, cut, "LoRA cut down, for a study")


def cut_metrics(words: Sequence[str], run: Path) -> Row:
    """The metrics of a LoRA run's adapter cut to every rank, named `r1_f1` and `kept1_f1`."""
    from examples import program
    from examples.run_glue import main as run_here

    file = run.parent / "cut.json"
    words = [*words, "--method", "cut", "--lora_r", str(R), "--eval_only", "--lora_path", str(run)]
    with redirect_stdout(StringIO()):
        status = program.run_main(
            run_here, [*words, "--cut_file", str(file), "--output_dir", str(run.parent / "none")]
        )
    assert status == 0
    return {k.removeprefix("eval_"): v for k, v in json.loads(file.read_text()).items()}


# -- the study ------------------------------------------------------------------------------------


def go(o: argparse.Namespace) -> None:
    for seed in o.seeds:
        for task in o.tasks:
            common = ["--task_name", task, "--model_name_or_path", o.model, *SETTINGS]
            common += ["--data_dir", o.data_dir, *o.more]
            for name, own in ((name, RUNS[name]) for name in o.runs):

                def run(folder: Path, name=name, own=own, common=common, seed=seed) -> Row:
                    words = [*common, *own, "--seed", str(seed), "--num_train_epochs"]
                    row = run_glue([*words, str(o.epochs)], folder / "run")
                    if name == f"lora_{R}":
                        row["cut"] = cut_metrics(common, folder / "run")
                    return row

                key = {"task": task, "seed": seed, "epochs": o.epochs, "run": name}
                row = once(o.out, key, run)
                print(json.dumps({**key, METRIC[task]: row["final"][METRIC[task]]}), flush=True)


def curves(rows: list[Row], task: str) -> dict[str, dict[int, list[float]]]:
    """curve -> rank -> the task's metric at each seed."""
    metric = METRIC[task]
    found: dict[str, dict[int, list[float]]] = {}
    for row in (row for row in rows if row["task"] == task):
        method, _, what = row["run"].partition("_")
        for b in RANKS:
            if method == "dylora":
                values = {what: row["final"][f"r{b}_{metric}"]}
            elif int(what) != R:
                values = {"separate": row["final"][metric]} if int(what) == b else {}
            else:
                values = {"cut": row["cut"][f"r{b}_{metric}"]}
                values["cut_kept"] = row["cut"][f"kept{b}_{metric}"]
                if b == R:
                    values["separate"] = row["final"][metric]
            for curve, value in values.items():
                found.setdefault(curve, {}).setdefault(b, []).append(value)
    return {curve: found[curve] for curve in CURVES if curve in found}


def table(rows: list[Row]) -> str:
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        found = curves(rows, task)
        lines += [f"**{task}**, {METRIC[task]}, mean ± 95 % interval over seeds", ""]
        cells = [
            [str(b), *(mean_and_interval(v[b]) if b in v else "" for v in found.values())]
            for b in RANKS
        ]
        cells += [_areas(found)]
        lines += [markdown(["b", *(CURVES[curve] for curve in found)], cells), ""]
        for name in RUNS:
            own = [row for row in rows if (row["task"], row["run"]) == (task, name)]
            if own:
                seconds = statistics.mean(row["train_seconds"] for row in own)
                cpu = statistics.mean(row["cpu_seconds"] for row in own)
                lines.append(
                    f"- {name}: {len(own)} seeds, {seconds:.1f} s of training, CPU {cpu:.1f} s"
                )
        lines.append("")
    return "\n".join(lines)


def _areas(found: dict[str, dict[int, list[float]]]) -> list[str]:
    """The table's line of areas under the curves (AURAC over log₂ b), of each seed's own curve."""
    cells = []
    for by_rank in found.values():
        ranks = sorted(by_rank)
        seeds = zip(*(by_rank[b] for b in ranks), strict=True)
        cells.append(mean_and_interval([areas(ranks, list(v))["aurac_log2"] for v in seeds]))
    return ["AURAC, log₂", *cells]


def plot(rows: list[Row], path: Path) -> None:
    from examples.plots.canvas import canvas

    pyplot = canvas()
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, every = pyplot.subplots(
        1, len(tasks), figsize=(1 + 4.5 * len(tasks), 4.2), layout="constrained", squeeze=False
    )
    for axes, task in zip(every[0], tasks, strict=True):
        for curve, by_rank in curves(rows, task).items():
            place = list(CURVES).index(curve)
            ranks = sorted(by_rank)
            beside = [b + 0.08 * (place - 2) for b in ranks]  # intervals would hide each other
            means = [statistics.mean(by_rank[b]) for b in ranks]
            halves = [half_interval(by_rank[b]) for b in ranks]
            line = "s--" if curve == "separate" else "o-"
            axes.errorbar(
                beside, means, halves, fmt=line, ms=4, lw=1.3, capsize=2,
                color=COLOURS[curve], label=CURVES[curve],
            )  # fmt: skip
        axes.set_xlabel("rank b")
        axes.set_xticks(RANKS)
        axes.set_ylabel(METRIC[task].replace("_", " "))
        axes.set_title(TITLE.get(task, task), fontsize="medium")
        axes.grid(alpha=0.25)
    drawn = [axes.get_legend_handles_labels() for axes in every[0]]
    labelled = {label: handle for pair in drawn for handle, label in zip(*pair, strict=True)}
    figure.legend(
        labelled.values(),
        labelled.keys(),
        loc="outside lower center",
        ncols=3,
        fontsize="small",
        frameon=False,
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = options(__doc__, "dylora_study")
    parser.add_argument("--tasks", default=["mrpc", "cola"], type=comma_separated)
    parser.add_argument("--runs", default=list(RUNS), type=comma_separated)
    parser.add_argument("--epochs", type=int, default=5)
    carry_out(parser, go, table, plot)


if __name__ == "__main__":
    main()
