"""Two ranks on this machine with gloo, and what makes a comparison of two runs sharp.

Starting a process costs seconds (torch, diffusers), so one pair of ranks runs a list of jobs in one go.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def torchrun(script, *arguments, timeout=480):
    """Start `script` on two ranks of this machine and wait -> (exit code, output, seconds)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    began = time.monotonic()
    done = subprocess.run(
        [*command, str(script), *map(str, arguments)], env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout,
    )  # fmt: skip
    return done.returncode, done.stdout, time.monotonic() - began


# ------------------------------------------------------------------------------ what both sides of a comparison have
@contextlib.contextmanager
def linear():
    """Context: a step of the optimizer is linear in the gradient, and a score is a smooth function of the picture.

    AdamW's and Muon's own steps turn the rounding noise of a gradient that is nearly zero into whole steps, and a
    detector turns a picture that differs in its last bits into another score. A fourth of the prompts has no score if
    SOME_ARE_LOST is set.
    """
    import pytest
    import torch

    from harness import page, weights
    from models import tiny
    from rewards import RewardError
    from tiny import drawings

    def optimizers(model, s):
        return [torch.optim.AdamW(model.trainable().values(), s.lr, (0.9, 0.99), eps=1.0, weight_decay=s.weight_decay)]

    def score(images, prompts):
        if any(sum(map(ord, p.text)) % 4 == 0 for p in prompts) and os.environ.get("SOME_ARE_LOST"):
            raise RewardError("no score")
        pattern = torch.linspace(-1, 1, images[0].numel()).reshape(images[0].shape).cos()
        return torch.sigmoid(40 * ((images - 0.5) * pattern).mean((1, 2, 3))).tolist()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "optimizers", optimizers)
        patch.setattr(tiny, "new_tiny", partial(tiny.new_tiny, width=32, layers=1))  # of pretraining
        patch.setitem(drawings.SCORERS, "quality", score)
        patch.setattr(page, "plot", lambda *_: "")  # it takes longer than such a run
        yield


@contextlib.contextmanager
def counted(found: Counter):
    """Context: count the student's forwards and the collectives of torch.distributed, by name."""
    import pytest
    import torch
    import torch.distributed as dist

    from models import flow

    with pytest.MonkeyPatch.context() as patch:

        def count(owner, name):
            real = getattr(owner, name)

            def call(*args, **kwargs):
                found[name] += name != "_forward" or of_the_student(args[0])
                return real(*args, **kwargs)

            patch.setattr(owner, name, call)

        def of_the_student(model):  # a teacher beside it is never sharded, and its ranks need not go together
            return torch.is_grad_enabled() or (model.trains == "full" and model.active is model.transformer)

        count(flow.FlowModel, "_forward")
        for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "barrier"):
            count(dist, name)
        yield


def work_through(jobs):
    """This rank's part of `jobs`, [{"argv": flags of train.py, "env": {...}}] -> what each has counted."""
    import train

    counts = []
    with linear():
        for job in jobs:
            os.environ.update(job["env"])
            found = Counter()
            with counted(found):
                code = train.main(job["argv"])
            if code:
                sys.exit(f"{job['argv']} ended with {code}")
            counts.append(found)
    return counts


def on_two_ranks(folder: Path, jobs, timeout=480):
    """Two ranks work through `jobs` -> [the counts of rank 0, of rank 1]."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    code, output, _ = torchrun(Path(__file__), str(folder), timeout=timeout)
    assert code == 0, output[-4000:]
    return [json.loads((folder / f"counts-{rank}.json").read_text()) for rank in (0, 1)]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    where = Path(sys.argv[1])
    counts = work_through(json.loads((where / "jobs.json").read_text()))
    (where / f"counts-{os.environ['RANK']}.json").write_text(json.dumps(counts))
