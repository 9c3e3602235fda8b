"""A program for the tests of sweeps: it has options, steps, checkpoints and results, no model."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from examples import program
from examples.cli.fields import option
from examples.cli.groups import TrainingOptions
from examples.errors import RunError


@dataclass(frozen=True)
class StubOptions:
    task_name: str = option("a", "any word")
    steps: int = option(4, "of the run", low=1)
    pause: float = option(0.0, "seconds a step", low=0)
    fail: str = option("no", "always, or once: its first attempt", choices=("no", "once", "always"))
    best_rate: float = option(1e-3, "where the score is 1")


def options_of(argv: Sequence[str]) -> program.Options | None:
    classes = {"stub": StubOptions, "training": TrainingOptions}
    return program.parse(argv, "support.stub_program", "A stub.", classes, None)


def main(argv: Sequence[str]) -> int:
    options = options_of(argv)
    assert options is not None
    o, training = options[StubOptions], options[TrainingOptions]
    folder = Path(training.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(options.resolved()))
    saved = folder / "step"
    first = int(saved.read_text()) if saved.exists() else 0
    started = folder / "starts"
    before = started.read_text() if started.exists() else ""
    started.write_text(f"{before}{first}\n")
    score = 1 / (1 + abs(training.learning_rate / o.best_rate - 1)) - training.seed * 0.01
    for step in range(first, o.steps):
        time.sleep(o.pause)
        print(f"step {step + 1}/{o.steps}  loss {1 / (step + 1):.3g}", file=sys.stderr, flush=True)
        with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step + 1, "eval_score": score}) + "\n")
        first_attempt = o.fail == "once" and not before
        if step + 1 >= o.steps // 2 and (o.fail == "always" or first_attempt):
            raise RunError("made to fail")
        saved.write_text(str(step + 1))
    results = {"eval_score": score, "main_metric": "eval_score", "steps": o.steps}
    (folder / "all_results.json").write_text(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(program.run_main(main))
