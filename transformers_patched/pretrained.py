"""What every model can do: load, save, initialise, tie, freeze, and group its parameters."""

from __future__ import annotations

import copy
import inspect
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import loralib as lora
from loralib.decay import decay_groups

from .checkpoint import SAFE_WEIGHTS, read_weights, write_safetensors
from .configuration import PretrainedConfig
from .files import CheckpointError
from .heads import ModelOutput

ModelT = TypeVar("ModelT", bound="PreTrainedModel")

# Keys that older checkpoints carry and no model needs: position ids are worked out in the call.
_STRAY_KEYS = re.compile(r"(^|\.)embeddings\.position_ids$")
_LAYER = re.compile(r"(?:^|\.)layer\.(\d+)\.")
MOST_LAYERS = 1000  # the deepest published encoders have some tens
_LEGACY_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


@dataclass
class LoadReport:
    """What a checkpoint did and did not have, by parameter name.

    Attributes:
        missing: Parameters newly initialised, because the checkpoint has none of that name.
        unexpected: Keys of the checkpoint that this model does not have.
        mismatched: "name: checkpoint shape, model shape, file" for keys of another shape.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)


class PreTrainedModel(nn.Module):
    """A model with a configuration; its weights are read from a folder or a hub repository.

    Subclasses set `config_class` and `base_model_prefix` (the attribute that holds the bare model),
    call `post_init()` last in their constructor, and name parameters that are one and the same in
    `_tied_weights_keys`, alias first.
    """

    config_class: ClassVar[type[PretrainedConfig]] = PretrainedConfig
    base_model_prefix: ClassVar[str] = ""
    main_input_name: ClassVar[str] = "input_ids"
    supports_gradient_checkpointing: ClassVar[bool] = True
    _tied_weights_keys: ClassVar[dict[str, str]] = {}

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        config.validate()
        self.config = config
        self.name_or_path = config.name_or_path
        self.newly_initialised: tuple[str, ...] = ()

    def post_init(self) -> None:
        """Ties weights and initialises the head (or the bare model), unless on the meta device."""
        self.tie_weights()
        drawn = "" if self.base_model is self else self.base_model_prefix + "."
        weights = [(name, weight) for name, weight in self.named_parameters() if not weight.is_meta]
        _initialise(self, [name for name, _ in weights if not (drawn and name.startswith(drawn))])

    # ------------------------------------------------------------------ loading and saving

    @classmethod
    def from_pretrained(
        cls: type[ModelT],
        name_or_path: str | Path,
        *,
        config: PretrainedConfig | None = None,
        dtype: torch.dtype | str | None = None,
        base_dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **overrides: Any,
    ) -> Any:
        """Loads a model in evaluation mode from a folder or a hub id.

        The weights of a bare model load into a model with a head and back. Parameters that the
        checkpoint lacks are newly initialised and named in one warning, as are keys that the model
        lacks.

        Args:
            name_or_path: Folder or hub id with `config.json` and weights.
            config: Replaces the checkpoint's configuration.
            dtype: Of all parameters; float32 by default. "auto" keeps the checkpoint's.
            base_dtype: Freezes the base model (see `freeze_base`) and keeps its frozen weights in
                this dtype, bfloat16 for instance; what is trained stays in `dtype`.
            revision: Branch, tag or commit on the hub.
            local_files_only: Do not ask the hub.
            ignore_mismatched_sizes: Newly initialise parameters of another shape than the
                checkpoint's, instead of raising.
            output_loading_info: Return `(model, LoadReport)`.
            **overrides: Fields of the configuration, or arguments of the model's constructor.

        Raises:
            CheckpointError: A file is missing, damaged, or of other shapes; it is named.
        """
        where = {"revision": revision, "local_files_only": local_files_only}
        arguments = set(inspect.signature(cls.__init__).parameters) - {"self", "config"}
        arguments = {key: overrides.pop(key) for key in arguments & set(overrides)}
        if config is None:
            config = cls.config_class.from_pretrained(name_or_path, **where, **overrides)
        else:
            config = copy.deepcopy(config)
            config.update(overrides)
        config.name_or_path = str(name_or_path)
        tensors, files = read_weights(name_or_path, **where)
        _check_depth(config, tensors, files)
        try:
            with (
                torch.device("meta"),
                _NothingDrawn(),
            ):  # shapes only: the checkpoint has the values
                model = cls(config, **arguments)
        except RuntimeError as error:  # torch cannot count so many bytes
            raise CheckpointError(
                f"{name_or_path}: no model has the sizes of its config.json ({error})"
            ) from error
        found, report = _match(model, tensors, files)
        if report.mismatched and not ignore_mismatched_sizes:
            raise _other_shapes(report)
        _check_size(model, report.missing, tensors, name_or_path)
        base = None if base_dtype is None else _dtype(base_dtype)
        _assign(model, found, report.missing, _dtype(dtype), base)
        if base_dtype is not None:
            model.freeze_base()
        _warn(model, name_or_path, report)
        model.eval()
        return (model, report) if output_loading_info else model

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `model.safetensors` and `config.json`, each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tied = self._tied()
        state = {key: value for key, value in self.state_dict().items() if key not in tied}
        write_safetensors(folder / SAFE_WEIGHTS, state)
        self.config.architectures = [type(self).__name__]
        self.config.extra.pop("torch_dtype", None)
        self.config.extra["dtype"] = str(self.dtype).removeprefix("torch.")
        self.config.save_pretrained(folder)

    # ------------------------------------------------------------------ parts and figures

    @property
    def base_model(self) -> PreTrainedModel:
        """The model without its head (itself where there is none)."""
        return getattr(self, self.base_model_prefix, self)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.base_model.get_input_embeddings()

    def set_input_embeddings(self, embeddings: nn.Embedding) -> None:
        self.base_model.set_input_embeddings(embeddings)
        self.tie_weights()

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Counts parameters, tied ones once; word, position and type embeddings are embeddings."""
        embeddings = {m.weight for m in self.modules() if isinstance(m, nn.Embedding)}
        return sum(
            weight.numel()
            for weight in self.parameters()
            if (weight.requires_grad or not only_trainable)
            and not (exclude_embeddings and weight in embeddings)
        )

    def asked_for(self, name: str, value: bool | None) -> bool:
        """The value of an option of the call; the configuration's where the call gives none."""
        return getattr(self.config, name) if value is None else value

    def result(self, output: ModelOutput, return_dict: bool | None) -> ModelOutput | tuple:
        """`output` itself, or as a tuple where `return_dict` is False."""
        return output if self.asked_for("return_dict", return_dict) else output.to_tuple()

    # ------------------------------------------------------------------ training

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recomputes every layer in the backward pass instead of keeping its activations.

        Checkpoints are always the non-re-entrant ones, so frozen inputs are no obstacle. The
        arguments are those that Hugging Face's `Trainer` passes (`every_n_layers=1`,
        `offload=False`); a value that asks for anything else is refused.
        """
        options = {**options, **(gradient_checkpointing_kwargs or {})}
        if any(value is True or value not in (None, False, 1) for value in options.values()):
            raise ValueError(
                f"checkpoints are non-re-entrant and at every layer here: {options} is not possible"
            )
        self.base_model.encoder.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self.base_model.encoder.gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.base_model.encoder.gradient_checkpointing

    def freeze_base(self) -> None:
        """Freezes the base model except its LoRA factors; the head stays trainable.

        BERT's pooler belongs to the base and is frozen with it, as in Microsoft's recipe for
        RoBERTa. Only where the checkpoint had no pooler (or any other part), so that its weights
        are random, does that part stay trainable: nothing random is ever frozen.
        """
        lora.mark_only_lora_as_trainable(self.base_model)
        for name in self.newly_initialised:
            self.get_parameter(name).requires_grad_(True)

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Groups "decay" and "no_decay" of the trainable parameters, for an optimiser.

        Biases and normalisation layers are not decayed. Empty groups are left out.
        """
        return decay_groups(self, lr, weight_decay)

    # ------------------------------------------------------------------ tied weights

    def _tied(self) -> dict[str, str]:
        return self._tied_weights_keys if self.config.tie_word_embeddings else {}

    def tie_weights(self) -> None:
        """Makes every alias in `_tied_weights_keys` the very parameter that it names."""
        for alias, source in self._tied().items():
            owner, _, name = alias.rpartition(".")
            setattr(self.get_submodule(owner), name, self.get_parameter(source))


