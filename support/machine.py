"""Device, precision and memory, and what a run was made on. Used by every script."""

import ctypes
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from support import UserError


def check_device(name: str) -> None:
    """Raise UserError where `name` is no device, or one that this machine lacks.

    A numbered GPU becomes the current one.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: choose cpu, cuda, cuda:<number> or auto")
    try:
        torch.empty(0, device=resolve(name))
        if name.startswith("cuda:"):
            torch.cuda.set_device(name)  # kernels and captured graphs run on the current GPU
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(f"--device {name}: not available here ({reason}); choose cpu, cuda or auto") from None


def resolve(name: str) -> str:
    """auto: cuda where there is a GPU, else cpu."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def device(cfg: Any) -> str:
    """The device of a configuration with a field `device`."""
    return resolve(cfg.device)


def gpus(cfg: Any) -> list[str]:
    """The GPUs that --device leaves the choice of, as CUDA_VISIBLE_DEVICES names them.

    Each process of a torchrun job has its own one.
    """
    if device(cfg) != "cuda":
        return []
    n = torch.cuda.device_count()
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = listed.split(",")[:n] if listed else [str(i) for i in range(n)]
    if "LOCAL_RANK" in os.environ:
        return [names[int(os.environ["LOCAL_RANK"])]]
    return names


def bfloat16(cfg: Any) -> bool:
    """Whether the blocks' products run in bfloat16. --dtype auto: where the device multiplies it natively."""
    if cfg.dtype != "auto":
        return cfg.dtype == "bfloat16"
    if device(cfg) != "cpu":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
    else:
        capabilities = {"amx_bf16": torch.cpu._is_amx_tile_supported()}
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))


def describe(cfg: Any) -> dict[str, Any]:
    """What a run was made on: device, threads, precision, versions, commit ("+": uncommitted changes)."""
    return {
        "device": torch.cuda.get_device_name() if device(cfg).startswith("cuda") else _processor(),
        "threads": torch.get_num_threads(),
        "dtype": "bfloat16" if bfloat16(cfg) else "float32",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def _processor():
    cpuinfo = Path("/proc/cpuinfo")
    model_name = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return model_name[1] if model_name else platform.machine()


def commit() -> str:
    """Of the code, as git abbreviates it; "+": with uncommitted changes."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return ""
    return found.stdout.strip()


def keep_freed_memory() -> None:
    """Have glibc's malloc keep freed memory instead of returning it to the system.

    Each update frees and allocates the same tens of megabytes. Returning them costs a sixth of its time, for
    page faults.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its largest: larger tensors are mapped each time
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
