"""Parameters of one group as one vector: what IVON keeps, draws and gathers for all at once.

Parameters and gradients stay ordinary tensors of their own: `zero_grad` and `.to()` would break
views into a common buffer. Only IVON's own vectors are flat; a parameter's part of each is a view,
and whole lists of parts are read and written by one `torch._foreach_*` call. So the number of
operators does not depend on the number of parameters. On a CPU the formulas go through the vectors
in blocks that stay in a core's cache, as a dozen passes over memory would cost twice as much.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping

import torch
from torch import Tensor, nn

from . import rule

BLOCK = 2**17  # numbers per core: half a megabyte of each vector

State = MutableMapping[nn.Parameter, dict[str, Tensor]]  # an optimiser's, by parameter and name


class Group(rule.GroupOptions):
    """A parameter group of IVON."""

    params: list[nn.Parameter]


class Flat:
    """A vector with views of it, one in the shape of every parameter; and the vector in blocks.

    Attributes:
        vector: (n,), with n the sum of the parameters' sizes.
        views: in the parameters' order and shapes.
        blocks: (up to BLOCK per core,) each on a CPU, else the whole vector.
    """

    def __init__(self, params: list[nn.Parameter], dtype: torch.dtype) -> None:
        sizes = [p.numel() for p in params]
        self.vector = torch.zeros(sum(sizes), dtype=dtype, device=params[0].device)  # (n,)
        pieces = self.vector.split(sizes)  # (size,) each
        self.views = [piece.view(p.shape) for piece, p in zip(pieces, params, strict=True)]
        on_cpu = self.vector.device.type == "cpu"
        block = BLOCK * torch.get_num_threads() if on_cpu else len(self.vector)
        self.blocks = self.vector.split(max(1, block))

    def pick(self, indices: Iterable[int]) -> list[Tensor]:
        """The views of these parameters."""
        return [self.views[i] for i in indices]


class Bucket:
    """Those parameters of a group that share a device and a dtype.

    Attributes:
        group: index of the parameter group.
        params: in the group's order.
        wide: the dtype of all vectors but `narrow`: fp64 for fp64 parameters, else fp32.
        momentum: g, the gradient's moving average.
        hess: h.
        mean: m in `wide` precision. For fp32 and fp64 parameters a copy, good from `read_mean` to
            the next change of a parameter; for narrower ones the mean itself, which they round.
        noise: the current sample's noise σ·ε, until `collect` uses it up.
        statistic: running mean of noise·gradient or gradient² over the window's samples.
        gradient: running mean of the gradient, where a window has several samples.
        narrow: room for a rounded vector, where the parameters are bf16 or fp16.
        seen: indices of the parameters with a gradient in this window.
        sampled: indices of the parameters that are not at the mean.
    """

    def __init__(
        self, group: int, params: list[nn.Parameter], state: State, hess_init: float
    ) -> None:
        self.group, self.params = group, params
        self.device, self.dtype = params[0].device, params[0].dtype
        self.shapes = [p.shape for p in params]
        narrow = self.dtype not in (torch.float32, torch.float64)
        self.wide = torch.float32 if narrow else self.dtype
        self.momentum = self._restored("momentum", state)
        self.hess = self._restored("hess", state, hess_init)
        if narrow:
            self.mean = self._restored("mean", state, params)
        else:
            self.mean = Flat(params, self.wide)
        self.noise, self.statistic = Flat(params, self.wide), Flat(params, self.wide)
        self.narrow = Flat(params, self.dtype) if narrow else None
        self._gradient: Flat | None = None
        self.seen: set[int] = set()
        self.sampled: list[int] = []

    def _restored(self, name: str, state: State, initial: float | list[nn.Parameter] = 0.0) -> Flat:
        """A vector of the state: what `state[p][name]` holds or else `initial`; then its views."""
        flat = Flat(self.params, self.wide)
        for i, (p, view) in enumerate(zip(self.params, flat.views, strict=True)):
            start = initial[i].detach() if isinstance(initial, list) else initial
            view.copy_(torch.as_tensor(state[p].get(name, start)))
            state[p][name] = view
        return flat

    @property
    def gradient(self) -> Flat:
        # Made when first asked for: a window of one sample in one process never does.
        if self._gradient is None:
            self._gradient = Flat(self.params, self.wide)
        return self._gradient

    def fits(self) -> bool:
        """Whether the parameters still are what they were (`model.to(...)` may come after)."""
        return all(
            p.device == self.device and p.dtype == self.dtype and p.shape == shape
            for p, shape in zip(self.params, self.shapes, strict=True)
        )

    def trainable(self) -> list[int]:
        """Indices of the parameters that are not frozen."""
        return [i for i, p in enumerate(self.params) if p.requires_grad]

    def _with_gradient(self) -> list[int]:
        return [i for i in self.trainable() if self.params[i].grad is not None]

    def _gradients(self, indices: list[int]) -> list[Tensor]:
        gradients = [self.params[i].grad for i in indices]
        if any(g.layout != torch.strided for g in gradients):
            raise TypeError("IVON takes no sparse gradients: build embeddings with sparse=False")
        return gradients

    # --- sampling -------------------------------------------------------------------------------
    def read_mean(self) -> None:
        """m ← the parameters; a narrow parameter that still is m rounded leaves m as it is."""
        if self.narrow is None:
            torch._foreach_copy_(self.mean.views, self.params)
            return
        torch._foreach_copy_(self.narrow.views, self.params)
        mean, current = self.mean.vector, self.narrow.vector  # (n,) wide, (n,) narrow
        mean.copy_(torch.where(mean.to(self.dtype) == current, mean, current.to(self.wide)))

    def draw(self, generator: torch.Generator | None, group: Group) -> None:
        """noise ← σ·ε, with ε one flat N(0, I) of the group."""
        noise = self.noise.vector  # (n,)
        if generator is None or generator.device == noise.device:
            noise.normal_(generator=generator)
        else:
            noise.copy_(
                torch.randn(
                    len(noise), generator=generator, device=generator.device, dtype=noise.dtype
                )
            )
        for part, hess in zip(self.noise.blocks, self.hess.blocks, strict=True):
            # (block,) each
            part.mul_(rule.std(hess, group["ess"], group["weight_decay"]))

    def perturb(self) -> None:
        """Parameters ← m + noise. They must be at m."""
        live = self.sampled = self.trainable()
        if not live:
            return
        params = [self.params[i] for i in live]
        if self.narrow is None:
            torch._foreach_add_(params, self.noise.pick(live))
        else:
            rounded = self._rounded(self.mean.vector + self.noise.vector)
            torch._foreach_copy_(params, rounded.pick(live))

    def restore(self) -> None:
        """Parameters ← m, in place, all that were perturbed (one may be frozen by now)."""
        self._write_mean(self.sampled)
        self.sampled = []

    def _write_mean(self, indices: list[int]) -> None:
        source = self.mean if self.narrow is None else self._rounded(self.mean.vector)
        if indices:
            torch._foreach_copy_([self.params[i] for i in indices], source.pick(indices))

    def _rounded(self, vector: Tensor) -> Flat:
        self.narrow.vector.copy_(vector)
        return self.narrow

    # --- gathering ------------------------------------------------------------------------------
    def collect(self, hess_approx: str, count: int, *, keep_noise: bool = False) -> bool:
        """Takes the count-th sample's gradient into `statistic`, the window's running mean.

        The noise is multiplied where it lies, and so used up. Two buffers serve for everything:
        the first sample's product *is* the mean, so its buffer becomes `statistic`, and the old
        statistic's, done with since the step, is where the next sample's noise will be drawn. Every
        later product is made in `noise` and averaged into `statistic`.

        Args:
            hess_approx: "price", the product is noise·gradient, or "gradsq", it is gradient².
            count: 1 for the window's first sample.
            keep_noise: for the first sample only, at the price of a copy.

        Returns:
            Whether any parameter has a gradient.
        """
        indices = self._with_gradient()
        gradients = self._gradients(indices)
        if count == 1:
            self.seen.clear()
            if keep_noise:
                self.statistic.vector.copy_(self.noise.vector)
            else:
                self.noise, self.statistic = self.statistic, self.noise  # the two swap roles
        target = self.statistic if count == 1 else self.noise  # holds the noise, then the product
        self.seen.update(indices)
        missing = set(range(len(self.params))).difference(indices)
        if missing:  # no gradient means a gradient of zero
            torch._foreach_zero_(target.pick(missing))
        if indices and hess_approx == "price":
            torch._foreach_mul_(target.pick(indices), gradients)
        elif indices:
            torch._foreach_copy_(target.pick(indices), gradients)
            target.vector.square_()
        if count > 1:  # mean ← mean + (product − mean)/count
            self.statistic.vector.lerp_(self.noise.vector, 1 / count)
        return bool(indices)

    def gather_gradient(self, target: Flat) -> None:
        """`target` ← p.grad, zero where there is none."""
        indices = self._with_gradient()
        if len(indices) < len(self.params):
            target.vector.zero_()
        if indices:
            torch._foreach_copy_(target.pick(indices), self._gradients(indices))

    def average_gradient(self, count: int) -> None:
        """p.grad, the count-th sample's, becomes the mean over the samples so far."""
        if count == 1:
            self.gather_gradient(self.gradient)
            return
        self.gather_gradient(self.noise)  # the noise has done its work
        self.gradient.vector.lerp_(self.noise.vector, 1 / count)
        self.hand_out_gradient()

    def hand_out_gradient(self) -> None:
        """p.grad ← `gradient`, for all that had one in this window."""
        indices = self._with_gradient()
        if indices:
            torch._foreach_copy_(self._gradients(indices), self.gradient.pick(indices))
        for i in self.seen.difference(indices):
            self.params[i].grad = self.gradient.views[i].to(self.dtype, copy=True)

    # --- updating -------------------------------------------------------------------------------
    def has_gradient(self) -> bool:
        """Whether a step changes anything here."""
        return bool(self._with_gradient())

    def update(self, group: Group, hess_approx: str, *, debias: bool, rescale_lr: bool) -> None:
        """One step for the parameters that have a gradient; the others and their state stay.

        The formulas run over whole vectors, so what must stay is copied before and written back.
        """
        indices = self._with_gradient()
        rest = set(range(len(self.params))).difference(indices)
        kept = [view for flat in (self.hess, self.mean) for view in flat.pick(rest)]
        self.read_mean()
        before = [view.clone() for view in kept]
        views, gradients = self.momentum.pick(indices), self._gradients(indices)
        if self.narrow is None:
            torch._foreach_lerp_(views, gradients, 1 - group["beta1"])
        else:  # lerp takes one dtype
            torch._foreach_mul_(views, group["beta1"])
            torch._foreach_add_(views, gradients, alpha=1 - group["beta1"])
        vectors = (self.mean, self.momentum, self.hess, self.statistic)
        blocks = zip(*(flat.blocks for flat in vectors), strict=True)  # four of (block,)
        for mean, momentum, hess, statistic in blocks:
            rule.update_hess_(hess, statistic, hess_approx, group)
            rule.update_mean_(mean, momentum, hess, group, debias=debias, rescale_lr=rescale_lr)
        if kept:
            torch._foreach_copy_(kept, before)
        self._write_mean(indices)
