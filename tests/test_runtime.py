"""Oracles for what a run needs: an optimizer step by hand, checkpoints that survive a fault at every file
operation, and pictures that can be read. The "model" is two tensors; whole stages are in test_train.py.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import same
from PIL import Image, ImageFont
from torch import nn

import models
import runtime
from runtime import Run
from settings import Settings, SettingsError

START = [[1.0, -2.0], [[3.0, 0.5, -1.0]]]
GRADS = [  # three steps; the norm of the second is 13 and of the third 0.13: one is clipped at 1, one is not
    [[0.3, -0.4], [[0.1, 0.2, 0.0]]],
    [[3.0, 4.0], [[12.0, 0.0, 0.0]]],
    [[0.03, 0.0], [[0.04, 0.0, 0.12]]],
]


class Pair:
    """Stands for a model with a student on it: two trained tensors, of other shapes."""

    adapters = {models.STUDENT: None}

    def __init__(self):
        self.tensors = [nn.Parameter(torch.tensor(values)) for values in START]

    def trainable(self):
        return self.tensors


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Make a run of the two tensors: toy(steps=..., lr=..., ...)."""

    def save(model, folder):
        torch.save([p.detach().clone() for p in model.tensors], folder / "exported.pt")

    def make(**changes):
        plain = {"name": "toy", "out": str(tmp_path), "steps": 3, "threads": 1, "save_every": 1, "lr": 0.1}
        return Run(Settings(**{**plain, **changes}), Pair())

    monkeypatch.setattr(models, "save_tiny", save)
    return make


def set_gradients(run, step):
    for p, g in zip(run.parameters, GRADS[step], strict=True):
        p.grad = torch.tensor(g)


def train(run):
    """The three steps, one metric each; the gradient leans on the weights, so a lost state would show."""
    for step in run.steps("loss"):
        for p, g in zip(run.parameters, GRADS[step % 3], strict=True):
            p.grad = torch.tensor(g) + 0.1 * p.detach()
        run.log({"loss": 0.5 + step, "grad_norm": run.update()})


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors]).double().numpy()


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------- one optimizer update
@pytest.mark.parametrize("decay", [False, True])
def test_update_is_clipped_adamw_with_warmup_and_cosine_by_hand(toy, decay):
    # AdamW in numpy float64: m, v with betas (0.9, 0.99), bias correction, decoupled weight decay wd = 0.5.
    # lr(s) = 0.1 * min(1, (s+1)/2) [* (1/2 + cos(pi s/3)/2)]: 0.05, 0.1, 0.1 and with the cosine x 1, 3/4, 1/4.
    run = toy(decay=decay, warmup=2, weight_decay=0.5, grad_norm=1.0)
    w, m, v = flat(run.parameters), 0.0, 0.0
    for step, lr in enumerate([0.05, 0.1 * (0.75 if decay else 1), 0.1 * (0.25 if decay else 1)]):
        run.step = step
        set_gradients(run, step)
        g = flat([torch.tensor(x) for x in GRADS[step]])
        length = math.sqrt((g**2).sum())
        assert run.update() == pytest.approx(length, rel=1e-5), "the norm returned is the one before clipping"
        g = g / max(1.0, length)
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        w = w * (1 - lr * 0.5)
        w = w - lr * (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.99 ** (step + 1))) + 1e-8)
        assert flat(run.parameters) == pytest.approx(w, abs=2e-6)
        assert all(p.grad is None for p in run.parameters), "nothing is left for the next step to add to"


def test_no_warmup_means_the_full_rate_at_once(toy):
    run = toy(warmup=0, weight_decay=0.0)
    set_gradients(run, 0)
    run.update()  # Adam's first step is lr * sign(g)
    assert flat(run.parameters) == pytest.approx([0.9, -1.9, 2.9, 0.4, -1.0], abs=1e-6)


def test_the_average_follows_its_formula_by_hand(toy):
    # decay(s) = min(ema_decay, (1+s)/(10+s)): 1/10, 2/11, then 0.2 from s = 2 on where (3/12 > 0.2).
    run = toy(ema_decay=0.2)
    mean = flat(run.average)
    assert mean == pytest.approx(flat(Pair().tensors)), "the average begins as the weights"
    for step, decay in enumerate([1 / 10, 2 / 11, 0.2]):
        run.step = step
        set_gradients(run, step)
        run.update()
        mean = decay * mean + (1 - decay) * flat(run.parameters)
        assert flat(run.average) == pytest.approx(mean, abs=1e-6)
        assert not np.allclose(mean, flat(run.parameters), atol=1e-4)


