"""Transformers' own features and answers of SQuAD questions; run by benchmarks.squad_evaluation.

    PYTHON benchmarks/peer_squad.py DATA.json VOCAB.txt QUESTIONS FOLDER

PYTHON needs transformers 4 (the functions are gone in 5). FOLDER has logits.npy, (features, 2, L);
peer.json, predictions.json and nbest.json are written into it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from transformers import BertTokenizer
from transformers.data.metrics.squad_metrics import compute_predictions_logits
from transformers.data.processors import squad


def main(data: str, vocabulary: str, questions: int, folder: Path) -> None:
    tokenizer = BertTokenizer(vocabulary, do_lower_case=True)
    articles = json.loads(Path(data).read_text("utf-8"))["data"]
    seconds, features, targets = {}, [], []
    squad.squad_convert_example_to_features_init(tokenizer)
    for kind in ("train", "dev"):
        examples = squad.SquadV1Processor()._create_examples(articles, kind)[:questions]
        started = time.process_time()
        settings = 384, 128, 64, "max_length", kind == "train"
        found = [squad.squad_convert_example_to_features(e, *settings) for e in examples]
        seconds["features"] = time.process_time() - started
        if kind == "train":
            targets = [(f.start_position, f.end_position) for own in found for f in own]
    for number, own in enumerate(found):
        for feature in own:
            feature.example_index, feature.unique_id = number, len(features)
            features.append(feature)
    logits = np.load(folder / "logits.npy")
    padded = np.full((len(features), 2, 384), -1e4, np.float32)
    padded[:, :, : logits.shape[2]] = np.where(np.isfinite(logits), logits, -1e4)
    results = [
        SimpleNamespace(unique_id=i, start_logits=s.tolist(), end_logits=e.tolist())
        for i, (s, e) in enumerate(padded)
    ]
    files = [str(folder / f"{name}.json") for name in ("predictions", "nbest", "null")]
    started = time.process_time()
    compute_predictions_logits(
        examples, features, results, 20, 30, True, *files, False, False, 0.0, tokenizer
    )
    seconds["answers"] = time.process_time() - started
    ids = [f.input_ids[: sum(f.attention_mask)] for f in features]
    found = {"seconds": seconds, "ids": ids, "targets": targets}
    (folder / "peer.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
