"""Scores generated texts with the official metrics of their task.

    python -m examples.evaluate_nlg --pred F --ref F --output F.json [--format e2e|webnlg|xsum]

The predictions are one a line, or with `--vocab` JSON lines of token ids, as the original recipe's
beam search writes them: {"id": row of the test set, "predict": [ids]}. The references are the E2E
challenge's file (one a line, an empty line after those of a prediction), one a line, a folder with
reference0, reference1, … as for WebNLG, or the test_formatted.jsonl of
`examples.data.prepare_nlg`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.errors import DataError, UserError, as_user_error
from transformers_patched.files import write_atomically

FORMATS = ("e2e", "webnlg", "xsum", "boolq")


def evaluate(
    predictions: Path, references: Path, format: str, vocab: str | None = None
) -> tuple[dict[str, float], list[str]]:
    """The metrics, and a line for each that could not be had.

    Args:
        predictions: texts, or token ids where there is a `vocab`.
        references: texts.
        format: whose metrics.
        vocab: the tokenizer of token ids, a folder or hub id.

    Raises:
        UserError: a file is missing or wrong, or a package is missing.
    """
    from examples.evaluation.nlg import score
    from examples.evaluation.nlg.texts import read_pairs_to_score, read_samples_to_score

    if vocab is None:
        return score(format, *read_pairs_to_score(predictions, references, format))
    from transformers_patched import AutoTokenizer

    tokenizer = as_user_error(AutoTokenizer.from_pretrained, vocab)
    return score(format, *read_samples_to_score(predictions, references, format, tokenizer))


def main(argv: Sequence[str] | None = None) -> int:
    """The program; what a user can mend is one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(prog="evaluate_nlg", description=__doc__.split("\n\n")[0])
    parser.add_argument("--pred", type=Path, required=True, help="predictions, one a line")
    parser.add_argument(
        "--ref", type=Path, required=True,
        help="references: groups of lines with an empty line between them, or one a line, or a "
        "folder with reference0, reference1, …, or test_formatted.jsonl",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the metrics")
    parser.add_argument(
        "--format", choices=FORMATS, default="e2e", help="whose metrics (default e2e; dart: webnlg)"
    )
    parser.add_argument(
        "--vocab", metavar="DIR", help="predictions are token ids, which this tokenizer decodes"
    )
    o = parser.parse_args(argv)
    try:
        if o.output.is_dir() or not o.output.parent.is_dir():
            raise DataError(f"--output {o.output}: give a file in a folder that exists")
        if any(o.output.exists() and o.output.samefile(p) for p in (o.pred, o.ref) if p.exists()):
            raise DataError(f"--output {o.output}: this is one of the files to be scored")
        metrics, notes = evaluate(o.pred, o.ref, o.format, o.vocab)
        text = json.dumps(metrics, indent=2) + "\n"
        write_atomically(o.output, lambda aside: aside.write_text(text, encoding="utf-8"))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for note in notes:
        print(note, file=sys.stderr)
    for name, value in metrics.items():
        print(f"{name:<10} {value:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
