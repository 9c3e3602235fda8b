"""Which modules an adapter goes into: names, suffixes, patterns, layer numbers, `"all-linear"`."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import nn

from ..patterns import matches, matches_end
from ..protocols import TargetOptions

ItemT = TypeVar("ItemT")

# Attention projections adapted by default, by `config.model_type`.
DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    "albert": ("query", "value"),
    "bart": ("q_proj", "v_proj"),
    "bert": ("query", "value"),
    "bloom": ("query_key_value",),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "distilbert": ("q_lin", "v_lin"),
    "electra": ("query", "value"),
    "falcon": ("query_key_value",),
    "gemma": ("q_proj", "v_proj"),
    "gpt2": ("c_attn",),
    "gpt_neo": ("q_proj", "v_proj"),
    "gpt_neox": ("query_key_value",),
    "gptj": ("q_proj", "v_proj"),
    "layoutlm": ("query", "value"),
    "llama": ("q_proj", "v_proj"),
    "mistral": ("q_proj", "v_proj"),
    "mpnet": ("q", "v"),
    "mt5": ("q", "v"),
    "opt": ("q_proj", "v_proj"),
    "phi": ("q_proj", "v_proj"),
    "qwen2": ("q_proj", "v_proj"),
    "roberta": ("query", "value"),
    "t5": ("q", "v"),
    "vit": ("query", "value"),
    "xlm-roberta": ("query", "value"),
}


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is Hugging Face's `Conv1D`: a linear map with a weight stored (in, out)."""
    # by its name and attributes: this package does not import transformers
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "weight")


def bypassed_by_parent(module: nn.Module) -> bool:
    """Whether the parent reads this module's weight itself (`nn.MultiheadAttention` does)."""
    # torch's private class for `out_proj`; its name is all there is to tell it by
    return type(module).__name__ == "NonDynamicallyQuantizableLinear"


