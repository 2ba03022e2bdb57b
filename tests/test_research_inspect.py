"""research/inspect.py: what the kernels compile to for GPUs that are not here.

Each GPU's kernels are compiled in one process without Triton's interpreter, which conftest.py turns on.
"""

import functools
import json
import os
import subprocess
import sys

import pytest

from conftest import ROOT, triton_needed
from research import inspect

CODE = """
import json, sys
import torch
from research import inspect
torch.set_float32_matmul_precision("high")
gpu, dtype, only = sys.argv[1:]
print(json.dumps(list(inspect.rows(gpu, getattr(torch, dtype), only))))
"""
SHARED = {
    "a100": 166_912,
    "h100": 232_448,
    "b200": 232_448,
    "mi300x": 65_536,
}  # bytes that a program may have
UPDATE = "(forward|backward) (teacher|student),? .*x (60|20) x|gradient"  # what an update multiplies


def python(*argv):
    """`python *argv` with the kernels compiled."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=ROOT, env=env)


@functools.cache
def rows(gpu, dtype, only=""):
    """inspect.rows, from a process of its own."""
    p = python("-c", CODE, gpu, dtype, only)
    assert p.returncode == 0, p.stderr
    found = json.loads(p.stdout)
    assert found
    return found


def assert_sound(row, spilled=0):
    """Few spills or none, matrix units for products, wide loads where strides allow, little shared memory."""
    assert row["spilled"] <= spilled, row
    assert row["shared"] <= SHARED[row["GPU"]], row
    assert 0 < row["occupancy"] <= 1, row
    if row["kernel"] == "_head_kl":
        assert row["matrix"] > 0, row
        assert row["wide"] > 0.15, row  # hidden states; the rows of heads, 2A = 12 numbers, are not aligned
    elif row["kernel"] not in ("_dots", "_update"):
        assert row["matrix"] > 0, row
        assert row["wide"] > 0.7, row  # all but the mask
        assert row["bytes"] == "" or 1 < row["bytes"] < 2.6, row  # padding of T, and every thread's mask


@triton_needed
@pytest.mark.parametrize("gpu", ["a100", "h100"])
def test_rows__products_of_an_update_are_sound(gpu):
    found = rows(gpu, "bfloat16", UPDATE)
    assert len(found) == 13
    for row in found:
        assert_sound(row)


@triton_needed
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("gpu", SHARED)
def test_rows__all_are_sound(gpu, dtype):
    for row in rows(gpu, dtype):
        assert_sound(row, spilled=240 if dtype == "float32" and "x 128" in row["case"] else 8)


@triton_needed
def test_rows__in_ieee_precision_kl_spills_nothing_and_attention_is_pytorchs():
    code = CODE.replace('"high"', '"highest"')
    p = python("-c", code, "h100", "float32", "teacher|student|gradient|loss|tangent")
    found = json.loads(p.stdout)
    assert {(row["kernel"], row["spilled"]) for row in found} == {
        ("_dots", 0),
        ("_update", 0),
        ("_head_kl", 0),
    }
    assert not any("tangent" in row["case"] for row in found)


def test_occupancy__by_registers_shared_memory_and_programs():
    h100 = inspect.GPUS["h100"]
    assert inspect.occupancy(h100, 8, 32, 0) == 1
    assert inspect.occupancy(h100, 8, 65, 0) == 3 * 8 / 64  # 72 registers: 28 warps
    assert inspect.occupancy(h100, 8, 255, 0) == 8 / 64
    assert inspect.occupancy(h100, 4, 32, 114 << 10) == 4 / 64  # with the reserved KB, two do not fit
    assert inspect.occupancy(h100, 4, 32, 113 << 10) == 2 * 4 / 64
    assert inspect.occupancy(h100, 1, 32, 0) == 32 / 64
    mi300x = inspect.GPUS["mi300x"]
    assert inspect.occupancy(mi300x, 4, 129, 0) == 3 * 4 / 32  # 136 registers of 512
    assert inspect.occupancy(mi300x, 4, 512, 64 << 10) == 4 / 32


def test_moved__counts_bytes_by_width():
    names = [
        "LDG.E.128",
        "LDGSTS.E.BYPASS.128",
        "LDGSTS.E",
        "LDG.E.U8",
        "LDG.E.64",
        "LDGDEPBAR",
        "STG.E",
        "LDL",
    ]
    assert inspect.moved(names, inspect.LOAD) == {16: 32, 4: 4, 1: 1, 8: 8}
    assert inspect.moved(names, inspect.STORE) == {4: 4}
    names = [
        "buffer_load_dwordx4",
        "global_load_ubyte",
        "buffer_load_ushort",
        "buffer_load_dword",
        "ds_read_b128",
    ]
    assert inspect.moved(names, inspect.LOAD) == {16: 16, 1: 1, 2: 2, 4: 4}


def test_matrix__are_instructions_of_the_matrix_units():
    names = ["HMMA.16816.F32.BF16", "HGMMA.64x64x16.F32", "UTCHMMA", "v_mfma_f32_32x32x8_bf16", "HFMA2.MMA"]
    assert list(filter(inspect.MATRIX.match, names)) == names[:4]


@triton_needed
def test_main__in_the_interpreter_is_one_line(tmp_path):
    env = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "research.inspect", "--out", str(tmp_path / "x.csv")]
    p = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert p.returncode == 2
    assert p.stderr == "error: the kernels can't be compiled: TRITON_INTERPRET=1 is set; unset it\n"
