"""DyLoRA's tuner: LoRA's injection with nested layers, one rank for the model, export at a rank."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from loralib import dylora as nested

from ..base import BaseTunerLayer, iter_adapters, register_tuner
from ..lora import layer as plain
from ..lora.config import LoraConfig
from ..lora.model import LoraModel
from .config import DyLoraConfig
from .hooks import DyLoraHooks, NestedFactors, NestedGroup
from .layer import DyLoraLayer, Embedding, Linear


@register_tuner("DYLORA", DyLoraConfig)
class DyLoraModel(LoraModel):
    """Nested low-rank adapters on `nn.Linear`, `nn.Embedding` and Hugging Face's `Conv1D`.

    Ranks are 1-based. In evaluation mode the rank is R (after loading, too) until `set_rank`; in
    training mode it is the one that the attached hooks sampled for the step.
    """

    target_types = "Linear, Embedding and Conv1D layers"

    def new_layer(self, base: nn.Module, name: str, config: DyLoraConfig) -> BaseTunerLayer | None:
        """The wrapper for `base`; None for a type without one."""
        kinds = {plain.Linear: Linear, plain.Embedding: Embedding}
        kind = kinds.get(type(super().new_layer(base, name, config)))
        return None if kind is None else kind(base)

    def add_to_layer(
        self, layer: BaseTunerLayer, adapter: str, name: str, config: DyLoraConfig
    ) -> None:
        """Adds the adapter, with the weights of its components where the mode has some."""
        super().add_to_layer(layer, adapter, name, config)
        assert isinstance(layer, DyLoraLayer)
        layer.nested[adapter].weigh(config.sampling.weights)

    # --- ranks ----------------------------------------------------------------------------------
    def set_rank(self, rank: int, frozen: bool = False) -> None:
        """Computes with rank `rank` from now on; merged layers are merged again at that rank.

        While hooks are attached, training mode goes on with the ranks they sample.

        Args:
            rank: b, from 1 to R.
            frozen: without hooks, training gives only the b-th component a gradient.
        """
        nested.set_rank(self.model, rank, frozen)

    def get_rank(self) -> int:
        """The rank that the model computes with in its present mode."""
        return nested.get_rank(self.model)

    def at_rank(self, rank: int) -> AbstractContextManager[None]:
        """Within the context the model evaluates with this rank; afterwards as before."""
        return nested.at_rank(self.model, rank)

    def batched_ranks(
        self, ranks: Sequence[int], tokens: int | None = None
    ) -> AbstractContextManager[None]:
        """Within the context a batch that holds the same rows K times is computed at K ranks.

        Args:
            ranks: b_1 … b_K; the part of rank b_1 comes first. Padded (K·n, L, …) or packed
                (K·t, …).
            tokens: of one part; only for encoders that append filler rows.
        """
        return nested.batched_ranks(self.model, ranks, tokens)

    def adapts(self, adapter: str) -> bool:
        """Always: a step has a rank."""
        return True

    # --- training -------------------------------------------------------------------------------
    def training_hooks(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int | None,
        *,
        seed: int = 0,
    ) -> DyLoraHooks:
        """Hooks that sample the ranks of the active adapters."""
        groups = []
        for adapter in self.active_adapters:
            layers = [
                NestedFactors(layer.nested[adapter], *layer.factors(adapter))
                for _, layer in iter_adapters(self.model)
                if isinstance(layer, DyLoraLayer) and adapter in layer.nested
            ]
            groups.append(NestedGroup(self.peft_config[adapter].sampling, layers))
        return DyLoraHooks(groups, optimizer, total_steps, seed)

    # --- files ----------------------------------------------------------------------------------
    def export(self, adapter: str, rank: int | None = None) -> tuple[LoraConfig, dict[str, Tensor]]:
        """What goes into a file: the nested adapter, or with `rank` a plain LoRA adapter of it.

        The plain one has r = rank and the same α, so PEFT computes what this model computes at
        that rank. `model.save_pretrained(folder, rank=4)` writes it.
        """
        config, tensors = super().export(adapter)
        if rank is None:
            return config, tensors
        for name, layer in self.lora_layers():
            if isinstance(layer, DyLoraLayer) and adapter in layer.nested:
                nested = layer.nested[adapter]
                b = nested.active_rank(rank).rank
                keys = [f"{name}.{key}" for key in layer.adapter_tensors(adapter)]
                factors = nested.plain_factors(*(tensors[key].detach() for key in keys), b)
                tensors.update(zip(keys, factors, strict=True))
        return config.at_rank(rank), tensors

    def add_weighted_adapter(self, *args: object, **kwargs: object) -> None:
        raise NotImplementedError(
            "nested adapters cannot be combined: export each at a rank, with "
            "save_pretrained(folder, rank=…), and combine them as LoRA adapters"
        )
