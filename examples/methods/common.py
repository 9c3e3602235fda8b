"""Builds models for training: full fine-tuning, LoRA in its two wirings, and what others share.

Adapters of all origins (PEFT's folders, Microsoft's `.bin`, this project's own) are read into one
form: Microsoft's names, `roberta.encoder.layer.0.attention.self.query.lora_A`, head included.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import transformers_patched
from examples.evaluation.prediction import Predictor
from examples.methods.registry import (
    AdamWOptions,
    FullOptions,
    IncrementOptions,
    LoraOptions,
    RunFacts,
)
from examples.training.run_folder import RunFolder
from loralib import lora_state_dict
from peft_custom import LoraConfig, PeftConfig, get_peft_model
from transformers_patched import CheckpointError, PreTrainedModel
from transformers_patched.checkpoint import read_bin, read_safetensors, write_safetensors

LORALIB_WEIGHTS = "lora.safetensors"
LORALIB_CONFIG = "lora.json"
PEFT_PREFIX = "base_model.model."
HEADS = ("classifier", "score", "qa_outputs")  # they train with any method, as PEFT has it


@dataclass
class ModelSource:
    """Where a method gets its model from, and the model's task.

    Attributes:
        name_or_path: folder or hub id.
        auto_class: a class of `transformers_patched`, which says the head.
        task_type: the same in PEFT's words.
        base_dtype: "auto", "float32" or "bfloat16", for frozen weights.
        arguments: of `from_pretrained`: revision, labels and the like.
        speak: say what was not in the checkpoint (one process of several does).
    """

    name_or_path: str
    auto_class: str
    task_type: str
    base_dtype: str = "auto"
    arguments: dict[str, Any] = field(default_factory=dict)
    speak: bool = True

    def load(self, *, frozen: bool, **overrides: Any) -> PreTrainedModel:
        """Loads the model; `frozen` freezes its base and keeps it in the base dtype."""
        dtype = resolved_dtype(self.base_dtype) if frozen else None
        loader = getattr(transformers_patched, self.auto_class)
        with warnings.catch_warnings():  # said below, in one line and without the LoRA factors
            warnings.simplefilter("ignore", UserWarning)
            model, report = loader.from_pretrained(
                self.name_or_path,
                base_dtype=dtype,
                output_loading_info=True,
                **{**self.arguments, **overrides},
            )
        fresh = [name for name in report.missing if "lora_" not in name]
        for what, names in (
            ("newly initialised", fresh + report.mismatched),
            ("in the checkpoint but not in the model", report.unexpected),
        ):
            if names and self.speak:
                print(f"{self.name_or_path}: {what}: {', '.join(names)}")
        if "id2label" in self.arguments and not fresh:
            self._order_labels(model)
        return model

    def _order_labels(self, model: PreTrainedModel) -> None:
        """A trained head whose classes have our labels' names in another order gets ours."""
        where = {k: v for k, v in self.arguments.items() if k in ("revision", "local_files_only")}
        theirs = transformers_patched.AutoConfig.from_pretrained(
            self.name_or_path, **where
        ).id2label
        theirs = [theirs[i].casefold() for i in sorted(theirs)]
        ours = [name.casefold() for name in self.arguments["id2label"].values()]
        if theirs == ours or sorted(theirs) != sorted(ours):
            return
        order = [theirs.index(name) for name in ours]
        base = {id(p) for p in model.base_model.parameters()}
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if id(weight) not in base and weight.shape[0] == len(ours):
                    weight.copy_(weight[order])
                    if self.speak:
                        print(f"{self.name_or_path}: {name} put in the order {', '.join(ours)}")


@dataclass
class Adapted:
    """A model ready for training.

    Attributes:
        model: gives `.loss` and `.logits`, and has `parameter_groups(lr, weight_decay)`.
        save: writes the result into a folder.
        folder: that folder's name in the run folder.
        predictor: how it is evaluated, where that is more than one forward pass.
        conclude: (final metrics, main metric, title, run folder or None) -> more figures of the
            run, shown and saved with the others; it may write files into the folder. Called on the
            main process; an evaluation without training has no folder.
        pictures: (run folder, title) draws what the method has to show, for `--plots`.
    """

    model: nn.Module
    save: Callable[[Path], None]
    folder: str = "adapter"
    predictor: Predictor | None = None
    conclude: Callable[[dict[str, float], str, str, Path | None], dict[str, Any]] | None = None
    pictures: Callable[[RunFolder, str], None] | None = None


