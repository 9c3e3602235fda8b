"""Predictions for the rows of a split, over any number of processes, and their metrics.

A *view* is one way to predict with the weights there are: at a lower rank, or averaged over
samples of them. Its name goes into the names of its metrics: `eval_[view_][set_]metric`, such as
`eval_r4_mismatched_accuracy`. The plain view has the name "" and gives `eval_[set_]metric`; where
a predictor has none, its last view stands for it. These plain values choose the best weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from examples.data.batches import Batch
from examples.errors import RunError

Collate = Callable[[Batch], dict[str, Any]]
Score = Callable[[np.ndarray], dict[str, float]]


class Predictor(Protocol):
    """How a batch is predicted; a method (`AdaptedModel.predictor`) or an optimiser may bring one.

    Attributes:
        probabilistic: logits are the log-probabilities of averaged predictions, so that views get
            `examples.evaluation.glue.calibration` as well.
        stacked: the copies of a batch for all views go through one forward pass, so it is given
            batches of that much fewer rows: a pass never has more rows than the user allowed.
    """

    probabilistic: bool
    stacked: bool

    def views(self, final: bool) -> list[str]:
        """Names of the views, the same on every process; `final` at the end of a run."""
        ...

    def outputs(self, model: nn.Module, arguments: dict[str, Any], views: list[str]) -> list[Any]:
        """One output per view: `.logits` (b, …), and `.loss` (mean over b) or None."""
        ...


class PlainPredictor:
    """One forward pass."""

    probabilistic = False
    stacked = False

    def views(self, final: bool) -> list[str]:
        return [""]

    def outputs(self, model: nn.Module, arguments: dict[str, Any], views: list[str]) -> list[Any]:
        return [model(**arguments)]


@dataclass(frozen=True)
class EvaluationSet:
    """Rows to predict.

    Attributes:
        name: "" or a name that goes into the metrics' names.
        rows: how many rows all processes have together.
        batches: (copies of a batch in one forward pass) -> this process's share of them.
        collate: batch -> arguments of the model.
        score: (rows, …) logits -> metrics.
        calibration: the same for what only a probabilistic predictor is asked; None for a
            regression.
        calibrated: every predictor is asked.
    """

    name: str
    rows: int
    batches: Callable[[int], list[Batch]]
    collate: Collate
    score: Score
    calibration: Score | None = None
    calibrated: bool = False


@dataclass(frozen=True)
class Prediction:
    """(rows, …) fp32 logits of all rows, and their mean loss where they have labels."""

    logits: np.ndarray
    loss: float | None


def at_view(metric: str, view: str) -> str:
    """The name that a metric such as `eval_f1` has at a view."""
    return f"eval_{view}_{metric.removeprefix('eval_')}" if view else metric


def worth_showing(values: dict[str, float], main: str, views: Iterable[str]) -> dict[str, float]:
    """What people want to read: the plain values, and of the other views the main metric."""
    views = [view for view in views if view]
    others = tuple(at_view("eval_", view) for view in views)
    wanted = {at_view(main, view) for view in views}
    return {n: v for n, v in values.items() if n in wanted or not n.startswith(others)}


def evaluate(
    model: nn.Module,
    sets: Iterable[EvaluationSet],
    accelerator: Accelerator,
    predictor: Predictor,
    final: bool,
) -> dict[str, float]:
    """Metrics of every set at every view.

    Raises:
        RunError: a set cannot be scored: no row, or logits that are not finite.
    """
    values: dict[str, float] = {}
    for data in sets:
        prefix = f"eval_{data.name}_" if data.name else "eval_"
        found = predict(model, data, accelerator, predictor, final)
        for view, prediction in found.items():
            try:
                scores = data.score(prediction.logits)
            except ValueError as error:
                raise RunError(f"evaluation: {error}") from error
            if prediction.loss is not None:
                scores["loss"] = prediction.loss
            if data.calibration and (data.calibrated or predictor.probabilistic):
                scores |= data.calibration(prediction.logits)
            values |= {at_view(prefix + name, view): value for name, value in scores.items()}
    return values


def on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on the device."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


def predict(
    model: nn.Module,
    data: EvaluationSet,
    accelerator: Accelerator,
    predictor: Predictor,
    final: bool,
) -> dict[str, Prediction]:
    """view -> its prediction; the plain view first, always there.

    Args:
        model: not wrapped for several processes: their numbers of batches may differ.
        data: the rows.
        accelerator: device, precision, processes.
        predictor: whose views these are.
        final: at the end of a run.
    """
    views = predictor.views(final)
    sums = [_Sum(data.rows) for _ in views]
    copies = len(views) if predictor.stacked else 1
    training = model.training
    model.eval()
    with torch.inference_mode(), accelerator.autocast():
        for batch in data.batches(copies):
            arguments = on_device(data.collate(batch), accelerator.device)
            outputs = predictor.outputs(model, arguments, views)
            for one, output in zip(sums, outputs, strict=True):
                one.add(batch, output)
    model.train(training)
    found = dict(zip(views, (one.over_processes(accelerator) for one in sums), strict=True))
    return {"": found.get("", found[views[-1]]), **found}


class _Sum:
    """The rows of one view that this process has predicted, zeros elsewhere, and their loss."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.logits: Tensor | None = None
        self.loss, self.labelled = torch.zeros((), dtype=torch.float64), False

    def add(self, batch: Batch, output: Any) -> None:
        if output.loss is not None:
            self.loss, self.labelled = self.loss + output.loss.double().cpu() * batch.weight, True
        found = output.logits.float().cpu()
        if self.logits is None:
            self.logits = torch.zeros(self.rows, *found.shape[1:])
        self.logits[torch.from_numpy(batch.rows.copy())] = found  # rows may run backwards

    def over_processes(self, accelerator: Accelerator) -> Prediction:
        """Each has filled in its own rows of a zero array, so the sum is the whole.

        A process without any row learns from the others how wide the array is.
        """
        logits, loss, labelled = self.logits, self.loss, self.labelled
        if accelerator.num_processes > 1:
            device = accelerator.device
            facts = [0 if logits is None else logits.shape[1], int(labelled)]
            facts = accelerator.gather(torch.tensor([facts], device=device)).amax(0).tolist()
            width, labelled = facts[0], bool(facts[1])
            logits = torch.zeros(self.rows, width) if logits is None else logits
            logits = accelerator.reduce(logits.to(device), "sum").cpu()
            loss = accelerator.reduce(loss.float().to(device), "sum").cpu()
        return Prediction(logits.numpy(), float(loss) if labelled else None)
