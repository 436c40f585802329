"""Oracles for the processes of a run: means by hand in messages of a given size, a device or one sentence that says
what to do, and one message whatever the number of ranks. Real process groups are in the tests of whole runs.
"""

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

import settings
from harness import ranks
from settings import SettingsError
from tests.conftest import same


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    """A process that torchrun did not start, on a machine without an accelerator."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def accelerators(monkeypatch):
    """accelerators(N): as if torch could use N of them."""

    def have(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return have


@pytest.fixture
def peers(monkeypatch):
    """peers([...]): a group of this rank and others with these tensors; the list of message lengths that it saw."""

    def group(*others):
        flats = [torch.cat([t.flatten().double() for t in tensors]) for tensors in others]
        messages = []

        def all_reduce(flat):
            start = sum(messages)
            messages.append(len(flat))
            for other in flats:
                flat += other[start : start + len(flat)]

        fake = SimpleNamespace(
            is_initialized=lambda: True, get_world_size=lambda: 1 + len(others), all_reduce=all_reduce
        )
        monkeypatch.setattr(ranks, "dist", fake)
        return messages

    return group


def grids(seed):
    """Tensors of unlike shapes, 6 + 1 + 20 + 4 numbers."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng) for shape in ((2, 3), (1,), (4, 5), (2, 2))]


# ------------------------------------------------------------------------------------------------------- averages
@pytest.mark.parametrize("most, lengths", [(1, [6, 1, 20, 4]), (7, [7, 20, 4]), (8, [27, 4]), (1 << 25, [31])])
def test_the_average_is_the_mean_whatever_the_size_of_a_message(peers, most, lengths):
    mine, second, third = grids(0), grids(1), grids(2)
    expected = [(a + b + c) / 3 for a, b, c in zip(mine, second, third, strict=True)]
    memory = [t.data_ptr() for t in mine]
    messages = peers(second, third)
    ranks.average(mine, most)
    assert messages == lengths, "a message is sent as soon as it is full, and what is left at the end"
    for found, wanted in zip(mine, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert [t.data_ptr() for t in mine] == memory, "in place: an optimizer holds these tensors"


def test_numbers_are_averaged_by_name_in_float64(peers):
    peers([torch.tensor([1.1, -1.0, 1.0, 1.0], dtype=torch.float64)])  # the numbers, then how many each stands for
    found = ranks.average_numbers({"a": 0.1, "b": 3.0})
    assert found == {"a": pytest.approx(0.6, abs=1e-15), "b": 1.0}
    assert abs(found["a"] - 0.6) < 1e-9 < abs((torch.tensor(0.1) + torch.tensor(1.1)).item() / 2 - 0.6)


def test_ranks_that_have_a_number_share_its_mean_and_nan_stays_where_nobody_has_it(peers):
    # Two others: the first has b and c, the second b and d; this rank has a, b and d. (Sums, then counts.)
    first = torch.tensor([0.0, 2.0, 7.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    second = torch.tensor([0.0, 6.0, 0.0, -3.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    peers([first], [second])
    found = ranks.average_numbers({"a": 4.0, "b": 1.0, "c": math.nan, "d": 0.0, "e": math.nan})
    assert found == pytest.approx({"a": 4.0, "b": 3.0, "c": 7.0, "d": -1.5, "e": math.nan}, nan_ok=True)


@pytest.mark.parametrize("mine, theirs", [(False, False), (False, True), (True, False), (True, True)])
def test_what_is_so_on_any_rank_is_known_to_all(monkeypatch, mine, theirs):
    assert ranks.any_rank(mine) is mine, "one process asks itself"

    def all_reduce(flag, operation):
        flag.fill_(operation(flag.item(), float(theirs)))

    fake = SimpleNamespace(is_initialized=lambda: True, ReduceOp=SimpleNamespace(MAX=max), all_reduce=all_reduce)
    monkeypatch.setattr(ranks, "dist", fake)
    assert ranks.any_rank(mine) is (mine or theirs)


def test_one_process_averages_with_nobody():
    tensors = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])]
    ranks.average(tensors)
    ranks.average([])
    ranks.wait()
    assert same(tensors, [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])])
    assert ranks.average_numbers({"a": 0.1, "b": 3.0}) == {"a": 0.1, "b": 3.0}, "float64: 0.1 stays 0.1"
    assert ranks.rank_and_world() == (0, 1) and ranks.local_rank() == 0


