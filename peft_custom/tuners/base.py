"""What every adapter method shares: finding layers, wrapping them, switching, merging, naming.

A method is a folder. `layer.py` has a `BaseTunerLayer` (the formula), `config.py` a `PeftConfig`
(the options), `model.py` a `BaseTuner` registered under its adapter type, and `hooks.py` its
`TrainingHooks` where it adapts while training:

    @register_tuner("LORA", LoraConfig)
    class LoraModel(BaseTuner[LoraConfig]):
        def new_layer(self, base, name, config): ...
        def add_to_layer(self, layer, adapter, name, config): ...
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from loralib import LoRALayer
from loralib.decay import decay_groups

from ..config import CONFIG_CLASSES, PeftConfig
from ..protocols import TargetOptions
from . import targets
from .modules_to_save import BASE, ModulesToSaveWrapper, Routes
from .parameters import check_biases, trained_biases
from .tuner_layer import BaseTunerLayer, disable_fast_path, iter_adapters

if TYPE_CHECKING:
    from ..hooks.base import TrainingHooks

__all__ = [
    "BaseTuner",
    "BaseTunerLayer",
    "iter_adapters",
    "iter_tuners",
    "register_tuner",
    "tuner_class",
]

ConfigT = TypeVar("ConfigT", bound=PeftConfig)
TunerT = TypeVar("TunerT", bound="type[BaseTuner]")

TUNERS: dict[str, type[BaseTuner]] = {}

SMALL = (
    1_000_000  # numbers that are built whatever the file holds; the load then names what differs
)
SIZES = ("r", "init_r", "rank_pattern", "block_size")  # options that say how large an adapter is


def register_tuner(peft_type: str, config_class: type[PeftConfig]) -> Callable[[TunerT], TunerT]:
    """Class decorator: makes `peft_type` known to `get_peft_model` and to saved files."""

    def register(tuner: TunerT) -> TunerT:
        tuner.peft_type = peft_type
        tuner.config_class = config_class
        TUNERS[peft_type] = tuner
        CONFIG_CLASSES[peft_type] = config_class
        return tuner

    return register


def tuner_class(config: PeftConfig) -> type[BaseTuner]:
    """The tuner registered for a configuration's adapter type."""
    if config.peft_type not in TUNERS:
        raise ValueError(
            f"no tuner is registered for {config.peft_type!r}; known: {', '.join(sorted(TUNERS))}"
        )
    return TUNERS[config.peft_type]


def iter_tuners(model: nn.Module) -> Iterator[BaseTuner]:
    """Every tuner that injected adapters into `model`, whether it wraps the model or not."""
    seen: set[int] = set()
    for module in model.modules():
        for tuner in (module, *module.__dict__.get("_injecting_tuners", ())):
            if isinstance(tuner, BaseTuner) and id(tuner) not in seen:
                seen.add(id(tuner))
                yield tuner


def _refuse_adapted(model: nn.Module) -> None:
    """Raises where `model` is no fresh base: adapters of an earlier tuner would go on acting."""
    carried = [(name, layer.adapters) for name, layer in iter_adapters(model)]
    carried += [
        (name, list(module.modules_to_save))
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    ]
    carried += [
        (name, ["loralib's own"])
        for name, module in model.named_modules()
        if isinstance(module, LoRALayer) and module.adapted and not module.merged
    ]
    if carried:
        adapters = dict.fromkeys(adapter for _, names in carried for adapter in names)
        raise ValueError(
            f"this {type(model).__name__} carries adapters already ({', '.join(adapters)}; in "
            f"{len(carried)} modules, the first {carried[0][0]!r}), so it is no fresh base: add to "
            "them with add_adapter or load_adapter of its PeftModel, or take them out first, with "
            "unload() or merge_and_unload(); merge loralib's layers, or build the model without"
        )


