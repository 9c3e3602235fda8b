"""The optimiser: sampling contexts, windows of samples, steps, state."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from . import posterior, rule
from .auto import AutoSampling
from .flat import Bucket

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


class IVON(Optimizer):
    """Improved variational online Newton (Shen et al. 2024, arXiv 2402.17641).

    Learns N(m, diag σ²) over the parameters, σ² = 1/(ess·(h + δ)). A step averages the gradient ĝ
    and a curvature estimate f over samples of the weights, θ = m + σ·ε, and does, for t = 1, 2, …

        g ← β₁g + (1 − β₁)ĝ
        h ← h + b(f − h) + ½b²(h − f)²/(h + δ),     b = 1 − β₂
        m ← m − η·clip((g/(1 − β₁ᵗ) + δm)/(h + δ)),  η = lr·(h₀ + δ)

    A *window* is all samples since the last step, `mc_samples` of them unless the loop takes
    another number. One sample is one `sampled_params(train=True)`: whatever is backpropagated
    within it, one batch or several micro-batches, shares one draw of the weights and is summed;
    the samples of a window are averaged. Where gradients are zeroed does not matter. After the
    context `p.grad` is the mean gradient over the window's samples so far, and `step` uses what is
    in it then: clip it, add to it. Only noise·gradient (or gradient²) is gathered before.

    Outside the contexts the parameters hold the mean, exactly; their storage never changes.
    A parameter without a gradient in a window is not moved, one with `requires_grad=False` not
    sampled either. State is fp32 (fp64 for fp64 parameters); bf16 and fp16 parameters keep their
    mean in fp32, too, and round it. fp16 with a `GradScaler` is refused: use bfloat16.

    Several processes, one of:
      * averaged gradients (DistributedDataParallel) and the same noise: give every process a
        `generator` with the same seed, and draw equally often on all of them;
      * `sync=True`: each process has gradients of its own rows (no DDP, or `no_sync`) and noise of
        its own; one all-reduce when the window's `mc_samples`-th sample closes averages gradients
        and statistics, so a step has `mc_samples`·processes samples. A missing gradient counts as
        zero.

    `auto_sample(model)` serves loops that know nothing of sampling. Groups may have their own lr,
    ess, hess_init, beta1, beta2, weight_decay, clip_radius.

    Args:
        params: parameters, named parameters, or groups.
        lr: learning rate; between that of SGD and 1, 0.1 is a usual start.
        ess: effective sample size, the number of training rows (of all processes).
        hess_init: h₀.
        beta1: decay of the gradient average.
        beta2: decay of the curvature average.
        weight_decay: δ; the prior is N(0, 1/(ess·δ)).
        mc_samples: samples of a window; what `step(closure)` takes.
        hess_approx: "price", f = ess·(h + δ)·mean(σε·ĝ), or "gradsq", f = ess·mean(ĝ²).
        clip_radius: limit of every entry of a step before η; the published LoRA runs have 1e-3.
        sync: average over processes, see above.
        debias: divide g by 1 − β₁ᵗ.
        rescale_lr: η = lr·(h₀ + δ) instead of lr.
        generator: where noise is drawn from, by default torch's global generator, one
            `randn(numel)` per group (and device and dtype). Its state is part of `state_dict`,
            except with `sync=True`, where it differs between processes.
    """

    _step_supports_amp_scaling = True  # makes a GradScaler announce itself, so it can be refused

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        ess: float,
        hess_init: float = 1.0,
        beta1: float = 0.9,
        beta2: float = 0.99999,
        weight_decay: float = 1e-4,
        mc_samples: int = 1,
        hess_approx: str = "price",
        clip_radius: float = INF,
        sync: bool = False,
        debias: bool = True,
        rescale_lr: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        if hess_approx not in ("price", "gradsq"):
            raise ValueError(f"hess_approx={hess_approx!r}: choose 'price' or 'gradsq'")
        if not isinstance(mc_samples, int) or mc_samples < 1:
            raise ValueError(f"mc_samples={mc_samples!r}: must be a whole number, 1 or more")
        self.mc_samples, self.hess_approx = mc_samples, hess_approx
        self.sync, self.debias, self.rescale_lr = sync, debias, rescale_lr
        self.generator = generator
        self._start_empty()
        defaults = {
            "lr": lr,
            "ess": ess,
            "hess_init": hess_init,
            "beta1": beta1,
            "beta2": beta2,
            "weight_decay": weight_decay,
            "clip_radius": clip_radius,
            "step": 0,
        }
        super().__init__(params, defaults)
        self._flatten()

    def _start_empty(self) -> None:
        self._buckets: list[Bucket] = []  # a cache of `state`, in flat form
        self._known: dict[nn.Parameter, tuple[Bucket, int]] = {}
        self._stds: dict[Bucket, tuple[Any, list[Tensor]]] = {}
        self._sampling = False  # parameters are sampled, by a context
        self._lent: str | None = None  # the closure's own sample: "offered", then "taken"
        self._auto: AutoSampling | None = None
        self._dropped = 0  # samples that zero_grad has dropped since the last step
        self._steps = 0  # for caches only
        self._start_window()

    def _start_window(self) -> None:
        self._count = 0  # samples gathered
        self._averaged = False  # p.grad is the mean over the processes
        self._left: list[tuple[Tensor, int]] = []  # gradients as the last sample left them

    # --- groups and state -----------------------------------------------------------------------
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, with the constructor's values for what it does not say."""
        for name, (allowed, words) in LIMITS.items():
            value = param_group.get(name, self.defaults[name])
            if isinstance(value, bool) or not isinstance(value, Real) or not allowed(value):
                raise ValueError(f"{name}={value!r}: must be a number, {words}")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"]:
            if not p.is_floating_point():
                self.param_groups.pop()
                raise TypeError(
                    f"a parameter of shape {tuple(p.shape)} is {p.dtype}; IVON takes real "
                    "floating-point parameters"
                )
        self._known = {}  # to be flattened anew

    def _flatten(self) -> None:
        """Puts the state into flat vectors, new ones."""
        self._refuse_within_sample("the parameters cannot change")
        self.discard_samples()
        self._buckets, self._known, self._stds = [], {}, {}
        for index, group in enumerate(self.param_groups):
            parts: dict[Any, list[nn.Parameter]] = {}
            for p in group["params"]:
                parts.setdefault((p.device, p.dtype), []).append(p)
            for params in parts.values():
                bucket = Bucket(index, params, self.state, group["hess_init"])
                self._buckets.append(bucket)
                self._known |= {p: (bucket, i) for i, p in enumerate(params)}

    @torch.no_grad()
    def _ready(self) -> list[Bucket]:
        """The flat state, of the parameters where they are now."""
        if not self._known or not all(bucket.fits() for bucket in self._buckets):
            self._flatten()
        return self._buckets

    def state_dict(self) -> dict[str, Any]:
        """Momentum, Hessian (fp32 means of narrow parameters), step counts, the generator's state.

        Tensors are references, as torch's optimisers give them. An unfinished window is not saved.
        """
        self._ready()
        saved = super().state_dict()
        if self.generator is not None and not self.sync:
            saved["generator"] = self.generator.get_state()
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
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
        loaded = {}
        for p, i in zip(own, indices, strict=False):
            entry = saved.get(i, {})
            for name in ("momentum", "hess"):
                if name not in entry or entry[name].shape != p.shape:
                    found = tuple(entry[name].shape) if name in entry else "nothing"
                    raise ValueError(
                        f"parameter {i} has shape {tuple(p.shape)}, its saved {name} is {found}"
                    )
            loaded[p] = dict(entry)
        super().load_state_dict({"state": {}, "param_groups": groups})
        self.state.update(loaded)
        if "generator" in state_dict:
            self.generator.set_state(state_dict["generator"].cpu())
        self._dropped = 0
        self._flatten()

    def __getstate__(self) -> dict[str, Any]:
        options = ("mc_samples", "hess_approx", "sync", "debias", "rescale_lr", "generator")
        return super().__getstate__() | {name: getattr(self, name) for name in options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "mc_samples" in state:  # a copy, not load_state_dict
            self._start_empty()

    # --- sampling -------------------------------------------------------------------------------
    @contextmanager
    def sampled_params(
        self, train: bool = False, generator: torch.Generator | None = None
    ) -> Iterator[None]:
        """Within it, the parameters are one draw of the posterior; after it, exactly the mean.

        Args:
            train: the gradients of this sample enter the window. Call backward within the context.
            generator: for this draw, instead of the optimiser's. Several processes that share noise
                must draw equally often: where one evaluates alone, give a generator of its own.

        Raises:
            RuntimeError: contexts are nested, or no parameter received a gradient.
        """
        if self._lent is not None and train:
            if self._lent == "taken":
                raise RuntimeError(
                    "the closure opened sampled_params(train=True) twice: step(closure) itself "
                    f"calls it once per sample, mc_samples={self.mc_samples} times"
                )
            self._lent = "taken"
            yield
            return
        self._refuse_within_sample("sampled_params cannot be nested")
        self._ready()
        if self._auto is not None:
            self._auto.to_mean()
        if train:
            self._open_sample(generator)
        before = [(p, p.grad) for p in self._known] if train else []
        complete = False
        kept = self._auto.noise() if self._auto is not None else []
        with torch.no_grad():
            self._draw(generator)
        self._sampling = True
        try:
            with torch.no_grad():
                for bucket in self._buckets:
                    bucket.perturb()
                for p, _ in before:
                    p.grad = None
            yield
            if train:
                self._close_sample()
            complete = True
        finally:
            self._sampling = False
            with torch.no_grad():
                for bucket in self._buckets:
                    bucket.restore()
                for bucket, noise in zip(self._buckets, kept, strict=False):
                    bucket.noise.vector.copy_(noise)
            if not complete:
                for p, gradient in before:
                    p.grad = gradient

    @torch.no_grad()
    def _draw(self, generator: torch.Generator | None = None) -> None:
        """New noise, and the means of now to return to."""
        for bucket in self._buckets:
            bucket.read_mean()
            bucket.draw(generator or self.generator, self.param_groups[bucket.group])

    @torch.no_grad()
    def _open_sample(self, generator: torch.Generator | None = None) -> None:
        """Decides whether a sample goes on with the window or begins one."""
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if processes > 1 and not self.sync and (generator or self.generator) is None:
            raise RuntimeError(
                f"{processes} processes would draw different noise and drift apart: give every one "
                "IVON(generator=torch.Generator().manual_seed(s)) with the same s and let DDP "
                "average gradients, or use sync=True with gradients of each process's own rows"
            )
        gradients = [p.grad for p in self._known if p.grad is not None]
        if self._count >= self.mc_samples and not gradients:
            self.zero_grad()  # model.zero_grad() has emptied a full window
        if self._count < self.mc_samples:
            return
        now = [(g, g._version) for g in gradients]
        left = self._left
        same = len(now) == len(left) and all(
            a is b and v == w for (a, v), (b, w) in zip(now, left, strict=True)
        )
        if self._averaged or not same:
            raise RuntimeError(
                f"a window of mc_samples={self.mc_samples} is complete, and its gradient was "
                "clipped, zeroed or averaged over processes: take a step, drop it with "
                "zero_grad(), or set mc_samples to the number of samples per step"
            )
        if self._count == 1:
            for bucket in self._buckets:
                bucket.average_gradient(1)

    @torch.no_grad()
    def _close_sample(self) -> None:
        """The sample's gradients enter the running means."""
        count = self._count + 1
        found = [bucket.collect(self.hess_approx, count) for bucket in self._buckets]
        if not any(found):
            raise RuntimeError(
                "no parameter received a gradient within sampled_params(train=True): call "
                "loss.backward() inside the context"
            )
        if count > 1 or self.mc_samples > 1:
            for bucket in self._buckets:
                bucket.average_gradient(count)
        self._count = count
        if count == self.mc_samples:
            self._average_over_processes()
        self._left = [(p.grad, p.grad._version) for p in self._known if p.grad is not None]

    def _average_over_processes(self) -> None:
        if not self.sync or self._averaged:
            return
        self._averaged = True
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        for bucket in self._buckets:
            bucket.gather_gradient(bucket.gradient)
            bucket.seen = set(bucket.trainable())
        vectors = [v for b in self._buckets for v in (b.gradient.vector, b.statistic.vector)]
        for key in dict.fromkeys((v.device, v.dtype) for v in vectors):
            alike = [v for v in vectors if (v.device, v.dtype) == key]
            flat = torch.cat(alike)
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            torch._foreach_copy_(alike, list(flat.split([len(v) for v in alike])))
        for bucket in self._buckets:
            bucket.hand_out_gradient()

    def discard_samples(self) -> None:
        """Forgets the samples gathered since the last step."""
        self._start_window()
        if self._auto is not None:
            self._auto.forget()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Empties gradients. Outside a context this drops a window of `mc_samples` or more samples.

        Between the samples of a window it changes nothing that `step` uses.
        """
        super().zero_grad(set_to_none)
        if not self._sampling and self._count >= self.mc_samples:
            self._dropped += self._count
            self.discard_samples()

    def auto_sample(self, model: nn.Module) -> AutoSampling:
        """Samples by itself, for loops that know nothing of it, such as Hugging Face's Trainer.

        Every forward pass of `model` in training mode, with gradients recorded, runs at sampled
        weights, one draw per step; after its backward pass the weights are the mean again. Forward
        passes in evaluation mode, or without gradients, run at the mean.

        Args:
            model: the module whose outputs the loss is made from (unwrapped by DDP), as given to
                the Trainer. Its outputs are tensors, or hold tensors.

        Returns:
            A handle with `remove()`.

        Raises:
            ValueError: `mc_samples` is not 1, `sync` is set, or a model is sampled already.
        """
        if self.mc_samples != 1 or self.sync:
            raise ValueError("auto_sample takes one sample per step: mc_samples=1, sync=False")
        if self._auto is not None:
            raise ValueError("this optimiser already samples a model: call remove() on the handle")
        self._auto = AutoSampling(self, model)
        return self._auto

    # --- stepping -------------------------------------------------------------------------------
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates mean and Hessian from the window's samples, and begins a new one.

        Args:
            closure: zeroes gradients, computes the loss, calls backward, returns the loss. It is
                called `mc_samples` times, each time at newly sampled weights; it may open
                `sampled_params(train=True)` itself, once.

        Returns:
            The mean of the closure's losses.

        Raises:
            RuntimeError: there is no sample, a context is open, or a GradScaler calls.
        """
        if self.__dict__.pop("found_inf", None) is not None:
            self.__dict__.pop("grad_scale", None)
            raise RuntimeError(
                "IVON gathers gradients before a GradScaler unscales them: train without one, in "
                "bfloat16 (mixed_precision='bf16') or fp32"
            )
        self._refuse_within_sample("step cannot be called")
        loss = None
        if closure is not None:
            loss = self._evaluate(closure)
        elif self._auto is not None:
            self._auto.to_mean()
        if self._count == 0:
            raise RuntimeError(
                "step without a sample: run forward and backward within `with "
                "optimizer.sampled_params(train=True):`, or call optimizer.auto_sample(model) once "
                "and train in training mode"
            )
        if self._dropped:
            warnings.warn(
                f"zero_grad() dropped {self._dropped} samples since the last step; if they were to "
                "be averaged, set mc_samples to the number of samples per step",
                stacklevel=3,
            )
        with torch.no_grad():
            self._average_over_processes()
        self._apply()
        return loss

    # torch puts an optimiser's pre- and post-hooks around `step`. Here they belong around the
    # update: when a hook runs, gradients are final and weights at the mean, with a closure as well.
    step.hooked = True  # type: ignore[attr-defined]

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        losses = []
        for _ in range(self.mc_samples):
            with self.sampled_params(train=True), torch.enable_grad():
                self._lent = "offered"
                try:
                    losses.append(closure())
                finally:
                    self._lent = None
        if any(loss is None for loss in losses):
            return None
        return sum(x.detach() if isinstance(x, Tensor) else x for x in losses) / len(losses)

    @Optimizer.profile_hook_step
    @torch.no_grad()
    def _apply(self) -> None:
        buckets = [bucket for bucket in self._buckets if bucket.has_gradient()]
        for index in {bucket.group for bucket in buckets}:
            self.param_groups[index]["step"] += 1
        for bucket in buckets:
            bucket.update(
                self.param_groups[bucket.group],
                self.hess_approx,
                debias=self.debias,
                rescale_lr=self.rescale_lr,
            )
        self._steps += 1
        self._dropped = 0
        self.discard_samples()

    def _refuse_within_sample(self, what: str) -> None:
        if self._sampling:
            raise RuntimeError(f"{what} within sampled_params: leave the context first")

    # --- the posterior --------------------------------------------------------------------------
    @torch.no_grad()
    def posterior_std(self, param: nn.Parameter) -> Tensor:
        """σ of one parameter's entries: same shape, fp32 (fp64 for an fp64 parameter).

        All parameters' are computed once after a step, and given out as views: do not write.
        """
        bucket, index = self._known.get(param, (None, 0))
        if bucket is None or bucket not in self._stds or param.device != bucket.device:
            self._ready()  # looks at every parameter: not for every one that is asked about
            if param not in self._known:
                raise ValueError(
                    f"no parameter of this optimiser (its shape is {tuple(param.shape)})"
                )
            bucket, index = self._known[param]
        group = self.param_groups[bucket.group]
        key = self._steps, group["ess"], group["weight_decay"]
        if bucket not in self._stds or self._stds[bucket][0] != key:
            vector = rule.std(bucket.hess.vector, group["ess"], group["weight_decay"])
            pieces = vector.split([p.numel() for p in bucket.params])
            views = [piece.view(p.shape) for piece, p in zip(pieces, bucket.params, strict=True)]
            self._stds[bucket] = key, views
        return self._stds[bucket][1][index]

    def hess_stats(self) -> list[dict[str, float]]:
        """Mean, standard deviation, minimum, median and maximum of h, one dictionary per group.

        One transfer to the host in all.
        """
        return posterior.hess_stats(self._ready(), len(self.param_groups))

    def posterior_tensors(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]]
    ) -> dict[str, Tensor]:
        """A copy of h by parameter name, in the parameter's shape, ready for safetensors.

        Args:
            named_parameters: `model.named_parameters()`; those of no group are left out.
        """
        self._ready()
        named = posterior.own_names(self, named_parameters)
        return {name: self.state[p]["hess"].clone() for name, p in named.items()}

    def posterior_metadata(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]]
    ) -> dict[str, str]:
        """What beside h determines σ, for the safetensors file's metadata: ess and weight decay."""
        return posterior.metadata(self, posterior.own_names(self, named_parameters))

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
        self._ready()
        named = posterior.own_names(self, named_parameters)
        posterior.check(self, named, tensors, metadata)
        for name, p in named.items():
            self.state[p]["hess"].copy_(tensors[name])
        self._stds.clear()
