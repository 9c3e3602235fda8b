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
            `examples.adapters.Adapted`, an optimiser's takes (parameter groups, its options, fp16).
        summary: a few words for `--help`.
    """

    name: str
    options: type
    build: str
    summary: str

    def load(self) -> Callable[..., Any]:
        """The build function."""
        module, _, function = self.build.partition(":")
        return getattr(import_module(module), function)


METHODS: dict[str, Entry] = {}
OPTIMIZERS: dict[str, Entry] = {}


def method(name: str, options: type, build: str, summary: str) -> None:
    """Registers a method."""
    METHODS[name] = Entry(name, options, build, summary)


def optimizer(name: str, options: type, build: str, summary: str) -> None:
    """Registers an optimiser."""
    OPTIMIZERS[name] = Entry(name, options, build, summary)


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
    optimizer: str = option("adamw", "what steps the weights", choices=OPTIMIZERS)
