"""Oracles for what a run needs: an optimizer step by hand, checkpoints that survive a fault at every file
operation, a stop in good order, and a mirror that says the same. The "model" is two tensors; whole stages are in
test_train.py, pictures and tables in test_report.py.
"""

import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
from importlib.machinery import ModuleSpec
from itertools import count
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import safetensors.torch
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import settings
from data.common import write_atomic
from harness import run as runtime
from harness import weights
from harness.run import Run
from models import flow
from models import load as models
from models import lora as adapters
from settings import SettingsError
from tests.conftest import same, stored

START = {"vector": [1.0, -2.0], "matrix": [[3.0, 0.5, -1.0]]}
GRADS = [  # three steps; the norm of the second is 13 and of the third 0.13: one is clipped at 1, one is not
    {"vector": [0.3, -0.4], "matrix": [[0.1, 0.2, 0.0]]},
    {"vector": [3.0, 4.0], "matrix": [[12.0, 0.0, 0.0]]},
    {"vector": [0.03, 0.0], "matrix": [[0.04, 0.0, 0.12]]},
]


class Pair:
    """Stands for a model with a student of its own: two trained tensors, of other shapes."""

    device, pipeline = torch.device("cpu"), ""

    def __init__(self):
        self.transformer = nn.Module()
        for name, values in START.items():
            self.transformer.register_parameter(name, nn.Parameter(torch.tensor(values)))

    def trainable(self):
        return dict(self.transformer.named_parameters())

    def save_full(self, folder, state):
        safetensors.torch.save_file(state, folder / "exported.safetensors")


@pytest.fixture
def toy(tmp_path):
    """Make a run of the two tensors: toy(steps=..., lr=..., ...)."""

    def make(**changes):
        plain = {
            "preset": "tiny", "name": "toy", "out": str(tmp_path), "parameters": "full", "steps": 3, "threads": 1,
            "save_every": 1, "lr": 0.1, "decay": False,
        }  # fmt: skip
        return Run(settings.resolve({**plain, **changes}), Pair())

    return make


def set_gradients(run, step):
    for name, p in run.weights.parameters.items():
        p.grad = torch.tensor(GRADS[step][name])


def train(run):
    """The three steps, one metric each; the gradient leans on the weights, so a lost state would show."""
    for step in run.steps("loss"):
        run.stop_if_asked()
        set_gradients(run, step % 3)
        for p in run.weights.parameters.values():
            p.grad += 0.1 * p.detach()
        run.log({"loss": 0.5 + step, "grad_norm": run.update()})


def flat(tensors):
    """{"vector": ..., "matrix": ...} as one array, the vector first."""
    return torch.cat([torch.as_tensor(tensors[name]).detach().flatten() for name in START]).double().numpy()


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------- one optimizer update
@pytest.mark.parametrize("decay", [False, True])
def test_update_is_clipped_adamw_with_warmup_and_cosine_by_hand(toy, decay):
    # AdamW in numpy float64: m, v with betas (0.9, 0.99), bias correction, decoupled weight decay wd = 0.5.
    # lr(s) = 0.1 * min(1, (s+1)/2) [* (1/2 + cos(pi s/3)/2)]: 0.05, 0.1, 0.1 and with the cosine x 1, 3/4, 1/4.
    run = toy(decay=decay, warmup=2, weight_decay=0.5, grad_norm=1.0)
    w, m, v = flat(run.weights.parameters), 0.0, 0.0
    for step, lr in enumerate([0.05, 0.1 * (0.75 if decay else 1), 0.1 * (0.25 if decay else 1)]):
        run.step = step
        set_gradients(run, step)
        g = flat(GRADS[step])
        length = math.sqrt((g**2).sum())
        assert run.update() == pytest.approx(length, rel=1e-5), "the norm returned is the one before clipping"
        g = g / max(1.0, length)
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        w = w * (1 - lr * 0.5)
        w = w - lr * (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.99 ** (step + 1))) + 1e-8)
        assert flat(run.weights.parameters) == pytest.approx(w, abs=2e-6)
        assert all(p.grad is None for p in run.weights.parameters.values()), "nothing is left"


