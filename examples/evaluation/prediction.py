"""Predictions for the rows of a split, over any number of processes, and their metrics.

A *variant* is one way to predict with the same weights: at a lower rank, or averaged over samples
of them. Its name is part of its metrics' names: `eval_[variant_][set_]metric`, such as
`eval_r4_mismatched_accuracy`. The plain variant has the name "" and gives `eval_[set_]metric`;
without a plain variant, the last one is used as the plain one. The plain values choose the best
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import pad

from examples.data.batches import Batch, on_device
from examples.errors import RunError
from examples.evaluation.outputs import logits_of

Collate = Callable[[Batch], dict[str, Any]]
Score = Callable[[np.ndarray], dict[str, float]]
Result = TypeVar("Result")
Weights = Callable[[], AbstractContextManager[Any]]


class Predictor(Protocol):
    """How a batch is predicted; a method (`AdaptedModel.predictor`) or an optimiser may bring one.

    Attributes:
        probabilistic: logits are log-probabilities of averaged predictions, so the metrics of
            `examples.evaluation.calibration` are computed even where nobody asks for them.
        stacked: all variants of a batch share one forward pass, in which each has a copy of it.
            Batches get that many times fewer rows, so a pass has no more rows than the user allows.
    """

    probabilistic: bool
    stacked: bool

    def variants(self, final: bool) -> list[str]:
        """Names of the variants, the same on every process; `final` at the end of a run."""
        ...

    def outputs(
        self, model: nn.Module, arguments: dict[str, Any], variants: list[str]
    ) -> list[Any]:
        """One output per variant, of the model or `.logits` (b, …) as `logits_of` makes them, and
        `.loss` (mean over b) or None."""
        ...

    def weights(self, model: nn.Module, final: bool) -> dict[str, Weights]:
        """variant -> within that, the model is the variant's: for texts that it generates.

        Variants that are averages of predictions have no weights of their own, and are left out.
        """
        ...


class PlainPredictor:
    """One forward pass."""

    probabilistic = False
    stacked = False

    def variants(self, final: bool) -> list[str]:
        return [""]

    def outputs(
        self, model: nn.Module, arguments: dict[str, Any], variants: list[str]
    ) -> list[Any]:
        return [model(**arguments)]

    def weights(self, model: nn.Module, final: bool) -> dict[str, Weights]:
        return {"": nullcontext}


@dataclass(frozen=True)
class EvaluationSet:
    """Rows to predict.

    Attributes:
        name: "" or a name that goes into the metrics' names.
        rows: how many rows all processes have together.
        batches: (copies of a batch in one forward pass) -> this process's share of them.
        collate: batch -> arguments of the model.
        score: (rows, …) logits -> metrics.
        calibration: (rows, classes) logits -> calibration metrics; None for a regression. Computed
            where the predictor is probabilistic, or `calibrated`.
        calibrated: compute them for any predictor: softmax(logits) are its probabilities.
        generate: (model, accelerator) -> more metrics, of what the model generates; all processes
            call it together, once for each variant that has weights of its own.
        shape: of a row's logits, where batches differ in the last dimension: it is filled up with
            -inf; None: it is the model's.
        report: (variant, its prediction) is called at the end of a run, on the main process.
    """

    name: str
    rows: int
    batches: Callable[[int], list[Batch]]
    collate: Collate
    score: Score
    calibration: Score | None = None
    calibrated: bool = False
    generate: Callable[[nn.Module, Accelerator], dict[str, float]] | None = None
    shape: tuple[int, ...] | None = None
    report: Callable[[str, Prediction], None] | None = None


@dataclass(frozen=True)
class Prediction:
    """(rows, …) fp32 logits of all rows, and their mean loss where they have labels."""

    logits: np.ndarray
    loss: float | None


def variant_metric(metric: str, variant: str) -> str:
    """The name that a metric such as `eval_f1` has at a variant."""
    return f"eval_{variant}_{metric.removeprefix('eval_')}" if variant else metric


def summary_metrics(
    values: dict[str, float], main: str, variants: Iterable[str]
) -> dict[str, float]:
    """The metrics of the summary: all plain ones, and the main one of every other variant."""
    variants = [variant for variant in variants if variant]
    others = tuple(variant_metric("eval_", variant) for variant in variants)
    wanted = {variant_metric(main, variant) for variant in variants}
    return {n: v for n, v in values.items() if n in wanted or not n.startswith(others)}


def evaluate(
    model: nn.Module,
    sets: Iterable[EvaluationSet],
    accelerator: Accelerator,
    predictor: Predictor,
    final: bool,
) -> dict[str, float]:
    """Metrics of every set at every variant.

    Raises:
        RunError: a set cannot be scored: no row, or logits that are not finite.
    """
    values: dict[str, float] = {}
    for data in sets:
        prefix = f"eval_{data.name}_" if data.name else "eval_"
        found = predict(model, data, accelerator, predictor, final)
        generated: dict[str, dict[str, float]] = {}
        if data.generate is not None:
            generated = by_variant(model, data.generate, accelerator, predictor, final)
        for variant, prediction in found.items():
            try:
                scores = data.score(prediction.logits)
            except ValueError as error:
                raise RunError(f"evaluation: {error}") from error
            if prediction.loss is not None:
                scores["loss"] = prediction.loss
            if data.calibration and (data.calibrated or predictor.probabilistic):
                scores |= data.calibration(prediction.logits)
            scores |= generated.get(variant, {})
            values |= {
                variant_metric(prefix + name, variant): value for name, value in scores.items()
            }
            if final and data.report is not None and accelerator.is_main_process:
                data.report(variant, prediction)
    return values


def predict(
    model: nn.Module,
    data: EvaluationSet,
    accelerator: Accelerator,
    predictor: Predictor,
    final: bool,
) -> dict[str, Prediction]:
    """The prediction of every variant, by its name; the plain one is always there, and first.

    Args:
        model: not wrapped for several processes: their numbers of batches may differ.
        data: the rows.
        accelerator: device, precision, processes.
        predictor: gives the variants.
        final: at the end of a run.
    """
    variants = predictor.variants(final)
    gathered = [_GatheredLogits(data.rows, data.shape) for _ in variants]
    copies = len(variants) if predictor.stacked else 1
    training = model.training
    model.eval()
    with torch.inference_mode(), accelerator.autocast():
        for batch in data.batches(copies):
            arguments = on_device(data.collate(batch), accelerator.device)
            outputs = predictor.outputs(model, arguments, variants)
            for logits, output in zip(gathered, outputs, strict=True):
                logits.add(batch, logits_of(output, arguments), output.loss)
    model.train(training)
    predictions = [logits.over_processes(accelerator) for logits in gathered]
    found = dict(zip(variants, predictions, strict=True))
    return {"": found.get("", found[variants[-1]]), **found}


def by_variant(
    model: nn.Module,
    generate: Callable[[nn.Module, Accelerator], Result],
    accelerator: Accelerator,
    predictor: Predictor,
    final: bool,
) -> dict[str, Result]:
    """What `generate` returns with the weights of every variant; the plain one is first."""
    found = {}
    for variant, weights in predictor.weights(model, final).items():
        with accelerator.autocast(), weights():
            found[variant] = generate(model, accelerator)
    return {"": found.get("", list(found.values())[-1]), **found}


class _GatheredLogits:
    """Logits and loss of one variant: this process's rows, zeros for those of other processes.

    Attributes:
        logits: (rows, …) fp32 on the CPU, once there is a batch or a shape.
        loss: Σ weight · mean loss over this process's batches, fp64.
        labelled: the batches have labels, so there is a loss.
    """

    def __init__(self, rows: int, shape: tuple[int, ...] | None = None) -> None:
        self.rows = rows
        self.logits = None if shape is None else torch.zeros(rows, *shape)
        self.loss, self.labelled = torch.zeros((), dtype=torch.float64), False

    def add(self, batch: Batch, logits: Tensor, loss: Tensor | None) -> None:
        if loss is not None:
            self.loss, self.labelled = self.loss + loss.double().cpu() * batch.weight, True
        logits = logits.float().cpu()  # (b, …)
        if self.logits is None:
            self.logits = torch.zeros(self.rows, *logits.shape[1:])  # (rows, …)
        missing = self.logits.shape[-1] - logits.shape[-1]
        logits = pad(logits, (0, missing), value=-torch.inf) if missing else logits
        # A copy: torch takes no array of negative stride, as reversed row numbers are.
        self.logits[torch.from_numpy(batch.rows.copy())] = logits

    def over_processes(self, accelerator: Accelerator) -> Prediction:
        """All rows: every process has filled in its own ones, so the sum is the whole."""
        logits, loss, labelled = self.logits, self.loss, self.labelled
        if accelerator.num_processes > 1:
            device = accelerator.device
            # A process without any batch learns from the others how wide the logits are, and
            # whether there is a loss.
            facts = [0 if logits is None else logits.shape[1], int(labelled)]
            facts = accelerator.gather(torch.tensor([facts], device=device)).amax(0).tolist()
            width, labelled = facts[0], bool(facts[1])
            logits = torch.zeros(self.rows, width) if logits is None else logits
            logits = accelerator.reduce(logits.to(device), "sum").cpu()
            loss = accelerator.reduce(loss.float().to(device), "sum").cpu()
        return Prediction(logits.numpy(), float(loss) if labelled else None)
