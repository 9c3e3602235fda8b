"""One MRPC batch, padded beside packed: real tokens per second of forward + backward.

    python -m benchmarks.packed_batch [MODEL_FOLDER] [--data DIR] [--batch 16] [--rounds 8]

BERT with a classification head and LoRA (r 8) on query and value, training mode, its own dropout.
The batches are the first of the real MRPC training file under `--data` (default $RANKWISE_DATA,
else ../shared/data), tokenised by the model's tokenizer; without the file or a model folder,
sequences of random tokens with 25 to 90 tokens each, and random weights of MiniLM's size. The two
forms take turns on the same sequences in one process; the fastest and the median round are given.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common.models import SIZES
from benchmarks.common.timing import in_turn, seconds
from transformers_patched.configuration import BertConfig
from transformers_patched.models.bert.modeling_bert import BertForSequenceClassification

LORA = {"apply_lora": True, "lora_r": 8, "lora_alpha": 16}


def sequences(folder: str | None, data: Path, count: int) -> tuple[list[list[int]], str]:
    """`count` token lists, and where they come from."""
    file = data / "glue" / "MRPC" / "train.tsv"
    if folder is None or not file.exists():
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(25, 91, (count,), generator=generator).tolist()
        return [torch.randint(5, 30000, (n,), generator=generator).tolist() for n in lengths], (
            "random tokens, lengths 25 to 90"
        )
    from transformers_patched.tokenization import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = file.read_text(encoding="utf-8").splitlines()[1 : count + 1]
    pairs = [row.split("\t")[3:5] for row in rows]
    return [tokenizer(a, b)["input_ids"] for a, b in pairs], "MRPC"


def padded_and_packed(batch: list[list[int]]) -> dict[str, dict[str, Tensor | int]]:
    """The two forms of one batch as the model's arguments."""
    lengths = torch.tensor([len(tokens) for tokens in batch])
    longest = int(lengths.max())
    mask = torch.arange(longest) < lengths[:, None]  # (B, L)
    flat = torch.tensor([token for tokens in batch for token in tokens])  # (T,)
    ids = torch.zeros(mask.shape, dtype=torch.long)
    ids[mask] = flat
    labels = torch.arange(len(batch)) % 2
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
    return {
        "padded": {"input_ids": ids, "attention_mask": mask, "labels": labels},
        "packed": {
            "input_ids": flat, "cu_seqlens": cu_seqlens, "max_seqlen": longest, "labels": labels,
        },
    }  # fmt: skip


def build(folder: str | None, base_dtype: torch.dtype) -> BertForSequenceClassification:
    if folder is not None:
        model = BertForSequenceClassification.from_pretrained(folder, base_dtype=base_dtype, **LORA)
    else:
        model = BertForSequenceClassification(BertConfig(**SIZES["minilm"], **LORA))
        model.freeze_base()
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(base_dtype)
    return model.train()


def measure(
    model: BertForSequenceClassification, batches: list[dict], rounds: int
) -> dict[str, list[float]]:
    """Seconds per round over all batches, padded and packed in turn."""

    def passes(form: str) -> None:
        for batch in batches:
            model(**batch[form]).loss.backward()
            model.zero_grad()

    def measure(form: str) -> float:
        return seconds(partial(passes, form), clock=time.perf_counter)

    return in_turn({form: partial(measure, form) for form in ("padded", "packed")}, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="folder of a BERT checkpoint")
    default = os.environ.get("RANKWISE_DATA", Path(__file__).resolve().parents[2] / "shared/data")
    parser.add_argument("--data", type=Path, default=Path(default))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    rows, origin = sequences(options.model, options.data, 4 * options.batch)
    batches = [
        padded_and_packed(rows[i : i + options.batch]) for i in range(0, len(rows), options.batch)
    ]
    real = sum(len(row) for row in rows)
    computed = sum(batch["padded"]["input_ids"].numel() for batch in batches)
    print(f"{origin}, 4 batches of {options.batch}: {real} real tokens, "
          f"{computed / real:.2f} times as many when padded")  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        times = measure(build(options.model, dtype), batches, options.rounds)
        best = {form: real / min(t) for form, t in times.items()}
        median = {form: real / statistics.median(t) for form, t in times.items()}
        name = str(dtype).removeprefix("torch.")
        print(f"{name:9s} padded {best['padded']:6.0f} tok/s (median {median['padded']:6.0f}), "
              f"packed {best['packed']:6.0f} ({median['packed']:6.0f}): "
              f"{best['packed'] / best['padded']:.2f} times "
              f"({median['packed'] / median['padded']:.2f})")  # fmt: skip


if __name__ == "__main__":
    main()
