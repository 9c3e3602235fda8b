"""Writes `nlg.json`: what independent packages say of constructed predictions on the real E2E data.

    pip install --no-deps --target .peers/nlg pycocoevalcap==1.2 pyter3==0.3
    PYTHONPATH=.peers/nlg python tests/golden/make_nlg.py ../shared/data/e2e

The predictions are the first references, scored against the others. pycocoevalcap gives the words
of Stanford's tokenizer (by Java), ROUGE-L and CIDEr; pyter3 the edit rates.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
INSTANCES = 120  # with at least two references
DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}


def texts(path: Path) -> list[tuple[str, str]]:
    """Context and text of each line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [tuple(part.strip() for part in line.split("||")) for line in lines]  # type: ignore


def stanford(lines: list[str]) -> list[list[str]]:
    """Stanford's words without those that the E2E scripts drop."""
    folder = next(iter(find_spec("pycocoevalcap").submodule_search_locations))  # type: ignore
    jar = Path(folder) / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar)]
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    done = subprocess.run(
        command, input="\n".join(lines) + "\n", stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    words = [line.split() for line in done.stdout.splitlines()]
    assert len(words) == len(lines)
    return [[word for word in line if word not in DROPPED] for line in words]


def random_pairs(count: int) -> list[tuple[list[str], list[str]]]:
    """Short texts of few words, so that there is much to shift."""
    rng = random.Random(7)
    pairs = []
    for _ in range(count):
        words = "abcdef"[: rng.randint(2, 6)]
        hypothesis = rng.choices(words, k=rng.randint(0, 14))
        pairs.append((hypothesis, rng.choices(words, k=rng.randint(1, 14))))
    return pairs


def main() -> None:
    import pyter
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    data = Path(sys.argv[1])
    every = [text for name in ("train", "valid", "test") for _, text in texts(data / f"{name}.txt")]
    joined = "\n".join(" ".join(words) for words in stanford(every))

    groups: dict[str, list[str]] = {}
    for context, text in texts(data / "test.txt"):
        groups.setdefault(context, []).append(text)
    chosen = [group for group in groups.values() if len(group) > 1][:INSTANCES]
    flat = iter(stanford([text for group in chosen for text in group]))
    split = [[" ".join(next(flat)) for _ in group] for group in chosen]
    hypotheses = {i: group[:1] for i, group in enumerate(split)}
    references = {i: group[1:] for i, group in enumerate(split)}
    result: dict[str, Any] = {
        "ptb_texts": len(every),
        "ptb_sha256": hashlib.sha256(joined.encode()).hexdigest(),
        "ROUGE_L": float(Rouge().compute_score(references, hypotheses)[0]),
        "CIDEr": float(Cider().compute_score(references, hypotheses)[0]),
        "edit_rates": [pyter.ter(h, r) for h, r in random_pairs(200)],
        "edit_rates_e2e": [pyter.ter(g[0].split(), g[1].split()) for g in chosen[:40]],
    }
    (HERE / "nlg.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