def test_ema_every_skips_the_steps_between(toy):
    run = toy(ema_every=2)
    start = flat(run.average)
    set_gradients(run, 0)
    run.update()
    assert (flat(run.average) == start).all()
    run.step = 1
    set_gradients(run, 1)
    run.update()
    assert (flat(run.average) != start).any()


def test_a_tensor_without_gradient_is_an_error_and_not_a_silent_no(toy):
    run = toy()
    run.parameters[0].grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="1 of 2 trained tensors have no gradient"):
        run.update()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(toy, poison):
    run = toy()
    set_gradients(run, 0)
    run.parameters[1].grad[0, 2] = poison
    with pytest.raises(FloatingPointError, match="step 0: the gradient's norm is nan|inf; lower --lr"):
        run.update()
    assert same(run.parameters, Pair().tensors) and same(run.average, [p.data for p in Pair().tensors])


def test_muon_trains_the_matrices_of_a_new_bases_blocks_and_adamw_all_else():
    model = models.new_tiny(0, width=32, layers=1)
    adamw, muon = runtime.optimizers(model, Settings(lr=0.1, weight_decay=0.5))
    names = {id(p): n for n, p in [*model.transformer.named_parameters(), *model.text_encoder.named_parameters()]}
    assert isinstance(adamw, torch.optim.AdamW) and isinstance(muon, torch.optim.Muon)
    first, second = ({names[id(p)] for g in o.param_groups for p in g["params"]} for o in (adamw, muon))
    assert not first & second and len(first | second) == len(names), "each tensor in one of the two"
    assert "transformer_blocks.0.attn.to_q.weight" in second and "transformer_blocks.0.attn.to_q.bias" in first
    assert {"word.weight", "proj_out.weight", "context_embedder.weight"} <= first, "embeddings and the way out"
    for group in (*adamw.param_groups, *muon.param_groups):
        assert (group["lr"], group["weight_decay"]) == (0.1, 0.5)
    model.add_adapter(models.STUDENT, models.lora_config(4, 8.0))
    (adamw,) = runtime.optimizers(model, Settings())
    assert isinstance(adamw, torch.optim.AdamW), "an adapter is AdamW's alone, as in the papers"
    assert len(adamw.param_groups[0]["params"]) == len(model.trainable())


def test_one_process_averages_with_nobody(toy):
    tensors = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])]
    runtime.average(tensors)
    runtime.average([])
    assert same(tensors, [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])])
    assert runtime.average_numbers({"a": 0.1, "b": 3.0}) == {"a": 0.1, "b": 3.0}, "float64: 0.1 stays 0.1"
    assert runtime.start(1) == (0, 1)


def test_every_generator_has_its_own_purpose_and_repeats(toy):
    def draw(run, *what):
        return tuple(torch.rand(2, generator=run.generator(*what)).tolist())

    run = toy()
    seen = [draw(run, "noise"), draw(run, "rollout"), draw(run, "rollout", 1)]
    run.step = 1
    seen.append(draw(run, "noise"))
    run.step, run.rank = 0, 1
    seen.append(draw(run, "noise"))
    for other in ({"seed": 1}, {"stage": "sft"}, {"stage": "grpo", "task": "text"}):
        seen.append(draw(toy(**other, resume=False), "noise"))
    assert len(set(seen)) == len(seen), "seed, stage, task, step, rank and purpose each give other numbers"
    state = torch.get_rng_state()
    assert draw(toy(resume=False), "noise") == seen[0], "and the same six give the same"
    assert torch.equal(state, torch.get_rng_state()), "PyTorch's own generator is left alone"


# -------------------------------------------------------------------------------------------- checkpoints
def test_checkpoints_come_at_multiples_of_save_every_and_at_the_end_and_old_ones_go(toy, tmp_path):
    run = toy(steps=7, save_every=3, keep=10)
    train(run)
    names = sorted(p.name for p in (tmp_path / "toy/checkpoints").iterdir())
    assert names == ["step-000003", "step-000006", "step-000007"]
    assert run.checkpoint == tmp_path / "toy/checkpoints/step-000007" == runtime.last_checkpoint(run.folder)
    train(toy(steps=9, save_every=1, keep=2))
    names = sorted(p.name for p in (tmp_path / "toy/checkpoints").iterdir())
    assert names == ["step-000008", "step-000009"], "the two newest are kept"


