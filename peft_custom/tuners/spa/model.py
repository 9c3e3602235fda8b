"""The tuners: which layers are adapted, what trains beside them, their masks and their groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from loralib.decay import is_norm

from ...config import PeftConfig
from .. import targets
from ..base import BaseTuner, BaseTunerLayer, iter_adapters, register_tuner
from .compact import compacted
from .config import BlockPruneConfig, SpaConfig, SplopaConfig, SploraConfig, SpparaConfig
from .counts import summary
from .hooks import SpaHooks
from .increments import Dense, Increment, LowRank, Parallel, Shared
from .layer import Factors, SpaLayer
from .masks import Masks, Member
from .structures import Link, links

# Matrices of attention and feed-forward, by `config.model_type`.
DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    "bert": ("query", "key", "value", "output.dense", "intermediate.dense"),
    "deberta-v2": ("query_proj", "key_proj", "value_proj", "output.dense", "intermediate.dense"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "roberta": ("query", "key", "value", "output.dense", "intermediate.dense"),
}


class SpaModel(BaseTuner[SpaConfig]):
    """What the four methods share; a method says what it adds to a weight."""

    target_types = "Linear and Conv1D layers"
    convolutions = False

    def __init__(
        self,
        model: nn.Module,
        config: SpaConfig,
        adapter_name: str = "default",
        file: Path | None = None,
    ) -> None:
        # Before nn.Module's constructor, which add_adapter runs within.
        self.__dict__["masks"] = {}  # adapter → its masks
        super().__init__(model, config, adapter_name, file)

    # --- what a method implements ---------------------------------------------------------------
    def new_increment(self, layer: SpaLayer, config: SpaConfig) -> Increment:
        """ΔW of one layer, at its start."""
        raise NotImplementedError

    # --- injection ------------------------------------------------------------------------------
    def new_layer(self, base: nn.Module, name: str, config: SpaConfig) -> BaseTunerLayer | None:
        """The wrapper for `base`; None for a type without one."""
        convolution = self.convolutions and isinstance(base, _ConvNd) and not base.transposed
        if not (convolution or isinstance(base, nn.Linear) or targets.is_conv1d(base)):
            return None
        if not base.weight.is_floating_point():
            raise NotImplementedError(
                f"{name!r} is a quantised {type(base).__name__}: masks need a base whose weight "
                "can be read; load it unquantised"
            )
        return SpaLayer(base)

    def add_to_layer(
        self, layer: BaseTunerLayer, adapter: str, name: str, config: SpaConfig
    ) -> None:
        """Adds increment and bias; masks follow when all layers are there."""
        assert isinstance(layer, SpaLayer)
        bias = layer.base_layer.bias if config.train_bias else None
        layer.spa[adapter] = Factors(self.new_increment(layer, config), bias)

    def _resolve(self, config: SpaConfig) -> list[tuple[str, nn.Module]]:
        """The chosen modules; pooler and norms go to `modules_to_save`."""
        if config.target_modules is None:
            kind = getattr(getattr(self.model, "config", None), "model_type", None)
            config.target_modules = list(DEFAULT_TARGETS.get(str(kind), ())) or None
        names = [name for name, _ in self.model.named_modules()]
        named = any("pooler" in entry for entry in targets.as_list(config.target_modules))
        if config.train_pooler and not named:
            _also_save(config, [n for n in names if n.rpartition(".")[2] == "pooler"])
        chosen = super()._resolve(config)
        if config.train_norms:
            _also_save(config, self._norms([name for name, _ in chosen]))
        return chosen

    def _norms(self, names: list[str]) -> list[str]:
        """Normalisation layers of the numbered layers (`encoder.layer.3`) that are adapted."""
        numbered = tuple({f"{prefix}." for name in names if (prefix := _numbered(name))})
        walked = targets.walk(self.model, (BaseTunerLayer,))
        return [n for n, m in walked if is_norm(m) and n.startswith(numbered)] if numbered else []

    def _wrap(self, adapter: str, config: SpaConfig, chosen: list[tuple[str, nn.Module]]) -> None:
        """Wraps the modules, then gives them masks; what does not fit is an error before."""
        found = list(links(self.model, [name for name, _ in chosen], config.mask_structure))
        linked = {name for link in found for name in (*link.producers, link.consumer)}
        for name, module in chosen:
            base = module.base_layer if isinstance(module, SpaLayer) else module
            self._check_blocks(name, base, config, name in linked)
        self.__dict__["_shared"] = Shared(config) if isinstance(config, SplopaConfig) else None
        super()._wrap(adapter, config, chosen)
        layers = {name: self.model.get_submodule(name) for name, _ in chosen}
        self.masks[adapter] = _make_masks(layers, found, adapter, config)

    def _check_blocks(self, name: str, base: nn.Module, config: SpaConfig, linked: bool) -> None:
        if isinstance(base, _ConvNd):
            if any(k % 2 == 0 for k in base.kernel_size):
                raise ValueError(
                    f"{name!r}: kernel {base.kernel_size} has no centre; use odd sizes"
                )
            return
        masked = config.mask_structure != "linked" and not linked
        if not masked and not isinstance(config, SplopaConfig) or not hasattr(base, "weight"):
            return
        shape = base.weight.T.shape if targets.is_conv1d(base) else base.weight.shape
        p, q = config.mask_block_rows, config.mask_block_cols
        if shape[0] % p or shape[1] % q:
            raise ValueError(
                f"mask_block_rows={p}, mask_block_cols={q} do not divide {name!r} of {shape[0]} × "
                f"{shape[1]}; choose sizes that do, or leave it out with exclude_modules"
            )

    def delete_adapter(self, name: str) -> None:
        """Removes an adapter and its masks."""
        super().delete_adapter(name)
        self.masks.pop(name, None)

    def train(self, mode: bool = True) -> SpaModel:
        """Sets the mode, and looks whether the final masks are still those of the scores."""
        super().train(mode)
        for masks in self.__dict__.get("masks", {}).values():
            masks.forget()
            masks.refresh()
        return self

    def spa_layers(self, adapter: str) -> Iterator[tuple[str, SpaLayer]]:
        """Names and layers that have the adapter."""
        for name, layer in iter_adapters(self.model):
            if isinstance(layer, SpaLayer) and adapter in layer.spa:
                yield name, layer

    # --- training -------------------------------------------------------------------------------
    def training_hooks(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int | None,
        *,
        seed: int = 0,
    ) -> SpaHooks | None:
        """The hooks of the one trainable adapter."""
        trained = list(self.trained_configs())
        if len(trained) > 1:
            raise ValueError(f"adapters {trained} are all trainable; only one can be active")
        if not trained:
            return None
        return SpaHooks(self.masks[trained[0]], total_steps, seed)

    def special_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """`mask_scores`, `adapter` (increments) and `prototypes`, with their own rates."""
        adapter = self.active_adapters[0]
        config = self.peft_config[adapter]
        parts: dict[str, list[nn.Parameter]] = {"mask_scores": [], "adapter": [], "prototypes": []}
        for _, layer in self.spa_layers(adapter):
            for key, p in layer.spa[adapter].named_parameters():
                if key.endswith("mask_scores"):
                    parts["mask_scores"].append(p)
                elif key != "bias":  # which is among those that are not decayed
                    parts["prototypes" if ".prototypes." in key else "adapter"].append(p)
        rates = {
            "mask_scores": config.mask_scores_learning_rate,
            "adapter": config.adapter_learning_rate,
            "prototypes": getattr(config, "prototype_learning_rate", None),
        }
        groups = []
        for name, parameters in parts.items():
            group = {
                "name": name,
                "params": [p for p in parameters if p.requires_grad],
                "lr": lr if rates[name] is None else rates[name],
                "weight_decay": 0.0 if name == "mask_scores" else weight_decay,
            }
            if name == "mask_scores" and not (
                config.clip_regularization and config.mask_scores_max_grad_norm == 0
            ):  # by themselves, or not at all; else with all the others
                group["max_grad_norm"] = config.mask_scores_max_grad_norm
            groups.append(group)
        return [group for group in groups if group["params"]]

    # --- what is left ---------------------------------------------------------------------------
    def pruning_summary(
        self, threshold: float | None = None, adapter: str | None = None
    ) -> dict[str, int | float]:
        """How much the masks keep, and what the adapter costs; see `counts.summary`.

        Args:
            threshold: τ; None takes the final one.
            adapter: None takes the active one.
        """
        adapter = self.active_adapters[0] if adapter is None else adapter
        self.adapter_config(adapter)
        layers = dict(self.spa_layers(adapter))
        return summary(self.model, layers, self.masks[adapter], adapter, threshold)

    def final_masks(self, adapter: str | None = None) -> dict[str, Tensor]:
        """Copies of the final masks: module → blocks (o/p, i/q), units of its inputs or outputs."""
        adapter = self.active_adapters[0] if adapter is None else adapter
        self.masks[adapter].refresh()
        own = {
            name: (f.blocks, f.inputs, f.outputs)
            for name, layer in self.spa_layers(adapter)
            for f in (layer.spa[adapter],)
        }
        return {
            name: mask.final.cpu().clone()
            for name, masks in own.items()
            for mask in masks
            if mask is not None
        }

    def compact(self, adapter: str | None = None) -> nn.Module:
        """An ordinary, smaller model of the base's class: merged, useless heads and units cut out.

        What no head of a layer needs is taken out of all of them. Linear layers become
        `loralib.block_sparse.BlockSparseLinear` where scattered blocks are so few that leaving
        them out is faster; `config.sparse_blocks` then says so.

        Its outputs are the adapted model's in evaluation mode, up to rounding; this model stays as
        it is. `save_pretrained` of the result writes the sizes of its layers.

        Args:
            adapter: None takes the active one.
        """
        adapter = self.active_adapters[0] if adapter is None else adapter
        self.adapter_config(adapter)
        return compacted(self, adapter)

    def export(self, adapter: str, as_lora: bool = False) -> tuple[PeftConfig, dict[str, Tensor]]:
        """What goes into a file.

        Raises:
            ValueError: `as_lora`: a masked weight is no base weight plus a low-rank one.
        """
        if as_lora:
            raise ValueError(
                f"as_lora: adapter {adapter!r} prunes the base's weights, which no LoRA adapter "
                "can; merge_and_unload() gives a plain model with the same logits, compact() a "
                "smaller one. save_pretrained() without as_lora keeps the adapter"
            )
        return super().export(adapter)


@register_tuner("BLOCK_PRUNE", BlockPruneConfig)
class BlockPruneModel(SpaModel):
    """Fine-pruning of `nn.Linear` and `Conv1D`."""

    def new_increment(self, layer: SpaLayer, config: SpaConfig) -> Increment:
        return Dense(layer._stored())

    def size(self, config: SpaConfig, name: str, weight: Tensor) -> int:
        return weight.numel()


@register_tuner("SPLOPA", SplopaConfig)
class SplopaModel(SpaModel):
    """Prototype adapters on `nn.Linear` and `Conv1D`."""

    def new_increment(self, layer: SpaLayer, config: SpaConfig) -> Increment:
        device = layer.base_layer.weight.device
        return self._shared.mixture(layer.out_features, layer.in_features, device)

    def size(self, config: SplopaConfig, name: str, weight: Tensor) -> int:
        block = config.mask_block_rows * config.mask_block_cols
        return config.num_prototypes * weight.numel() // block


@register_tuner("SPLORA", SploraConfig)
class SploraModel(SpaModel):
    """Low-rank adapters with channel masks."""

    target_types = "Linear, Conv1D and Conv1d, 2d, 3d layers"
    convolutions = True

    def new_increment(self, layer: SpaLayer, config: SploraConfig) -> Increment:
        sizes = layer.out_features, layer.in_features
        return LowRank(*sizes, config, layer.base_layer.weight.device)

    def size(self, config: SploraConfig, name: str, weight: Tensor) -> int:
        return config.rank(weight.shape[0]) * (weight.shape[0] + weight.shape[1])


@register_tuner("SPPARA", SpparaConfig)
class SpparaModel(SpaModel):
    """Full-rank parallel adapters of convolutions with channel masks."""

    target_types = "Conv1d, 2d and 3d layers"
    convolutions = True

    def new_layer(self, base: nn.Module, name: str, config: SpaConfig) -> BaseTunerLayer | None:
        """Only for convolutions: of a linear map A would be all there is."""
        return super().new_layer(base, name, config) if isinstance(base, _ConvNd) else None

    def new_increment(self, layer: SpaLayer, config: SpparaConfig) -> Increment:
        sizes = layer.out_features, layer.in_features
        return Parallel(*sizes, config, layer.base_layer.weight.device)

    def size(self, config: SpparaConfig, name: str, weight: Tensor) -> int:
        return weight.shape[0] * weight.shape[1]


def _also_save(config: SpaConfig, names: list[str]) -> None:
    saved = targets.as_list(config.modules_to_save)
    new = [name for name in names if not targets.under(name, saved)]
    config.modules_to_save = [*saved, *new] or None


def _numbered(name: str) -> str:
    """`bert.encoder.layer.3` of what lies in it; empty where no list is on the way."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts[:-1]) if part.isdecimal()), None)
    return "" if at is None else ".".join(parts[: at + 1])


