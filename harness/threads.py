"""How many cores may a process use, how do its threads wait for each other, and when does it end by itself?

This file imports no torch: OpenMP reads its settings at the moment when torch loads it.
"""

import os
import sys
import threading
from pathlib import Path

PARENT = os.getppid()  # read before torch is imported, which takes seconds


def end_with_the_launcher(every: float = 1.0) -> None:
    """End this process soon after the one that has started it is gone: torchrun that was killed leaves its ranks alone.

    They would go on training and hold the run, or wait for each other for --timeout minutes. A killed run goes on from
    its last checkpoint.
    """

    def watch() -> None:
        while os.getppid() == PARENT:
            pause.wait(every)
        print("the launcher is gone: this rank ends, repeat the command to go on", file=sys.stderr, flush=True)
        os._exit(1)

    pause = threading.Event()
    threading.Thread(target=watch, daemon=True).start()


def sleep_while_waiting() -> None:
    """Let OpenMP's threads sleep while they wait for each other. Call it before torch is imported.

    Without this setting they spin. Spinning takes no time on idle cores. If other processes want the cores too, it
    takes the time that the awaited thread needs, and a step becomes many times slower. The numbers do not change.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def cores(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """The number of cores that this process may use, at least 1: the machine's, those of the process's affinity
    (taskset, Slurm), or what the CPU quota of its container allows (docker --cpus), whichever are fewest."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    files = [[groups / "cpu.max"], [groups / f"cpu/cpu.cfs_{name}_us" for name in ("quota", "period")]]
    for version in files:  # control groups 2: "max 100000" or "150000 100000"; 1: -1 or 150000, and 100000
        if all(file.exists() for file in version):
            quota, period = " ".join(file.read_text() for file in version).split()
            if quota not in ("max", "-1"):
                found = min(found, int(quota) // int(period))
    return max(1, found)
