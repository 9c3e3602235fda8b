"""GLUE as the example script of Transformers does it, with PEFT: what `end_to_end.py` times.

`Trainer` with its defaults (batch 8, AdamW 5e-5, linear decay, evaluation and a checkpoint every
epoch), every row padded to 128 tokens, `AutoModelForSequenceClassification` wrapped by
`peft.get_peft_model` with LoRA r 8 on query and value. Rows and metrics are this project's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    Trainer,
    TrainingArguments,
)

from examples.data.readers import read_split
from examples.data.tasks import get_task
from examples.evaluation.glue import compute


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", default="mrpc")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rows", type=int, help="only the first rows")
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--bf16", action="store_true", help="autocast")
    o = parser.parse_args()

    task = get_task(o.task)
    tokenizer = AutoTokenizer.from_pretrained(o.model)

    def features(split: str) -> list[dict[str, Any]]:
        rows = read_split(task, o.data_dir, split)
        encoded = tokenizer(
            *[list(part)[: o.rows] for part in rows.text],
            truncation=True,
            max_length=o.max_length,
            padding="max_length",
        )
        kind = float if task.regression else int
        labels = [kind(label) for label in rows.labels[: o.rows]]
        names = tokenizer.model_input_names
        return [{n: encoded[n][i] for n in names} | {"labels": y} for i, y in enumerate(labels)]

    model = AutoModelForSequenceClassification.from_pretrained(
        o.model, num_labels=task.num_labels, dtype=torch.float32
    )
    adapter = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])

    def metrics(p: EvalPrediction) -> dict[str, float]:
        return compute(task, p.predictions, p.label_ids)

    trainer = Trainer(
        model=get_peft_model(model, adapter),
        args=TrainingArguments(
            output_dir=str(o.output_dir),
            num_train_epochs=o.epochs,
            per_device_train_batch_size=o.batch,
            eval_strategy="epoch",
            save_strategy="epoch",
            bf16=o.bf16,
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
        ),
        train_dataset=features("train"),
        eval_dataset=features("validation"),
        compute_metrics=metrics,
    )
    trainer.train()
    trainer.save_model()
    (o.output_dir / "results.json").write_text(json.dumps(trainer.evaluate()), encoding="utf-8")


if __name__ == "__main__":
    main()
