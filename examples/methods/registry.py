"""The registry of methods and optimisers: a name, its options, and where it is built.

    method(
    "lora", LoraOptions, "examples.methods.common:lora", "low-rank increments of frozen weights"
)

Nothing here imports torch; `build` is imported when a program runs. A new method is one call, and
appears in `--help`, in `--method` and in the resolved options by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from examples.cli.fields import OptionError, option


@dataclass(frozen=True)
class Entry:
    """One registered name.

    Attributes:
        name: as in `--method` or `--optimizer`.
        options: the dataclass of its options.
        build: "module:function"; a method's takes (ModelSource, its options) and returns an
            `examples.methods.common.Adapted`, an optimiser's takes (parameter groups, its options,
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
        processes: how many train together, with gradients averaged over them.
        device: this process's.
    """

    rows: int
    seed: int = 0
    fp16: bool = False
    processes: int = 1
    device: str = "cpu"


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
class IncrementOptions:
    """What the low-rank methods with a fixed rank share."""

    lora_r: int = option(8, "rank of the increments (dylora: the largest)", low=1)
    lora_alpha: float = option(16.0, "increments are scaled by alpha / r", low=0)
    lora_dropout: float = option(0.0, "dropout before the increments", low=0, high=0.999)
    lora_modules: tuple[str, ...] = option(("query", "value"), "layers to adapt, or all-linear")
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


@dataclass(frozen=True)
class LoraOptions(IncrementOptions):
    init_lora_weights: str = option(
        "true", "peft_custom: true, gaussian, pissa, pissa_niter_K: where A and B start"
    )
    use_rslora: bool = option(False, "peft_custom: scale by alpha / √r")

    def __post_init__(self) -> None:
        if self.wiring == "loralib" and (self.init_lora_weights != "true" or self.use_rslora):
            raise OptionError(
                "--init_lora_weights and --use_rslora are options of --wiring peft_custom"
            )


@dataclass(frozen=True)
class DyLoraOptions(IncrementOptions):
    """Every rank from r_min to lora_r works: at rank b increments are scaled by alpha / b."""

    dylora_mode: str = option(
        "normal",
        "what a step at rank b trains: rows 1 to b (normal) or row b alone (frozen)",
        choices=("normal", "frozen"),
    )
    dylora_dist: str = option(
        "uniform", "how ranks are drawn: uniform, or geometric(p) such as geometric(0.15)"
    )
    dylora_r_min: int = option(1, "smallest rank that is trained", low=1)
    dylora_dense: bool = option(
        False, "let momentum and weight decay move what a step does not train, as published"
    )
    dylora_eval_ranks: tuple[str, ...] = option(
        (),
        "ranks of every evaluation beside lora_r, which chooses the weights; none: r_min during "
        "training, all from r_min on at the end",
    )
    dylora_tolerance: float = option(
        0.01, "the smallest rank this close to the best one is reported", low=0
    )

    def __post_init__(self) -> None:
        if self.dylora_r_min > self.lora_r:
            raise OptionError(
                f"--dylora_r_min {self.dylora_r_min} is above --lora_r {self.lora_r}: ranks are "
                "drawn between them"
            )
        for word in self.dylora_eval_ranks:
            if not word.isdecimal() or not 1 <= int(word) <= self.lora_r:
                raise OptionError(
                    f"--dylora_eval_ranks {word}: ranks are whole numbers from 1 to --lora_r, here "
                    f"{self.lora_r}"
                )

    def ranks(self, final: bool) -> list[int]:
        """The ranks to evaluate at, in order; the last is `lora_r`."""
        asked = [int(word) for word in self.dylora_eval_ranks]
        every = range(self.dylora_r_min, self.lora_r) if final else [self.dylora_r_min]
        return sorted({*(asked or every), self.lora_r})


@dataclass(frozen=True)
class AdaLoraOptions:
    """Lengths of the schedule are optimiser steps (100) or shares of all of them (0.1)."""

    adalora_target_r: int = option(8, "mean rank at the end of the schedule", low=1)
    adalora_init_r: int = option(12, "rank of every layer at its start", low=1)
    adalora_tinit: int | float = option(0, "steps before ranks are cut: 500 or 0.15", low=0)
    adalora_tfinal: int | float = option(0, "steps after the last cut: 500 or 0.4", low=0)
    adalora_delta_t: int = option(100, "steps between cuts", low=1)
    adalora_orth_reg_weight: float = option(
        0.5, "weight of the regulariser that keeps singular vectors orthonormal; 0: none", low=0
    )
    adalora_sensitivity_timing: str = option(
        "before",
        "|w·∂L/∂w| is taken before the update, as in the paper, or after it, as PEFT does",
        choices=("before", "after"),
    )
    init_lora_weights: str = option("true", "true: E = 0; gaussian: E ~ N(0, 0.02²), PEFT 0.11's")
    lora_alpha: float = option(8.0, "increments are scaled by alpha / init_r; 0: by 1", low=0)
    lora_dropout: float = option(0.0, "dropout before the increments", low=0, high=0.999)
    lora_modules: tuple[str, ...] = option(
        (), "layers to adapt, or all-linear; none: attention and feed-forward, as in PEFT"
    )
    lora_path: str | None = option(
        None, "start from this adapter (a run's or PEFT's folder) and its ranks"
    )

    def __post_init__(self) -> None:
        if self.adalora_target_r > self.adalora_init_r:
            raise OptionError(
                f"--adalora_target_r {self.adalora_target_r} is above --adalora_init_r "
                f"{self.adalora_init_r}: ranks are only cut"
            )


@dataclass(frozen=True)
class ViLoraOptions(AdaLoraOptions):
    vilora_criterion: str = option(
        "SNR_mean_abs",
        "score of a weight θ ~ N(μ, σ²): SNR_mean_abs (of |θ|), SNR (|μ|/σ), mean (|μ|), sigma "
        "(1/σ) or E_mean_abs (E|θ|)",
    )


@dataclass(frozen=True)
class BimLoraOptions:
    """Features of weight blocks are collected first; the mask that starts from them trains."""

    lora_r: int = option(16, "rank of the increments before the mask", low=1)
    lora_alpha: float = option(16.0, "increments are scaled by alpha / r", low=0)
    lora_dropout: float = option(0.0, "dropout before the increments", low=0, high=0.999)
    lora_modules: tuple[str, ...] = option(("all-linear",), "layers to adapt, or all-linear")
    lora_path: str | None = option(
        None, "start from this adapter (a run's or PEFT's folder): LoRA's, or BIM-LoRA's with mask"
    )
    block_size: int = option(16, "a mask entry is for a block of so many rows and columns", low=1)
    mask_init: str = option(
        "mlp",
        "where the mask starts: a network's scores of the blocks, their raw features, random, or "
        "constant",
        choices=("mlp", "features", "random", "constant"),
    )
    initial_block_score: float = option(0.5, "mask_init constant: logit of the mask")
    train_mask: bool = option(True, "the mask trains")
    collection_steps: int | float = option(
        0, "batches for the features: 300, or 0.05 of the run; 0: 0.05, at most 300", low=0
    )
    features_path: str | None = option(
        None, "features are read from this file if it exists, and written to it if not"
    )
    mlp_epochs: int = option(6, "passes of the network over all blocks", low=1)
    mlp_lr: float = option(2e-3, "its learning rate", low=0)
    mlp_dropout: float = option(0.1, "its dropout", low=0, high=0.999)
    mask_temperature: float = option(
        1.0, "where exponential and constant temperatures start", low=0.01
    )
    temperature_schedule: str = option(
        "table",
        "table: 1.4, 1.0, 0.8, 0.6, 0.45, from 0, 0.2, 0.4, 0.67 and 0.87 of training on",
        choices=("table", "exponential", "constant"),
    )
    temperature_decay_rate: float = option(0.95, "exponential: factor", low=0.01, high=1)
    temperature_decay_steps: int = option(100, "exponential: steps between factors", low=1)
    min_temperature: float = option(0.1, "exponential: not below", low=0.01)
    score_lr_ratio: float = option(1.0, "the mask's rate over --learning_rate", low=0.0)
    head_lr_ratio: float = option(3.0, "the head's rate over --learning_rate", low=0.0)
    hard_mask_threshold: float = option(
        -1.0, "evaluate with a mask of zeros and ones, cut here; below 0: with the soft one", high=1
    )


@dataclass(frozen=True)
class AdamWOptions:
    adam_beta1: float = option(0.9, "decay of the mean gradient", low=0, high=0.999999)
    adam_beta2: float = option(0.999, "decay of the mean square", low=0, high=0.999999)
    adam_epsilon: float = option(1e-8, "added to the root", low=0)


@dataclass(frozen=True)
class IvonOptions:
    """σ = 1/√(ess·(h + weight_decay)) for every trained weight; h starts at hess_init."""

    ivon_ess: float = option(0, "effective number of training rows; 0: all rows", low=0)
    ivon_hess_init: float = option(1.0, "h at the start", low=0)
    ivon_beta1: float = option(0.9, "decay of the mean gradient", low=0, high=1)
    ivon_beta2: float = option(0.99999, "decay of h", low=0, high=1)
    ivon_weight_decay: float = option(1e-8, "precision of the prior over ess", low=0)
    ivon_train_mc_samples: int = option(1, "samples of the weights per step", low=1)
    ivon_infer_mc_samples: int = option(
        0, "predictions are averaged over so many samples of the weights; 0: at their mean", low=0
    )
    ivon_clip_radius: float = option(
        1e-3, "no weight moves by more than this times the rate", low=0
    )


method("full", FullOptions, "examples.methods.common:full", "every weight is trained")
method("lora", LoraOptions, "examples.methods.common:lora", "low-rank increments of frozen weights")
method(
    "dylora", DyLoraOptions, "examples.methods.dylora:dylora", "nested ranks: one run, every rank"
)
method(
    "adalora", AdaLoraOptions, "examples.methods.adalora:adalora", "ranks shared out by sensitivity"
)
method(
    "vilora",
    ViLoraOptions,
    "examples.methods.adalora:vilora",
    "ranks shared out by the optimiser's posterior",
    optimizer="ivon",
    posterior=True,
)
method(
    "bim_lora",
    BimLoraOptions,
    "examples.methods.bim_lora:bim_lora",
    "increments gated block by block",
)
optimizer(
    "adamw", AdamWOptions, "examples.methods.common:adamw", "Adam with decoupled weight decay"
)
optimizer(
    "ivon",
    IvonOptions,
    "examples.optimizers.ivon:ivon",
    "a Gaussian over the weights, by variational inference",
    posterior=True,
)


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
