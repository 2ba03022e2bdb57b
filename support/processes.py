"""The processes of a torchrun job; with one process, every function here does nothing.

Used by teacher.py and distill.py (sums over the job's processes), data.py (each process takes its part of a
batch) and other modules of support/ (rank 0 alone prints and writes).
"""

import contextlib
import datetime
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from support import UserError, machine, signals

# How long the others wait while one process collects or downloads. A dead process is noticed at once.
TIMEOUT = datetime.timedelta(hours=12)
GRACE_SECONDS = 10  # after a signal, for a process that waits inside a call
# (1,) on the device: how many processes had received a signal to end at the last call of `summed`.
_n_requested: Tensor | None = None


def rank() -> int:
    """This process's number in torchrun's job, 0 without one. Rank 0 alone prints, writes and evaluates."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """The number of processes of the job."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join(cfg: Any) -> None:
    """Connect to the job's other processes: nccl with a GPU for each, or gloo on CPUs. cfg: has `device`.

    Raises UserError where the GPUs do not suffice, or another process can't be reached.
    """
    if world() == 1 or dist.is_initialized():
        return
    device = machine.device(cfg)
    on_gpu = device.startswith("cuda")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if ":" in device:
        raise UserError(
            f"--device {cfg.device} names one GPU for {world()} processes; with torchrun say --device cuda, "
            f"and CUDA_VISIBLE_DEVICES to choose"
        )
    if on_gpu and local_rank >= torch.cuda.device_count():
        n_gpus = torch.cuda.device_count()
        raise UserError(
            f"{local_rank + 1} processes or more for {n_gpus} GPUs; use torchrun --nproc_per_node={n_gpus}, "
            f"or --device cpu"
        )
    if on_gpu:
        torch.cuda.set_device(local_rank)
    _end_some_time_after_a_signal()
    with lost_process_is_a_user_error():
        store, process_rank, size = next(dist.rendezvous("env://"))
        # torchrun's store outlives restarts, and holds addresses of dead processes: each restart has a prefix
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=process_rank, world_size=size, timeout=TIMEOUT)


def _end_some_time_after_a_signal():
    """Start a thread that ends this process GRACE_SECONDS after a signal.

    A process that waits inside a call for a process that is gone runs no Python, hence no signal handler.
    """
    signals, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)

    def end() -> None:
        os.read(signals, 1)
        time.sleep(GRACE_SECONDS)
        os.write(
            2,
            b"error: asked to end, but waiting for another process of this job; "
            b"--resume goes on from the last checkpoint\n",
        )
        os._exit(143)

    threading.Thread(target=end, daemon=True).start()


@contextlib.contextmanager
def lost_process_is_a_user_error() -> Iterator[None]:
    """Inside `with`, a failed call to the other processes raises UserError."""
    try:
        yield
    except RuntimeError as e:
        reason = str(e).splitlines()[0][:150]
        raise UserError(
            f"another process of this job ended or can't be reached ({reason}); "
            f"the same command with --resume goes on from the last checkpoint"
        ) from None


def barrier() -> None:
    """Wait until every process of the job has called this."""
    if world() > 1:
        with lost_process_is_a_user_error():
            dist.all_reduce(torch.zeros(1))


@contextlib.contextmanager
def rank_0_first() -> Iterator[None]:
    """Rank 0 runs the `with` block before the others, which then find what it made: a dataset, its cache."""
    if rank():
        barrier()
    yield
    if not rank():
        barrier()


def broadcast_int(x: int) -> int:
    """Rank 0's x, on every process."""
    if world() == 1:
        return x
    value = torch.tensor([int(x)])  # of one type on every process, whatever the type of its own x
    with lost_process_is_a_user_error():
        dist.broadcast(value, 0)
    return int(value)


def broadcast(x: Tensor) -> None:
    """Overwrite x with rank 0's."""
    if world() > 1:
        with lost_process_is_a_user_error():
            dist.broadcast(x, 0)


def all_reduce(x: Tensor) -> None:
    """Overwrite x with its sum over the job's processes: one collective call."""
    if world() > 1:
        with lost_process_is_a_user_error():
            dist.all_reduce(x)


def summed(*tensors: Tensor) -> list[Tensor]:
    """Each tensor's sum over the job's processes, in one collective call.

    The call also counts the processes that a signal has asked to end.
    """
    global _n_requested
    if world() == 1:
        return list(tensors)
    like = tensors[0]
    requested = like.new_full((1,), float(signals.requested is not None))
    flat = torch.cat([*(x.reshape(-1).to(like.dtype) for x in tensors), requested])
    all_reduce(flat)
    *sums, _n_requested = flat.split([*(x.numel() for x in tensors), 1])
    return [s.view(x.shape) for s, x in zip(sums, tensors, strict=True)]


def averaged(x: Tensor) -> Tensor:
    """The mean of x over the job's processes: what differed by rounding becomes the same to the bit."""
    return x if world() == 1 else summed(x)[0] / world()


def end_requested(step: int) -> int | None:
    """The signal that ends this run after update `step`, or None: the same answer on all processes."""
    if world() == 1:
        return signals.requested
    if _n_requested is None or (_n_requested.is_cuda and step % 16):  # reading it waits for the GPU
        return None
    return (signals.requested or signal.SIGTERM) if _n_requested.item() else None


def gathered_text(text: str) -> list[str]:
    """The text of every process, its first 4000 bytes."""
    rows = gathered(torch.tensor(list(text.encode()[:4000].ljust(4000, b"\0")), dtype=torch.uint8))
    return [bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore") for row in rows]


def gathered(x: Tensor) -> Tensor:
    """x (n,) of every process: (world, n), on the CPU."""
    if world() == 1:
        return x[None]
    rows = [torch.empty_like(x) for _ in range(world())]
    with lost_process_is_a_user_error():
        dist.all_gather(rows, x)
    return torch.stack(rows)
