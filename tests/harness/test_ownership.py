"""Whose is a run's folder, and what becomes of it under every fault: what is not ours stays, what is ours is whole."""

import json
import math
import os
import shutil
import signal
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch

from bench import kills
from data.common import write_atomic
from harness import checkpoints, ownership
from harness.ranks import USER_ERRORS
from harness.run import Run
from models import hub
from settings import SettingsError
from tests.helpers.runs import metrics, same, stored
from tests.helpers.toy import NFT, set_gradients, toy_in, train


@pytest.fixture
def toy(tmp_path):
    """toy(steps=..., lr=..., ...): a run in this test's folder."""
    return lambda **changes: toy_in(tmp_path, **changes)


def names(run):
    return sorted(p.name for p in (run.folder / "checkpoints").iterdir())


# ------------------------------------------------------------------------------------------ what is not ours stays
FOREIGN = [  # what users, editors and file systems leave in a run's folder
    "notes.txt", ".DS_Store", "samples/holiday.png", "photos/holiday.jpg", "config.json.bak", "wandb/run-1/x",
    "checkpoints/step-000000.zip", "checkpoints/step-000001-best/adapter.json", "checkpoints/.nfs00000001",
    "checkpoints/step-000002/notes.txt", "checkpoints/step-000002/training/.DS_Store", "checkpoints/step-best/x",
    "prompts/mine/a.txt", "ranges/rank-0.jsonl.bak", "checkpoints/.step-000009-mine/x",
]  # fmt: skip


