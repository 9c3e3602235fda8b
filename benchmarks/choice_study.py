"""ARC-Easy with a small sentence encoder: full fine-tuning, LoRA and BIM-LoRA.

    python -m benchmarks.choice_study --model DIR --data_dir DIR/arc --out FILE.jsonl
    … --part similarity
    python -m benchmarks.choice_study --table    # of results/choice_study.jsonl

Every run is a process of its own and one line of `--out`; a run that has its line is not repeated.
Unknown options go to `examples.run_multiple_choice`. 1,000 training questions, 2 epochs. Part tune
tries rates by one seed each; part main takes the best of them, or the middle one where tune has
not run, for the seeds (`--seeds` for LoRA, the first of them for the others). All figures are those
of the last weights on the 549 validation questions. Always answering alike gives .25, and by chance
.018 more or less. Part similarity trains nothing: the choice whose mean token state has the larger
cosine with the question's, which is what the encoder was made for.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common.studies import (
    best_rate,
    carry_out,
    markdown,
    metrics_of,
    options,
)
from examples.data.choice import read_choices
from examples.data.tasks.choice import CHOICE_TASKS
from examples.sweeps.records import Row, once, read, run_program
from examples.sweeps.statistics import mean_and_interval

TASK, METRIC = "arc_easy", "accuracy"
RATES = {
    "full": (3e-5, 1e-4, 3e-4),
    "lora": (5e-4, 1e-3, 2e-3),
    "bim_lora": (1e-3, 2e-3, 4e-3),
}
METHODS = {
    "full": "--method full".split(),
    "lora": "--method lora --lora_r 8 --lora_alpha 8 --lora_modules all-linear".split(),
    "bim_lora": "--method bim_lora --lora_r 8 --lora_alpha 8 --block_size 16 --head_lr_ratio 1 "
    "--lora_modules all-linear".split(),
}
TUNING_SEED = 100
SETTINGS = (
    "--task_name arc_easy --max_train_samples 1000 --num_train_epochs 2 --max_length 128 --packing "
    "--per_device_train_batch_size 8 --warmup_ratio 0.06 --weight_decay 0 --save_strategy no "
    "--load_best_model_at_end false --eval_strategy no"  # but at the end
).split()


def jobs(rows: list[Row], part: str, seeds: list[int]) -> Iterator[tuple[Row, list[str]]]:
    """(key, words) of a part's runs."""
    if part == "tune":
        runs = [(m, TUNING_SEED, rate) for m, rates in RATES.items() for rate in rates]
    else:
        runs = [
            (method, seed, tuned(rows, method))
            for method in METHODS
            for seed in (seeds if method == "lora" else seeds[:1])
        ]
    for method, seed, rate in runs:
        key = {"part": part, "task": TASK, "method": method, "seed": seed, "rate": rate}
        words = [*METHODS[method], "--seed", str(seed), "--learning_rate", str(rate)]
        yield key, words


def tuned(rows: list[Row], method: str) -> float:
    """The rate that was best in part tune; the middle one where that has not run."""
    own = [row for row in rows if (row["part"], row["method"]) == ("tune", method)]
    if not own:
        return sorted(RATES[method])[1]
    return best_rate(own, TASK, RATES[method], method)


def similarity(o: argparse.Namespace) -> Row:
    """Accuracy of the untrained encoder's cosine between a question and its choices."""
    import torch
    from torch.nn.functional import normalize

    from transformers_patched import AutoModel, AutoTokenizer

    tokenizer, model = (c.from_pretrained(o.model) for c in (AutoTokenizer, AutoModel))
    model.eval()

    def vector(text: str) -> torch.Tensor:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        return normalize(model(input_ids=ids).last_hidden_state[0].mean(0), dim=0)

    found = read_choices(CHOICE_TASKS[TASK], "validation", data_dir=o.data_dir)
    assert found.labels is not None
    right = []
    with torch.inference_mode():
        for question, choices, label in zip(
            found.text[0], found.choices, found.labels, strict=True
        ):
            scores = torch.stack([vector(choice) for choice in choices]) @ vector(question)
            right.append(int(scores.argmax()) == label)
    return {"final": {METRIC: sum(right) / len(right)}, "train_seconds": 0.0, "trainable": 0}


def go(o: argparse.Namespace) -> None:
    where = ["--model_name_or_path", o.model, "--data_dir", o.data_dir]
    for part in o.part:
        if part == "similarity":
            key = {"part": part, "task": TASK, "method": "none"}
            print(json.dumps({**key, **once(o.out, key, lambda _: similarity(o))}), flush=True)
            continue
        for key, words in jobs(read(o.out), part, o.seeds):

            def run(folder: Path, words: list[str] = words) -> Row:
                every = [*where, *SETTINGS, *words, *o.more]
                return run_program("examples.run_multiple_choice", every, folder / "run")

            row = once(o.out, key, run)
            print(json.dumps({**key, METRIC: round(row["final"][METRIC], 4)}), flush=True)


def table(rows: list[Row]) -> str:
    """Rates, then the methods at the best of them, as far as they have run."""
    rates = sorted({rate for own in RATES.values() for rate in own})
    tuning = []
    for method in METHODS:
        found = [metrics_of(rows, "tune", TASK, method=method, rate=rate) for rate in rates]
        tuning.append([method, *(f"{max(v.values()):.4f}" if v else "–" for v in found)])
    tried = any(row["part"] == "tune" for row in rows)
    lines = []
    for method in METHODS:
        values = metrics_of(rows, "main", TASK, method=method)
        chosen = [r for r in rows if (r["part"], r["method"]) == ("main", method)]
        if not values:
            continue
        seconds = sum(row["train_seconds"] for row in chosen) / len(chosen)
        lines.append([
            method, f"{chosen[0]['rate']:g}", f"{chosen[0]['trainable']:,}",
            mean_and_interval(list(values.values())), str(len(values)), f"{seconds:.0f}",
        ])  # fmt: skip
    heads = ["method", "rate", "trained", "accuracy (last weights)", "seeds", "seconds"]
    parts = itertools.chain(
        ["**Learning rates**", markdown(["method", *map(str, rates)], tuning)] if tried else [],
        ["**Methods**", markdown(heads, lines)] if lines else [],
    )
    return "\n\n".join(parts)


def main() -> None:
    parser = options(__doc__, "choice_study")
    parser.add_argument(
        "--part", nargs="+", choices=("tune", "main", "similarity"), default=["main"]
    )
    carry_out(parser, go, table)


if __name__ == "__main__":
    main()
