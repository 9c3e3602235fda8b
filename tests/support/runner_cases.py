"""A tiny model and tiny tasks, for tests that run whole programs."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch

from examples import program
from examples.data.tables import write_table
from examples.run_glue import main
from transformers_patched import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

WORDS = [f"{a}{b}" for a in "bcdfghklmn" for b in ("ado", "eno", "iru", "osa")]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}


def tiny_bert(folder: Path, **config: object) -> Path:
    """A random BERT of 2 layers with a WordPiece tokenizer, as a checkpoint without a head."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    vocabulary = [*SPECIAL, *WORDS, *"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdeinou")]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "model_max_length": 40})
    )
    model = BertForSequenceClassification(
        BertConfig(vocab_size=len(vocabulary), **{**SIZES, **config})
    )
    model.bert.save_pretrained(folder)
    return folder


def tiny_roberta(folder: Path, num_labels: int = 2) -> RobertaForSequenceClassification:
    """A random RoBERTa classifier, saved into `folder` without its head."""
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=60, type_vocab_size=1, num_labels=num_labels, **SIZES)
    model = RobertaForSequenceClassification(config)
    model.roberta.save_pretrained(folder)
    return model


def tiny_deberta(folder: Path) -> Path:
    """A random DeBERTa-v3 of 2 layers, without head and pooler, behind tiny_bert's tokenizer."""
    tiny_bert(folder)
    (folder / "model.safetensors").unlink()
    words = len((folder / "vocab.txt").read_text("utf-8").splitlines())
    attention = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
    attention |= {"position_buckets": 8, "norm_rel_ebd": "layer_norm"}
    more = {"position_biased_input": False, "type_vocab_size": 0}
    config = DebertaV2Config(vocab_size=words, **SIZES, **attention, **more)
    DebertaV2ForSequenceClassification(config).deberta.save_pretrained(folder)
    return folder


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 12)))


def pair_task(
    folder: Path, splits: dict[str, int], labels: int = 2, seed: int = 0, names: tuple = ()
) -> Path:
    """JSON-lines files of a sentence-pair task: the label says how the second begins."""
    rng = random.Random(seed)
    for split, rows in splits.items():
        second = [sentence(rng) for _ in range(rows)]
        classes = [WORDS.index(text.split()[0]) % labels for text in second]
        first, other = names or ("sentence1", "sentence2")
        columns = {
            first: [sentence(rng) for _ in range(rows)],
            other: second,
            "label": [-1] * rows if split.startswith("test") else classes,
        }
        write_table(folder / f"{split}.jsonl", columns)
    return folder


def evaluated(words: Sequence[str]) -> dict[str, float]:
    """The metrics that `run_glue --eval_only` prints."""
    seen: dict[str, float] = {}
    real = program.Run.finish

    def finish(self: program.Run, metrics: dict[str, float], figures: dict) -> None:
        seen.update(metrics)
        real(self, metrics, figures)

    program.Run.finish = finish
    try:
        assert program.run_main(main, [*words, "--eval_only"]) == 0
    finally:
        program.Run.finish = real
    return seen


def results(folder: Path) -> dict:
    return json.loads((folder / "all_results.json").read_text("utf-8"))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
