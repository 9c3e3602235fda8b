"""SQuAD as the example script of Transformers does it, with PEFT: what `end_to_end.py` times.

`Trainer` with its defaults (batch 8, AdamW 5e-5, linear decay, a checkpoint every epoch), windows
of 384 tokens every 128, every one padded to 384, LoRA r 8 on query and value; the development set
is answered once, after training. Reading, decoding and scores are this project's, which are faster
than the example's, so the comparison favours the peer there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from examples.data.squad import SquadSplit, read_squad
from examples.data.squad_features import featurise
from examples.evaluation.squad import Scorer
from examples.evaluation.squad_answers import Decoding, decode
from transformers_patched import AutoTokenizer as OurTokenizer

LENGTH, STRIDE = 384, 128


def windows(raw: SquadSplit, tokenizer: Any) -> list[dict]:
    """Padded rows with targets, by the tokenizer's own windows."""
    encoded = tokenizer(
        raw.questions,
        [raw.contexts[p] for p in raw.paragraphs],
        truncation="only_second",
        max_length=LENGTH,
        stride=STRIDE,
        padding="max_length",
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    answers, rows = raw.answers or [], []
    for i, question in enumerate(encoded["overflow_to_sample_mapping"]):
        begin = raw.starts[question][0]
        end = begin + len(answers[question][0])
        inside = [
            k
            for k, (a, b) in enumerate(encoded["offset_mapping"][i])
            if encoded.sequence_ids(i)[k] == 1 and a < end and b > begin
        ]
        row = {name: encoded[name][i] for name in tokenizer.model_input_names}
        first, last = (inside[0], inside[-1]) if inside else (0, 0)
        rows.append(row | {"start_positions": first, "end_positions": last})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rows", type=int, help="only the first questions")
    parser.add_argument("--bf16", action="store_true", help="autocast")
    o = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(o.model)
    train, dev = (read_squad(o.data_dir / f"{name}-v1.1.json") for name in ("train", "dev"))
    if o.rows:
        train, dev = (raw.take(range(o.rows)) for raw in (train, dev))
    base = AutoModelForQuestionAnswering.from_pretrained(o.model, dtype=torch.float32)
    adapter = LoraConfig(
        task_type="QUESTION_ANS", r=8, lora_alpha=16, target_modules=["query", "value"]
    )
    trainer = Trainer(
        model=get_peft_model(base, adapter),
        args=TrainingArguments(
            output_dir=str(o.output_dir),
            num_train_epochs=o.epochs,
            per_device_train_batch_size=o.batch,
            save_strategy="epoch",
            bf16=o.bf16,
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
        ),
        data_collator=default_data_collator,
        train_dataset=windows(train, tokenizer),
    )
    trainer.train()
    trainer.save_model()
    start, end = trainer.predict(windows(dev, tokenizer)).predictions[:2]
    features = featurise(dev, OurTokenizer.from_pretrained(o.model), cache=False)
    logits = np.full((len(features), 2, LENGTH), -np.inf, np.float32)
    for row, length in enumerate(features.lengths):
        logits[row, :, :length] = start[row, :length], end[row, :length]
    answers = decode(features, logits, Decoding())
    scores = Scorer(dev).score(answers.texts)
    (o.output_dir / "results.json").write_text(json.dumps(scores), encoding="utf-8")


if __name__ == "__main__":
    main()
