"""Whatever is given ends in a result or in one line: the seeded mutations of bench/bad_input.py, as few as fit here."""

import json
import shutil

import pytest
import torch

from bench import bad_input
from harness.ranks import USER_ERRORS
from tests.helpers.toy import NFT, toy_in, train


def runs(rng, folder):
    """What lies in a run's folder: its newest checkpoint, its config, its metrics."""
    start, out = folder / "start", folder / "out"
    if not start.exists():
        train(toy_in(start, **NFT, keep=5))
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(start, out)
    file = rng.choice([p for p in (out / "toy").rglob("*") if p.is_file() and "tfevents" not in p.name])
    if file.suffix == ".json" and rng.random() < 0.5:
        file.write_text(json.dumps(bad_input.changed(rng, json.loads(file.read_text()))))
    else:
        file.write_bytes(bad_input.cut_up(rng, file.read_bytes()))

    def resume():
        run = toy_in(out, **NFT, steps=4)
        assert run.step in (0, 1, 2, 3)
        train(run)

    try:
        resume()
    except USER_ERRORS as fault:
        assert str(fault).strip()


# Half of what bench.bad_input, which `make test-all` runs, has at least.
LAYERS = {**{layer: count // 2 for layer, count in bad_input.LAYERS.items()}, runs: 20, bad_input.whole_runs: 5}


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
def test_whatever_is_given_ends_in_a_result_or_in_one_line(layer):
    torch.set_num_threads(1)
    tried, survived = bad_input.survived(layer, LAYERS[layer])
    assert tried == survived > 0
