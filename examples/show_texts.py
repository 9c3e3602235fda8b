"""Shows what a run of text generation has written, beside its tables and a reference each.

python -m examples.show_texts RUN [COUNT]
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from examples.errors import RunError, UserError

if TYPE_CHECKING:
    from examples.data.nlg import Instance

COUNT, WIDTH = 4, 88
TEXTS = Path("submission") / "test_predictions.txt"  # in a run's folder


def written(run: Path) -> list[tuple[Instance, str]]:
    """Every context of the run's test split, in order, and its text.

    Raises:
        RunError: the run has decoded nothing.
        DataError: its test split is not there any more.
    """
    from examples.data.nlg import instances
    from examples.data.nlg_splits import find_split, read_own
    from examples.data.tasks.nlg import nlg_task
    from examples.training.run_folder import CONFIG

    texts = run / TEXTS
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


def main(argv: Sequence[str] | None = None) -> int:
    """Prints some, spread over the test split; what a user can mend is one line, and status 2."""
    parser = argparse.ArgumentParser(prog="show_texts", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run with --do_predict")
    parser.add_argument("count", type=int, nargs="?", default=COUNT, help="how many (%(default)s)")
    o = parser.parse_args(argv)
    try:
        rows = written(o.run)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    count = max(0, min(o.count, len(rows)))
    for number in range(count):
        instance, text = rows[number * len(rows) // count]
        print(f"\n{shown(instance, text)}")
    print(f"\nall {len(rows)} texts: {o.run / TEXTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