def test_what_torchrun_says_of_a_process_is_read_from_the_environment(monkeypatch):
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "6"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert ranks.rank_and_world() == (5, 6) and ranks.local_rank() == 1


def test_one_process_has_nothing_to_shard():
    model = SimpleNamespace(transformer=nn.Linear(2, 3))
    before = dict(model.transformer.named_parameters())
    ranks.shard(model, settings.resolve({"parallel": "fsdp", "parameters": "full"}))
    assert all(p is before[n] and ranks.own(p) is p for n, p in model.transformer.named_parameters())


# --------------------------------------------------------------------------------------------------------- devices
def test_sd35_without_an_accelerator_is_one_sentence_that_names_the_tiny_preset():
    with pytest.raises(
        SettingsError, match="no accelerator was found, and stabilityai/stable-diffusion-3.5-medium"
    ) as e:
        ranks.pick_device(settings.resolve({}))
    assert "`python train.py --preset tiny --stage opd`" in str(e.value) and "--device cpu" in str(e.value)
    assert "\n" not in str(e.value)


def test_cuda_that_is_not_there_is_refused(accelerators):
    s = settings.resolve({"device": "cuda", "preset": "tiny"})
    with pytest.raises(SettingsError, match="^--device cuda: this machine has no CUDA device that torch can use$"):
        ranks.pick_device(s)
    accelerators(1)
    assert ranks.pick_device(s) == torch.device("cuda", 0)


def test_the_tiny_world_runs_on_whatever_is_there(accelerators):
    s = settings.resolve({"preset": "tiny"})
    assert ranks.pick_device(s) == torch.device("cpu")
    accelerators(2)
    assert ranks.pick_device(s) == torch.device("cuda", 0)
    assert ranks.pick_device(settings.resolve({"preset": "tiny", "device": "cpu"})) == torch.device("cpu")


def test_a_model_that_a_processor_can_train_is_let_through(tmp_path, monkeypatch):
    s = settings.resolve({"model": str(tmp_path)})
    (tmp_path / "transformer").mkdir()
    for part in (1, 2):
        (tmp_path / f"transformer/diffusion_pytorch_model-{part}.safetensors").write_bytes(b"12345")
    assert ranks.pick_device(s) == torch.device("cpu")
    monkeypatch.setattr(ranks, "SMALL", 10)
    assert ranks.pick_device(s) == torch.device("cpu"), "ten bytes are not more than ten"
    monkeypatch.setattr(ranks, "SMALL", 9)
    with pytest.raises(SettingsError, match="too large for a processor"):
        ranks.pick_device(s)


def test_who_insists_on_the_processor_gets_it(accelerators):
    s = settings.resolve({"device": "cpu"})
    assert ranks.pick_device(s) == torch.device("cpu")
    accelerators(8)
    assert ranks.pick_device(s) == torch.device("cpu")


