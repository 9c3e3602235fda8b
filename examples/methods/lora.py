"""LoRA, in its two wirings: injected into the model, or built in the modelling file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.cli.fields import option
from examples.errors import OptionError
from examples.methods.options import IncrementOptions
from examples.methods.registry import AdaptedModel, register_method

if TYPE_CHECKING:
    from examples.methods.source import ModelSource
    from peft_custom import PeftModel


@dataclass(frozen=True)
class LoraOptions(IncrementOptions):
    """What follows lora_path and wiring is for --wiring peft_custom."""

    init_lora_weights: str = option(
        "true",
        "where A and B start: true, gaussian, pissa, pissa_niter_K, olora, or eva (the same as "
        "--rank_from activations)",
    )
    use_rslora: bool = option(False, "scale by alpha / √r")
    use_dora: bool = option(False, "DoRA: lengths of the rows of W + increment train apart")
    loraplus_lr_ratio: float | None = option(
        None, "LoRA+: B has so many times the learning rate of A, such as 16", low=1e-6
    )
    rank_from: str | None = option(
        None,
        "ranks (of mean lora_r) and the start of A from the first batches: variance of the layers' "
        "inputs (activations: EVA), or gradients of the weights (gradients)",
        choices=("activations", "gradients"),
    )
    rank_rho: float = option(2.0, "rank_from: no rank is above rho * lora_r", low=1)
    rank_batches: int = option(8, "rank_from: optimiser steps' worth of batches", low=1)

    def __post_init__(self) -> None:
        if self.init_lora_weights == "eva":
            object.__setattr__(self, "init_lora_weights", "true")
            object.__setattr__(self, "rank_from", self.rank_from or "activations")
        injected = {
            "init_lora_weights": self.init_lora_weights != "true",
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "loraplus_lr_ratio": self.loraplus_lr_ratio is not None,
            "rank_from": self.rank_from is not None,
        }
        given = [f"--{name}" for name, used in injected.items() if used]
        if self.wiring == "loralib" and given:
            raise OptionError(f"{', '.join(given)}: options of --wiring peft_custom")
        if self.rank_from is not None and self.lora_path is not None:
            raise OptionError(
                "--rank_from makes a start, and so does --lora_path: leave one of them out"
            )


def build(source: ModelSource, options: LoraOptions) -> AdaptedModel:
    """LoRA by `options.wiring`, started from `options.lora_path` where given."""
    from examples.methods.common import initialisation, with_loralib, with_peft
    from examples.methods.start import start_from
    from peft_custom import LoraConfig

    if options.wiring == "loralib":
        adapted = with_loralib(source, options)
    else:
        adapted = with_peft(
            source,
            options,
            LoraConfig,
            r=options.lora_r,
            init_lora_weights=initialisation(options.init_lora_weights),
            use_rslora=options.use_rslora,
            use_dora=options.use_dora,
            loraplus_lr_ratio=options.loraplus_lr_ratio,
            rank_from=options.rank_from,
            rho=options.rank_rho,
            rank_batches=options.rank_batches,
            **_saved_ranks(options.lora_path),
        )
    start_from(adapted.model, options, source.print_once)
    if options.rank_from is not None:
        adapted.summarize = lambda *unused: _ranks_found(adapted.model)
        adapted.plot = lambda folder, title, rows: _plot(adapted.model, folder, title)
    return adapted


def _saved_ranks(path: str | None) -> dict[str, Any]:
    """The modules and their ranks where the adapter that a run starts from has several."""
    from peft_custom.config import CONFIG_NAME, PATTERN_KEYS
    from peft_custom.files import read_json
    from peft_custom.save_and_load import adapter_folder

    file = None if path is None else adapter_folder(path) / CONFIG_NAME
    if file is None or not file.is_file():
        return {}
    saved = read_json(file)
    found = {name: saved[name] for name in PATTERN_KEYS if saved.get(name)}
    return {"target_modules": saved.get("target_modules"), **found} if found else {}


def _ranks_found(model: PeftModel) -> dict[str, Any]:
    """The ranks from data, and the numbers that the adapter has without room for others."""
    ranks = model.base_model.ranks()
    _, tensors = model.base_model.export("default")
    return {
        "smallest_rank": min(ranks.values()),
        "largest_rank": max(ranks.values()),
        "adapter_parameters": sum(tensor.numel() for tensor in tensors.values()),
    }


def _plot(model: PeftModel, folder: Path, title: str) -> None:
    from examples.plots.ranks import rank_heatmap

    ranks = model.base_model.ranks()
    rank_heatmap(folder / "ranks.png", ranks, max(ranks.values()), title)


register_method("lora", LoraOptions, build, "low-rank increments of frozen weights")
