"""Oracles for the number of cores: affinity, and quotas of control groups written by hand in both versions' layouts."""

import os
import subprocess
import sys

import pytest
import torch

from harness import cli, ranks, threads


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """machine(cores, own, {file: text}): cores() with so many allowed by affinity, in these control groups."""

    def cores(count, own="", files=()):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(count)), raising=False)
        (tmp_path / "own").write_text(own)
        for name, text in dict(files).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return threads.cores(tmp_path, tmp_path / "own")

    return cores


QUOTAS = {  # /proc/self/cgroup, files of the control groups, cores of 16
    "no groups": ("", {}, 16),
    "version 2, no limit": ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n"}, 16),
    "version 2": ("0::/a/b\n", {"a/b/cpu.max": "350000 100000\n"}, 3),
    "a group above binds too": ("0::/a/b\n", {"a/b/cpu.max": "800000 100000", "a/cpu.max": "200000 100000"}, 2),
    "half a core is one": ("0::/\n", {"cpu.max": "50000 100000"}, 1),
    "a container that sees only its own group": ("0::/docker/x\n", {"cpu.max": "500000 100000"}, 5),
    "version 1": (
        "3:memory:/m\n2:cpu,cpuacct:/a\n0::/\n",
        {"cpu/a/cpu.cfs_quota_us": "400000\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
        4,
    ),
    "version 1, no limit": ("2:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 16),
    "another controller's": ("2:cpuset:/a\n", {"cpu/a/cpu.cfs_quota_us": "1", "cpu/a/cpu.cfs_period_us": "1"}, 16),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_cores_are_what_affinity_and_the_quotas_of_control_groups_leave(machine, case):
    own, files, expected = QUOTAS[case]
    assert machine(16, own, files) == expected
    assert machine(2, own, files) == min(2, expected)


def test_threads_are_the_users_or_an_even_share_of_the_cores(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(ranks, "cores", lambda: 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def used(**given):
        ranks.start(cli.resolve({"preset": "tiny", "device": "cpu", **given}))
        return torch.get_num_threads()

    try:
        assert (used(), used(threads=2)) == (3, 2)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "9")
        assert used() == 1, "more processes than cores"
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
        torch.set_num_threads(4)  # as torch does by itself when it is loaded
        assert (used(), used(threads=2)) == (4, 2)
    finally:
        torch.set_num_threads(before)


def test_the_way_of_waiting_is_set_without_torch_and_the_users_wish_stands():
    code = "import sys, os; from harness import threads; threads.sleep_while_waiting()\n"
    code += "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    for given, expected in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | given
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
        assert done.stdout.split() == [expected, "False"]