# ---------------------------------------------------------------------- loading, step by step


class _NothingDrawn(TorchFunctionMode):
    """Leaves out random initialisation; on the meta device it would import torch's decompositions,
    which takes a second, only to draw nothing."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        drawing = getattr(func, "__module__", None) == "torch.nn.init"
        if drawing or func in (Tensor.normal_, Tensor.uniform_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _check_depth(
    config: PretrainedConfig, tensors: dict[str, Tensor], files: dict[str, Path]
) -> None:
    """Refuses a number of layers beyond all reason before so many modules are built."""
    layers = getattr(config, "num_hidden_layers", 0)
    if layers > MOST_LAYERS:
        source = next(iter(files.values()), config.name_or_path)
        found = [int(m[1]) + 1 for m in map(_LAYER.search, tensors) if m]
        raise CheckpointError(
            f"{source} has {max(found, default=0)} layers, but num_hidden_layers is {layers:,} in "
            f"the {type(config).__name__} (at most {MOST_LAYERS:,}): correct its config.json"
        )


def _check_size(
    model: PreTrainedModel, missing: list[str], tensors: dict[str, Tensor], name: str | Path
) -> None:
    """Refuses to draw far more new weights than the checkpoint has; sizes are then wrong."""
    state = model.state_dict()
    sizes = {key: state[key].numel() for key in missing}
    given = sum(tensor.numel() for tensor in tensors.values())
    if sum(sizes.values()) > 10 * given + 10_000_000:
        largest = max(sizes, key=sizes.__getitem__)
        raise CheckpointError(
            f"{name}: the sizes of its config.json ask for {sum(sizes.values()):,} weights that "
            f"the checkpoint, of {given:,} in all, has not; the largest is {largest}, "
            f"{tuple(state[largest].shape)}"
        )


def _match(
    model: PreTrainedModel, tensors: dict[str, Tensor], files: dict[str, Path]
) -> tuple[dict[str, Tensor], LoadReport]:
    """Finds the parameter of every key.

    Wrappers (DataParallel, torch.compile, a training loop's own module) put one prefix before all
    keys: it is left out where more of them fit without it.

    Raises:
        CheckpointError: these are no weights of this model, which would stay random.
    """
    state, tied = model.state_dict(), model._tied()
    shared = _shared_parts(list(tensors))
    prefixes = [".".join([*shared[:n], ""]) if n else "" for n in range(len(shared) + 1)]
    names = [
        {key: _name(model, state, key.removeprefix(prefix)) for key in tensors}
        for prefix in prefixes
    ]
    best = max(names, key=lambda found: sum(name is not None for name in found.values()))
    _check_fit(model, best, state, files)
    found: dict[str, Tensor] = {}
    report = LoadReport()
    for key, name in best.items():
        tensor = tensors[key]
        if name is None:
            if not _STRAY_KEYS.search(key):
                report.unexpected.append(key)
        elif tensor.shape != state[name].shape:
            shapes = f"{tuple(tensor.shape)} in {files[key]}, {tuple(state[name].shape)} here"
            report.mismatched.append(f"{key}: {shapes}")
        else:
            found[name] = tensor
    for alias, source in tied.items():
        if alias in found:
            found.setdefault(source, found.pop(alias))
    report.missing = [name for name in state if name not in found and name not in tied]
    return found, report


def _name(model: PreTrainedModel, state: Mapping[str, Tensor], key: str) -> str | None:
    """The parameter that a key means, the base model's prefix added or removed as needed."""
    for old, new in _LEGACY_NAMES.items():
        key = key.removesuffix(old) + new if key.endswith(old) else key
    prefix = model.base_model_prefix + "."
    return next((n for n in (key, prefix + key, key.removeprefix(prefix)) if n in state), None)


def _shared_parts(keys: list[str]) -> list[str]:
    """The parts, between dots, with which all keys begin."""
    first, last = (min(keys), max(keys)) if keys else ("", "")
    parts = zip(first.split(".")[:-1], last.split(".")[:-1], strict=False)
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], parts)]


