"""The weights at the mean or at a draw of the posterior: in a context, or by hooks on a model.

`SampledWeights` moves the parameters, m → m + noise → m. `AutoSampling` has it do so around every
forward and backward pass, for loops that know nothing of it:

    forward (training)   weights ← m + noise, the draw of this step
    backward             gradients arrive; then noise·gradient is taken and weights ← m
    … more micro-batches of the step: the same draw, the same two changes …
    clipping, step       as always

The gradients of a step's micro-batches add up in `p.grad`, all at one draw, and the statistic is
computed anew from their sum after every backward pass. So clipping that follows does not touch it,
and nobody has to say which micro-batch was the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from .flat import Bucket, Group, State
from .window import Window


class ClosureSample(Enum):
    """Where the sample stands that `step(closure)` opens for the closure."""

    NONE = "no closure is running"
    OFFERED = "open; the closure may claim it by sampled_params(train=True)"
    CLAIMED = "the closure has claimed it, which it may do once"


class SampledWeights:
    """All parameters of an optimiser, and the noise that takes them from the mean to a sample.

    Attributes:
        buckets: the parameters and their state, as flat vectors.
        in_context: a `sample` context is open: the parameters are its draw.
    """

    def __init__(self) -> None:
        self.buckets: list[Bucket] = []  # the optimiser's `state`, in flat form
        self.in_context = False
        self._places: dict[nn.Parameter, tuple[Bucket, int]] = {}  # bucket, index within

    @property
    def params(self) -> Iterable[nn.Parameter]:
        return self._places.keys()

    def place(self, param: nn.Parameter) -> tuple[Bucket, int] | None:
        """The parameter's bucket and its index there; None for one of no bucket."""
        return self._places.get(param)

    def fits(self) -> bool:
        """Whether the parameters are where and what they were when they were flattened."""
        return bool(self._places) and all(bucket.fits() for bucket in self.buckets)

    def outdate(self) -> None:
        """The groups have changed: nothing fits until `flatten`."""
        self._places = {}

    @torch.no_grad()
    def flatten(self, groups: Sequence[Group], state: State) -> None:
        """Puts the state into flat vectors, new ones, one bucket per group, device and dtype."""
        self.buckets, self._places = [], {}
        for index, group in enumerate(groups):
            parts: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = {}
            for p in group["params"]:
                parts.setdefault((p.device, p.dtype), []).append(p)
            for params in parts.values():
                bucket = Bucket(index, params, state, group["hess_init"])
                self.buckets.append(bucket)
                self._places |= {p: (bucket, i) for i, p in enumerate(params)}

    @torch.no_grad()
    def draw(self, groups: Sequence[Group], generator: torch.Generator | None) -> None:
        """New noise, and the means of now to return to."""
        for bucket in self.buckets:
            bucket.read_mean()
            bucket.draw(generator, groups[bucket.group])

    @torch.no_grad()
    def read_mean(self) -> None:
        """The means of now are those to return to; the noise stays."""
        for bucket in self.buckets:
            bucket.read_mean()

    @torch.no_grad()
    def perturb(self) -> None:
        """Parameters ← mean + noise. They must be at the mean."""
        for bucket in self.buckets:
            bucket.perturb()

    @torch.no_grad()
    def restore(self) -> None:
        """Parameters ← mean."""
        for bucket in self.buckets:
            bucket.restore()

    @contextmanager
    def sample(
        self,
        groups: Sequence[Group],
        generator: torch.Generator | None,
        *,
        for_gradients: bool,
        keep_noise: bool,
    ) -> Iterator[None]:
        """Within it, the parameters are a new draw; after it, exactly the mean.

        Args:
            groups: the optimiser's.
            generator: where noise is drawn from; None is torch's global one.
            for_gradients: the context begins without gradients; those from before come back only
                if it fails.
            keep_noise: the noise from before the context comes back.
        """
        before = [(p, p.grad) for p in self.params] if for_gradients else []
        noises = [b.noise.vector.clone() for b in self.buckets] if keep_noise else []  # each (n,)
        complete = False
        self.draw(groups, generator)
        self.in_context = True
        try:
            self.perturb()
            for p, _ in before:
                p.grad = None
            yield
            complete = True
        finally:
            self.in_context = False
            self.restore()
            for bucket, noise in zip(self.buckets, noises, strict=False):  # none, or all
                bucket.noise.vector.copy_(noise)
            if not complete:
                for p, gradient in before:
                    p.grad = gradient


class SamplingOptimizer(Protocol):
    """What `AutoSampling` asks of its optimiser."""

    param_groups: list[Group]
    generator: torch.Generator | None
    hess_approx: str
    weights: SampledWeights
    window: Window
    auto_sampling: AutoSampling | None

    def prepare(self) -> None:
        """Makes `weights` fit the parameters, which may have moved."""

    def begin_sample(self, generator: torch.Generator | None = None) -> None:
        """Makes room in `window` for one more sample, or refuses."""

    def zero_grad(self) -> None: ...


