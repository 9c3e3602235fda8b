"""The methods of `--method`, a file each, and the registry of methods and optimisers."""

from examples.methods.registry import METHODS, OPTIMIZERS

__all__ = ["METHODS", "OPTIMIZERS"]
