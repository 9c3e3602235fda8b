"""IVON's numbers: those of ivon-opt 0.1.3 over 50 steps, and worked examples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from golden import ivon_cases
from hypothesis import given
from hypothesis import strategies as st
from support.paths import GOLDEN
from torch import Tensor, nn

from ivon import IVON, rule
from ivon.flat import Bucket

CURVATURE = torch.tensor([1.0, 4.0], dtype=torch.float64)


@pytest.mark.parametrize("case", ivon_cases.CASES)
def test_fifty_steps_equal_ivon_opt(case: str) -> None:
    golden = np.load(GOLDEN / "ivon.npz")
    tolerance = 2e-6 if case == "fp32" else 1e-13
    for name, tensor in ivon_cases.run(IVON, case).items():
        np.testing.assert_allclose(tensor, golden[f"{case}/{name}"], rtol=0, atol=tolerance)


def test_golden_runs_differ_and_learn() -> None:
    golden = np.load(GOLDEN / "ivon.npz")
    ends = [golden[f"{case}/parameters"][-1] for case in ivon_cases.CASES]
    for i, one in enumerate(ends):
        assert all(abs(one - other).max() > 1e-3 for other in ends[:i])
    for case in ivon_cases.CASES:
        losses = golden[f"{case}/losses"]
        assert losses[-5:].mean() < 0.5 * losses[:5].mean(), case


# --- worked examples ------------------------------------------------------------------------------
def bowl(**options: Any) -> tuple[nn.Parameter, IVON]:
    theta = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    given = {"lr": 0.1, "ess": 100.0, "hess_init": 0.5, "beta1": 0.9, "beta2": 0.99}
    return theta, IVON([theta], **{**given, "weight_decay": 0.1, **options})


def descend(theta: nn.Parameter, optimizer: IVON, steps: int) -> list[tuple[Tensor, Tensor]]:
    """(m, h) after every step on ½Σaθ²."""
    found = []
    for _ in range(steps):
        for _ in range(optimizer.mc_samples):
            with optimizer.sampled_params(train=True):
                (0.5 * CURVATURE * theta.square()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append((theta.detach().clone(), optimizer.state[theta]["hess"].clone()))
    return found


def assert_digits(found: Tensor, expected: list[float], digits: float = 1e-14) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=digits, atol=digits)


def test_fixed_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(self: Bucket, generator: Any, group: dict[str, Any]) -> None:
        std = rule.std(self.hess.vector, group["ess"], group["weight_decay"])
        self.noise.vector.copy_(std * torch.tensor([1.0, -1.0]))

    monkeypatch.setattr(Bucket, "draw", draw)
    theta, optimizer = bowl()
    (m1, h1), (m2, h2) = descend(theta, optimizer, 2)
    assert_digits(m1, [0.8928307214633902, -1.6755373264833078])
    assert_digits(h1, [0.5881259974818496, 1.5118460132911227])
    assert_digits(m2, [0.802725345620015, -1.501739174003737])
    assert_digits(h2, [0.6707494075360017, 2.6255434158649567])
    assert_digits(optimizer.state[theta]["momentum"], [0.2029569889, -1.4681970897], 1e-10)


def test_seed_zero() -> None:
    torch.manual_seed(0)
    (m1, h1), _, (m3, h3) = descend(*bowl(), 3)
    assert_digits(m1, [0.8966369562281991, -1.3793439579845217])
    assert_digits(h1, [0.6540074448626243, 0.7073579055079391])
    assert_digits(m3, [0.7089921638329181, -0.36262234677291716])
    assert_digits(h3, [0.4763766269482005, 0.9532585119549623])


@pytest.mark.parametrize(
    ("options", "mean", "hess"),
    [
        (
            {"hess_approx": "gradsq"},
            [0.9791748140672576, -1.9998662281452775],
            [3.6424157834319093, 3745.766895255822],
        ),
        ({"clip_radius": 1e-3}, [0.99994, -1.99994], None),
        (
            {"mc_samples": 3},
            [0.8936148397686486, -1.4492302972806903],
            [0.47858633729584155, 0.8143647814413174],
        ),
    ],
)
def test_seed_zero_with_options(
    options: dict[str, Any], mean: list[float], hess: list[float] | None
) -> None:
    torch.manual_seed(0)
    m, h = descend(*bowl(**options), 1)[0]
    assert_digits(m, mean)
    if hess is not None:
        assert_digits(h, hess)


def test_hessian_without_curvature_decays_as_stated() -> None:
    theta = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = IVON([theta], lr=0.0, ess=8551, weight_decay=1e-8)
    expected = {
        1: (0.99999000005, 0.0108141830),
        1000: (0.99004983375, 0.0108683350),
        6700: (0.93519520134, 0.0111825387),
    }
    assert abs(optimizer.posterior_std(theta).item() - 8551**-0.5) < 1e-8
    for step in range(1, 6701):
        with optimizer.sampled_params(train=True):
            theta.grad = torch.zeros_like(theta)
        optimizer.step()
        if step in expected:
            hess, std = expected[step]
            assert abs(optimizer.state[theta]["hess"].item() - hess) < 6e-12
            assert abs(optimizer.posterior_std(theta).item() - std) < 6e-11


numbers = st.floats(-1e6, 1e6, width=32)


@given(
    h=st.floats(1e-6, 1e4),
    statistic=numbers,
    beta2=st.floats(0.0, 1.0),
    weight_decay=st.floats(1e-8, 10.0),
    approx=st.sampled_from(["price", "gradsq"]),
)
def test_precision_never_falls_below_half(
    h: float, statistic: float, beta2: float, weight_decay: float, approx: str
) -> None:
    hess = torch.tensor([h], dtype=torch.float64)
    statistic = abs(statistic) if approx == "gradsq" else statistic
    group = {"ess": 7.0, "beta2": beta2, "weight_decay": weight_decay}
    before = hess + weight_decay
    f = 7.0 * statistic * (before if approx == "price" else 1.0)
    x = (1 - beta2) * (f - h) / before
    rule.update_hess_(hess, torch.tensor([statistic], dtype=torch.float64), approx, group)
    ratio = (hess + weight_decay) / before
    assert ratio >= 0.5 - 1e-9
    torch.testing.assert_close(ratio, 1 + x + x.square() / 2, rtol=1e-6, atol=1e-6)


@given(st.lists(numbers, min_size=1, max_size=60), st.floats(0.0, 0.99))
def test_sigma_stays_finite_in_fp32(statistics: list[float], beta2: float) -> None:
    hess = torch.ones(1)
    group = {"ess": 10.0, "beta2": beta2, "weight_decay": 1e-8}
    for value in statistics:
        noisy = max(-1e3, min(1e3, value)) / 10
        rule.update_hess_(hess, torch.tensor([noisy]), "price", group)
        hess.clamp_(max=1e12)
        std = rule.std(hess, 10.0, 1e-8)
        assert std.isfinite().all() and (std > 0).all()


def test_lowest_precision_ratio_is_half() -> None:
    worst = torch.tensor([1.0], dtype=torch.float64)
    group = {"ess": 1.0, "beta2": 0.9, "weight_decay": 0.25}
    f = 1.0 - 1.25 / 0.1  # x = −1
    rule.update_hess_(worst, torch.tensor([f / 1.25], dtype=torch.float64), "price", group)
    torch.testing.assert_close((worst + 0.25) / 1.25, torch.tensor([0.5], dtype=torch.float64))


def test_small_hessian_changes_survive_in_fp32() -> None:
    hess = torch.ones(1000)
    group = {"ess": 8551.0, "beta2": 0.99999, "weight_decay": 1e-8}
    for _ in range(1000):
        rule.update_hess_(hess, torch.zeros(1000), "price", group)
    torch.testing.assert_close(hess, torch.full((1000,), 0.99004983375), rtol=0, atol=2e-5)
