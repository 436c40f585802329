"""Whole runs of --stage reward: judges learn, stop and go on to the same bits, and pay GRPO."""

import json
import types

import numpy as np
import pytest
import torch

import train
from data.files import Prompt
from harness import page
from harness.run import Run
from models import hub
from scorers import vlm_trained
from tests.helpers.qwen_hub import build_vlm
from tests.helpers.runs import command, metrics, same, stored, the_error, write_marks
from tiny import drawings
from tiny import judge as tiny_judge

OBJECTIVES = ("pointwise", "pairwise")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """240 prompts instead of 3000, and a judge of half the width."""
    monkeypatch.setattr(page, "plot", lambda *_: "")  # half a second a run, and test_page.py's matter
    monkeypatch.setattr(tiny_judge, "PROMPTS", 240)
    whole = tiny_judge.TinyJudge
    monkeypatch.setattr(tiny_judge, "TinyJudge", lambda width=32, layers=1, seed=0: whole(width, layers, seed))


def go(folder, *flags, preset="tiny", code=0):
    out = ["--out", str(folder.parent), "--name", folder.name, "--device", "cpu"]
    assert train.main(["--preset", preset, "--stage", "reward", *out, *map(str, flags)]) == code
    return folder


LEARN = "--steps 40 --save-every 20 --batch-size 32 --micro-batch 32 --lr 4e-3 --warmup 5 --holdout 0.2".split()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_tiny_judge_learns_to_order_pictures_that_it_has_never_seen(tmp_path, objective):
    run = go(tmp_path / "run", "--objective", objective, *LEARN)
    lines = metrics(run)
    first, last = (line for line in lines if "held_pair_accuracy" in line)
    assert len(lines) == 40 and (first["step"], last["step"]) == (20, 40)
    assert last["held_pair_accuracy"] > 0.8 and last["held_spearman"] > 0.75 and last["held_error"] < 1
    shown = f"{last['held_pearson']:.3f}"
    assert shown in (run / "report.html").read_text()
    assert f"held_pearson: {last['held_pearson']:.4g}" in (hub.last_checkpoint(run) / "README.md").read_text()


def test_held_out_pairs_are_judged_by_which_of_the_two_is_better():
    pairs = tiny_judge.marked_prints(240, "pairwise", 3, 0.2)[0][:40]
    judge = types.SimpleNamespace(scores=lambda images, prompts: drawings.quality(torch.stack(list(images))))
    accuracy = vlm_trained.agreement(judge, pairs, 7)["held_pair_accuracy"]
    winner, loser = (drawings.quality(torch.stack(images)) for images in list(zip(*pairs, strict=True))[:2])
    by_hand = ((winner > loser).sum() + 0.5 * (winner == loser).sum()) / 40
    assert accuracy == pytest.approx(by_hand.item()) and 0.8 < accuracy < 1


