"""Seeds and batches: functions of what they are for, in any process and on any number of ranks."""

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data.batches import prompt_batch, seed_for


# ------------------------------------------------------------------------------------------------------ seeds
def test_seeds_are_the_first_63_bits_of_sha256_in_any_process():
    # int(hashlib.sha256(repr(parts).encode()).hexdigest()[:16], 16) >> 1, worked once, outside the project.
    # A change here would break every resumed run.
    assert seed_for("noise", 1, 2) == 688015602918281883 and seed_for() == 1665333220245342802
    code, root = "from data.batches import seed_for; print(seed_for('noise', 1, 2))", Path(__file__).parents[2]
    line = [sys.executable, "-c", code]
    out = subprocess.run(line, cwd=root, env={"PYTHONHASHSEED": "7"}, capture_output=True, text=True)
    assert int(out.stdout) == seed_for("noise", 1, 2)


def test_seeds_differ_with_every_part_its_order_and_its_type_and_spread_over_63_bits():
    parts = [("a", 1, 2), ("a", 2, 1), ("b", 1, 2), ("a", 12), ("a", "1", 2), ("a1", 2), (1,), ("1",), (0,), (-1,), ()]
    assert len({seed_for(*p) for p in parts}) == len(parts)
    seeds = [seed_for("s", i) for i in range(2000)]
    assert len(set(seeds)) == 2000 and all(0 <= s < 2**63 for s in seeds)
    # Each of the 63 bits is a fair coin: 1000 heads of 2000, standard deviation sqrt(2000)/2 = 22; 5 of them.
    assert all(abs(sum(s >> bit & 1 for s in seeds) - 1000) < 112 for bit in range(63))


@pytest.mark.parametrize("part", [1.0, True, None, np.int64(3), ("a",)])
def test_seeds_refuse_parts_whose_text_form_is_not_stable(part):
    with pytest.raises(ValueError, match="ints and strings"):
        seed_for("a", part)


# ---------------------------------------------------------------------------------------------------- batches
def drawn(n, count, world, steps, seed=0):
    """[step][rank] -> what prompt_batch hands out of n things."""
    return [[prompt_batch(range(n), count, seed, s, r, world) for r in range(world)] for s in steps]


def flat(steps):
    return [i for ranks in steps for batch in ranks for i in batch]


@pytest.mark.parametrize("n, count, world", [(11, 2, 2), (30, 4, 3), (30, 3, 2), (7, 7, 1), (12, 2, 5), (6, 1, 4)])
def test_ranks_of_a_step_are_disjoint_and_an_epoch_repeats_nothing(n, count, world):
    per_epoch = n // (count * world)
    steps = drawn(n, count, world, range(6 * per_epoch))
    assert all(len(batch) == count for ranks in steps for batch in ranks)
    epochs = [flat(steps[e * per_epoch : (e + 1) * per_epoch]) for e in range(6)]
    assert all(len(set(epoch)) == len(epoch) == per_epoch * count * world for epoch in epochs)
    assert set(flat(steps)) == set(range(n)), "what one epoch leaves over, another visits"
    assert len({tuple(epoch) for epoch in epochs}) == 6, "every epoch has its own order"


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_a_step_is_the_same_list_of_prompts_on_any_number_of_ranks(world):
    one = [sum(ranks, []) for ranks in drawn(20, 6, 1, range(8))]
    assert [sum(ranks, []) for ranks in drawn(20, 6 // world, world, range(8))] == one


def test_small_lists_wrap_and_use_every_prompt_equally():
    steps = drawn(3, 4, 2, range(3))  # 24 draws from 3 prompts: 8 whole permutations
    assert Counter(flat(steps)) == {0: 8, 1: 8, 2: 8}
    assert all(sorted(flat(steps)[i : i + 3]) == [0, 1, 2] for i in range(0, 24, 3))
    assert prompt_batch(["p"], 2, 0, 5, 1, 2) == ["p", "p"]


def test_batches_depend_on_seed_step_and_rank_and_on_nothing_else():
    order = random.Random(seed_for("prompts", 5, 1)).sample(range(10), 10)
    assert flat(drawn(10, 5, 1, [2, 3], seed=5)) == order, "steps 2 and 3 are epoch 1"
    batch = prompt_batch(range(50), 4, 1, 2, 1, 3)
    random.seed(9)
    assert prompt_batch(range(50), 4, 1, 2, 1, 3) == batch
    others = [prompt_batch(range(50), 4, *where, 3) for where in ((2, 2, 1), (1, 3, 1), (1, 2, 0))]
    assert batch not in others


@pytest.mark.parametrize("n, count, step, rank, world", [
    (0, 1, 0, 0, 1), (3, 0, 0, 0, 1), (3, 1, -1, 0, 1), (3, 1, 0, 2, 2), (3, 1, 0, -1, 2),
])  # fmt: skip
def test_impossible_batches_are_refused(n, count, step, rank, world):
    with pytest.raises(ValueError, match="no batch"):
        prompt_batch(range(n), count, 0, step, rank, world)
