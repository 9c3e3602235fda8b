"""A whole fine-tuning run, start to exit: our program beside Transformers' example script.

    python -m benchmarks.end_to_end --model FOLDER --data_dir ../shared/data/glue --epochs 3
    python -m benchmarks.end_to_end --model FOLDER --data_dir ../shared/data/squad --task squad

The same task, rows, epochs, batch and LoRA r 8 on query and value. The runs take turns, each a
process of its own with nothing cached; all else is the default of each side. The peer
(`peer_trainer.py`, `peer_qa.py`) pads to 128 tokens, of SQuAD's windows to 384, and computes in
fp32, or under autocast ("bf16", unless `--fp32` leaves it out). Prints wall seconds, seconds of CPU
time, peak resident memory, and the ratios to the first peer.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def commands(o: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """Every contender's command line."""
    squad = o.task == "squad"
    peer = [
        *("-m", "benchmarks.peer_qa" if squad else "benchmarks.peer_trainer", "--model", o.model),
        *([] if squad else ["--task", o.task]),
        *("--data_dir", o.data_dir, "--epochs", o.epochs, "--batch", o.batch),
        *(["--rows", o.rows] if o.rows else []),
        *("--output_dir", folder / "run"),
    ]
    ours = [
        *("-m", "examples.run_squad" if squad else "examples.run_glue"),
        *("--model_name_or_path", o.model),
        *([] if squad else ["--task_name", o.task]),
        *("--data_dir", o.data_dir, "--num_train_epochs", o.epochs),
        *("--per_device_train_batch_size", o.batch, "--method", "lora"),
        *("--lora_r", 8, "--lora_alpha", 16),
        *(["--eval_strategy", "no", "--load_best_model_at_end", "false"] if squad else []),
        *(["--max_train_samples", o.rows, "--max_eval_samples", o.rows] if o.rows else []),
        *("--cache_dir", folder / "cache", "--output_dir", folder / "run"),
    ]
    found = {
        "peer": peer,
        "peer, bf16": [*peer, "--bf16"],
        "ours": ours,
        "ours, --packing": [*ours, "--packing"],
    }
    if o.fp32:
        del found["peer, bf16"]
    return {name: [sys.executable, *map(str, command)] for name, command in found.items()}


def run(command: list[str]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak GiB of a process."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(log.read().decode()[-3000:])
    wall = time.perf_counter() - started
    return wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub id of a pretrained model")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--task", default="mrpc")
    parser.add_argument("--fp32", action="store_true", help="no peer under autocast")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rows", type=int, help="only the first rows of each split")
    o = parser.parse_args()
    print("| run | wall seconds | ratio | CPU seconds | ratio | peak GiB | ratio |")
    print("|---|---|---|---|---|---|---|", flush=True)
    first: tuple[float, ...] = ()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for contender, command in commands(o, folder).items():
            figures = run(command)
            first = first or figures
            cells = [
                f"{x:.{digits}f} | {x / y:.2f}×"
                for x, y, digits in zip(figures, first, (0, 0, 2), strict=True)
            ]
            print(f"| {contender} | {' | '.join(cells)} |", flush=True)
            for left in folder.iterdir():
                shutil.rmtree(left)


if __name__ == "__main__":
    main()
