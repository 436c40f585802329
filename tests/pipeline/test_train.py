"""Whole runs: the same bits after any interruption, one model on several ranks, cold starts by hand, every stage of
every model from its folder on disk, and one line for a user's error.
"""

import json
import math
import os
import re
import shutil
import signal
import socket
from itertools import count
from pathlib import Path

import pytest
import safetensors.torch
import torch

import rewards
import train
from data.pictures import source_images
from harness import drawn, page, rollout
from harness.run import Run
from models import hub, tiny
from scorers import panel as scoring
from tests.helpers.runs import (
    QWEN_TASKS,
    SMALL,
    SMALL2,
    TASKS,
    close,
    command,
    flat,
    metrics,
    same,
    stored,
    weights,
    with_adapter,
)

ROOT = Path(__file__).resolve().parents[2]
TEXT = ["--task", "text", "--rewards", "quality=1", "--micro-batch", "4"]
EVERY_STAGE = {
    "pretrain": ["--stage", "pretrain"],
    "grpo": ["--stage", "grpo", *TEXT],
    "nft": ["--stage", "nft", *TEXT],
    "sft": ["--stage", "sft"],
    "opd": ["--stage", "opd"],
    "opd, drawn states": ["--stage", "opd", "--drawn-states", "1"],
    "opd, all parameters": ["--stage", "opd", "--parameters", "full"],
}


@pytest.fixture
def small_pretraining(monkeypatch):
    real = tiny.new_tiny
    monkeypatch.setattr(tiny, "new_tiny", lambda seed, **more: real(seed, **{**more, "width": 32, "layers": 1}))


# ---------------------------------------------- interruption, resume (kills: test_run.py, ranks: test_distributed.py)
@pytest.mark.parametrize("stage", EVERY_STAGE)
def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(go, monkeypatch, small_pretraining, stage):
    flags = [*EVERY_STAGE[stage], "--steps", "4", "--save-every", "2"]
    whole, real = go("whole", *flags), Run.log

    def interrupted(run, *found):
        real(run, *found)
        if run.step == 2:  # the third step is done and logged, but not saved
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", interrupted)
        go("cut", *flags, code=130)
    cut, state = go("cut", *flags), stored(whole)
    assert state["step"] == 4 and set(state["updates"].values()) == {4.0}
    assert same(stored(cut), state), "weights, averaged weights, optimizer, step"
    assert metrics(cut) == metrics(whole) and [line["step"] for line in metrics(cut)] == [1, 2, 3, 4]
    last, other = hub.last_checkpoint(whole), hub.last_checkpoint(cut)
    for file in last.rglob("*.safetensors"):
        assert same(safetensors.torch.load_file(file), safetensors.torch.load_file(other / file.relative_to(last)))
    assert (weights(whole) != weights(whole, "average")).any(), "the average is not the weights"


@pytest.mark.parametrize("stage", ["opd", "grpo", "nft"])
def test_sigterm_within_a_step_ends_in_good_order_and_with_the_same_bits(go, monkeypatch, stage):
    """In the first of three micro-batches of the third step, what it has added to the gradient is thrown away."""
    flags = [*EVERY_STAGE[stage], "--steps", "4", "--save-every", "9", "--micro-batch", "2"]
    whole, real, calls = go("whole", *flags), rollout.conditions, count(1)

    def told(*args):
        if next(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(rollout, "conditions", told)
        cut = go("cut", *flags)
    assert next(calls) == 8, "nothing is begun after the signal"
    assert stored(cut)["step"] == 2 and not (cut / "report.html").exists(), "and nothing is evaluated"
    go("cut", *flags)
    assert same(stored(cut), stored(whole)) and metrics(cut) == metrics(whole) and (cut / "report.html").exists()


def test_training_stays_off_the_network_and_says_nothing_but_progress(go, monkeypatch, recwarn, capsys):
    def forbidden(*address):
        raise AssertionError(f"a connection to {address}")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, forbidden)
    go("run", "--steps", "2", "--save-every", "1", "--eval-prompts", "2")
    assert [str(w.message) for w in recwarn] == [], "no warning stands between a user and an error"
    assert re.fullmatch(r"(\s*run: [^\r\n]*)+\s*", capsys.readouterr().err)


