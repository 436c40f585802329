"""bench/release.py: the released loop, written from its description, gives our gradient; bytes are counted."""

import pytest
import torch

import train
from bench import release
from tests.bench.test_speed import SMALL


@pytest.mark.parametrize("estimator", ["released", "velocity"])
def test_the_released_loops_gradient_is_ours(monkeypatch, estimator):
    monkeypatch.setattr(release, "SMALL", SMALL)
    run, rows, experts = release.small_run(3)
    if estimator == "velocity":  # Q Eq. 14: an ODE's states, no anchor
        run.s = release.replace(run.s, estimator="velocity", weight="uniform", states="ode", mar=0.0)
        experts.pop("anchor")
    one, two = (
        release.gradient(run, lambda step=step: step(run, rows, experts))
        for step in (release.released_step, train.distil_step)
    )
    assert one.norm() > 0 and torch.allclose(one, two, atol=1e-5 * float(one.abs().max()))


def test_the_peak_is_of_tensors_that_live_at_once():
    weight = torch.zeros(5000)
    with release.Peak() as peak:
        a = weight[:1000] * 2  # its view is no new memory
        weight.add_(1)
        b = a + 1
        del a
        c = b[:500] * 2
        c.add_(b[500:])
    assert peak.most == 4000 + 4000
