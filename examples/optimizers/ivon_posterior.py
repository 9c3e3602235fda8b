"""IVON's posterior in a run: predictions averaged over it, and its file.

The posterior of every trained weight is N(m, σ²) with σ² = 1/(ess·(h + δ)); m is the weight. Beside
the result `ivon_hessian.safetensors` keeps h under the result's own names, cut to the same ranks,
and ess and δ in its metadata. A run that starts from there (`--lora_path`) goes on with it.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import mse_loss, nll_loss

from examples.evaluation.outputs import labels_of, logits_of
from examples.evaluation.prediction import Predictor, Weights
from examples.plots.posterior import posterior_histograms
from ivon import IVON
from ivon.posterior import KEY
from peft_custom import PeftModel, get_peft_model_state_dict
from peft_custom.rng import generator
from peft_custom.save_and_load import adapter_folder, adapter_tensors
from transformers_patched import CheckpointError
from transformers_patched.checkpoint import write_atomically

HESSIAN = "ivon_hessian.safetensors"
DRAWS = 1 << 33  # tells evaluation's draws from those of training


# -- prediction ---------------------------------------------------------------------------------


class PosteriorPredictor:
    """Predictions averaged over S draws of the weights.

        p(y | x) = 1/S Σₛ softmax(f(x; θₛ)),  θₛ ~ N(m, diag σ²)

    Logits are log p; a regression's are the mean of the S outputs. θₛ = m + σ·εₛ with εₛ a function
    of (seed, s) alone: all batches of an evaluation, and all processes, share the same S networks,
    so that a row's prediction does not depend on its batch; and evaluations of one run differ by
    its weights only, not by the luck of their draws. (An adapter that was cut on saving has
    fewer weights, so other draws.) At the end of a run the variant "mean" adds the prediction at m.

    Args:
        optimizer: whose posterior it is.
        samples: S.
        seed: of the run.
        inner: predicts at one draw; each of its variants is averaged by itself.
    """

    probabilistic = True

    def __init__(self, optimizer: IVON, samples: int, seed: int, inner: Predictor) -> None:
        self.optimizer, self.samples, self.seed, self.inner = optimizer, samples, seed, inner

    @property
    def stacked(self) -> bool:
        return self.inner.stacked

    def variants(self, final: bool) -> list[str]:
        variants = self.inner.variants(final)
        return [*variants, "mean"] if final and "" in variants else variants

    def outputs(
        self, model: nn.Module, arguments: dict[str, Any], variants: list[str]
    ) -> list[Any]:
        inner = [variant for variant in variants if variant != "mean"]
        drawn = []
        for s in range(self.samples):
            noise = generator(self.seed, DRAWS, s)
            with self.optimizer.sampled_params(generator=noise):
                drawn.append(self.inner.outputs(model, arguments, inner))
        averaged = [average(outputs, arguments) for outputs in zip(*drawn, strict=True)]
        if "mean" in variants:
            averaged += self.inner.outputs(model, arguments, [""])
        return averaged

    def weights(self, model: nn.Module, final: bool) -> dict[str, Weights]:
        """At the mean: texts are no average of texts."""
        return self.inner.weights(model, final)


def average(outputs: Sequence[Any], arguments: dict[str, Any]) -> SimpleNamespace:
    """log 1/S Σₛ softmax(logitsₛ) and its loss; of a regression (one logit) the mean.

    Of sequences' log-probabilities it is the log of their mean probability. To the logits of spans
    the mean of log Σ exp(logitsₛ) is added, which changes no probability.

    Args:
        outputs: S of them, of the model or of a predictor.
        arguments: of the model; a loss needs their labels.
    """
    # (S, b, classes), or of spans (S, b, 2, L), or (S, b, 1) log-probabilities of sequences
    logits = torch.stack([logits_of(output, arguments).float() for output in outputs])
    scores = bool(arguments.get("score_sequences"))
    regression = logits.shape[-1] == 1 and not scores
    if scores:
        mean = logits.logsumexp(0) - math.log(len(outputs))
    elif regression:
        mean = logits.mean(0)
    else:
        mean = logits.log_softmax(-1).logsumexp(0) - math.log(len(outputs))
    loss = None
    if outputs[0].loss is not None:
        labels = labels_of(arguments)
        if regression:
            loss = mse_loss(mean[:, 0], labels.float())
        else:
            loss = nll_loss(mean.flatten(0, -2), labels.flatten())
    if logits.dim() > 3:  # a question's windows are compared: their own levels must stay
        mean = mean + logits.logsumexp(-1, keepdim=True).mean(0)
    return SimpleNamespace(logits=mean, loss=loss)


# -- the file -----------------------------------------------------------------------------------


class PosteriorFile:
    """h, saved and loaded beside a result.

    Args:
        optimizer: whose h it is.
        any_ess: no ess was given, so that the file's counts.
    """

    def __init__(self, optimizer: IVON, any_ess: bool = False) -> None:
        self.optimizer, self.any_ess = optimizer, any_ess

    def save(self, folder: Path, model: nn.Module) -> None:
        """Writes h of what the result holds."""
        named = dict(model.named_parameters())
        hess = self.optimizer.posterior_tensors(named.items())
        with _holding({named[name]: h for name, h in hess.items()}):
            tensors = {n: t.detach().clone().cpu() for n, t in _tensors(model).items()}
        # one entry: of several, safetensors writes now this one first and now that one
        facts = self.optimizer.posterior_metadata(named.items())
        write_atomically(folder / HESSIAN, lambda aside: save_file(tensors, aside, facts))

    def load(self, start: Path, model: nn.Module) -> str:
        """Takes h over from the folder a run starts from; what there is to say about it.

        Raises:
            CheckpointError: the file's posterior is not of the run's ess, decay or weights.
        """
        path = adapter_folder(start) / HESSIAN
        if not path.is_file():
            if self.any_ess:
                raise CheckpointError(
                    f"{path}: no such file, so --ivon_ess must say how wide the posterior is"
                )
            return f"{path}: no such file; h starts at --ivon_hess_init"
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if self.any_ess and KEY in facts:
            for group in self.optimizer.param_groups:
                group["ess"] = json.loads(facts[KEY])[0]["ess"]
        named = dict(model.named_parameters())
        first = self.optimizer.posterior_tensors(named.items())
        with _holding({named[name]: h for name, h in first.items()}):
            count = _put(model, tensors, path)  # what does not fit keeps its first h
            found = {name: named[name].detach().clone() for name in first}
        try:
            self.optimizer.load_posterior(named.items(), found, facts)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error} (--ivon_ess, --ivon_weight_decay)") from error
        return f"{path}: h of {count:,} weights taken over"

    def plot(self, folder: Path, title: str, model: nn.Module) -> None:
        """Histograms of σ and |μ|/σ by kind of weight."""
        kinds = {  # `….lora_A.weight` and `….lora_A` -> lora_A
            id(p): name.removesuffix(".weight").rpartition(".")[2]
            for name, p in adapter_tensors(model).items()
        }
        found: dict[str, list[Tensor]] = defaultdict(list)
        for p in model.parameters():
            if p.requires_grad:
                pair = torch.stack([p.detach(), self.optimizer.posterior_std(p)])
                found[kinds.get(id(p), "head and biases")].append(pair.flatten(1).cpu())
        values = {kind: tuple(torch.cat(own, 1).numpy()) for kind, own in found.items()}
        posterior_histograms(folder / "posterior.png", values, title)


@contextmanager
def _holding(values: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Parameters hold other values for a while, so that a result's own saving names and cuts them.

    In place: nothing that refers to a parameter notices.
    """
    with torch.no_grad():
        before = {p: p.detach().clone() for p in values}
        try:
            for p, value in values.items():
                p.copy_(value)
            yield
        finally:
            for p, value in before.items():
                p.copy_(value)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changed, under the names it is saved by."""
    if isinstance(model, PeftModel):
        return get_peft_model_state_dict(model)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _put(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> int:
    """Writes tensors into the parameters of their names and shapes; how many there were."""
    own = _tensors(model)
    fitting = [n for n, tensor in tensors.items() if n in own and own[n].shape == tensor.shape]
    if not fitting:
        raise CheckpointError(f"{path} is of another model: {', '.join(list(tensors)[:3])} …")
    for name in fitting:
        own[name].copy_(tensors[name])
    return sum(tensors[name].numel() for name in fitting)
