"""Counter-based randomness: every draw is a function of (seed, counters), never of a history.

What must agree between processes, or after a resume, is drawn here with the step as a counter:
there is no generator state to save, and a process that drew other numbers in between still agrees.

    x₀ = seed,  xᵢ = mix(xᵢ₋₁ + φ·(cᵢ + 1))  (mod 2⁶⁴),  φ = 2⁶⁴/golden ratio

with SplitMix64's finaliser as `mix` (Steele, Lea and Flood 2014).
"""

from __future__ import annotations

import torch

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def bits(seed: int, *counters: int) -> int:
    """64 random bits as an integer in [0, 2⁶⁴), a function of `seed` and `counters` alone."""
    x = _mix((seed + GOLDEN) & MASK)
    for counter in counters:
        x = _mix((x + GOLDEN * (counter + 1)) & MASK)
    return x


def uniform(seed: int, *counters: int) -> float:
    """A number in [0, 1) with 53 random bits."""
    return (bits(seed, *counters) >> 11) * 2.0**-53


def integer(low: int, high: int, seed: int, *counters: int) -> int:
    """A whole number from `low` to `high`, both included, all equally likely."""
    if high < low:
        raise ValueError(f"integer: there is no number from {low} to {high}")
    return low + ((bits(seed, *counters) * (high - low + 1)) >> 64)


def generator(seed: int, *counters: int) -> torch.Generator:
    """A CPU generator for tensors: draw there and move the result, so that every device agrees."""
    made = torch.Generator()
    made.manual_seed(bits(seed, *counters))
    return made
