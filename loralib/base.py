"""What all adapted layers share: factors, scaling, merging, and what a state dict holds."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import functional as lora
from .weight_cache import Kept, kept_weight

Shapes = tuple[tuple[int, int], tuple[int, int]]  # of A and of B


class LoRALayer(nn.Module):
    """What the layers share: the factors' bookkeeping, merging and the cache for evaluation.

    A subclass inherits from this class and then from torch's layer, calls `_init_lora` after the
    layer's own `__init__`, and defines `delta_weight`. r = 0 makes the plain layer.

    `train()` and `eval()` never change a stored weight. With `merge_weights=True` an evaluation
    without gradients uses a cached W + s·B A, so that it costs what the plain layer costs.
    `merge()` and `unmerge()` change the stored weight when asked to, and back to the last bit.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def _init_lora(
        self,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        merge_weights: bool,
        shapes: Shapes | None,
    ) -> None:
        """Creates A and B of these shapes (None: nothing is adapted) and freezes the weight."""
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.merge_weights = merge_weights
        self.adapted = r > 0 and shapes is not None
        self._original: Tensor | None = None  # the weight as it was before merge()
        self._cached: Kept | None = None  # W + s·B A
        if self.adapted:
            weight = self.weight
            # fp32 where the weight is narrower: an optimiser's small steps would be rounded away.
            dtype = torch.promote_types(weight.dtype, torch.float32)
            for name, shape in zip(("lora_A", "lora_B"), shapes, strict=True):
                factor = torch.empty(shape, dtype=dtype, device=weight.device)
                setattr(self, name, nn.Parameter(factor))
            self.scaling = lora_alpha / r
            weight.requires_grad = False
            self.reset_lora_parameters()

    def reset_parameters(self) -> None:
        """Draws weight and bias as the plain layer does, then the factors."""
        super().reset_parameters()
        self.reset_lora_parameters()

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """A ~ U(±1/√columns), which is Kaiming with a = √5; B = 0: the update starts at 0."""
        if self.__dict__.get("adapted"):  # not yet set while the plain layer's __init__ runs
            bound = 1.0 / math.sqrt(self.lora_A.shape[1])
            self.lora_A.uniform_(-bound, bound)
            self.lora_B.zero_()

    @property
    def dropout_now(self) -> float:
        """The dropout probability at present: 0 in eval mode."""
        return self.lora_dropout.p if self.lora_dropout.training else 0.0

    @property
    def merged(self) -> bool:
        """Whether the stored weight contains the update."""
        return self._original is not None

    def _acting(self) -> tuple[Tensor, Tensor]:
        """What of A and B acts outside training: all of it, unless a subclass says otherwise."""
        return self.lora_A, self.lora_B

    def delta_weight(self) -> Tensor:
        """s·B A in the stored weight's orientation and shape, fp32."""
        raise NotImplementedError

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + s·B A in at least fp32, a new tensor."""
        base = self.weight if self._original is None else self._original
        return self.delta_weight() + base  # promotes to the wider of the two types

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the update to the stored weight; a copy of the weight is kept for `unmerge`.

        A merged layer computes, and saves itself in state dicts, as the plain layer it now equals.
        """
        if not self.adapted or self.merged:
            return
        exact, original = self.merged_weight(), self.weight.detach().clone()
        rounded = exact.to(original.dtype)
        if rounded.dtype != exact.dtype:
            update = exact - original.to(exact.dtype)
            lost = (rounded.to(exact.dtype) - exact).norm() / update.norm().clamp_min(1e-30)
            warnings.warn(
                f"merging into a {original.dtype} weight loses {lost:.0%} of the update to "
                "rounding; merge into a float32 copy of the model to keep it",
                stacklevel=2,
            )
        self.weight.copy_(rounded)
        self._original = original

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the weight back as it was before `merge`, to the last bit."""
        if self._original is not None:
            self.weight.copy_(self._original)
            self._original = None

    def _is_plain(self) -> bool:
        """Whether the stored weight alone is the layer."""
        if self.merged and self.training and torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(self).__name__} is merged, so its lora_A and lora_B would get no gradient; "
                "call unmerge() before training"
            )
        return self.merged or not self.adapted

    def _evaluation_weight(self, x: Tensor) -> Tensor | None:
        """The cached W + s·B A where it may stand in for the two thin products, else None.

        Only for evaluation without gradients, and in fp32: rounding W + ΔW to bf16 would lose part
        of the update. A pass that records gradients drops the copy (see `weight_cache`).
        """
        if torch.is_grad_enabled():
            if self._cached is not None:
                self._cached = None
            return None
        if self.training or not self.merge_weights:
            return None
        weight = self.weight
        if weight.dtype not in (torch.float32, torch.float64):
            return None
        if x.is_floating_point() and lora.compute_dtype(x, weight) != weight.dtype:
            return None
        self._cached = kept_weight(
            self._cached, (weight, self.lora_A, self.lora_B), self.scaling,
            lambda: self.merged_weight().to(weight.dtype),
        )  # fmt: skip
        return None if self._cached is None else self._cached[1]

    def train(self, mode: bool = True) -> LoRALayer:
        """Sets the mode; the stored weight stays as it is."""
        self._cached = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALayer:
        self._cached = None
        module = super()._apply(fn, recurse)
        if self._original is not None:
            self._original = fn(self._original)
        return module

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            for name in ("lora_A", "lora_B"):  # the weight has them; a load must not add them again
                destination.pop(prefix + name, None)

    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self._cached = None
        if self.merged:
            error_msgs.append(f"{prefix or 'this layer'}: merged; call unmerge() before loading.")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}  # copies and pickles make their own

    def extra_repr(self) -> str:
        if not self.adapted:
            return super().extra_repr()
        merged = ", merged" if self.merged else ""
        return f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}{merged}"


def checked_rank(layer: str, r: int) -> int:
    """r as an int of at least 0, or an error that names the layer's argument."""
    try:
        rank = -1 if isinstance(r, bool) else operator.index(r)
    except TypeError:
        rank = -1
    if rank < 0:
        raise ValueError(
            f"{layer}(r={r!r}): r must be an integer of at least 0, where 0 means the plain layer"
        )
    return rank
