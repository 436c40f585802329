"""Which processes train together, on what device, and what happens when one of them fails?

Each rank (a process, one for each device) holds whole prompt groups, so ranks exchange gradients and metrics only:

    ddp    each rank holds the student; the gradients are averaged once a step, after the last backward
    fsdp   the student's parameters, gradients and moments are sharded over all ranks, block by block (FSDP2)
    hsdp   the same within a node, and replicated over nodes

What is frozen (teachers, text encoders, reward models) is never sharded. torchrun tells each process its rank. One
process needs no group. A rank that fails ends the job with its own message: torchrun ends the other ranks, and
collectives that wait for it give up after --timeout minutes.
"""

import errno
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from data.common import first_line, one_line, write_atomic
from data.files import DataError
from harness import cli
from harness.threads import cores, end_with_the_launcher
from models.hub import ModelError
from rewards import RewardError
from settings import Settings, SettingsError, is_tiny

# Every error that the user can correct. A program prints it as one line and ends with exit code 2.
USER_ERRORS = (SettingsError, DataError, ModelError, RewardError, FloatingPointError)
# What a disk, a file or a reader of our output may answer at any moment: an OSError with one of these is the user's.
DISK = {getattr(errno, name) for name in "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EIO ESTALE ENAMETOOLONG EPIPE".split()}


# -------------------------------------------------------------------------------------------------- start and end
def rank_and_world() -> tuple[int, int]:
    """(this process's rank, number of ranks) as torchrun says; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's rank among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world() -> int:
    """The number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def pick_device(s: Settings) -> torch.device:
    """--device, or the accelerator that is there. SettingsError if the run needs one that is not."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if s.device == "cuda" and not found:
        raise SettingsError("--device cuda: this machine has no CUDA device that torch can use")
    if s.device == "cpu" or not found:
        if s.device == "auto" and not is_tiny(s) and not Path(s.model).is_dir():
            raise SettingsError(
                f"no accelerator was found, and {s.model} is too large for a CPU: run "
                "`python train.py --preset tiny --stage opd` here, or insist with --device cpu"
            )
        return torch.device("cpu")
    if local_world() > found:
        raise SettingsError(f"{local_world()} ranks on {found} accelerators: use torchrun --nproc_per_node={found}")
    return torch.device("cuda", local_rank())


def start(s: Settings) -> torch.device:
    """Choose device and threads, and join the process group that torchrun describes, if any."""
    device = pick_device(s)
    if "OMP_NUM_THREADS" not in os.environ:  # of which torch reads what is there
        torch.set_num_threads(max(1, cores() // local_world()))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what is float32 inside a network
    if rank_and_world()[1] > 1 and not dist.is_initialized():
        end_with_the_launcher()
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=s.timeout))
    return device


def fail(fault: Exception) -> int:
    """Print a user's error, once for all ranks -> exit code 2; raise an OSError that is no user's (`DISK`).

    Ranks mostly fail alike, and torchrun ends the others as soon as one has failed. So rank 0 prints at once, and the
    others only if they are still alive after some seconds: then the fault is theirs alone.
    """
    if isinstance(fault, OSError) and fault.errno not in DISK:
        raise fault
    rank, _ = rank_and_world()
    fault.__cause__ = fault.__traceback__ = None  # torchrun's own summary then shows the message, and no stack
    get_error_handler().record_exception(fault)
    cli.wait_for_rank_0()
    who = f" (rank {rank})" if rank > 0 else ""
    if not isinstance(fault, BrokenPipeError):  # nobody is reading
        print(f"error{who}: {one_line(fault)}", file=sys.stderr)
    cli.flush()
    return 2


@cache
def tell_once(message: str) -> None:
    """A line on stderr of rank 0, the first time that it is asked for."""
    if rank_and_world()[0] == 0:
        print(message, file=sys.stderr)


def leave(main: Callable[[], int]) -> None:
    """Run `main` and end the process with its code. After a failure no rank waits in a collective or a destructor."""
    try:
        code = main()
    except BaseException as fault:
        rank, world = rank_and_world()
        if world == 1:
            raise
        get_error_handler().record_exception(fault)
        if lost_others(fault):
            print(f"rank {rank}: lost the other ranks ({reason(fault)}); their message says why", file=sys.stderr)
        else:
            traceback.print_exc()
            print(f"rank {rank} failed: {reason(fault)}", file=sys.stderr)
        cli.flush()
        os._exit(1)
    if dist.is_initialized() and code == 0:
        dist.destroy_process_group()
    cli.flush()
    # After an error other ranks may wait for this one, and a scorer's thread may wait minutes for its answer. Python
    # would join that thread; os._exit does not.
    if dist.is_initialized() or threading.active_count() > 1:
        os._exit(code)
    sys.exit(code)


def cause(fault: BaseException) -> BaseException:
    """The innermost cause. torch.distributed.checkpoint wraps what went wrong on each rank."""
    inner = next(iter(getattr(fault, "failures", {}).values()), (fault,))
    return inner[0] if isinstance(inner, tuple) else inner


def reason(fault: BaseException) -> str:
    """The first line of the innermost cause."""
    return first_line(cause(fault))


def lost_others(fault: BaseException) -> bool:
    """Did a collective give up because another rank has failed or hangs?"""
    fault = cause(fault)
    known = re.search("(?i)peer|connection|timed out", str(fault))
    return isinstance(fault, dist.DistError | RuntimeError) and known is not None


# ---------------------------------------------------------------------------------------------------- collectives
def average(tensors: Sequence[Tensor], most: int = 1 << 25) -> None:
    """Replace tensors by their mean over ranks, in place, in messages of about `most` numbers.

    For gradients this is DDP. It runs once a step, after the last backward: single-pass OPD calls backward at every
    transition, and torch's own DDP would communicate at each of them.
    """
    if not dist.is_initialized():
        return
    bucket: list[Tensor] = []
    for i, tensor in enumerate(tensors):
        bucket.append(tensor)
        if sum(t.numel() for t in bucket) >= most or i == len(tensors) - 1:
            flat = torch.cat([t.flatten() for t in bucket])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            for mine, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                mine.copy_(part.view_as(mine))
            bucket = []


def average_numbers(values: dict[str, float]) -> dict[str, float]:
    """Mean over ranks of a dict of numbers with the same keys on each; a nan is left out of its mean, if any is not."""
    given = torch.tensor(list(values.values()), dtype=torch.float64)
    total, count = given.nan_to_num(0.0), (~given.isnan()).double()
    average([total, count])
    return dict(zip(values, (total / count).tolist(), strict=True))


def gathered(mine: Tensor) -> list[Tensor]:
    """Every rank's tensor, rank by rank. All ranks call this, with tensors of one shape.

    Without a process group all are taken to be alike: there is one rank, or --dry-run counts for one of several.
    """
    parts = [torch.empty_like(mine) if dist.is_initialized() else mine for _ in range(rank_and_world()[1])]
    if dist.is_initialized():
        dist.all_gather(parts, mine)
    return parts


def most(numbers: Sequence[int]) -> list[int]:
    """The largest of the ranks' numbers, place by place. All ranks call this, and all get the same answer."""
    found = torch.tensor(numbers)
    if dist.is_initialized():
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def any_rank(flag: bool) -> bool:
    """Is the flag set on any rank? All ranks call this."""
    return bool(most([int(flag)])[0])