@pytest.mark.parametrize(("objective", "sizes"), [
    ("pairwise", {"0": [6], "10": [5, 1], "4": [2, 2, 2]}), ("pointwise", {"0": [12], "11": [11, 1], "4": [4, 4, 4]}),
])  # fmt: skip
def test_micro_batches_add_up_to_the_batch(tmp_path, spy, objective, sizes):
    """A batch is 12 pictures. The loss of a step is the mean over its items."""
    parts, lines = spy(train, "reward_loss"), []
    flags = f"--objective {objective} --steps 2 --batch-size 12 --warmup 5 --micro-batch".split()
    for size, expected in sizes.items():
        lines.append(metrics(go(tmp_path / size, *flags, size)))
        found = [(len(call.args[1]), call.result.item()) for call in parts]
        assert [count for count, _ in found] == 2 * expected
        for line, own in zip(lines[-1], (found[: len(expected)], found[len(expected) :]), strict=True):
            assert line["loss"] == pytest.approx(sum(n * loss for n, loss in own) / sum(expected), rel=1e-4)
        parts.clear()
    for other in lines[1:]:
        for a, b in zip(lines[0], other, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


# --------------------------------------------------------------------------------------------- VLMs from a data file
@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    return write_marks(tmp_path_factory.mktemp("marked"))


VLM = "--steps 14 --save-every 7 --batch-size 6 --micro-batch 4 --lr 5e-3 --rank 3 --warmup 0 --holdout 0.3".split()


def interrupt(at):
    """Ctrl-C once, in the step after `at`, when its gradients are there."""
    real, patch = Run.update, pytest.MonkeyPatch()

    def update(run):
        if run.step == at:
            patch.undo()
            raise KeyboardInterrupt
        return real(run)

    patch.setattr(Run, "update", update)


@pytest.mark.parametrize(("family", "objective"), [("qwen2_5_vl", "pointwise"), ("qwen3_vl", "pairwise")])
def test_a_vlm_of_each_family_learns_and_resumes_to_the_same_bits(marked, tmp_path, monkeypatch, family, objective):
    monkeypatch.setattr(vlm_trained, "QUESTION", "{prompt}?")
    base = build_vlm(tmp_path / "base", family)
    flags = ["--data", marked / f"{objective}.jsonl", "--objective", objective, "--model", base, *VLM]
    whole = go(tmp_path / "whole", *flags, "--precision", "float32", preset="flow-opd")
    lines = metrics(whole)
    losses = [line["loss"] for line in lines]
    assert np.mean(losses[-3:]) < 0.6 * np.mean(losses[:2])
    keys = {"held_pair_accuracy"} if objective == "pairwise" else {"held_pearson", "held_spearman", "held_error"}
    assert {key for key in lines[-1] if key.startswith("held_")} == keys, "a prompt has one picture: no pair of marks"
    text = (whole / "report.html").read_text()
    assert "<th>step 7<" in text and all(f"{lines[-1][key]:.3f}" in text for key in keys)
    interrupt(8)
    cut = go(tmp_path / "cut", *flags, "--precision", "float32", preset="flow-opd", code=130)
    assert hub.last_checkpoint(cut).name == "step-000007"
    go(cut, *flags, "--precision", "float32", preset="flow-opd")
    assert same(stored(cut), stored(whole)) and metrics(cut) == lines
    grey = torch.tensor([0.9, 0.1])[:, None, None, None].expand(2, 3, 40, 60)
    bright, dark = vlm_trained.scorer(whole).score(grey, [Prompt("prompt 3", "quality", {}, "p.txt:1")] * 2)
    assert bright > dark + 0.1, "a picture of neither file, and another reader than the one that was trained"


def test_a_holdout_without_prompts_and_a_picture_that_breaks_off_end_in_one_line(marked, tmp_path, capsys):
    for share, missing in ((1e-6, "held out"), (1 - 1e-6, "to train on")):
        for preset, where in (("qwen-rl", ["--data", marked / "pointwise.jsonl"]), ("tiny", [])):
            go(tmp_path / "run", *where, "--holdout", share, preset=preset, code=2)
            assert f"no prompt is {missing}" in the_error(capsys)
    go(tmp_path / "run", "--data", marked / "none.jsonl", "--dry-run", preset="qwen-rl", code=2)
    assert "none.jsonl:0: " in capsys.readouterr().out
    assert not (tmp_path / "run").exists(), "and nothing was written"
    broken = tmp_path / "half.png"
    broken.write_bytes((marked / "3.png").read_bytes()[:-40])
    lines = [{"image": "half.png", "prompt": f"p{i}", "score": 3} for i in range(20)]
    (tmp_path / "marks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    base = build_vlm(tmp_path / "base")
    flags = ["--data", tmp_path / "marks.jsonl", "--model", base, "--precision", "float32"]
    go(tmp_path / "run", *flags, preset="flow-opd", code=2)
    assert the_error(capsys).startswith(f"error: {tmp_path}/marks.jsonl:1: {broken}: ")


# ---------------------------------------------------------------------------------------------- a tiny judge's run
def test_a_tiny_judge_is_measured_at_every_checkpoint_and_pays_grpo(world, tmp_path):
    whole = go(tmp_path / "whole", *"--batch-size 8 --steps 5 --save-every 2 --objective pairwise".split())
    told = [line["step"] for line in metrics(whole) if "held_pair_accuracy" in line]
    assert told == [2, 4, 5]
    rewards = tmp_path / "reward.json"
    entry = {"kind": "trained", "model": str(whole)}
    rewards.write_text(json.dumps({"scorers": {"judge": entry}, "weights": {"default": {"judge": 1.0}}}))
    out = ["--out", str(tmp_path), "--name", "grpo", "--eval-prompts", "0"]
    flags = ["--stage", "grpo", "--task", "quality", "--rewards", str(rewards), "--steps", "1"]
    assert train.main(command(world.flags, *flags, *out)) == 0
    (line,) = metrics(tmp_path / "grpo")
    assert 0.2 < line["reward/judge"] < 1 and line["reward"] == line["reward/judge"] and line["group_std"] > 0