# --------------------------------------------------------------------------------------------------------- cold starts
@pytest.mark.parametrize("stage", ["sft", "pretrain"])
def test_micro_batches_of_flow_matching_change_neither_noise_nor_gradient(go2, spy, updates, small_pretraining, stage):
    calls, found = spy(train, "flow_matching"), []
    for size in (0, 2, 3):
        (line,) = metrics(go2(f"of{size}", "--stage", stage, "--micro-batch", str(size), "--batch-size", "7"))
        assert line["loss"] == pytest.approx(sum(call.result for call in calls), rel=1e-5)
        seeds = sorted(g.initial_seed() for call in calls for g in call.args[3])
        found.append((seeds, sum(call.result for call in calls), flat(updates[-1].grads)))
        calls.clear()
    seeds, loss, gradient = found[0]
    assert len(set(seeds)) == 7 and gradient.norm() > 0
    for other_seeds, other_loss, other in found[1:]:
        assert other_seeds == seeds, "each row has its noise"
        assert close(other, gradient, 1e-6) and other_loss == pytest.approx(loss, rel=1e-5)


def test_pretraining_leaves_out_one_caption_in_ten(go, small_pretraining, spy):
    """So that v(x, t, "") is there for guidance."""
    asked, empty = spy(tiny.TinyModel, "encode_tokens"), tiny.TinyModel.tokenize("")
    go("run", "--stage", "pretrain", "--batch-size", "60")
    captions = [row for call in asked for row in call.args[1].tolist()]
    assert len(captions) == 60 and 2 <= captions.count(empty) <= 12


