"""AdaLoRA's tuner: which modules are adapted, how ranks are driven, what is saved."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...hooks import refuse_if_attached, schedule_finished, set_finished
from ...protocols import AnyOptimizer
from .. import targets
from ..base import BaseTuner, BaseTunerLayer, iter_adapters, register_tuner
from ..lora import LoraConfig
from ..low_rank import two_sides
from .config import AdaLoraConfig, VILoraConfig
from .export import FORMATS, as_plain_lora, cut_tensors, name_targets, rank_pattern, stock
from .hooks import AdaLoraHooks
from .layer import SVDLinear
from .orthogonality import penalty
from .triplets import Triplets

# Modules adapted by default, by `config.model_type`, where they are not LoRA's.
DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    "bart": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "deberta-v2": ("query_proj", "key_proj", "value_proj", "dense"),
    "mt5": ("k", "q", "v", "o", "wi_0", "wi_1", "wo"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "roberta": ("query", "key", "value", "dense"),
    "t5": ("q", "k", "v", "o", "wi", "wo"),
}


# Beside the tuners rather than on them: a deep copy of a model is not driven by the optimiser.
_drivers: weakref.WeakKeyDictionary[AdaLoraModel, dict[str, AdaLoraHooks]] = (
    weakref.WeakKeyDictionary()
)


@register_tuner("ADALORA", AdaLoraConfig)
class AdaLoraModel(BaseTuner[AdaLoraConfig]):
    """Adapters in SVD form on `nn.Linear` and `Conv1D`, whose ranks share a budget.

    `attach(model, optimizer, total_steps=T)` drives the ranks and the regulariser. Those who come
    with PEFT's loop call `update_and_allocate(step)` between `optimizer.step()` and `zero_grad()`
    instead, and add `orthogonality_loss()` to their loss.
    """

    target_types = "Linear and Conv1D layers"

    def __init__(
        self,
        model: nn.Module,
        config: AdaLoraConfig,
        adapter_name: str = "default",
        file: Path | None = None,
    ) -> None:
        super().__init__(model, config, adapter_name, file)
        self._manual: AdaLoraHooks | None = None  # what update_and_allocate drives
        self._by_hand: dict[str, AdaLoraHooks] = {}  # and has driven, by adapter
        self._optimizer: AnyOptimizer | None = None
        self._penalised = False  # whether the loop adds the regulariser, or was told to

    # --- injection ------------------------------------------------------------------------------
    def new_layer(self, base: nn.Module, name: str, config: AdaLoraConfig) -> BaseTunerLayer | None:
        """The wrapper for `base`; None for a type without one."""
        conv1d = targets.is_conv1d(base)
        if not (conv1d or isinstance(base, nn.Linear)):
            return None
        if not base.weight.is_floating_point():
            raise NotImplementedError(
                f"{name!r} is a quantised {type(base).__name__}: adapters on quantised bases are "
                "not implemented; load the base unquantised"
            )
        config.fan_in_fan_out = conv1d or config.fan_in_fan_out
        return SVDLinear(base)

    def add_to_layer(
        self, layer: BaseTunerLayer, adapter: str, name: str, config: AdaLoraConfig
    ) -> None:
        """Adds the adapter with init_r components, or those that `rank_pattern` keeps."""
        assert isinstance(layer, SVDLinear)
        whole = [True] * config.init_r
        layer.add_adapter(
            adapter,
            tuple((config.rank_pattern or {}).get(f"{name}.lora_E", whole)),
            config.lora_alpha,
            config.lora_dropout,
            config.init_lora_weights,
        )

    def check_config(self, config: AdaLoraConfig, names: list[str]) -> None:
        """Every key of `rank_pattern` must be a chosen module."""
        for key in config.rank_pattern or {}:
            if key.removesuffix(".lora_E") not in names:
                raise ValueError(
                    f"rank_pattern: {key!r} is none of the adapted modules"
                    + targets.suggestions(key, names)
                )

    def size(self, config: AdaLoraConfig, name: str, weight: Tensor) -> int:
        """Numbers in A and B; E is small beside them."""
        kept = (config.rank_pattern or {}).get(f"{name}.lora_E")
        return (config.init_r if kept is None else sum(kept)) * two_sides(weight)

    def _resolve(self, config: AdaLoraConfig) -> list[tuple[str, nn.Module]]:
        """The chosen modules; a pooler among them goes to `modules_to_save` (`train_pooler`)."""
        if config.target_modules is None:
            kind = getattr(getattr(self.model, "config", None), "model_type", None)
            config.target_modules = list(DEFAULT_TARGETS.get(str(kind), ())) or None
        chosen = super()._resolve(config)
        named = any("pooler" in entry for entry in targets.as_list(config.target_modules))
        poolers = {n[: n.rindex("pooler") + 6] for n, _ in chosen if "pooler" in n.split(".")}
        if not poolers or named or not config.train_pooler:
            return chosen
        config.modules_to_save = [*targets.as_list(config.modules_to_save), *sorted(poolers)]
        return super()._resolve(config)

    def svd_layers(self) -> Iterator[tuple[str, SVDLinear]]:
        """Names and adapted layers."""
        for name, layer in iter_adapters(self.model):
            assert isinstance(layer, SVDLinear)
            yield name, layer

    def _having(self, adapter: str) -> list[tuple[str, SVDLinear]]:
        self.adapter_config(adapter)
        return [(name, layer) for name, layer in self.svd_layers() if adapter in layer.adapters]

    # --- training -------------------------------------------------------------------------------
    def trained_adapter(self) -> str | None:
        """The active adapter whose parameters get gradients; None where all are frozen."""
        trained = [
            name
            for name in self.active_adapters
            if any(p.requires_grad for _, layer in self._having(name) for p in layer.triplets(name))
        ]
        if len(trained) > 1:
            raise ValueError(
                f"adapters {trained} are all trainable: a rank budget is one adapter's; freeze "
                "the others with inference_mode=True"
            )
        return trained[0] if trained else None

    def delete_adapter(self, name: str) -> None:
        """Removes an adapter, and what drove it."""
        super().delete_adapter(name)
        self._by_hand.pop(name, None)
        _drivers.get(self, {}).pop(name, None)

    def _hooks(
        self, optimizer: AnyOptimizer | None, total_steps: int | None, seed: int = 0
    ) -> AdaLoraHooks | None:
        adapter = self.trained_adapter()
        if adapter is None:
            return None
        triplets = Triplets(self._having(adapter), adapter)
        hooks = AdaLoraHooks(triplets, self.peft_config[adapter], optimizer, total_steps, seed)
        with torch.no_grad():
            for layer in triplets.layers:  # a new schedule starts from all there is
                layer.mask(adapter).fill_(1.0)
        _drivers.setdefault(self, {})[adapter] = hooks
        return hooks

    def training_hooks(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int | None,
        *,
        seed: int = 0,
    ) -> AdaLoraHooks | None:
        """The hooks of the one trainable adapter."""
        self._by_hand.clear()
        return self._hooks(optimizer, total_steps, seed)

    def set_optimizer(self, optimizer: AnyOptimizer) -> None:
        """For `update_and_allocate` with a posterior's criterion: the optimiser that has it."""
        self._optimizer = optimizer

    def update_and_allocate(self, global_step: int) -> None:
        """PEFT's manual way: once per step, after `optimizer.step()`, before `zero_grad()`.

        Args:
            global_step: 0, 1, … of the step just taken.

        Raises:
            RuntimeError: an optimiser is attached, or gradients are gone already.
            ValueError: `total_step` is not set.
        """
        refuse_if_attached(self)
        adapter = self.trained_adapter()
        if adapter is None:
            raise RuntimeError("update_and_allocate: no adapter is trainable")
        hooks = self._by_hand.get(adapter) or self._hooks(self._optimizer, None)
        assert hooks is not None  # there is something to train
        self._manual = self._by_hand[adapter] = hooks
        if hooks.weight > 0 and not self._penalised:
            self._penalised = True
            warnings.warn(
                "update_and_allocate does not add the orthogonality regulariser: add "
                "model.base_model.orthogonality_loss() to the loss, set orth_reg_weight=0, or "
                "leave both to attach(model, optimizer, total_steps=…)",
                stacklevel=2,
            )
        hooks.t, allocator = global_step, hooks.allocator
        if allocator.sees(global_step):
            if any(p.grad is None for p in hooks.triplets.parameters()):
                raise RuntimeError(
                    "update_and_allocate needs the gradients of the step: call it after "
                    "optimizer.step() and before optimizer.zero_grad()"
                )
            for stack in hooks.triplets.stacks:
                allocator.observe(stack, *allocator.read(stack))
        allocator.allocate(global_step)
        set_finished(self, hooks.finished, [adapter])

    def orthogonality_loss(self) -> Tensor:
        """γ times the regulariser, a scalar with a graph; only for loops without `attach`."""
        refuse_if_attached(self, "orthogonality_loss")
        self._penalised = True
        adapter = self.trained_adapter() or self.active_adapters[0]
        triplets = Triplets(self._having(adapter), adapter)
        return penalty(triplets, self.peft_config[adapter].orth_reg_weight)

    def history(self, adapter: str | None = None) -> list[dict[str, Any]]:
        """`{"step", "budget", "ranks": {module: rank}}` at cuts of the last training, for JSON."""
        hooks = self._driver(self.active_adapters[0] if adapter is None else adapter)
        return [] if hooks is None else hooks.history()

    def _driver(self, adapter: str) -> AdaLoraHooks | None:
        """What drives this adapter's ranks, or last did."""
        return _drivers.get(self, {}).get(adapter)

    # --- what is saved --------------------------------------------------------------------------
    def rank_pattern(self, adapter: str = "default") -> dict[str, list[bool]]:
        """`"<module>.lora_E"` → which of the init_r components are left."""
        return rank_pattern(self._having(adapter), adapter)

    def export(
        self, adapter: str, format: str | None = None, rank: int | None = None, force: bool = False
    ) -> tuple[LoraConfig, dict[str, Tensor]]:
        """What goes into a file: tensors without the pruned components once ranks are final.

        Before that everything is written, with `finished: false`, so that training can go on.

        Args:
            adapter: which adapter.
            format: None writes the adapter's own type with all options; `"adalora"` one that PEFT
                reads whatever the options; `"lora"` a plain LoRA adapter of one rank, of equal
                output, for PEFT and for servers.
            rank: with `"lora"`: that rank; None takes the largest there is.
            force: with a format, export ranks that are not final.
        """
        if format is not None and format not in FORMATS:
            raise ValueError(f"format={format!r}: use one of {', '.join(FORMATS)}")
        if rank is not None and format != "lora":
            raise ValueError("rank=… is for format='lora': elsewhere every module has its own")
        layers, finished = self._having(adapter), schedule_finished(self, adapter)
        if format is not None and not finished and not force:
            raise ValueError(
                f"adapter {adapter!r} has not its final ranks: train to the schedule's end, or "
                "export it as it is with force=True"
            )
        config = copy.deepcopy(self.peft_config[adapter])
        name_targets(self.model, config, [name for name, _ in layers])
        if format == "lora":
            return as_plain_lora(layers, adapter, config, rank)
        hooks = self._driver(adapter)
        if hooks is not None:
            config.total_step = hooks.total_steps
            for name, steps in hooks.schedule.items():
                setattr(config, name, steps)
        pattern = rank_pattern(layers, adapter)
        whole = all(all(kept) for kept in pattern.values())
        config.rank_pattern = None if whole and not finished else pattern
        return stock(config) if format == "adalora" else config, cut_tensors(layers, adapter)

    def compact(self, adapter: str | None = None) -> None:
        """Removes pruned components from the model itself; its output stays.

        The parameters are new ones: take an optimiser's `attach` off first, and make a new
        optimiser to go on training.
        """
        refuse_if_attached(self, "compact")
        adapter = self.active_adapters[0] if adapter is None else adapter
        layers = self._having(adapter)
        if not schedule_finished(self, adapter):
            raise ValueError(f"adapter {adapter!r} has not its final ranks: nothing to remove yet")
        if any(adapter in layer.merged_adapters for _, layer in layers):
            raise ValueError(f"adapter {adapter!r} is merged; unmerge it first")
        for _, layer in layers:
            layer.cut(adapter)
        self._by_hand.pop(adapter, None)

    def add_weighted_adapter(self, *args: object, **options: object) -> None:
        """Not for AdaLoRA: components of different adapters have no common singular vectors."""
        raise TypeError(
            f"{type(self).__name__} does not combine adapters; export them as plain LoRA "
            "(save_pretrained(folder, format='lora')) and combine those"
        )


@register_tuner("VILORA", VILoraConfig)
class VILoraModel(AdaLoraModel):
    """AdaLoRA that ranks components by a variational optimiser's posterior."""
