"""Oracles for what a run needs: an optimizer update by hand, checkpoints that survive a kill before every write, a stop
in good order, and a mirror that says the same. The "model" is two tensors; whole stages are in tests/pipeline.
"""

import math
import os
import pickle
import signal
import sys
import traceback
from importlib.machinery import ModuleSpec
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint.api import CheckpointException

from harness import cli, weights
from harness import run as runtime
from harness.ranks import lost_others
from harness.run import Run
from models import hub
from models.experts import STUDENT
from models.lora import lora_config
from models.tiny import new_tiny
from tests.helpers.runs import metrics, same, stored
from tests.helpers.toy import GRADS, NFT, START, flat, set_gradients, toy_in, train


@pytest.fixture
def toy(tmp_path):
    """toy(steps=..., lr=..., ...): a run in this test's folder."""
    return lambda **changes: toy_in(tmp_path, **changes)


def checkpoints(run):
    return sorted(p.name for p in (run.folder / "checkpoints").iterdir())


# ------------------------------------------------------------------------------------- one optimizer update
@pytest.mark.parametrize(
    "decay, warmup, every, updates", [(False, 2, 1, 1), (True, 2, 1, 1), (False, 0, 2, 2), (False, 0, 5, 1)]
)
def test_an_update_by_hand(toy, monkeypatch, decay, warmup, every, updates):
    # AdamW in numpy float64: m, v with betas (0.9, 0.99), bias correction, decoupled weight decay 0.5, clipped at 1.
    # lr(s) = 0.1 * min(1, (s+1)/warmup) [* (1/2 + cos(pi s/3)/2)] of step s, of which each has `updates`.
    # EMA after n updates: decay = min(0.2, n/(9+n)) = 1/10, 2/11, 0.2, at every `every`-th *update* and in the last
    # step.
    # The old policy: its own decay, once after the last update of a step; between them it does not move.
    run = toy(**NFT, decay=decay, warmup=warmup, weight_decay=0.5, ema_decay=0.2, ema_every=every)
    schedule = [0.6, 0.5, 0.25]
    monkeypatch.setattr(weights.nft, "old_policy_decay", lambda step: schedule[step])
    w, m, v = flat(run.weights.parameters), 0.0, 0.0
    mean, old = w, w
    assert (flat(run.weights.average) == w).all() and (flat(run.weights.old) == w).all()
    for n in (1, 2, 3):
        run.step = step = (n - 1) // updates
        lr = 0.1 * (min(1, (step + 1) / warmup) if warmup else 1) * ([1, 0.75, 0.25][step] if decay else 1)
        set_gradients(run, n - 1)
        g = flat(GRADS[n - 1])
        length = math.sqrt((g**2).sum())
        assert run.update() == pytest.approx(length, rel=1e-5), "the norm returned is the one before clipping"
        g = g / max(1.0, length)
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        w = w * (1 - lr * 0.5)
        w = w - lr * (m / (1 - 0.9**n)) / (np.sqrt(v / (1 - 0.99**n)) + 1e-8)
        if n % every == 0 or step == 2:
            follow = [1 / 10, 2 / 11, 0.2][n - 1]
            mean = follow * mean + (1 - follow) * w
        if n % updates == 0:
            run.follow()
            old = schedule[step] * old + (1 - schedule[step]) * w
        for found, expected in ((run.weights.parameters, w), (run.weights.average, mean), (run.weights.old, old)):
            assert flat(found) == pytest.approx(expected, abs=2e-6)
        assert all(p.grad is None for p in run.weights.parameters.values()), "nothing is left for the next step"
    assert not np.allclose(mean, w, atol=1e-4) and not np.allclose(old, w, atol=1e-3)


def test_a_tensor_without_gradient_is_an_error(toy):
    run = toy()
    run.weights.parameters["vector"].grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="1 of 2"):
        run.update()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(toy, poison):
    run = toy()
    set_gradients(run, 0)
    run.weights.parameters["matrix"].grad[0, 2] = poison
    with pytest.raises(FloatingPointError):
        run.update()
    assert (flat(run.weights.parameters) == flat(START)).all() and (flat(run.weights.average) == flat(START)).all()


