"""FSDP2: weights cut into one piece per process while a model is trained (torch's `fully_shard`).

    what                                    while trained                       gradient
    frozen weights                          a piece on each process             none
    trained ones of an adapter, its head    whole, equal on all processes       averaged once a step
    trained ones where all weights train    a piece, as are Adam's moments      reduced to the piece

A layer's pieces are gathered before its forward and its backward pass, and let go after. Adapters
stay whole because they are small, and because ranks, masks and posteriors are then computed as
without sharding. Before the first step and after the last the model is an ordinary one: loading,
looking at data, saving, decoding and reports know nothing of pieces, and checkpoints hold whole
tensors. Evaluation between steps gathers all weights meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from peft_custom.distributed import reduce_mean


class ShardedModel:
    """Shards a model, in place, until `end`.

    Args:
        model: on its device, equal on all processes; its layers are the entries of `ModuleList`s.
        optimizer: of its trained parameters; goes on with their pieces.
        keep: more parameters that stay whole, among tensors that may be none.
        trained_too: trained weights become pieces as well.
        free_after_forward: layers are let go between their forward and their backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        keep: Iterable[Tensor] = (),
        *,
        trained_too: bool = False,
        free_after_forward: bool = True,
    ) -> None:
        self.model, self.free_after_forward = model, free_after_forward
        plain = {module: (type(module), set(vars(module))) for module in model.modules()}
        kept = set(keep) | {p for p in model.parameters() if p.dim() == 0}  # no rows to share out
        if not trained_too:
            kept |= {p for p in model.parameters() if p.requires_grad}
        names = {parameter: name for name, parameter in model.named_parameters()}
        mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
        for layer in _layers(model):
            fully_shard(
                layer, mesh=mesh, ignored_params=kept, reshard_after_forward=free_after_forward
            )
        fully_shard(model, mesh=mesh, ignored_params=kept, reshard_after_forward=False)
        self._units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        # The whole model's forward pass begins them all, even where an evaluation calls layers.
        fully_shard.state(model)._lazy_init()
        # The class of every module as it was, and what fully_shard has noted there.
        self._before = {m: (kind, set(vars(m)) - own) for m, (kind, own) in plain.items()}
        self._replace(optimizer, names)
        self.averaged = [p for p in model.parameters() if p.requires_grad and p in kept]

    def _replace(self, optimizer: Optimizer, names: dict[nn.Parameter, str]) -> None:
        """The optimiser's parameters become the pieces, and so does what it knows of them."""
        now = dict(self.model.named_parameters())
        for group in optimizer.param_groups:
            before = group["params"]
            group["params"] = [now[names[parameter]] for parameter in before]
            for old, new in zip(before, group["params"], strict=True):
                if old is not new and old in optimizer.state:
                    state = optimizer.state.pop(old)
                    optimizer.state[new] = {k: _like(v, new, old) for k, v in state.items()}

    @torch.no_grad()
    def average_gradients(self) -> None:
        """Means over the processes for trained parameters that are whole, all in one exchange."""
        grads = [p.grad for p in self.averaged if p.grad is not None]
        if grads:
            torch._foreach_copy_(grads, reduce_mean(grads))

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All weights on every process: within it the processes need not pass in step."""
        self.model.set_reshard_after_forward(False)
        for unit in self._units:
            unit.unshard()
        try:
            yield
        finally:
            for unit in self._units:
                unit.reshard()
                unit.set_reshard_after_forward(
                    self.free_after_forward and unit is not self.model, recurse=False
                )

    @torch.no_grad()
    def end(self) -> None:
        """Makes the model an ordinary one, whole on every process; the optimiser is done with."""
        found: dict[nn.Parameter, nn.Parameter] = {}  # tied ones stay tied
        for unit in self._units:
            unit.reshard()
            state = fully_shard.state(unit)
            state._pre_forward_hook_handle.remove()
            state._post_forward_hook_handle.remove()
        for module, (kind, notes) in self._before.items():
            for name, parameter in module._parameters.items():
                if isinstance(parameter, DTensor):
                    if parameter not in found:
                        whole = parameter.full_tensor()
                        found[parameter] = nn.Parameter(whole, parameter.requires_grad)
                    module._parameters[name] = found[parameter]
            for name in notes:
                delattr(module, name)
            module.__class__ = kind


def gathered(tree: Any, keep: bool = True) -> Any:
    """The same with whole tensors, on the CPU, in place of pieces; all processes call it alike.

    Args:
        tree: dicts, lists and tuples of anything.
        keep: without, this process only gives its pieces to the others: it gets None for them.
    """
    if isinstance(tree, DTensor):
        whole = tree.detach().full_tensor()
        return whole.cpu() if keep else None
    if isinstance(tree, dict):
        return {key: gathered(value, keep) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(gathered(value, keep) for value in tree)
    return tree


def _like(value: Any, piece: nn.Parameter, whole: nn.Parameter) -> Any:
    """The part of a parameter's state that belongs to its piece."""
    if not isinstance(value, Tensor) or value.shape != whole.shape:
        return value
    return distribute_tensor(value, piece.device_mesh, piece.placements, src_data_rank=None)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules in `ModuleList`s: the layers of a transformer."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _layers(child)
