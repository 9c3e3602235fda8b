"""GLUE with Transformers + PEFT: the peer that `glue_vs_peft.py` runs beside ours.

A plain loop over `AutoModelForSequenceClassification` wrapped by `peft.get_peft_model`: torch's
AdamW, linear warm-up and decay, clipping at 1, dynamic padding, shuffled each epoch. The rows and
the metrics are this project's (both sides must see the same data); the model, its tokenizer, the
adapter and the training step are the peer's own. Writes one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from examples.data.readers import read_split
from examples.data.tasks import get_task
from examples.evaluation.glue import compute


def encode(tokenizer, task, data_dir: str, split: str, max_length: int, pad: str):
    rows = read_split(task, data_dir, split)
    encoded = tokenizer(
        *rows.text, truncation=True, max_length=max_length, padding=pad == "max_length"
    )
    labels = torch.tensor(rows.labels, dtype=torch.float if task.regression else torch.long)
    names = tokenizer.model_input_names
    return [{n: encoded[n][i] for n in names} for i in range(len(labels))], labels


def evaluate(model, tokenizer, task, features, labels, batch_size: int, autocast) -> dict:
    order = sorted(range(len(features)), key=lambda i: len(features[i]["input_ids"]))
    outputs = torch.empty(len(features), model.config.num_labels)
    model.eval()
    with torch.inference_mode(), autocast:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = tokenizer.pad([features[i] for i in chosen], return_tensors="pt")
            outputs[chosen] = model(**batch).logits.float()
    return compute(task, outputs.numpy(), np.asarray(labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, kind, default in (
        ("model", str, None), ("task", str, "mrpc"), ("data_dir", str, None), ("out", str, None),
        ("seed", int, 0), ("epochs", int, 5), ("batch", int, 32), ("lr", float, 1e-3),
        ("weight_decay", float, 0.0), ("warmup_ratio", float, 0.06), ("r", int, 8),
        ("alpha", float, 16), ("max_length", int, 128), ("pad", str, "longest"),
        ("dtype", str, "float32"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=default)
    o = parser.parse_args()
    torch.manual_seed(o.seed)
    started = time.perf_counter()

    task = get_task(o.task)
    tokenizer = AutoTokenizer.from_pretrained(o.model)
    train, labels = encode(tokenizer, task, o.data_dir, "train", o.max_length, o.pad)
    dev, dev_labels = encode(tokenizer, task, o.data_dir, "validation", o.max_length, o.pad)
    model = AutoModelForSequenceClassification.from_pretrained(
        o.model, num_labels=task.num_labels, dtype=torch.float32
    )
    model = get_peft_model(
        model,
        LoraConfig(
            task_type="SEQ_CLS", r=o.r, lora_alpha=o.alpha, target_modules=["query", "value"]
        ),
    )
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=o.lr, weight_decay=o.weight_decay)
    steps = o.epochs * -(-len(train) // o.batch)
    warmup = int(np.ceil(o.warmup_ratio * steps))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: k / warmup if k < warmup else (steps - k) / (steps - warmup)
    )
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=o.dtype == "bfloat16")
    history, training = [], 0.0
    for epoch in range(o.epochs):
        begun = time.perf_counter()
        model.train()
        for chosen in torch.randperm(len(train)).split(o.batch):
            batch = tokenizer.pad([train[i] for i in chosen.tolist()], return_tensors="pt")
            with autocast:
                loss = model(**batch, labels=labels[chosen]).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        training += time.perf_counter() - begun
        metrics = evaluate(model, tokenizer, task, dev, dev_labels, 128, autocast)
        history.append({"epoch": epoch + 1, **metrics})
        print(json.dumps(history[-1]), flush=True)
    result = {
        "history": history,
        "train_seconds": training,
        "wall_seconds": time.perf_counter() - started,
        "trainable": sum(p.numel() for p in trainable),
    }
    with open(o.out, "w", encoding="utf-8") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
