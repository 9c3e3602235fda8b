"""Every method on one process and on two, by DDP and by FSDP2: seconds per step, and equality.

    python -m benchmarks.two_processes --model_dir DIR [--methods lora,full] [--steps 6]

Runs of `examples.run_glue` on sentence pairs of random words, dropout switched off, one thread per
process. All sides take the same global batches, so the weights they end with are compared as well.
Two processes on two cores compute the same work as one process on one core does: where nobody else
uses these cores, half of its time is the limit. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file

from examples import program
from examples.data.tables import write_table
from examples.methods import METHODS

GLOBAL_BATCH = 16
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
SIDES: dict[str, tuple[int, dict[str, str]]] = {
    "one": (1, {}), "DDP": (2, {}), "FSDP2": (2, FSDP2),
}  # fmt: skip
RUN = (
    "--task_name mrpc --max_length 64 --no_cache --disable_tqdm "
    "--eval_strategy no --save_strategy no"
)
OPTIONS = {
    "adalora": "--adalora_tinit 1 --adalora_tfinal 3 --adalora_delta_t 1",
    "vilora": "--adalora_tinit 1 --adalora_tfinal 3 --adalora_delta_t 1",
    "bim_lora": "--collection_steps 2",
}


def make_data(folder: Path, model: Path) -> None:
    """Sentence pairs of random words, and the model without dropout."""
    shutil.copytree(model, folder / "model")
    config = folder / "model" / "config.json"
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | still), "utf-8")
    words = "the a small large green old river house walks sees finds under over with one".split()
    rng = random.Random(0)
    for split, rows in (("train", 256), ("validation", 48)):
        texts = [" ".join(rng.choices(words, k=rng.randint(8, 24))) for _ in range(2 * rows)]
        first, second = texts[:rows], texts[rows:]
        labels = [words.index(text.split()[0]) % 2 for text in second]
        columns = {"sentence1": first, "sentence2": second, "label": labels}
        write_table(folder / "mrpc" / f"{split}.jsonl", columns)


def words_of(folder: Path, side: str, method: str, steps: int) -> list[str]:
    """The command line of a run."""
    posterior = METHODS[method].optimizer == "ivon"
    # a large epsilon: a gradient that is 0 but for rounding moves nothing
    rate = "--learning_rate 0.5" if posterior else "--learning_rate 1e-2 --adam_epsilon 1e-3"
    rows = GLOBAL_BATCH // SIDES[side][0]
    where = [
        "--model_name_or_path", str(folder / "model"), "--data_dir", str(folder),
        "--output_dir", str(folder / side / method), "--per_device_train_batch_size", str(rows),
        "--max_train_steps", str(steps), "--method", method,
    ]  # fmt: skip
    dtype = [] if method == "full" else ["--base_dtype", "float32"]  # full trains it: fp32 anyway
    return [*RUN.split(), *dtype, *where, *rate.split(), *OPTIONS.get(method, "").split()]


def launch(folder: Path, side: str, runs: Sequence[Sequence[str]]) -> None:
    """All runs of a side, one after another in the same processes."""
    processes, environment = SIDES[side]
    file = folder / f"{side}.json"
    file.write_text(json.dumps(runs))
    start = [sys.executable]
    if processes > 1:
        start += f"-m torch.distributed.run --standalone --nproc_per_node {processes}".split()
    command = [*start, "-m", "benchmarks.two_processes", "--serve", str(file)]
    threads = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000"}
    done = subprocess.run(
        command, env={**os.environ, **environment, **threads}, capture_output=True, text=True
    )
    print(done.stderr if done.returncode else f"{side}: done", file=sys.stderr)


def serve(file: Path) -> None:
    """Runs what a file lists."""
    import torch.distributed

    from examples.run_glue import main

    # accelerate takes the group down at the end of a run; the next one needs it
    torch.distributed.destroy_process_group = lambda group=None: None
    for words in json.loads(file.read_text("utf-8")):
        program.run_main(main, words)


def row(folder: Path, method: str) -> str:
    """A line of the table."""
    runs = {side: folder / side / method for side in SIDES}
    found = {s: json.loads((run / "all_results.json").read_text()) for s, run in runs.items()}
    step = {side: r["train_seconds"] / r["steps"] for side, r in found.items()}
    weights = {s: load_file(next(run.glob("*/*model.safetensors"))) for s, run in runs.items()}
    cells = [method, f"{step['one']:.2f}"]
    for side in list(SIDES)[1:]:
        pairs = [(weights[side][name], tensor) for name, tensor in weights["one"].items()]
        worst = max(float((a - b).abs().max()) for a, b in pairs if a.numel())
        loss = abs(found[side]["eval_loss"] - found["one"]["eval_loss"])
        cells += [f"{step[side]:.2f}", f"{step[side] / step['one']:.2f}"]
        cells += [f"{worst:.0e}", f"{loss:.0e}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_dir", type=Path, help="MiniLM: python -m examples.backbone")
    parser.add_argument("--methods", default=",".join(METHODS), help="names with commas between")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        return serve(options.serve)
    if options.model_dir is None:
        parser.error("--model_dir is needed")
    methods = options.methods.split(",")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder, options.model_dir)
        for side in SIDES:
            runs = [words_of(folder, side, method, options.steps) for method in methods]
            launch(folder, side, runs)
        heads = [f"{side}, s | × one | weights | loss" for side in list(SIDES)[1:]]
        print(f"| method | one, s | {' | '.join(heads)} |")
        print("|" + "---|" * 10)
        for method in methods:
            print(row(folder, method))


if __name__ == "__main__":
    main()