def test_muon_trains_the_matrices_of_a_new_bases_blocks_and_adamw_all_else():
    def optimizers(prepare, **changes):
        model = new_tiny(0, width=32, layers=1)
        prepare(model)
        found = weights.optimizers(model, cli.resolve({"preset": "tiny", "lr": 0.1, **changes}))
        names = {id(p): n for n, p in model.trainable().items()}
        return names, {type(o): {names[id(p)] for g in o.param_groups for p in g["params"]} for o in found}

    names, found = optimizers(lambda model: None, stage="pretrain")
    adamw, muon = found[torch.optim.AdamW], found[torch.optim.Muon]
    assert not adamw & muon and adamw | muon == set(names.values()), "each tensor in one of the two"
    block = "transformer.transformer_blocks.0.attn.to_q"
    assert f"{block}.weight" in muon and f"{block}.bias" in adamw
    ends = {"text_encoder.word.weight", "transformer.proj_out.weight", "transformer.context_embedder.weight"}
    assert ends <= adamw, "embeddings and the way out"
    lora = lora_config(4, 8.0)
    for prepare in (lambda model: model.add_adapter(STUDENT, lora), lambda model: model.train_fully()):
        names, found = optimizers(prepare)
        assert found == {torch.optim.AdamW: set(names.values())}, "other stages have AdamW alone, as in the papers"


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
    state = torch.get_rng_state()
    assert draw(run, "noise") == seen[0], "a rank differs only where the purpose names it"
    assert torch.equal(state, torch.get_rng_state()), "PyTorch's own generator is left alone"


# -------------------------------------------------------------------------------------------- checkpoints
def test_checkpoints_come_at_multiples_of_save_every_and_at_the_end_and_old_ones_go(toy):
    run = toy(steps=7, save_every=3, keep=10)
    train(run)
    assert checkpoints(run) == ["step-000003", "step-000006", "step-000007"]
    assert run.checkpoint == hub.last_checkpoint(run.folder)
    train(run := toy(steps=9, save_every=1, keep=2))
    assert checkpoints(run) == ["step-000008", "step-000009"], "the two newest are kept"


def test_a_checkpoint_exports_the_average_and_keeps_all_state_without_a_pickle(toy, monkeypatch):
    for owner, names in ((torch, ("save", "load")), (pickle, ("dump", "dumps", "load", "loads"))):
        for name in names:
            monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("a pickle"))
    run = toy(**NFT)
    train(run)
    state, w = stored(run.folder), run.weights
    expected = {f"weights.{n}": p.detach() for n, p in w.parameters.items()}
    expected |= {f"average.{n}": a for n, a in w.average.items()} | {f"old.{n}": o for n, o in w.old.items()}
    moments = {f"{kind}.{n}" for kind in ("exp_avg", "exp_avg_sq") for n in START}
    assert state.keys() == {*expected, *moments, "step", "updates"} and state["step"] == 3
    assert same({name: state[name] for name in expected}, expected)
    assert same(safetensors.torch.load_file(run.checkpoint / "exported.safetensors"), w.average)
    assert (flat(w.parameters) != flat(w.average)).all() and (flat(w.parameters) != flat(w.old)).all()
    assert {p.suffix for p in run.checkpoint.rglob("*") if p.is_file()} == {".safetensors", ".json", ".md", ""}
    again = toy(**NFT)
    (optimizer,) = again.weights.optimizers
    assert [optimizer.state[p]["step"].item() for p in again.weights.parameters.values()] == [3.0, 3.0]
    assert again.step == 3 and all(p.grad is None for p in again.weights.parameters.values())
    assert same(again.weights.state(), w.state())
    assert not toy(stage="opd", resume=False).weights.old, "only nft has an old policy"


@pytest.mark.parametrize("kind", ["exported", "old_policy"])
def test_the_own_weights_come_back_from_the_averaged_ones_whatever_happens(toy, kind):
    run = toy(**NFT)
    values = run.weights.average if kind == "exported" else run.weights.old
    for value in values.values():
        value += 1
    with pytest.raises(ZeroDivisionError), getattr(run, kind)():
        assert (flat(run.weights.parameters) == flat(START) + 1).all()
        raise ZeroDivisionError
    assert (flat(run.weights.parameters) == flat(START)).all() and (flat(values) == flat(START) + 1).all()


def test_log_returns_the_means_over_ranks_and_leaves_out_what_is_nan(toy, monkeypatch):
    others = {"loss": 3.0, "mine": math.nan, "theirs": 0.25, "nobodys": math.nan}  # the other rank's

    def average_numbers(values):
        pairs = {key: [v for v in (value, others[key]) if v == v] for key, value in values.items()}
        return {key: sum(pair) / len(pair) if pair else math.nan for key, pair in pairs.items()}

    monkeypatch.setattr(runtime, "average_numbers", average_numbers)
    run, values, found = toy(), np.array([0.5, 0.5, 0.75]), []
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


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_time_out_while_resuming_is_no_fault_of_the_checkpoint(toy, monkeypatch, wrapped):
    train(toy(steps=1))
    fault = late = RuntimeError("Timed out waiting 60000ms for recv operation to complete")
    if wrapped:
        fault = CheckpointException("on rank 1", {1: (late, traceback.extract_stack())})
    monkeypatch.setattr(dcp, "load", mock.Mock(side_effect=fault))
    with pytest.raises(type(fault)) as e:
        toy(steps=2)
    assert lost_others(e.value)


