"""LoRA's tuner: which layer wraps which base, and with which rank and α."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...hooks import TrainingHooks
from ..base import BaseTuner, BaseTunerLayer, iter_adapters, register_tuner
from ..low_rank import two_sides
from ..modules_to_save import ModulesToSaveWrapper
from ..targets import check_patterns, is_conv1d, pattern_value
from .base_starts import moves_base
from .combine import Combination, combined_adapter
from .config import LoraConfig
from .data_ranks import DataRankHooks, cut_to_masks, most_components
from .export import as_plain_lora
from .layer import Conv2d, Embedding, Linear, LoraLayer
from .loraplus import loraplus_groups


@register_tuner("LORA", LoraConfig)
class LoraModel(BaseTuner[LoraConfig]):
    """Low-rank adapters on `nn.Linear`, `nn.Embedding`, `nn.Conv2d` and Hugging Face's `Conv1D`."""

    target_types = "Linear, Embedding, Conv2d and Conv1D layers"

    def new_layer(self, base: nn.Module, name: str, config: LoraConfig) -> BaseTunerLayer | None:
        """The wrapper for `base`; None for a type without one."""
        weight = getattr(base, "weight", None)
        if weight is None or not weight.is_floating_point():
            quantised = weight is not None or type(base).__name__.startswith(("Linear4", "Linear8"))
            if quantised:
                raise NotImplementedError(
                    f"{name!r} is a quantised {type(base).__name__}: adapters on quantised bases "
                    "are not implemented; load the base unquantised"
                )
            return None
        if isinstance(base, nn.Conv2d):
            if base.groups != 1:
                raise NotImplementedError(f"{name!r}: LoRA on a grouped Conv2d is not implemented")
            return Conv2d(base)
        if isinstance(base, nn.Embedding):
            return Embedding(base)
        if is_conv1d(base):
            config.fan_in_fan_out = True
            return Linear(base)
        return Linear(base) if isinstance(base, nn.Linear) else None

    def add_to_layer(
        self, layer: BaseTunerLayer, adapter: str, name: str, config: LoraConfig
    ) -> None:
        """Adds the adapter with this module's rank and α."""
        assert isinstance(layer, LoraLayer)
        r = pattern_value(config.rank_pattern, name, config.r)
        alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
        room = r if config.rank_from is None else most_components(layer, r, config.rho)
        layer.add_adapter(
            adapter,
            r=room,
            lora_alpha=alpha if room == r else alpha * room / r,
            lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            init_lora_weights=config.init_lora_weights,
        )
        if config.rank_from is not None:
            layer.add_rank_mask(adapter, r)
        if config.use_dora:
            layer.add_magnitude(adapter)

    def check_config(self, config: LoraConfig, names: list[str]) -> None:
        """Every key of `rank_pattern` and `alpha_pattern` must fit a chosen module."""
        check_patterns("rank_pattern", config.rank_pattern, names)
        check_patterns("alpha_pattern", config.alpha_pattern, names)

    def size(self, config: LoraConfig, name: str, weight: Tensor) -> int:
        """Numbers in A and B of the rank that this module gets."""
        rank = pattern_value(config.rank_pattern, name, config.r)
        return rank * two_sides(weight)

    # --- ranks from data ------------------------------------------------------------------------
    def adapts(self, adapter: str) -> bool:
        """Whether something has to be done around training: ranks from data."""
        return self.peft_config[adapter].rank_from is not None

    def training_hooks(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int | None,
        *,
        seed: int = 0,
        **options: Any,
    ) -> TrainingHooks | None:
        """Hooks whose `prepare` sets ranks and starts, where the adapter asks for that."""
        asking = [name for name in self.trained_adapters if self.adapts(name)]
        if not asking:
            return None
        if options:
            raise TypeError(f"attach: rank_from takes no {', '.join(options)}")
        if len(asking) > 1:
            raise ValueError(f"rank_from: adapters {asking} cannot be prepared at once")
        [adapter], config = asking, self.peft_config[asking[0]]
        layers = self._ranked_layers(adapter)
        ranks = {n: pattern_value(config.rank_pattern, n, config.r) for n in layers}
        return DataRankHooks(model, layers, adapter, config, ranks, total_steps, seed)

    def _ranked_layers(self, adapter: str) -> dict[str, Linear]:
        linear = {n: x for n, x in self.lora_layers() if isinstance(x, Linear)}
        return {n: x for n, x in linear.items() if x.has_rank_mask(adapter)}

    def ranks(self, adapter: str = "default") -> dict[str, int]:
        """The rank of every module, whether from data, by a pattern, or one for all."""
        layers = {name: layer for name, layer in self.lora_layers() if adapter in layer.adapters}
        return {name: layer.rank(adapter) for name, layer in layers.items()}

    def special_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """LoRA+'s groups where an adapter in training has `loraplus_lr_ratio`; else none."""
        configs = [self.peft_config[name] for name in self.trained_adapters]
        rates = {(c.loraplus_lr_ratio, c.loraplus_lr_embedding) for c in configs}
        rates = {pair for pair in rates if pair[0] is not None}
        if len(rates) > 1:
            raise ValueError(f"adapters that train together have different LoRA+ rates: {rates}")
        return [g for pair in rates for g in loraplus_groups(self.model, lr, weight_decay, *pair)]

    def lora_layers(self) -> Iterator[tuple[str, LoraLayer]]:
        """Names and adapted layers."""
        for name, layer in iter_adapters(self.model):
            assert isinstance(layer, LoraLayer)
            yield name, layer

    def export(
        self, adapter: str, convert_pissa_to_lora: bool | None = None
    ) -> tuple[LoraConfig, dict[str, Tensor]]:
        """Configuration and tensors as they go into a file.

        A PiSSA or OLoRA adapter is relative to the residual base. An adapter of kind `"pissa"` or
        `"olora"` is written as it is: loading it repeats the SVD or QR and finds the same residual.
        A randomised SVD cannot be repeated, so `"pissa_niter_<k>"`, and any kind with
        `convert_pissa_to_lora=True`, becomes a plain LoRA adapter of twice the rank for the
        original base.
        """
        config, tensors = super().export(adapter)
        if config.rank_from is not None:
            return cut_to_masks(self._ranked_layers(adapter), adapter, config, tensors)
        init = str(config.init_lora_weights)
        convert = convert_pissa_to_lora
        if convert is None:
            convert = init.startswith("pissa_niter")
        if convert and moves_base(init):
            return as_plain_lora(self.lora_layers(), adapter, config, tensors)
        if convert:
            raise ValueError(
                f"convert_pissa_to_lora: adapter {adapter!r} did not start from PiSSA or OLoRA"
            )
        return config, tensors

    def import_state(self, adapter: str, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Folds increments that PEFT 0.11 put on a module it also saved in full.

        With `"all-linear"` it adapts the classification head and writes the head's weight and its
        factors; here such a head is trained in full, so it starts from their sum.
        """
        config = self.peft_config[adapter]
        result = dict(state)
        for name, module in self.model.named_modules():
            if not isinstance(module, ModulesToSaveWrapper):
                continue
            for key in [k for k in state if k.startswith(f"{name}.") and ".base_layer." in f".{k}"]:
                result[key.replace("base_layer.", "")] = result.pop(key)
            for key in [
                k for k in state if k.startswith(f"{name}.") and k.endswith("lora_A.weight")
            ]:
                target = key.removesuffix(".lora_A.weight")
                A, B = result.pop(key), result.pop(f"{target}.lora_B.weight")
                if f"{target}.weight" not in result:
                    continue  # one of PEFT's second copies
                rank = pattern_value(config.rank_pattern, target, config.r)
                alpha = pattern_value(config.alpha_pattern, target, config.lora_alpha)
                scaling = alpha / (rank**0.5 if config.use_rslora else rank)
                result[f"{target}.weight"] = result[f"{target}.weight"] + scaling * (B @ A)
        return result

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Adds adapter `adapter_name`, combined from `adapters` by `weights`; it is not activated.

        Args:
            adapters: names of the sources.
            weights: one weight each; negative ones subtract.
            adapter_name: name of the result.
            combination_type: see the table at the top of `combine.py`.
            svd_full_matrices: accepted for PEFT's sake; the result is the same.
            svd_rank, svd_clamp, svd_driver, density, majority_sign_method: see `Combination`.
        """
        del svd_full_matrices
        how = Combination(
            combination_type, svd_rank, svd_clamp, svd_driver, density, majority_sign_method
        )
        if not adapters or len(adapters) != len(weights):
            raise ValueError(
                f"{len(adapters)} adapters and {len(weights)} weights: one weight each"
            )
        configs = [self.adapter_config(name) for name in adapters]
        saved = [module for _, module in self._wrappers()]
        for module in saved:
            having = [name for name in adapters if name in module.modules_to_save]
            if len(having) > 1:
                raise ValueError(
                    f"adapters {having} each saved the same module in full; there is "
                    "no one head for their combination"
                )
        sources = list(zip(adapters, weights, strict=True))
        config, results = combined_adapter(self.lora_layers(), sources, configs, how)
        self.add_adapter(adapter_name, config)
        for name, layer in self.lora_layers():
            if name in results:
                for target, value in zip(layer.factors(adapter_name), results[name], strict=True):
                    target.data.copy_(value.view_as(target))
        for module in saved:
            copies = module.modules_to_save
            for source in adapters:
                if source in copies and adapter_name in copies:
                    copies[adapter_name].load_state_dict(copies[source].state_dict())
