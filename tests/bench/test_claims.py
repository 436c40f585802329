"""bench/claims.py: every run is a command line that train.py takes, and every claim compares rows that it has."""

import re

import pytest

from bench import claims


@pytest.mark.parametrize("name", claims.RUNS)
def test_a_runs_flags_are_read_by_its_stage_and_name_runs_that_are_there(name, monkeypatch):
    for quick in (False, True):
        monkeypatch.setattr(claims, "QUICK", quick)
        s = claims.parsed(*claims.flags_of(name, 1))
        assert s.stage == "merge" or s.seed == 1
    assert set(re.findall(r"@([\w-]+)", claims.RUNS[name])) <= set(claims.RUNS)


def test_a_claim_compares_rows_and_columns_that_it_has():
    assert [claim.number[0] for claim in claims.CLAIMS] == list("2466666391577777778")
    for claim in claims.CLAIMS:
        for a, b, column in claim.above:
            assert column in claim.columns and (not claim.rows or {a, b} <= set(claim.rows)), claim.number
    assert set(claims.TUNED) <= set(claims.RUNS)
