"""bench/runs.py: what is trained once, ends of curves, tables over seeds."""

import json

import pytest

import train
from bench import runs


def test_the_ends_of_a_curve_are_the_means_of_five_steps(tmp_path):
    rows = [{"step": n, "reward": n**2} for n in range(1, 8)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert runs.ends(tmp_path, "reward") == ((1 + 4 + 9 + 16 + 25) / 5, (9 + 16 + 25 + 36 + 49) / 5)


def test_a_table_has_the_mean_and_sample_deviation_of_seeds_and_a_single_number_alone(capsys):
    seeds = [{"a": 1.0, "b": 0.0}, {"a": 2.0, "b": 0.5}, {"a": 3.0, "b": 1.0}]
    runs.table({"base": [{"a": 0.25, "b": 2.0, "c": 9.0}], "trained": seeds}, ("b", "a"))
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    shown = ["| base | **2.000** | <u>0.250</u> |", "| trained | <u>0.500 ± 0.500</u> | **2.000 ± 1.000** |"]
    assert lines[2:] == shown


def test_what_is_trained_is_not_trained_again_once_it_was_evaluated(tmp_path, monkeypatch):
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "main", lambda argv: asked.append(argv) or 0)
    run = runs.trained("bench-x", "--stage", "grpo")
    assert asked == [["--stage", "grpo", "--name", "bench-x"]]
    run.mkdir(parents=True)  # begun, not evaluated: it is gone on with
    assert runs.trained("bench-x") == run and len(asked) == 2
    (run / "results.json").write_text(json.dumps({run.name: {"scores": {"t2i": 0.5}}}))
    assert runs.trained("bench-x") == run and len(asked) == 2 and runs.scores_of(run) == {"t2i": 0.5}
    monkeypatch.setattr(train, "main", lambda argv: 2)
    with pytest.raises(SystemExit):  # train.py has said why
        runs.trained("bench-y")