def test_a_checkpoint_exports_the_average_and_keeps_the_weights(toy):
    run = toy()
    train(run)
    state = torch.load(run.checkpoint / "training.pt", weights_only=True)
    assert state["step"] == 3
    assert same(state["weights"], [p.data for p in run.parameters]) and same(state["average"], run.average)
    assert same(torch.load(run.checkpoint / "exported.pt"), run.average)
    assert not same(state["weights"], state["average"])


def test_the_own_weights_come_back_from_the_exported_ones_whatever_happens(toy):
    run = toy()
    train(run)
    own = [p.detach().clone() for p in run.parameters]
    with pytest.raises(ZeroDivisionError), run.exported():
        assert same([p.data for p in run.parameters], run.average)
        raise ZeroDivisionError
    assert same([p.data for p in run.parameters], own)


def test_metrics_have_one_line_a_step_that_starts_at_one(toy, tmp_path):
    train(toy())
    lines = metrics(tmp_path / "toy")
    assert [line["step"] for line in lines] == [1, 2, 3] and [line["loss"] for line in lines] == [0.5, 1.5, 2.5]
    assert list((tmp_path / "toy").glob("events.out.tfevents*")), "and TensorBoard has them too"


class Killed(BaseException):
    """Not an Exception: nothing may catch it, as nothing catches a kill."""


# Every operation on a file that a save performs, as (owner, function).
OPERATIONS = [(torch, "save"), (shutil, "rmtree")]
OPERATIONS += [(Path, name) for name in ("mkdir", "rename", "replace", "write_text")]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("owner, name", OPERATIONS, ids=[name for _, name in OPERATIONS])
def test_a_fault_at_any_file_operation_loses_at_most_the_step_in_hand(toy, tmp_path, monkeypatch, owner, name, when):
    """Stop the run at the k-th call of one operation, for every k until it gets through, and resume each time."""
    train(toy(name="whole", steps=6))
    whole = torch.load(tmp_path / "whole/checkpoints/step-000006/training.pt")
    train(toy(steps=2))  # so that every attempt below resumes something
    real, stops = getattr(owner, name), 0
    for allowed in range(60):
        calls = iter(range(allowed))

        def faulty(*args, calls=calls, **kwargs):
            alive = next(calls, None) is not None
            if not alive and when == "before":
                raise Killed
            result = real(*args, **kwargs)
            if not alive:
                raise Killed
            return result

        monkeypatch.setattr(owner, name, faulty)
        try:
            train(toy(steps=6))
            break
        except Killed:
            stops += 1
        finally:
            monkeypatch.setattr(owner, name, real)
    train(toy(steps=6))
    assert stops >= 2, "the fault hardly struck: the test would prove nothing"
    assert same(torch.load(tmp_path / "toy/checkpoints/step-000006/training.pt"), whole)
    assert metrics(tmp_path / "toy") == metrics(tmp_path / "whole")
    assert not [p for p in (tmp_path / "toy/checkpoints").iterdir() if p.name.startswith(".")]


def test_a_half_written_checkpoint_is_neither_loaded_nor_kept(toy, tmp_path):
    train(toy(steps=2))
    half = tmp_path / "toy/checkpoints/.step-000003"
    half.mkdir()
    (half / "training.pt").write_bytes(b"half")
    run = toy()
    assert run.step == 2 and not half.exists()


