"""The optimiser: it samples, and steps by what the samples say."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from .sampling import AutoSampling, ClosureSample
from .state import INF, GaussianOptimizer
from .window import processes

Loss = Tensor | float


class IVON(GaussianOptimizer):
    """Improved variational online Newton (Shen et al. 2024, arXiv 2402.17641).

    Learns N(m, diag σ²) over the parameters, σ² = 1/(ess·(h + δ)). A step averages the gradient ĝ
    and a curvature estimate f over samples of the weights, θ = m + σ·ε, and does, for t = 1, 2, …

        g ← β₁g + (1 − β₁)ĝ
        h ← h + b(f − h) + ½b²(h − f)²/(h + δ),     b = 1 − β₂
        m ← m − η·clip((g/(1 − β₁ᵗ) + δm)/(h + δ)),  η = lr·(h₀ + δ)

    A *window* is all samples since the last step, `mc_samples` of them unless the loop takes
    another number (see `ivon.window`). One sample is one `sampled_params(train=True)`: whatever is
    backpropagated within it, one batch or several micro-batches, shares one draw of the weights and
    is summed; the samples of a window are averaged. Where gradients are zeroed does not matter.
    After the context `p.grad` is the mean gradient over the window's samples so far, and `step`
    uses what is in it then: clip it, add to it. Only noise·gradient (or gradient²) is gathered
    before.

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
    _closure_sample = ClosureSample.NONE  # `step(closure)` opens samples for its closure

    def __init__(
        self,
        params: ParamsT,
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
        if train and self._closure_sample is not ClosureSample.NONE:
            self._claim_closure_sample()
            yield  # `step` has sampled already, and closes the sample
            return
        self._refuse_within_sample("sampled_params cannot be nested")
        self.prepare()
        auto = self.auto_sampling
        if auto is not None:
            auto.to_mean()
        if train:
            self.begin_sample(generator)
        with self.weights.sample(
            self.param_groups,
            generator or self.generator,
            for_gradients=train,
            keep_noise=auto is not None and auto.drawn,
        ):
            yield
            if train:
                self.window.add(self.weights.buckets, self.hess_approx, self.mc_samples, self.sync)

    def _claim_closure_sample(self) -> None:
        if self._closure_sample is ClosureSample.CLAIMED:
            raise RuntimeError(
                "the closure opened sampled_params(train=True) twice: step(closure) itself "
                f"calls it once per sample, mc_samples={self.mc_samples} times"
            )
        self._closure_sample = ClosureSample.CLAIMED

    def begin_sample(self, generator: torch.Generator | None = None) -> None:
        """Decides whether a sample goes on with the window or begins one; called before a draw.

        Raises:
            RuntimeError: processes would draw different noise, or a full window has been changed.
        """
        if processes() > 1 and not self.sync and (generator or self.generator) is None:
            raise RuntimeError(
                f"{processes()} processes would draw different noise and drift apart: give every "
                "one IVON(generator=torch.Generator().manual_seed(s)) with the same s and let DDP "
                "average gradients, or use sync=True with gradients of each process's own rows"
            )
        if self.window.count < self.mc_samples:
            return
        if all(p.grad is None for p in self.weights.params):
            self.zero_grad()  # model.zero_grad() has emptied a full window
        else:
            self.window.extend(self.weights.buckets, self.mc_samples)

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
        if self.auto_sampling is not None:
            raise ValueError("this optimiser already samples a model: call remove() on the handle")
        self.auto_sampling = AutoSampling(self, model)
        return self.auto_sampling

    # --- stepping -------------------------------------------------------------------------------
    def step(self, closure: Callable[[], Loss | None] | None = None) -> Loss | None:
        """Updates mean and Hessian from the window's samples, and begins a new one.

        Args:
            closure: zeroes gradients, computes the loss, calls backward, returns the loss. It is
                called `mc_samples` times, each time at newly sampled weights; it may open
                `sampled_params(train=True)` itself, once.

        Returns:
            The mean of the closure's losses, without a graph; None without them.

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
        elif self.auto_sampling is not None:
            self.auto_sampling.to_mean()
        if self.window.count == 0:
            raise RuntimeError(
                "step without a sample: run forward and backward within `with "
                "optimizer.sampled_params(train=True):`, or call optimizer.auto_sample(model) once "
                "and train in training mode"
            )
        if self.window.dropped:
            warnings.warn(
                f"zero_grad() dropped {self.window.dropped} samples since the last step; if they "
                "were to be averaged, set mc_samples to the number of samples per step",
                stacklevel=3,
            )
        if self.sync:
            self.window.average_over_processes(self.weights.buckets)
        self._apply()
        return loss

    # torch puts an optimiser's pre- and post-hooks around `step`. Here they belong around the
    # update: when a hook runs, gradients are final and weights at the mean, with a closure as well.
    step.hooked = True  # type: ignore[attr-defined]

    def _evaluate(self, closure: Callable[[], Loss | None]) -> Loss | None:
        losses = []
        for _ in range(self.mc_samples):
            with self.sampled_params(train=True), torch.enable_grad():
                self._closure_sample = ClosureSample.OFFERED
                try:
                    losses.append(closure())
                finally:
                    self._closure_sample = ClosureSample.NONE
        if any(loss is None for loss in losses):
            return None
        return sum(x.detach() if isinstance(x, Tensor) else x for x in losses) / len(losses)

    @Optimizer.profile_hook_step
    @torch.no_grad()
    def _apply(self) -> None:
        buckets = [bucket for bucket in self.weights.buckets if bucket.has_gradient()]
        for index in {bucket.group for bucket in buckets}:
            self.param_groups[index]["step"] += 1
        for bucket in buckets:
            bucket.update(
                self.param_groups[bucket.group],
                self.hess_approx,
                debias=self.debias,
                rescale_lr=self.rescale_lr,
            )
        self._stds.step += 1
        self.window.dropped = 0
        self.discard_samples()
