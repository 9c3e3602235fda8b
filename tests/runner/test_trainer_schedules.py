"""Learning-rate schedules: published values, and Transformers' own where it has the schedule."""

from __future__ import annotations

import pytest
import torch

from examples.training.schedules import SCHEDULES, clr, cycle, schedule


def test_linear_with_warm_up_has_the_published_values():
    rate = schedule("linear", 10, 4)
    expected = [0, 0.25, 0.5, 0.75, 1, 0.8333, 0.6667, 0.5, 0.3333, 0.1667, 0]
    assert [rate(k) for k in range(11)] == pytest.approx(expected, abs=5e-5)


def test_clr_has_the_published_values():
    rate = clr(6700, 67, 100, first=2.0, const_epochs=500, second=0.4, end=0.0)
    assert [rate(k) for k in (0, 50, 99, 100, 499)] == pytest.approx([0, 1.0, 1.98, 2.0, 2.0])
    expected = [0.4, 0.2, 6.4516e-5, 0.0]
    assert [rate(k) for k in (500, 3600, 6699, 6700)] == pytest.approx(expected, rel=1e-4)


def test_clr_counts_epochs_below_a_hundred():
    rate = clr(300, 50, 10, first=1.0, const_epochs=2.0, second=0.5, end=0.1)
    assert rate(99) == 1.0 and rate(100) == 0.5
    assert rate(200) == pytest.approx(0.5 - 0.4 * 100 / 200)
    assert rate(300) == pytest.approx(0.1)


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("name", [name for name in SCHEDULES if name not in ("clr", "cycle")])
def test_schedules_equal_transformers(name, warmup):
    get_scheduler = pytest.importorskip("transformers").get_scheduler
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    theirs = get_scheduler(name, optimizer, warmup, 17)
    ours = schedule(name, 17, warmup, peak=2e-3)
    for k in range(17):
        assert 2e-3 * ours(k) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12), k
        optimizer.step()
        theirs.step()


def test_restarts():
    rate = schedule("cosine_with_restarts", 10, 0, cycles=2)
    assert rate(0) == rate(5) == 1.0 and rate(4) < 0.1 and rate(10) == 0.0


def test_cycle_goes_straight_from_knot_to_knot_and_stays_at_the_last():
    rate = cycle([0, 4, 10], [0.0, 1.0, 0.1])
    assert [rate(k) for k in (0, 1, 4, 6, 10, 99)] == pytest.approx([0, 0.25, 1, 0.7, 0.1, 0.1])


def test_unknown_schedule():
    with pytest.raises(ValueError, match="no schedule 'step'"):
        schedule("step", 10)
