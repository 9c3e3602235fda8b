"""The parts of evaluating on SQuAD's development set in CPU seconds, beside Transformers' own.

    python -m benchmarks.squad_evaluation --data_dir DIR --vocabulary DIR [--model DIR]
        [--questions 2000] [--peer PYTHON]

Reading, windows, answers and scores are of all questions; the forward pass (of `--model`, a few
batches) is extrapolated to all features. With `--peer`, a Python that has transformers 4, the
first `--questions` are also given to Transformers' functions, with the same logits: what differs
is counted by kind, and all times are of these questions. The logits are random numbers with the
right places raised; no model is needed for them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from examples.data.squad import SquadSplit, read_squad
from examples.data.squad_features import SquadFeatures, featurise
from examples.evaluation.squad import Scorer
from examples.evaluation.squad_answers import Answers, Decoding, decode

RAISED = 4.0  # of noise of variance 1: about half of the answers are right
FORWARD = 64  # features of the forward pass, from all over the set


@contextmanager
def timed(what: str, found: dict[str, float]) -> Iterator[None]:
    started = time.process_time()
    yield
    found[what] = time.process_time() - started


def logits_of(features: SquadFeatures) -> np.ndarray:
    """(m, 2, L) see above."""
    width, rows = int(features.lengths.max()), np.arange(len(features))
    noise = np.random.default_rng(0).normal(size=(len(features), 2, width))
    for k in (0, 1):
        noise[rows, k, features.spans[:, k]] += RAISED
    inside = np.arange(width) < features.lengths[:, None, None]
    return np.where(inside, noise, -np.inf).astype(np.float32)


def forward(model: str, features: SquadFeatures) -> float:
    """CPU seconds of a forward pass over all features, from a few of them."""
    import torch

    from examples.data.batches import Batch, collate
    from transformers_patched import AutoModelForQuestionAnswering

    network = AutoModelForQuestionAnswering.from_pretrained(model).eval()
    rows = np.linspace(0, len(features) - 1, FORWARD).astype(int)
    rows = rows[np.argsort(features.lengths[rows], kind="stable")]
    tokens, seconds = 0, 0.0
    with torch.inference_mode():
        for part in np.array_split(rows, 4):
            batch = Batch(part, int(features.lengths[part].sum()))
            started = time.process_time()
            network(**collate(features, batch, packed=True))
            seconds += time.process_time() - started
            tokens += batch.tokens
    return seconds * int(features.lengths.sum()) / tokens


def differences(raw: SquadSplit, features: SquadFeatures, ours: Answers, folder: Path) -> list[str]:
    """What Transformers has otherwise, in lines for people."""
    peer = json.loads((folder / "peer.json").read_text())
    rows = range(len(features))
    bounds = features.offsets
    ids = sum(features.tokens[bounds[i] : bounds[i + 1]].tolist() != peer["ids"][i] for i in rows)
    targets = [i for i in rows if features.spans[i].tolist() != peer["targets"][i]]
    lines = [f"features: {len(features):,}, theirs {len(peer['ids']):,}; other ids in {ids}"]
    for i in targets:
        q = features.questions[i]
        first, last = features.spans[i] - features.first[i] + features.windows[i]
        text = raw.contexts[raw.paragraphs[q]][features.chars[first, 0] : features.chars[last, 1]]
        lines.append(
            f"  target of {raw.ids[q]}, {raw.answers[q][0]!r}: {text!r} here, theirs is "  # type: ignore[index]
            f"{peer['targets'][i][1] - peer['targets'][i][0] + 1} tokens"
        )
    theirs = json.loads((folder / "predictions.json").read_text("utf-8"))
    kinds: Counter[str] = Counter()
    for id, text in zip(raw.ids, ours.texts, strict=True):
        context = raw.contexts[raw.paragraphs[raw.ids.index(id)]]
        kinds[_kind(context, text, theirs[id])] += 1
    return [*lines, "answers: " + ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())]


def _kind(context: str, ours: str, theirs: str) -> str:
    if ours == theirs:
        return "equal"
    if " ".join(ours.split()) == theirs:
        return "equal but for blanks, which are the paragraph's here"
    at = context.find(ours)
    if ours in theirs and at > 0 and context[at - 1].isalnum():
        return "that begin within a word, where theirs is the whole words"
    return "otherwise"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", type=Path, required=True, help="has squad/dev-v1.1.json")
    parser.add_argument("--vocabulary", type=Path, required=True, help="has BERT's vocab.txt")
    parser.add_argument("--model", help="to time the forward pass")
    parser.add_argument("--questions", type=int, default=2000, help="for the peer")
    parser.add_argument("--peer", help="a Python with transformers 4")
    o = parser.parse_args()
    from transformers_patched import BertTokenizer

    path = o.data_dir / "squad" / "dev-v1.1.json"
    tokenizer = BertTokenizer.from_pretrained(o.vocabulary, do_lower_case=True)
    seconds: dict[str, float] = {}
    with timed("reading", seconds):
        raw = read_squad(path)
    if o.peer:
        raw = raw.take(range(o.questions))
    with timed("features", seconds):
        features = featurise(raw, tokenizer, cache=False)
    logits = logits_of(features)
    with timed("answers", seconds):
        answers = decode(features, logits, Decoding())
    with timed("scores", seconds):
        score = Scorer(raw).score(answers.texts)
    if o.model:
        seconds["forward (extrapolated)"] = forward(o.model, features)
    print(f"{len(raw):,} questions, {len(features):,} features, F1 {score['f1']:.2f}; CPU seconds:")
    peer: dict[str, float] = {}
    lines: list[str] = []
    if o.peer:
        with tempfile.TemporaryDirectory() as name:
            np.save(Path(name) / "logits.npy", logits)
            script = Path(__file__).with_name("peer_squad.py")
            words = [path, o.vocabulary / "vocab.txt", o.questions, name]
            subprocess.run([o.peer, script, *map(str, words)], check=True)
            peer = json.loads((Path(name) / "peer.json").read_text())["seconds"]
            lines = differences(raw, features, answers, Path(name))
    for what, value in seconds.items():
        beside = f"   theirs {peer[what]:8.2f}   {peer[what] / value:.0f} x" if what in peer else ""
        print(f"  {what:<24} {value:8.2f}{beside}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