def _check_fit(
    model: PreTrainedModel,
    names: Mapping[str, str | None],
    state: Mapping[str, Tensor],
    files: Mapping[str, Path],
) -> None:
    """Raises CheckpointError where keys and parameters of the base model have little in common.

    A model with fewer or more layers than the checkpoint, or with another head, is none such: there
    most parameters are found, or most keys are used.
    """
    prefix = "" if model.base_model is model else model.base_model_prefix + "."
    base = {name for name in state if name.startswith(prefix) and "lora_" not in name}
    fitting = [name for name in names.values() if name in base]
    if fitting and (2 * len(fitting) >= len(names) or 2 * len(set(fitting)) >= len(base)):
        return
    where = ", ".join(sorted({str(path) for path in files.values()})) or str(model.name_or_path)
    many = f"only {len(fitting)}" if fitting else "none"
    raise CheckpointError(
        f"{where}: {many} of the {len(names)} keys fit {type(model).__name__}, with or without a "
        f"prefix that all have. They begin with {next(iter(names), 'nothing')!r}, the model's with "
        f"{next(iter(state))!r}: rename the keys, or load the model that they belong to"
    )


def _assign(
    model: PreTrainedModel,
    found: dict[str, Tensor],
    missing: list[str],
    dtype: torch.dtype | None,
    base_dtype: torch.dtype | None,
) -> None:
    """Gives a model on the meta device its weights: those found, and newly drawn missing ones."""
    prefix = "" if model.base_model is model else model.base_model_prefix + "."

    def wanted(name: str, tensor: Tensor) -> torch.dtype:
        if not tensor.is_floating_point():
            return tensor.dtype
        if base_dtype is not None and name.startswith(prefix) and "lora_" not in name:
            return base_dtype
        return tensor.dtype if dtype is None else dtype

    found = {name: tensor.to(wanted(name, tensor)) for name, tensor in found.items()}
    for name in missing:
        sketch = model.state_dict()[name]
        found[name] = torch.empty(sketch.shape, dtype=dtype or torch.float32)
    model.load_state_dict(found, strict=False, assign=True)
    model.tie_weights()
    model.newly_initialised = tuple(missing)
    _initialise(model, missing)


