"""`LoraConfig`: PEFT's options for low-rank adaptation."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...config import PeftConfig

INITS = "True, False, 'gaussian', 'pissa' or 'pissa_niter_<k>'"
# Initialisations that only choose the starting A and B: a file's tensors replace those anyway.
FILE_ONLY_INITS = frozenset({"eva", "orthogonal"})
OTHER_INITS = frozenset({"loftq", "olora", "corda", "lora_ga", "mica", "kasa"})


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
            (both random), `"pissa"` (the top r singular triplets move from W into A and B) or
            `"pissa_niter_<k>"` (the same by randomised SVD).
        layers_to_transform: layer numbers to adapt.
        layers_pattern: name of the module list those numbers count in.
        rank_pattern: rank by module-name pattern, instead of `r`.
        alpha_pattern: α by module-name pattern, instead of `lora_alpha`.
        exclude_modules: names or a pattern of modules to leave alone.
        megatron_config, megatron_core, loftq_config, use_dora, layer_replication: PEFT options
            carried for its files and refused at any value that changes something.
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

    omit_at_default: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unsupported()
        self._check_ranks()
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

    def _check_ranks(self) -> None:
        for name, rank in [("r", self.r), *self.rank_pattern.items()]:
            where = "r" if name == "r" else f"rank_pattern[{name!r}]"
            if not isinstance(rank, int) or isinstance(rank, bool) or rank <= 0:
                raise ValueError(f"{where}={rank!r}: a rank is a positive whole number, such as 8")

    def _refuse_unsupported(self) -> None:
        for name, inert in (
            ("use_dora", False),
            ("loftq_config", {}),
            ("layer_replication", None),
            ("megatron_config", None),
        ):
            if getattr(self, name) and getattr(self, name) != inert:
                raise NotImplementedError(
                    f"{name}={getattr(self, name)!r} is not implemented; leave it at {inert!r}"
                )
        init = self.init_lora_weights
        if isinstance(init, bool) or init in ("gaussian", "pissa"):
            return
        if isinstance(init, str) and re.fullmatch(r"pissa_niter_\d+", init):
            return
        if init in OTHER_INITS | FILE_ONLY_INITS:
            raise NotImplementedError(f"init_lora_weights={init!r} is not implemented; use {INITS}")
        raise ValueError(f"init_lora_weights={init!r}: use {INITS}")

    @classmethod
    def loaded_values(cls, values: dict[str, Any]) -> dict[str, Any]:
        """From a file, an initialisation that only sets the starting point does not matter."""
        if values.get("init_lora_weights") in FILE_ONLY_INITS:
            values = {**values, "init_lora_weights": True}
        return values
