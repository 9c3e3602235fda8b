"""The registry of methods and optimisers: a name, its options, and the function that builds it.

    register_method("lora", LoraOptions, build, "low-rank increments of frozen weights")

Nothing here imports torch, and no module that registers something does until its `build` is called.
A new method is one file with one such call, and one import in `examples/methods/__init__.py`; it
appears in `--help`, in `--method` and in the resolved options by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from examples.evaluation.prediction import Predictor
    from examples.methods.source import ModelSource
    from examples.training.sampling import WeightSampler

Row = dict[str, Any]  # of metrics.jsonl: `step`, `epoch`, losses and metrics

# -- what a build function returns --------------------------------------------------------------


@dataclass
class AdaptedModel:
    """A model ready for training.

    Attributes:
        model: gives `.loss` and `.logits`, and has `parameter_groups(lr, weight_decay)`.
        save: writes the result into a folder, the method's `MethodSpec.folder`.
        predictor: how it is evaluated, where that is more than one forward pass.
        summarize: (final metrics, main metric, title, run folder or None) -> more figures of the
            run, shown and saved with the others; it may write files into the folder. Called on the
            main process; an evaluation without training has no folder.
        plot: (folder, title, evaluations) draws what the method has to show, for `--plots`.
    """

    model: nn.Module
    save: Callable[[Path], None]
    predictor: Predictor | None = None
    summarize: Callable[[dict[str, float], str, str, Path | None], dict[str, Any]] | None = None
    plot: Callable[[Path, str, list[Row]], None] | None = None


class Posterior(Protocol):
    """A distribution over the weights that an optimiser has, and its file beside a result."""

    def save(self, folder: Path, model: nn.Module) -> None:
        """Writes the posterior of what the result in `folder` holds."""
        ...

    def load(self, start: Path, model: nn.Module) -> str:
        """Takes it over from the folder a run starts from; what there is to say about it."""
        ...

    def plot(self, folder: Path, title: str, model: nn.Module) -> None:
        """Draws what there is to show, for `--plots`."""
        ...


@dataclass
class BuiltOptimizer:
    """An optimiser, and what it offers a run beyond its steps.

    Attributes:
        optimizer: torch's interface.
        sampler: the same, where gradients are taken at samples of the weights.
        predictor: (the method's predictor) -> one that averages its predictions.
        posterior: where the weights are a distribution's; the optimiser's state belongs to them.
    """

    optimizer: Optimizer
    sampler: WeightSampler | None = None
    predictor: Callable[[Predictor], Predictor] | None = None
    posterior: Posterior | None = None


# -- the registry -------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunInfo:
    """What the builder of an optimiser may ask about the run.

    Attributes:
        rows: N, what an epoch's loss is a mean over, of all processes: training rows, or the scored
            tokens of texts; 0 where nothing is trained.
        seed: of draws that must agree between processes, or after a resume.
        fp16: gradients come from a GradScaler.
        processes: how many train together, with gradients averaged over them.
        device: this process's.
    """

    rows: int
    seed: int = 0
    fp16: bool = False
    processes: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class MethodSpec:
    """A method.

    Attributes:
        name: as in `--method`.
        options: the dataclass of its options.
        build: (where the model comes from, its options) -> the model, adapted.
        summary: a few words for `--help`.
        optimizer: the optimiser it takes unless another is named.
        needs_posterior: it asks the optimiser for σ of every weight.
        files: what `AdaptedModel.summarize` writes into the run's folder.
        folder: where in the run's folder the result is.
    """

    name: str
    options: type
    build: Callable[[ModelSource, Any], AdaptedModel]
    summary: str
    optimizer: str = "adamw"
    needs_posterior: bool = False
    files: tuple[str, ...] = ()
    folder: str = "adapter"


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimiser.

    Attributes:
        name: as in `--optimizer`.
        options: the dataclass of its options.
        build: (parameter groups, its options, the run) -> the optimiser.
        summary: a few words for `--help`.
        has_posterior: it knows σ of every weight.
    """

    name: str
    options: type
    build: Callable[[list[dict[str, Any]], Any, RunInfo], BuiltOptimizer]
    summary: str
    has_posterior: bool = False


METHODS: dict[str, MethodSpec] = {}
OPTIMIZERS: dict[str, OptimizerSpec] = {}


def register_method(
    name: str,
    options: type,
    build: Callable[[ModelSource, Any], AdaptedModel],
    summary: str,
    *,
    optimizer: str = "adamw",
    needs_posterior: bool = False,
    files: tuple[str, ...] = (),
    folder: str = "adapter",
) -> None:
    """Adds a method; the arguments are the attributes of `MethodSpec`."""
    spec = MethodSpec(name, options, build, summary, optimizer, needs_posterior, files, folder)
    METHODS[name] = spec


def register_optimizer(
    name: str,
    options: type,
    build: Callable[[list[dict[str, Any]], Any, RunInfo], BuiltOptimizer],
    summary: str,
    *,
    has_posterior: bool = False,
) -> None:
    """Adds an optimiser; the arguments are the attributes of `OptimizerSpec`."""
    OPTIMIZERS[name] = OptimizerSpec(name, options, build, summary, has_posterior)