@torch.no_grad()
def _initialise(model: PreTrainedModel, names: list[str]) -> None:
    """Draws parameters: N(0, initializer_range), zero biases, LoRA's A uniform and its B zero."""
    std = getattr(model.config, "initializer_range", 0.02)
    for full_name in names:
        owner, _, name = full_name.rpartition(".")
        module, weight = model.get_submodule(owner), model.get_parameter(full_name)
        if name == "lora_A":
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        elif name in ("lora_B", "bias"):
            weight.zero_()
        elif isinstance(module, nn.LayerNorm):
            weight.fill_(1.0)
        else:
            weight.normal_(0.0, std)
            if getattr(module, "padding_idx", None) is not None:
                weight[module.padding_idx].zero_()


def _other_shapes(report: LoadReport) -> CheckpointError:
    return CheckpointError(
        "these weights are of another shape than the model's "
        "(ignore_mismatched_sizes=True would newly initialise them):\n  "
        + "\n  ".join(report.mismatched)
    )


def _dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype that an argument names: float32 by default, None (as it is) for "auto"."""
    if value is None or isinstance(value, torch.dtype):
        return value or torch.float32
    if value == "auto":
        return None
    found = getattr(torch, value.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype {value!r} is unknown; use for example 'float32' or 'bfloat16'")
    return found


def _warn(model: PreTrainedModel, name_or_path: str | Path, report: LoadReport) -> None:
    lines = []
    if report.missing:
        lines.append(f"newly initialised, train before use: {', '.join(report.missing)}")
    if report.unexpected:
        lines.append(f"in the checkpoint but not in the model: {', '.join(report.unexpected)}")
    if lines:
        title = f"{type(model).__name__} from {name_or_path}: "
        warnings.warn(title + "; ".join(lines), stacklevel=3)
