"""Models to be edited by hand, with Hugging Face's checkpoint names and numerics.

Names are imported on first use, so that `import transformers_patched` costs nothing.
"""

from importlib import import_module
from typing import Any

_HEADS = (
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)
_MODULES = {
    ".auto": (
        "AutoConfig",
        "AutoModel",
        *(f"AutoModel{head}" for head in _HEADS[1:]),
        "AutoModelForCausalLM",
    ),
    ".files": ("CheckpointError",),
    ".configuration": (
        "BertConfig",
        "ConfigError",
        "DebertaV2Config",
        "GPT2Config",
        "PretrainedConfig",
        "RobertaConfig",
    ),
    ".models.bert.modeling_bert": tuple(f"Bert{head}" for head in _HEADS),
    ".models.deberta_v2.modeling_deberta_v2": tuple(f"DebertaV2{head}" for head in _HEADS),
    ".models.gpt2.modeling_gpt2": (
        "GPT2ForSequenceClassification",
        "GPT2LMHeadModel",
        "GPT2Model",
    ),
    ".models.roberta.modeling_roberta": tuple(f"Roberta{head}" for head in _HEADS),
    ".pretrained": ("PreTrainedModel",),
    ".tokenization": (
        "AutoTokenizer",
        "BatchEncoding",
        "BertTokenizer",
        "BertTokenizerFast",
        "DebertaV2Tokenizer",
        "DebertaV2TokenizerFast",
        "GPT2Tokenizer",
        "GPT2TokenizerFast",
        "PreTrainedTokenizer",
        "PreTrainedTokenizerFast",
        "RobertaTokenizer",
        "RobertaTokenizerFast",
    ),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