@pytest.mark.parametrize("linked", [False, True], ids=["a folder", "a symbolic link"])
def test_whatever_a_run_did_not_write_survives_saves_resumes_and_no_resume(toy, tmp_path, linked):
    if linked:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "toy").symlink_to(tmp_path / "elsewhere")
    run = toy(steps=2, keep=2)
    train(run)
    for number, name in enumerate(FOREIGN):
        (run.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (run.folder / name).write_text(f"mine {number}")
    os.mkfifo(run.folder / "checkpoints/step-000099")  # a name like ours, and no folder

    def mine():
        return sorted(p.read_text() for p in run.folder.rglob("*") if p.is_file() and p.read_bytes()[:4] == b"mine")

    before = mine()
    assert len(before) == len(FOREIGN)
    train(toy(steps=5, keep=2))
    assert mine() == before and {"step-000004", "step-000005", "step-000002.rest"} <= set(names(run))
    replaced = toy(steps=1, lr=0.2, resume=False)
    assert replaced.step == 0 and json.loads((run.folder / "config.json").read_text())["lr"] == 0.2
    assert {"step-000004.replaced", "step-000005.replaced"} <= set(names(run)), "until the new run has saved"
    train(replaced)
    left = [name for name in names(run) if name.endswith((".replaced", "4", "5"))]
    assert mine() == before and not left and metrics(run.folder)[-1]["step"] == 1
    assert not (run.folder / "metrics.jsonl.replaced").exists()
    assert toy(steps=1, lr=0.2).step == 1


def test_a_failed_no_resume_loses_nothing_and_the_newest_of_runs_that_saved_stays(toy):
    train(toy(steps=2))
    toy(lr=0.2, resume=False)
    again = toy(lr=0.3, resume=False)  # the one before never saved: what it has set aside is still the first
    assert [p.name for p in ownership.ours(again.folder, ".replaced")] == [
        "step-000001.replaced", "step-000002.replaced", "metrics.jsonl.replaced",
        *(p.name for p in again.folder.glob("events*")),
    ]  # fmt: skip
    (run,) = [toy(lr=0.3)]
    run.save()
    assert not ownership.ours(run.folder, ".replaced")


REFUSED = {  # what is in the folder `toy`, the run's settings, and a word of the line
    "another's folder": (lambda d: (d / "toy/photos").mkdir(parents=True), {"resume": False}, "no run of ours"),
    "another program's config": (lambda d: write(d / "toy/config.json", '{"lr": 1}'), {}, "no run of ours"),
    "a path below a file": (lambda d: write(d / "toy", ""), {}, "--out"),
    "another stage": (lambda d: train(toy_in(d, stage="sft")), {}, "--stage sft, not opd"),
    "another setting": (lambda d: train(toy_in(d, lr=0.2)), {}, "--lr 0.2, not 0.1"),
    "a name that no disk takes": (lambda d: None, {"name": "x" * 300}, "--"),
}


def write(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize("what", REFUSED)
def test_a_folder_that_cannot_be_a_runs_is_refused_in_one_line_and_untouched(toy, tmp_path, what):
    make, settings, word = REFUSED[what]
    make(tmp_path)
    before = sorted(map(str, tmp_path.rglob("*")))
    with pytest.raises(SettingsError) as refusal:
        toy(**settings)
    assert word in str(refusal.value) and "\n" not in str(refusal.value)
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_what_may_change_may_change_and_what_a_run_starts_from_is_not_replaced(go, world, capsys):
    flags = ["--stage", "sft", "--eval-prompts", "0"]
    folder = go("run", *flags)
    go("run", *flags, "--save-every", "3", "--keep", "1", "--micro-batch", "2", "--timeout", "3")
    for flag in ("--init", "--model", "--teachers"):
        value = f"text={folder}" if flag == "--teachers" else str(folder / "checkpoints")
        go("run", *flags, "--no-resume", flag, value, code=2)
        assert f"{flag}" in capsys.readouterr().err and hub.last_checkpoint(folder)


def test_a_full_disk_is_found_before_anything_is_loaded(go, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    go("run", code=2)
    assert "no space" in capsys.readouterr().err


def test_one_process_holds_a_run_until_it_dies(toy, tmp_path):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        run = toy()  # noqa: F841
        os.write(writer, b"held")
        signal.pause()
    assert os.read(reader, 4) == b"held"
    try:
        with pytest.raises(SettingsError, match=f"process {child} on .* holds"):
            toy()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    first = toy()
    assert toy().step == first.step == 0, "and a process may ask for its own again"


# ------------------------------------------------------------------------------------- a kill or a full disk, anywhere
def steps(number, **changes):
    def work(folder):
        try:
            train(toy_in(folder, **NFT, **{"keep": 1, **changes}, steps=number))
        except (*USER_ERRORS, OSError):
            return 2
        return 0

    return work


def left_by_a_kill(folder):
    code = steps(1)(folder)
    done, half = (folder / "toy/checkpoints" / name for name in ("step-000001", ".step-000002"))
    half.mkdir()
    (half / "training.json").write_text("half")
    shutil.copytree(done, done.with_name(".step-000001-old"))
    shutil.copytree(done, done.with_name(".step-000000-gone"))
    with (folder / "toy/metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 99.0}\n{"step": 3, "lo')  # one step too far, and a line cut by the kill
    return code


def save_again(folder):
    """A stop right after continuing saves over the newest checkpoint."""
    try:
        toy_in(folder, **NFT, keep=1).save()
    except (*USER_ERRORS, OSError):
        return 2
    return 0


CASES = {
    "a new run": kills.Case(lambda folder: 0, steps(1), steps(1)),
    "a run that is continued": kills.Case(left_by_a_kill, steps(2), steps(2)),
    "a save over a checkpoint": kills.Case(steps(1), save_again, steps(2)),
    "a run that replaces another": kills.Case(steps(2, keep=2), *[steps(1, lr=0.2, resume=False)] * 2),
}


@pytest.mark.parametrize("fault", [kills.KILL, kills.FULL], ids=["a kill", "a full disk"])
@pytest.mark.parametrize("case", CASES)
def test_a_run_that_meets_a_fault_before_any_write_ends_as_one_that_did_not(case, fault):
    """A real SIGKILL, or a disk that is full from then on; then the same command again. All writes: bench.kills."""
    _, tried, survived = kills.survived(CASES[case], every=2 if fault == kills.KILL else 4, fault=fault)
    assert tried == survived >= 4


# ------------------------------------------------------------------------------------------------ damaged checkpoints
def shard(checkpoint):
    (file,) = (checkpoint / "training").iterdir()
    return file


def changed(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def halved(checkpoint):
    """The shard as the first of two ranks would have written it: the first half of every tensor."""
    file = shard(checkpoint)
    tensors = safetensors.torch.load_file(file)
    offsets = {n: {"saved_offsets": [0] * t.ndim} for n, t in tensors.items()}
    mine = {n: t.chunk(2, -1)[0].contiguous() for n, t in tensors.items()}
    safetensors.torch.save_file(mine, file, metadata={"DCP_SHARDING_INFO": json.dumps(offsets)})


DAMAGES = {
    "one bit of a shard": lambda c: changed(shard(c)),
    "one bit of what is exported": lambda c: changed(c / "exported.safetensors"),
    "a cut shard": lambda c: shard(c).write_bytes(shard(c).read_bytes()[:200]),
    "a lost shard": lambda c: shard(c).unlink(),
    "half of every tensor": halved,
    "another state": lambda c: (c / "training.json").write_text('{"step": 3}'),
    "a list that is cut": lambda c: (c / "SHA256SUMS").write_text((c / "SHA256SUMS").read_text()[:70]),
    "no list": lambda c: (c / "SHA256SUMS").unlink(),
    "an empty folder": lambda c: (shutil.rmtree(c), c.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(toy, capsys, damage):
    train(whole := toy(**NFT, name="whole"))
    run = toy(**NFT, keep=5)
    train(run)
    DAMAGES[damage](run.checkpoint)
    again = toy(**NFT, keep=1)
    assert again.step == 2 and "step-000003: damaged" in capsys.readouterr().err
    train(again)
    assert same(stored(run.folder), stored(whole.folder)) and metrics(run.folder) == metrics(whole.folder)
    assert names(run) == ["step-000003", "step-000003.damaged"]
    DAMAGES[damage](run.checkpoint)
    for _ in range(2):
        with pytest.raises(hub.ModelError, match="step-000003: damaged"):
            toy(**NFT)
    assert toy(**NFT, resume=False).step == 0


@pytest.mark.parametrize("kind", ["weights", "average", "old", "moments"])
def test_a_number_that_is_not_finite_is_never_saved(toy, kind):
    run = toy(**NFT, keep=1)
    for _ in run.steps("loss"):
        set_gradients(run, 0)
        run.update()
        if run.step == 1:
            poisoned = {"weights": run.weights.parameters, "average": run.weights.average, "old": run.weights.old}
            moments = {"matrix": run.weights.optimizers[0].state[run.weights.parameters["matrix"]]["exp_avg"]}
            poisoned.get(kind, moments)["matrix"].data[0, 1] = math.inf
            break
    run.step = 2
    with pytest.raises(FloatingPointError, match="matrix is not finite"):
        run.save()
    assert names(run) == ["step-000001"] and toy(**NFT).step == 1


def test_files_have_the_mode_of_the_umask_and_sha256sum_reads_the_list(toy):
    before = os.umask(0o027)
    try:
        train(run := toy(steps=1))
    finally:
        os.umask(before)
    files = [p for p in run.checkpoint.rglob("*") if p.is_file()]
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o640}
    assert os.system(f"cd {run.checkpoint} && sha256sum --quiet -c SHA256SUMS") == 0
    assert {*checkpoints.listed(run.checkpoint), "SHA256SUMS", "README.md"} == {
        p.relative_to(run.checkpoint).as_posix() for p in files
    }


def test_write_atomic_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    write_atomic(tmp_path / "file", "old")
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(Path, "write_text", lambda path, text: path.write_bytes(b"n") and os.stat("/no such file"))
        write_atomic(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old" and len([*tmp_path.iterdir()]) == 1
    write_atomic(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new" and len([*tmp_path.iterdir()]) == 1


def test_a_run_knows_its_own_after_a_move(toy, tmp_path):
    run = toy(steps=1)
    train(run)
    identity = json.loads((run.folder / "config.json").read_text())["identity"]
    shutil.move(run.folder, tmp_path / "moved")
    moved = toy(steps=2, name="moved")
    assert isinstance(moved, Run) and moved.step == 1 and moved.id == identity["id"]