def resolved_dtype(name: str) -> torch.dtype:
    """ "auto" asks the hardware: bfloat16 where it multiplies that, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        asks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        fast = any(getattr(torch.cpu, ask, lambda: False)() for ask in asks)
    return torch.bfloat16 if fast else torch.float32


def full(source: ModelSource, options: FullOptions) -> Adapted:
    """Every parameter trains, in float32."""
    if source.base_dtype == "bfloat16":
        raise ValueError(
            "--base_dtype bfloat16 is for frozen weights, and full fine-tuning has none: leave it "
            "out; --mixed_precision bf16 computes in bfloat16"
        )
    model = source.load(frozen=False)
    return Adapted(model, model.save_pretrained, "model")


def lora(source: ModelSource, options: LoraOptions) -> Adapted:
    """LoRA by `options.wiring`, started from `options.lora_path` where given."""
    if options.wiring == "loralib":
        adapted = with_loralib(source, options)
    else:
        start: Any = {"true": True, "false": False}.get(
            options.init_lora_weights, options.init_lora_weights
        )
        more = {"init_lora_weights": start, "use_rslora": options.use_rslora}
        adapted = with_peft(source, options, LoraConfig, **more)
    return continued(adapted, source, options)


def with_loralib(
    source: ModelSource, options: IncrementOptions, lora_type: str = "lora", **more: Any
) -> Adapted:
    """A model whose modelling file builds loralib's layers of `lora_type`.

    Args:
        source: of the model.
        options: of the increments.
        lora_type: which layers.
        more: for the saved description, beside what every adapter has.
    """
    model = source.load(
        frozen=True,
        apply_lora=True,
        lora_type=lora_type,
        lora_r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        lora_modules=options.lora_modules,
    )
    values = {
        "r": options.lora_r,
        "lora_alpha": options.lora_alpha,
        "target_modules": list(options.lora_modules),
        "base_model_name_or_path": source.name_or_path,
        **more,
    }

    def save(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        trained = {n: p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad}
        write_safetensors(folder / LORALIB_WEIGHTS, {**lora_state_dict(model), **trained})
        (folder / LORALIB_CONFIG).write_text(json.dumps(values, indent=2) + "\n", "utf-8")

    return Adapted(model, save)


def with_peft(
    source: ModelSource, options: IncrementOptions, config: type[PeftConfig], **more: Any
) -> Adapted:
    """A model with adapters injected as a configuration of class `config` says.

    Args:
        source: of the model.
        options: of the increments.
        config: its class.
        more: its fields beside those that the options name.
    """
    base = source.load(frozen=True)
    modules, alpha = list(options.lora_modules), options.lora_alpha
    made = config(
        task_type=source.task_type,
        r=options.lora_r,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        lora_dropout=options.lora_dropout,
        target_modules="all-linear" if modules == ["all-linear"] else modules,
        modules_to_save=random_parts(base) or None,
        **more,
    )
    model = get_peft_model(base, made)
    return Adapted(model, model.save_pretrained)


def random_parts(model: PreTrainedModel) -> list[str]:
    """Modules of the base that the checkpoint lacks: they are random, so they must train."""
    names = [name for name in model.newly_initialised if name.partition(".")[0] not in HEADS]
    return sorted({name.rpartition(".")[0] for name in names})


# -- starting from an adapter -------------------------------------------------------------------


def continued(adapted: Adapted, source: ModelSource, options: IncrementOptions) -> Adapted:
    """`adapted`, with the weights of `options.lora_path` where given."""
    if options.lora_path is not None:
        same = {"r": ("lora_r", options.lora_r), "lora_alpha": ("lora_alpha", options.lora_alpha)}
        said = continue_from(adapted.model, Path(options.lora_path).expanduser(), same)
        if said and source.speak:
            print(said)
    return adapted


def read_adapter(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An adapter's tensors under Microsoft's names, and what its files say about it.

    Args:
        path: a run's folder, its `adapter` folder, PEFT's folder, a `.bin` or `.safetensors` file.
    """
    path = adapter_folder(path)
    if path.is_file():
        tensors = read_safetensors(path) if path.suffix == ".safetensors" else read_bin(path)
        return _microsoft_names(tensors), {}
    if (path / LORALIB_WEIGHTS).is_file():
        values = json.loads((path / LORALIB_CONFIG).read_text("utf-8"))
        return read_safetensors(path / LORALIB_WEIGHTS), values
    for name, read in (
        ("adapter_model.safetensors", read_safetensors),
        ("adapter_model.bin", read_bin),
    ):
        if (path / name).is_file():
            config = PeftConfig.from_pretrained(path)
            return _microsoft_names(read(path / name)), config.to_dict()
    raise CheckpointError(
        f"{path}: no adapter (--lora_path); give a run's folder, a folder with "
        f"adapter_model.safetensors or {LORALIB_WEIGHTS}, or a file of tensors"
    )


