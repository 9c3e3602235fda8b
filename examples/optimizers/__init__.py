"""The optimisers of `--optimizer`, a file each; a new one is a file and a name in this import.

Nothing here imports torch: that happens when an optimiser is built.
"""

from examples.methods.registry import OPTIMIZERS
from examples.optimizers import adamw, ivon  # noqa: F401  they register

__all__ = ["OPTIMIZERS"]