def test_no_warmup_means_the_full_rate_at_once(toy):
    run = toy(warmup=0, weight_decay=0.0)
    set_gradients(run, 0)
    run.update()  # Adam's first step is lr * sign(g)
    assert flat(run.weights.parameters) == pytest.approx([0.9, -1.9, 2.9, 0.4, -1.0], abs=1e-6)


def test_the_average_follows_its_formula_by_hand(toy):
    # decay(s) = min(ema_decay, (1+s)/(10+s)): 1/10, 2/11, then 0.2 from s = 2 on where (3/12 > 0.2).
    run = toy(ema_decay=0.2)
    mean = flat(run.weights.average)
    assert mean == pytest.approx(flat(START)), "the average begins as the weights"
    for step, decay in enumerate([1 / 10, 2 / 11, 0.2]):
        run.step = step
        set_gradients(run, step)
        run.update()
        mean = decay * mean + (1 - decay) * flat(run.weights.parameters)
        assert flat(run.weights.average) == pytest.approx(mean, abs=1e-6)
        assert not np.allclose(mean, flat(run.weights.parameters), atol=1e-4)


def test_ema_every_skips_the_steps_between(toy):
    run = toy(ema_every=2)
    start = flat(run.weights.average)
    set_gradients(run, 0)
    run.update()
    assert (flat(run.weights.average) == start).all()
    run.step = 1
    set_gradients(run, 1)
    run.update()
    assert (flat(run.weights.average) != start).any()


def test_a_tensor_without_gradient_is_an_error_and_not_a_silent_no(toy):
    run = toy()
    run.weights.parameters["vector"].grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="1 of 2 trained tensors have no gradient"):
        run.update()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(toy, poison):
    run = toy()
    set_gradients(run, 0)
    run.weights.parameters["matrix"].grad[0, 2] = poison
    with pytest.raises(FloatingPointError, match="step 0: the gradient's norm is (nan|inf); lower --lr"):
        run.update()
    assert (flat(run.weights.parameters) == flat(START)).all() and (flat(run.weights.average) == flat(START)).all()


def test_muon_trains_the_matrices_of_a_new_bases_blocks_and_adamw_all_else():
    model = models.new_tiny(0, width=32, layers=1)
    s = settings.resolve({"preset": "tiny", "stage": "pretrain", "lr": 0.1, "weight_decay": 0.5})
    adamw, muon = weights.optimizers(model, s)
    names = {id(p): n for n, p in model.trainable().items()}
    assert isinstance(adamw, torch.optim.AdamW) and isinstance(muon, torch.optim.Muon)
    first, second = ({names[id(p)] for g in o.param_groups for p in g["params"]} for o in (adamw, muon))
    assert not first & second and len(first | second) == len(names), "each tensor in one of the two"
    block = "transformer.transformer_blocks.0.attn.to_q"
    assert f"{block}.weight" in second and f"{block}.bias" in first
    ends = {"text_encoder.word.weight", "transformer.proj_out.weight", "transformer.context_embedder.weight"}
    assert ends <= first, "embeddings and the way out"
    for group in (*adamw.param_groups, *muon.param_groups):
        assert (group["lr"], group["weight_decay"]) == (0.1, 0.5)
    model.add_adapter(flow.STUDENT, adapters.lora_config(4, 8.0))
    (adamw,) = weights.optimizers(model, settings.resolve({"preset": "tiny"}))
    assert isinstance(adamw, torch.optim.AdamW), "an adapter is AdamW's alone, as in the papers"
    assert len(adamw.param_groups[0]["params"]) == len(model.trainable()) > 0
    model = models.new_tiny(0, width=32, layers=1)
    model.train_fully()
    (adamw,) = weights.optimizers(model, settings.resolve({"preset": "tiny", "parameters": "full"}))
    assert isinstance(adamw, torch.optim.AdamW), "and so is a whole student outside pretraining"


