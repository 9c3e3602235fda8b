"""BIM-LoRA's tuner: which layers it wraps, its optimiser groups, its hooks, its files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base import BaseTuner, BaseTunerLayer, iter_adapters, register_tuner
from ..lora import LoraConfig
from ..low_rank import two_sides
from ..targets import is_conv1d
from .config import BimLoraConfig
from .features import Features
from .hooks import BimLoraHooks, MaskRecords
from .layer import BIMLoRALinear


@register_tuner("BIM_LORA", BimLoraConfig)
class BimLoraModel(BaseTuner[BimLoraConfig]):
    """Block-masked low-rank adapters on `nn.Linear` and Hugging Face's `Conv1D`."""

    target_types = "Linear and Conv1D layers"

    def __init__(
        self,
        model: nn.Module,
        config: BimLoraConfig,
        adapter_name: str = "default",
        file: Path | None = None,
    ) -> None:
        # Before nn.Module's constructor, which add_adapter runs within.
        self.__dict__["records"] = MaskRecords()
        super().__init__(model, config, adapter_name, file)

    @property
    def initialised(self) -> set[str]:
        """Adapters whose mask has been set."""
        return self.records.initialised

    @property
    def mask_history(self) -> dict[str, dict[str, Any]]:
        """The mask's histogram over training, by adapter; see `BimLoraHooks.history`."""
        return self.records.mask_history

    @property
    def features(self) -> dict[str, Features]:
        """Features that were collected in this process, by adapter."""
        return self.records.features

    def new_layer(self, base: nn.Module, name: str, config: BimLoraConfig) -> BaseTunerLayer | None:
        """The wrapper for `base`; None for a type without one."""
        weight = getattr(base, "weight", None)
        if weight is not None and not weight.is_floating_point():
            raise NotImplementedError(
                f"{name!r} is a quantised {type(base).__name__}: block masks need a base whose "
                "weight can be read; load it unquantised"
            )
        if is_conv1d(base):
            config.fan_in_fan_out = True
            return BIMLoRALinear.wrap(base)
        return BIMLoRALinear.wrap(base) if isinstance(base, nn.Linear) else None

    def add_to_layer(
        self, layer: BaseTunerLayer, adapter: str, name: str, config: BimLoraConfig
    ) -> None:
        """Adds the adapter."""
        assert isinstance(layer, BIMLoRALinear)
        layer.add_adapter(adapter, config)

    def size(self, config: BimLoraConfig, name: str, weight: Tensor) -> int:
        """Numbers in A, B and Z, one a block."""
        b = config.block_size
        return config.r * two_sides(weight) + weight.numel() // b**2

    def bim_layers(self) -> Iterator[tuple[str, BIMLoRALinear]]:
        """Names and adapted layers."""
        for name, layer in iter_adapters(self.model):
            assert isinstance(layer, BIMLoRALinear)
            yield name, layer

    def training_hooks(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int | None,
        *,
        seed: int = 0,
    ) -> BimLoraHooks | None:
        """The hooks of the one trainable adapter."""
        trained = list(self.trained_configs())
        if len(trained) > 1:
            raise ValueError(
                f"adapters {trained} are all trainable: a mask's features are of one adapter; "
                "freeze the others with inference_mode=True"
            )
        if not trained:
            return None
        [adapter] = trained
        layers = {name: layer for name, layer in self.bim_layers() if adapter in layer.bim}
        config = self.peft_config[adapter]
        return BimLoraHooks(self.model, layers, config, adapter, self.records, total_steps, seed)

    def special_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """`lora` (A and B, at the given rate), `scores` (Z) and `head`, at multiples of it."""
        config = self.peft_config[self.active_adapters[0]]
        factors = [layer.bim[a] for _, layer in self.bim_layers() for a in layer.bim]
        low_rank = [p for f in factors for p in (f.lora_A, f.lora_B)]
        scores = [f.block_scores for f in factors]
        head = [p for _, wrapper in self._wrappers() for p in wrapper.parameters()]
        groups = [
            {"params": low_rank, "name": "lora", "lr": lr, "weight_decay": weight_decay},
            {
                "params": scores, "name": "scores", "lr": config.score_lr_ratio * lr,
                "weight_decay": 0.0, "max_grad_norm": config.score_max_grad_norm,
            },
            {
                "params": head, "name": "head", "lr": config.head_lr_ratio * lr,
                "weight_decay": 0.0, "max_grad_norm": config.head_max_grad_norm,
            },
        ]  # fmt: skip
        for group in groups:
            group["params"] = [p for p in group["params"] if p.requires_grad]
            group["betas"] = tuple(config.betas)
        return [group for group in groups if group["params"]]

    def import_state(self, adapter: str, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A finished adapter's mask is as it was trained: no features are collected for it."""
        if self.peft_config[adapter].finished:
            self.initialised.add(adapter)
        return state

    def delete_adapter(self, name: str) -> None:
        super().delete_adapter(name)
        self.initialised.discard(name)
        self.mask_history.pop(name, None)

    def export(
        self, adapter: str, as_lora: bool = False
    ) -> tuple[BimLoraConfig | LoraConfig, dict[str, Tensor]]:
        """What goes into a file; with `as_lora` a plain LoRA adapter, where that is the same.

        Raises:
            ValueError: `as_lora`, and a mask acts.
        """
        config, tensors = super().export(adapter)
        if not as_lora:
            return config, tensors
        if config.enable_masking:
            raise ValueError(
                f"as_lora: adapter {adapter!r} is no plain LoRA adapter: its increment E(m)∘(B A) "
                f"has a rank of up to r·min(p, q), {config.r} times the blocks along a matrix's "
                "shorter side, so no B and A of rank r hold it. merge_and_unload() gives a plain "
                "model with the same logits; save_pretrained() without as_lora keeps the adapter"
            )
        plain = LoraConfig(
            r=config.r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            **{
                name: getattr(config, name)
                for name in (
                    "base_model_name_or_path", "revision", "task_type", "auto_mapping",
                    "target_modules", "modules_to_save", "fan_in_fan_out", "bias",
                    "layers_to_transform", "layers_pattern", "exclude_modules",
                )
            },
        )  # fmt: skip
        renamed = {}
        for name, tensor in tensors.items():
            module, _, part = name.rpartition(".bim.")
            if part in ("lora_A", "lora_B"):
                renamed[f"{module}.{part}.weight"] = tensor
        return plain, renamed
