"""Which matrices are pruned together: blocks of one, or units that several share.

A feed-forward unit is a row of W_in, its bias, and a column of W_out; an attention head is a group
of rows of W_q, W_k and W_v, and the same columns of W_o. Zero the columns, and the rows are dead;
so training masks the inputs of the *consumer* W_out or W_o alone, through which a pruned unit's
score still gets a gradient, and everything else follows when weights are merged or cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import nn


class Kind(NamedTuple):
    """A known pair of neighbours; names are relative to the transformer's layer.

    Attributes:
        producers: whose rows make the units.
        consumer: whose columns take them.
        segments: matrices fused in the producer's rows.
        heads: a unit is an attention head; else one row.
    """

    producers: tuple[str, ...]
    consumer: str
    segments: int = 1
    heads: bool = False


def _attention(module: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{module}.{name}" for name in names)


KINDS = (
    Kind(_attention("attention.self", "query", "key", "value"), "attention.output.dense", 1, True),
    Kind(
        _attention("attention.self", "query_proj", "key_proj", "value_proj"),
        "attention.output.dense", 1, True,
    ),
    Kind(("intermediate.dense",), "output.dense"),
    Kind(("attn.c_attn",), "attn.c_proj", 3, True),
    Kind(("mlp.c_fc",), "mlp.c_proj"),
)  # fmt: skip


class Link(NamedTuple):
    """One occurrence of a kind: full names, and the number of rows of a unit.

    Attributes:
        kind: which.
        prefix: of the transformer's layer, with its dot.
        size: d, rows in each producer's segment that a unit has.
    """

    kind: Kind
    prefix: str
    size: int

    @property
    def producers(self) -> list[str]:
        """Full names."""
        return [f"{self.prefix}{name}" for name in self.kind.producers]

    @property
    def consumer(self) -> str:
        """Full name."""
        return f"{self.prefix}{self.kind.consumer}"


def heads_of(model: nn.Module) -> int | None:
    """Number of attention heads in a layer of the whole model, as its configuration says."""
    config = getattr(model, "config", None)
    for name in ("num_attention_heads", "n_head"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return None


def links(model: nn.Module, modules: Iterable[str], structure: str) -> Iterator[Link]:
    """The links among the chosen modules that the structure asks for.

    Args:
        model: says which modules there are, and how many heads.
        modules: names of the adapted ones.
        structure: `"blocks"` has none, `"hybrid"` those of the feed-forward part.

    Raises:
        ValueError: of a head's or a unit's matrices only some are adapted.
    """
    chosen = set(modules)
    if structure == "blocks":
        return
    there = dict(model.named_modules())  # in the order of the layers
    for kind in KINDS:
        if kind.heads and structure == "hybrid":
            continue
        for name in there:
            prefix = name.removesuffix(kind.consumer)
            if not name.endswith(kind.consumer) or (prefix and not prefix.endswith(".")):
                continue
            link = Link(kind, prefix, 1)
            matrices = {*link.producers, link.consumer}
            if not matrices <= set(there) or not matrices & chosen:
                continue
            if absent := sorted(matrices - chosen):
                raise ValueError(
                    f"mask_structure={structure!r}: {', '.join(sorted(matrices & chosen))} share "
                    f"their {'heads' if kind.heads else 'units'} with {', '.join(absent)}, which "
                    "target_modules leaves out; adapt all of them, or use 'blocks'"
                )
            yield link._replace(size=_size(model, link) if kind.heads else 1)


def _size(model: nn.Module, link: Link) -> int:
    """Rows of one of the link's heads; a compacted model's layers differ."""
    shapes = getattr(getattr(model, "config", None), "layer_shapes", None)
    if shapes is not None:
        layer = next(int(part) for part in link.prefix.split(".") if part.isdecimal())
        if len(shapes[layer]) > 2:
            return shapes[layer][2]
    return head_size(model)


def head_size(model: nn.Module) -> int:
    """Size of the heads that the whole model's configuration says.

    Raises:
        ValueError: it does not.
    """
    heads, config = heads_of(model), getattr(model, "config", None)
    width = getattr(config, "hidden_size", None) or getattr(config, "n_embd", None)
    if not heads or not width:
        raise ValueError(
            "mask_structure='linked': the model's configuration does not say how many attention "
            "heads there are; use 'hybrid' or 'blocks'"
        )
    return int(width) // heads