class AutoSampling:
    """Hooks on a model that sample an IVON's weights around forward and backward; see `IVON`."""

    def __init__(self, optimizer: SamplingOptimizer, model: nn.Module) -> None:
        self.optimizer, self.model = optimizer, model
        self._drawn = False  # this step's noise exists
        self._noisy = False  # the parameters are sampled now
        self._pending: set[object] = set()  # forward passes whose backward pass has not ended
        self._handles = [
            model.register_forward_pre_hook(self._before_forward),
            model.register_forward_hook(self._after_forward),
            model.register_state_dict_pre_hook(self._before_state_dict),
        ]

    @property
    def drawn(self) -> bool:
        """This step's noise exists: another draw must give it back."""
        return self._drawn

    def remove(self) -> None:
        """Leaves the weights at the mean and the model without hooks."""
        self.to_mean()
        for handle in self._handles:
            handle.remove()
        self.optimizer.auto_sampling = None

    def __deepcopy__(self, memo: dict[int, object]) -> AutoSampling:
        return self  # a copy of the model is not sampled, and carries no copy of the optimiser

    def to_mean(self) -> None:
        """Puts the mean into the parameters if they are sampled."""
        if self._noisy:
            self.optimizer.weights.restore()
            self._noisy = False

    def forget(self) -> None:
        """The next forward pass begins a new step, with a new draw."""
        self.to_mean()
        self._drawn = False
        self._pending.clear()

    # --- forward --------------------------------------------------------------------------------
    @torch.compiler.disable
    def _before_forward(self, module: nn.Module, inputs: object) -> None:
        training = module.training and torch.is_grad_enabled()
        if module is not self.model:
            if training:
                raise RuntimeError(
                    "auto_sample: a copy of the model is being trained (DataParallel, deepcopy); "
                    "use one process per device, or call auto_sample on the model that is trained"
                )
            return
        if self.optimizer.weights.in_context:
            return  # the caller samples by itself
        if not training:
            self.to_mean()
        elif not self._noisy:
            self._to_sample()

    def _to_sample(self) -> None:
        optimizer, weights = self.optimizer, self.optimizer.weights
        if optimizer.window.count and all(p.grad is None for p in weights.params):
            optimizer.zero_grad()  # model.zero_grad() has dropped the step
        optimizer.prepare()
        if not self._drawn:
            optimizer.begin_sample()
            weights.draw(optimizer.param_groups, optimizer.generator)
            self._drawn = True
        else:
            weights.read_mean()
        self._noisy = True
        weights.perturb()

    @torch.compiler.disable
    def _after_forward(self, module: nn.Module, inputs: object, output: object) -> None:
        if not self._noisy or not torch.is_grad_enabled() or module is not self.model:
            return
        tensors = [t for t in _tensors(output) if t.requires_grad]
        if not tensors:
            self.to_mean()
            raise TypeError(
                f"auto_sample finds no tensor with a gradient in the model's output, a "
                f"{type(output).__name__}; open optimizer.sampled_params(train=True) in the loop"
            )
        seen_by = self._watcher()
        for tensor in tensors:
            tensor.register_hook(seen_by)

    def _before_state_dict(self, *unused: object) -> None:
        self.to_mean()

    # --- backward -------------------------------------------------------------------------------
    def _watcher(self) -> Callable[[Tensor], None]:
        """A gradient hook for one forward pass's outputs, which notices the end of backward."""
        token = object()
        self._pending.add(token)
        queued = False

        def ended() -> None:
            nonlocal queued
            queued = False
            self._pending.discard(token)
            self._after_backward()

        def seen(gradient: Tensor) -> None:
            nonlocal queued
            if queued:
                return
            queued = True
            # DDP hands out averaged gradients in such a callback as well, queued later in the
            # backward pass than this one: queueing once more, from it, comes after.
            engine = Variable._execution_engine
            engine.queue_callback(lambda: engine.queue_callback(ended))

        return seen

    def _after_backward(self) -> None:
        optimizer = self.optimizer
        if not self._drawn or optimizer.weights.in_context:
            return
        optimizer.window.take_only_sample(optimizer.weights.buckets, optimizer.hess_approx)
        if not self._pending:
            self.to_mean()


def _tensors(output: object) -> Iterator[Tensor]:
    """All tensors of a model's output: in tuples, lists, mappings, dataclasses."""
    if isinstance(output, Tensor):
        yield output
        return
    parts: Iterable[object]
    if isinstance(output, Mapping):
        parts = output.values()
    elif isinstance(output, (list, tuple)):
        parts = output
    else:
        parts = getattr(output, "__dict__", {}).values()
    for part in parts:
        yield from _tensors(part)
