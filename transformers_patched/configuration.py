"""Model configurations: the `config.json` beside every checkpoint, as a dataclass without torch.

Known keys are fields; unknown keys of a file are kept, readable as attributes, and written back. A
key that is neither known nor in the file is an error where it is passed by hand: a misspelt option
must not train the wrong model.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from .files import CheckpointError, find_file, read_json, write_atomically

CONFIG_NAME = "config.json"
LORA_TYPES = ("lora", "dylora")  # what `lora_type` may say: the keys of `loralib.LINEAR_TYPES`
_LORA_FIELDS = ("apply_lora", "lora_r", "lora_alpha", "lora_dropout", "lora_type", "lora_modules")
MOST_LABELS = 1_000_000  # each gets a name, so that a slip of the pen would fill the memory
_SHAPE_FIELDS = ("layer_shapes", "sparse_blocks")
_RUNTIME_FIELDS = ("num_labels", "extra", "name_or_path")  # not keys of config.json

ConfigT = TypeVar("ConfigT", bound="PretrainedConfig")


class ConfigError(ValueError):
    """A configuration that names no possible model."""


@dataclass(kw_only=True)
class PretrainedConfig:
    """What every model's configuration has.

    `num_labels` and `id2label` follow each other: setting one renews the other. With
    `apply_lora=True` the linear layers named in `lora_modules` are built as `loralib` layers,
    y = Wx + (lora_alpha / lora_r)·B·A·x.
    """

    model_type: ClassVar[str] = ""
    lora_targets: ClassVar[tuple[str, ...]] = ()
    # the fields that `layer_shapes` sets for a layer
    _layer_fields: ClassVar[tuple[str, str]] = ("num_attention_heads", "intermediate_size")

    num_labels: int = 2
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    problem_type: str | None = None  # None: as labels and num_labels suggest
    architectures: list[str] | None = None
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True
    tie_word_embeddings: bool = True
    # of each layer [heads, units], or [heads, units, numbers of a head]; None: all alike
    layer_shapes: list[list[int]] | None = None
    # [rows, columns] of the blocks that linear layers leave out where they are 0
    sparse_blocks: list[int] | None = None

    apply_lora: bool = False
    lora_r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    lora_type: str = "lora"
    lora_modules: tuple[str, ...] = ("query", "value")

    name_or_path: str = ""
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.id2label is None:
            self.num_labels = self.num_labels  # names the labels

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "num_labels":
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"num_labels must be a positive integer, not {value!r}")
            if value > MOST_LABELS:
                raise ConfigError(f"num_labels is {value:,}; at most {MOST_LABELS:,} are possible")
            if len(self.__dict__.get("id2label") or ()) != value:
                self.__dict__["id2label"] = {i: f"LABEL_{i}" for i in range(value)}
                self.__dict__["label2id"] = {f"LABEL_{i}": i for i in range(value)}
        if name == "id2label" and value:
            value = {int(key): label for key, label in value.items()}
            self.__dict__["num_labels"] = len(value)
            self.__dict__["label2id"] = {label: key for key, label in value.items()}
        if name in ("id2label", "label2id") and not value:
            return  # null in a file means: as many as num_labels says
        object.__setattr__(self, name, tuple(value) if name == "lora_modules" else value)

    def __getattr__(self, name: str) -> Any:
        extra = self.__dict__.get("extra", {})
        if name in extra:
            return extra[name]
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    # ------------------------------------------------------------------ checks

    def validate(self) -> None:
        """Raises ConfigError where no model can be built; models call it before they are built."""
        if self.problem_type not in (
            None,
            "regression",
            "single_label_classification",
            "multi_label_classification",
        ):
            raise ConfigError(
                f"problem_type is {self.problem_type!r}; it may be 'regression', "
                "'single_label_classification', 'multi_label_classification' or None"
            )
        if self.apply_lora:
            self._validate_lora()

    def _validate_lora(self) -> None:
        if self.lora_type not in LORA_TYPES:
            raise ConfigError(f"lora_type is {self.lora_type!r}; known are {', '.join(LORA_TYPES)}")
        if isinstance(self.lora_r, bool) or not isinstance(self.lora_r, int) or self.lora_r < 1:
            raise ConfigError(
                f"lora_r is {self.lora_r!r}; the rank must be a positive integer, for example 8 "
                "(apply_lora=False builds the model without LoRA)"
            )
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ConfigError(f"lora_dropout is {self.lora_dropout!r}; it must be in [0, 1)")
        unknown = [name for name in self.lora_modules if name not in self.lora_targets]
        if unknown or not self.lora_modules:
            raise ConfigError(
                f"lora_modules names {', '.join(map(repr, unknown)) or 'nothing'}; "
                f"{self.model_type} has {', '.join(map(repr, self.lora_targets))}"
            )

    def _validate_sizes(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, not {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is no multiple of the "
                f"{self.num_attention_heads} attention heads"
            )

        if self.layer_shapes is not None:
            self._validate_shapes()
        sizes = [1, 1] if self.sparse_blocks is None else self.sparse_blocks
        if len(sizes) != 2 or any(type(n) is not int or n < 1 for n in sizes):
            raise ConfigError(
                f"sparse_blocks is {sizes!r}; it must be the rows and columns of a block, such as "
                "[32, 32]"
            )

    def _validate_shapes(self) -> None:
        shapes, layers = self.layer_shapes or [], self.num_hidden_layers
        whole = all(
            len(shape) in (2, 3) and all(type(n) is int and n > 0 for n in shape)
            for shape in shapes
        )
        most, d = self.num_attention_heads, self.head_size
        if (
            not whole
            or len(shapes) != layers
            or any(shape[0] > most or shape[2:] > [d] for shape in shapes)
        ):
            raise ConfigError(
                f"layer_shapes is {shapes!r}; it must have [heads, feed-forward units] of each of "
                f"the {layers} layers, with 1 to {most} heads and at least 1 unit, and may have as "
                f"a third the size of a head, 1 to {d}"
            )

    # ------------------------------------------------------------------ layers

    @property
    def head_size(self) -> int:
        """d, of a layer or, in the whole model's configuration, of layers that say nothing else."""
        return self.__dict__.get("_head_size") or self.hidden_size // self.num_attention_heads

    @property
    def attention_size(self) -> int:
        """Width of queries, keys and values: heads times d."""
        return self.num_attention_heads * self.head_size

    def of_layer(self: ConfigT, layer: int) -> ConfigT:
        """What layer `layer` is built from: this configuration with the layer's own sizes."""
        if self.layer_shapes is None:
            return self
        own = copy.copy(self)
        heads, units, *size = self.layer_shapes[layer]
        own.__dict__["_head_size"] = size[0] if size else self.head_size
        own.__dict__.update(zip(self._layer_fields, (heads, units), strict=True))
        return own

    # ------------------------------------------------------------------ files

    def to_dict(self) -> dict[str, Any]:
        """Returns what `config.json` holds; LoRA's fields only where LoRA is applied."""
        values = dict(self.extra)
        for item in dataclasses.fields(self):
            if item.name in _RUNTIME_FIELDS or (item.name in _LORA_FIELDS and not self.apply_lora):
                continue
            value = getattr(self, item.name)
            if item.name in _SHAPE_FIELDS and value is None:  # keys of ours alone
                continue
            values[item.name] = list(value) if isinstance(value, tuple) else value
        return {**values, "model_type": self.model_type}

    def update(self, values: Mapping[str, Any]) -> None:
        """Sets fields, by their names; raises ConfigError at a name that is none."""
        names = {item.name for item in dataclasses.fields(self)}
        for key, value in values.items():
            if key in names:
                setattr(self, key, value)
            elif key in self.extra:
                self.extra[key] = value
            else:
                raise ConfigError(f"{type(self).__name__} has no field {key!r} (see its dataclass)")

    @classmethod
    def from_dict(cls: type[ConfigT], values: Mapping[str, Any], **overrides: Any) -> ConfigT:
        """Builds a configuration from the keys of a `config.json`; unknown ones are kept."""
        names = {item.name for item in dataclasses.fields(cls)} - {"extra"}
        known = {key: value for key, value in values.items() if key in names}
        extra = {k: v for k, v in values.items() if k not in names and k != "model_type"}
        config = cls(**known, extra=extra)
        config.update(overrides)
        return config

    @classmethod
    def from_pretrained(
        cls: type[ConfigT],
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> ConfigT:
        """Reads the `config.json` of a folder or a hub id; `overrides` replace single fields."""
        values, path = read_config(
            name_or_path, revision=revision, local_files_only=local_files_only
        )
        found = values.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ConfigError(
                f"{path} says model_type {found!r}, which is no {cls.__name__}; "
                "load it with AutoConfig or an AutoModel class, or with the classes of its own type"
            )
        return cls.from_file(path, values, **{"name_or_path": str(name_or_path), **overrides})

    @classmethod
    def from_file(
        cls: type[ConfigT], path: Path, values: Mapping[str, Any], **overrides: Any
    ) -> ConfigT:
        """`from_dict` for what was read from `path`, which errors name."""
        hints = typing.get_type_hints(cls)
        for key in {item.name for item in dataclasses.fields(cls)} & set(values) - {"extra"}:
            value = values[key]
            if not fits(value, hints[key]):
                expected = getattr(hints[key], "__name__", hints[key])
                raise ConfigError(f"{path}: {key} is {value!r}, which is no {expected}")
        try:
            config = cls.from_dict(values)
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from error
        config.update(overrides)
        return config

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` into `folder`, which is made where it is missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        write_atomically(folder / CONFIG_NAME, lambda path: path.write_text(text, encoding="utf-8"))


def fits(value: object, hint: Any) -> bool:
    """Whether a value read from JSON is of an annotated type; whole numbers are floats too."""
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if kind in (int, float):
        number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        return number and math.isfinite(value)
    if kind is list and isinstance(value, list):
        return all(fits(item, inner[0]) for item in value)
    return isinstance(value, (list, tuple) if kind is tuple else kind)


def read_config(
    name_or_path: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> tuple[dict[str, Any], Path]:
    """Returns the keys of the `config.json` of a folder or hub id, and the file they are from.

    `model_type` is there where the file says it in any way, see `model_type`.
    """
    path = find_file(
        name_or_path, CONFIG_NAME, revision=revision, local_files_only=local_files_only
    )
    if path is None:
        raise CheckpointError(
            f"{name_or_path} has no {CONFIG_NAME}: give the folder (or hub id) of a model saved by "
            "save_pretrained, or pass config=..."
        )
    values = read_json(path)
    if kind := model_type(values):
        values["model_type"] = kind
    return values, path


def model_type(values: Mapping[str, Any]) -> str | None:
    """The `model_type` of a `config.json`, where it has none that of its `architectures`.

    `DebertaV2ForMaskedLM` is one of `deberta-v2`.
    """
    if values.get("model_type"):
        return values["model_type"]
    classes = values.get("architectures")
    for name in classes if isinstance(classes, list) else ():
        found = re.fullmatch(r"([A-Z]\w*?)(Model|LMHeadModel|For[A-Z]\w*)", str(name))
        if found:
            return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", found[1]).lower()
    return None


@dataclass(kw_only=True)
class BertConfig(PretrainedConfig):
    """The sizes of a BERT; the defaults are bert-base-uncased's."""

    model_type: ClassVar[str] = "bert"
    lora_targets: ClassVar[tuple[str, ...]] = (
        "query",
        "key",
        "value",
        "attention.output",
        "intermediate",
        "output",
    )

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None  # None: hidden_dropout_prob
    max_position_embeddings: int = 512
    position_embedding_type: str = "absolute"
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    is_decoder: bool = False

    def validate(self) -> None:
        super().validate()
        self._validate_sizes()
        if self.position_embedding_type != "absolute":
            raise ConfigError(
                f"position_embedding_type {self.position_embedding_type!r} is not supported; "
                "these models have 'absolute' position embeddings"
            )
        if self.is_decoder or self.extra.get("add_cross_attention"):
            raise ConfigError("is_decoder and add_cross_attention are not supported: encoders only")

    @property
    def head_dropout(self) -> float:
        """Dropout before a classification head."""
        chosen = self.classifier_dropout
        return self.hidden_dropout_prob if chosen is None else chosen


@dataclass(kw_only=True)
class RobertaConfig(BertConfig):
    """The sizes of a RoBERTa; position ids start at `pad_token_id` + 1."""

    model_type: ClassVar[str] = "roberta"

    vocab_size: int = 50265
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | None = 2


@dataclass(kw_only=True)
class DebertaV2Config(PretrainedConfig):
    """The sizes of a DeBERTa-v2 or v3; the defaults are Transformers', deberta-v2-xlarge's.

    Relative positions beyond `position_buckets` / 2 share buckets, up to `max_relative_positions`
    (below 1: `max_position_embeddings`); `pos_att_type` says which terms they enter, "c2p" and
    "p2c". `lora_modules` may say "dense" for the three layers that are so called.
    """

    model_type: ClassVar[str] = "deberta-v2"
    lora_targets: ClassVar[tuple[str, ...]] = (
        "query_proj",
        "key_proj",
        "value_proj",
        "attention.output",
        "intermediate",
        "output",
        "dense",
    )
    # Transformers looks these up only where config.json has them, and takes null for a value.
    _absent_if_none: ClassVar[tuple[str, ...]] = (
        "embedding_size",
        "pooler_hidden_size",
        "attention_head_size",
        "cls_dropout",
    )

    vocab_size: int = 128100
    hidden_size: int = 1536
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    intermediate_size: int = 6144
    embedding_size: int | None = None  # None: hidden_size
    attention_head_size: int | None = None  # None: hidden_size / num_attention_heads
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-7
    relative_attention: bool = False
    max_relative_positions: int = -1
    position_buckets: int = -1
    norm_rel_ebd: str = "none"
    share_att_key: bool = False
    pos_att_type: list[str] | str | None = None  # ["c2p", "p2c"], or "c2p|p2c"
    position_biased_input: bool = True
    conv_kernel_size: int = 0
    conv_groups: int = 1
    conv_act: str = "tanh"
    pooler_dropout: float = 0.0
    pooler_hidden_act: str = "gelu"
    pooler_hidden_size: int | None = None  # None: hidden_size
    cls_dropout: float | None = None  # None: hidden_dropout_prob
    legacy: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    lora_modules: tuple[str, ...] = ("query_proj", "value_proj")

    def validate(self) -> None:
        super().validate()
        self._validate_sizes()
        for name, value in (
            ("pooler_hidden_size", self.hidden_size),
            ("attention_head_size", self.hidden_size // self.num_attention_heads),
        ):
            if getattr(self, name) not in (None, value):
                raise ConfigError(
                    f"{name} is {getattr(self, name)}; with hidden_size {self.hidden_size} "
                    f"it must be {value}, or left out"
                )
        if unknown := sorted(set(self.position_terms) - {"c2p", "p2c"}):
            raise ConfigError(f"pos_att_type has {unknown[0]!r}; it may have 'c2p' and 'p2c'")
        if self.relative_attention and self.position_buckets > 0:
            half = self.position_buckets // 2
            if half < 1 or self.max_distance - 1 <= half:
                raise ConfigError(
                    f"position_buckets {self.position_buckets} must be at least 2, and half of it "
                    f"below max_relative_positions - 1, here {self.max_distance - 1}"
                )
        if self.conv_kernel_size and self.conv_kernel_size % 2 == 0:
            raise ConfigError(
                f"conv_kernel_size {self.conv_kernel_size} must be odd, or 0 for no convolution: "
                "an even one would change the number of tokens"
            )

    @property
    def position_terms(self) -> tuple[str, ...]:
        """The terms of `pos_att_type`, whichever way it is written."""
        terms = self.pos_att_type or ()
        if isinstance(terms, str):
            terms = [term.strip() for term in terms.lower().split("|")]
        return tuple(dict.fromkeys(terms))

    @property
    def max_distance(self) -> int:
        """The largest relative position."""
        given = self.max_relative_positions
        return self.max_position_embeddings if given < 1 else given

    @property
    def norms_relative_embeddings(self) -> bool:
        """Whether the table of relative positions goes through a LayerNorm."""
        return "layer_norm" in [part.strip() for part in self.norm_rel_ebd.lower().split("|")]

    @property
    def head_dropout(self) -> float:
        """Dropout before a classification head."""
        return self.hidden_dropout_prob if self.cls_dropout is None else self.cls_dropout

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        return {k: v for k, v in values.items() if v is not None or k not in self._absent_if_none}


@dataclass(kw_only=True)
class GPT2Config(PretrainedConfig):
    """The sizes of a GPT-2; the defaults are those of the smallest, `gpt2`.

    `lora_modules` names linear layers, or parts of the fused c_attn: "query", "key" and "value",
    each with factors of its own; "c_attn" stands for query and value (Hu et al. 2021).
    """

    model_type: ClassVar[str] = "gpt2"
    _layer_fields: ClassVar[tuple[str, str]] = ("n_head", "n_inner")
    lora_targets: ClassVar[tuple[str, ...]] = (
        "c_attn",
        "query",
        "key",
        "value",
        "attn.c_proj",
        "c_fc",
        "mlp.c_proj",
    )

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # None: 4 n_embd
    activation_function: str = "gelu_new"
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 50256
    eos_token_id: int | None = 50256

    lora_modules: tuple[str, ...] = ("c_attn",)

    def validate(self) -> None:
        super().validate()
        self._validate_sizes()
        if self.sparse_blocks is not None:
            raise ConfigError("sparse_blocks: GPT-2's layers compute with whole matrices; use null")
        if self.extra.get("add_cross_attention"):
            raise ConfigError("add_cross_attention is not supported: there is no encoder to read")
        if self.reorder_and_upcast_attn or self.scale_attn_by_inverse_layer_idx:
            raise ConfigError(
                "reorder_and_upcast_attn and scale_attn_by_inverse_layer_idx are not supported"
            )
        if not self.scale_attn_weights:
            raise ConfigError("scale_attn_weights must be true: scores are divided by sqrt(d)")

    @property
    def adapted_segments(self) -> tuple[bool, bool, bool]:
        """Which of c_attn's query, key and value have a low-rank update."""
        both = "c_attn" in self.lora_modules
        named = [name in self.lora_modules for name in ("query", "key", "value")]
        return named[0] or both, named[1], named[2] or both

    # The names that the other models' configurations have.

    @property
    def hidden_size(self) -> int:
        return self.n_embd

    @property
    def num_hidden_layers(self) -> int:
        return self.n_layer

    @property
    def num_attention_heads(self) -> int:
        return self.n_head

    @property
    def intermediate_size(self) -> int:
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def max_position_embeddings(self) -> int:
        return self.n_positions
