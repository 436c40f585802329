"""bench/runs.py: ends of curves, tables over seeds."""

import json

import pytest

from bench import runs


def test_the_ends_of_a_curve_are_the_means_of_five_steps(tmp_path):
    rows = [{"step": n, "reward": n**2} for n in range(1, 8)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert runs.ends(tmp_path, "reward") == ((1 + 4 + 9 + 16 + 25) / 5, (9 + 16 + 25 + 36 + 49) / 5)


def test_a_run_that_a_signal_has_stopped_is_not_taken_for_a_whole_one(tmp_path, monkeypatch):
    """train.py ends with 0 then, too: it has stopped in good order."""
    flags = ["--preset", "tiny", "--stage", "opd", "--steps", "3", "--out", str(tmp_path), "--name", "run"]
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(runs.train, "main", lambda flags: 0)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    with pytest.raises(SystemExit, match="stopped"):
        runs.trained(flags)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 2}\n{"step": 3}\n')
    assert runs.trained(flags) == tmp_path / "run"