class BaseTuner(nn.Module, Generic[ConfigT]):
    """Puts adapters of one type into a model and manages them; `model` is the injected model.

    A method names its options: `class LoraModel(BaseTuner[LoraConfig])`.
    """

    peft_type: ClassVar[str]
    config_class: ClassVar[type[PeftConfig]]
    target_types: ClassVar[str] = "Linear"  # named in the error for a layer that cannot be adapted

    def __init__(
        self,
        model: nn.Module,
        config: ConfigT,
        adapter_name: str = "default",
        file: Path | None = None,
    ) -> None:
        super().__init__()
        _refuse_adapted(model)
        self.model = model
        self.peft_config: dict[str, ConfigT] = {}
        self.active_adapters: list[str] = []
        self.trained_adapters: list[str] = []  # those of them that get gradients
        self.finished_adapters: dict[str, bool] = {}  # see hooks/finished.py
        self._fast_path_flags: list[tuple[nn.Module, int]] = []  # see disable_fast_path
        self._unties = False  # whether a saved module's copy no longer shares its weight
        self.training = model.training
        self.add_adapter(adapter_name, config, file)
        model.requires_grad_(False)
        self.set_adapter(adapter_name)

    # --- what a method implements ---------------------------------------------------------------
    def new_layer(self, base: nn.Module, name: str, config: ConfigT) -> BaseTunerLayer | None:
        """The wrapper for one base layer; None when the layer's type cannot be adapted."""
        raise NotImplementedError

    def add_to_layer(self, layer: BaseTunerLayer, adapter: str, name: str, config: ConfigT) -> None:
        """Creates adapter `adapter`'s parameters in `layer`, whose module name is `name`."""
        raise NotImplementedError

    def check_config(self, config: ConfigT, names: list[str]) -> None:
        """Refuses configurations that do not fit the chosen modules; nothing by default."""

    def size(self, config: ConfigT, name: str, weight: Tensor) -> int:
        """How many numbers the adapter of this configuration has on module `name`; 0: unknown.

        Args:
            config: the adapter's.
            name: of the module.
            weight: of the module, of any shape; its first dimension is one side of the matrix.
        """
        return 0

    def training_hooks(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int | None,
        **options: Any,
    ) -> TrainingHooks | None:
        """Hooks that adapt the adapter while it trains; None for methods that only train."""
        return None

    def special_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Optimiser groups with rates of their own (`params`, `name`, `lr`, …); none by default."""
        return []

    def live_tensors(self, adapter: str) -> dict[str, Tensor]:
        """The adapter's tensors in the adapted layers: `<module>.<tensor>` → live tensor."""
        return {
            f"{name}.{key}": tensor
            for name, layer in iter_adapters(self.model)
            for key, tensor in layer.adapter_tensors(adapter).items()
        }

    def export(self, adapter: str) -> tuple[PeftConfig, dict[str, Tensor]]:
        """Configuration and tensors as they go into a file; methods may cut or convert here."""
        return copy.deepcopy(self.peft_config[adapter]), self.live_tensors(adapter)

    def import_state(self, adapter: str, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Turns a file's tensors (`<module>.<tensor>`) into the live shapes; the identity here."""
        return state

    def __getattr__(self, name: str) -> Any:
        """Takes attributes that the tuner does not have from the model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not set yet (copying, unpickling): no endless recursion
                raise
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the injected model."""
        return self.model(*args, **kwargs)

    # --- injection -----------------------------------------------------------------------------
    def add_adapter(self, adapter: str, config: ConfigT, file: Path | None = None) -> None:
        """Injects one more adapter; it is not activated. The configuration is copied.

        Args:
            adapter: its name.
            config: its options.
            file: the weights that it will be given; what they cannot fill is not built.
        """
        if not isinstance(config, self.config_class) or config.peft_type != self.peft_type:
            raise TypeError(
                f"a {self.peft_type} model takes {self.config_class.__name__}, not "
                f"{type(config).__name__}: all adapters of a model are of one type"
            )
        if adapter in self.peft_config:
            raise ValueError(f"there is an adapter {adapter!r} already; delete it or choose a name")
        if not adapter or "." in adapter or adapter == BASE:
            raise ValueError(f"adapter name {adapter!r}: use one without a dot, and not {BASE}")
        config = copy.deepcopy(config)  # it is completed below, and the caller may use it again
        biased = [n for n, c in self.peft_config.items() if getattr(c, "bias", "none") != "none"]
        if biased and getattr(config, "bias", "none") != "none":
            raise ValueError(
                f"bias={config.bias!r}: adapter {biased[0]!r} trains biases already, "
                "and biases are shared; only one adapter may train them"
            )
        chosen = self._resolve(config)
        saved = self._modules_to_save(config)
        self.check_config(config, [name for name, _ in chosen])
        adapted = [module for _, module in chosen]
        check_biases(self.model, getattr(config, "bias", "none"), adapted, saved)
        if file is not None:
            self._check_size(config, chosen, file)
        self._wrap(adapter, config, chosen)
        try:
            for module in saved:
                self._save_in_full(adapter, module)
        except Exception:
            self._take_out(adapter)
            raise
        self.peft_config[adapter] = config
        self._leave_inactive(adapter)

    def _save_in_full(self, adapter: str, module: nn.Module) -> None:
        if not isinstance(module, ModulesToSaveWrapper):
            self._warn_of_ties(module)
            wrapper = ModulesToSaveWrapper(module)
            self._replace(module, wrapper)
            module = wrapper
        module.add_adapter(adapter)

    def _leave_inactive(self, adapter: str) -> None:
        """A new adapter's parameters start trainable; here they wait, and nothing else changes."""
        for _, layer in iter_adapters(self.model):
            layer.active_adapters = list(self.active_adapters)
            for parameter in layer.adapter_parameters(adapter):
                parameter.requires_grad_(False)
            layer.rebind()
        for _, wrapper in self._wrappers():
            if adapter in wrapper.modules_to_save:
                wrapper.modules_to_save[adapter].requires_grad_(False)

    def _check_size(self, config: ConfigT, chosen: list[tuple[str, nn.Module]], file: Path) -> None:
        """Refuses to build what `file` cannot hold: every number takes a byte of it or more."""
        numbers = sum(
            self.size(config, name, module.weight)
            for name, module in chosen
            if isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() > 0
        )
        if numbers > file.stat().st_size + SMALL:
            ranks = [f"{key}={getattr(config, key)}" for key in SIZES if hasattr(config, key)]
            raise ValueError(
                f"{file} cannot hold the adapter that its configuration describes, "
                f"{numbers:,} numbers in {len(chosen)} modules ({', '.join(ranks)}): one of the "
                "two files is damaged, or the adapter is another model's"
            )

    def _warn_of_ties(self, module: nn.Module) -> None:
        """A copy of a module is trained without the modules it shared weights with."""
        if shared := self.tied_with(module):
            self._unties = True
            warnings.warn(
                f"modules_to_save: {type(module).__name__} shares its weight with "
                f"{', '.join(shared)}; what is trained and saved is a copy, not shared with them",
                stacklevel=7,
            )

    def _resolve(self, config: TargetOptions) -> list[tuple[str, nn.Module]]:
        """The modules to adapt, by name, as `config` chooses them.

        `target_modules` of None or "all-linear" is replaced by the entries it stands for, so that a
        saved configuration names the modules whatever a later release takes for its defaults.
        """
        # Not into wrappers: their inner `base_layer` and the saved copies are not modules of the
        # model, and a pattern must not reach them.
        modules = list(targets.walk(self.model, (BaseTunerLayer, ModulesToSaveWrapper)))
        # A second adapter meets layers that the first one wrapped. Selecting by type has to see the
        # base layer; the wrapper is what gets the new adapter.
        candidates = [
            (name, module.base_layer if isinstance(module, BaseTunerLayer) else module)
            for name, module in modules
        ]
        if config.target_modules is None:
            config.target_modules = targets.default_targets(self.model)
        elif config.target_modules == "all-linear":
            skip = targets.as_list(config.modules_to_save)
            inside = [(n, module) for n, module in candidates if targets.in_layers(n, config)]
            config.target_modules = targets.all_linear(self.model, inside, skip)
        by_name = dict(modules)
        return [(name, by_name[name]) for name in targets.select_targets(candidates, config)]

    def _modules_to_save(self, config: ConfigT) -> list[nn.Module]:
        """The modules (or their wrappers) that `config.modules_to_save` names."""
        entries = targets.as_list(getattr(config, "modules_to_save", None))
        modules = list(targets.walk(self.model, (BaseTunerLayer, ModulesToSaveWrapper)))
        for entry in entries:
            if not any(targets.name_matches(name, entry) for name, _ in modules):
                raise ValueError(
                    f"modules_to_save: no module is called {entry!r}"
                    + targets.suggestions(entry, [name for name, _ in modules])
                )
        chosen = [
            (name, module)
            for name, module in modules
            if any(targets.name_matches(name, entry) for entry in entries)
        ]
        for name, module in chosen:
            adapted = next(iter_adapters(module), None)
            if adapted is not None and not isinstance(module, ModulesToSaveWrapper):
                raise ValueError(
                    f"modules_to_save: {name!r} is adapted by {', '.join(adapted[1].adapters)}, so "
                    "it cannot be copied and trained in full beside; adapt it here as well"
                )
        return [module for _, module in chosen]

    def _wrap(self, adapter: str, config: ConfigT, chosen: list[tuple[str, nn.Module]]) -> None:
        """Wraps the chosen modules; nothing is replaced unless every one of them can be adapted."""
        layers: list[tuple[nn.Module, BaseTunerLayer]] = []
        try:
            for name, module in chosen:
                if targets.bypassed_by_parent(module):
                    raise NotImplementedError(
                        f"{name!r}: nn.MultiheadAttention reads this weight past the module, so an "
                        "adapter on it would do nothing; leave it out of target_modules"
                    )
                wrapped = isinstance(module, BaseTunerLayer)  # by an earlier adapter
                layer = module if wrapped else self.new_layer(module, name, config)
                if layer is None:
                    raise ValueError(
                        f"target_modules: {name!r} is a {type(module).__name__}; adapters of "
                        f"type {self.peft_type} go into {self.target_types}"
                    )
                layers.append((module, layer))
                self.add_to_layer(layer, adapter, name, config)
        except Exception:
            for _, layer in layers:  # earlier adapters' layers must not keep half of this one
                layer.delete_adapter(adapter)
            raise
        for module, layer in layers:
            if module is not layer:
                layer.train(module.training)
                self._replace(module, layer)
        self._fast_path_flags += disable_fast_path(self.model)

    def _replace(self, old: nn.Module, new: nn.Module) -> None:
        """Puts `new` wherever `old` is registered (a module may have several names)."""
        for parent in list(self.model.modules()):
            if parent is new or isinstance(parent, BaseTunerLayer):
                continue  # wrappers go on holding their base layers
            for name, child in list(parent._modules.items()):
                if child is old:
                    parent._modules[name] = new

    # --- switching -----------------------------------------------------------------------------
    def _wrappers(self) -> Iterator[tuple[str, ModulesToSaveWrapper]]:
        for name, module in self.model.named_modules():
            if isinstance(module, ModulesToSaveWrapper):
                yield name, module

    def set_adapter(self, names: str | list[str], inference_mode: bool | None = None) -> None:
        """Activates one adapter or several; exactly their parameters become trainable.

        Args:
            names: the adapters to activate.
            inference_mode: freeze them as well; None leaves it to each adapter's configuration.

        Raises:
            ValueError: an unknown name, or several adapters with a head each; nothing is switched.
        """
        names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
        for name in names:
            self.adapter_config(name)
        trained = [
            name
            for name in names
            if not (
                self.peft_config[name].inference_mode if inference_mode is None else inference_mode
            )
        ]
        self.switch(names, trained)

    def switch(self, names: list[str], trained: list[str]) -> None:
        """Activates `names`; gradients go to `trained` alone."""
        for _, wrapper in self._wrappers():
            wrapper.copy_of(names)  # refuses before anything is touched
        if any(layer.merged for _, layer in iter_adapters(self.model)):
            # a merged weight holds the adapters active until now, not those to be activated
            warnings.warn("adapters were merged; they are unmerged before switching", stacklevel=4)
            self.unmerge_adapter()
        self.active_adapters, self.trained_adapters = names, trained
        for _, layer in iter_adapters(self.model):
            layer.set_adapter(names, trained)
        for _, wrapper in self._wrappers():
            wrapper.set_adapter(names, trained)
        for name in self.peft_config:
            for parameter in self.bias_parameters(name).values():
                parameter.requires_grad_(name in trained)

    def trained_configs(self) -> dict[str, ConfigT]:
        """The active adapters of which anything gets a gradient now, and their configurations."""
        layers = [layer for _, layer in iter_adapters(self.model)]
        return {
            name: self.peft_config[name]
            for name in self.active_adapters
            if any(p.requires_grad for layer in layers for p in layer.adapter_parameters(name))
        }

    def adapter_config(self, name: str) -> ConfigT:
        """The configuration of one adapter; an unknown name is an error."""
        if name not in self.peft_config:
            raise ValueError(f"no adapter {name!r}; there are: {', '.join(self.peft_config)}")
        return self.peft_config[name]

    def enable_adapters(self, enabled: bool) -> None:
        """Turns all adapters and saved modules on or off."""
        for _, layer in iter_adapters(self.model):
            layer.enable_adapters(enabled)
        for _, wrapper in self._wrappers():
            wrapper.enable_adapters(enabled)

    def delete_adapter(self, name: str) -> None:
        """Removes an adapter; when no other was active, the first remaining one takes its place."""
        self.adapter_config(name)
        if any(name in layer.merged_adapters for _, layer in iter_adapters(self.model)):
            warnings.warn(f"{name!r} is merged; everything is unmerged to delete it", stacklevel=2)
            self.unmerge_adapter()
        for parameter in self.bias_parameters(name).values():
            parameter.requires_grad_(False)
        self._take_out(name)
        del self.peft_config[name]
        self.finished_adapters.pop(name, None)
        if name not in self.active_adapters:
            return
        left = [other for other in self.active_adapters if other != name]
        if left:
            self.switch(left, [other for other in self.trained_adapters if other != name])
        else:
            self.set_adapter(list(self.peft_config)[:1])

    def _take_out(self, adapter: str) -> None:
        """Removes an adapter's tensors, and wrappers that hold no adapter any more."""
        for _, layer in list(iter_adapters(self.model)):
            layer.delete_adapter(adapter)
            if not layer.adapters:
                self._replace(layer, layer.base_layer)
        for _, wrapper in list(self._wrappers()):
            wrapper.delete_adapter(adapter)
            if not wrapper.modules_to_save:
                self._replace(wrapper, wrapper.original_module)
        if not any(iter_adapters(self.model)):
            self._restore_fast_paths()

    def _restore_fast_paths(self) -> None:
        for module, flag in self._fast_path_flags:
            module.activation_relu_or_gelu = flag
        self._fast_path_flags = []

    @contextlib.contextmanager
    def routed(self, names: list[str], tokens: Tensor | None = None) -> Iterator[None]:
        """Within the context row i of every input goes through adapter `names[i]`.

        Args:
            names: one adapter per sample; `"__base__"` is the model without adapters.
            tokens: packed batches: the number of tokens of each sample, (n,).
        """
        for name in set(names) - {BASE}:
            self.adapter_config(name)
        owner = torch.arange(len(names))  # (n,): a head sees one row a sample
        rows = owner if tokens is None else owner.repeat_interleave(tokens.cpu())  # (tokens,)
        device = next(self.model.parameters()).device

        distinct = list(dict.fromkeys(names))
        adapter_of = torch.tensor([distinct.index(name) for name in names])  # (n,)

        def routes(owners: Tensor) -> Routes:
            chosen = adapter_of[owners]
            return [
                (name, (chosen == i).nonzero()[:, 0].to(device)) for i, name in enumerate(distinct)
            ]

        layers = [layer for _, layer in iter_adapters(self.model)]
        wrappers = [wrapper for _, wrapper in self._wrappers()]
        try:
            for layer in layers:
                layer.route((routes(rows), routes(owner)))
            for wrapper in wrappers:
                wrapper.routes = (routes(owner), routes(rows))
            yield
        finally:
            for layer in layers:
                layer._routes = None
                layer.rebind()
            for wrapper in wrappers:
                wrapper.routes = None

    # --- merging -------------------------------------------------------------------------------
    def tied_with(self, module: nn.Module) -> list[str]:
        """Names of other modules that use a parameter of `module`."""
        own = {id(p) for p in module.parameters()}
        inside = set(module.modules())
        return [
            name
            for name, other in self.model.named_modules()
            if other not in inside and any(id(p) in own for p in other._parameters.values())
        ]

    def _untie_config(self) -> None:
        config = getattr(self.model, "config", None)
        if hasattr(config, "tie_word_embeddings"):
            config.tie_word_embeddings = False

    def merge_adapter(
        self, names: list[str] | None = None, keep: bool = True, untie: bool = False
    ) -> None:
        """Folds adapters (default: the active ones) into the base weights.

        Args:
            names: adapters to fold in.
            keep: keep every original weight, so that `unmerge_adapter` is exact.
            untie: give an adapted weight that other modules share a copy of its own first.

        Raises:
            ValueError: an adapted weight is shared with a module the adapter does not act on, or a
                merged weight is not finite; nothing is merged then.
        """
        wanted = self.active_adapters if names is None else list(names)
        for name in wanted:
            self.adapter_config(name)
        layers = [
            (n, layer)
            for n, layer in iter_adapters(self.model)
            if set(wanted) & set(layer.adapters)
        ]
        tied = self._tied_layers(layers, untie)
        if tied or not keep:  # no way back: look at every weight before the first is written
            for _, layer in layers:
                layer.finite_merged_weight(layer.merged_with(wanted))
        for layer in tied:  # merging writes into the weight in place
            layer.base_layer.weight = nn.Parameter(
                layer.base_layer.weight.detach().clone(), requires_grad=False
            )
            self._untie_config()
        before = [(layer, list(layer.merged_adapters)) for _, layer in layers]
        try:
            lost = {name: layer.merge(wanted, keep=keep) for name, layer in layers}
        except ValueError:
            for layer, names in before:
                layer.unmerge()
                layer.merge(names)
            raise
        worst = max(lost, key=lost.__getitem__, default=None)
        if worst is not None and lost[worst] > 1e-2:
            warnings.warn(
                f"merging rounded away {100 * lost[worst]:.1f} % of the increment of {worst} (the "
                "base is in low precision); for an exact merge load the base in float32",
                stacklevel=3,
            )

    def _tied_layers(
        self, layers: list[tuple[str, BaseTunerLayer]], untie: bool
    ) -> list[BaseTunerLayer]:
        """Those of `layers` that share their weight; an error unless they may be untied."""
        tied = []
        for name, layer in layers:
            shared = self.tied_with(layer.base_layer)
            if shared and not untie:
                raise ValueError(
                    f"{name!r} shares its weight with {', '.join(shared)}: merging would change "
                    "both. Keep the adapter unmerged, or merge with untie=True, which gives "
                    f"{name!r} a weight of its own (and sets config.tie_word_embeddings=False)"
                )
            if shared:
                tied.append(layer)
        return tied

    def unmerge_adapter(self) -> None:
        """Puts the original weights back, bit for bit."""
        for _, layer in iter_adapters(self.model):
            layer.unmerge()

    def unload(self) -> nn.Module:
        """Takes every wrapper out and returns the plain model, with the base weights as they are.

        Saved modules (the task head) stay: the active adapter's copy replaces the original, in the
        original's dtype, so that the plain model runs (a head is trained in fp32 on any base).
        """
        for _, layer in list(iter_adapters(self.model)):
            if not layer.merged:  # dropped adapters leave the original weight (PiSSA split it)
                layer.restore_base()
        self._unwrap()
        if self._unties:
            self._untie_config()
        self._restore_fast_paths()
        self.model.__dict__.pop("_injecting_tuners", None)
        return self.model

    def _unwrap(self) -> list[tuple[nn.Module, nn.Module]]:
        """Puts the plain modules in the wrappers' places; returns the pairs (plain, wrapper)."""
        pairs = [(layer.base_layer, layer) for _, layer in iter_adapters(self.model)]
        pairs += [(wrapper.plain_module(), wrapper) for _, wrapper in self._wrappers()]
        for plain, wrapper in pairs:
            self._replace(wrapper, plain)
        return pairs

    @contextlib.contextmanager
    def unwrapped(self) -> Iterator[nn.Module]:
        """Within the context the model is what `unload` would return; then it is wrapped again."""
        pairs = self._unwrap()
        try:
            yield self.model
        finally:
            for plain, wrapper in pairs:
                self._replace(plain, wrapper)

    # --- parameters ----------------------------------------------------------------------------
    def bias_parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """Biases of the base model that this adapter trains (`bias="all"|"lora_only"`)."""
        mode = getattr(self.peft_config[adapter], "bias", "none")
        return trained_biases(self.model, mode, adapter)

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Named optimiser groups: the tuner's own, then `decay` and `no_decay`."""
        special = self.special_groups(lr, weight_decay)
        grouped = [p for group in special for p in group["params"]]
        return [*special, *decay_groups(self.model, lr, weight_decay, without=grouped)]
