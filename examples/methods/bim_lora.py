"""BIM-LoRA: increments gated block by block, by a mask that starts from features of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.cli.fields import option
from examples.methods.registry import AdaptedModel, register_method
from examples.training.file_names import MASK_SHARES

if TYPE_CHECKING:
    from examples.methods.source import ModelSource
    from peft_custom import PeftModel

# Options that are fields of `BimLoraConfig` under the same name.
SAME = (
    "block_size", "mask_init", "initial_block_score", "train_mask", "mlp_epochs", "mlp_lr",
    "mlp_dropout", "mask_temperature", "temperature_schedule", "temperature_decay_rate",
    "temperature_decay_steps", "min_temperature", "score_lr_ratio", "head_lr_ratio",
)  # fmt: skip
MASK = ("block_scores", "temperature")  # a plain LoRA adapter to start from has none of these


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
        0, "optimiser steps for the features: 300, or 0.05 of the run; 0: 0.05, at most 300", low=0
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


def build(source: ModelSource, options: BimLoraOptions) -> AdaptedModel:
    """Block-masked increments, started from `options.lora_path` where given."""
    from examples.methods.common import with_peft
    from examples.methods.start import FIXED_RANK, start_from
    from peft_custom import BimLoraConfig

    threshold = options.hard_mask_threshold
    adapted = with_peft(
        source,
        options,
        BimLoraConfig,
        r=options.lora_r,
        collection_steps=options.collection_steps or None,
        features_file=options.features_path,
        hard_mask_threshold=threshold if threshold >= 0 else None,
        **{name: getattr(options, name) for name in SAME},
    )
    agree = {**FIXED_RANK, "block_size": "block_size"}
    report = start_from(adapted.model, options, source.print_once, agree, optional=MASK)
    if report is not None and not report.missing_keys:  # with a mask: none is made from features
        adapted.model.base_model.initialised.add("default")
    adapted.model.base_model.records.read.update(source.read)
    adapted.summarize = lambda metrics, main, title, folder: _record(adapted.model, folder)
    adapted.plot = lambda folder, title, rows: _plot(adapted.model, folder, title)
    return adapted


def _record(model: PeftModel, folder: Path | None) -> dict[str, Any]:
    """The final masks' means in a file; the log has their figures."""
    from examples.methods.common import write_mask_shares
    from peft_custom.tuners.bim_lora import MaskAllocator

    write_mask_shares(folder, MaskAllocator(model).masks())
    return {}


def _plot(model: PeftModel, folder: Path, title: str) -> None:
    """Masks, their histogram over training, and the features they started from."""
    from examples.plots.block_masks import block_masks, feature_maps, mask_history
    from peft_custom.tuners.bim_lora import MaskAllocator

    block_masks(folder / "block_masks.png", MaskAllocator(model).masks(), title)
    tuner = model.base_model
    for history in tuner.mask_history.values():
        mask_history(folder / "mask_history.png", history, title)
    for features in tuner.features.values():
        feature_maps(folder / "block_features.png", features, title)


register_method(
    "bim_lora", BimLoraOptions, build, "increments gated block by block", files=(MASK_SHARES,)
)
