"""Predictions for the rows of a split, over any number of processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from examples.data.batches import Batch

Collate = Callable[[Batch], dict[str, Any]]


@dataclass(frozen=True)
class EvaluationSet:
    """Rows to predict.

    Attributes:
        name: "" or a name that goes into the metrics' names.
        rows: how many rows all processes have together.
        batches: this process's share of them.
        collate: batch -> arguments of the model.
        score: (rows, …) logits -> metrics.
    """

    name: str
    rows: int
    batches: list[Batch]
    collate: Collate
    score: Callable[[np.ndarray], dict[str, float]]


def on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on the device."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


def predict(
    model: nn.Module, data: EvaluationSet, accelerator: Accelerator
) -> tuple[np.ndarray, float | None]:
    """(rows, …) fp32 logits of all rows, and their mean loss where they have labels.

    Args:
        model: not wrapped for several processes: their numbers of batches may differ.
        data: the rows.
        accelerator: device, precision, processes.
    """
    training = model.training
    model.eval()
    logits: Tensor | None = None
    loss, labelled = torch.zeros((), dtype=torch.float64), False
    with torch.inference_mode(), accelerator.autocast():
        for batch in data.batches:
            output = model(**on_device(data.collate(batch), accelerator.device))
            if output.loss is not None:
                loss, labelled = loss + output.loss.double().cpu() * batch.weight, True
            found = output.logits.float().cpu()
            if logits is None:
                logits = torch.zeros(data.rows, *found.shape[1:])
            logits[torch.from_numpy(batch.rows.copy())] = found  # rows may run backwards
    model.train(training)
    if accelerator.num_processes > 1:
        logits, loss, labelled = _summed(logits, loss, data.rows, accelerator)
    return logits.numpy(), float(loss) if labelled else None


def _summed(
    logits: Tensor | None, loss: Tensor, rows: int, accelerator: Accelerator
) -> tuple[Tensor, Tensor, bool]:
    """Over processes: each has filled in its own rows of a zero array, so the sum is the whole.

    A process without any row learns from the others how wide the array is.
    """
    device = accelerator.device
    facts = [0 if logits is None else logits.shape[1], int(bool(loss != 0))]
    width, labelled = accelerator.gather(torch.tensor([facts], device=device)).amax(0).tolist()
    logits = torch.zeros(rows, width) if logits is None else logits
    total = accelerator.reduce(logits.to(device), "sum").cpu()
    return total, accelerator.reduce(loss.float().to(device), "sum").cpu(), bool(labelled)
