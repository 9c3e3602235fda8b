"""`DyLoraConfig`: `LoraConfig`'s options and those of the nested ranks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from ..lora.base_starts import moves_base
from ..lora.config import LoraConfig
from .sampling import RankSampling


@dataclass
class DyLoraConfig(LoraConfig):
    """Options of a nested adapter, y = base(x) + (α/b)·B[:, :b] A[:b] dropout(x), 1 ≤ b ≤ r.

    `r` is R, the largest rank; the other fields of `LoraConfig` mean the same as there. The scale
    at rank b is α/b, so `use_rslora`, one rank for all layers, so `rank_pattern`, and no component
    may be in the base weight, so PiSSA are refused.

    Attributes:
        r_min: smallest rank that training samples.
        dylora_mode: `"normal"`: rank b trains components 1 … b; `"frozen"`: only the b-th;
            `"matryoshka"`: no rank is drawn, every step trains Σ_b (α/b)·B[:, :b] A[:b] over
            b = r_min … r, and rank b is the first b components of that.
        dylora_dist: of the rank drawn: `"uniform"`, or `"geometric(p)"` over r_min … r.
        dylora_dense: let the optimiser move what a step does not train (by momentum and weight
            decay), as the published code does; off, such rows stay as they are to the last bit.
        train_ranks: `"matryoshka"`: the ranks b of that sum, such as 1, 2, 4, …, r, which its
            authors use; None: all from r_min on.
        finished: optimiser hooks sampled the ranks; False marks an adapter trained without them.
    """

    peft_type: str | None = "DYLORA"
    r_min: int = 1
    dylora_mode: str = "normal"
    dylora_dist: str = "uniform"
    dylora_dense: bool = False
    train_ranks: list[int] | None = None
    finished: bool = True

    unsupported: ClassVar[dict[str, Any]] = LoraConfig.unsupported | {
        "use_dora": False,
        "rank_from": None,
    }
    omit_at_default: ClassVar[frozenset[str]] = LoraConfig.omit_at_default | {
        "finished",
        "train_ranks",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("use_rslora", "rank_pattern"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: a DyLoRA adapter has one rank for all layers "
                    "and the scale lora_alpha / rank; leave it out"
                )
        if moves_base(self.init_lora_weights):
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r}: PiSSA and OLoRA move a part of the "
                "weight into the adapter, where a lower rank would lack it; use True, False or "
                "'gaussian'"
            )
        self.sampling  # noqa: B018  checks its options

    @property
    def sampling(self) -> RankSampling:
        """How training samples ranks."""
        return RankSampling(
            self.r,
            self.r_min,
            self.dylora_mode,
            self.dylora_dist,
            self.dylora_dense,
            self.train_ranks,
        )

    def at_rank(self, rank: int) -> LoraConfig:
        """The plain adapter of this rank: the same α, so the scale is α/rank."""
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(LoraConfig)}
        return LoraConfig(**{**shared, "peft_type": "LORA", "r": rank})
