"""The embedded task is what its generator writes, and word counts do not solve it."""

import json
from collections import Counter
from pathlib import Path

from support.paths import ROOT

from examples.data.embedded.make import LEXICON, SIZES, write

FOLDER = ROOT / "examples" / "data" / "embedded"


def rows(split: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text().splitlines()]


def test_the_generator_writes_the_committed_bytes(tmp_path: Path) -> None:
    write(tmp_path)
    for split in SIZES:
        name = f"{split}.jsonl"
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_sizes_balance_and_no_leak() -> None:
    assert SIZES["train"] >= 2000 and SIZES["validation"] == 400
    texts: Counter[str] = Counter()
    for split, size in SIZES.items():
        labels = [row["label"] for row in rows(split)]
        assert len(labels) == size and sum(labels) == size // 2
        texts.update(row[key] for row in rows(split) for key in ("sentence1", "sentence2"))
    assert max(texts.values()) == 1


def test_no_word_belongs_to_two_concepts() -> None:
    words = [word for concepts in LEXICON.values() for concept in concepts for word in concept]
    assert max(Counter(words).values()) == 1


def test_a_bag_of_words_stays_at_chance() -> None:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    train, dev = rows("train"), rows("validation")
    joined = [[f"{r['sentence1']} {r['sentence2']}" for r in split] for split in (train, dev)]
    counts = CountVectorizer(ngram_range=(1, 2)).fit(joined[0])
    model = LogisticRegression(max_iter=2000)
    model.fit(counts.transform(joined[0]), [r["label"] for r in train])
    score = model.score(counts.transform(joined[1]), [r["label"] for r in dev])
    assert abs(score - 0.5) < 0.075  # three standard errors
