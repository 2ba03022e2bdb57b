"""research/bench.py: every contender takes a step, contenders take turns, rows are kept."""

import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import forked
from conftest import ROOT
from research import bench
from support import UserError

SMALLEST = {  # sizes at which a step is quick
    "machine": "64x32x16",
    "teacher": "2",
    "rollout": "1",
    "acting": "student",
    "distil": "3",
    "teachers": "5",
    "surgery": "1e3",
    "update": "1e3",
    "attention": "2x4",
    "kl": "3",
}
SLOW = ("torch.compile", "ONNX")  # these compile


def contenders(peer: bool) -> list:
    """(row, name, precision) of every contender but `processes`."""
    params = []
    for what in SMALLEST:
        for name, contender in bench.ROWS[what].contenders.items():
            marks = [pytest.mark.slow] if any(word in name for word in SLOW) else []
            dtypes = contender.dtypes[:1] if "torch.compile" in name else contender.dtypes
            runs_here = name != "FlexAttention" or torch.cuda.is_available()  # no backward pass on a CPU
            if contender.peer == peer and runs_here:
                params += [pytest.param(what, name, dtype, marks=marks) for dtype in dtypes]
    return params


@pytest.mark.parametrize(("what", "name", "dtype"), contenders(peer=False))
def test_contender__takes_steps(what, name, dtype):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    step = bench.ROWS[what].contenders[name].make(device, dtype, SMALLEST[what])
    step()
    step()


# ---- other libraries, for want of which small modules stand in ---------------------------------------------

STAND_INS = {
    "transformers": """
import torch
class DecisionTransformerConfig:
    def __init__(self, **options): self.act_dim = options["act_dim"]
class DecisionTransformerModel(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head = torch.nn.Linear(11, config.act_dim)
    def forward(self, states, actions, rewards, returns_to_go, timesteps, attention_mask):
        B, K, _ = states.shape
        assert actions.shape == (B, K, 3) and returns_to_go.shape == (B, K, 1)
        assert timesteps.shape == attention_mask.shape == (B, K) == (B, 20)
        self.action_preds = self.head(states)
        return self
""",
    "d3rlpy": """
from types import SimpleNamespace
class MDPDataset:
    def __init__(self, *arrays): assert [len(x) for x in arrays] == 4 * [100_000] and arrays[3].sum() == 100
    def sample_trajectory_batch(self, n, length): return n, length
class DecisionTransformerConfig:
    def __init__(self, **options): self.batch_size = options["batch_size"]
    def create(self, device): return self
    def build_with_dataset(self, dataset): assert isinstance(dataset, MDPDataset)
    def update(self, batch): assert batch == (self.batch_size, 20)
dataset = SimpleNamespace(MDPDataset=MDPDataset)
algos = SimpleNamespace(DecisionTransformerConfig=DecisionTransformerConfig)
models = SimpleNamespace(VectorEncoderFactory=list)
""",
    "torchjd/__init__": "",
    "torchjd/aggregation": """
class PCGrad:
    def __call__(self, matrix): assert matrix.shape == (2, 1000)
""",
}


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Other libraries' modules, which see what they are called with."""
    for name, source in STAND_INS.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in STAND_INS:
        sys.modules.pop(name.replace("/__init__", "").replace("/", "."), None)


@pytest.mark.parametrize(("what", "name", "dtype"), contenders(peer=True))
def test_peer__takes_steps(stand_ins, what, name, dtype):
    step = bench.ROWS[what].contenders[name].make("cpu", dtype, SMALLEST[what])
    step()
    step()


def test_peer__needs_no_package_of_ours(stand_ins):
    """Its environment may have torch, numpy and the other library alone."""
    code = f"""
import runpy, sys
for name in ("gymnasium", "matplotlib", "minari", "mujoco", "safetensors", "tqdm", "triton", "tyro"):
    sys.modules[name] = None  # an ImportError
sys.path.append({str(stand_ins)!r})
sys.argv = ["bench", "--work", "rollout", "huggingface", "float32", "1", "cpu", "1"]
runpy.run_module("research.bench", run_name="__main__", alter_sys=True)
"""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    p = subprocess.run(command, input="2\n1\n", cwd=ROOT, env=env, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    assert [line.split()[0] for line in p.stdout.splitlines()] == ["bench:", "bench:"]


# ---- turns -------------------------------------------------------------------------------------------------


def measured(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def test_work__prints_seconds_and_memory_for_each_number_of_steps(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("3\n5\n"))
    n_steps = []
    row = bench.Row((), (), {"ours": bench.Contender(lambda *args: lambda: n_steps.append(args))})
    monkeypatch.setitem(bench.ROWS, "surgery", row)
    bench.work("surgery", "ours", "float32", "1e3", "cpu", "1")
    assert n_steps == 8 * [("cpu", "float32", "1e3")]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2
    for word, seconds, memory in lines:
        assert word == "bench:" and float(seconds) >= 0 and float(memory) > 10


@pytest.fixture
def stopwatch(tmp_path, monkeypatch):
    """Stands in for Python: in the project's folder, a step takes one second, one of a copy two."""
    python = tmp_path / "stopwatch"
    python.write_text(f"""#!/bin/sh
[ "$PWD" = "{ROOT}" ] || exit 1
[ "$1 $2 $3" = "-m research.bench --work" ] || exit 1
while read n; do
    echo some library says hello
    [ "$5" = copy ] && n=$((2 * n))
    echo "bench: $n 50"
done
""")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))


