"""What IVON keeps between steps: parameter groups, their state, checkpoints, the posterior."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import NotRequired, TypedDict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import posterior, rule
from .flat import Group
from .sampling import AutoSampling, SampledWeights
from .window import Window

INF = float("inf")
LIMITS: dict[str, tuple[Callable[[float], bool], str]] = {
    "lr": (lambda x: 0 <= x < INF, "0 or more"),
    "ess": (lambda x: 0 < x < INF, "above 0: the number of training rows"),
    "hess_init": (lambda x: 0 < x < INF, "above 0"),
    "beta1": (lambda x: 0 <= x < 1, "from 0 to below 1"),
    "beta2": (lambda x: 0 <= x <= 1, "from 0 to 1"),
    "weight_decay": (lambda x: 0 <= x < INF, "0 or more"),
    "clip_radius": (lambda x: 0 < x <= INF, "above 0 (inf: no clipping)"),
}


class SavedGroup(rule.GroupOptions):
    """A parameter group in a checkpoint."""

    params: list[int]  # keys of `SavedState.state`


class SavedState(TypedDict):
    """A checkpoint: what `state_dict` returns."""

    state: dict[int, dict[str, Tensor]]  # momentum, hess and perhaps mean, in the parameter's shape
    param_groups: list[SavedGroup]
    generator: NotRequired[Tensor]


class GaussianOptimizer(Optimizer):
    """An optimiser whose state is a Gaussian over the weights; the base of `IVON`, which learns it.

    Attributes:
        weights: the parameters and their state in flat form.
        window: the samples since the last step.
        auto_sampling: the hooks on a model that samples by itself, if there is one.
    """

    param_groups: list[Group]
    mc_samples: int
    sync: bool
    generator: torch.Generator | None

    def _start_empty(self) -> None:
        self.weights, self.window = SampledWeights(), Window()
        self.auto_sampling: AutoSampling | None = None
        self._stds = posterior.StdCache()

    # --- parameters and samples -----------------------------------------------------------------
    def add_param_group(self, param_group: dict[str, object]) -> None:
        """Adds a group, with the constructor's values for what it does not say."""
        for name, (allowed, words) in LIMITS.items():
            value = param_group.get(name, self.defaults[name])
            if isinstance(value, bool) or not isinstance(value, Real) or not allowed(value):
                raise ValueError(f"{name}={value!r}: must be a number, {words}")
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if not p.is_floating_point():
                self.param_groups.pop()
                raise TypeError(
                    f"a parameter of shape {tuple(p.shape)} is {p.dtype}; IVON takes real "
                    "floating-point parameters"
                )
        self.weights.outdate()

    def _flatten(self) -> None:
        """Puts the state into flat vectors, new ones."""
        self._refuse_within_sample("the parameters cannot change")
        self.discard_samples()
        self.weights.flatten(self.param_groups, self.state)
        self._stds.clear()

    def prepare(self) -> None:
        """Makes `weights` fit the parameters where they are now."""
        if not self.weights.fits():
            self._flatten()

    def _refuse_within_sample(self, what: str) -> None:
        if self.weights.in_context:
            raise RuntimeError(f"{what} within sampled_params: leave the context first")

    def discard_samples(self) -> None:
        """Forgets the samples gathered since the last step."""
        self.window.clear()
        if self.auto_sampling is not None:
            self.auto_sampling.forget()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Empties gradients. Outside a context this drops a window of `mc_samples` or more samples.

        Between the samples of a window it changes nothing that `step` uses.
        """
        super().zero_grad(set_to_none)
        if not self.weights.in_context and self.window.count >= self.mc_samples:
            self.window.dropped += self.window.count
            self.discard_samples()

    # --- checkpoints ----------------------------------------------------------------------------
    def state_dict(self) -> SavedState:
        """Momentum, Hessian (fp32 means of narrow parameters), step counts, the generator's state.

        Tensors are references, as torch's optimisers give them. An unfinished window is not saved.
        """
        self.prepare()
        saved = super().state_dict()
        if self.generator is not None and not self.sync:
            saved["generator"] = self.generator.get_state()
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: SavedState) -> None:
        """Takes back what `state_dict` returned.

        Raises:
            ValueError: it is another optimiser's, or of other groups, shapes, or lacks a generator.
        """
        self._refuse_within_sample("load_state_dict cannot be called")
        saved, groups = state_dict["state"], state_dict["param_groups"]
        for group in groups:
            if missing := {*LIMITS, "step"} - group.keys():
                raise ValueError(f"no state of an IVON: its groups have no {sorted(missing)}")
        if "generator" in state_dict and self.generator is None:
            raise ValueError("the state was saved with a generator: give IVON(generator=…) one")
        own = [p for group in self.param_groups for p in group["params"]]
        indices = [i for group in groups for i in group["params"]]
        # torch refuses groups of other sizes below, so a longer list here needs no words.
        loaded = {p: _entry(saved, i, p) for p, i in zip(own, indices, strict=False)}
        super().load_state_dict({"state": {}, "param_groups": groups})
        self.state.update(loaded)
        if "generator" in state_dict:
            self.generator.set_state(state_dict["generator"].cpu())
        self.window.dropped = 0
        self._flatten()

    def __getstate__(self) -> dict[str, object]:
        options = ("mc_samples", "hess_approx", "sync", "debias", "rescale_lr", "generator")
        return super().__getstate__() | {name: getattr(self, name) for name in options}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        if "mc_samples" in state:  # a copy, not load_state_dict
            self._start_empty()

    # --- the posterior --------------------------------------------------------------------------
    @torch.no_grad()
    def posterior_std(self, param: nn.Parameter) -> Tensor:
        """σ of one parameter's entries: same shape, fp32 (fp64 for an fp64 parameter).

        All parameters' are computed once after a step, and given out as views: do not write.

        Raises:
            ValueError: the parameter is not in this optimiser's groups.
        """
        place = self.weights.place(param)
        if place is None or place[0] not in self._stds or param.device != place[0].device:
            self.prepare()  # looks at every parameter: not for every one that is asked about
            place = self.weights.place(param)
        if place is None:
            raise ValueError(f"no parameter of this optimiser (its shape is {tuple(param.shape)})")
        bucket, index = place
        return self._stds.of(bucket, self.param_groups[bucket.group])[index]

    def hess_stats(self) -> list[dict[str, float]]:
        """Mean, standard deviation, minimum, median and maximum of h, one dictionary per group.

        One transfer to the host in all.
        """
        self.prepare()
        return posterior.hess_stats(self.weights.buckets, len(self.param_groups))

    def posterior_tensors(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]]
    ) -> dict[str, Tensor]:
        """A copy of h by parameter name, in the parameter's shape, ready for safetensors.

        Args:
            named_parameters: `model.named_parameters()`; those of no group are left out.
        """
        self.prepare()
        named = posterior.own_names(self.param_groups, named_parameters)
        return {name: self.state[p]["hess"].clone() for name, p in named.items()}

    def posterior_metadata(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]]
    ) -> dict[str, str]:
        """What beside h determines σ, for the safetensors file's metadata: ess and weight decay."""
        groups = self.param_groups
        return posterior.metadata(groups, posterior.own_names(groups, named_parameters))

    @torch.no_grad()
    def load_posterior(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        tensors: dict[str, Tensor],
        metadata: dict[str, str],
    ) -> None:
        """Takes h from what `posterior_tensors` and `posterior_metadata` gave; the rest stays.

        Raises:
            ValueError: names, shapes, ess or weight decay differ, or a precision is not positive.
        """
        self._refuse_within_sample("load_posterior cannot be called")
        self.prepare()
        named = posterior.own_names(self.param_groups, named_parameters)
        posterior.check(self.param_groups, named, tensors, metadata)
        for name, p in named.items():
            self.state[p]["hess"].copy_(tensors[name])
        self._stds.clear()


def _entry(
    saved: Mapping[int, dict[str, Tensor]], index: int, param: nn.Parameter
) -> dict[str, Tensor]:
    """A parameter's saved state, or ValueError where it is not one of its shape."""
    entry = saved.get(index, {})
    for name in ("momentum", "hess"):
        if name not in entry or entry[name].shape != param.shape:
            found = tuple(entry[name].shape) if name in entry else "nothing"
            raise ValueError(
                f"parameter {index} has shape {tuple(param.shape)}, its saved {name} is {found}"
            )
    return dict(entry)
