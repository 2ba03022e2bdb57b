"""kernels/__init__.py: which path is taken; and that every operation keeps to it."""

import os
import subprocess
import sys

import pytest
import torch

import kernels
import kernels.attention
import kernels.kl
from conftest import DEVICE, ROOT, normal, triton_needed


@triton_needed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_available__takes_float32_and_bfloat16(dtype, monkeypatch):
    x = torch.zeros(2, dtype=dtype, device=DEVICE)
    monkeypatch.setattr(kernels, "on_cpu", True)
    assert kernels.available(x) == (dtype in kernels.DTYPES)
    assert not kernels.available(x, x.double())


def test_available__leaves_a_cpu_to_pytorch():
    assert not kernels.available(torch.zeros(2))
    assert kernels.path("cpu") == "plain PyTorch, no GPU"
    assert not kernels.compiled("cpu")


def test_path__without_triton_is_plain_pytorch():
    code = """
import sys
sys.modules["triton"] = None
import torch
import kernels
from kernels.attention import attention
from kernels.kl import head_kl
from kernels.project import project
assert kernels.path("cuda") == "plain PyTorch, no Triton" and kernels.path("cpu") == "plain PyTorch, no GPU"
assert attention(torch.randn(1, 3, 12), torch.ones(1, 3, dtype=torch.bool), 1).shape == (1, 3, 4)
assert not project(torch.ones(3), -torch.ones(3)).any()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@triton_needed
def test_path__without_a_c_compiler_is_plain_pytorch():
    code = """
import kernels
assert kernels.path("cuda") == "plain PyTorch, no C compiler" and not kernels.compiled("cuda")
"""
    env = {name: value for name, value in os.environ.items() if name not in ("CC", "TRITON_INTERPRET")}
    env["PATH"] = "/nowhere"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=env)


@pytest.mark.parametrize(
    ("precision", "hip", "wanted"),
    [("highest", None, False), ("high", None, True), ("highest", "6.2", True), ("high", "6.2", True)],
)
def test_multiplies__float32_in_ieee_precision_on_amd_alone(precision, hip, wanted, monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRET", False)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    assert kernels.multiplies(torch.bfloat16)
    assert kernels.multiplies(torch.float32) == wanted
    assert kernels.precision() == ("tf32" if precision == "high" and not hip else "ieee")


@triton_needed
@pytest.mark.parametrize(("fits", "multiplies"), [(True, True), (False, True), (True, False)])
def test_available__what_does_not_fit_is_not_launched_nor_attention_without_matrix_units(
    fits, multiplies, monkeypatch
):
    launched = []
    for module in (kernels.attention, kernels.kl):

        def launch(*args, real=module._launch, **options):
            launched.append(real)
            return real(*args, **options)

        monkeypatch.setattr(module, "_launch", launch)
    monkeypatch.setattr(kernels, "on_cpu", True)
    monkeypatch.setattr(kernels, "fits", lambda tensor, numbers: fits)
    monkeypatch.setattr(kernels, "multiplies", lambda dtype: multiplies)
    gen = torch.Generator().manual_seed(0)
    mask = torch.ones(2, 5, dtype=torch.bool, device=DEVICE)
    task = torch.zeros(2, dtype=torch.long, device=DEVICE)
    act_dims = torch.tensor([2], device=DEVICE)
    y = kernels.attention.attention(normal(gen, 2, 5, 48), mask, 1)
    head = (normal(gen, 1, 16, 4), normal(gen, 1, 4))
    target = (normal(gen, 2, 5, 2), normal(gen, 2, 5, 2))
    sums, _ = kernels.kl.head_kl(y, *head, *target, mask, task, act_dims)
    assert y.isfinite().all()
    assert sums.isfinite().all()
    assert len(launched) == fits * (1 + multiplies)  # KL in any precision


def test_tiles__of_the_default_sizes_fit_common_gpus():
    T4 = 65_536  # bytes of shared memory that a block may have: sm_75
    RTX = 101_376  # sm_89
    A100 = 166_912  # sm_80
    student = kernels.attention.tiles(60, 64, torch.float32)
    teacher = kernels.attention.tiles(60, 128, torch.bfloat16)
    assert 2 * teacher <= RTX  # in bfloat16
    assert 4 * student <= RTX  # in float32
    assert 4 * kernels.attention.tiles(60, 128, torch.float32) > A100
    assert 4 * kernels.kl.tiles(20, 64, 8) <= T4
