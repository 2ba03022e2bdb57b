"""research/bench.py: every contender takes a step, contenders take turns, rows are kept."""

import csv
import dataclasses
import io
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import distill
import forked
import model as dt
import teacher
from conftest import ROOT
from research import bench, tables
from support import UserError

SMALLEST = {  # sizes at which a step is quick
    "machine": "64x32x16",
    "teacher": "2",
    "rollout": "1",
    "acting": "student",
    "distil": "3",
    "teachers": "5",
    "share": "3",
    "surgery": "1e3",
    "update": "1e3",
    "attention": "2x4",
    "kl": "3",
    "optimizer": "student",
}
SLOW = ("torch.compile", "ONNX")  # these compile


def contenders(peer: bool) -> list:
    """(row, name, precision) of every contender but those of `processes` and of rows that train."""
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
GPT2Model = None
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
import torch
from types import SimpleNamespace
seed = int
class Transformer(torch.nn.Module):
    def forward(self, states, actions, rtg, timesteps, padding):
        assert states.shape[:2] == actions.shape[:2] == timesteps.shape == padding.shape
        assert rtg.shape == (*padding.shape, 1) and not self.training
        assert (timesteps[padding == 0] > 0).all() and (timesteps[padding == 1] == 0).all()
        return torch.zeros_like(actions)
class MDPDataset:
    def __init__(self, *arrays):
        assert [len(x) for x in arrays] == 4 * [100_000] and arrays[3].sum() == 100
        assert arrays[3][999] == 1
    def sample_trajectory_batch(self, n, length): return n, length
class DecisionTransformerConfig:
    def __init__(self, **options): self.batch_size = options["batch_size"]
    def create(self, device): return self
    def build_with_dataset(self, dataset):
        assert isinstance(dataset, MDPDataset)
        self.impl = SimpleNamespace(modules=SimpleNamespace(transformer=Transformer()))
    def update(self, batch): assert batch == (self.batch_size, 20)
dataset = SimpleNamespace(MDPDataset=MDPDataset)
algos = SimpleNamespace(DecisionTransformerConfig=DecisionTransformerConfig)
models = SimpleNamespace(VectorEncoderFactory=lambda sizes, **options: sizes)
optimizers = SimpleNamespace(AdamWFactory=dict, WarmupSchedulerFactory=int)
""",
    "torchjd/__init__": "",
    "torchjd/aggregation": """
class PCGrad:
    def __call__(self, matrix): assert matrix.shape == (2, 1000)
""",
    "tensordict/__init__": """
class TensorDict(dict):
    def __init__(self, fields, batch_size): super().__init__(fields)
""",
    "tensordict/nn": "TensorDictModule = lambda module, in_keys, out_keys: module",
    "torchrl/__init__": "",
    "torchrl/modules": """
import torch
TanhDelta = None
class DTActor(torch.nn.Module):
    def __init__(self, state_dim, action_dim, config):
        super().__init__()
        self.zero = torch.nn.Parameter(torch.zeros(()))
    def forward(self, states): return states[..., :3] + 0 * self.zero
class ProbabilisticActor(torch.nn.Module):
    def __init__(self, module, **options):
        super().__init__()
        self.module = module
    def forward(self, windows):
        assert windows["action_cat"].shape[1:] == (20, 3) and windows["return_to_go_cat"].shape[1:] == (20, 1)
        return {"action": self.module(windows["observation_cat"])}
""",
    "torchrl/objectives": """
import torch
class DTLoss(torch.nn.Module):
    def __init__(self, actor, loss_function):
        super().__init__()
        self.actor = actor
    def set_keys(self, action_target): self.target = action_target
    def forward(self, windows):
        return {"loss": (self.actor(windows)["action"] - windows[self.target]).square().mean()}
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


# ---- training ----------------------------------------------------------------------------------------------

