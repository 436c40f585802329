"""bench_qwen.py makes the figures about Q: its bound against an independent numerical route, its tables by hand."""

import json
import math
import re

import numpy as np
import pytest

from bench import qwen_rl as bench_qwen


def printed(capsys):
    """The rows of a printed markdown table, cell by cell, without head and rule."""
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    return rows[0], rows[2:]


def test_w2_prints_what_quadrature_of_the_flows_themselves_gives(capsys):
    """Independent: both flows carry z along x_t = (1-t) m + s_t z; velocities are differences of positions along it,
    expectations Gauss-Hermite sums, time integrals midpoint sums, W2 the gap of quantiles. Dimensions are alike: 3."""
    bench_qwen.w2()
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


def test_a_curves_ends_are_the_means_of_five_steps(tmp_path):
    rows = [{"step": n, "reward": n**2} for n in range(1, 8)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert bench_qwen.curve(tmp_path, "reward", first=True) == (1 + 4 + 9 + 16 + 25) / 5
    assert bench_qwen.curve(tmp_path, "reward", first=False) == (9 + 16 + 25 + 36 + 49) / 5


def test_a_runs_own_scores_are_read_by_its_name(tmp_path):
    run = tmp_path / "bench-q-opd-1"
    run.mkdir()
    (run / "results.json").write_text(json.dumps({run.name: {"scores": {"t2i": 0.5}, "tags": {}}}))
    assert bench_qwen.scores_of(run) == {"t2i": 0.5}


def test_a_table_has_the_mean_and_deviation_of_seeds_and_a_single_number_without(capsys):
    seeds = [{"a": 1.0, "b": 0.0}, {"a": 2.0, "b": 0.5}, {"a": 3.0, "b": 1.0}]
    bench_qwen.table({"base": [{"a": 0.25, "b": 2.0, "c": 9.0}], "trained": seeds}, ("b", "a"))
    head, rows = printed(capsys)
    assert head == ["", "b", "a"] or head == ["b", "a"]
    assert rows == [["base", "2.000", "0.250"], ["trained", "0.500 ± 0.500", "2.000 ± 1.000"]]


def test_what_is_trained_is_named_by_seed_and_not_again_once_it_was_evaluated(tmp_path, monkeypatch):
    import train

    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "main", lambda argv: asked.append(argv) or 0)
    run = bench_qwen.trained("guidance-both", 2, "--stage", "grpo", "--task", "t2i")
    assert run.name == "bench-q-guidance-both-2"
    flags = ["--name", run.name, "--seed", "2", "--stage", "grpo", "--task", "t2i"]
    assert asked == [["--preset", "tiny-qwen", *flags]]
    run.mkdir(parents=True)  # begun, not evaluated: it is gone on with
    assert bench_qwen.trained("guidance-both", 2) == run and len(asked) == 2
    (run / "results.json").write_text("{}")
    assert bench_qwen.trained("guidance-both", 2) == run and len(asked) == 2
    monkeypatch.setattr(train, "main", lambda argv: 2)
    with pytest.raises(SystemExit):  # train.py has said why
        bench_qwen.trained("opd", 0)