def test_every_generator_has_its_own_purpose_and_repeats_on_every_rank(toy):
    def draw(run, *what):
        return tuple(torch.rand(2, generator=run.generator(*what)).tolist())

    run = toy()
    seen = [draw(run, "noise"), draw(run, "rollout"), draw(run, "rollout", 1)]
    run.step = 1
    seen.append(draw(run, "noise"))
    for other in ({"seed": 1}, {"stage": "sft"}, {"stage": "grpo", "task": "text"}):
        seen.append(draw(toy(**other, resume=False), "noise"))
    assert len(set(seen)) == len(seen), "seed, stage, task, step and purpose each give other numbers"
    run.step, run.rank = 0, 1
    assert draw(run, "noise") == seen[0], "a rank differs only where the purpose names it"
    state = torch.get_rng_state()
    assert draw(toy(resume=False), "noise") == seen[0], "and the same five give the same"
    assert torch.equal(state, torch.get_rng_state()), "PyTorch's own generator is left alone"


# -------------------------------------------------------------------------------------------- checkpoints
def test_checkpoints_come_at_multiples_of_save_every_and_at_the_end_and_old_ones_go(toy, tmp_path):
    run = toy(steps=7, save_every=3, keep=10)
    train(run)
    names = sorted(p.name for p in (tmp_path / "toy/checkpoints").iterdir())
    assert names == ["step-000003", "step-000006", "step-000007"]
    assert run.checkpoint == tmp_path / "toy/checkpoints/step-000007" == adapters.last_checkpoint(run.folder)
    train(toy(steps=9, save_every=1, keep=2))
    names = sorted(p.name for p in (tmp_path / "toy/checkpoints").iterdir())
    assert names == ["step-000008", "step-000009"], "the two newest are kept"


def test_a_checkpoint_exports_the_average_and_keeps_the_weights(toy):
    run = toy()
    train(run)
    state = stored(run.folder)
    expected = {f"weights.{n}": p.detach() for n, p in run.weights.parameters.items()}
    expected |= {f"average.{n}": a for n, a in run.weights.average.items()}
    moments = {f"{kind}.{n}" for kind in ("exp_avg", "exp_avg_sq") for n in START}
    assert state.keys() == {*expected, *moments, "step", "updates"}
    assert same({name: state[name] for name in expected}, expected) and state["step"] == 3
    assert same(safetensors.torch.load_file(run.checkpoint / "exported.safetensors"), run.weights.average)
    assert (flat(run.weights.parameters) != flat(run.weights.average)).all()
    assert "3 steps" in (run.checkpoint / "README.md").read_text(), "with a card"


def test_optimizers_go_on_from_the_updates_that_they_have_made(toy):
    train(toy(steps=2))
    run = toy()
    (optimizer,) = run.weights.optimizers
    assert [optimizer.state[p]["step"].item() for p in run.weights.parameters.values()] == [2.0, 2.0]
    assert run.step == 2 and all(p.grad is None for p in run.weights.parameters.values())
    assert all(optimizer.state[p]["exp_avg_sq"].min() > 0 for p in run.weights.parameters.values())


def test_a_checkpoint_is_safetensors_json_and_a_card_and_no_pickle(toy, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("a pickle")

    for owner, names in ((torch, ("save", "load")), (pickle, ("dump", "dumps", "load", "loads"))):
        for name in names:
            monkeypatch.setattr(owner, name, forbidden)
    run = toy()
    train(run)
    assert toy().step == 3, "nor is one read"
    files = sorted(p for p in run.checkpoint.rglob("*") if p.is_file())
    inside = {p.parent.name for p in files if p.suffix == ".safetensors"}
    assert {p.suffix for p in files} == {".safetensors", ".json", ".md"} and "training" in inside
    for file in files:
        if file.suffix == ".safetensors":
            content = file.read_bytes()
            json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        else:
            assert file.read_text().isprintable() or file.read_text().replace("\n", "").isprintable()


def test_the_own_weights_come_back_from_the_exported_ones_whatever_happens(toy):
    run = toy()
    train(run)
    own = {n: p.detach().clone() for n, p in run.weights.parameters.items()}
    with pytest.raises(ZeroDivisionError), run.exported():
        assert same({n: p.data for n, p in run.weights.parameters.items()}, run.weights.average)
        raise ZeroDivisionError
    assert same({n: p.data for n, p in run.weights.parameters.items()}, own)


def test_metrics_have_one_line_a_step_that_starts_at_one(toy, tmp_path):
    train(toy())
    lines = metrics(tmp_path / "toy")
    assert [line["step"] for line in lines] == [1, 2, 3] and [line["loss"] for line in lines] == [0.5, 1.5, 2.5]
    assert list((tmp_path / "toy").glob("events.out.tfevents*")), "and TensorBoard has them too"


def test_log_returns_the_means_over_ranks_and_leaves_out_what_is_nan(toy, monkeypatch):
    others = {"loss": 3.0, "mine": math.nan, "theirs": 0.25, "nobodys": math.nan}  # the other rank's

    def average_numbers(values):
        pairs = {key: [v for v in (value, others[key]) if v == v] for key, value in values.items()}
        return {key: sum(pair) / len(pair) if pair else math.nan for key, pair in pairs.items()}

    monkeypatch.setattr(runtime, "average_numbers", average_numbers)
    run, values = toy(), np.array([0.5, 0.5, 0.75])
    found = []
    for _ in run.steps("loss"):
        mine = {"loss": 1.0 + run.step, "mine": 2.0, "theirs": math.nan, "nobodys": math.nan}
        found.append(run.log(mine, {"rewards/a": values + run.step}))
    assert found[0] == {"loss": 2.0, "mine": 2.0, "theirs": 0.25} and found[2]["loss"] == 3.0
    assert metrics(run.folder) == [{"step": step, **line} for step, line in enumerate(found, 1)]
    events = EventAccumulator(str(run.folder), {"histograms": 0}).Reload()  # 0: all of them
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.0), (2, 2.5), (3, 3.0)]
    assert set(events.Tags()["scalars"]) == {"loss", "mine", "theirs"}
    third = [e.histogram_value for e in events.Histograms("rewards/a")][2]
    assert (third.num, third.min, third.max, third.sum) == (3, 2.5, 2.75, 7.75)