# ------------------------------------------------------------------------------------- a stop in good order
@pytest.fixture
def in_a_terminal():
    """The signals as a shell hands them to what it starts in the foreground; nohup and & ignore some."""
    hands = {sign: signal.default_int_handler if sign == signal.SIGINT else signal.SIG_DFL for sign in runtime.SIGNALS}
    before = {sign: signal.signal(sign, hand) for sign, hand in hands.items()}
    yield
    for sign, hand in before.items():
        signal.signal(sign, hand)


@pytest.mark.usefixtures("in_a_terminal")
@pytest.mark.parametrize("sign", runtime.SIGNALS)
@pytest.mark.parametrize(("step", "moment"), [(0, "before"), (0, "after"), (2, "before"), (2, "after")])
def test_a_signal_saves_the_last_whole_step_and_nothing_is_lost(toy, monkeypatch, step, moment, sign):
    train(whole := toy(name="whole", save_every=10))
    run, before, real = toy(save_every=10), signal.getsignal(sign), Run.update

    def update(run):
        if moment == "before" and run.step == step:
            os.kill(os.getpid(), sign)
            run.stop_if_asked()
            pytest.fail("the step must not be finished")
        norm = real(run)
        if run.step == step:
            os.kill(os.getpid(), sign)
        return norm

    saved = step + (moment == "after")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "update", update)
        if saved == 3:
            train(run)  # the last step's end saves anyhow
        else:
            with pytest.raises(runtime.Stopped, match=f"step-00000{saved} saved") as stop:
                train(run)
            assert stop.value.code == (130 if sign == signal.SIGINT else 0)
    assert signal.getsignal(sign) == before, "outside the steps a process dies as it always did"
    assert checkpoints(run) == [f"step-00000{saved}"]
    train(toy(save_every=10))
    assert same(stored(run.folder), stored(whole.folder)) and metrics(run.folder) == metrics(whole.folder)


@pytest.mark.usefixtures("in_a_terminal")
def test_a_second_ctrl_c_does_not_wait_and_what_nohup_ignores_stays_ignored(toy):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt):
            for _ in toy().steps("loss"):
                os.kill(os.getpid(), signal.SIGHUP)
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_step_that_is_done_again_stands_once_in_tensorboard_and_nobody_reading_is_a_stop(toy, monkeypatch):
    run = toy(save_every=2, steps=4)
    with pytest.raises(ZeroDivisionError):
        for step in run.steps("loss"):
            set_gradients(run, 0)
            run.log({"loss": float(step), "grad_norm": run.update()})
            if step == 2:  # logged, and not saved
                raise ZeroDivisionError
    run = toy(save_every=2, steps=4)
    assert run.step == 2
    train(run)
    events = EventAccumulator(str(run.folder), {"scalars": 0}).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.0), (2, 1.0), (3, 2.5), (4, 3.5)]

    def closed(*_):
        raise BrokenPipeError

    run = toy(steps=8, save_every=9)
    monkeypatch.setattr(runtime.tqdm, "update", closed)
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    with pytest.raises(runtime.Stopped):
        train(run)
    assert stored(run.folder)["step"] == 5


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
    for changes in ({"steps": 2}, {"steps": 3}, {"steps": 1, "name": "other"}):
        train(toy(wandb=True, **changes))
    train(toy(name="silent", steps=1))
    first, second, other = wandb
    assert [run.given["name"] for run in wandb] == ["toy", "toy", "other"] and all(run.finished for run in wandb)
    assert first.given["id"] == second.given["id"] != other.given["id"]
    assert first.given["resume"] == "allow" and first.given["config"]["lr"] == 0.1
    lines = metrics(toy(steps=3).folder)
    assert [step for step, _ in first.lines + second.lines] == [1, 2, 3] == [line["step"] for line in lines]
    for (_, values), line in zip(first.lines + second.lines, lines, strict=True):
        assert values == pytest.approx({k: v for k, v in line.items() if k != "step"}, rel=1e-5)


def test_only_rank_zero_writes(toy, wandb, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run = toy(wandb=True)
    for _ in run.steps("loss"):
        set_gradients(run, 0)
        run.update()
        assert run.log({"loss": 1.0}) == {"loss": 1.0}
        break
    assert not wandb and not run.folder.exists()
