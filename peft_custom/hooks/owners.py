"""Who adapts in a model, and which live hooks drive it.

An *owner* is what `attach` asks for hooks: a tuner, any other module whose class has
`training_hooks`, or a registered `LayerOwner` where a model's own code built adaptive layers.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, Generic, NamedTuple, TypeVar

from torch import nn
from torch.optim import Optimizer

from ..protocols import HookOwner
from ..tuners.base import iter_tuners
from .base import TrainingHooks

LayerT = TypeVar("LayerT", bound=nn.Module)


class LayerOwner(Generic[LayerT]):
    """The owner of all layers of one kind that no tuner injected.

    An instance is made each time a model is searched, so the attachment is kept for `layers[0]`.
    """

    def __init__(self, layers: list[LayerT]) -> None:
        self.layers = layers

    @classmethod
    def layers_in(cls, model: nn.Module) -> list[LayerT]:
        """The layers in `model` that such an owner trains."""
        raise NotImplementedError

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        """The layers' adapter parameters."""
        raise NotImplementedError

    def training_hooks(
        self, model: nn.Module, optimizer: Optimizer, total_steps: int | None, **options: Any
    ) -> TrainingHooks | None:
        """As `BaseTuner.training_hooks`."""
        raise NotImplementedError


LayerOwnerT = TypeVar("LayerOwnerT", bound=type[LayerOwner])
LAYER_OWNERS: list[type[LayerOwner]] = []


def register_layer_owner(owner: LayerOwnerT) -> LayerOwnerT:
    """Class decorator: makes a `LayerOwner` known to `attach`, as `register_tuner` does a tuner."""
    LAYER_OWNERS.append(owner)
    return owner


def owners_in(model: nn.Module) -> Iterator[HookOwner]:
    """Tuners in `model`, then other modules with `training_hooks`, then owners of bare layers."""
    tuners = list(iter_tuners(model))
    yield from tuners
    for module in model.modules():
        # asked of the class: a wrapper's __getattr__ would answer for the model inside
        if callable(getattr(type(module), "training_hooks", None)) and module not in tuners:
            yield module
    for owner_class in LAYER_OWNERS:
        if layers := owner_class.layers_in(model):
            yield owner_class(layers)


class _Attachment(NamedTuple):
    """Weak references to the hooks an optimiser drives, and to this owner's own part of them."""

    hooks: weakref.ref[TrainingHooks]
    part: weakref.ref[TrainingHooks]


# Beside the modules rather than on them: a deep copy of a model is not driven by the optimiser.
_attached: weakref.WeakKeyDictionary[nn.Module, _Attachment] = weakref.WeakKeyDictionary()


def _module_of(owner: HookOwner) -> nn.Module:
    """The module that stands for the owner: itself, or the first of its layers."""
    return owner.layers[0] if isinstance(owner, LayerOwner) else owner


def note_attached(owner: HookOwner, hooks: TrainingHooks, part: TrainingHooks) -> None:
    """Remembers, weakly, that `hooks` are driven, and that `part` of them is the owner's."""
    _attached[_module_of(owner)] = _Attachment(weakref.ref(hooks), weakref.ref(part))


def note_detached(owner: HookOwner) -> None:
    """Forgets which hooks drove the owner."""
    _attached.pop(_module_of(owner), None)


def hooks_driving(owner: HookOwner) -> TrainingHooks | None:
    """The live hooks, of all the model's owners, that drive this one; None without."""
    attachment = _attached.get(_module_of(owner))
    return None if attachment is None else attachment.hooks()


def own_hooks(owner: HookOwner) -> TrainingHooks | None:
    """The owner's own part of the live hooks that drive it; None without."""
    attachment = _attached.get(_module_of(owner))
    return None if attachment is None else attachment.part()


def attached_hooks(model: nn.Module) -> TrainingHooks | None:
    """The live hooks that drive a tuner (or the first driven tuner in a model); None without."""
    driving = map(hooks_driving, owners_in(model))
    return next((hooks for hooks in driving if hooks is not None), None)


def refuse_if_attached(tuner: nn.Module, call: str = "update_and_allocate") -> None:
    """Raises where an optimiser drives the tuner: a manual call would adapt twice per step."""
    if attached_hooks(tuner) is not None:
        raise RuntimeError(
            f"{call} was called, but the optimiser this {type(tuner).__name__} is attached to does "
            f"that at every step; take the call out of the loop, or call hooks.remove() first"
        )
