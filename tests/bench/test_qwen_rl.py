"""bench/qwen_rl.py: the bound of Q Eq. 17 against an independent numerical route."""

import math
import re

import numpy as np
import pytest

from bench import qwen_rl


def printed(capsys):
    """The rows of a printed markdown table, cell by cell, without head and rule."""
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    return rows[0], rows[2:]


def test_w2_prints_what_quadrature_of_the_flows_themselves_gives(capsys):
    """Independent: both flows carry z along x_t = (1-t) m + s_t z; velocities are differences of positions along it,
    expectations Gauss-Hermite sums, time integrals midpoint sums, W2 the gap of quantiles. Dimensions are alike: 3."""
    qwen_rl.w2()
    head, rows = printed(capsys)
    assert head == ["teacher", "student", "W2", "bound of Eq. 17", "bound / W2"] and len(rows) >= 5
    z, weight = np.polynomial.hermite_e.hermegauss(9)
    weight = weight / weight.sum()
    edges = np.linspace(0, 1, 40001)
    t, h = (edges[1:] + edges[:-1]) / 2, 1e-6

    def position(m, c, t, z):
        return (1 - t)[:, None] * m + np.sqrt((1 - t) ** 2 * c**2 + t**2)[:, None] * z

    def velocity(m, c, x):
        """At states x (T, Z) of another flow: find z of x, and look where its path goes."""
        zero, one = position(m, c, t, np.zeros(1)), position(m, c, t, np.ones(1))
        z_of_x = (x - zero) / (one - zero)
        return (position(m, c, t + h, z_of_x) - position(m, c, t - h, z_of_x)) / (2 * h)

    for names in rows:
        (m_t, c_t), (m, c) = (map(float, re.match(r"N\(([\d.]+), ([\d.]+)\^2\)", name).groups()) for name in names[:2])
        x = position(m, c, t, z)
        gap_sq = 3 * (((velocity(m, c, x) - velocity(m_t, c_t, x)) ** 2) @ weight)
        slope = np.abs(velocity(m_t, c_t, x + 0.5) - velocity(m_t, c_t, x - 0.5)).max(1)
        bound = math.sqrt(gap_sq.mean()) * math.exp(slope.mean())
        true = math.sqrt(3 * (((m + c * z) - (m_t + c_t * z)) ** 2 @ weight))
        assert [float(v) for v in names[2:]] == pytest.approx([true, bound, bound / true], rel=2e-3, abs=6e-3)
        assert bound >= true, "Q Eq. 17"
