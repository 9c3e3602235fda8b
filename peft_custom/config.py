"""Adapter configurations: dataclasses that read and write PEFT's `adapter_config.json`."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .files import find_file, read_json, written_aside
from .patterns import check_pattern

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_NAME = "adapter_model.safetensors"
BIN_NAME = "adapter_model.bin"

# Keys newer PEFT releases write whose inert default is not an empty value. Any other unknown key is
# inert when it is None, False or empty; `peft_version` only
# says who wrote the file, `eva_config` where its start came from.
INERT_VALUES: dict[str, tuple[Any, ...]] = {"qalora_group_size": (16,)}
INFORMATIVE_KEYS = frozenset({"peft_version", "eva_config"})

PATTERN_KEYS = ("rank_pattern", "alpha_pattern")  # options whose keys are patterns

CONFIG_CLASSES: dict[str, type[PeftConfig]] = {}  # peft_type -> class, filled by `register_tuner`


class TaskType(str, enum.Enum):
    """What the wrapped model is trained for; chooses the `PeftModelFor…` class and the head."""

    SEQ_CLS = "SEQ_CLS"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    CAUSAL_LM = "CAUSAL_LM"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(str, enum.Enum):
    """Adapter types whose files PEFT shares; other tuners register a string of their own."""

    LORA = "LORA"
    ADALORA = "ADALORA"


def inert(key: str, value: object) -> bool:
    """Whether an unknown configuration key changes nothing with this value."""
    if key in INFORMATIVE_KEYS or value is None or value is False:
        return True
    if isinstance(value, (str, list, dict)) and not value:
        return True
    return value in INERT_VALUES.get(key, ())


def jsonable(value: object) -> Any:
    """Sets become sorted lists and enum members their values, all the way down."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return value


def typed_values(target: type, values: dict[str, Any]) -> dict[str, Any]:
    """The values of a file, each of the type that dataclass `target` gives its field.

    null for a field that is empty by default means that default.

    Raises:
        ValueError: a value is of another type, or a number that is not finite.
    """
    hints = typing.get_type_hints(target)
    fields = dataclasses.fields(target)
    empty = {f.name for f in fields if not f.default or f.default_factory is dict}
    kept = {k: v for k, v in values.items() if v is not None or k not in empty or fits(v, hints[k])}
    for key, value in kept.items():
        if not fits(value, hints[key]):
            expected = str(getattr(hints[key], "__name__", hints[key])).replace("typing.", "")
            raise ValueError(f"{key}={value!r} is no {expected}")
    return kept


def fits(value: object, hint: object) -> bool:
    """Whether a JSON value is of an annotated type; whole numbers are floats, lists tuples."""
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if kind is list and isinstance(value, list):
        return all(fits(item, inner[0]) for item in value)
    if kind is dict and isinstance(value, dict):
        return all(fits(item, inner[1]) for item in value.values())
    if kind in (int, float):
        number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        return number and math.isfinite(value)
    if kind is tuple:
        return isinstance(value, (list, tuple))
    return kind is Any or isinstance(value, kind)


@dataclass
class PeftConfig:
    """The fields every adapter type shares.

    Attributes:
        peft_type: the registered name of the adapter type (`"LORA"`).
        auto_mapping: class and library of the base model when no task type names them.
        base_model_name_or_path: where the base weights came from.
        revision: revision of the base weights.
        task_type: one of `TaskType`, or None for a plain `PeftModel`.
        inference_mode: the adapter's parameters are frozen.
        modules_to_save: modules trained in full and saved with the adapter.
    """

    peft_type: str | None = None
    auto_mapping: dict[str, Any] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None
    inference_mode: bool = False

    # Fields left out of the file at their default: PEFT 0.11 refuses keys it does not know.
    omit_at_default: ClassVar[frozenset[str]] = frozenset()
    # Fields of this machine and run: never written, and not obeyed where a file has them, so that a
    # stranger's file names no path to read or write.
    never_in_files: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if isinstance(self.peft_type, enum.Enum):
            self.peft_type = self.peft_type.value
        if self.task_type is not None:
            known = [task.value for task in TaskType]
            self.task_type = getattr(self.task_type, "value", self.task_type)
            if self.task_type not in known:
                raise ValueError(
                    f"task_type={self.task_type!r} is unknown; use one of {', '.join(known)}, or "
                    "None for a model of your own"
                )

        for option in ("target_modules", "exclude_modules", "layers_pattern", *PATTERN_KEYS):
            value = getattr(self, option, None)
            patterns = [value] if isinstance(value, str) else value
            if option in ("target_modules", "exclude_modules") and not isinstance(value, str):
                continue  # a list there has names, not patterns
            for pattern in patterns or ():
                check_pattern(option, pattern)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values."""
        values = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in self.never_in_files:
                continue
            if field.name in self.omit_at_default and value == field.default:
                continue
            values[field.name] = jsonable(value)
        return values

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes `adapter_config.json`: sorted keys, indent 2."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with written_aside(folder / CONFIG_NAME) as aside:
            aside.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", "utf-8")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "configuration") -> PeftConfig:
        """Builds the class that `peft_type` names; unknown keys must be inert.

        Raises:
            ValueError: an unknown adapter type, a field of another type than the class's, a value
                that means nothing, or an unknown key with a value that matters.
            NotImplementedError: an option of PEFT's that is not implemented.
        """
        kind = values.get("peft_type") or getattr(cls, "peft_type", None)
        kind = getattr(kind, "value", kind)
        target = CONFIG_CLASSES.get(str(kind))
        if target is None:
            raise ValueError(
                f"{source}: adapter type {kind!r} is not supported here; known types: "
                f"{', '.join(sorted(CONFIG_CLASSES))}"
            )
        known = {field.name for field in dataclasses.fields(target)}
        active = [key for key in values if key not in known and not inert(key, values[key])]
        if active:
            settings = ", ".join(f"{key}={values[key]!r}" for key in active)
            raise ValueError(
                f"{source}: {settings}: not supported here and not at the value that changes "
                "nothing; the adapter would compute something else without it"
            )
        kept = {k: v for k, v in values.items() if k in known - target.never_in_files}
        try:
            return target(**target.loaded_values(typed_values(target, kept)))
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"{source}: {error}") from error

    @classmethod
    def loaded_values(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Adjusts values read from a file before the class is built; the identity by default."""
        return values

    @classmethod
    def from_pretrained(
        cls, folder_or_hub_id: str | os.PathLike[str], subfolder: str | None = None, **hub: Any
    ) -> PeftConfig:
        """Reads `adapter_config.json` from a folder or, with `revision=` and the like, the hub."""
        path = find_file(folder_or_hub_id, CONFIG_NAME, subfolder, **hub)
        if path is None:
            raise FileNotFoundError(
                f"{folder_or_hub_id}: no {CONFIG_NAME}, so not an adapter folder"
            )
        return cls.from_dict(read_json(Path(path)), source=path)
