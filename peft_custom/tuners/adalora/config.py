"""`AdaLoraConfig` and `VILoraConfig`: PEFT 0.11's options for adaptive ranks, and a few of ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..lora import LoraConfig
from .criteria import CRITERIA


@dataclass
class AdaLoraConfig(LoraConfig):
    """Options of AdaLoRA, y = base(x) + s·B diag(E) A dropout(x) with a shared rank budget.

    s = α/(init_r + 10⁻⁵) whatever becomes of the rank, α = `lora_alpha` (init_r where it is 0). The
    budget falls from n·init_r to n·target_r, n the number of adapted matrices, along a cubic from
    step tinit to step T − tfinal; ranks are cut at every deltaT-th step and stay for the last
    tfinal steps. Lengths of the schedule are steps (ints) or fractions of training (floats).

    Attributes:
        target_r: mean rank at the end.
        init_r: rank of every matrix at the start.
        tinit: steps before the budget falls.
        tfinal: steps after the last cut.
        deltaT: steps between cuts.
        beta1, beta2: of the moving averages of the sensitivity and of its variation.
        orth_reg_weight: γ of the orthogonality regulariser; 0 turns it off.
        total_step: T, where `attach` is not given the number of steps.
        rank_pattern: components that a file's tensors hold, `"<module>.lora_E"` → bool per rank.
        init_lora_weights: True: A, B ~ N(0, 0.02²) and E = 0, so that training starts from the base
            model (the paper, and PEFT from 0.12); `"gaussian"`: E ~ N(0, 0.02²) as well, as PEFT
            0.11 and the ViLoRA fork do; False: all three from N(0, 1).
        criterion: what ranks the components; `peft_custom.CRITERIA` lists them.
        sensitivity_timing: `"before"` takes |w·∂L/∂w| at the weights the gradient belongs to (the
            paper), `"after"` at the updated weights (PEFT).
        rescore_at_end: the last cut goes by scores of its own step; False: by those of the step
            before (PEFT), or for posterior criteria of the last cut (the ViLoRA fork).
        train_pooler: a module called `pooler` that `target_modules` reaches without naming it is
            trained in full and saved with the head. Adapted instead (False, as PEFT does), it would
            keep a random weight that no file holds where the checkpoint has none (DeBERTa-v3).
        finished: the ranks are final (in files; kept by the library).
    """

    peft_type: str | None = "ADALORA"
    rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]
    target_r: int = 8
    init_r: int = 12
    tinit: int | float = 0
    tfinal: int | float = 0
    deltaT: int | float = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    criterion: str = "sensitivity"
    sensitivity_timing: str = "before"
    rescore_at_end: bool = True
    train_pooler: bool = True
    finished: bool = True

    unsupported: ClassVar[dict[str, Any]] = LoraConfig.unsupported | {
        "use_dora": False,
        "rank_from": None,
        "loraplus_lr_ratio": None,
    }
    omit_at_default: ClassVar[frozenset[str]] = LoraConfig.omit_at_default | {
        "criterion", "sensitivity_timing", "rescore_at_end", "train_pooler", "finished",
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta1", "beta2"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)!r}: between 0 and 1, such as 0.85")
        if not self.orth_reg_weight >= 0.0:
            raise ValueError(f"orth_reg_weight={self.orth_reg_weight!r}: 0 (off) or above")
        if self.criterion not in CRITERIA:
            raise ValueError(f"criterion={self.criterion!r}: use one of {', '.join(CRITERIA)}")
        if self.sensitivity_timing not in ("before", "after"):
            raise ValueError(
                f"sensitivity_timing={self.sensitivity_timing!r}: 'before' the update, as in the "
                "paper, or 'after' it, as in PEFT"
            )
        if self.use_rslora or self.alpha_pattern:
            raise NotImplementedError(
                "AdaLoRA has one scale, α/init_r: no use_rslora or alpha_pattern"
            )
        for name in ("tinit", "tfinal", "deltaT"):
            if not getattr(self, name) >= 0 or (name == "deltaT" and self.deltaT == 0):
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: steps (100) or a fraction of training (0.1)"
                )
        if self.total_step is not None:
            self._check_total()

    def _check_ranks(self) -> None:
        for name in ("init_r", "target_r"):
            rank = getattr(self, name)
            if not isinstance(rank, int) or isinstance(rank, bool) or rank <= 0:
                raise ValueError(f"{name}={rank!r}: a rank is a positive whole number, such as 8")
        if self.target_r > self.init_r:
            raise ValueError(
                f"target_r={self.target_r} is above init_r={self.init_r}: ranks are only cut"
            )
        if self.rank_pattern is None:
            return
        self.rank_pattern = {
            f"{name.split('.lora_E')[0]}.lora_E": list(kept)
            for name, kept in self.rank_pattern.items()
        }
        for name, kept in self.rank_pattern.items():
            if len(kept) != self.init_r or not all(isinstance(k, bool) for k in kept):
                raise ValueError(
                    f"rank_pattern[{name!r}]={kept!r}: init_r={self.init_r} booleans are needed"
                )

    def _refuse_unsupported(self) -> None:
        super()._refuse_unsupported()
        if isinstance(self.init_lora_weights, str) and self.init_lora_weights != "gaussian":
            raise NotImplementedError(
                f"init_lora_weights={self.init_lora_weights!r} is not one of AdaLoRA's: True, "
                "'gaussian' or False"
            )

    def _check_total(self) -> None:
        whole = isinstance(self.total_step, int) and not isinstance(self.total_step, bool)
        if not whole or self.total_step <= 0:
            raise ValueError(
                f"total_step={self.total_step!r}: the number of optimiser steps of the training, "
                "or None where attach is given it"
            )
        lengths = [
            length * self.total_step if isinstance(length, float) else length
            for length in (self.tinit, self.tfinal)
        ]
        if sum(lengths) >= self.total_step:
            raise ValueError(
                f"tinit={self.tinit} and tfinal={self.tfinal} leave none of total_step="
                f"{self.total_step} steps for cutting ranks; make one of them smaller"
            )

    @classmethod
    def loaded_values(cls, values: dict[str, Any]) -> dict[str, Any]:
        """What only training cares about must not keep a file of PEFT's from being read.

        PEFT checks neither the ranks nor the schedule, and trains without cutting where they make
        no sense. `modules_to_save` says what became of the pooler.
        """
        values = {"train_pooler": False, **super().loaded_values(values)}
        values["rank_pattern"] = values.get("rank_pattern") or None
        init_r = values.get("init_r", cls.init_r)
        values["target_r"] = min(values.get("target_r", cls.target_r), init_r)
        values["deltaT"] = values.get("deltaT") or cls.deltaT
        lengths = [values.get(name) or 0 for name in ("tinit", "tfinal")]
        if not sum(lengths) < (values.get("total_step") or 0):
            values["total_step"] = None
        return values

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, `train_pooler` resolved into `modules_to_save` by then."""
        return {key: value for key, value in super().to_dict().items() if key != "train_pooler"}


@dataclass
class VILoraConfig(AdaLoraConfig):
    """AdaLoRA whose criterion is the posterior of a variational optimiser (IVON).

    Files of this type are the ViLoRA fork's; `save_pretrained(folder, format="adalora")` writes one
    that PEFT reads.
    """

    peft_type: str | None = "VILORA"
    criterion: str = "SNR_mean_abs"

    omit_at_default: ClassVar[frozenset[str]] = AdaLoraConfig.omit_at_default - {"criterion"}
