"""Equality with Microsoft's loralib 0.1.2, recorded by golden/make_loralib.py."""

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.paths import GOLDEN

import loralib as lora

ARRAYS = np.load(GOLDEN / "loralib.npz", allow_pickle=False)
CASES = json.loads(str(ARRAYS["cases"]))
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def recorded(case: str, prefix: str = "") -> dict[str, torch.Tensor]:
    start = f"{case}/{prefix}"
    return {k.removeprefix(start): torch.tensor(ARRAYS[k]) for k in ARRAYS if k.startswith(start)}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, Callable[[], torch.nn.Module]]:
    """A case's name and a maker of our layer with Microsoft's state dict loaded, strictly."""
    kind, arguments, options, _ = CASES[request.param]

    def make() -> torch.nn.Module:
        layer = getattr(lora, kind)(*arguments, **options)
        layer.load_state_dict(recorded(request.param, "state/"), strict=True)
        return layer

    return request.param, make


def test_outputs_and_gradients(case: tuple) -> None:
    name, make = case
    layer, theirs, gradients = make(), recorded(name), recorded(name, "grad/")
    x = theirs["x"].requires_grad_("x" in gradients)
    out = layer.train()(x)
    torch.testing.assert_close(out, theirs["out"], **TOLERANCE)
    out.backward(theirs["cotangent"])
    ours = {k: p.grad for k, p in layer.named_parameters() if p.grad is not None}
    if x.requires_grad:
        ours["x"] = x.grad
    assert ours.keys() == gradients.keys()
    for key, value in gradients.items():
        torch.testing.assert_close(ours[key], value, **TOLERANCE, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("how", ["cached", "merged", "unmerged"])
def test_evaluation(case: tuple, how: str) -> None:
    name, make = case
    layer, theirs = make().eval(), recorded(name)
    layer.merge_weights = how == "cached"
    if how == "merged":
        layer.merge()
    with torch.no_grad():
        out = layer(theirs["x"])
    assert (layer._cached is not None) == (how == "cached")
    torch.testing.assert_close(out, theirs["evaluated"], **TOLERANCE)


def test_state_dict_has_their_names_and_shapes(case: tuple) -> None:
    name, make = case
    # Their convolution holds its parameters in a submodule, ours is a convolution.
    theirs = {k.removeprefix("conv."): v for k, v in recorded(name, "state/").items()}
    ours = make().state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
