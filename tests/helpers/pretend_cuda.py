"""How is code for an accelerator tested where there is none? By a CUDA that is only pretended.

Inside `pretend_cuda()` every tensor computes on the CPU and its storage carries the device where it would be. As on a
real accelerator, an operation fails if its tensors are on two devices (a CPU number of no dimension may join, a CPU
index may select), NumPy reads no tensor of the accelerator, and a generator draws on its own device only. Not seen:
what happens inside C++, such as a backward's own arithmetic. The gradients are where their tensors are.
"""

import threading
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
T = torch.Tensor
MAY_CROSS = {T.copy_, torch._foreach_copy_, T.data.__set__, T.__getitem__, T.__setitem__, T.type_as,
             torch._has_compatible_shallow_copy_type}  # fmt: skip
READ_BY_THE_HOST = {T.numpy, T.__array__}
WAITS = {T.item, T.tolist, T.cpu, T.nonzero, T.__bool__, T.__float__, T.__int__}  # for all that is queued


class WrongDevice(RuntimeError):
    """What CUDA would have refused."""


def place(tensor) -> torch.device:
    """Where a tensor is pretended to be."""
    try:
        return getattr(tensor.untyped_storage(), "pretended", None) or tensor.device
    except NotImplementedError:  # it has no storage
        return tensor.device


def tensors_in(*values) -> list[torch.Tensor]:
    """Every tensor in some arguments, or in a result."""
    found = []
    for value in values:
        if isinstance(value, T):
            found.append(value)
        elif isinstance(value, tuple | list | dict):
            found += tensors_in(*(value.values() if isinstance(value, dict) else value))
    return found


def put(found, device: torch.device):
    """Mark every tensor of a result."""
    for tensor in tensors_in(found):
        if tensor.device.type == "cpu":
            tensor.untyped_storage().pretended = device
    return found


def named(device) -> torch.device | None:
    """A device as an argument names it; None if it names none that is pretended."""
    if not isinstance(device, str | int | torch.device) or isinstance(device, bool):
        return None
    device = CUDA if isinstance(device, int) else torch.device(device)
    return CUDA if device.type == "cuda" else device


class _Mode(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.pinned = []  # bytes of every pinned allocation
        self.computed = self.waits = 0  # operations on the accelerator; how often the host waits for it

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = tensors_in(args, kwargs)
        if func == T.device.__get__:
            return place(args[0])
        if func in (T.is_cuda.__get__, T.is_cpu.__get__):
            return place(args[0]).type == ("cuda" if func == T.is_cuda.__get__ else "cpu")
        if func in READ_BY_THE_HOST and place(args[0]) == CUDA:
            raise WrongDevice(f"{func.__name__}: NumPy cannot read a tensor on {CUDA}")
        if func == T.backward:  # the recomputation of a checkpoint is seen, too
            with self:
                gradient, *how = (kwargs[key] for key in ("gradient", "retain_graph", "create_graph"))
                return torch.autograd.backward(args[0], gradient, *how, inputs=kwargs["inputs"])
        self.waits += func in WAITS and place(args[0]) == CUDA
        if kwargs.pop("pin_memory", False) or func == T.pin_memory:
            found = args[0].clone() if func == T.pin_memory else func(*args, **kwargs)
            self.pinned.append(found.nbytes)
            return put(found, CPU)
        if func in (T.to, T.cpu, T.cuda):
            return self._move(func, args, kwargs)
        here = {place(t) for t in tensors if t.ndim or place(t) == CUDA}
        target = kwargs.get("device")
        if target is not None and named(target) in (CPU, CUDA):  # a factory
            target, kwargs["device"] = named(target), "cpu"
            if target == CUDA and kwargs.get("generator") is not None:
                raise WrongDevice(f"{func.__name__}: a generator of the CPU draws nothing on {CUDA}")
            return put(func(*args, **kwargs), target)
        if func in (T.__getitem__, T.__setitem__) and place(args[0]) == CPU and CUDA in here:
            raise WrongDevice(f"{func.__name__}: a tensor on the CPU, an index or a value on {CUDA}")
        if len(here) > 1 and func not in MAY_CROSS:
            where = ", ".join(f"{tuple(t.shape)} on {place(t)}" for t in tensors)
            raise WrongDevice(f"{getattr(func, '__name__', func)}: tensors on two devices: {where}")
        self.computed += CUDA in here
        found = func(*args, **kwargs)
        # A result is where its first tensor is, or where all of them are.
        return put(found, CUDA) if CUDA in here and (len(here) == 1 or place(tensors[0]) == CUDA) else found

    def _move(self, func, args, kwargs):
        tensor, *rest = args
        if func != T.to:
            target, rest = {T.cpu: CPU, T.cuda: CUDA}[func], []
        elif rest and isinstance(rest[0], T):
            target, rest = place(rest[0]), [CPU, rest[0].dtype, *rest[1:]]
        elif rest and named(rest[0]):
            target, rest = named(rest[0]), [CPU, *rest[1:]]
        else:
            target = named(kwargs.pop("device", None)) or place(tensor)
        if "meta" in (target.type, tensor.device.type):
            return func(*args, **kwargs)
        found = T.to(tensor, *rest, **kwargs) if rest or kwargs else tensor
        if target != place(tensor) and found.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
            found = found.clone()
        return put(found, target)


@contextmanager
def pretend_cuda():
    """Inside, torch has one CUDA device; threads that are started there pretend it, too. Yields the mode."""
    mode, stream = _Mode(), mock.MagicMock()
    answers = {
        "is_available": lambda: True, "device_count": lambda: 1, "set_device": lambda device: None,
        "empty_cache": lambda: None, "max_memory_allocated": lambda *_: 0, "is_bf16_supported": lambda *_: True,
        "Stream": lambda *_: stream, "current_stream": lambda *_: stream,
        "stream": lambda given: ExitStack(),
    }  # fmt: skip
    autocast, run = torch.autocast, threading.Thread.run

    def run_pretending(thread):
        with mode:
            run(thread)

    precision = torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        here = lambda kind, *args, **more: autocast(CPU.type if kind == "cuda" else kind, *args, **more)  # noqa: E731
        stack.enter_context(mock.patch.object(torch, "autocast", here))
        stack.enter_context(mock.patch.object(threading.Thread, "run", run_pretending))
        stack.callback(torch.set_float32_matmul_precision, precision)
        yield stack.enter_context(mode)
