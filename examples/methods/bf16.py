"""Products of bf16 matrices on a CPU that has no instructions for them.

There torch multiplies number by number, ten times slower than fp32. Here the factors are converted
to fp32, multiplied, and the product is rounded to bf16: what a bf16 unit does too, which also sums
in fp32. The weights stay in bf16, so memory is saved all the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
ASKS = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")

_library: torch.library.Library | None = None  # its end would take the kernels back


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16 matrices."""
    return any(getattr(torch.cpu, ask, lambda: False)() for ask in ASKS)


def multiply_bf16_in_fp32() -> None:
    """Lets this process multiply bf16 matrices on the CPU by way of fp32, from now on.

    It replaces torch's CPU kernels of `PRODUCTS`; any other dtype goes on to the replaced kernel.
    A second call does nothing.
    """
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*may also be overridden")
        for name in PRODUCTS:
            for form in ("", "_", ".out") if name.startswith(("add", "badd")) else ("", ".out"):
                kernel = _widened(f"aten::{name}", form)
                _library.impl(f"aten::{name}{form}", kernel, "CPU", with_keyset=True)


def _widened(name: str, form: str) -> Callable[..., Tensor]:
    """The kernel of a product; `form`: "" gives a new tensor, "_" and ".out" fill one."""
    product = torch.library.get_kernel(name, "CPU")
    replaced = torch.library.get_kernel(name + form, "CPU")

    def kernel(keys: torch.DispatchKeySet, *tensors: Tensor, **rest: Any) -> Tensor:
        if tensors[0].dtype is not torch.bfloat16:
            return replaced.call_boxed(keys, *tensors, **rest)
        target = rest.pop("out", None) if form == ".out" else tensors[0]
        result = product.call_boxed(keys, *(t.float() for t in tensors), **rest).bfloat16()
        if not form:
            return result
        if target.shape != result.shape:
            target.resize_(result.shape)
        return target.copy_(result)

    return kernel