def adapter_folder(path: Path) -> Path:
    """Where the adapter of `--lora_path` is: the path itself, or its folder in a run's folder."""
    return path / "adapter" if (path / "adapter").is_dir() else path


def _microsoft_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    def renamed(name: str) -> str:
        name = name.removeprefix(PEFT_PREFIX)
        return name.removesuffix(".weight") if ".lora_" in name else name

    return {renamed(name): tensor for name, tensor in tensors.items()}


def continue_from(model: nn.Module, path: Path, same: dict[str, tuple[str, Any]]) -> str:
    """Loads an adapter into a model that has fresh ones; a head of other labels stays fresh.

    Args:
        model: with adapters.
        path: see `read_adapter`.
        same: what the file's description must agree in: its name there -> (option, value).

    Returns:
        What there is to say about the head, or "".

    Raises:
        CheckpointError: its factors are not the model's, in names, shapes or scaling.
    """
    tensors, values = read_adapter(path)
    for name, (option, ours) in same.items():
        if name in values and values[name] != ours:
            raise CheckpointError(
                f"{path} has {name} {values[name]}: give --{option} {values[name]}"
            )
    known = _named(model)
    factors = {name: t for name, t in tensors.items() if ".lora_" in name}
    ours = [name for name in known if ".lora_" in name]
    _refuse_other_factors(path, factors, known, ours)
    others = {name: t for name, t in tensors.items() if name in known and name not in factors}
    head = {name: t for name, t in others.items() if known[name].requires_grad}
    said = ""
    wrong = [name for name, t in head.items() if t.shape != known[name].shape]
    if wrong:
        parts = {name.partition(".")[0] for name in wrong}
        head = {name: t for name, t in head.items() if name.partition(".")[0] not in parts}
        said = (
            f"{path}: its {', '.join(sorted(parts))} is for another number of labels "
            f"({wrong[0]}: {tuple(tensors[wrong[0]].shape)}, here {tuple(known[wrong[0]].shape)}) "
            "and is left out; only the LoRA factors are taken over"
        )
    with torch.no_grad():
        for name, tensor in {**factors, **head}.items():
            known[name].copy_(tensor)
    return said


def _refuse_other_factors(
    path: Path, factors: dict[str, Tensor], known: dict[str, nn.Parameter], ours: list[str]
) -> None:
    lines = [f"not in the file: {name}" for name in ours if name not in factors]
    lines += [f"not in the model: {name}" for name in factors if name not in known]
    lines += [
        f"{name}: {tuple(tensor.shape)} in the file, {tuple(known[name].shape)} here"
        for name, tensor in factors.items()
        if name in known and tensor.shape != known[name].shape
    ]
    if lines:
        more = f"\n  and {len(lines) - 6} more" if len(lines) > 6 else ""
        raise CheckpointError(
            f"{path} is no adapter of this model with these options (--model_name_or_path, "
            "--lora_r, --lora_modules):\n  " + "\n  ".join(lines[:6]) + more
        )


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters under the names a model without any wrapper would have."""
    names: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix(PEFT_PREFIX)
        if ".original_module." in name:
            continue
        name = name.replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")
        name = name.replace(".default.weight", "").replace(".default", "")
        names[name] = parameter
    return names


# -- optimisers ---------------------------------------------------------------------------------


def adamw(
    groups: list[dict[str, Any]], options: AdamWOptions, run: RunFacts
) -> torch.optim.Optimizer:
    """torch's AdamW: p ← p(1 − lr·wd), then p ← p − lr·m̂/(√v̂ + eps), in one kernel where possible.

    Under a GradScaler the fused kernel would decide by itself to skip a step, so it is not used.
    """
    parameters = [p for group in groups for p in group["params"]]
    fused = not run.fp16 and all(p.is_floating_point() for p in parameters)
    return torch.optim.AdamW(
        groups,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        fused=fused,
    )
