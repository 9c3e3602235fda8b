"""An optimiser that samples the weights and brings a predictor; run_glue with it registered.

python tests/support/sampling_case.py --optimizer noisy --noise 0.05 --samples 2 --task_name ...
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from examples import program
from examples.cli.fields import option
from examples.evaluation.prediction import Predictor
from examples.methods.registry import BuiltOptimizer, RunInfo, register_optimizer
from examples.run_glue import main


@dataclass(frozen=True)
class NoisyOptions:
    noise: float = option(0.0, "standard deviation of the weights")
    samples: int = option(1, "passes per step")


class NoisySGD(torch.optim.SGD):
    """SGD on the mean gradient at `mc_samples` noisy copies of the weights."""

    def __init__(self, groups: list[dict], options: NoisyOptions) -> None:
        super().__init__(groups, lr=0.0)
        self.mc_samples, self.noise = options.samples, options.noise
        self.calls: list[bool] = []
        self.sums: dict[torch.Tensor, torch.Tensor] = {}

    @contextmanager
    def sampled_params(self, train: bool = False) -> Iterator[None]:
        self.calls.append(train)
        params = [p for group in self.param_groups for p in group["params"]]
        means = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p in params:
                p.add_(torch.randn_like(p), alpha=self.noise)
                p.grad = None
        yield
        with torch.no_grad():
            for p, mean in zip(params, means, strict=True):
                p.copy_(mean)
                if train:
                    found = torch.zeros_like(p) if p.grad is None else p.grad
                    self.sums[p] = self.sums.get(p, 0) + found / self.mc_samples
                    p.grad = self.sums[p]

    def step(self, closure: None = None) -> None:
        super().step()
        self.sums.clear()


class TwoVariants:
    """Probabilities of the model, and flattened ones; there is no plain variant."""

    probabilistic = True
    stacked = False

    def variants(self, final: bool) -> list[str]:
        return ["flat", "sharp", "same"] if final else ["flat", "same"]

    def outputs(self, model: torch.nn.Module, arguments: dict, variants: list[str]) -> list:
        output = model(**arguments)
        scale = {"flat": 0.5, "sharp": 2.0, "same": 1.0}
        return [
            SimpleNamespace(
                logits=(output.logits * scale[variant]).log_softmax(1),
                loss=None if output.loss is None else output.loss * scale[variant],
            )
            for variant in variants
        ]


def noisy(groups: list[dict], options: NoisyOptions, run: RunInfo) -> BuiltOptimizer:
    optimizer = NoisySGD(groups, options)

    def predictor(inner: Predictor) -> TwoVariants:
        return TwoVariants()

    return BuiltOptimizer(optimizer, sampler=optimizer, predictor=predictor)


def register() -> None:
    register_optimizer("noisy", NoisyOptions, noisy, "for tests")


if __name__ == "__main__":
    register()
    sys.exit(program.run_main(main))