def test_main__measures_and_keeps_the_rows_not_asked_for(tmp_path, monkeypatch, stopwatch):
    monkeypatch.chdir(tmp_path)
    path = Path("bench.csv")
    old_rows = [
        "what,size,contender,dtype,ms,lowest,highest,ratio,memory_mib,device,threads,python,torch,commit",
        "kl,3,copy,float32,1,1,1,1,1,a,1,b,c,d",
        "rollout,1,ours,float32,1,1,1,1,1,a,1,b,c,d",
    ]
    path.write_text("\n".join(old_rows))
    bench.main(bench.Config(what=("kl",), rounds=3, seconds=0.01, device="cpu", out="bench.csv"))
    rows = measured(path)
    expected = [("rollout", "1", "ours")]
    for size in bench.ROWS["kl"].cpu_sizes:
        expected += [("kl", size, name) for name in bench.ROWS["kl"].contenders]
    assert [(row["what"], row["size"], row["contender"]) for row in rows] == expected
    assert rows[0]["device"] == "a"
    for row in rows[1:]:
        seconds = 2 if row["contender"] == "copy" else 1
        assert row["ms"] == row["lowest"] == row["highest"] == str(1000 * seconds)
        assert row["ratio"] == f"{seconds}.000" and row["memory_mib"] == "50"
        assert row["device"] not in ("", "a") and row["torch"] == torch.__version__
    assert Path("bench.png").stat().st_size > 5000


def test_start__says_how_to_see_why_a_contender_does_not_run(tmp_path, monkeypatch, capsys):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    peer = {"huggingface": bench.ROWS["rollout"].contenders["huggingface"]}
    monkeypatch.setitem(bench.ROWS, "rollout", bench.Row((), (), peer))
    assert bench.start("rollout", "1", "cpu", bench.Config(peers=str(python))) == []
    assert f"does not run here; to see why: cd {ROOT}; echo 1 | {python} -m" in capsys.readouterr().out
    assert bench.start("rollout", "1", "cpu", bench.Config()) == []  # no peers, nothing to say
    assert not capsys.readouterr().out


def test_absolute_program__follows_no_link(tmp_path, monkeypatch):
    """The link in an environment's bin/ is what tells Python where its packages are."""
    (tmp_path / "python").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    assert bench.absolute_program("./python") == str(tmp_path / "python")
    with pytest.raises(UserError, match="--peers ./nothing: no such program"):
        bench.absolute_program("./nothing")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["teacher", "student"])
def test_processes__step_together(name):
    (dtype,) = bench.ROWS["processes"].contenders[name].dtypes
    runner = bench.Runner(sys.executable, name, dtype, "processes", "2", "cpu", 1)
    assert runner.warm_up(0.0)
    runner.take_turn()
    runner.close()
    assert runner.process.returncode == 0 and runner.ms[0] > 0


@pytest.mark.slow
def test_command__times_ours_and_keeps_the_rows_not_asked_for(tmp_path):
    options = "--seconds 0.01 --device cpu --out bench.csv"
    forked.python(f"-m research.bench --what distil --rounds 1 {options}", tmp_path)
    forked.python(f"-m research.bench --what rollout --rounds 2 {options}", tmp_path)
    rows = measured(tmp_path / "bench.csv")
    found = [(r["what"], r["size"], r["contender"].split(",")[0]) for r in rows]
    rollout = [("rollout", "1", "ours"), ("rollout", "64", "ours")]
    assert found == [*rollout, ("distil", "3", "fixed"), *3 * [("distil", "3", "novelty")]]
    for row in rows:
        assert float(row["ms"]) > 0 and int(row["memory_mib"]) > 0 and row["torch"] and row["device"]
