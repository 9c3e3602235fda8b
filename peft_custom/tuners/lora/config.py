"""`LoraConfig`: PEFT's options for low-rank adaptation."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...config import PeftConfig
from .base_starts import moves_base

INITS = "True, False, 'gaussian', 'pissa', 'pissa_niter_<k>', 'olora' or 'eva'"
# Initialisations that only choose the starting A and B: a file's tensors replace those anyway.
FILE_ONLY_INITS = frozenset({"eva", "orthogonal"})
OTHER_INITS = frozenset({"loftq", "orthogonal", "corda", "lora_ga", "mica", "kasa"})
RANK_SOURCES = ("activations", "gradients")


@dataclass
class LoraConfig(PeftConfig):
    """Options of a low-rank adapter, y = base(x) + s·B(A(dropout(x))).

    Attributes:
        r: rank of the increment.
        target_modules: names or dotted ends of the modules to adapt; a string is a regular
            expression for whole names, or `"all-linear"`; None takes the architecture's default.
        lora_alpha: α in s = α/r.
        lora_dropout: probability of dropping an input of A.
        fan_in_fan_out: the adapted weights are stored (in, out); found out by itself.
        bias: train no biases, `"all"`, or those of adapted layers (`"lora_only"`).
        use_rslora: s = α/√r.
        modules_to_save: modules trained in full beside the adapter; a task's head is added.
        init_lora_weights: True (A uniform, B = 0), `"gaussian"` (A ~ N(0, 1/r²), B = 0), False
            (both random), `"pissa"` (the top r singular triplets move from W into A and B),
            `"pissa_niter_<k>"` (the same by randomised SVD), `"olora"` (the same of W = QR), or
            `"eva"` (`rank_from="activations"`).
        layers_to_transform: layer numbers to adapt.
        layers_pattern: name of the module list those numbers count in.
        rank_pattern: rank by module-name pattern, instead of `r`.
        alpha_pattern: α by module-name pattern, instead of `lora_alpha`.
        exclude_modules: names or a pattern of modules to leave alone.
        use_dora: train the lengths of the rows of W + s·B A apart from their directions (DoRA).
        loraplus_lr_ratio: λ of LoRA+: in `parameter_groups`, B (as in the published code, also
            every trained vector) has λ times the learning rate.
        loraplus_lr_embedding: with it, the learning rate of factors of embeddings.
        rank_from: `"activations"` (EVA) or `"gradients"`: ranks of mean r and the start of A come
            from some batches, before the first step (`prepare` of the hooks; see `data_ranks.py`).
        rho: no rank is then above rho·r.
        rank_batches: optimiser steps' worth of batches that are looked at.
        megatron_config, megatron_core, loftq_config, layer_replication: PEFT options carried for
            its files and refused at any value that changes something.
    """

    peft_type: str | None = "LORA"
    r: int = 8
    target_modules: list[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    loftq_config: dict[str, Any] = field(default_factory=dict)
    use_dora: bool = False
    layer_replication: list[tuple[int, int]] | None = None
    exclude_modules: list[str] | str | None = None
    loraplus_lr_ratio: float | None = None
    loraplus_lr_embedding: float = 1e-6
    rank_from: str | None = None
    rho: float = 2.0
    rank_batches: int = 8

    omit_at_default: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})
    # how it is trained, not what it is; PEFT's files have none of it
    never_in_files: ClassVar[frozenset[str]] = frozenset(
        {"loraplus_lr_ratio", "loraplus_lr_embedding", "rank_from", "rho", "rank_batches"}
    )
    # options that are refused at any other value
    unsupported: ClassVar[dict[str, Any]] = {
        "loftq_config": {},
        "layer_replication": None,
        "megatron_config": None,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unsupported()
        self._check_ranks()
        self._check_training()
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(
                f"lora_dropout={self.lora_dropout!r}: a probability from 0 to below 1, such as 0.1"
            )
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"bias={self.bias!r}: use 'none', 'all' or 'lora_only'")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} goes with a list of target_modules; in a regular expression say "
                        "the layers there"
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where layers_to_transform counts; set that too")

    def _check_training(self) -> None:
        if self.init_lora_weights == "eva":
            self.init_lora_weights, self.rank_from = True, self.rank_from or "activations"
        if self.loraplus_lr_ratio is not None and not self.loraplus_lr_ratio > 0:
            raise ValueError(f"loraplus_lr_ratio={self.loraplus_lr_ratio!r}: above 0, such as 16")
        if self.use_dora and moves_base(self.init_lora_weights):
            raise NotImplementedError(
                f"use_dora with init_lora_weights={self.init_lora_weights!r} is not implemented: "
                "DoRA scales the base weight, which that start splits"
            )
        if self.rank_from is None:
            return
        if self.rank_from not in RANK_SOURCES:
            raise ValueError(f"rank_from={self.rank_from!r}: use 'activations' or 'gradients'")
        if not self.rho >= 1.0 or self.rank_batches < 1:
            raise ValueError(
                f"rho={self.rho!r}, rank_batches={self.rank_batches!r}: both are 1 or above"
            )
        if self.use_rslora or self.use_dora or self.init_lora_weights is not True:
            raise ValueError(
                f"rank_from={self.rank_from!r} sets ranks and start itself: no use_rslora, "
                "use_dora or init_lora_weights beside it"
            )

    def _check_ranks(self) -> None:
        for name, rank in [("r", self.r), *self.rank_pattern.items()]:
            where = "r" if name == "r" else f"rank_pattern[{name!r}]"
            if not isinstance(rank, int) or isinstance(rank, bool) or rank <= 0:
                raise ValueError(f"{where}={rank!r}: a rank is a positive whole number, such as 8")

    def _refuse_unsupported(self) -> None:
        for name, inert in self.unsupported.items():
            if getattr(self, name) and getattr(self, name) != inert:
                raise NotImplementedError(
                    f"{name}={getattr(self, name)!r} is not implemented; leave it at {inert!r}"
                )
        init = self.init_lora_weights
        if isinstance(init, bool) or init in ("gaussian", "pissa", "olora", "eva"):
            return
        if isinstance(init, str) and re.fullmatch(r"pissa_niter_\d+", init):
            return
        if init in OTHER_INITS:
            raise NotImplementedError(f"init_lora_weights={init!r} is not implemented; use {INITS}")
        raise ValueError(f"init_lora_weights={init!r}: use {INITS}")

    @classmethod
    def loaded_values(cls, values: dict[str, Any]) -> dict[str, Any]:
        """From a file, an initialisation that only sets the starting point does not matter."""
        if values.get("init_lora_weights") in FILE_ONLY_INITS:
            values = {**values, "init_lora_weights": True}
        return values
