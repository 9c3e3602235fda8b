"""`BimLoraConfig`: options of the block-masked low-rank adapter, and of what happens around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

from ...config import PeftConfig

MASK_INITS = ("mlp", "features", "random", "constant")
SCHEDULES = ("table", "exponential", "constant")
COLLECT_UPDATES = ("none", "adapter+head")
FEATURES = 6
ValueT = TypeVar("ValueT")

# (start, τ): the original's epochs 0, 6, 12, 20, 26 of a run of 30, as fractions.
TEMPERATURE_TABLE = [[0.0, 1.4], [0.2, 1.0], [0.4, 0.8], [0.67, 0.6], [0.87, 0.45]]


@dataclass
class BimLoraConfig(PeftConfig):
    """y = base(x) + s·drop(x) (E(σ(Z/τ)) ∘ B A)ᵀ: LoRA whose increment is gated block by block.

    Before training, six features of every b × b block of every adapted weight are collected, a
    small network learns to predict a heuristic importance from them, and its scores become the mask
    logits Z, which then train together with A and B while the temperature τ falls.

    Attributes:
        r: rank of B A. The masked increment's rank is up to r·min(p, q).
        target_modules: as for `LoraConfig`; by default every linear map of the body.
        lora_alpha: α in s = α/r.
        lora_dropout: probability of dropping an input of the increment.
        fan_in_fan_out: the adapted weights are stored (in, out); found out by itself.
        bias: train no biases, `"all"`, or those of adapted layers (`"lora_only"`).
        modules_to_save: modules trained in full beside the adapter; a task's head is added.
        layers_to_transform, layers_pattern, exclude_modules: as for `LoraConfig`.
        block_size: b. Edge blocks are cut off where the matrix ends.
        enable_masking: False is plain LoRA.
        mask_init: where Z starts: `"mlp"` (the network's scores), `"features"` (the heuristic it
            learns, directly), `"random"` (scores of the same distribution, drawn), or `"constant"`
            (`initial_block_score` everywhere; needs no data).
        train_mask: False keeps Z as initialised.
        initial_block_score: Z/τ₀ for `"constant"`, and of every block before `prepare`.
        collection_steps: gradients from which the features come: a number, or a fraction of the
            run's steps; None is 5 % of them, at most 300.
        collection_accumulation: optimiser steps that make one gradient; |∇W| and (∇W)² are taken
            of it. A step is a batch, or all its `MicroBatch`es.
        collect_update: `"none"`, or `"adapter+head"`: A, B and the head are trained meanwhile, with
            AdamW at `collection_lr`. The base never moves.
        collection_lr: that rate.
        collect_pads: count padding tokens in the inputs' variance.
        mlp_hidden_dim, mlp_dropout, mlp_lr, mlp_epochs, mlp_batch_size, mlp_val_split,
            mlp_early_stop_patience: the network and its training.
        feature_weights: of gradient mean, gradient variance, input variance and weight norm.
        mask_temperature: τ₀ of the schedules `"exponential"` and `"constant"`.
        temperature_schedule: `"table"`, `"exponential"` (τ₀·ρ^⌊t/k⌋, at least τ_min) or
            `"constant"`.
        temperature_table: (start, τ) rows: a float starts at that fraction of training, a whole
            number at that step.
        temperature_decay_rate, temperature_decay_steps, min_temperature: ρ, k and τ_min.
        score_lr_ratio, head_lr_ratio: rates of Z and of the head, as multiples of the adapter's.
        betas: of AdamW, for all three.
        score_max_grad_norm, head_max_grad_norm: norms to which those gradients are clipped by
            themselves; 0 leaves them alone.
        hard_mask_threshold: in evaluation use m > threshold instead of m; None keeps m.
        num_train_epochs: needed by `reference_compat`, whose temperatures fall by epoch.
        reference_compat: the method to the letter of its first publication: features on global
            maxima, absolute floors, a LayerNorm on the network's inputs, 50 more batches for the
            layers' importance, logits that meet the mask at τ = 1 only. The base stays fixed.
        features_file: features are read from this safetensors file where it exists, and
            written to it where it does not. It is not saved with the adapter.
        finished: the mask has been initialised.
    """

    peft_type: str | None = "BIM_LORA"
    r: int = 16
    target_modules: list[str] | str | None = "all-linear"
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    block_size: int = 16
    enable_masking: bool = True
    mask_init: str = "mlp"
    train_mask: bool = True
    initial_block_score: float = 0.5
    collection_steps: int | float | None = None
    collection_accumulation: int = 1
    collect_update: str = "none"
    collection_lr: float = 2e-4
    collect_pads: bool = False
    mlp_hidden_dim: int = 64
    mlp_dropout: float = 0.1
    mlp_lr: float = 2e-3
    mlp_epochs: int = 6
    mlp_batch_size: int = 8192
    mlp_val_split: float = 0.1
    mlp_early_stop_patience: int = 10
    feature_weights: list[float] = field(default_factory=lambda: [0.60, 0.20, 0.15, 0.05])
    mask_temperature: float = 1.0
    temperature_schedule: str = "table"
    temperature_table: list[list[float]] = field(
        default_factory=lambda: [list(row) for row in TEMPERATURE_TABLE]
    )
    temperature_decay_rate: float = 0.95
    temperature_decay_steps: int = 100
    min_temperature: float = 0.1
    score_lr_ratio: float = 1.0
    head_lr_ratio: float = 3.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    score_max_grad_norm: float = 5.0
    head_max_grad_norm: float = 0.0
    hard_mask_threshold: float | None = None
    num_train_epochs: float | None = None
    reference_compat: bool = False
    features_file: str | None = None
    finished: bool = True

    omit_at_default: ClassVar[frozenset[str]] = frozenset({"finished"})
    never_in_files: ClassVar[frozenset[str]] = frozenset({"features_file"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r", "block_size", "collection_accumulation", "mlp_hidden_dim", "mlp_epochs",
                     "mlp_batch_size", "mlp_early_stop_patience",
                     "temperature_decay_steps"):  # fmt: skip
            _check(name, getattr(self, name), _whole, "a positive whole number, such as 16")
        for name in ("lora_alpha", "mask_temperature", "min_temperature", "mlp_lr",
                     "collection_lr", "score_lr_ratio", "head_lr_ratio"):  # fmt: skip
            _check(name, getattr(self, name), _positive, "a positive number, such as 1.0")
        for name in ("lora_dropout", "mlp_dropout", "mlp_val_split"):
            _check(name, getattr(self, name), lambda v: 0.0 <= v < 1.0, "from 0 to below 1")
        for name, choices in (
            ("mask_init", MASK_INITS),
            ("temperature_schedule", SCHEDULES),
            ("collect_update", COLLECT_UPDATES),
            ("bias", ("none", "all", "lora_only")),
        ):
            hint = f"one of {', '.join(choices)}"
            _check(name, getattr(self, name), lambda v, c=choices: v in c, hint)
        _check("temperature_decay_rate", self.temperature_decay_rate, lambda v: 0 < v <= 1,
               "above 0 and at most 1, such as 0.95")  # fmt: skip
        if self.hard_mask_threshold is not None:
            _check("hard_mask_threshold", self.hard_mask_threshold, lambda v: 0.0 <= v < 1.0,
                   "from 0 to below 1, such as 0.5, or None")  # fmt: skip
        _check("feature_weights", self.feature_weights,
               lambda v: len(v) == 4 and all(w >= 0 for w in v) and sum(v) > 0,
               "four weights of at least 0, such as [0.6, 0.2, 0.15, 0.05]")  # fmt: skip
        self._check_table()

    def _check_table(self) -> None:
        rows = [tuple(row) for row in self.temperature_table]
        good = bool(rows) and all(len(row) == 2 and _positive(row[1]) for row in rows)
        if not good or rows[0][0] != 0:
            raise ValueError(
                f"temperature_table={self.temperature_table!r}: rows (start, τ), the first with "
                "start 0, such as [[0.0, 1.4], [0.5, 0.6]]"
            )
        # JSON keeps the difference between 0.2 (a fraction) and 2 (a step); 0 is both.
        self.temperature_table = [list(row) for row in rows]

    @property
    def looks_at_data(self) -> bool:
        """Whether the first mask depends on data."""
        return self.enable_masking and self.mask_init in ("mlp", "features")

    @classmethod
    def from_reference(cls, config: object, **overrides: object) -> BimLoraConfig:
        """From an object with the original's field names (`lora_r`, …), or a `BimLoraConfig`.

        Args:
            config: fields it lacks keep their defaults here; fields unknown here are left out.
            overrides: by this class's names; None keeps the configuration's value.
        """
        known = cls.__dataclass_fields__
        renamed = {"lora_r": "r"}
        values = {
            renamed.get(name, name): value
            for name, value in vars(config).items()
            if renamed.get(name, name) in known and value is not None
        }
        values.pop("peft_type", None)
        return cls(**{**values, **{k: v for k, v in overrides.items() if v is not None}})


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0


def _check(name: str, value: ValueT, good: Callable[[ValueT], bool], hint: str) -> None:
    """Raises, naming the option, its value and values that would do."""
    if not good(value):
        raise ValueError(f"{name}={value!r}: {hint}")
