"""The class that a checkpoint's `model_type` asks for.

A new model is one line in `MODELS`: its configuration, its module, and the prefix of its classes.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from .configuration import (
    BertConfig,
    DebertaV2Config,
    PretrainedConfig,
    RobertaConfig,
    read_config,
)
from .files import CheckpointError

MODELS: dict[str, tuple[type[PretrainedConfig], str, str]] = {
    "bert": (BertConfig, ".models.bert.modeling_bert", "Bert"),
    "roberta": (RobertaConfig, ".models.roberta.modeling_roberta", "Roberta"),
    "deberta-v2": (DebertaV2Config, ".models.deberta_v2.modeling_deberta_v2", "DebertaV2"),
}


def _entry(model_type: str | None, source: object) -> tuple[type[PretrainedConfig], str, str]:
    if not isinstance(model_type, str) or model_type not in MODELS:
        said = (
            f"model_type is {model_type!r}"
            if model_type
            else "neither model_type nor architectures says what it is"
        )
        raise CheckpointError(f"{source}: {said}; there are models for {', '.join(MODELS)}")
    return MODELS[model_type]


class AutoConfig:
    """Reads a `config.json` into the configuration class of its `model_type`."""

    @staticmethod
    def from_pretrained(
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> PretrainedConfig:
        values, path = read_config(
            name_or_path, revision=revision, local_files_only=local_files_only
        )
        config_class = _entry(values.get("model_type"), path)[0]
        return config_class.from_file(
            path, values, **{"name_or_path": str(name_or_path), **overrides}
        )


class AutoModel:
    """Loads the bare model of a checkpoint's type; subclasses load it with their head."""

    _head: ClassVar[str] = "Model"

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **options: Any) -> Any:
        """As the model's own `from_pretrained`, see `PreTrainedModel.from_pretrained`."""
        config = options.get("config")
        if config is None:
            where = {k: options[k] for k in ("revision", "local_files_only") if k in options}
            config = AutoConfig.from_pretrained(name_or_path, **where)
        return cls._class_for(config, name_or_path).from_pretrained(name_or_path, **options)

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> Any:
        """Builds a newly initialised model."""
        return cls._class_for(config, "config")(config)

    @classmethod
    def _class_for(cls, config: PretrainedConfig, source: object) -> type:
        _, module, prefix = _entry(config.model_type, source)
        return getattr(import_module(module, __package__), prefix + cls._head)


class AutoModelForMaskedLM(AutoModel):
    _head = "ForMaskedLM"


class AutoModelForSequenceClassification(AutoModel):
    _head = "ForSequenceClassification"


class AutoModelForQuestionAnswering(AutoModel):
    _head = "ForQuestionAnswering"


class AutoModelForMultipleChoice(AutoModel):
    _head = "ForMultipleChoice"
