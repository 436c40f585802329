"""How many cores may a process use, and how do its threads wait for each other?

This file imports no torch: OpenMP reads its settings at the moment when torch loads it.
"""

import math
import os
from pathlib import Path


def sleep_while_waiting() -> None:
    """Let OpenMP's threads sleep while they wait for each other. Call it before torch is imported.

    Without this setting they spin. Spinning takes no time on idle cores. If other processes want the cores too, it
    takes the time that the awaited thread needs, and a step becomes many times slower. The numbers do not change.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def cores(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """The number of cores that this process may use, at least 1.

    It is the smallest of three: the machine's cores, the process's affinity (taskset, Slurm), and the CPU quotas of
    its control groups (a container's --cpus).
    """
    found = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    for line in own.read_text().splitlines() if own.exists() else []:
        number, controllers, path = line.split(":", 2)  # "0::/a/b" is version 2, "1:cpu,cpuacct:/a/b" version 1
        if number == "0" or "cpu" in controllers.split(","):
            top = groups / "cpu" if controllers else groups
            inner = top / path.lstrip("/")
            # A quota binds every group below. In a container the path may lead nowhere; then only `top` is read.
            found += [_quota(folder) for folder in (inner, *inner.parents) if folder.is_relative_to(top)]
    return max(1, math.floor(min(found)))


def _quota(group: Path) -> float:
    """Cores that one control group allows: quota over period, in microseconds; inf without a limit."""
    try:
        if (group / "cpu.max").exists():  # version 2: "max 100000" or "150000 100000"
            quota, period = (group / "cpu.max").read_text().split()
        else:  # version 1: -1 or 150000, and 100000 in a file of its own
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else math.inf  # float("max") is a ValueError
    except (OSError, ValueError):
        return math.inf
