"""Options of the toy tuner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft_custom import PeftConfig


@dataclass
class ToyConfig(PeftConfig):
    """A rank-r increment of which a re-drawn half is live.

    Attributes:
        r: rank of the increment.
        target_modules: names of the linear layers to adapt.
        every: the mask is drawn anew every so many steps (a float: fraction of training).
        until: and stays as it is from here on.
        penalty: weight of ½‖A‖², whose gradient is added before each step.
        look_first: wants to see data before the first step.
        finished: the mask is final.
    """

    peft_type: str | None = "TOY"
    r: int = 4
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    every: int | float = 3
    until: int | float = 0.75
    penalty: float = 0.0
    look_first: bool = False
    finished: bool = True

    omit_at_default: ClassVar[frozenset[str]] = frozenset({"finished"})
