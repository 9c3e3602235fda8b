"""AdaLoRA and ViLoRA: ranks that are shared out among the layers while they train."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.cli.fields import option
from examples.errors import OptionError
from examples.methods.registry import AdaptedModel, Row, register_method

if TYPE_CHECKING:
    from examples.methods.source import ModelSource
    from peft_custom import PeftModel


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


def build(source: ModelSource, options: AdaLoraOptions) -> AdaptedModel:
    """Ranks by sensitivity, whatever the optimiser."""
    from peft_custom import AdaLoraConfig

    return _build(source, options, AdaLoraConfig)


def build_vilora(source: ModelSource, options: ViLoraOptions) -> AdaptedModel:
    """Ranks by the optimiser's posterior."""
    from peft_custom import VILoraConfig

    return _build(source, options, VILoraConfig, criterion=options.vilora_criterion)


def _build(source: ModelSource, options: AdaLoraOptions, config: type, **more: Any) -> AdaptedModel:
    from examples.methods.common import initialisation, with_peft
    from examples.methods.start import start_from

    adapted = with_peft(
        source,
        options,
        config,
        target_r=options.adalora_target_r,
        init_r=options.adalora_init_r,
        tinit=options.adalora_tinit,
        tfinal=options.adalora_tfinal,
        deltaT=options.adalora_delta_t,
        orth_reg_weight=options.adalora_orth_reg_weight,
        sensitivity_timing=options.adalora_sensitivity_timing,
        init_lora_weights=initialisation(options.init_lora_weights),
        rank_pattern=_saved_ranks(options),
        **more,
    )
    agree = {"init_r": "adalora_init_r", "lora_alpha": "lora_alpha"}
    start_from(adapted.model, options, source.print_once, agree)
    adapted.plot = lambda folder, title, rows: _plot(adapted.model, folder, title, rows)
    return adapted


def _saved_ranks(options: AdaLoraOptions) -> dict[str, list[bool]] | None:
    """Which components the adapter has that a run starts from."""
    if options.lora_path is None:
        return None
    from peft_custom import AdaLoraConfig, PeftConfig
    from peft_custom.save_and_load import adapter_folder
    from transformers_patched import CheckpointError

    folder = adapter_folder(options.lora_path)
    saved = PeftConfig.from_pretrained(folder)
    if not isinstance(saved, AdaLoraConfig):
        raise CheckpointError(
            f"{folder} is a {saved.peft_type} adapter: --method adalora and vilora start from "
            "adapters of their own form"
        )
    if saved.init_r != options.adalora_init_r:
        raise CheckpointError(
            f"{folder} has init_r {saved.init_r}: give --adalora_init_r {saved.init_r}"
        )
    return saved.rank_pattern


def _plot(model: PeftModel, folder: Path, title: str, rows: list[Row]) -> None:
    """Final ranks, and how they came about."""
    from examples.plots.ranks import rank_heatmap, rank_trajectories

    pattern = model.base_model.rank_pattern()
    ranks = {name.removesuffix(".lora_E"): sum(kept) for name, kept in pattern.items()}
    start = len(next(iter(pattern.values())))
    rank_heatmap(folder / "ranks.png", ranks, start, title)
    cuts = [(row["step"], row["budget"], row["ranks"]) for row in model.base_model.history()]
    if cuts:
        first = dict.fromkeys(ranks, start), len(ranks) * start
        before = [(step, first[1], first[0]) for step in (0, max(0, cuts[0][0] - 1))]
        last = max([row["step"] for row in rows], default=cuts[-1][0])
        history = [*before, *cuts, (last, *cuts[-1][1:])]
        rank_trajectories(folder / "rank_trajectories.png", history, title)


register_method("adalora", AdaLoraOptions, build, "ranks shared out by sensitivity")
register_method(
    "vilora",
    ViLoraOptions,
    build_vilora,
    "ranks shared out by the optimiser's posterior",
    optimizer="ivon",
    needs_posterior=True,
)
