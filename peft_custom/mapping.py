"""Entry points: from a model and a configuration to an adapted model."""

from __future__ import annotations

from torch import nn

from .config import PeftConfig
from .peft_model import PeftModel, peft_model_class
from .tuners.base import tuner_class


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
) -> PeftModel:
    """Freezes `model`, puts adapters into it (in place) and wraps it by task type.

    Args:
        model: any module: this project's models, Hugging Face's, or your own.
        peft_config: for instance a `LoraConfig`; it is copied.
        adapter_name: name of the first adapter.
        autocast_adapter_dtype: accepted for PEFT's sake; adapters are fp32 in any case.
    """
    del autocast_adapter_dtype
    return peft_model_class(peft_config)(model, peft_config, adapter_name)


def inject_adapter_in_model(
    peft_config: PeftConfig, model: nn.Module, adapter_name: str = "default"
) -> nn.Module:
    """Puts adapters into `model` in place and returns it, unwrapped."""
    if model.__dict__.get("_injecting_tuners"):
        model.__dict__["_injecting_tuners"][0].add_adapter(adapter_name, peft_config)
        return model
    tuner = tuner_class(peft_config)(model, peft_config, adapter_name)
    model.__dict__["_injecting_tuners"] = [tuner]  # a plain list: no cycle of registered modules
    return model
