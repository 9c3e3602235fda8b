"""The methods of `--method`, a file each; a new one is a file and a name in the second import.

Nothing here imports torch: that happens when a method is built.
"""

from examples.methods.registry import METHODS, OPTIMIZERS  # noqa: I001
from examples.methods import full, lora, dylora, adalora, bim_lora  # noqa: F401  in --help's order
from examples.methods import splora, splopa, block_prune  # noqa: F401, I001

__all__ = ["METHODS", "OPTIMIZERS"]
