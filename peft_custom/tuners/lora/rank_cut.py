"""A trained adapter cut to lower ranks, by one threshold on the singular values of all matrices.

    ΔW = s·B A = U S Vᵀ      from thin factors alone: s·B = Q₁ R₁, Aᵀ = Q₂ R₂, R₁ R₂ᵀ = U′ S V′ᵀ,
                             U = Q₁ U′, V = Q₂ V′

Of all matrices' singular values the largest are kept (PARA, arXiv 2604.27796); of all adapters with
as many components that one is nearest to the trained one, in the Frobenius norm over all matrices.
What is left is an ordinary LoRA adapter with a `rank_pattern`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loralib.dylora import summed_scales

from ...config import PATTERN_KEYS, typed_values
from ..targets import pattern_value
from .config import LoraConfig

PREFIX = "base_model.model."
FACTOR_KEYS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
EPSILON = 1e-5  # AdaLoRA's scale is α/(init_r + ε)


class Decomposed(NamedTuple):
    """One matrix's increment, ΔW = U diag(S) Vᵀ as a matrix; fp64.

    Attributes:
        U: (out, k).
        S: (k,), descending.
        V: (in, k).
        keys: the names of A and B in the result.
        shapes: of A and B as they are stored, of any rank.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    keys: tuple[str, str]
    shapes: tuple[torch.Size, torch.Size]


Matrices = Mapping[str, Decomposed]  # by module name
Ranks = dict[str, int]  # by module name


def decompose(A: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), S (k,) and V (in, k) of s·B A, k = min(r, out, in); fp64.

    Args:
        A, B: (r, …) and (out, r, …), read as matrices.
        scaling: s.
    """
    left, R1 = torch.linalg.qr(scaling * B.flatten(1).double())  # (out, k₁), (k₁, r)
    right, R2 = torch.linalg.qr(A.flatten(1).double().T)  # (in, k₂), (k₂, r)
    U, S, Vt = torch.linalg.svd(R1 @ R2.T, full_matrices=False)
    return left @ U, S, right @ Vt.T


# --- how much is kept --------------------------------------------------------------------------
def _ordered(matrices: Matrices) -> list[tuple[float, str]]:
    """Every singular value with its module, the largest first; of equal ones the first module's."""
    found = [(float(s), name) for name, matrix in matrices.items() for s in matrix.S]
    return sorted(found, key=lambda pair: -pair[0])


def _counted(matrices: Matrices, kept: list[tuple[float, str]]) -> Ranks:
    ranks = dict.fromkeys(matrices, 0)
    for _, name in kept:
        ranks[name] += 1
    return ranks


def by_budget(matrices: Matrices, budget: int) -> Ranks:
    """The `budget` largest singular values of all matrices together.

    Raises:
        ValueError: there are not so many.
    """
    values = _ordered(matrices)
    if not 1 <= budget <= len(values):
        raise ValueError(
            f"rank_budget={budget}: {len(matrices)} matrices have {len(values)} singular values "
            f"together; give 1 to {len(values)}"
        )
    return _counted(matrices, values[:budget])


def by_energy(matrices: Matrices, share: float) -> Ranks:
    """The fewest singular values whose squares make `share` of the sum of all squares."""
    if not 0.0 < share <= 1.0:
        raise ValueError(f"energy={share}: a share of the sum of squares, above 0 to 1")
    values = _ordered(matrices)
    squares = torch.tensor([s * s for s, _ in values], dtype=torch.float64)
    sums = squares.cumsum(0)
    enough = sums >= share * sums[-1] * (1.0 - 1e-12)  # the last sum may round below itself
    return _counted(matrices, values[: int(enough.nonzero()[0]) + 1])


def by_rank(matrices: Matrices, rank: int) -> Ranks:
    """`rank` singular values of every matrix, or all it has."""
    most = max(len(matrix.S) for matrix in matrices.values())
    if not 1 <= rank <= most:
        raise ValueError(f"rank={rank}: the adapter has the ranks 1 to {most}")
    return {name: min(rank, len(matrix.S)) for name, matrix in matrices.items()}


# --- files ---------------------------------------------------------------------------------------
def decomposed(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Decomposed]:
    """The matrices of an adapter file that is W + s·B A in every module.

    Args:
        config: what its configuration file says.
        tensors: its tensors: PEFT's names or loralib's.

    Raises:
        ValueError: the adapter is no such sum, and why.
    """
    _refuse(config)
    plain = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    found = {}
    for key, A in plain.items():
        for key_A, key_B in (*FACTOR_KEYS, ("lora_A", "lora_B")):
            if key.endswith(f".{key_A}"):
                module = key.removesuffix(f".{key_A}")
                B = plain[f"{module}.{key_B}"]
                A_, B_, scaling = _as_product(config, module, A, B, plain)
                names = FACTOR_KEYS[0] if key_A == "lora_A" else (key_A, key_B)
                keys = f"{PREFIX}{module}.{names[0]}", f"{PREFIX}{module}.{names[1]}"
                found[module] = Decomposed(*decompose(A_, B_, scaling), keys, (A.shape, B.shape))
    if not found:
        raise ValueError("there are no factors of low rank in it")
    return found