def wait() -> None:
    """Wait until every rank has called this."""
    if dist.is_initialized():
        dist.barrier()


def check_shared(folder: Path) -> None:
    """SettingsError, on every rank, unless all nodes see the folder that rank 0 has made. All ranks call this."""
    world = rank_and_world()[1]
    if not dist.is_initialized() or world == local_world():
        return
    token, file = torch.tensor(int.from_bytes(os.urandom(7))), folder / ".shared"
    dist.broadcast(token, 0)
    if dist.get_rank() == 0:
        write_atomic(file, f"{token}\n")
    wait()
    seen = local_rank() > 0
    for _ in range(30):  # seconds: a network's file system shows a new file late
        if seen := seen or (file.is_file() and file.read_text() == f"{token}\n"):
            break
        time.sleep(1)
    lost = any_rank(not seen)
    if dist.get_rank() == 0:
        file.unlink()
    if lost:
        raise SettingsError(f"{folder} is not one folder for all nodes: give an --out that they share")


def sharding(parallel: str, precision: str, device: torch.device) -> Callable[[nn.Module], object] | None:
    """FSDP2: what shards a part of a full student over the ranks, its blocks first, then the whole; None for "ddp".

    Blocks compute in `precision`; master weights are float32. A block's parameters are gathered for its forward or
    backward, and freed after it.
    """
    if parallel == "ddp" or not dist.is_initialized():
        return None
    world, local = dist.get_world_size(), local_world()
    if parallel == "hsdp":
        mesh = init_device_mesh(device.type, (world // local, local), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    low = torch.bfloat16 if precision == "bfloat16" else None
    # TRAP: by default the inputs of a forward are cast, too, and SD3's timestep of 900.9 becomes 900.
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # TRAP: by default the root's own parameters (embeddings, the last layer) stay gathered after a forward, for the
    # backward that is expected next. A rollout ends with a forward that has no backward: the gathered copy would
    # survive the optimizer's update, and the next step would run on stale weights.
    return partial(fully_shard, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def own(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor (the same memory); another tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
