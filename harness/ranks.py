"""Which processes train together, on what, and what happens when one of them fails?

Every rank holds whole prompt groups, so that nothing but gradients and metrics is ever exchanged:

    ddp    each rank holds the student; its gradients are averaged once a step, after the last backward
    fsdp   the student's parameters, gradients and moments are sharded over all ranks, block by block (FSDP2)
    hsdp   the same within a node, and replicated over nodes

What is frozen (teachers, text encoders, reward models) is never sharded. torchrun says who is who; one process needs
no group. A rank that fails ends the job with its own message: torchrun ends the others, and collectives that wait for
it give up after --timeout minutes.
"""

import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from data.common import first_line
from data.files import DataError
from harness.threads import cores
from models import flow
from models.lora import ModelError
from rewards import RewardError
from settings import Settings, SettingsError, is_tiny

# Every error that is the user's to mend. A program prints it as one line and ends with exit code 2.
USER_ERRORS = (SettingsError, DataError, ModelError, RewardError, FloatingPointError)

SMALL = 2 << 30  # bytes of weights that a processor can be asked to train without being told so


def rank_and_world() -> tuple[int, int]:
    """What torchrun says of this process; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def pick_device(s: Settings) -> torch.device:
    """--device, or the accelerator that is there. SettingsError where the run would need one that is not."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if s.device == "cuda" and not found:
        raise SettingsError("--device cuda: this machine has no CUDA device that torch can use")
    if s.device == "cpu" or not found:
        if s.device == "auto" and not is_tiny(s) and _weight(Path(s.model)) > SMALL:
            raise SettingsError(
                f"no accelerator was found, and {s.model} is too large for a processor: run "
                "`python train.py --preset tiny --stage opd` here, or insist with --device cpu"
            )
        return torch.device("cpu")
    local, ranks = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks > found:
        raise SettingsError(f"{ranks} ranks on {found} accelerator(s): start torchrun with --nproc_per_node={found}")
    return torch.device("cuda", local)


def _weight(folder: Path) -> float:
    """Bytes of a local model's transformer; infinite for what would have to be fetched."""
    if not folder.is_dir():
        return float("inf")
    return sum(file.stat().st_size for file in folder.glob("transformer/*.safetensors"))


def start(s: Settings) -> torch.device:
    """Choose the device and join the process group that torchrun describes, if any. One process needs no group.

    Collectives give up after --timeout minutes: a rank that hangs ends the job instead of holding it.
    """
    device, (_, world) = pick_device(s), rank_and_world()
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if s.threads or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(s.threads or max(1, cores() // local_world))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what is float32 inside a network
    if world > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=s.timeout))
    return device


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def fail(fault: Exception) -> int:
    """Say what the user has to mend, once, whatever the number of ranks -> exit code 2.

    Ranks mostly fail alike, and torchrun ends the others as soon as one has: rank 0 speaks at once, the others only
    if they are still there after a while, because then the fault is theirs alone.
    """
    rank, _ = rank_and_world()
    get_error_handler().record_exception(fault)  # torchrun's own summary shows the message then
    if rank > 0:
        time.sleep(5)
    who = f" (rank {rank})" if rank > 0 else ""
    print(f"error{who}: {fault}", file=sys.stderr, flush=True)
    return 2


def leave(main: Callable[[], int]) -> None:
    """Run `main` as a process's whole life: no rank lingers in a collective or a destructor after a failure."""
    try:
        code = main()
    except BaseException as fault:
        rank, world = rank_and_world()
        if world == 1:
            raise
        get_error_handler().record_exception(fault)
        if isinstance(fault, dist.DistError | RuntimeError) and re.search("(?i)peer|connection|timed out", str(fault)):
            print(f"rank {rank}: lost the other ranks ({reason(fault)}); their message says why", file=sys.stderr)
        else:
            traceback.print_exc()
            print(f"rank {rank} failed: {reason(fault)}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)
    if dist.is_initialized() and code == 0:
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # Left by an error, peers may be waiting for us; a scorer's threads may still be asking a judge that takes minutes,
    # and Python would join them. We wait for neither.
    if dist.is_initialized() or threading.active_count() > 1:
        os._exit(code)
    sys.exit(code)


def average(tensors: Sequence[Tensor], most: int = 1 << 25) -> None:
    """Replace tensors by their mean over ranks, in place, in messages of about `most` numbers. Of gradients: DDP.

    It runs once a step, after the last backward, so that single-pass OPD can call backward at every transition
    without a collective for each.
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
    """Mean over ranks of a dict of numbers that has the same keys everywhere; a rank's nan does not count.

    What is nan on every rank stays nan.
    """
    given = torch.tensor(list(values.values()), dtype=torch.float64)
    total, count = given.nan_to_num(0.0), (~given.isnan()).double()
    average([total, count])
    return dict(zip(values, (total / count).tolist(), strict=True))


def any_rank(flag: bool) -> bool:
    """Is it so on any rank? All come here, and all learn the same."""
    found = torch.tensor(float(flag))
    if dist.is_initialized():
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found.item())


def wait() -> None:
    """Wait until every rank has come here."""
    if dist.is_initialized():
        dist.barrier()


def shard(model: flow.FlowModel, s: Settings) -> None:
    """FSDP2: shard the student by transformer block. bfloat16 parameters in flight, float32 master and reduction.

    A block's parameters are gathered when its forward or backward comes, and freed after it.

    TRAP: by default the root's own parameters (embeddings, the last layer) stay gathered after a forward, for the
    backward that is expected next. A rollout ends with a forward that has none: its copy would survive the
    optimizer's update, and the next step would run on stale weights.
    """
    if s.parallel == "ddp" or not dist.is_initialized():
        return
    world, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    kind = model.device.type
    if s.parallel == "hsdp":
        mesh = init_device_mesh(kind, (world // local, local), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    low = torch.bfloat16 if s.precision == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    for block in model.transformer.transformer_blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model.transformer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def own(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor (the same memory); a whole tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def reason(fault: BaseException) -> str:
    """The innermost cause, one line: DCP wraps what went wrong on each rank."""
    inner = next(iter(getattr(fault, "failures", {}).values()), (fault,))
    inner = inner[0] if isinstance(inner, tuple) else inner
    return first_line(inner)