def _refuse(config: Mapping[str, Any]) -> None:
    kind, init = config.get("peft_type") or "LORA", str(config.get("init_lora_weights"))
    if kind not in ("LORA", "DYLORA", "ADALORA", "VILORA"):
        raise ValueError(f"a {kind} adapter is not W + s·B A: it cannot be cut by singular values")
    if config.get("use_dora"):
        raise ValueError("use_dora: a DoRA adapter also scales W, so it is not W + s·B A")
    if init.startswith(("pissa", "olora")):
        raise ValueError(
            f"init_lora_weights={init!r}: its factors count from a base of their own; write it "
            "with save_pretrained(folder, convert_pissa_to_lora=True) first"
        )


def _as_product(
    config: Mapping[str, Any], module: str, A: Tensor, B: Tensor, tensors: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, float]:
    """A, B and s with ΔW = s·B A, whichever type the adapter is of."""
    if A.shape[0] != B.shape[1]:
        raise ValueError(
            f"{module}: factors {tuple(A.shape)} and {tuple(B.shape)} are those of a merged layer "
            "(loralib's MergedLinear), which has one pair for each of its parts"
        )
    if (E := tensors.get(f"{module}.lora_E")) is not None:
        start = config["init_r"]
        alpha = config.get("lora_alpha") or start
        return A, B * E.view(1, -1), alpha / (start + EPSILON)
    r = A.shape[0]
    alpha = pattern_value(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    if config.get("dylora_mode") == "matryoshka":  # see loralib.dylora
        ranks = config.get("train_ranks") or range(config["r_min"], r + 1)
        return A, B * torch.tensor(summed_scales(ranks, r), dtype=B.dtype), alpha
    return A, B, alpha / (r**0.5 if config.get("use_rslora") else r)


def cut(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    matrices: Matrices,
    ranks: Ranks,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The adapter with `ranks`, as PEFT's files have it: A = √S Vᵀ, B = U √S, α = r.

    A module of rank 0 is no target any more; its trained bias keeps it one, with rank 1.

    Args:
        config, tensors: of the file; all but the factors is taken over.
        matrices: from `decomposed`.
        ranks: how many components each of them keeps.
    """
    if config.get("bias", "none") != "none":
        ranks = {name: max(1, rank) for name, rank in ranks.items()}
    kept = {name: rank for name, rank in ranks.items() if rank}
    plain = {f"{PREFIX}{name.removeprefix(PREFIX)}": tensor for name, tensor in tensors.items()}
    result = {name: tensor for name, tensor in plain.items() if ".lora_" not in name}
    for name, rank in kept.items():
        matrix = matrices[name]
        root = matrix.S[:rank].sqrt()
        A, B = (matrix.V[:, :rank] * root).T, matrix.U[:, :rank] * root
        shapes = (rank, *matrix.shapes[0][1:]), (B.shape[0], rank, *matrix.shapes[1][2:])
        for key, factor, shape in zip(matrix.keys, (A, B), shapes, strict=True):
            result[key] = factor.reshape(shape).float().contiguous()
    return _cut_config(config, kept, result), result


def _cut_config(
    config: Mapping[str, Any], kept: Ranks, tensors: Mapping[str, Tensor]
) -> LoraConfig:
    # AdaLoRA's pattern has other values, and neither pattern is that of the result
    known = {field.name for field in dataclasses.fields(LoraConfig)} - set(PATTERN_KEYS)
    values = typed_values(LoraConfig, {k: v for k, v in config.items() if k in known})
    most = max(kept.values())
    others = {name: rank for name, rank in kept.items() if rank != most}
    if "peft_type" not in config:  # loralib's file: what is no factor was trained in full
        heads = {n.removeprefix(PREFIX).split(".")[0] for n in tensors if ".lora_" not in n}
        values["modules_to_save"] = sorted(heads) or None
    values |= {"peft_type": "LORA", "r": most, "lora_alpha": most, "target_modules": sorted(kept)}
    values |= {"rank_pattern": others, "alpha_pattern": dict(others)}
    values |= {"use_rslora": False, "init_lora_weights": True, "exclude_modules": None}
    values |= {"layers_to_transform": None, "layers_pattern": None}
    return LoraConfig(**values)


Rule = Callable[[Matrices], Ranks]  # by_budget, by_energy or by_rank with its figure
