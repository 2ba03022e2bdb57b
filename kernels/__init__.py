"""The hot loop's three operations. Each file: the formula, a plain PyTorch reference, the Triton kernels, the public functions.

Kernels run on a GPU; everything else takes the references: a CPU, float64, no Triton (macOS, Windows), no C compiler, which Triton's launchers are built with,
sizes a kernel was not made for, or that leave the GPU's shared memory (float32 on a small one).
Tests run them on a CPU too, in Triton's interpreter (TRITON_INTERPRET=1, and `on_cpu` set).
"""

import os
import shutil

import torch

try:
    import triton
    import triton.language as tl
except ImportError:

    class triton:  # what decorators and signatures need
        __version__ = None
        jit = staticmethod(lambda f: f)

    class tl:
        constexpr = None


INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton itself reads it when a kernel is decorated
MISSING = (
    "Triton"
    if triton.__version__ is None
    else ""
    if INTERPRET or os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    else "C compiler"
)
DTYPES = (torch.float32, torch.bfloat16)
on_cpu = False  # tests alone set it


def available(*tensors) -> bool:
    """Whether the kernels can take these tensors."""
    return not MISSING and all(x.dtype in DTYPES and (x.is_cuda or (on_cpu and INTERPRET)) for x in tensors)


def fits(tensor, numbers) -> bool:
    """Whether a program whose tiles hold so many numbers of the tensor's type has room for them in the shared memory of its GPU."""
    return (
        not tensor.is_cuda
        or numbers * tensor.element_size()
        <= torch.cuda.get_device_properties(tensor.device).shared_memory_per_block_optin
    )


def compiled(device) -> bool:
    """Whether kernels run on `device`, compiled: a step can then be captured as a CUDA graph."""
    return not MISSING and not INTERPRET and torch.device(device).type == "cuda"


def path(device) -> str:
    """Which path runs on `device`, in words, for the line a script prints at its start."""
    if torch.device(device).type != "cuda":
        return "plain PyTorch, no GPU"
    return f"plain PyTorch, no {MISSING}" if MISSING else f"Triton {triton.__version__}"


def precision() -> str:
    """Of float32 products: as PyTorch's own are set (torch.set_float32_matmul_precision)."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