def test_the_history_of_a_metric_goes_back_beyond_a_resume_and_not_ahead_of_the_step(toy):
    run = toy(save_every=2)
    assert run.history("loss") == [], "nothing is written yet"
    train(run)
    assert run.history("loss") == [0.5, 1.5, 2.5] and run.history("no such") == []
    (run.checkpoint.parent / "step-000003").rename(run.checkpoint.parent / "gone")
    shutil.rmtree(run.checkpoint.parent / "gone")
    again = toy(save_every=2)
    assert again.step == 2 and again.history("loss") == [0.5, 1.5]
    again.step = 1
    assert again.history("loss") == [0.5], "of the steps that are done"


class Killed(BaseException):
    """Not an Exception: nothing may catch it, as nothing catches a kill."""


# Every operation on a file that a save performs, as (owner, function).
OPERATIONS = [(dcp, "save"), (safetensors.torch, "save_file"), (shutil, "rmtree"), (os, "fsync")]
OPERATIONS += [(Path, name) for name in ("mkdir", "open", "rename", "replace", "write_text")]


@pytest.fixture
def struck(monkeypatch):
    """struck(owner, name, when, work): run `work` until the k-th call of one operation ends it, for k = 1, 2, ...

    Yields after each end; it is over when `work` gets through.
    """

    def struck(owner, name, when, work):
        real = getattr(owner, name)
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

            try:
                with monkeypatch.context() as patch:
                    patch.setattr(owner, name, faulty)
                    work()
                return
            except (Killed, CheckpointException):  # DCP wraps whatever is raised inside it
                yield

    return struck


at_every_operation = [
    pytest.mark.parametrize("when", ["before", "after"]),
    pytest.mark.parametrize("owner, name", OPERATIONS, ids=[f"{o.__name__}.{name}" for o, name in OPERATIONS]),
]


@at_every_operation[0]
@at_every_operation[1]
def test_a_fault_at_any_file_operation_loses_at_most_the_step_in_hand(toy, tmp_path, struck, owner, name, when):
    train(toy(name="whole", steps=6))
    train(toy(steps=2))  # so that every attempt below resumes something
    stops = sum(1 for _ in struck(owner, name, when, lambda: train(toy(steps=6))))
    train(toy(steps=6))
    assert stops >= 2, "the fault hardly struck: the test would prove nothing"
    assert same(stored(tmp_path / "toy"), stored(tmp_path / "whole"))
    assert metrics(tmp_path / "toy") == metrics(tmp_path / "whole")
    assert not [p for p in (tmp_path / "toy/checkpoints").iterdir() if p.name.startswith(".")]


