"""The product of a layer whose blocks are 0 at random places: whole, by rows of blocks, by BSR.

    python -m benchmarks.block_products

Blocks of 32 × 32, fp32, one thread, CPU time, ways in turn; printed are ms of the whole product and
what the others take in multiples of it (median over the rounds). `loralib/block_sparse.py` rests on
it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.timing import in_turn, ratio, seconds
from examples.training.memory import keep_freed_memory
from loralib.block_sparse import BlockSparseLinear, block_product

SIZES = ((384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (768, 3072))
BLOCK = (32, 32)


def layer(outputs: int, inputs: int, density: float) -> BlockSparseLinear:
    """A layer of which a share of the blocks is left, as many in all, at random places."""
    draw = torch.Generator().manual_seed(0)
    p, q = BLOCK
    grid = torch.zeros(outputs // p * (inputs // q))
    grid[torch.randperm(len(grid), generator=draw)[: round(density * len(grid))]] = 1.0
    mask = grid.view(outputs // p, -1).repeat_interleave(p, 0).repeat_interleave(q, 1)
    made = BlockSparseLinear(inputs, outputs, BLOCK).requires_grad_(False)
    made.weight.mul_(mask)
    return made


def ways(made: BlockSparseLinear, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    rows = made.block_rows()
    bsr = made.weight.to_sparse_bsr(BLOCK)
    return {
        "whole": lambda: F.linear(x, made.weight, made.bias),
        "rows": lambda: block_product(x, rows, made.out_features),
        "bsr": lambda: (bsr @ x.T).T + made.bias,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--density", type=float, nargs="+", default=[0.5, 0.4, 0.3, 0.1])
    parser.add_argument("--rounds", type=int, default=7)
    o = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    warnings.filterwarnings("ignore", message="Sparse BSR")
    for outputs, inputs in SIZES:
        for tokens in o.tokens:
            x = torch.randn(tokens, inputs)
            row = {"out": outputs, "in": inputs, "tokens": tokens}
            for density in o.density:
                sides = ways(layer(outputs, inputs, density), x)
                wanted = sides["whole"]()
                assert all((f() - wanted).abs().max() < 1e-5 for f in sides.values())
                timed = {n: partial(seconds, f) for n, f in sides.items()}
                found = in_turn(timed, o.rounds)
                row["ms"] = round(1e3 * statistics.median(found["whole"]), 2)
                for name in ("rows", "bsr"):
                    row[f"{name} {density}"] = round(ratio(found[name], found["whole"]), 2)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
