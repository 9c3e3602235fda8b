"""Builds models whose ranks are shared out while they train: AdaLoRA and ViLoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from examples.methods.common import (
    Adapted,
    ModelSource,
    adapter_folder,
    continue_from,
    random_parts,
)
from examples.methods.registry import AdaLoraOptions, ViLoraOptions
from examples.training.run_folder import METRICS, RunFolder
from peft_custom import AdaLoraConfig, PeftConfig, PeftModel, VILoraConfig, get_peft_model
from transformers_patched import CheckpointError


def adalora(source: ModelSource, options: AdaLoraOptions) -> Adapted:
    """Ranks by sensitivity, whatever the optimiser."""
    return _adapted(source, options, AdaLoraConfig)


def vilora(source: ModelSource, options: ViLoraOptions) -> Adapted:
    """Ranks by the optimiser's posterior."""
    return _adapted(source, options, VILoraConfig, criterion=options.vilora_criterion)


def _adapted(
    source: ModelSource, options: AdaLoraOptions, config: type[AdaLoraConfig], **more: Any
) -> Adapted:
    base = source.load(frozen=True)
    modules, alpha = list(options.lora_modules), options.lora_alpha
    starts = {"true": True, "false": False}
    made = config(
        task_type=source.task_type,
        target_r=options.adalora_target_r,
        init_r=options.adalora_init_r,
        tinit=options.adalora_tinit,
        tfinal=options.adalora_tfinal,
        deltaT=options.adalora_delta_t,
        orth_reg_weight=options.adalora_orth_reg_weight,
        sensitivity_timing=options.adalora_sensitivity_timing,
        init_lora_weights=starts.get(options.init_lora_weights, options.init_lora_weights),
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        lora_dropout=options.lora_dropout,
        target_modules="all-linear" if modules == ["all-linear"] else modules or None,
        modules_to_save=random_parts(base) or None,
        rank_pattern=_saved_ranks(options),
        **more,
    )
    model = get_peft_model(base, made)
    if options.lora_path is not None:
        same = {"init_r": ("adalora_init_r", options.adalora_init_r)}
        same |= {"lora_alpha": ("lora_alpha", alpha)}
        said = continue_from(model, Path(options.lora_path).expanduser(), same)
        if said and source.speak:
            print(said)

    def pictures(folder: RunFolder, title: str) -> None:
        _draw(model, folder, title)

    return Adapted(model, model.save_pretrained, pictures=pictures)


def _saved_ranks(options: AdaLoraOptions) -> dict[str, list[bool]] | None:
    """Which components the adapter has that a run starts from."""
    if options.lora_path is None:
        return None
    folder = adapter_folder(Path(options.lora_path).expanduser())
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


def _draw(model: PeftModel, folder: RunFolder, title: str) -> None:
    """Final ranks, and how they came about."""
    from examples.plots.ranks import RANKS, TRAJECTORY, rank_heatmap, rank_trajectories

    pattern = model.base_model.rank_pattern()
    ranks = {name.removesuffix(".lora_E"): sum(kept) for name, kept in pattern.items()}
    start = len(next(iter(pattern.values())))
    rank_heatmap(folder.path / RANKS, ranks, start, title)
    cuts = [(row["step"], row["budget"], row["ranks"]) for row in model.base_model.history()]
    if cuts:
        first = dict.fromkeys(ranks, start), len(ranks) * start
        before = [(step, first[1], first[0]) for step in (0, max(0, cuts[0][0] - 1))]
        last = max([row["step"] for row in folder.read_lines(METRICS)], default=cuts[-1][0])
        history = [*before, *cuts, (last, *cuts[-1][1:])]
        rank_trajectories(folder.path / TRAJECTORY, history, title)