@at_every_operation[0]
@at_every_operation[1]
def test_a_checkpoint_written_over_an_existing_one_is_never_lost(toy, tmp_path, struck, owner, name, when):
    """It happens to a run that is stopped right after it was continued; there is no other to go back to."""
    train(toy(steps=3, keep=1))
    state, stops = stored(tmp_path / "toy"), 0
    for _ in struck(owner, name, when, toy(steps=3, keep=1).save):
        assert toy(steps=3, keep=1).step == 3 and same(stored(tmp_path / "toy"), state)
        stops += 1
    assert stops >= 1
    assert [p.name for p in (tmp_path / "toy/checkpoints").iterdir()] == ["step-000003"]


def test_a_half_written_checkpoint_is_neither_loaded_nor_kept(toy, tmp_path):
    train(toy(steps=2))
    half = tmp_path / "toy/checkpoints/.step-000003"
    half.mkdir()
    (half / "training.json").write_text("half")
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


def shard(checkpoint):
    (file,) = (checkpoint / "training").iterdir()
    return file


def cut(file):
    file.write_bytes(file.read_bytes()[:200])


def without(file, name):
    tensors = safetensors.torch.load_file(file)
    del tensors[name]
    safetensors.torch.save_file(tensors, file)


def halved(checkpoint, keep=(1, 2)):
    """The shard as two ranks would have written it: each the half of every tensor; only those in `keep`."""
    file = shard(checkpoint)
    tensors = safetensors.torch.load_file(file)
    file.unlink()
    halves = {n: [part.contiguous() for part in t.chunk(2, -1)] for n, t in tensors.items()}
    for rank in keep:
        offsets = {
            n: {"saved_offsets": [0] * (t.ndim - 1) + [(rank - 1) * halves[n][0].shape[-1]]} for n, t in tensors.items()
        }
        mine = {n: parts[rank - 1] for n, parts in halves.items()}
        path = file.with_name(f"shard-0000{rank}-model-00001-of-00001.safetensors")
        safetensors.torch.save_file(mine, path, metadata={"DCP_SHARDING_INFO": json.dumps(offsets)})