def _make_masks(
    layers: Mapping[str, nn.Module], found: list[Link], adapter: str, config: SpaConfig
) -> Masks:
    """Masks of linked units, then blocks or output channels of the other layers."""
    masks, linked = Masks(config), set()
    for link in found:
        consumer = layers[link.consumer]
        units = consumer.in_features // link.size
        mask = masks.add((units,), (link.size,), consumer.base_layer.weight.device)
        mask.members = [Member(consumer, adapter, "columns")]
        consumer.spa[adapter].inputs = mask
        for name in link.producers:
            mask.members.append(Member(layers[name], adapter, "rows", link.kind.segments))
            layers[name].spa[adapter].make_rows(mask, link.kind.segments)
        linked |= {*link.producers, link.consumer}
    for name, layer in layers.items():
        f, device = layer.spa[adapter], layer.base_layer.weight.device
        f.masks = masks
        if name in linked:
            continue
        if layer.convolution or config.mask_structure == "linked":
            f.outputs = mask = masks.add((layer.out_features,), (1,), device)
        else:
            size = config.mask_block_rows, config.mask_block_cols
            grid = layer.out_features // size[0], layer.in_features // size[1]
            f.blocks = mask = masks.add(grid, size, device)
        mask.members = [Member(layer, adapter, "blocks" if mask is f.blocks else "rows")]
    return masks