OF_PEERS = [name for name, contender in bench.ROWS["to-nll"].contenders.items() if contender.peer]
OURS = [
    (what, name)
    for what in ("to-nll", "teacher-to-nll", "student-to-kl")
    for name, contender in bench.ROWS[what].contenders.items()
    if not contender.peer
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What contenders train on: a task of 100 episodes with short ones held out, or two tasks' teachers."""
    tasks = [bench.task(0), bench.task(1, 17, 6)]
    tasks = [dataclasses.replace(t, name=f"task{i}", dataset=f"task{i}") for i, t in enumerate(tasks)]
    sets = {}
    for t in tasks:
        train = bench.table(100_000 if t is tasks[0] else 2000, t.obs_dim, t.act_dim)
        held_out = bench.table(300, t.obs_dim, t.act_dim)
        held_out[:, -1] %= 30
        sets[t.name] = data.Dataset(t, train, held_out, np.zeros(100), np.full(100, 1000), 0.0)
    sets["hopper"] = sets["task0"]
    monkeypatch.setattr(data, "load", lambda name, seed=0, like=None: sets[name])
    models = [dt.DecisionTransformer(dt.ModelConfig.of([t], n_layer=1, n_embd=8)) for t in tasks]
    found = [teacher.Teacher(model, t, {}) for model, t in zip(models, tasks, strict=True)]
    monkeypatch.setattr(teacher, "find", lambda cfg: found if cfg.teachers else [])
    monkeypatch.setattr(distill, "cache_targets", lambda models, windows: None)
    bench.write_folder(tmp_path, bench.Config(updates=7, teachers=("teacher",)))
    return tmp_path


def test_write_folder__holds_what_teacher_py_measures(folder):
    columns, held_out = bench.offline_data(str(folder), "cpu")
    dataset = data.load("hopper")
    expected = data.Windows([dataset.held_out], [dataset.task], 20).spread(256)
    torch.testing.assert_close(torch.cat((*columns[:2],), 1), torch.from_numpy(dataset.train[:, :14]))
    torch.testing.assert_close(columns[2], torch.from_numpy(dataset.train[:, 14]) / 1000)
    names = ("states", "actions", "rtg", "timesteps", "mask")
    for name, x in zip(names, held_out, strict=True):
        scale = 1000 if name == "rtg" else 1
        torch.testing.assert_close(x, getattr(expected, name) / scale, check_dtype=name == "rtg")
    assert not held_out[4].all()
    assert bench.settings(str(folder)) == {"updates": 7, "teachers": [str(Path("teacher").resolve())]}


@pytest.mark.parametrize(("what", "name"), OURS)
def test_training__takes_updates_and_measures_the_held_out_loss(folder, what, name):
    before = bench.TEACHER_BEFORE if "nll" in what else bench.STUDENT_BEFORE
    today = teacher.Config if "nll" in what else distill.Config
    training = bench.ROWS[what].contenders[name].make("cpu", "float32", str(folder))
    assert training.steps == (before["steps"] if name in ("before", "one token") else today.steps)
    training()
    first = training.held_out()
    assert training.held_out() == first
    for _ in range(5):
        training()
    assert training.done == 6
    assert math.isfinite(training.held_out()) and training.held_out() != first


@pytest.mark.parametrize("name", OF_PEERS)
def test_peers_training__takes_updates_and_measures_the_held_out_loss(stand_ins, folder, name):
    training = bench.ROWS["to-nll"].contenders[name].make("cpu", "float32", str(folder))
    training()
    training()
    assert training.steps == 7 and training.done == 2
    # uniform actions in [-1, 1]: a Gaussian about zero has 0.87 nats
    assert 0.8 < training.held_out() < 2
    if name == "torchrl":  # its stand-in predicts a state's first numbers, wherever padding stands
        states, actions, _, _, mask = bench.offline_data(str(folder), "cpu")[1]
        assert training.held_out() == pytest.approx(bench.nll_of_means(states[..., :3], actions, mask))


def test_nll_of_means__is_the_lowest_of_constant_sigmas():
    mean, actions = torch.randn(2, 4, 5, 3)
    mask = torch.rand(4, 5) < 0.7
    of_sigma = [
        dt.mean_nll(mean, torch.full_like(mean, log_sigma), actions, mask)
        for log_sigma in torch.linspace(-1, 1, 41).tolist()
    ]
    log_sigma = (mean - actions)[mask].square().mean(0).log() / 2
    expected = dt.mean_nll(mean, log_sigma.expand_as(mean), actions, mask)
    assert bench.nll_of_means(mean, actions, mask) == pytest.approx(expected.item(), rel=1e-5)
    assert bench.nll_of_means(mean, actions, mask) <= min(of_sigma)


def test_sampler__without_padding_takes_windows_within_an_episode():
    columns = bench.episodes(2000)
    masks = [bench.sampler("cpu", 500, columns, padding)()[4] for padding in (True, False)]
    assert not masks[0].all() and masks[1].all()


def test_work__of_a_training_prints_its_loss_and_stops_at_its_last_update(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("3\n3\n"))
    updates = []
    training = bench.Training(5, lambda: (lambda: updates.append(1), lambda: -len(updates)))
    row = bench.training_row({"ours": bench.Contender(lambda *args: training)}, "ours")
    monkeypatch.setitem(bench.ROWS, "to-nll", row)
    bench.work("to-nll", "ours", "float32", "folder", "cpu", "1")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[3:] for line in lines] == [["-3", "3", "5"], ["-5", "5", "5"]]


@pytest.fixture
def trainings(tmp_path, monkeypatch):
    """Stands in for Python, ours and the peers': an update takes a second.

    A peer's loss falls by 1 an update, for 20; ours by 2, before's by 3 but not below -30, for 40.
    """
    python = tmp_path / "trainings"
    python.write_text("""#!/bin/sh
done=0
case $5 in today) by=2 steps=40 ;; before) by=3 steps=40 ;; *) by=1 steps=20 ;; esac
[ "$5" = torchrl ] && exit 1
while read n; do
    echo "$5 $n" >> "$7/calls"
    before=$done
    done=$((done + n))
    [ $done -gt $steps ] && done=$steps
    loss=$((by * done))
    [ "$5" = before ] && [ $loss -gt 30 ] && loss=30
    [ "$5" = d3rlpy ] && loss=$((loss + 12))
    echo "bench: $((done - before)) 50 -$loss $done $steps"
done
""")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    return str(python)


