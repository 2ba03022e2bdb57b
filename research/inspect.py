"""What the Triton kernels compile to, for GPUs that are not here -> research/results/inspect.csv

    python -m research.inspect                # every GPU below: minutes; later runs from Triton's cache
    python -m research.inspect --gpus h100

Used by whoever changes a kernel, with no GPU at hand. Each case calls the project's own launch functions on
fake tensors (shapes and types without numbers), at the sizes of the default settings. What they launch is
recorded and handed to Triton's own launcher, up to the point where it would start; the machine code is read.

    registers    of a thread; NVIDIA's may have 255, AMD's 512
    spilled      bytes of a thread's stack: what exceeded the registers, and lies in memory
    shared       bytes of shared memory of a program
    occupancy    share of a multiprocessor's warps that can run at once
    programs     of a launch; where they are fewer than the multiprocessors, occupancy matters little
    matrix       instructions of the matrix units: HMMA, HGMMA, UTCHMMA; MFMA
    wide         share of the bytes loaded from global memory that 16-byte instructions load
    bytes        that loads and stores ask for, over the formula's at the head of the kernel's file. Each
                 instruction counts once, in masked threads too; empty for blocks, which loop over the keys
    H100 us      roofline, COMPUTED AND NOT MEASURED: by the formulas, the larger of bytes / 3.35 TB/s and
                 operations / peak (989.4 TFLOPS in bfloat16, 494.7 in TF32, dense: NVIDIA's H100 SXM data
                 sheet). To start a kernel takes about 2 us more.
"""

import contextlib
import csv
import dataclasses
import io
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import distill
import kernels
import model as dt
import muon
import teacher
from kernels import attention, kl, project, triton
from research.variants import LONG_STUDENT, LONG_TEACHER
from support import UserError, files

OBS_DIMS = (11, 17, 17)  # of hopper, halfcheetah, walker2d
ACT_DIMS = (3, 6, 6)
H100_BYTES = 3.35e12  # a second
H100_FLOPS = {torch.bfloat16: 989.4e12, torch.float32: 494.7e12}  # a second


class GPU(NamedTuple):
    """Limits of a multiprocessor, but for its number and a program's shared memory.

    NVIDIA's: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; 1 KB of shared
    memory is reserved in each program. AMD's: CDNA 3 Instruction Set Architecture; LLVM's AMDGPU backend.
    """

    target: tuple[str, int | str, int]  # backend, architecture, threads of a warp
    multiprocessors: int
    program_shared: int  # bytes of shared memory that a program may have
    shared: int  # bytes
    registers: int  # of each of its four parts
    unit: int  # registers are given to a warp in multiples of it
    warps: int
    programs: int


GPUS = {
    "a100": GPU(("cuda", 80, 32), 108, 163 << 10, 164 << 10, 16384, 256, 64, 32),
    "h100": GPU(("cuda", 90, 32), 132, 227 << 10, 228 << 10, 16384, 256, 64, 32),
    "b200": GPU(("cuda", 100, 32), 148, 227 << 10, 228 << 10, 16384, 256, 64, 32),
    "mi300x": GPU(("hip", "gfx942", 64), 304, 64 << 10, 64 << 10, 32768, 512, 32, 16),
}


@dataclasses.dataclass
class Config:
    gpus: tuple[Literal[tuple(GPUS)], ...] = tuple(GPUS)  # sm_80, sm_90, sm_100, gfx942
    out: str = str(Path(__file__).parent / "results" / "inspect.csv")


RUNS = (  # types, precision of float32 products, and the kernels to report
    (torch.bfloat16, "high", ""),
    (torch.float32, "high", ""),  # TF32
    (torch.float32, "highest", "head_kl"),  # IEEE: PyTorch's default
)

# ---- what the defaults launch ------------------------------------------------------------------------------


class Case(NamedTuple):
    name: str
    launch: Callable[[], Any]
    costs: dict[str, tuple[float, float]]  # by the kernel's last word: a launch's bytes and operations


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def attention_case(name: str, B: int, T: int, C: int, dtype: torch.dtype, dropout: float = 0.0) -> Case:
    """Forward, backward and tangent, one head: 2, 5 and 5 products of 2 B T T C operations."""

    def launch():
        qkv = empty(B, T, 3 * C, dtype=dtype)
        if not kernels.fits(qkv, attention.tiles(T, C, dtype)):
            return  # PyTorch's attention runs
        inputs = (qkv, empty(B, T, dtype=torch.uint8), empty(dtype=torch.int64))  # and mask, seed
        out = attention._Attention.forward(*inputs, 1, dropout)
        ctx = SimpleNamespace(saved_tensors=(*inputs, *out), n_head=1, p=dropout)
        attention._Attention.backward(ctx, torch.empty_like(out[0]))
        attention._Tangent.forward(torch.empty_like(qkv), *inputs, *out, 1, dropout)

    n = B * T * C * dtype.itemsize
    product = 2 * B * T * T * C
    backward = (7 * n, 5 * product)
    costs = {"forward": (4 * n, 2 * product), "backward": backward, "tangent": backward}
    return Case(f"{name}, {B} x {T} x {C}", launch, costs)


