"""Options of the structured pruning adapters and of block fine-pruning."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ...config import PeftConfig

METHODS = ("topK", "magnitude", "threshold", "sigmoied_threshold", "l0")
STRUCTURES = ("blocks", "linked", "hybrid")
# What `None` stands for, by pruning method: where the threshold starts and ends, the first scores
# and their learning rate.
START = {"threshold": 0.0, "sigmoied_threshold": 0.0}
END = {"threshold": 0.1, "sigmoied_threshold": 0.1, "l0": 1.0}
SCALE = {"l0": 2.197}  # a gate that is open 98 %
RATE = {"l0": 1e-1}


@dataclass
class SpaConfig(PeftConfig):
    """What the pruning methods share: Ŵ = E(M) ∘ W', M a mask over blocks, heads or units.

    W' is the adapted weight, E spreads a mask over the entries. The mask follows from scores S
    (`mask_scores`) or from |W'|, anew after every optimiser step, by a threshold τ:

    | `pruning_method` | M |
    |---|---|
    | `topK` | the ⌊τN⌋ largest of the N scores of a matrix (movement pruning) |
    | `magnitude` | the same of the mean of abs(W') |
    | `threshold` | S > τ |
    | `sigmoied_threshold` | σ(S) > τ (soft movement pruning; also spelled `sigmoid_threshold`) |
    | `l0` | gates in [0, 1] (Louizos et al. 2018), random in training |

    τ moves from `initial_threshold` to `final_threshold` along a cubic (Sanh et al. 2020), flat for
    `initial_warmup` times w in the beginning and `final_warmup` times w at the end.

    Attributes:
        target_modules: as for `LoraConfig`; by default the matrices of attention and feed-forward.
        exclude_modules, layers_to_transform, layers_pattern: as for `LoraConfig`.
        modules_to_save: modules trained in full beside the adapter; a task's head is added.
        train_bias: the adapted layers' biases train, each adapter its own.
        train_norms: so do the normalisation layers that stand among the adapted modules.
        train_pooler: so does the module called `pooler`.
        mask_structure: `"blocks"` of the matrix; `"linked"`: whole heads and feed-forward units,
            one score each for all the matrices they are in; `"hybrid"`: blocks in attention, units
            in the feed-forward part. A layer without known partners is linked with nothing: its
            units are its output channels.
        mask_block_rows, mask_block_cols: sizes p and q of a block, which must divide the matrices'.
        pruning_method: see the table.
        global_topk: `topK`, `magnitude` and `threshold`: one ranking for all matrices together.
        initial_threshold, final_threshold: of τ. None: 1 to 0.7, for thresholds 0 to 0.1, for `l0`
            1. Without an optimiser attached, and in evaluation, τ is the final one.
        warmup_steps: w, in steps or as a fraction of training.
        initial_warmup, final_warmup: multiples of w.
        initial_temperature, final_temperature: β of the gates of `l0`, along the same cubic.
        mask_init, mask_scale: where scores start: `"constant"`, `"uniform"` in ±scale, or
            `"kaiming"`. None: 0, for `l0` 2.197.
        regularization: None, `"l1"` (the mean of σ(S)) or `"l0"` (the probability of an open gate).
        final_lambda: its weight λ at the end; before, λ·τ/τ_final.
        clip_regularization: its gradient is clipped with those of the loss, as in the originals,
            where a large λ makes all other steps smaller; by default it is added afterwards, and
            scores are not clipped. Only in loops that call `hooks.before_clipping()` before they
            clip, as our trainer does.
        mask_scores_learning_rate: None: 0.01, for `l0` 0.1.
        mask_scores_max_grad_norm: norm to which the scores' gradient is clipped by itself; 0: not.
        adapter_learning_rate: of what an adapter adds to the weights; None: the common rate.
        reference_compat: keep int(τN), which truncates 0.29·100 to 28 and may be 0.
        finished: τ has arrived at its end (in files; kept by the library).
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    train_bias: bool = True
    train_norms: bool = True
    train_pooler: bool = True
    mask_structure: str = "blocks"
    mask_block_rows: int = 32
    mask_block_cols: int = 32
    pruning_method: str = "topK"
    global_topk: bool = False
    initial_threshold: float | None = None
    final_threshold: float | None = None
    warmup_steps: int | float = 0.1
    initial_warmup: float = 1.0
    final_warmup: float = 2.0
    initial_temperature: float = 2.0 / 3.0
    final_temperature: float = 2.0 / 3.0
    mask_init: str = "constant"
    mask_scale: float | None = None
    regularization: str | None = None
    final_lambda: float = 0.0
    clip_regularization: bool = False
    mask_scores_learning_rate: float | None = None
    mask_scores_max_grad_norm: float = 0.0
    adapter_learning_rate: float | None = None
    reference_compat: bool = False
    finished: bool = True

    omit_at_default: ClassVar[frozenset[str]] = frozenset({"finished"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pruning_method == "sigmoid_threshold":
            self.pruning_method = "sigmoied_threshold"
        if self.regularization == "null":  # as the originals' scripts write it
            self.regularization = None
        for name, choices in (
            ("pruning_method", METHODS),
            ("mask_structure", STRUCTURES),
            ("mask_init", ("constant", "uniform", "kaiming")),
            ("regularization", (None, "l0", "l1")),
        ):
            self._check(name, choices.__contains__, f"use one of {', '.join(map(str, choices))}")
        for name, values, otherwise in (
            ("initial_threshold", START, 1.0),
            ("final_threshold", END, 0.7),
            ("mask_scale", SCALE, 0.0),
            ("mask_scores_learning_rate", RATE, 1e-2),
        ):
            if getattr(self, name) is None:
                setattr(self, name, values.get(self.pruning_method, otherwise))
        for name in ("mask_block_rows", "mask_block_cols"):
            self._check(name, _whole, "a positive whole number, such as 32")
        for name in ("initial_warmup", "final_warmup", "final_lambda", "mask_scores_max_grad_norm"):
            self._check(name, _at_least_0, "0 or above")
        for name in ("initial_temperature", "final_temperature"):
            self._check(name, lambda v: _at_least_0(v) and v > 0, "above 0, such as 0.67")
        self._check_thresholds()

    def _check_thresholds(self) -> None:
        if self.pruning_method != "threshold":  # which cuts scores of any size
            for name in ("initial_threshold", "final_threshold"):
                self._check(name, lambda v: 0.0 <= v <= 1.0, "from 0 to 1, such as 0.5")
        if self.global_topk and self.pruning_method not in ("topK", "magnitude", "threshold"):
            raise ValueError(
                f"global_topk ranks scores; pruning_method={self.pruning_method!r} has a cut of "
                "its own: use 'topK' or 'magnitude'"
            )
        if self.global_topk and self.pruning_method == "threshold":
            self.pruning_method = "topK"  # the originals' words for one and the same thing

    def _check(self, name: str, good: Callable[[Any], bool], hint: str) -> None:
        """Raises, naming the option, its value and values that would do."""
        if not good(getattr(self, name)):
            raise ValueError(f"{name}={getattr(self, name)!r}: {hint}")

    @property
    def ranks(self) -> bool:
        """Whether τ is the share of scores to keep."""
        return self.pruning_method in ("topK", "magnitude")

    @property
    def trains_scores(self) -> bool:
        """Whether masks follow from scores."""
        return self.pruning_method != "magnitude"


@dataclass
class BlockPruneConfig(SpaConfig):
    """Fine-pruning: the weights themselves train under the mask (Lagunas et al. 2021).

    The adapter holds W' in full; the base keeps its own weights.
    """

    peft_type: str | None = "BLOCK_PRUNE"


@dataclass
class SplopaConfig(SpaConfig):
    """W' = W + Σ_k B_k ⊗ (C_k R_k): every block's update is a mixture of K low-rank prototypes.

    Attributes:
        num_prototypes: K.
        prototype_rank: r of C_k (p, r) and R_k (r, q).
        share_prototypes: all layers of the model have the same prototypes.
        share_position_weights: layers whose matrices have equally many blocks have the same B.
        init_range: C starts uniformly in ±init_range; 0: as R does.
        prototype_learning_rate: of C and R; None: the common rate.
    """

    peft_type: str | None = "SPLOPA"
    num_prototypes: int = 64
    prototype_rank: int = 1
    share_prototypes: bool = True
    share_position_weights: bool = False
    init_range: float = 1e-4
    prototype_learning_rate: float | None = None
    adapter_learning_rate: float | None = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_prototypes", "prototype_rank"):
            self._check(name, _whole, "a positive whole number, such as 64")
        self._check("init_range", _at_least_0, "0 or above, such as 0.0001")


@dataclass
class SploraConfig(SpaConfig):
    """W' = W + C R with masks over channels: heads and units, or output channels.

    Convolutions get C R at the centre of their kernel.

    Attributes:
        r: rank of C (out, r) and R (r, in); below 1 a share of the output channels.
        init_range: C starts uniformly in ±init_range; 0: as R does.
    """

    peft_type: str | None = "SPLORA"
    mask_structure: str = "linked"
    r: int | float = 8
    init_range: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("r", lambda v: _at_least_0(v) and v > 0, "a rank such as 8, or a share: 0.25")
        self._check("init_range", _at_least_0, "0 or above, such as 0.0001")

    def rank(self, outputs: int) -> int:
        """The rank for a layer of so many output channels: 0.25 is a quarter, 1.0 is 1."""
        return max(1, round(self.r * outputs if self.r < 1 else self.r))


@dataclass
class SpparaConfig(SpaConfig):
    """W' = W + A with a full matrix A at the centre of a convolution's kernel.

    Attributes:
        init_range: A starts uniformly in ±init_range.
    """

    peft_type: str | None = "SPPARA"
    mask_structure: str = "linked"
    init_range: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("init_range", _at_least_0, "0 or above, such as 0.0001")
        self._check("mask_structure", lambda v: v == "linked", "'linked': A has no blocks")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _at_least_0(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0
