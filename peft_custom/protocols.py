"""What the parts of this package ask of each other, as types; nobody has to inherit from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from .hooks.base import TrainingHooks


class PosteriorOptimizer(Protocol):
    """An optimiser with a Gaussian posterior (IVON): all that a Bayesian criterion asks of it."""

    param_groups: list[dict[str, Any]]

    def posterior_std(self, param: nn.Parameter) -> Tensor:
        """σ of one parameter's entries, in the parameter's shape."""
        ...


class OptimizerWrapper(Protocol):
    """A wrapper that keeps the real optimiser in `.optimizer`, as accelerate's does."""

    optimizer: Optimizer


AnyOptimizer: TypeAlias = Optimizer | OptimizerWrapper


class TargetOptions(Protocol):
    """The options of an adapter's configuration that say which modules it goes into."""

    target_modules: list[str] | str | None
    modules_to_save: list[str] | None


class HookOwner(Protocol):
    """Whoever adapts while training: a tuner, or an object that stands for layers without one."""

    def training_hooks(
        self, model: nn.Module, optimizer: Optimizer, total_steps: int | None, **options: Any
    ) -> TrainingHooks | None:
        """Hooks for one training of `total_steps` applied steps; None where nothing adapts."""
        ...


class AdapterHolder(Protocol):
    """Whoever has adapter parameters: an adapted layer, or an owner of layers without a tuner."""

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters, all adapters together."""
        ...
