"""Who gets which prompt when? Everything random in a run is drawn from `seed_for` of what it is for.

No sampler and no generator is kept between steps. Resuming is exact on any number of ranks without saving any state.
"""

import hashlib
import random
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")


def seed_for(*parts: int | str) -> int:
    """One seed in [0, 2^63) for what `parts` name, e.g. seed_for("noise", seed, step, rank). Q §4.1.

    A cryptographic hash: neighbouring steps share nothing, and every process gets the same (unlike `hash`).
    1 and "1" differ. Raises ValueError for a part that is neither int nor str: the text form of other types
    (NumPy's integers for one) changes between versions, and the seed would silently change with it.
    """
    if not all(type(part) in (int, str) for part in parts):
        raise ValueError(f"a seed is made from ints and strings, got {parts!r}")
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def prompt_batch(prompts: Sequence[T], count: int, seed: int, step: int, rank: int, world: int) -> list[T]:
    """The `count` prompts that `rank` of `world` trains on at `step`. F §5.1.1, Q §4.1 (prompt sampling).

    Each epoch is a fresh permutation of all N prompts, seeded by (seed, epoch), cut into steps of count * world prompts
    and each step into ranks. So the ranks of a step have different prompts, an epoch has no prompt twice, and a step
    has the same prompts however many ranks share it. The N mod (count * world) prompts that are left over are not in
    this epoch; they are others in the next. If a step needs more than N prompts, permutations follow each other
    without a gap, and repeats are unavoidable.
    Raises ValueError for an empty list, a count below 1, a negative step or a rank outside 0..world-1.
    """
    if not prompts or count < 1 or step < 0 or rank not in range(world):
        shown = f"{len(prompts)} prompts, count {count}, step {step}, rank {rank} of {world}"
        raise ValueError(f"no batch: need prompts, count >= 1, step >= 0 and 0 <= rank < world; got {shown}")
    size = count * world
    epoch_length = len(prompts) // size * size or len(prompts)  # prompts drawn from one permutation
    first = step * size + rank * count  # this rank's place in the endless line of prompts
    places = [divmod(place, epoch_length) for place in range(first, first + count)]  # (epoch, index)
    orders = {epoch: _permutation(len(prompts), seed, epoch) for epoch, _ in places}
    return [prompts[orders[epoch][index]] for epoch, index in places]


@lru_cache(16)  # of an epoch, for all of its steps
def _permutation(length: int, seed: int, epoch: int) -> list[int]:
    return random.Random(seed_for("prompts", seed, epoch)).sample(range(length), length)


def batches(items: Sequence, size: int) -> list[Sequence]:
    """`items` in parts of `size`, the last one shorter; size 0: all in one part."""
    size = size or len(items) or 1
    return [items[i : i + size] for i in range(0, len(items), size)]
