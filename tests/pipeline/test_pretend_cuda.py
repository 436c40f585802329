"""On an accelerator every stage of every model works: nothing that computes together is on two devices."""

import json
import os
from itertools import product

import pytest
import torch

from tests.helpers.pretend_cuda import CPU, CUDA, WrongDevice, place, pretend_cuda
from tests.helpers.qwen_hub import build_vlm
from tests.helpers.runs import command, write_marks


def test_the_pretended_device_refuses_what_cuda_refuses_and_nothing_else():
    with pretend_cuda():
        here, there = torch.ones(3, 5), torch.ones(3, 5, device="cuda")
        assert (here.device, there.device) == (CPU, CUDA) and there.is_cuda
        for fault in (
            lambda: here + there, lambda: torch.cat([here, there]), lambda: here[there.long()], lambda: there.numpy(),
            lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
            lambda: torch.nn.functional.linear(here, there),
            lambda: torch.nn.Linear(5, 2).to("cuda")(here),
            lambda: here * there.sum(),
        ):  # fmt: skip
            with pytest.raises(WrongDevice):
                fault()
        moved = here.to("cuda")
        moved.zero_()
        assert here.sum() == 15, "a copy"
        for found in (moved, there[torch.tensor([0, 2])], there * torch.tensor(2.0), there.view(5, 3).data,
                      there.new_zeros(2), torch.zeros_like(there), there.to(torch.bfloat16), there.copy_(here),
                      torch.nn.Parameter(there)):  # fmt: skip
            assert found.device == CUDA
        weight = torch.nn.Linear(5, 2).to("cuda").weight
        (weight * torch.ones(2, 5, device="cuda")).sum().backward()
        assert weight.grad.device == CUDA and there.cpu().device == CPU and there.sum().item() == 15
    assert place(here) == CPU and not torch.cuda.is_available()


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    """A scorer that computes on the accelerator, and one that does not."""
    from tests.helpers.clip import save_clip

    root = tmp_path_factory.mktemp("rewards")
    scorers = {"clip": {"kind": "clipscore", "model": str(save_clip(root / "clip"))}}
    (root / "rewards.json").write_text(json.dumps({"scorers": scorers, "weights": {"default": {"clip": 1, "jpeg": 1}}}))
    return str(root / "rewards.json")


# What the run is told besides; a full student's teachers are LoRAs and full checkpoints, as OPD's are.
MIX = ("--task", "mix", "--beta", "0.1")
STAGES = {
    "pretrain": (), "curate": ("--train-prompts", "4"), "grpo": MIX, "nft": MIX, "sft": (), "merge": (), "opd": (),
    "full": ("--parameters", "full"), "eval": (), "reward": (),
}  # fmt: skip


KINDS = ("world", "world2", "sd35", "qwen", "qwen21")
# As another, or nothing:
SAME = [("sd35", "pretrain"), ("qwen", "pretrain"), ("qwen21", "pretrain"), ("world2", "reward"), ("qwen", "reward"),
        ("qwen21", "reward")]  # fmt: skip
# Each stage on every second model and each model in every second stage; all pairs with WHOLE_GRID=1 in the environment.
TRIED = [
    (kind, stage) for (i, kind), (j, stage) in product(enumerate(KINDS), enumerate(STAGES))
    if (kind, stage) not in SAME and (os.environ.get("WHOLE_GRID") or (i + j) % 2 == 0)
]  # fmt: skip


@pytest.mark.parametrize(("kind", "stage"), TRIED)
def test_every_stage_of_every_model_runs_on_an_accelerator(
    request, tmp_path, rewards, no_pictures, monkeypatch, kind, stage
):
    import eval as evaluation
    import train
    from tiny import judge

    base, published = request.getfixturevalue(kind), kind in ("sd35", "qwen", "qwen21")
    flags = ["--out", str(tmp_path), "--name", "r", "--stage", {"full": "opd"}.get(stage, stage), *STAGES[stage]]
    flags += [] if stage in ("merge", "curate", "eval") else ["--steps", "1"]
    if published:  # half precision is what an accelerator is for
        flags += ["--precision", "bfloat16"]
        flags += ["--rewards", rewards] if stage in ("curate", "grpo", "nft", "sft", "opd", "full", "eval") else []
        flags += ["--gradient-checkpointing"] if stage in ("grpo", "full") else []
    if stage == "merge" and published:
        flags += ["--teachers", f"quality={base.lora}" if kind == "sd35" else f"edit={base.teachers['t2i']}"]
    if stage == "eval":
        flags = [*flags[:4], *flags[6:]]
    if stage == "reward" and published:
        root = write_marks(tmp_path)
        model = ["--model", str(build_vlm(tmp_path / "vlm"))]
        flags += ["--data", str(root / "pairwise.jsonl"), "--objective", "pairwise", "--holdout", "0.3", *model]
        flags += ["--batch-size", "4", "--micro-batch", "2"]
    monkeypatch.setattr(judge, "PROMPTS", 60)
    with pretend_cuda() as mode:
        argv = [*command(base.flags, *flags, stage="eval" if stage == "eval" else ""), "--device", "cuda"]
        assert (evaluation if stage == "eval" else train).main(argv) == 0
    assert mode.computed > 100, "on the accelerator, that is"


@pytest.mark.parametrize("stage", ["grpo", "opd"])
def test_the_host_waits_for_the_accelerator_as_often_in_a_long_trajectory_as_in_a_short_one(world, go, stage):
    """A number that is asked for at each transition would drain the accelerator's queue each time."""
    waits = []
    for steps in ("3", "6"):
        more = ["--num-steps", steps, "--device", "cuda", "--window", f"0:{int(steps) - 1}"]
        more += ["--task", "text", "--train-steps", "all"] if stage == "grpo" else []
        with pretend_cuda() as mode:
            go(f"{stage}-{steps}", "--stage", stage, *more)
        waits.append(mode.waits)
    assert waits[0] == waits[1] > 0
