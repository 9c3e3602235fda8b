"""The window: all samples since the last step.

    step │ sample 1   sample 2   …   sample mc_samples │ step
         └──────────────── one window ────────────────┘

A sample is one draw of the weights with all gradients computed at it, of one batch or of several
micro-batches, which add up. A window has `mc_samples` samples unless the loop takes another number.
It keeps running means over its samples, in the buckets: of noise·gradient (or gradient²), and of
the gradient, which also is in `p.grad` for everybody to clip. `step` uses both and begins the next
window. A loop that takes more samples than `mc_samples` is understood as long as nobody touches
the gradients in between; else it would not be clear whether they are to be averaged or forgotten.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .flat import Bucket


class Window:
    """Counts the samples since the last step and averages what they bring.

    Attributes:
        count: samples gathered.
        dropped: samples that `zero_grad` has thrown away since the last step, which warns of them.
    """

    def __init__(self) -> None:
        self.dropped = 0
        self.clear()

    def clear(self) -> None:
        """The next sample begins a new window."""
        self.count = 0
        self._averaged = False  # p.grad is the mean over the processes
        self._left: list[tuple[Tensor, int]] = []  # p.grad and its version after the last sample

    @torch.no_grad()
    def extend(self, buckets: list[Bucket], mc_samples: int) -> None:
        """Makes room for a sample beyond the `mc_samples`-th.

        Raises:
            RuntimeError: `p.grad` is not what the last sample left.
        """
        now = _gradients(buckets)
        same = len(now) == len(self._left) and all(
            gradient is left and version == left_version
            for (gradient, version), (left, left_version) in zip(now, self._left, strict=True)
        )
        if self._averaged or not same:
            raise RuntimeError(
                f"a window of mc_samples={mc_samples} is complete, and its gradient was "
                "clipped, zeroed or averaged over processes: take a step, drop it with "
                "zero_grad(), or set mc_samples to the number of samples per step"
            )
        if self.count == 1:  # a window of one sample has kept no mean gradient so far
            for bucket in buckets:
                bucket.average_gradient(1)

    @torch.no_grad()
    def add(self, buckets: list[Bucket], hess_approx: str, mc_samples: int, sync: bool) -> None:
        """Takes a sample's gradients, in `p.grad`, into the running means.

        Args:
            buckets: with the sample's noise, which is used up.
            hess_approx: "price" or "gradsq".
            mc_samples: samples of a full window.
            sync: a full window is averaged over the processes.

        Raises:
            RuntimeError: no parameter received a gradient.
        """
        count = self.count + 1
        found = [bucket.collect(hess_approx, count) for bucket in buckets]
        if not any(found):
            raise RuntimeError(
                "no parameter received a gradient within sampled_params(train=True): call "
                "loss.backward() inside the context"
            )
        if count > 1 or mc_samples > 1:
            for bucket in buckets:
                bucket.average_gradient(count)
        self.count = count
        if sync and count == mc_samples:
            self.average_over_processes(buckets)
        self._left = _gradients(buckets)

    @torch.no_grad()
    def take_only_sample(self, buckets: list[Bucket], hess_approx: str) -> None:
        """Takes what is in `p.grad` as the window's one sample; may be repeated as it grows."""
        found = [bucket.collect(hess_approx, 1, keep_noise=True) for bucket in buckets]
        if any(found):
            self.count = 1

    @torch.no_grad()
    def average_over_processes(self, buckets: list[Bucket]) -> None:
        """Means over the processes of gradients and statistics, by one all-reduce per dtype.

        Done once per window; `p.grad` is the mean then, on every process.
        """
        if self._averaged:
            return
        self._averaged = True
        if processes() == 1:
            return
        for bucket in buckets:
            bucket.gather_gradient(bucket.gradient)
            bucket.seen = set(bucket.trainable())
        vectors = [v for b in buckets for v in (b.gradient.vector, b.statistic.vector)]  # each (n,)
        for key in dict.fromkeys((v.device, v.dtype) for v in vectors):
            alike = [v for v in vectors if (v.device, v.dtype) == key]
            flat = torch.cat(alike)  # (sum of their n,)
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            torch._foreach_copy_(alike, list(flat.split([len(v) for v in alike])))
        for bucket in buckets:
            bucket.hand_out_gradient()


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _gradients(buckets: list[Bucket]) -> list[tuple[Tensor, int]]:
    """All gradients, each with its version, which every change in place counts up."""
    gradients = [p.grad for bucket in buckets for p in bucket.params]
    return [(g, g._version) for g in gradients if g is not None]
