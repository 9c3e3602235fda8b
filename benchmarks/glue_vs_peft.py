"""LoRA on real GLUE tasks, this project beside Transformers + PEFT: same data, settings and seeds.

    python -m benchmarks.glue_vs_peft --model DIR --data_dir DIR/glue --seeds 0,1,2
    python -m benchmarks.glue_vs_peft --table            # the table of what is there

Each run is a process of its own and one JSON line in `--out`; a run that has its line is not
repeated, so a study that was stopped goes on where it was. The table gives, per task and side, the
mean and the 95 % interval (Student's t over seeds) of the last epoch's metric. Unknown
options go to `examples.run_glue`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path

from benchmarks.common.studies import METRIC, carry_out, comma_separated, markdown, options
from examples.sweeps.records import Row, call, once, run_glue
from examples.sweeps.statistics import mean_and_interval

SETTINGS = {"lr": 1e-3, "batch": 32, "r": 8, "alpha": 16, "warmup_ratio": 0.06, "max_length": 128}


def ours(o: argparse.Namespace, task: str, seed: int, folder: Path) -> dict:
    words = [
        "--task_name", task, "--method", "lora",
        "--model_name_or_path", o.model, "--data_dir", o.data_dir,
        "--num_train_epochs", str(o.epochs), "--seed", str(seed), "--lora_r", str(SETTINGS["r"]),
        "--lora_alpha", str(SETTINGS["alpha"]), "--learning_rate", str(SETTINGS["lr"]),
        "--per_device_train_batch_size", str(SETTINGS["batch"]), "--weight_decay", "0.0",
        "--warmup_ratio", str(SETTINGS["warmup_ratio"]),
        "--max_length", str(SETTINGS["max_length"]), *o.more,
    ]  # fmt: skip
    return run_glue(words, folder / "run")


def peer(o: argparse.Namespace, task: str, seed: int, folder: Path) -> dict:
    command = [
        sys.executable, "-m", "benchmarks.peer_glue", "--model", o.model, "--task", task,
        "--data_dir", o.data_dir, "--epochs", str(o.epochs), "--seed", str(seed),
        "--dtype", o.peer_dtype, "--out", str(folder / "peer.json"),
    ]  # fmt: skip
    for name, value in SETTINGS.items():
        command += [f"--{name}", str(value)]
    call(command)
    return json.loads((folder / "peer.json").read_text())


def table(rows: list[Row]) -> str:
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        last = {side: [] for side in ("ours", "peer")}
        seconds = {side: [] for side in ("ours", "peer")}
        for row in rows:
            if row["task"] == task and row["side"] in last:
                last[row["side"]].append(row["history"][-1][METRIC[task]])
                seconds[row["side"]].append(row["train_seconds"])
        if not last["ours"] or not last["peer"]:
            continue
        gap = statistics.mean(last["ours"]) - statistics.mean(last["peer"])
        epochs = max(len(row["history"]) for row in rows if row["task"] == task)
        mean = {side: statistics.mean(values) for side, values in seconds.items()}
        lines.append([
            task, METRIC[task], str(epochs), str(len(last["ours"])),
            mean_and_interval(last["ours"]), mean_and_interval(last["peer"]), f"{gap:+.4f}",
            f"{mean['ours']:.0f} / {mean['peer']:.0f}",
        ])  # fmt: skip
    heads = ["task", "metric", "epochs", "seeds", "this project", "Transformers + PEFT"]
    return markdown([*heads, "difference", "training seconds, ours / peer"], lines)


def go(o: argparse.Namespace) -> None:
    for seed in o.seeds:
        for task in o.tasks:
            for side, run in (("ours", ours), ("peer", peer)):
                key = {"task": task, "side": side, "seed": seed, "epochs": o.epochs}
                row = once(o.out, key, partial(run, o, task, seed))
                print(json.dumps({**key, "last": row["history"][-1]}), flush=True)


def main() -> None:
    parser = options(__doc__, "glue_vs_peft")
    parser.add_argument("--tasks", default=["mrpc", "cola", "stsb"], type=comma_separated)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--peer_dtype", default="float32", choices=("float32", "bfloat16"))
    carry_out(parser, go, table)


if __name__ == "__main__":
    main()
