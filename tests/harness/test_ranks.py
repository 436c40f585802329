"""Oracles for the processes of a run: means by hand in messages of a given size, the device or a refusal, and one
message whatever the number of ranks. Real process groups are in tests/pipeline/test_distributed.py.
"""

import json
import math
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from harness import cli, ranks
from settings import SettingsError


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


def test_ranks_that_have_a_number_share_its_float64_mean_and_nan_stays_if_nobody_has_it(peers):
    # Two others: the first has b and c, the second b and d; this rank has a, b and d. (Sums, then counts.)
    first = torch.tensor([0.0, 1.1, 7.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    second = torch.tensor([0.0, 6.0, 0.0, -3.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    peers([first], [second])
    found = ranks.average_numbers({"a": 4.0, "b": 0.1, "c": math.nan, "d": 0.0, "e": math.nan})
    assert found == pytest.approx({"a": 4.0, "b": 2.4, "c": 7.0, "d": -1.5, "e": math.nan}, nan_ok=True, abs=1e-14)


# --------------------------------------------------------------------------------------------------------- devices
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("count, changes, expected", [
    (0, {}, "--preset tiny"),  # SD3.5 on a CPU: refused, with a command that works
    (0, {"model": "."}, CPU),  # a folder: its owner knows what it is
    (0, {"device": "cpu"}, CPU), (8, {"device": "cpu"}, CPU), (8, {}, CUDA),
    (0, {"device": "cuda", "preset": "tiny"}, "--device cuda"), (1, {"device": "cuda", "preset": "tiny"}, CUDA),
    (0, {"preset": "tiny"}, CPU), (2, {"preset": "tiny"}, CUDA),
])  # fmt: skip
def test_the_device_is_what_was_asked_for_or_what_is_there(accelerators, count, changes, expected):
    accelerators(count)
    s = cli.resolve(changes)
    if isinstance(expected, torch.device):
        assert ranks.pick_device(s) == expected
    else:
        with pytest.raises(SettingsError, match=expected):
            ranks.pick_device(s)


def test_each_rank_takes_the_accelerator_of_its_number_and_too_many_ranks_are_refused(accelerators, monkeypatch):
    accelerators(4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert ranks.pick_device(cli.resolve({})) == torch.device("cuda", 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    with pytest.raises(SettingsError, match="--nproc_per_node=4"):
        ranks.pick_device(cli.resolve({}))


# -------------------------------------------------------------------------------------------------------- failures
@pytest.mark.parametrize("rank", [0, 3])
def test_a_users_error_is_said_at_once_by_rank_0_and_after_a_wait_by_others(tmp_path, monkeypatch, capsys, rank):
    file, waits = tmp_path / "error.json", []
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(time, "sleep", lambda seconds: waits.append(capsys.readouterr().err))
    assert ranks.fail(ValueError("--lr fast: not a number")) == 2
    assert waits == ([""] if rank else []), "torchrun ends this rank during the wait, if it is not alone"
    assert capsys.readouterr().err == f"error{' (rank 3)' if rank else ''}: --lr fast: not a number\n"
    assert json.loads(file.read_text())["message"]["message"] == "ValueError: --lr fast: not a number"


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


def test_after_an_error_the_group_is_left_without_waiting_and_after_success_it_is_dissolved(leave, monkeypatch):
    group = SimpleNamespace(alive=True)
    fake = SimpleNamespace(
        is_initialized=lambda: group.alive, destroy_process_group=lambda: setattr(group, "alive", False)
    )
    monkeypatch.setattr(ranks, "dist", fake)
    assert leave(lambda: 2) == ("os", 2) and group.alive, "its destructor would wait for the others"
    assert leave(lambda: 0) == ("sys", 0) and not group.alive
    monkeypatch.setattr(ranks.threading, "active_count", lambda: 2)
    assert leave(lambda: 0) == ("os", 0), "a thread that waits for a far scorer is not waited for"