def walk(
    model: nn.Module, opaque: tuple[type, ...], prefix: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of a model, not looking inside modules of the `opaque` types."""
    for name, child in model.named_children():
        path = f"{prefix}{name}"
        yield path, child
        if not isinstance(child, opaque):
            yield from walk(child, opaque, f"{path}.")


def name_matches(name: str, entry: str) -> bool:
    """Whether `entry` is the module name or the end of it, at a dot."""
    return name == entry or name.endswith(f".{entry}")


def pattern_value(patterns: Mapping[str, ItemT], name: str, default: ItemT) -> ItemT:
    """Value of the first key that fits the end of `name` (a regular expression), else `default`."""
    for key, value in patterns.items():
        if matches_end(key, name):
            return value
    return default


def check_patterns(option: str, patterns: Mapping[str, object], names: Iterable[str]) -> None:
    """Raises when a key of `rank_pattern` or `alpha_pattern` fits no adapted module."""
    names = list(names)
    for key in patterns:
        if not any(matches_end(key, name) for name in names):
            raise ValueError(
                f"{option}: {key!r} matches none of the adapted modules" + suggestions(key, names)
            )


def suggestions(entry: str, names: Iterable[str]) -> str:
    """`; did you mean …` with the leaf names or full names nearest to `entry`."""
    names = list(names)
    # without the numbers of module lists ("layer.0" → "0"): nobody means those
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names if not name[-1:].isdigit()})
    near = difflib.get_close_matches(entry, [*leaves, *names], n=3, cutoff=0.5)
    shown = near or leaves[:12]
    return f"; did you mean {', '.join(map(repr, shown))}?" if shown else ""


def default_targets(model: nn.Module) -> list[str]:
    """The table's entry for this model's architecture."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in DEFAULT_TARGETS:
        raise ValueError(
            f"target_modules is not set and there is no default for model type {kind!r}; name the "
            "modules, for instance target_modules=['query', 'value'] or 'all-linear'"
        )
    return list(DEFAULT_TARGETS[kind])


def all_linear(
    model: nn.Module, candidates: list[tuple[str, nn.Module]], skip: Iterable[str]
) -> list[str]:
    """Every linear map of the body: `nn.Linear` and `Conv1D`, the output head left out.

    The head is what lies outside `base_model_prefix` (models that have one), the output embedding,
    and everything in `skip`. The result is as short as it can be: a leaf name stands for all
    modules that end in it, a full name for one.
    """
    # Hugging Face's models name their body; what lies beside it is the task's head
    prefix = getattr(model, "base_model_prefix", "")
    inside = f"{prefix}." if prefix and hasattr(model, prefix) else ""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    chosen = [
        name
        for name, module in candidates
        if (isinstance(module, nn.Linear) or is_conv1d(module))
        and not bypassed_by_parent(module)
        and name.startswith(inside)
        and module is not output
        and not under(name, skip)
    ]
    if not chosen:
        raise ValueError("target_modules='all-linear': this model has no linear map in its body")
    wanted, entries = set(chosen), []
    for leaf in sorted({name.rsplit(".", 1)[-1] for name in chosen}):
        # a leaf name may stand for its modules only if all of them are wanted: "dense" would take
        # a head's `dense` along. A bare number names a place in a list, in any list.
        matching = [name for name, _ in candidates if name_matches(name, leaf)]
        full = [name for name in matching if name in wanted]
        entries += [leaf] if len(full) == len(matching) and not leaf.isdigit() else full
    return entries


def under(name: str, entries: Iterable[str]) -> bool:
    """Whether the module called `name` is, or lies inside, one that an entry names."""
    parts = name.split(".")
    heads = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(name_matches(head, entry) for entry in entries for head in heads)


def layer_index(name: str, layers_pattern: list[str]) -> int | None:
    """The number in `name` after `.<pattern>.`; without patterns, after any `.<word>.`."""
    parts = name.split(".")
    for pattern in layers_pattern or [r"[^.]+"]:
        # of nested lists ("layers.3.experts.7.") the outer number counts
        for i, part in enumerate(parts):
            if i and part.isdecimal() and matches_end(pattern, ".".join(parts[:i])):
                return int(part)
    return None


def in_layers(name: str, config: TargetOptions) -> bool:
    """Whether `layers_to_transform` allows the module called `name`."""
    layers = as_list(getattr(config, "layers_to_transform", None))
    patterns = as_list(getattr(config, "layers_pattern", None))
    return not layers or layer_index(name, patterns) in layers


def as_list(value: object) -> list[Any]:
    """None → [], a scalar → [scalar], any collection → a list."""
    if value is None:
        return []
    if isinstance(value, (set, frozenset)):
        return sorted(value)  # the same order in every process and every file
    return list(value) if isinstance(value, (list, tuple)) else [value]


def select_targets(candidates: list[tuple[str, nn.Module]], config: TargetOptions) -> list[str]:
    """The names that `config` chooses, in model order.

    `target_modules` as a string is a regular expression for the whole name; as a list, exact names
    or dotted ends. `layers_to_transform` then keeps the given layer numbers, `exclude_modules`
    takes names away, and nothing inside `modules_to_save` is adapted (it is trained in full).
    Layer numbers, targets and exclusions without any effect are named in a warning, as PEFT's files
    may hold them.

    Raises:
        ValueError: an entry, or the whole selection, matches no module.
    """
    names = [name for name, _ in candidates]
    targets = config.target_modules
    if isinstance(targets, str):
        chosen = [name for name in names if matches(targets, name)]
        if not chosen:
            raise ValueError(
                f"target_modules={targets!r} (a regular expression) matches no module"
                + suggestions(targets.rsplit(".", 1)[-1], names)
            )
    else:
        for entry in as_list(targets):
            if not any(name_matches(name, entry) for name in names):
                raise ValueError(
                    f"target_modules: no module is called {entry!r}" + suggestions(entry, names)
                )
        entries = set(as_list(targets))
        chosen = [name for name in names if any(name_matches(name, entry) for entry in entries)]
    # not every method has PEFT's options for LoRA: those absent restrict nothing
    saved = as_list(config.modules_to_save)
    excluded = getattr(config, "exclude_modules", None)
    kept = [
        name
        for name in chosen
        if not under(name, saved) and not _excluded(name, excluded) and in_layers(name, config)
    ]
    if not kept:
        raise ValueError(
            f"target_modules={targets!r} matched {len(chosen)} modules, but layers_to_transform, "
            "exclude_modules and modules_to_save leave none of them"
        )
    _warn_of_idle(names, chosen, config)
    return kept


def _warn_of_idle(names: list[str], chosen: list[str], config: TargetOptions) -> None:
    """Names the entries of the options that restrict `chosen` which have no effect."""
    patterns = as_list(getattr(config, "layers_pattern", None))
    numbers = {layer_index(name, patterns) for name in chosen}
    layers = as_list(getattr(config, "layers_to_transform", None))
    if absent := [layer for layer in layers if layer not in numbers]:
        there = ", ".join(str(n) for n in sorted(n for n in numbers if n is not None))
        _warn(f"layers_to_transform: no target is in layer {_shown(absent)}; there are {there}")
    entries = [] if isinstance(config.target_modules, str) else as_list(config.target_modules)
    outside = [
        entry
        for entry in entries
        if not any(in_layers(name, config) for name in chosen if name_matches(name, entry))
    ]
    if outside:
        _warn(
            f"target_modules: {_shown(outside)} adapts nothing, as no module of that name is in "
            f"the layers {layers}; without layers_to_transform it would"
        )
    excluded = getattr(config, "exclude_modules", None)
    each = [excluded] if isinstance(excluded, str) else [[e] for e in as_list(excluded)]
    if idle := [e for e in each if not any(_excluded(name, e) for name in names)]:
        _warn(f"exclude_modules: {_shown(idle)} names no module, so it excludes nothing")


def _shown(entries: Iterable[Any]) -> str:
    return ", ".join(repr(e[0] if isinstance(e, list) else e) for e in entries)


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=8)


def _excluded(name: str, excluded: str | Iterable[str] | None) -> bool:
    if excluded is None:
        return False
    if isinstance(excluded, str):
        return matches(excluded, name)
    return any(name_matches(name, entry) for entry in excluded)
