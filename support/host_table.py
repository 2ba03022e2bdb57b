"""Data too large for the training device: a memory-mapped table, read ahead by a thread. Used by data.py."""

import concurrent.futures
import math
import os
import tempfile

import numpy as np
import torch
from torch import Tensor

from support import UserError, minari_files


def free_bytes(device: torch.device | str) -> float:
    """A GPU's free memory; on a CPU the machine's memory, divided by the number of processes of a job."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        n_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return math.inf
    return n_bytes / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


class HostTable:
    """table (S, columns) on the host; `fetch` copies rows of it to the device from pinned memory."""

    def __init__(self, shape: tuple[int, int], device: torch.device, dtype: torch.dtype = torch.float32):
        self.table = mapped(shape, dtype)
        self.device = device
        self.thread = concurrent.futures.ThreadPoolExecutor(1)
        self.pending = None  # the thread's read of the rows that are probably fetched next

    def read_ahead(self, rows: Tensor) -> None:
        """Read rows (B, K), probably those of the next `fetch`, while the device is busy with its update."""
        self.pending = self.thread.submit(self._read, rows.cpu())

    def _read(self, rows):
        x = self.table[rows]
        return rows, x.pin_memory() if self.device.type == "cuda" else x

    def fetch(self, rows: Tensor) -> Tensor:
        """rows (B, K) -> (B, K, columns) on the device. Only rows that were not read ahead are read now."""
        rows = rows.cpu()
        if self.pending is None:
            guessed, x = self._read(rows)
        else:
            guessed, x = self.pending.result()
        self.pending = None
        if guessed.shape != rows.shape:
            guessed, x = self._read(rows)
        wrong = (guessed != rows).any(1)
        if wrong.any():
            x[wrong] = self.table[rows[wrong]]
        return x.to(self.device, non_blocking=True)


def mapped(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros in a file that has no name and disappears with the process.

    Raises UserError where the disk has no room for it.
    """
    n_bytes = dtype.itemsize * math.prod(shape)
    numpy_type = torch.empty(0, dtype=dtype).numpy().dtype
    reservable = hasattr(os, "posix_fallocate")
    folder = minari_files.CACHE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as f:
            if reservable:  # a full disk is found now; later it would be a SIGBUS
                os.posix_fallocate(f.fileno(), 0, n_bytes)
            return torch.from_numpy(np.memmap(f, numpy_type, "r+" if reservable else "w+", shape=shape))
    except OSError as e:
        raise UserError(
            f"no room for {n_bytes / 1e9:.1f} GB in {folder} ({e.strerror}); "
            f"set MANYTEACHERS_CACHE to a folder on a larger disk, or use --data-device device"
        ) from None
