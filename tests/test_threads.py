"""How long PyTorch's threads wait for each other, as the scripts set it (support/__init__.py)."""

import os
import re
import subprocess
import sys

import pytest

from conftest import ROOT, slow

gnu = pytest.mark.skipif(sys.platform != "linux", reason="other systems' PyTorch has another OpenMP")


def spin_count(script, **env):
    """What libgomp says when `python SCRIPT --help` imports torch."""
    variables = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    p = subprocess.run(
        [sys.executable, ROOT / f"{script}.py", "--help"],
        env={**variables, "OMP_DISPLAY_ENV": "VERBOSE", **env},
        capture_output=True,
        text=True,
    )
    assert p.returncode == 0, p.stderr
    return re.findall("GOMP_SPINCOUNT = '(.*)'", p.stderr)


@gnu
@pytest.mark.parametrize("script", ["teacher", "distill", *slow("evaluate", "export")])
def test_spin_count__is_set_before_torch_is_imported(script):
    assert spin_count(script) == ["1000"]


@gnu
@pytest.mark.parametrize(
    ("variable", "value", "expected"), [("GOMP_SPINCOUNT", "77", "77"), ("OMP_WAIT_POLICY", "PASSIVE", "0")]
)
def test_spin_count__is_the_user_s_where_there_is_one(variable, value, expected):
    assert spin_count("teacher", **{variable: value}) == [expected]