def kl_case(name: str, B: int, K: int, C: int, dtype: torch.dtype, direction: str) -> Case:
    """name: loss (alone), gradient (with it) or tangent: 1, 3 and 3 products of 4 B K C A operations."""
    N = len(ACT_DIMS)
    A = max(ACT_DIMS)

    def launch():
        head = (empty(B, K, C, dtype=dtype), empty(N, C, 2 * A), empty(N, 2 * A))
        indices = (empty(B, dtype=torch.int64), empty(N, dtype=torch.int64))
        targets = (empty(B, K, A), empty(B, K, A), empty(B, K, dtype=torch.uint8), *indices, None)
        tangents = head if name == "tangent" else ()
        kl._launch(*head, targets, (direction, 0.05, 1.0), name == "gradient", tangents)

    passes = 1 if name == "loss" else 2  # over what has the hidden states' size
    n_bytes = passes * B * K * C * dtype.itemsize + 2 * B * K * A * 4
    return Case(f"{name}, {B} x {K} x {C}", launch, {"kl": (n_bytes, (2 * passes - 1) * 4 * B * K * C * A)})


def update_case(name: str, cfg: dt.ModelConfig, surgery: bool) -> Case:
    """Both kernels of a parameter update, 8P and 36P bytes with surgery."""
    model = dt.DecisionTransformer(cfg)
    P = len(dt.flatten(model))
    n_adamw = P - sum(map(math.prod, muon.shapes(model)))

    def launch():
        previous = empty(P) if surgery else None
        alive = empty(dtype=torch.bool)
        project.project_adamw(
            empty(P), empty(P), previous, empty(P), empty(P), empty(4), alive, n_adamw=n_adamw
        )

    costs = {"dots": ((8 if surgery else 4) * P, 6 * P), "update": ((36 if surgery else 28) * P, 20 * P)}
    return Case(f"{name}, {P} parameters", launch, costs)


def cases(dtype: torch.dtype) -> Iterator[Case]:
    """What the default settings launch in this precision, with a context of 20 timesteps, and some others."""
    t = teacher.Config(**LONG_TEACHER)
    s = distill.Config(**LONG_STUDENT)
    K = t.context
    probes = s.probe_windows * len(ACT_DIMS)
    if kernels.multiplies(dtype):
        for name, dropout, T in (("", 0.0, 3 * K), (", dropout", 0.1, 3 * K), (", context 50", 0.0, 150)):
            yield attention_case(f"teacher, three tokens{name}", t.batch_size, T, t.n_embd, dtype, dropout)
            yield attention_case(f"student, three tokens{name}", s.batch_size, T, s.n_embd, dtype, dropout)
        yield attention_case("teacher", t.batch_size, K, t.n_embd, dtype)
        yield attention_case("student", s.batch_size, K, s.n_embd, dtype)
        yield kl_case("tangent", probes, K, s.n_embd, dtype, s.kl)
    yield kl_case("gradient", s.batch_size, K, s.n_embd, dtype, s.kl)
    yield kl_case("loss", probes, K, s.n_embd, dtype, s.kl)
    if dtype == torch.float32:
        of_teacher = dt.ModelConfig(OBS_DIMS[:1], ACT_DIMS[:1], t.n_layer, t.n_head, t.n_embd, K)
        of_student = dt.ModelConfig(OBS_DIMS, ACT_DIMS, s.n_layer, s.n_head, s.n_embd, K)
        yield update_case("teacher", of_teacher, False)
        yield update_case("student, surgery", of_student, True)


# ---- recording and compiling -------------------------------------------------------------------------------


def driver(gpu: GPU) -> SimpleNamespace:
    """As much of a GPU's driver as Triton's launcher asks for before it compiles."""
    target = triton.backends.compiler.GPUTarget(*gpu.target)
    return SimpleNamespace(
        get_current_device=lambda: gpu.target,  # by which Triton keeps what it has compiled
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target,
    )


def pointer(tensor: Tensor) -> SimpleNamespace:
    """A fake tensor as Triton's launcher sees it: an address, in an aligned allocation below 2 GB."""
    address = tensor.storage_offset() * tensor.itemsize
    return SimpleNamespace(dtype=tensor.dtype, data_ptr=lambda: address, ptr_range=lambda: 0)


@contextlib.contextmanager
def pretended(gpu: GPU) -> Iterator[list[tuple]]:
    """PyTorch as on this GPU; every launch is recorded: kernel, arguments, grid and options."""
    launches = []

    def record(kernel, *args, grid, warmup, **options):
        launches.append((kernel, [pointer(x) if isinstance(x, Tensor) else x for x in args], grid, options))

    properties = SimpleNamespace(
        multi_processor_count=gpu.multiprocessors, shared_memory_per_block_optin=gpu.program_shared
    )
    with (
        mock.patch.object(triton.runtime.jit.JITFunction, "run", record),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device: properties),
        mock.patch.object(torch.version, "hip", gpu.target[0] == "hip" or None),
        FakeTensorMode(),
    ):
        yield launches