def test_each_rank_takes_the_accelerator_of_its_number_and_too_many_ranks_are_refused(accelerators, monkeypatch):
    accelerators(4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    s = settings.resolve({})
    assert ranks.pick_device(s) == torch.device("cuda", 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    with pytest.raises(SettingsError, match="^5 ranks on 4 accelerator.*torchrun with --nproc_per_node=4$"):
        ranks.pick_device(s)


# -------------------------------------------------------------------------------------------------------- failures
def test_a_failure_is_said_once_and_written_to_torchruns_error_file(tmp_path, monkeypatch, capsys):
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("rank 0 speaks at once"))
    assert ranks.fail(ValueError("--lr fast: not a number")) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: --lr fast: not a number\n")
    assert json.loads(file.read_text())["message"]["message"] == "ValueError: --lr fast: not a number"


def test_other_ranks_give_rank_zero_the_first_word(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    silent = []
    monkeypatch.setattr(time, "sleep", lambda seconds: silent.append((seconds, capsys.readouterr().err)))
    assert ranks.fail(ValueError("mine alone")) == 2
    assert silent == [(5, "")], "nothing is said before the wait, in which torchrun ends this rank if it is not alone"
    assert capsys.readouterr().err == "error (rank 3): mine alone\n"


class Exited(BaseException):
    pass


@pytest.fixture
def leave(monkeypatch):
    """leave(main) -> ("sys" or "os", exit code); the process lives on."""

    def hard(code):
        raise Exited(code)

    monkeypatch.setattr(ranks.os, "_exit", hard)
    monkeypatch.setattr(ranks.threading, "active_count", lambda: 1)  # whatever other tests have left behind

    def leave(main):
        try:
            ranks.leave(main)
        except SystemExit as end:
            return "sys", end.code
        except Exited as end:
            return "os", end.args[0]

    return leave


def raises(fault):
    def main():
        raise fault

    return main


def test_one_process_leaves_with_its_code_or_its_traceback(leave):
    assert leave(lambda: 2) == ("sys", 2) and leave(lambda: 0) == ("sys", 0)
    with pytest.raises(ZeroDivisionError):
        leave(raises(ZeroDivisionError()))


def test_a_rank_that_fails_takes_its_leave_at_once_and_says_whose_fault_it_was(leave, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert leave(raises(ZeroDivisionError("by zero\nand more"))) == ("os", 1)
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("rank 1 failed: by zero\n")
    assert "ZeroDivisionError" in json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    # Not this rank's fault: no stack that hides the other's.
    lost = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [node-1]:1\nmore")
    assert leave(raises(lost)) == ("os", 1)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("rank 1: lost the other ranks (") and "their message says why" in err
    assert leave(raises(RuntimeError("shapes differ"))) == ("os", 1)
    assert "Traceback" in capsys.readouterr().err


def test_after_an_error_the_group_is_left_without_waiting_and_after_success_it_is_dissolved(leave, monkeypatch):
    group = SimpleNamespace(alive=True)
    fake = SimpleNamespace(
        is_initialized=lambda: group.alive, destroy_process_group=lambda: setattr(group, "alive", False)
    )
    monkeypatch.setattr(ranks, "dist", fake)
    assert leave(lambda: 2) == ("os", 2) and group.alive, "its destructor would wait for the others"
    assert leave(lambda: 0) == ("sys", 0) and not group.alive


@pytest.mark.parametrize("code", [0, 2])
def test_a_thread_that_still_asks_a_far_judge_is_not_waited_for(leave, monkeypatch, code):
    """Python joins a pool's threads before it ends; a judge has minutes to answer."""
    monkeypatch.setattr(ranks.threading, "active_count", lambda: 2)
    assert leave(lambda: code) == ("os", code)


def test_reason_is_the_innermost_first_line():
    assert ranks.reason(ValueError("\n  \nfirst\nsecond")) == "first"
    assert ranks.reason(KeyError()) == "KeyError", "an empty message still says what it was"
    wrapped = CheckpointException("all ranks failed", {1: (OSError("no space left\nhint"), [])})
    assert str(wrapped).startswith("CheckpointException ranks:") and ranks.reason(wrapped) == "no space left"


def test_the_limit_of_a_processor_lies_between_the_tiny_world_and_sd35():
    assert ranks._weight(Path("assets/tiny/base")) < ranks.SMALL < 2.2e9 * 2, "in bytes; SD3.5-M has 2.2 B"
    assert ranks._weight(Path("stabilityai/no-such-folder")) == math.inf
