"""An adaptive tuner in three short files, as a user of the package would add one."""

from .config import ToyConfig
from .layer import ToyLayer
from .model import ToyHooks, ToyModel

__all__ = ["ToyConfig", "ToyHooks", "ToyLayer", "ToyModel"]
