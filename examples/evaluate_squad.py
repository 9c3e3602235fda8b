"""Scores answers to SQuAD's questions: exact match and F1, from 0 to 100.

    python -m examples.evaluate_squad --data F --pred F --output F.json

The data is in SQuAD's layout; the predictions are {id: text}, with "" for "no answer". A question
without a prediction is wrong, and named.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.errors import DataError, UserError

SHOWN = 3  # of the ids without a prediction


def evaluate(
    data: Path, predictions: Path, null_odds: Path | None = None
) -> tuple[dict[str, float], list[str]]:
    """The metrics, and the ids of the questions without a prediction.

    Raises:
        UserError: a file is missing or wrong, or has predictions for other questions.
    """
    from examples.data.squad import read_squad
    from examples.evaluation.squad import Scorer, in_order

    raw = read_squad(data, unanswerable=True, spans=False)
    scorer = Scorer(raw)
    texts = in_order(raw, _by_id(predictions), str(predictions))
    odds = None
    if null_odds is not None:
        given = _by_id(null_odds)
        missing = [id for id in raw.ids if not isinstance(given.get(id), (int, float))]
        if missing:
            raise DataError(f"{null_odds}, question {missing[0]}: there is no number for it")
        odds = [float(given[id]) for id in raw.ids]
    return scorer.score(texts, odds), scorer.unanswered(texts)


def _by_id(path: Path) -> dict[str, Any]:
    """A file of one object whose names are ids."""
    from examples.data.squad import read_json

    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: {{id: value}} is expected, not {content!r:.60}")
    return content


def main(argv: Sequence[str] | None = None) -> int:
    """The program; what a user can mend is one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(prog="evaluate_squad", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="questions, in SQuAD's layout")
    parser.add_argument("--pred", type=Path, required=True, help="predictions.json: {id: text}")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the metrics")
    parser.add_argument(
        "--null_odds", type=Path, help="null_odds.json, for the best threshold of predictions "
        'none of which is "" (those of a run at --null_score_diff_threshold inf)',
    )  # fmt: skip
    o = parser.parse_args(argv)
    try:
        given = [path for path in (o.data, o.pred, o.null_odds) if path is not None]
        if o.output.is_dir() or not o.output.parent.is_dir():
            raise DataError(f"--output {o.output}: give a file in a folder that exists")
        if any(o.output.exists() and o.output.samefile(p) for p in given if p.exists()):
            raise DataError(f"--output {o.output}: this is one of the files to be scored")
        metrics, unanswered = evaluate(o.data, o.pred, o.null_odds)
        o.output.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if unanswered:
        shown = ", ".join(unanswered[:SHOWN]) + (", …" if len(unanswered) > SHOWN else "")
        print(f"no prediction for {len(unanswered):,} questions, which counts as wrong: {shown}",
              file=sys.stderr)  # fmt: skip
    for name, value in metrics.items():
        print(f"{name:<18} {value:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
