"""How long a run's model takes without its head, compacted where it is pruned."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

import transformers_patched
from examples.errors import RunError
from peft_custom import PeftConfig, PeftModel
from transformers_patched.checkpoint import read_safetensors

CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
}
HEADS = ("classifier.weight", "classifier.out_proj.weight", "score.weight")


def dense_model(base: str) -> nn.Module:
    """The pretrained model without a head."""
    return transformers_patched.AutoModel.from_pretrained(base)


def compact_model(adapter: Path, base: str) -> nn.Module:
    """What is left of the model under a pruning adapter, without its head.

    Raises:
        RunError: the adapter prunes nothing, or is for a task that is not known here.
    """
    kind = str(PeftConfig.from_pretrained(adapter).task_type).rpartition(".")[2]
    if kind not in CLASSES:
        raise RunError(f"{adapter}: task_type {kind} is not one of {', '.join(CLASSES)}")
    weights = read_safetensors(adapter / "adapter_model.safetensors")
    labels = [len(t) for name, t in weights.items() if name.endswith(HEADS)]
    more = {"num_labels": labels[0]} if labels else {}
    model = getattr(transformers_patched, CLASSES[kind]).from_pretrained(base, **more)
    adapted = PeftModel.from_pretrained(model, adapter)
    if not hasattr(adapted.base_model, "compact"):
        raise RunError(f"{adapter} has no masks: nothing can be compacted")
    return adapted.compact().base_model


@torch.no_grad()
def milliseconds(
    models: Mapping[str, nn.Module], batch: int, length: int, rounds: int
) -> dict[str, float]:
    """CPU time of every model on one thread, in turn: the median of the rounds, after one more.

    Args:
        models: by name, without heads.
        batch: rows, all of `length` tokens.
        length: of a row.
        rounds: that count.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for model in models.values():
        model.eval()  # once: with the mode a layer may drop what it has kept for speed
    found: dict[str, list[float]] = {name: [] for name in models}
    vocabulary = min(m.config.vocab_size for m in models.values())
    ids = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
    try:
        for turn in range(rounds + 1):
            for name, model in models.items():
                started = time.process_time()
                model(ids)
                if turn:
                    found[name].append(1e3 * (time.process_time() - started))
    finally:
        torch.set_num_threads(threads)
    return {name: statistics.median(times) for name, times in found.items()}
