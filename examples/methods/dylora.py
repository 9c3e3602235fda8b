"""DyLoRA, in its two wirings: nested ranks, so that one run serves every rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from examples.cli.fields import option
from examples.errors import OptionError
from examples.methods.options import IncrementOptions
from examples.methods.registry import AdaptedModel, register_method

if TYPE_CHECKING:
    from examples.methods.source import ModelSource

FILES = ("rank_curve.json", "rank_curve.png")


@dataclass(frozen=True)
class DyLoraOptions(IncrementOptions):
    """Every rank from r_min to lora_r works: at rank b increments are scaled by alpha / b."""

    dylora_mode: str = option(
        "normal",
        "what a step at rank b trains: rows 1 to b (normal) or row b alone (frozen); matryoshka: "
        "no rank is drawn, every step trains the sum of all",
        choices=("normal", "frozen", "matryoshka"),
    )
    dylora_dist: str = option(
        "uniform", "how ranks are drawn: uniform, or geometric(p) such as geometric(0.15)"
    )
    dylora_train_ranks: tuple[str, ...] = option(
        (), "matryoshka: the ranks that are summed, such as 1,2,4,8, the last lora_r; none: all"
    )
    dylora_r_min: int = option(1, "smallest rank that is trained", low=1)
    dylora_dense: bool = option(
        False, "let momentum and weight decay move what a step does not train, as published"
    )
    dylora_eval_ranks: tuple[str, ...] = option(
        (),
        "ranks of every evaluation beside lora_r, which chooses the weights; none: r_min during "
        "training, all that are trained at the end",
    )
    dylora_tolerance: float = option(
        0.01, "the smallest rank this close to the best one is reported", low=0
    )

    def __post_init__(self) -> None:
        if self.dylora_r_min > self.lora_r:
            raise OptionError(
                f"--dylora_r_min {self.dylora_r_min} is above --lora_r {self.lora_r}: ranks are "
                "drawn between them"
            )
        if self.dylora_mode == "matryoshka" and self.dylora_dist != "uniform":
            raise OptionError("--dylora_dist: --dylora_mode matryoshka draws no ranks")
        for name in ("dylora_eval_ranks", "dylora_train_ranks"):
            for word in getattr(self, name):
                if not word.isdecimal() or not 1 <= int(word) <= self.lora_r:
                    raise OptionError(
                        f"--{name} {word}: ranks are whole numbers from 1 to --lora_r, here "
                        f"{self.lora_r}"
                    )
        trained, first = self.train_ranks, self.dylora_r_min
        if trained and self.dylora_mode != "matryoshka":
            raise OptionError("--dylora_train_ranks goes with --dylora_mode matryoshka")
        if trained and (trained != sorted({*trained, self.lora_r}) or trained[0] < first):
            raise OptionError(
                f"--dylora_train_ranks {','.join(self.dylora_train_ranks)}: rising ranks are "
                f"needed, from --dylora_r_min {first} on, the last --lora_r {self.lora_r}"
            )

    @property
    def train_ranks(self) -> list[int] | None:
        """The ranks that are summed; None: all."""
        return [int(word) for word in self.dylora_train_ranks] or None

    def ranks(self, final: bool) -> list[int]:
        """The ranks to evaluate at, in order; the last is `lora_r`."""
        asked = [int(word) for word in self.dylora_eval_ranks]
        trained = self.train_ranks or range(self.dylora_r_min, self.lora_r)
        every = trained if final else [self.dylora_r_min]
        return sorted({*(asked or every), self.lora_r})


def build(source: ModelSource, options: DyLoraOptions) -> AdaptedModel:
    """DyLoRA by `options.wiring`, started from `options.lora_path` where given."""
    from examples.methods.common import with_loralib, with_peft
    from examples.methods.dylora_ranks import RankPredictor, RankReport
    from examples.methods.start import start_from
    from peft_custom import DyLoraConfig, configure_dylora

    nested = {
        "r_min": options.dylora_r_min,
        "dylora_mode": options.dylora_mode,
        "dylora_dist": options.dylora_dist,
        "dylora_dense": options.dylora_dense,
        "train_ranks": options.train_ranks,
    }
    if options.wiring == "loralib":
        adapted = with_loralib(source, options, "dylora", **nested)
        configure_dylora(adapted.model, **nested)
    else:
        adapted = with_peft(source, options, DyLoraConfig, r=options.lora_r, **nested)
    start_from(adapted.model, options, source.print_once)
    adapted.predictor = RankPredictor(options.ranks)
    adapted.summarize = RankReport(options.ranks, options.dylora_tolerance, FILES)
    return adapted


register_method(
    "dylora",
    DyLoraOptions,
    build,
    "nested ranks: one run, every rank",
    files=FILES,
)