def test_sft_learns_the_pictures_of_each_tasks_own_teacher(go, spy, updates, world):
    """And its gradient is F Eq. 1's by autograd, with t and eps of each row drawn here from the row's seed."""
    drawn, sampled = spy(rollout, "draw"), spy(train, "flow_matching")
    folder = go("run", "--stage", "sft", "--init", str(world.teachers["text"]))
    calls, conds, student = list(drawn), {}, with_adapter(world, world.teachers["text"])
    for call, task in zip(calls, TASKS, strict=True):
        prompts, *how, cfg = call.args[1:]
        assert len(prompts) == 2 and {p.task for p in prompts} == {task}
        teacher = with_adapter(world, world.teachers[task])
        assert cfg == 1.0 and close(call.result, rollout.draw(teacher, prompts, *how, cfg))
        conds[task] = teacher.encode([p.text for p in prompts])
    ((_, x0, cond, noise, _),) = [call.args for call in sampled]
    assert x0.shape == (3, 3, 24, 24)
    latents, tokens = torch.cat([call.result for call in calls]), torch.cat([conds[task].tokens for task in TASKS])
    for row, own in zip(x0, cond.tokens, strict=True):  # the latents themselves, each with its own prompt
        (place,) = [i for i, one in enumerate(latents) if torch.equal(row, one)]
        assert torch.equal(own, tokens[place])
    fresh = [torch.Generator().manual_seed(g.initial_seed()) for g in noise]
    t = torch.stack([torch.sigmoid(torch.randn((), generator=g) + student.train_shift) for g in fresh])
    eps = torch.stack([torch.randn(3, 24, 24, generator=g) for g in fresh])
    at = t[:, None, None, None]
    loss = ((student.velocity((1 - at) * x0 + at * eps, t, cond) - (eps - x0)) ** 2).mean()
    assert close(flat(torch.autograd.grad(loss, list(student.trainable().values()))), flat(updates[0].grads), 1e-5)
    assert metrics(folder)[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_merging_gives_the_mean_of_the_teachers_updates_as_they_are_on_disk_now(go, world, tmp_path):
    def update(folder):
        state, config = tiny.load_tiny(world.base).read_adapter(folder)
        names = sorted(key.removesuffix(".lora_A.weight") for key in state if "lora_A" in key)
        scale = config.lora_alpha / config.r
        return {n: scale * state[f"{n}.lora_B.weight"] @ state[f"{n}.lora_A.weight"] for n in names}

    def merged(name, method, *flags):
        return update(go(name, "--stage", "merge", "--merge-method", method, *flags) / "checkpoints/step-000000")

    exact, teachers = merged("exact", "cat"), [update(folder) for folder in world.teachers.values()]
    for name, found in exact.items():
        assert close(found, sum(t[name] for t in teachers) / 3)
    assert not close(merged("svd", "svd")[name], exact[name]), "svd goes back to the teachers' rank"
    found = []
    for source in ("quality", "composition"):
        shutil.copytree(world.teachers[source], tmp_path / "text", dirs_exist_ok=True)
        found.append(merged("again", "cat", "--teachers", f"text={tmp_path / 'text'}")[name])
    assert not close(*found), "a merge does not resume"


# --------------------------------------------------------------------------------------------------------- whole plans
def rows_of_table(capsys):
    """The first column of the table of scores; a table by tag may follow."""
    shown = re.search(r"^model .*?(?=\n\n)", capsys.readouterr().out, re.M | re.S)[0]
    return [line.split("  ")[0] for line in shown.splitlines()]


def test_the_whole_pipeline_runs_from_nothing_and_a_second_call_trains_nothing(
    tmp_path, monkeypatch, small_pretraining, updates, capsys
):
    flags = [*SMALL, "--stage", "all", "--out", str(tmp_path), "--name", "all", "--steps", "2"]
    monkeypatch.setattr(page, "plot", lambda *_: "PLOT")
    assert train.main(flags) == 0
    shown = ["base", *(f"teacher {t}" for t in TASKS), "merged", "sft", "opd student"]
    assert rows_of_table(capsys) == ["model", *shown]
    for part in ["pretrain", *(f"grpo-{t}" for t in TASKS), "sft", "merge", "opd"]:
        folder = tmp_path / f"all-{part}"
        text = (folder / "report.html").read_text()
        assert ("PLOT" in text) == (part != "merge") and hub.last_checkpoint(folder)
        assert text.count("<img ") == 6 * 3 * (1 if part == "pretrain" else 2), "the base beside it"
    assert (tmp_path / "all/report.html").read_text().count("<img ") == len(shown) * 6 * 3, "pictures of every task"
    config = json.loads((tmp_path / "all-opd/config.json").read_text())
    assert config["init"] == str(tmp_path / "all-merge"), "distillation starts from the merged teachers"
    assert config["teachers"] == {t: str(tmp_path / f"all-grpo-{t}") for t in TASKS}
    assert config["model"] == str(tmp_path / "all-pretrain")
    assert len(updates) == 2 * 6, "seven stages, one of which does not train"
    results = (tmp_path / "all/results.json").read_text()
    assert train.main(flags) == 0
    assert len(updates) == 2 * 6 and (tmp_path / "all/results.json").read_text() == results, "from the same checkpoints"


def test_qs_pipeline_trains_its_own_teachers_and_distils_them(
    tmp_path, monkeypatch, small_pretraining, updates, spy, capsys
):
    """pretrain, a GRPO teacher for each task, OPD, the table: no cold start, a student that draws without guidance."""
    flags = command(SMALL2, "--stage", "all", "--out", str(tmp_path), "--name", "all", "--steps", "2")
    draws = spy(drawn, "draw_to")
    monkeypatch.setattr(page, "plot", lambda *_: "")
    assert train.main(flags) == 0
    assert rows_of_table(capsys) == ["model", "base", "teacher t2i", "teacher edit", "opd student"]
    parts = ["all", "all-grpo-edit", "all-grpo-t2i", "all-opd", "all-pretrain"]
    assert sorted(p.name for p in tmp_path.iterdir()) == parts and len(updates) == 2 * 4
    config = json.loads((tmp_path / "all-opd/config.json").read_text())
    assert config["teachers"] == {t: str(tmp_path / f"all-grpo-{t}") for t in QWEN_TASKS} and config["init"] == ""
    # Of the parts: the base of "both", teachers of Q 4.1's hybrid, the student of Q 4.3, the last three with the base
    # beside them; then the table's four.
    assert [call.args[4] for call in draws] == [2.0] + [2.0, 2.0] + [2.0, 2.0] + [2.0, 1.0] + [2.0, 2.0, 2.0, 1.0]


def test_the_whole_pipeline_on_sd35_merges_distils_and_compares(real, sd35, capsys):
    flags = ["--stage", "all", "--teachers", f"quality={sd35.lora}", "--rewards", "jpeg=1"]
    folder = real("all", *flags)
    assert rows_of_table(capsys) == ["model", "base", *(f"teacher {t}" for t in TASKS), "merged", "sft", "opd student"]
    assert json.loads((folder.parent / "all-opd/config.json").read_text())["init"] == str(folder.parent / "all-merge")
    parts = sorted(p.name for p in folder.parent.iterdir())
    assert parts == ["all", "all-merge", "all-opd", "all-sft"], "base and teachers are published"


# ------------------------------------------------------------------------------- every stage of every model, from disk
STAGES = {
    "tiny-qwen": {
        "grpo, mixed": "--stage grpo --task mix --micro-batch 3 --overlap",
        "nft, mixed": "--stage nft --task mix --parameters full --micro-batch 3",
        "sft": "--stage sft --batch-size 7 --micro-batch 2",
        "opd, all parameters": "--stage opd --parameters full --mar 0.1 --anchor edit",
    },
    "sd35": {
        "grpo, all parameters": "--stage grpo --task mix --rewards jpeg=1 --parameters full --updates 3",
        "sft": "--stage sft",
        "opd, path": "--stage opd --estimator path --anchor text",
        "opd, velocity": "--stage opd --estimator velocity --micro-batch 4",
        "opd, bfloat16": "--stage opd --precision bfloat16",
    },
    "qwen": {
        "grpo, edit": "--stage grpo --task edit --rewards jpeg=1 --guidance both --prompts edit=MIXED",
        "grpo, mixed": "--stage grpo --task mix --rewards jpeg=1 --source-resolution 32 --kernel cps",
        "nft, all parameters": "--stage nft --task mix --rewards jpeg=1 --parameters full",
        "sft": "--stage sft",
        "opd": "--stage opd --prompts-per-step 4 --prompts edit=MIXED --resolution 48x64",
    },
}
STAGES["qwen21"] = {name: flags.replace("48x64", "32x64") for name, flags in STAGES["qwen"].items()}


@pytest.mark.parametrize("model, stage", [(model, stage) for model, stages in STAGES.items() for stage in stages])
def test_every_stage_trains_every_model_with_teachers_of_every_kind(request, monkeypatch, updates, model, stage):
    """Qwen-Image-Edit's scorer gets all sources of each picture."""
    seen = []

    def like(images, prompts, sources):
        seen.extend(zip(prompts, sources, strict=True))
        return [float(1 - (image.mean() - some[0].mean()).abs()) for image, some in zip(images, sources, strict=True)]

    runs = {"tiny-qwen": "go2", "sd35": "real", "qwen": "real2", "qwen21": "real21"}
    run = request.getfixturevalue(runs[model])
    flags, edits = STAGES[model][stage], stage == "grpo, edit"
    if "MIXED" in flags:
        flags = flags.replace("MIXED", str(request.getfixturevalue(model).root / "mixed.jsonl"))
    flags = flags.split()
    if edits:
        panel = scoring.Panel([rewards.Scorer("like", like, 0.0, 1.0)], {"edit": {"like": 1.0}})
        monkeypatch.setattr(scoring, "build", lambda *_: panel)
    folder = run("run", *flags, "--steps", "2", "--lr", "0.01", "--eval-prompts", "0")
    checkpoint, whole = hub.last_checkpoint(folder), "full" in flags
    assert hub.kind(checkpoint) == ("full" if whole else "peft")
    assert {p.suffix for p in checkpoint.rglob("*") if p.is_file()} == {".safetensors", ".json", ".md", ""}
    if model != "tiny-qwen":
        assert (checkpoint / hub.LORA_FILE).exists() != whole, "in diffusers' layout too"
    assert len(updates) == 2 * (3 if "--updates" in flags else 1)
    assert all(flat(update.grads).norm() > 0 for update in updates)
    lines = metrics(folder)
    assert len(lines) == 2 and all(math.isfinite(value) for line in lines for value in line.values())
    assert weights(folder).dtype == torch.float32
    assert ("nft" in stage) == any(key.startswith("old.") for key in stored(folder)), "nft's old policy"
    if "grpo" in stage and "--updates" not in flags:
        assert (lines[0]["ratio_mean"], lines[0]["ratio_std"]) == (1.0, 0.0)
    assert bool(seen) == edits
    for prompt, found in seen:
        for source, image in zip(found, source_images(prompt), strict=True):
            assert torch.equal(source, torch.from_numpy(image.copy()).permute(2, 0, 1) / 255)
    assert not seen or len({len(found) for _, found in seen}) > 1


def test_what_is_exported_draws_in_the_stock_pipeline_what_eval_draws(real, sd35, stock, spy):
    import sde

    drawn = spy(rollout, "sampled")
    folder = real("run", "--lr", "0.05", "--steps", "2", "--eval-prompts", "2")

    def draw(part):
        noise = sde.standard_normal((len(part), 16, 8, 8), [row.generator() for row in part])
        return stock(
            [row.prompt.text for row in part], num_inference_steps=2, guidance_scale=4.5, height=64, width=64,
            latents=noise, max_sequence_length=16, output_type="latent",
        ).images  # fmt: skip

    assert len(drawn) == 2 * 2 and {call.args[3] for call in drawn} == {4.5}, "two parts of three rows"
    base, student = drawn[:2], drawn[2:]
    for before, after in zip(base, student):
        assert before.args[1] == after.args[1], "beside each other: the same prompts from the same noise"
        torch.testing.assert_close(draw(before.args[1]), before.result, rtol=0, atol=1e-5)
        assert not close(before.result, after.result, 1e-2)
    assert list(json.loads((folder / "results.json").read_text())) == ["base", "run"]
    stock.load_lora_weights(hub.last_checkpoint(folder))
    for call in student:
        torch.testing.assert_close(draw(call.args[1]), call.result, rtol=0, atol=1e-5)


def test_a_whole_student_is_exported_as_a_transformer_that_another_run_starts_from(real, updates):
    from diffusers import SD3Transformer2DModel

    folder = real("run", "--parameters", "full", "--lr", "0.01")
    assert list(json.loads((folder / "results.json").read_text())) == ["run"]
    assert "<p>The base is not beside" in (folder / "report.html").read_text(), "and nobody wonders where it is"
    exported = SD3Transformer2DModel.from_pretrained(hub.last_checkpoint(folder) / "transformer")
    average = {name: p.detach() for name, p in exported.named_parameters()}
    state = stored(folder)
    assert same(average, {name: state[f"average.{name}"] for name in average})
    assert not same(average, {name: state[f"weights.{name}"] for name in average})
    real("next", "--parameters", "full", "--init", str(folder))
    assert same(updates[1].weights, list(average.values())), "a full checkpoint as a cold start"
