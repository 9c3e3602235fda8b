"""Shows what a run of text generation has written, beside its tables and a reference each.

python -m examples.show_texts RUN [COUNT]
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

from examples.data.nlg import Instance, instances
from examples.data.nlg_splits import find_split, read_own
from examples.data.tasks.nlg import nlg_task
from examples.errors import RunError
from examples.program.main import run_main
from examples.training.run_folder import CONFIG, SUBMISSION

COUNT, WIDTH = 4, 88


def written(run: Path) -> list[tuple[Instance, str]]:
    """Every context of the run's test split, in order, and its text.

    Raises:
        RunError: the run has decoded nothing.
    """
    texts = run / SUBMISSION / "test_predictions.txt"
    if not texts.is_file():
        raise RunError(f"{texts}: no such file; run examples.run_nlg with --do_predict")
    options = json.loads((run / CONFIG).read_text("utf-8"))
    if options["task_name"] is None:
        rows = read_own(Path(options["test_file"]).expanduser())
    else:
        rows = find_split(nlg_task(options["task_name"]), options["data_dir"], "test")
    found = instances(rows.pairs or [])
    return list(zip(found, texts.read_text("utf-8").splitlines(), strict=False))


def shown(instance: Instance, text: str) -> str:
    """A context as a table where it is one, the text, and a reference."""
    cells = [fact.split(" : ", 1) for fact in instance.context.split(" | ")]
    facts = [f"  {cell[0]:<12}{cell[1]}" if len(cell) == 2 else f"  {cell[0]}" for cell in cells]
    said = [("written", text), ("reference", instance.references[0])]
    return "\n".join([*facts, *(_wrapped(f"  {name:<12}", words) for name, words in said)])


def _wrapped(start: str, words: str) -> str:
    return textwrap.fill(words, WIDTH, initial_indent=start, subsequent_indent=" " * len(start))


def main(argv: list[str]) -> int:
    """Prints some, spread over the test split."""
    rows = written(Path(argv[0]))
    count = min(int(argv[1]) if len(argv) > 1 else COUNT, len(rows))
    for number in range(count):
        instance, text = rows[number * len(rows) // count]
        print(f"\n{shown(instance, text)}")
    print(f"\nall {len(rows)} texts: {Path(argv[0]) / SUBMISSION / 'test_predictions.txt'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
