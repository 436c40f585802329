"""Oracles for the number of cores: affinity, and quotas of a container written by hand in both layouts."""

import os
import subprocess
import sys
import time

import pytest
import torch

from harness import cli, ranks, threads

QUOTAS = {  # files of a container's control group, cores of 16
    "no groups": ({}, 16),
    "version 2, no limit": ({"cpu.max": "max 100000\n"}, 16),
    "version 2": ({"cpu.max": "350000 100000\n"}, 3),
    "half a core is one": ({"cpu.max": "50000 100000"}, 1),
    "version 1": ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
    "version 1, no limit": ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 16),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_cores_are_what_affinity_and_the_quota_of_the_container_leave(tmp_path, monkeypatch, case):
    files, expected = QUOTAS[case]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for affinity in (16, 2):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)), raising=False)  # noqa: B023
        assert threads.cores(tmp_path) == min(affinity, expected)


def test_without_the_users_word_the_processes_share_the_cores_evenly(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(ranks, "cores", lambda: 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def used():
        ranks.start(cli.resolve({"preset": "tiny", "device": "cpu"}))
        return torch.get_num_threads()

    try:
        assert used() == 3
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "9")
        assert used() == 1, "more processes than cores"
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
        torch.set_num_threads(4)  # as torch does by itself when it is loaded
        assert used() == 4
    finally:
        torch.set_num_threads(before)


def test_the_way_of_waiting_is_set_without_torch_and_the_users_wish_stands():
    code = "import sys, os; from harness import threads; threads.sleep_while_waiting()\n"
    code += "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    for given, expected in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | given
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
        assert done.stdout.split() == [expected, "False"]


def test_a_rank_ends_soon_after_its_launcher_was_killed():
    rank = "import time; from harness import threads; threads.end_with_the_launcher(0.05); print('up', flush=True); "
    rank += "time.sleep(60)"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    process = subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"up\n"
    process.kill()
    began = time.monotonic()
    assert b"launcher is gone" in process.stderr.read() and time.monotonic() - began < 20, "both ends are closed"
    process.wait()