def test_lines_written_after_the_last_checkpoint_are_not_counted_twice(toy, tmp_path):
    train(toy(steps=2, save_every=2))
    with (tmp_path / "toy/metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 99.0}\n{"step": 4, "lo')  # one step too far, and a line cut by the kill
    train(toy(steps=3, save_every=2))
    assert [(line["step"], line["loss"]) for line in metrics(tmp_path / "toy")] == [(1, 0.5), (2, 1.5), (3, 2.5)]


def test_metrics_of_a_run_that_never_saved_are_dropped(toy, tmp_path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy/metrics.jsonl").write_text('{"step": 1, "loss": 99.0}\n')
    train(toy(steps=1))
    assert [line["loss"] for line in metrics(tmp_path / "toy")] == [0.5]


def test_an_unreadable_checkpoint_says_what_to_do(toy):
    run = toy(keep=5)
    train(run)
    file = run.checkpoint / "training.pt"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(models.ModelError, match=r"step-000003/training.pt: cannot resume.*remove .*step-000003") as e:
        toy()
    assert "\n" not in str(e.value)
    shutil.rmtree(run.checkpoint)
    assert toy().step == 2, "and the advice works"
    assert toy(resume=False).step == 0


def test_a_name_belongs_to_one_set_of_settings(toy):
    train(toy(steps=1))
    with pytest.raises(SettingsError, match="made with --lr 0.1, not 0.2: give another --name, or --no-resume"):
        toy(lr=0.2)
    assert toy(steps=5, save_every=2, keep=1, eval_prompts=3, eval_steps=3).step == 1, "these may change"
    fresh = toy(lr=0.2, resume=False)
    assert fresh.step == 0 and not list(fresh.folder.glob("checkpoints/*"))
    assert json.loads((fresh.folder / "config.json").read_text())["lr"] == 0.2


def test_a_run_folder_stands_for_its_last_checkpoint_and_any_other_path_for_itself(toy, tmp_path):
    run = toy()
    assert runtime.last_checkpoint(run.folder) is None
    train(run)
    assert runtime.adapter_folder(str(run.folder)) == run.checkpoint
    assert runtime.adapter_folder(str(tmp_path / "elsewhere")) == tmp_path / "elsewhere"


def test_write_atomic_leaves_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    file = tmp_path / "report.md"
    runtime.write_atomic(file, "old")

    def full_disk(self, text):
        with self.open("w") as half:
            half.write(text[:1])
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(Path, "write_text", full_disk)
        runtime.write_atomic(file, "new")
    assert file.read_text() == "old"
    runtime.write_atomic(file, "new")
    assert file.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["report.md"]


# ------------------------------------------------------------------------------------------------- pictures
def test_a_grid_has_the_size_and_the_pixels_that_its_images_ask_for(tmp_path):
    # 5 images of 24 px in rows of 3 at zoom 2: 3 * (48+8) + 8 = 176 wide, 2 * (48 + 4*13 + 10) + 8 = 228 high.
    images = torch.zeros(5, 3, 24, 24)
    images[:, 0] = torch.linspace(0, 1, 5)[:, None, None]  # redder and redder
    images[4, 1, 0, 23] = 1.0  # a mark in the last one's upper right corner
    file = tmp_path / "samples/grid.png"
    runtime.save_grid(file, images, ["a caption"] * 5, columns=3, zoom=2)
    sheet = Image.open(file).convert("RGB")
    assert sheet.size == (176, 228)
    for i, red in enumerate([0, 64, 128, 191, 255]):
        x, y = 8 + i % 3 * 56, 8 + i // 3 * 110
        assert sheet.getpixel((x + 24, y + 24)) == (red, 0, 0)
    assert sheet.getpixel((8 + 56 + 47, 8 + 110)) == (255, 255, 0), "neither turned nor mirrored, and zoomed"
    caption = np.asarray(sheet)[8 + 48 + 2 : 8 + 48 + 15, 8:56]
    assert (caption < 100).any(), "the caption stands below its picture"
    runtime.save_grid(file, images[:1], ["default"])
    assert Image.open(file).size == (8 * 128 + 8, 120 + 52 + 10 + 8), "by default eight a row, five times as large"
    with pytest.raises(ValueError, match="zip"):
        runtime.save_grid(file, images, ["one"])


def test_wrap_keeps_words_and_line_breaks_and_fits_the_width():
    font = ImageFont.load_default(size=11)
    text = "a photo of a red circle and a blue square\n0.75"
    lines = runtime.wrap(text, 100, font)
    assert " ".join(lines) == text.replace("\n", " ") and lines[-1] == "0.75" and len(lines) > 2
    assert all(font.getlength(line) <= 100 for line in lines)
    width = font.getlength(lines[0])
    assert runtime.wrap(text, width, font)[0] == lines[0], "a line that just fits stays whole"
    assert runtime.wrap("extraordinarily wide", 1, font) == ["extraordinarily", "wide"]
    assert runtime.wrap("", 100, font) == [""]


def test_curves_are_drawn_from_two_steps_on(tmp_path):
    (tmp_path / "samples").mkdir()
    assert runtime.plot_metrics(tmp_path) == []
    lines = [json.dumps({"step": s, "seconds": 1.0, "loss": 1 / s, "reward": s}) + "\n" for s in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text(lines[0])
    assert runtime.plot_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert runtime.plot_metrics(tmp_path) == [tmp_path / "samples/curves.png"]
    assert Image.open(tmp_path / "samples/curves.png").size == (1080, 234)
