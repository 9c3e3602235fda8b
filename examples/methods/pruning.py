"""What the pruning methods share: their options, the model, its figures and its picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.cli.fields import option
from examples.methods.registry import AdaptedModel

if TYPE_CHECKING:
    from examples.methods.source import ModelSource
    from peft_custom import PeftModel

# Options that are fields of `SpaConfig` under the same name.
SAME = (
    "mask_structure", "mask_block_rows", "mask_block_cols", "pruning_method", "global_topk",
    "initial_threshold", "final_threshold", "initial_warmup", "final_warmup",
    "initial_temperature", "final_temperature", "mask_init", "mask_scale", "regularization",
    "final_lambda", "clip_regularization", "mask_scores_learning_rate",
    "mask_scores_max_grad_norm", "adapter_learning_rate", "reference_compat",
)  # fmt: skip
WARMUP = 0.1  # of training, where neither the pruning nor the learning rate has a warm-up


@dataclass(frozen=True)
class PruningOptions:
    """Masks follow from scores or weights, by a threshold that moves along a cubic."""

    mask_structure: str = option(
        "blocks",
        "blocks of a matrix; linked: heads and feed-forward units; hybrid: blocks in attention, "
        "units in the feed-forward part",
        choices=("blocks", "linked", "hybrid"),
    )
    mask_block_rows: int = option(32, "rows of a block", low=1)
    mask_block_cols: int = option(32, "columns of a block", low=1)
    pruning_method: str = option(
        "topK",
        "topK and magnitude keep a share of the scores or weights; threshold and "
        "sigmoied_threshold (soft movement) what is above a cut; l0 draws gates",
        choices=(
            "topK",
            "magnitude",
            "threshold",
            "sigmoied_threshold",
            "sigmoid_threshold",
            "l0",
        ),  # fmt: skip
    )
    global_topk: bool = option(False, "one ranking for all matrices")
    initial_threshold: float | None = option(
        None, "threshold at the start; none: 1, for cuts 0", low=-100
    )
    final_threshold: float | None = option(
        None, "threshold at the end: topK, magnitude: share to keep; none: 0.7, for cuts 0.1, l0 1",
        low=-100,
    )  # fmt: skip
    pruning_warmup: int | float | None = option(
        None, "w, in steps (500) or as a share (0.1); none: the learning rate's, else 0.1", low=0
    )
    initial_warmup: float = option(1.0, "the threshold waits so many times w", low=0)
    final_warmup: float = option(2.0, "and is final for the last so many times w", low=0)
    initial_temperature: float = option(2 / 3, "l0: temperature of the gates at the start", low=0)
    final_temperature: float = option(2 / 3, "l0: and at the end", low=0)
    mask_init: str = option(
        "constant", "where scores start", choices=("constant", "uniform", "kaiming")
    )
    mask_scale: float | None = option(None, "their value or range; none: 0, for l0 2.197")
    regularization: str | None = option(
        None, "l1: mean of σ(scores); l0: mean probability of an open gate", choices=("l0", "l1")
    )
    final_lambda: float = option(0.0, "its weight at the end of the schedule", low=0)
    clip_regularization: bool = option(
        False,
        "clip its gradient with the others by --max_grad_norm, as the originals do (a large λ "
        "makes all steps smaller); by default it is added after clipping",
    )
    mask_scores_learning_rate: float | None = option(
        None, "rate of the scores; none: 0.01, for l0 0.1", low=0
    )
    mask_scores_max_grad_norm: float = option(
        0.0, "norm to which the scores' gradient is clipped by itself; 0: not", low=0
    )
    adapter_learning_rate: float | None = option(
        None, "rate of what an adapter adds to the weights; none: --learning_rate", low=0
    )
    reference_compat: bool = option(
        False, "topK, magnitude: keep int(share·n) as the originals do, or nothing"
    )
    lora_modules: tuple[str, ...] = option(
        (), "layers to prune, or all-linear; none: attention and feed-forward"
    )
    lora_path: str | None = option(None, "start from this adapter (a run's folder) and its scores")


def with_masks(
    source: ModelSource,
    options: PruningOptions,
    config: type,
    *,
    agree: dict[str, str] | None = None,
    frozen: bool = True,
    **fields: Any,
) -> AdaptedModel:
    """A model under masks.

    Args:
        source: of the model.
        options: of the method.
        config: class of the adapter's configuration.
        agree: fields of a saved adapter that must be as here -> the options that set them.
        frozen: the base's weights stay as they are.
        fields: of the configuration, beside those that all methods share.
    """
    from examples.methods.common import random_parts
    from examples.methods.start import start_from
    from peft_custom import get_peft_model

    base = source.load(frozen=frozen)
    modules = list(options.lora_modules)
    warmup = options.pruning_warmup
    model = get_peft_model(
        base,
        config(
            task_type=source.task_type,
            target_modules="all-linear" if modules == ["all-linear"] else modules or None,
            modules_to_save=random_parts(base) or None,
            warmup_steps=(source.warmup or WARMUP) if warmup is None else warmup,
            **{name: getattr(options, name) for name in SAME},
            **fields,
        ),
    )
    blocks = {name: name for name in ("mask_structure", "mask_block_rows", "mask_block_cols")}
    start_from(model, options, source.print_once, {**blocks, **(agree or {})})
    adapted = AdaptedModel(model, model.save_pretrained)
    adapted.summarize = lambda metrics, main, title, folder: _figures(model, folder)
    adapted.plot = lambda folder, title, rows: _plot(model, folder, title)
    return adapted


def _figures(model: PeftModel, folder: Path | None) -> dict[str, Any]:
    """What is left, with its places in a file; the run itself says how much trained."""
    from examples.methods.common import write_mask_shares

    write_mask_shares(folder, model.base_model.final_masks())
    return {n: v for n, v in model.pruning_summary().items() if n != "trainable_parameters"}


def _plot(model: PeftModel, folder: Path, title: str) -> None:
    """The final masks, and what they leave of every layer."""
    from examples.plots.block_masks import block_masks
    from examples.plots.density import layer_densities

    found = model.base_model.final_masks()
    maps = {name: m if m.dim() == 2 else m[:, None] for name, m in found.items()}
    block_masks(folder / "masks.png", maps, title)
    shares = {name: float((m > 0).float().mean()) for name, m in found.items()}
    left = model.pruning_summary()["density"]
    layer_densities(folder / "density.png", shares, f"{title}\n{left:.1%} of the encoder's weights")
