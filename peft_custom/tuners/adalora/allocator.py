"""Who gets the rank budget: the schedule, the scores, and the mask of the b best components."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...distributed import reduce_mean
from ...protocols import AnyOptimizer
from .config import AdaLoraConfig
from .criteria import CRITERIA, inputs
from .triplets import Stack, Triplets

HISTORY = 256  # at most about so many entries, however often ranks are cut


@dataclass(frozen=True)
class Schedule:
    """The budget b(t), from `initial` to `target` components (Zhang et al. 2023, eq. 14 as coded).

    Attributes:
        initial, target: b₀ and b_T, numbers of components.
        total: T, the number of steps.
        tinit, tfinal, deltaT: steps before the first cut, after the last, and between cuts.
    """

    initial: int
    target: int
    total: int
    tinit: int
    tfinal: int
    deltaT: int

    def __post_init__(self) -> None:
        if self.tinit + self.tfinal >= self.total:
            raise ValueError(
                f"tinit={self.tinit} and tfinal={self.tfinal} leave none of the {self.total} steps "
                "for cutting ranks; make one of them smaller"
            )

    @property
    def last(self) -> int:
        """The 0-based step of the last cut, at which ranks become final."""
        return min(self.total - self.tfinal, self.total - 1)

    def budget(self, t: int) -> tuple[int, bool]:
        """(b, whether ranks are cut) after step t = 0, 1, …

        b₀ up to tinit, then b_T + (b₀ − b_T)·c³ with c falling from 1 to 0 at T − tfinal, rounded
        down, cut where deltaT divides t; from there on b_T.
        """
        if t <= self.tinit:
            return self.initial, False
        if t > self.total - self.tfinal:
            return self.target, True
        c = 1 - (t - self.tinit) / (self.total - self.tfinal - self.tinit)
        b = math.floor(c**3 * (self.initial - self.target) + self.target)
        return b, t % self.deltaT == 0


def top(scores: Tensor, b: int) -> Tensor:
    """The mask (bool, like `scores` (N,)) of the b largest; among equals the first ones count.

    A NaN is no score: it comes after all that are.
    """
    scores = torch.where(scores.isnan(), -torch.inf, scores)
    order = torch.sort(scores, descending=True, stable=True).indices
    keep = torch.zeros_like(scores, dtype=torch.bool)
    return keep.index_fill_(0, order[:b], True)


class RankAllocator:
    """Scores an adapter's components and masks all but the budget's.

    Until the last cut a mask sets E to 0 at that moment, and E may grow again; the last one becomes
    the layers' own mask. Nothing here waits for a device but `history` and `state_dict`.

    Attributes:
        budget: the number of components after the last step seen.
        finalised: the ranks are final.
    """

    def __init__(
        self,
        triplets: Triplets,
        config: AdaLoraConfig,
        schedule: Schedule,
        optimizer: AnyOptimizer | None = None,
    ) -> None:
        self.triplets = triplets
        self.schedule = schedule
        self.optimizer = optimizer
        self.betas = config.beta1, config.beta2
        self.rescore = config.rescore_at_end
        self.score = CRITERIA[config.criterion]
        self.criterion, self.needs = config.criterion, inputs(self.score)
        self.smooths = not {"smoothed", "variation"}.isdisjoint(self.needs)
        self.budget = schedule.initial
        self.finalised = False
        E = triplets.E.parameters[0]
        float_like = {"dtype": E.dtype, "device": E.device}
        self._scratch = torch.empty(2, triplets.largest, **float_like)
        averages = triplets.numel if self.smooths else 0
        self.smoothed = torch.zeros(averages, **float_like)  # Ī
        self.variation = torch.zeros(averages, **float_like)  # Ū
        self.scores = torch.zeros(sum(triplets.ranks), **float_like)  # S at the last cut
        self.matrix = torch.arange(len(triplets.ranks), device=E.device).repeat_interleave(
            torch.tensor(triplets.ranks, device=E.device)
        )  # of each triplet
        self._history: list[tuple[int, int, Tensor]] = []  # (step, budget, ranks)

    # --- scores ---------------------------------------------------------------------------------
    def read(self, stack: Stack) -> tuple[Tensor, Tensor]:
        """A stack's values and gradients as they are now; good until the next is read."""
        return stack.gather_values(self._scratch[0]), stack.gather_gradients(self._scratch[1])

    @torch.no_grad()
    def observe(self, stack: Stack, values: Tensor, gradients: Tensor) -> None:
        """Takes I = |w·∂L/∂w| into the moving averages; `gradients` is written to."""
        beta1, beta2 = self.betas
        smoothed, variation = stack.of(self.smoothed), stack.of(self.variation)
        products = gradients.mul_(values).abs_()  # I
        smoothed.lerp_(products, 1.0 - beta1)
        variation.lerp_(products.sub_(smoothed).abs_(), 1.0 - beta2)

    def _seen(self, stack: Stack, name: str) -> Tensor:
        """What a criterion calls `name`, for one stack."""
        if name == "mu":
            return stack.gather_values(self._scratch[0])
        if name == "sigma":
            stds = [self.optimizer.posterior_std(p) for p in stack.parameters]
            return stack.gather(stds, self._scratch[1])
        return stack.of(getattr(self, name))

    @torch.no_grad()
    def rescored(self) -> Tensor:
        """S (Σr,) of all triplets, the same on every process."""
        if "sigma" in self.needs:
            check_posterior(self.optimizer, self.criterion)
        scores = (
            self.score(**{name: self._seen(stack, name) for name in self.needs})
            for stack in self.triplets.stacks
        )
        [self.scores] = reduce_mean([self.triplets.pool(scores)])
        return self.scores

    # --- the budget -----------------------------------------------------------------------------
    def sees(self, t: int) -> bool:
        """Whether step t's gradients enter the moving averages."""
        before_last = t < self.schedule.last or (self.rescore and t == self.schedule.last)
        return self.smooths and not self.finalised and before_last

    @torch.no_grad()
    def allocate(self, t: int) -> None:
        """What follows step t: nothing, a cut, the last cut, or holding what was cut at zero."""
        if self.finalised:
            torch._foreach_mul_(self.triplets.E.parameters, self._masks())
            return
        final = t >= self.schedule.last
        self.budget, cut = self.schedule.budget(t)
        if final:
            self.budget = self.schedule.target
        elif not cut:
            return
        # A criterion without moving averages is scored at cuts alone: the fork's last one is stale.
        stale = final and not self.rescore and not self.smooths and len(self._history) > 0
        keep = top(self.scores if stale else self.rescored(), self.budget)
        if final:
            self._refuse_nan(t)
        masks = self.triplets.split(keep.to(self.scores.dtype))
        torch._foreach_mul_(self.triplets.E.parameters, masks)
        if final:
            torch._foreach_copy_(self._masks(), masks)
            self.finalised = True
        self._note(t, keep)

    def _refuse_nan(self, t: int) -> None:
        """Final ranks must not rest on what is no number; before that, waiting would cost time."""
        bad = self.scores.isnan()
        if bool(bad.any()):
            name = self.triplets.names[int(self.matrix[bad][0])]
            raise ValueError(
                f"step {t} makes the ranks final, but {int(bad.sum())} of {len(bad)} scores are "
                f"NaN, the first in {name}: a weight or a gradient was infinite or NaN on the "
                "way. Train with a lower learning rate, with clipped gradients or in bfloat16"
            )

    def _masks(self) -> list[Tensor]:
        """The layers' masks, shaped as E (r, 1)."""
        return [layer.mask(self.triplets.adapter)[:, None] for layer in self.triplets.layers]

    # --- what became of it ----------------------------------------------------------------------
    def _note(self, t: int, keep: Tensor) -> None:
        apart = math.ceil(self.schedule.total / HISTORY)
        if self.finalised or not self._history or t >= self._history[-1][0] + apart:
            ranks = self.matrix.new_zeros(len(self.triplets.ranks))
            ranks.index_add_(0, self.matrix, keep.to(ranks.dtype))
            self._history.append((t, self.budget, ranks))

    def history(self) -> list[dict[str, Any]]:
        """Step, budget and rank of every matrix at cuts (the last one always), as JSON values."""
        return [
            {"step": t, "budget": b, "ranks": dict(zip(self.triplets.names, ranks, strict=True))}
            for t, b, ranks in ((t, b, ranks.tolist()) for t, b, ranks in self._history)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Averages, scores, masks, budgets and history: tensors and JSON values."""
        return {
            "smoothed": self.smoothed,
            "variation": self.variation,
            "scores": self.scores,
            "masks": torch.cat(self._masks())[:, 0],
            "ranks": list(self.triplets.ranks),
            "initial": self.schedule.initial,
            "budget": self.budget,
            "finalised": self.finalised,
            "steps": [t for t, _, _ in self._history],
            "budgets": [b for _, b, _ in self._history],
            "history": torch.stack([r for _, _, r in self._history]) if self._history else None,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state.

        Raises:
            ValueError: the state is of an adapter of other ranks, or of another kind of criterion.
        """
        if list(state["ranks"]) != self.triplets.ranks:
            raise ValueError(
                f"the saved rank allocation is one of {len(state['ranks'])} matrices and "
                f"{sum(state['ranks'])} components, this adapter has {len(self.triplets.ranks)} "
                f"and {sum(self.triplets.ranks)}: resume with the options of the saved run"
            )
        if state["smoothed"].shape != self.smoothed.shape:
            raise ValueError(
                f"the saved scores are not those of criterion={self.criterion!r}: resume with the "
                "options of the saved run"
            )
        for name in ("smoothed", "variation", "scores"):
            getattr(self, name).copy_(state[name])
        masks = self.triplets.split(state["masks"].to(self.scores))
        torch._foreach_copy_(self._masks(), masks)
        self.budget, self.finalised = state["budget"], state["finalised"]
        ranks = [] if state["history"] is None else state["history"].to(self.matrix)
        self._history = list(zip(state["steps"], state["budgets"], ranks, strict=True))


def check_posterior(optimizer: AnyOptimizer | None, criterion: str) -> None:
    """Raises where the criterion needs a posterior and the optimiser has none."""
    if callable(getattr(optimizer, "posterior_std", None)):
        return
    given = (
        "no optimiser is known: call set_optimizer(optimizer) before the first step"
        if optimizer is None
        else f"{type(optimizer).__name__} has no posterior_std(parameter): train with ivon.IVON"
    )
    without = [name for name, score in CRITERIA.items() if "sigma" not in inputs(score)]
    raise TypeError(
        f"criterion={criterion!r} ranks by the optimiser's posterior, but {given}, or use a "
        f"criterion without one: {', '.join(without)}"
    )
