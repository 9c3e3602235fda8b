"""Adapters in existing models: PEFT's interface and files, on any `nn.Module`.

Usage:
    from peft_custom import LoraConfig, get_peft_model
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, target_modules="all-linear"))
    ...
    model.save_pretrained("adapter")
    model = PeftModel.from_pretrained(base_model, "adapter").merge_and_unload()
"""

from .config import PeftConfig, PeftType, TaskType
from .hooks import TrainingHooks, attach, attached_hooks
from .hotswap import hotswap_adapter
from .mapping import get_peft_model, inject_adapter_in_model
from .peft_model import PeftModel
from .save_and_load import (
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from .status import get_layer_status, get_model_status
from .task_models import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from .tuners.adalora import (
    CRITERIA,
    AdaLoraConfig,
    AdaLoraModel,
    SVDLinear,
    VILoraConfig,
    VILoraModel,
    criterion,
)
from .tuners.base import BaseTuner, BaseTunerLayer, iter_adapters, register_tuner
from .tuners.bim_lora import (
    BimLoraConfig,
    BIMLoRALinear,
    BimLoraModel,
    FeatureCollector,
    ImplicitMLP,
    MaskAllocator,
    get_bim_lora_model,
    load_bim_lora_model,
    mark_only_bim_lora_as_trainable,
    save_bim_lora_model,
)
from .tuners.dylora import DyLoraConfig, DyLoraLayer, DyLoraModel, configure_dylora
from .tuners.lora import LoraConfig, LoraLayer, LoraModel
from .tuners.spa import (
    BlockPruneConfig,
    BlockPruneModel,
    SpaConfig,
    SpaLayer,
    SpaModel,
    SplopaConfig,
    SplopaModel,
    SploraConfig,
    SploraModel,
    SpparaConfig,
    SpparaModel,
)

__all__ = [
    "AdaLoraConfig",
    "AdaLoraModel",
    "BIMLoRALinear",
    "BaseTuner",
    "BaseTunerLayer",
    "BimLoraConfig",
    "BimLoraModel",
    "BlockPruneConfig",
    "BlockPruneModel",
    "CRITERIA",
    "DyLoraConfig",
    "DyLoraLayer",
    "DyLoraModel",
    "FeatureCollector",
    "ImplicitMLP",
    "LoraConfig",
    "LoraLayer",
    "LoraModel",
    "MaskAllocator",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "SVDLinear",
    "SpaConfig",
    "SpaLayer",
    "SpaModel",
    "SplopaConfig",
    "SplopaModel",
    "SploraConfig",
    "SploraModel",
    "SpparaConfig",
    "SpparaModel",
    "TaskType",
    "TrainingHooks",
    "VILoraConfig",
    "VILoraModel",
    "attach",
    "attached_hooks",
    "configure_dylora",
    "criterion",
    "get_bim_lora_model",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "inject_adapter_in_model",
    "iter_adapters",
    "load_bim_lora_model",
    "load_peft_weights",
    "mark_only_bim_lora_as_trainable",
    "register_tuner",
    "save_bim_lora_model",
    "set_peft_model_state_dict",
]
