"""The arithmetic that training needs: operations of its matrix products, from counts alone.

    per token                 4 per frozen weight of the layers, 6 per trained one
    per sequence              the same of all matrices above the layers: pooler and head
    per scored token          the same of a language model's head
    attention, per sequence   12 · layers · H · l² for l tokens, half of it where it is causal

Two of the four are a product's multiplications and additions in the forward pass, two the gradient
of its input; a trained weight's own gradient takes two more. A frozen weight to which a trained one
of its size is added is one product with it. Look-ups, norms, activations and what a method does
between steps are not counted, nor is anything computed twice. It is the arithmetic of the plain
model, as usual for such figures: a classifier's last layer counts at every token, although here it
is computed where it is read (13 % of the whole at 6 layers); weights below the first trained one
count as if their input needed a gradient, and a mask's scores, which are few, as if they were
weights in a product.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from peft_custom.tuners.modules_to_save import ModulesToSaveWrapper
from peft_custom.tuners.tuner_layer import BaseTunerLayer


def training_flops(
    model: nn.Module,
    tokens: int,
    lengths: np.ndarray,
    scored: int | None = None,
) -> int:
    """Floating-point operations of the matrix products of a training run.

    Args:
        model: with its adapters, and a `config`.
        tokens: real ones that the run trained on.
        lengths: (sequences,) tokens of the training set's sequences.
        scored: tokens of the training set whose successor is predicted; None: no language model.
    """
    per_token, per_sequence, per_scored = _weights(model)
    epochs = tokens / int(lengths.sum())
    total = tokens * per_token
    if scored is None:
        total += epochs * len(lengths) * (per_sequence + per_scored)
    else:
        total += epochs * scored * (per_sequence + per_scored)
    config: Any = model.config
    squares = float((lengths.astype(np.float64) ** 2).sum())
    attention = 12 * config.num_hidden_layers * config.hidden_size * squares
    return round(total + epochs * attention * (1 if scored is None else 0.5))


def _weights(model: nn.Module) -> tuple[int, int, int]:
    """Operations of the matrices in the layers, above them, and in a language model's head."""
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    shapes = {table.shape for table in tables}
    layers = {
        id(p)
        for stack in model.modules()
        if isinstance(stack, nn.ModuleList)
        for p in stack.parameters()
    }
    found = [0, 0, 0]
    kept = [m.original_module for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
    seen = {id(p) for module in kept for p in module.parameters()}  # their copies are used
    seen |= {id(p) for module in model.modules() for p in _under_increment(module)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        everywhere = bool({"encoder", "embeddings"} & {*name.split(".")})  # DeBERTa's convolution
        for p in module.parameters(recurse=False):
            if p.ndim >= 2 and id(p) not in seen:
                seen.add(id(p))
                in_layer = everywhere or id(p) in layers
                place = 0 if in_layer else 2 if p.shape in shapes else 1
                found[place] += (6 if p.requires_grad else 4) * p.numel()
    return found[0], found[1], found[2]


def _under_increment(module: nn.Module) -> list[nn.Parameter]:
    """The frozen weight of an adapted layer whose increment is a trained weight of its size."""
    if not isinstance(module, BaseTunerLayer):
        return []
    weight = module.get_base_layer().weight
    trained = (p for p in module.parameters() if p.requires_grad and p is not weight)
    return [weight] if any(p.shape == weight.shape for p in trained) else []