def test_race_to_loss__times_each_to_where_the_peers_end(tmp_path, trainings, capsys):
    cfg = bench.Config(peers=trainings, interval=4)
    rows = bench.race_to_loss("to-nll", tmp_path, "cpu", cfg)
    assert "to-nll: torchrl float32 does not run here" in capsys.readouterr().out
    fields = ("size", "contender", "dtype", "ms", "updates", "held_out", "target", "ratio")
    found = [tuple(row[field] for field in fields) for row in rows]
    expected = [("huggingface", "huggingface", "float32", "2e+04", 20, "-20.0000", "-20.0000", "1.000")]
    for name, seconds, loss in [("today", 12, 24), ("before", 8, 24)]:
        for dtype in bench.BOTH:
            ms = f"{1000 * seconds:.4g}"
            ratio = f"{seconds / 20:.3f}"
            point = (ms, seconds, f"-{loss}.0000", "-20.0000", ratio)
            expected.append(("huggingface", name, dtype, *point))
    expected.append(("d3rlpy", "d3rlpy", "float32", "2e+04", 20, "-32.0000", "-32.0000", "1.000"))
    for name, seconds, loss in [("today", 16, 32), ("before", 40, 30)]:  # before: ends without reaching it
        for dtype in bench.BOTH:
            point = (f"{1000 * seconds:.4g}", seconds, f"-{loss}.0000", "-32.0000", f"{seconds / 20:.3f}")
            expected.append(("d3rlpy", name, dtype, *point))
    assert found == expected
    calls = (tmp_path / "calls").read_text().split("\n")[:-1]
    assert calls.count("huggingface 4") == 5 and calls.count("today 4") == 2 * 4  # waits while it leads


def test_main__writes_training_rows_and_leaves_out_those_that_lack_an_option(
    tmp_path, monkeypatch, trainings, capsys
):
    monkeypatch.setattr(bench, "write_folder", lambda folder, cfg: None)
    path = tmp_path / "bench.csv"
    path.write_text("what,size,contender,dtype,ms,device\nkl,3,copy,float32,1,a\n")
    what = ("to-nll", "teacher-to-nll", "student-to-kl")
    bench.main(bench.Config(what=what, device="cpu", out=str(path)))
    printed = capsys.readouterr().out
    assert "to-nll: left out, for it needs --peers\n" in printed
    assert "student-to-kl: left out, for it needs --teachers\n" in printed
    rows = measured(path)
    assert [row["what"] for row in rows] == ["kl", *8 * ["teacher-to-nll"]]
    assert rows[0]["target"] == "" and rows[1]["target"] == "-30.0000"
    assert list(rows[0])[-3:] == ["updates", "held_out", "target"]
    same_precision = [(row["contender"], row["dtype"]) for row in rows[1:5]]
    assert same_precision == [(name, "float32") for name in ("before", "Muon", "one token", "today")]


def test_tables__show_what_each_change_gave():
    of_training = ("what", "size", "contender", "dtype", "ms", "ratio", "updates", "held_out", "target")
    of_update = ("what", "size", "contender", "dtype", "ms")
    rows = []
    for line in (
        "student-to-kl,before,before,float32,200000,1.000,4000,0.0470,0.0470",
        "student-to-kl,before,Muon,float32,80000,0.400,1500,0.0460,0.0470",
        "student-to-kl,before,one token,float32,96000,0.480,4000,0.0600,0.0470",
        "student-to-kl,before,today,float32,40000,0.200,1600,0.0465,0.0470",
    ):
        rows.append(dict(zip(of_training, line.split(","), strict=True)))
    for name, ms in [("AdamW, 3 tokens", 50), ("Muon, 3 tokens", 55), ("Muon, 1 token", 25)]:
        rows.append(dict(zip(of_update, ("optimizer", "student", name, "float32", str(ms)), strict=True)))
    assert tables.changes(rows).splitlines()[2:] == [
        "| student, float32 | Muon | 0.91 | 2.50 | 1500 |",
        "| student, float32 | one token | | not in 96: ends at 0.060 | 4000 |",
        "| student, float32 | both: today | 2.00 | 5.00 | 1600 |",
    ]
    assert tables.training_table("student-to-kl", rows[:3]).splitlines()[2:] == [
        "| | before, float32 | 0.0470 | 200 | 4000 | 1 |",
        "| before | Muon, float32 | 0.0470 | 80 | 1500 | 2.50 |",
        "| before | one token, float32 | 0.0470 | not in 96: ends at 0.060 | 4000 | |",
    ]


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
