"""Folders as runs leave them, written without a run: for tests of what reads them."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

METHODS = ("full", "lora", "dylora", "adalora")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c63f80f00010101001bb6ee560000000049454e44ae426082"
)


def write_run(folder: Path, method: str = "lora", seed: int = 0, **more: Any) -> Path:
    """A finished run.

    Args:
        folder: of the run.
        method: its method.
        seed: its seed.
        more: `values`, of its main metric; `results` and `environment`, added to what is there;
            all others are options.
    """
    values = more.pop("values", [0.6, 0.8, 0.7])
    metric = more.pop("metric", "eval_f1")
    results, environment = more.pop("results", {}), more.pop("environment", {})
    folder.mkdir(parents=True)
    options = {"model_name_or_path": "a/bert", "task_name": "mrpc", "output_dir": str(folder)}
    options |= {"method": method, "seed": seed, "learning_rate": 0.001, "lora_r": 8, **more}
    best = max(values) if values else None
    found = {"main_metric": metric, metric: best, "eval_loss": 0.5, "train_seconds": 10.0 + seed}
    found |= {"trainable_parameters": 1000 if method != "full" else 50000}
    found |= {"tokens_per_second": 1234.5, "peak_memory_bytes": 3 * 2**20, **results}
    env = {"python": "3.11.7", "versions": {"torch": "2.13.0"}, "platform": "Linux-6", "seed": seed}
    env |= {"device": "cpu", "threads": 1, "git_commit": COMMIT, **environment}
    for name, content in (("config", options), ("all_results", found), ("env", env)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    rows = [
        {"step": 10 * n, "epoch": float(n), "eval_loss": 1 / n, metric: value}
        for n, value in enumerate(values, 1)
    ]
    log = [{"step": n, "epoch": n / 10, "loss": 2 / n} for n in range(1, 10 * len(values) + 1)]
    for name, lines in (("metrics", rows), ("log", log)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_adapter(run: Path, ranks: dict[str, int]) -> None:
    """An adapter of empty factors: module -> rank."""
    (run / "adapter").mkdir()
    header, data = {}, b""
    for name, rank in ranks.items():
        size = rank * 2 * 4
        place = [len(data), len(data) + size]
        key = f"base_model.model.{name}.lora_A"
        header[key] = {"dtype": "F32", "shape": [rank, 2], "data_offsets": place}
        data += bytes(size)
    text = json.dumps(header).encode()
    file = len(text).to_bytes(8, "little") + text + data
    (run / "adapter" / "adapter_model.safetensors").write_bytes(file)


def comparison(root: Path, tasks: tuple[str, ...] = ("mrpc", "cola")) -> Path:
    """Methods × tasks × three seeds, with a search of rates, ranks, calibration and forgetting."""
    rng = random.Random(0)
    for task in tasks:
        for m, method in enumerate(METHODS):
            for rate, seeds in ((1e-4, 1), (1e-3, 3), (1e-2, 1)):
                for seed in range(seeds):
                    run = root / task / f"{method}-{rate:g}-{seed}"
                    top = 0.8 - 0.03 * abs(math.log10(rate) + 3) + 0.01 * m
                    ends = [top - 0.2 / n + rng.gauss(0, 0.01) for n in range(1, 7)]
                    own = {"eval_ece": rng.uniform(0.02, 0.1), "eval_nll": 0.4, "eval_entropy": 0.3}
                    own |= {"forgetting": rng.uniform(0.1, 0.9), "language_loss_before": 2.0}
                    own |= {"language_loss_after": 2.5, "trainable_parameters": 1000 * 3**m}
                    if method == "dylora":
                        own |= {"aurac_linear": 0.7, "aurac_log2": 0.6, "best_rank": 4}
                        own |= {"smallest_rank": 2}
                    options = {"task_name": task, "learning_rate": rate, "results": own}
                    write_run(run, method, seed, values=ends, **options)
                    if method == "dylora":
                        curve = {"metric": "eval_f1", "ranks": [1, 2, 4, 8]}
                        curve["eval_f1"] = [top - 0.1 / r + 0.01 * seed for r in (1, 2, 4, 8)]
                        (run / "rank_curve.json").write_text(json.dumps(curve))
                    if method == "adalora":
                        kinds = ("attention.self.query", "attention.self.value", "output.dense")
                        names = [
                            f"bert.encoder.layer.{n}.{kind}" for n in range(6) for kind in kinds
                        ]
                        write_adapter(run, {name: rng.randint(0, 8) for name in names})
                        (run / "plots").mkdir()
                        (run / "plots" / "ranks.png").write_bytes(PNG)
    return root
