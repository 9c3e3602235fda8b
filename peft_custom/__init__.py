"""Adapters in existing models: PEFT's interface and files, on any `nn.Module`.

Usage:
    from peft_custom import LoraConfig, get_peft_model
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, target_modules="all-linear"))
    ...
    model.save_pretrained("adapter")
    model = PeftModel.from_pretrained(base_model, "adapter").merge_and_unload()
"""

from . import tuners
from .config import PeftConfig, PeftType, TaskType
from .hooks import TrainingHooks, attach, attached_hooks
from .mapping import get_peft_model, inject_adapter_in_model
from .peft_model import PeftModel
from .save_and_load import (
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from .status import get_layer_status, get_model_status
from .tasks import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from .tuners.base import BaseTuner, BaseTunerLayer, iter_adapters, register_tuner

__all__ = [
    "BaseTuner",
    "BaseTunerLayer",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "TaskType",
    "TrainingHooks",
    "attach",
    "attached_hooks",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "iter_adapters",
    "load_peft_weights",
    "register_tuner",
    "set_peft_model_state_dict",
]

# Each method's package says what it offers (`LoraConfig`, …); a new one needs no line here.
for _package in tuners.load_all():
    globals().update({name: getattr(_package, name) for name in _package.__all__})
    __all__ += _package.__all__
