"""n ranks with P prompts each are one rank with nP, whatever the settings: the same weights, averages, old policies and
moments after two steps, and as many forwards and collectives on each rank.

A seeded sample of the grid; all of it with WHOLE_GRID=1 in the environment, as `make test-all` has it.
"""

import json
import os
import random
from itertools import product

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import ranks
from tests.helpers.runs import command, metrics, stored
from tiny import edits

STEPS = "--steps 2 --eval-prompts 0 --save-every 2 --warmup 0 --lr 1 --ema-every 1 --keep 1 --timeout 1".split()
RL = "--rewards quality=1 --beta 0.1 --train-steps random --train-count 1 --num-steps 2".split()


def grid():
    """(name, world, stage, flags, rows a rank: of its flag and number, are some groups lost?)."""
    for stage, std, (updates, P), overlap, task, lost in product(
        ("grpo", "nft"), ("group", "batch", "none"), ((1, 4), (1, 5), (2, 4), (2, 6)), ("no-", ""),
        (["text"], ["mix", "--mix", "turns"], ["mix", "--mix", "joint"]), (False, True),
    ):  # fmt: skip
        flags = [*RL, "--advantage-std", std, "--updates", str(updates), f"--{overlap}overlap", "--task", *task]
        flags += ["--micro-batch", "3", *(["--on-reward-failure", "drop"] if lost else [])]
        yield "world", stage, flags, ("--prompts-per-step", P), lost
    for how, (updates, P), micro in product(
        ("sampled_path", "analytic", "analytic --drawn-states 1 --anchor-every 2", "released --drawn-states 2"),
        ((1, 3), (1, 4), (1, 5), (2, 4), (2, 6)), ("0", "3"),
    ):  # fmt: skip
        flags = ["--estimator", *how.split(), "--mar", "0.1", "--micro-batch", micro, "--updates", str(updates)]
        yield "world", "opd", flags, ("--prompts-per-step", P), False
    for world, stage, rows, micro in product(("world", "world2"), ("sft", "pretrain"), (1, 3, 4), ("0", "2")):
        yield world, stage, ["--micro-batch", micro], ("--batch-size", rows), False
    # Edits beside drawings, by their picture and not by their task's name
    full, sharded = ["--parameters", "full"], ["--parallel", "fsdp"]
    for stage, parameters, micro, P in product(
        ("grpo", "nft", "sft", "opd"), ([], full, full + sharded), ("0", "1", "3"), (2, 3)
    ):
        flags = [*parameters, "--micro-batch", micro]
        flags += [*RL, "--updates", "1", "--task", "mix", "--mix", "joint"] if stage in ("grpo", "nft") else []
        yield "mixed", stage, flags, ("--batch-size" if stage == "sft" else "--prompts-per-step", P), False


GRID = list(grid())


def sample():
    """One setting of each kind, and three of the teachers' in the tiny world, which have most."""

    def kind(job):
        return (*job[:2], "--parallel" in job[2])

    for own in sorted({kind(job) for job in GRID}):
        some, many = [job for job in GRID if kind(job) == own], own[:2] in (("world", "grpo"), ("world", "nft"))
        yield from some if os.environ.get("WHOLE_GRID") else random.Random(str(own)).sample(some, 3 if many else 1)


SAMPLE = list(sample())


def name_of(job):
    world, stage, flags, (flag, number), _ = job
    return f"{world} {stage} {' '.join([*flags, flag, str(number)]).replace(' '.join(RL), '')}".replace("--", "")


@pytest.fixture(scope="module")
def mixed(world2, tmp_path_factory):
    """Flags of the tiny-qwen world with prompts of the task t2i, every other of which begins from a picture."""
    file = tmp_path_factory.mktemp("mixed") / "t2i.jsonl"
    drawn, changed = (edits.make_prompts(task, "train", 12) for task in ("t2i", "edit"))
    lines = [{"prompt": p.text, **p.metadata} for p in drawn]
    for line, source in list(zip(lines, changed, strict=True))[::2]:
        line["image"] = source.metadata["image"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [*world2.flags, "--prompts", f"t2i={file}"]


@pytest.fixture(scope="module")
def runs(world, world2, mixed, tmp_path_factory):
    """Each job on two ranks and on one -> (its two folders, what each of the two ranks has counted)."""
    root, base = tmp_path_factory.mktemp("ranks"), {"world": world.flags, "world2": world2.flags, "mixed": mixed}
    jobs = {1: [], 2: []}
    for number, (world, stage, flags, (flag, rows), lost) in enumerate(SAMPLE):
        for count, some in jobs.items():
            own = [flag, str(rows if count == 2 else 2 * rows), "--out", str(root), "--name", f"{number}-of-{count}"]
            if count == 1 and "--parallel" in flags:
                own += ["--parallel", "ddp"]
            argv = command(base[world], "--stage", stage, *STEPS, *flags, *own)
            some.append({"argv": argv, "env": {"SOME_ARE_LOST": "1" if lost else ""}})
    counts = ranks.on_two_ranks(root, jobs[2], timeout=60 + 20 * len(SAMPLE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOME_ARE_LOST", "")
        ranks.work_through(jobs[1])
    return {
        name_of(job): (root / f"{i}-of-1", root / f"{i}-of-2", counts[0][i], counts[1][i])
        for i, job in enumerate(SAMPLE)
    }


def read(folder):
    """As `stored`, with the parts of a sharded tensor, of which each rank has written its own, put together."""
    found, parts = stored(folder), sorted((folder / "checkpoints/step-000002/training").iterdir())
    for name, tensors in ((name, [load_file(part).get(name) for part in parts]) for name in found):
        if isinstance(found[name], torch.Tensor):
            found[name] = torch.cat([tensor for tensor in tensors if tensor is not None])
    return found


@pytest.mark.parametrize("job", [name_of(job) for job in SAMPLE])
def test_two_ranks_are_one_rank_with_the_prompts_of_both(runs, job):
    alone, both, first, second = runs[job]
    one, two = read(alone), read(both)
    assert one.pop("step") == two.pop("step") == 2 and one.pop("updates") == two.pop("updates")
    assert one.keys() == two.keys()
    for kind in {key.split(".")[0] for key in one}:
        keys = sorted(key for key in one if key.split(".")[0] == kind)
        a, b = (torch.cat([found[key].double().flatten() for key in keys]) for found in (one, two))
        assert (a - b).norm() < 1e-5 * a.norm() and a.norm() > 0, kind
    for line, expected in zip(metrics(both), metrics(alone), strict=True):
        assert line == pytest.approx(expected, rel=1e-3, abs=2e-6)
    assert first == second and first["_forward"] > 0, "a rank that makes fewer forwards or collectives waits for ever"
