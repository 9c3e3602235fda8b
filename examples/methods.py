"""The registry of methods and optimisers: a name, its options, and where it is built.

    method("lora", LoraOptions, "examples.adapters:lora", "low-rank increments of frozen weights")

Nothing here imports torch; `build` is imported when a program runs. A new method is one call, and
appears in `--help`, in `--method` and in the resolved options by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from examples.config import OptionError, option


@dataclass(frozen=True)
class Entry:
    """One registered name.

    Attributes:
        name: as in `--method` or `--optimizer`.
        options: the dataclass of its options.
        build: "module:function"; a method's takes (ModelSource, its options) and returns an
            `examples.adapters.Adapted`, an optimiser's takes (parameter groups, its options,
            RunFacts).
        summary: a few words for `--help`.
        optimizer: of a method: the optimiser it takes unless another is named.
        posterior: of a method: it asks the optimiser for σ of every weight; of an optimiser: it
            has that.
    """

    name: str
    options: type
    build: str
    summary: str
    optimizer: str = "adamw"
    posterior: bool = False

    def load(self) -> Callable[..., Any]:
        """The build function."""
        module, _, function = self.build.partition(":")
        return getattr(import_module(module), function)


METHODS: dict[str, Entry] = {}
OPTIMIZERS: dict[str, Entry] = {}


@dataclass(frozen=True)
class RunFacts:
    """What the builder of an optimiser may ask about the run.

    Attributes:
        rows: N, the training rows of all processes; 0 where nothing is trained.
        seed: of draws that must agree between processes, or after a resume.
        fp16: gradients come from a GradScaler.
    """

    rows: int
    seed: int = 0
    fp16: bool = False


def method(name: str, options: type, build: str, summary: str, **facts: Any) -> None:
    """Registers a method; `facts` are the last attributes of `Entry`."""
    METHODS[name] = Entry(name, options, build, summary, **facts)


def optimizer(name: str, options: type, build: str, summary: str, **facts: Any) -> None:
    """Registers an optimiser; `facts` are the last attributes of `Entry`."""
    OPTIMIZERS[name] = Entry(name, options, build, summary, **facts)


@dataclass(frozen=True)
class FullOptions:
    """Full fine-tuning has no options of its own."""


@dataclass(frozen=True)
class LoraOptions:
    lora_r: int = option(8, "rank of the increments", low=1)
    lora_alpha: float = option(16.0, "increments are scaled by alpha / r", low=0)
    lora_dropout: float = option(0.0, "dropout before the increments", low=0, high=0.999)
    lora_modules: tuple[str, ...] = option(("query", "value"), "layers to adapt, or all-linear")
    init_lora_weights: str = option(
        "true", "peft_custom: true, gaussian, pissa, pissa_niter_K: where A and B start"
    )
    use_rslora: bool = option(False, "peft_custom: scale by alpha / √r")
    lora_path: str | None = option(
        None,
        "start from this adapter: a run's or PEFT's folder, or Microsoft's .bin; a head of "
        "another number of labels is left out",
    )
    wiring: str = option(
        "peft_custom",
        "peft_custom: injected into the model; loralib: built in the modelling file",
        choices=("peft_custom", "loralib"),
    )

    def __post_init__(self) -> None:
        if self.wiring == "loralib" and (self.init_lora_weights != "true" or self.use_rslora):
            raise OptionError(
                "--init_lora_weights and --use_rslora are options of --wiring peft_custom"
            )


@dataclass(frozen=True)
class AdamWOptions:
    adam_beta1: float = option(0.9, "decay of the mean gradient", low=0, high=0.999999)
    adam_beta2: float = option(0.999, "decay of the mean square", low=0, high=0.999999)
    adam_epsilon: float = option(1e-8, "added to the root", low=0)


method("full", FullOptions, "examples.adapters:full", "every weight is trained")
method("lora", LoraOptions, "examples.adapters:lora", "low-rank increments of frozen weights")
optimizer("adamw", AdamWOptions, "examples.adapters:adamw", "Adam with decoupled weight decay")


@dataclass(frozen=True)
class MethodOptions:
    method: str = option("lora", "how the model is fine-tuned", choices=METHODS)
    optimizer: str | None = option(
        None,
        "what steps the weights; none: ivon for a method that ranks by a posterior, else adamw",
        choices=OPTIMIZERS,
    )

    def entries(self) -> tuple[Entry, Entry]:
        """The method and its optimiser.

        Raises:
            OptionError: the method needs a posterior and the optimiser has none.
        """
        method = METHODS[self.method]
        optimizer = OPTIMIZERS[self.optimizer or method.optimizer]
        if method.posterior and not optimizer.posterior:
            able = " or ".join(e.name for e in OPTIMIZERS.values() if e.posterior)
            raise OptionError(
                f"--method {method.name} ranks by the optimiser's posterior, and --optimizer "
                f"{optimizer.name} has none: use --optimizer {able}"
            )
        return method, optimizer
