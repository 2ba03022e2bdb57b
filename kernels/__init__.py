"""The three operations of a training step: attention, the KL divergence, and the parameter update.

Each file holds the formula, a plain PyTorch reference, the Triton kernels and the public functions, and says
who calls those. This module decides which path they take. distill.py and teacher.py ask it too, before they
capture a CUDA graph.

The kernels run on a GPU. The references run everywhere else: on a CPU, in float64, without Triton (macOS,
Windows), without a C compiler (Triton builds its launchers with one), at sizes a kernel was not made for,
for float32 attention in IEEE precision on NVIDIA's GPUs (PyTorch's default), and where tiles exceed the GPU's
shared memory (float32 on a small GPU).
Tests run the kernels on a CPU too, in Triton's interpreter: TRITON_INTERPRET=1, and `on_cpu` set to True.
"""

import os
import shutil

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:

    class triton:  # as much as the decorators and signatures of the kernels need
        __version__ = None
        jit = staticmethod(lambda f: f)

    class tl:
        constexpr = None


INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton itself reads it when a kernel is decorated
DTYPES = (torch.float32, torch.bfloat16)  # that the kernels take
on_cpu = False  # True in tests only


def _missing() -> str:
    """What the kernels need and this machine lacks; "" if nothing."""
    if triton.__version__ is None:
        return "Triton"
    if INTERPRET or os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"):
        return ""
    return "C compiler"


MISSING = _missing()


# ---- which path to take ------------------------------------------------------------------------------------


def available(*tensors: Tensor) -> bool:
    """Whether the kernels can take these tensors: their types, and the devices they are on."""
    if MISSING:
        return False
    return all(x.dtype in DTYPES and (x.is_cuda or (on_cpu and INTERPRET)) for x in tensors)


def multiplies(dtype: torch.dtype) -> bool:
    """Whether the GPU's matrix units multiply this type in the precision asked for.

    NVIDIA's have no IEEE float32, PyTorch's default: Triton would write out such products number by number,
    and 14 KB a thread would not fit the registers. With three TF32 products in place of each, 10 KB would not
    (docs/log.md).
    """
    return INTERPRET or dtype == torch.bfloat16 or precision() == "tf32" or torch.version.hip is not None


def fits(tensor: Tensor, numbers: int) -> bool:
    """Whether tiles that hold so many numbers of the tensor's type fit in the shared memory of its GPU."""
    if not tensor.is_cuda:
        return True
    gpu = torch.cuda.get_device_properties(tensor.device)
    return numbers * tensor.element_size() <= gpu.shared_memory_per_block_optin


def compiled(device: torch.device | str) -> bool:
    """Whether the kernels run compiled on `device`. A step can then be captured as a CUDA graph."""
    return not MISSING and not INTERPRET and torch.device(device).type == "cuda"


def path(device: torch.device | str) -> str:
    """Which path runs on `device`, in words, for the first line that a script prints."""
    if torch.device(device).type != "cuda":
        return "plain PyTorch, no GPU"
    if MISSING:
        return f"plain PyTorch, no {MISSING}"
    return f"Triton {triton.__version__}"


# ---- shared by the launches --------------------------------------------------------------------------------


def precision() -> str:
    """Precision of float32 products, the same as PyTorch's own (torch.set_float32_matmul_precision).

    AMD's GPUs multiply float32 exactly, and most of them have no TF32.
    """
    return "ieee" if torch.get_float32_matmul_precision() == "highest" or torch.version.hip else "tf32"


def dot_type(dtype: torch.dtype) -> "tl.dtype":
    """The type in which a kernel's products take their inputs.

    float32 in the interpreter, which would multiply the bit patterns of bfloat16 as integers.
    """
    return tl.bfloat16 if dtype == torch.bfloat16 and not INTERPRET else tl.float32


def padded(n: int) -> int:
    """The size of a tile with room for n rows or columns: a power of two, at least 16 as tl.dot needs."""
    return max(16, triton.next_power_of_2(n))