DAMAGES = {
    "a cut shard": (lambda c: cut(shard(c)), "Error|header|deserializ"),
    "a lost shard": (lambda c: shard(c).unlink(), "Missing key.*(vector|matrix)"),
    "the first of two shards lost": (lambda c: halved(c, keep=[2]), "a part of .*(vector|matrix) is missing"),
    "the second of two shards lost": (lambda c: halved(c, keep=[1]), "Size mismatch.*(vector|matrix)"),
    "no shards": (lambda c: shutil.rmtree(c / "training"), "training"),
    "a lost tensor": (lambda c: without(shard(c), "exp_avg.matrix"), "exp_avg.matrix"),
    "a cut JSON": (lambda c: (c / "training.json").write_text('{"step": 3, "upd'), "Unterminated string"),
    "a lost JSON": (lambda c: (c / "training.json").unlink(), "No such file.*training.json"),
    "a JSON without the updates": (lambda c: (c / "training.json").write_text('{"step": 3}'), "updates"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_one_line_that_names_it_and_says_what_to_do(toy, damage):
    run = toy(keep=5)
    train(run)
    strike, why = DAMAGES[damage]
    strike(run.checkpoint)
    with pytest.raises(adapters.ModelError, match=r"step-000003/training: cannot resume.*remove .*step-000003") as e:
        toy()
    assert "\n" not in str(e.value) and re.search(rf"\(.*{why}.*\)", str(e.value)), str(e.value)
    shutil.rmtree(run.checkpoint)
    assert toy().step == 2, "and the advice works"
    assert toy(resume=False).step == 0


def test_shards_of_several_ranks_are_read_by_one(toy):
    run = toy()
    train(run)
    state = {n: p.detach().clone() for n, p in run.weights.parameters.items()}
    halved(run.checkpoint)
    assert len(list((run.checkpoint / "training").iterdir())) == 2
    run = toy()
    assert same({n: p.detach() for n, p in run.weights.parameters.items()}, state) and run.step == 3


def test_a_name_belongs_to_one_set_of_settings(toy):
    train(toy(steps=1))
    with pytest.raises(SettingsError, match="made with --lr 0.1, not 0.2: give another --name, or --no-resume"):
        toy(lr=0.2)
    free = {
        "steps": 5,
        "save_every": 2,
        "keep": 1,
        "eval_prompts": 3,
        "eval_steps": 3,
        "micro_batch": 2,
        "timeout": 1.0,
    }
    assert toy(**free, prompts_per_step=6, device="cpu", gradient_checkpointing=True).step == 1, "these may change"
    fresh = toy(lr=0.2, resume=False)
    assert fresh.step == 0 and not list(fresh.folder.glob("checkpoints/*"))
    assert json.loads((fresh.folder / "config.json").read_text())["lr"] == 0.2


def test_write_atomic_leaves_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    file = tmp_path / "report.md"
    write_atomic(file, "old")

    def full_disk(self, text):
        with self.open("w") as half:
            half.write(text[:1])
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(Path, "write_text", full_disk)
        write_atomic(file, "new")
    assert file.read_text() == "old"
    write_atomic(file, "new")
    assert file.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["report.md"]


# ------------------------------------------------------------------------------------- a stop in good order
def interrupt():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_sigterm_saves_the_last_whole_step_and_nothing_is_lost(toy, tmp_path, monkeypatch, step, moment):
    train(toy(name="whole", save_every=10))
    run, before = toy(save_every=10), signal.getsignal(signal.SIGTERM)
    real = run.update

    def update():
        if moment == "before" and run.step == step:
            interrupt()
            run.stop_if_asked()
            pytest.fail("the step must not be finished")
        norm = real()
        if run.step == step:
            interrupt()
        return norm

    monkeypatch.setattr(run, "update", update)
    saved = step + (moment == "after")
    if saved == 3:
        train(run)  # the last step's end saves anyhow
    else:
        with pytest.raises(runtime.Stopped, match=f"toy: stopped by SIGTERM, .*step-00000{saved} saved; repeat"):
            train(run)
    assert signal.getsignal(signal.SIGTERM) == before, "outside the steps a process dies as it always did"
    assert [p.name for p in (tmp_path / "toy/checkpoints").iterdir()] == [f"step-00000{saved}"]
    again = toy(save_every=10)
    assert again.step == saved
    train(again)
    assert same(stored(tmp_path / "toy"), stored(tmp_path / "whole"))
    assert metrics(tmp_path / "toy") == metrics(tmp_path / "whole")


def test_every_rank_stops_where_one_was_asked_to(toy, monkeypatch):
    """Ranks are told at different moments, and would wait for each other for ever."""
    run, asked = toy(steps=5, save_every=10), []

    def any_rank(flag):
        asked.append(flag)
        return flag or len(asked) == 4  # the other rank has its signal before our third step

    monkeypatch.setattr(runtime, "any_rank", any_rank)
    with pytest.raises(runtime.Stopped, match="step-000001 saved"):
        train(run)
    assert asked == [False] * 4 and not run.asked_to_stop, "this rank had none"


def test_a_fault_of_any_rank_saves_the_last_whole_step_and_ends_each_with_its_own_message(toy, tmp_path, monkeypatch):
    def fail_at_two(run, fault):
        for step in run.steps("loss"):
            run.fail_together(fault if step == 2 else None, LookupError)
            set_gradients(run, step)
            run.log({"loss": 0.5, "grad_norm": run.update()})

    own = KeyError("mine")
    with pytest.raises(KeyError) as caught:
        fail_at_two(toy(steps=4, save_every=10), own)
    assert caught.value is own, "not a copy, and not another's"
    assert [p.name for p in (tmp_path / "toy/checkpoints").iterdir()] == ["step-000002"]
    asked = count(1)  # two questions a step: has anybody been stopped, has anybody failed?
    monkeypatch.setattr(runtime, "any_rank", lambda flag: flag or next(asked) == 6)
    with pytest.raises(LookupError, match="^another rank has failed; its message says why$"):
        fail_at_two(toy(name="other", steps=4, save_every=10), None)
    assert same(stored(tmp_path / "other"), stored(tmp_path / "toy")), "after as many steps"


# ------------------------------------------------------------------------------------------------ Weights & Biases
@pytest.fixture
def wandb(monkeypatch):
    """A module in wandb's place; its runs, each with its `init` arguments and its lines, `finished` or not."""
    runs = []

    class FakeRun:
        def __init__(self, **given):
            assert all(run.finished for run in runs), "the real init would hand out the run before"
            self.given, self.lines, self.finished = given, [], False
            runs.append(self)

        def log(self, values, step):
            self.lines.append((step, values))

        def finish(self):
            self.finished = True

    module = ModuleType("wandb")
    module.__spec__, module.init = ModuleSpec("wandb", None), FakeRun
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


def test_wandb_mirrors_every_line_and_a_continued_run_goes_on_there(toy, wandb):
    runtime.require_extra("wandb", "wandb", "--wandb")
    train(toy(steps=2, wandb=True))
    train(toy(steps=3, wandb=True))
    train(toy(name="other", steps=1, wandb=True))
    train(toy(name="silent", steps=1))
    first, second, other = wandb
    assert [run.given["name"] for run in wandb] == ["toy", "toy", "other"]
    assert first.given["id"] == second.given["id"] != other.given["id"]
    assert first.given["resume"] == "allow" and first.given["config"]["lr"] == 0.1
    lines = metrics(toy(steps=3).folder)
    assert [step for step, _ in first.lines + second.lines] == [1, 2, 3] == [line["step"] for line in lines]
    for (_, values), line in zip(first.lines + second.lines, lines, strict=True):
        assert values == pytest.approx({k: v for k, v in line.items() if k != "step"}, rel=1e-5)
    assert all(run.finished for run in wandb), "or the next stage's metrics would end up in this one"


def test_only_rank_zero_writes(toy, wandb, tmp_path):
    run = toy(wandb=True)
    run.rank, run.record = 1, None
    run.log({"loss": 1.0})
    assert not wandb and not (tmp_path / "toy/metrics.jsonl").exists()


def test_an_extra_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"^--wandb needs the extra 'wandb': pip install .*\[wandb\]'$"):
        runtime.require_extra("wandb", "wandb", "--wandb")


# ------------------------------------------------------------------------------- DiffusionNFT's old policy (Q Eq. 7)
NFT = {"stage": "nft", "task": "text"}


def test_the_old_policy_follows_the_student_by_its_own_schedule_and_not_by_the_averages(toy, monkeypatch):
    run, schedule = toy(**NFT, ema_decay=0.9), [0.0, 0.5, 0.25]
    monkeypatch.setattr(weights.nft, "old_policy_decay", lambda step: schedule[step])
    old = flat(run.weights.old)
    assert (old == flat(START)).all()
    assert not toy(name="grpo", stage="grpo", task="text").weights.old, "of no other stage"
    for step, decay in enumerate(schedule):
        run.step = step
        set_gradients(run, step)
        run.update()
        old = decay * old + (1 - decay) * flat(run.weights.parameters)
        assert flat(run.weights.old) == pytest.approx(old, abs=1e-6)
    for other in (run.weights.parameters, run.weights.average):
        assert not np.allclose(old, flat(other), atol=1e-3)


def test_the_old_policy_is_inside_its_context_and_nowhere_else(toy):
    run = toy(**NFT)
    now = flat(run.weights.parameters)
    for value in run.weights.old.values():
        value += 1
    with pytest.raises(KeyError), run.old_policy():
        assert (flat(run.weights.parameters) == now + 1).all()
        raise KeyError
    assert (flat(run.weights.parameters) == now).all() and (flat(run.weights.old) == now + 1).all()


def test_a_run_with_an_old_policy_is_resumed_with_it(toy, tmp_path):
    train(toy(**NFT, name="whole", steps=5, save_every=2))
    train(toy(**NFT, steps=2, save_every=2))
    state = stored(tmp_path / "toy")
    assert {"old.vector", "old.matrix"} <= set(state)
    assert not torch.equal(state["old.matrix"], state["weights.matrix"])
    run = toy(**NFT, steps=5, save_every=2)
    assert all(torch.equal(value, state[f"old.{name}"]) for name, value in run.weights.old.items())
    train(run)
    assert same(stored(tmp_path / "toy"), stored(tmp_path / "whole"))
    without(shard(run.checkpoint), "old.matrix")
    with pytest.raises(adapters.ModelError, match=r"cannot resume.*old\.matrix"):
        toy(**NFT, steps=5, save_every=2)