def nvidia_code(binary: bytes) -> tuple[int, int, list[str]]:
    """Registers, bytes of stack and the instructions' names, from the tools in Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(binary)
        f.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", f.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack), re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", text)


def amd_code(text: str) -> tuple[int, int, list[str]]:
    """The same from the assembly, in which the compiler notes both."""
    registers = re.search(r"\.vgpr_count:\s*(\d+)", text)[1]
    stack = re.search(r"\.private_segment_fixed_size:\s*(\d+)", text)[1]
    return int(registers), int(stack), re.findall(r"^\t(\w+_\w+)", text, re.MULTILINE)


# ---- what the machine code says ----------------------------------------------------------------------------

LOAD = re.compile(r"LDG[.S]|(global|buffer)_load")
STORE = re.compile(r"STG|(global|buffer)_store")
MATRIX = re.compile(r"HMMA|HGMMA|UTC\w*MMA|v_mfma")
WIDTHS = {"x4": 16, ".128": 16, "x2": 8, ".64": 8, "short": 2, "16": 2, "byte": 1, "8": 1}  # bytes; else 4


def moved(names: list[str], pattern: re.Pattern) -> Counter:
    """Bytes of a thread by the width of the instructions, of those that match."""
    total = Counter()
    for name in filter(pattern.match, names):
        width = next((w for part, w in WIDTHS.items() if part in name), 4)
        total[width] += width
    return total


def occupancy(gpu: GPU, warps: int, registers: int, shared: int) -> float:
    """Share of a multiprocessor's warps that programs of so many warps can fill."""
    of_warp = math.ceil(registers * gpu.target[2] / gpu.unit) * gpu.unit
    by_registers = 4 * min(gpu.registers // of_warp, gpu.warps // 4) // warps
    reserved = gpu.shared - gpu.program_shared
    by_shared = gpu.shared // max(shared + reserved, 1)
    return min(by_registers, by_shared, gpu.programs) * warps / gpu.warps


def rows(gpu_name: str, dtype: torch.dtype, only: str = "") -> Iterator[dict[str, Any]]:
    """A row for each launch of the cases whose name and kernels' names match the pattern `only`."""
    gpu = GPUS[gpu_name]
    with pretended(gpu):
        multiplied = list(cases(dtype))
    triton.runtime.driver.set_active(driver(gpu))
    for case in multiplied:
        with pretended(gpu) as launches:
            case.launch()
        for kernel, args, grid, options in launches:
            if not re.search(only, f"{kernel.__name__} {case.name}"):
                continue
            compiled = kernel.run(*args, grid=grid, warmup=True, **options)
            cubin = compiled.asm.get("cubin")
            registers, stack, names = nvidia_code(cubin) if cubin else amd_code(compiled.asm["amdgcn"])
            loads = moved(names, LOAD)
            warps = compiled.metadata.num_warps
            shared = compiled.metadata.shared
            asked = (loads + moved(names, STORE)).total() * gpu.target[2] * warps * math.prod(grid)
            n_bytes, operations = case.costs[kernel.__name__.split("_")[-1]]
            yield {
                "GPU": gpu_name,
                "kernel": kernel.__name__,
                "case": case.name,
                "precision": "bfloat16" if dtype == torch.bfloat16 else options.get("PRECISION", "float32"),
                "registers": registers,
                "spilled": stack,
                "shared": shared,
                "occupancy": occupancy(gpu, warps, registers, shared),
                "programs": math.prod(grid),
                "matrix": len(list(filter(MATRIX.match, names))),
                "wide": loads[16] / loads.total(),
                "bytes": "" if "block" in kernel.__name__ else asked / n_bytes,
                "H100 us": 1e6 * max(n_bytes / H100_BYTES, operations / H100_FLOPS[dtype]),
            }


def main(cfg: Config) -> None:
    """Compile all, print a row each, and write the CSV."""
    if kernels.MISSING or kernels.INTERPRET:
        reason = f"no {kernels.MISSING} here" if kernels.MISSING else "TRITON_INTERPRET=1 is set; unset it"
        raise UserError(f"the kernels can't be compiled: {reason}")
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    for gpu in cfg.gpus:
        for dtype, precision, only in RUNS:
            torch.set_float32_matmul_precision(precision)
            for row in rows(gpu, dtype, only):
                if not text.tell():
                    out.writerow(row)
                cells = [f"{x:.3g}" if isinstance(x, float) else x for x in row.values()]
                out.writerow(cells)
                print(*cells, sep="  ", flush=True)
    files.write(Path(cfg.out), text.getvalue().encode())


if __name__ == "__main__":
    from support import cli

    cli.run(main, Config, __doc__)
