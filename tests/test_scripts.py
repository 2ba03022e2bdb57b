"""Each README command, tiny, as a user would call it: in a process of its own, in an empty directory."""

import csv
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys

import h5py
import minari
import numpy as np
import pytest

import data
import model as dt
from conftest import ROOT, make_dataset
from support import (
    environments,
    files,
)

TINY = "--batch-size 16 --eval-episodes 2 --device cpu"


def call(cwd, command, code=0, root=ROOT, **env):
    """Run `python SCRIPT ...` of the tree at `root` in cwd; returns its output."""
    script, *rest = command.split()
    p = subprocess.run(
        [sys.executable, str(root / script), *rest],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )
    assert p.returncode == code, f"{command}\n{p.stdout}\n{p.stderr}"
    return p.stdout + p.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working directory and the built-in data, small."""
    for env in data.ENVS:
        data.collect(env, 4000)
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def main_job(home):
    """`python distill.py`, its default tasks: trains the three teachers that are missing, then the student."""
    return call(home, f"distill.py --steps 200 --teacher-steps 40 --log-interval 50 --n-embd 16 {TINY}")


def test_the_main_job_makes_everything_and_brings_the_student_five_times_nearer(main_job, home):
    tasks = ["hopper", "halfcheetah", "walker2d"]
    for t in tasks:
        assert f"no teacher in out/teacher-{t}: training it" in main_job
        log = files.read_csv(home / f"out/teacher-{t}/log.csv")
        assert log["step"].tolist() == [40] or log["nll"][-1] < log["nll"][0]
        assert files.read_json(home / f"out/teacher-{t}/metrics.json")["tasks"][t]["return_mean"] is not None
    metrics = files.read_json(home / "out/student/metrics.json")
    assert list(metrics["tasks"]) == tasks and metrics["compression"] > 15
    log = files.read_csv(home / "out/student/log.csv")
    assert len(log["step"]) == 200
    for t in tasks:
        kl = log[f"heldout_kl_{t}"]
        assert kl[199] < kl[0] / 5 and metrics["tasks"][t]["heldout_kl"] == pytest.approx(kl[199], rel=1e-5)
        m, teacher = metrics["tasks"][t], files.read_json(home / f"out/teacher-{t}/metrics.json")["tasks"][t]
        assert m["retention"] == pytest.approx(m["normalized_score"] / teacher["normalized_score"])
    assert (home / "out/student/plots.png").stat().st_size > 10_000 and "retention: mean" in main_job


def test_a_second_call_skips_what_is_there_and_says_so(main_job, home):
    out = call(home, f"distill.py --steps 200 --teacher-steps 40 --log-interval 50 --n-embd 16 {TINY}")
    assert "student is there: out/student" in out and "retention: mean" in out
    out = call(
        home,
        f"distill.py --envs hopper walker2d --steps 2 --n-embd 16 --eval-episodes 0 --out-dir out/two {TINY}",
    )
    assert "teacher of hopper is there" in out and "teacher of walker2d is there" in out


def test_teacher_learns_and_can_be_evaluated(home):
    out = call(home, f"teacher.py --env ant --steps 60 --log-interval 20 {TINY}")
    assert re.search(r"step 60/60 \| nll .* \| held-out .* it/s \| 0:00 left", out)
    log = files.read_csv(home / "out/teacher-ant/log.csv")
    assert log["step"].tolist() == [20, 40, 60] and log["heldout_nll"][-1] < log["heldout_nll"][0]
    model, meta = dt.load(home / "out/teacher-ant")
    assert model.cfg.obs_dims == [27] or model.cfg.obs_dims == (27,)
    assert "teacher of ant is there" in call(
        home, f"teacher.py --env ant --steps 60 --log-interval 20 {TINY}"
    )
    out = call(home, "evaluate.py out/teacher-ant --eval-episodes 2 --target median --device cpu")
    assert (
        json.loads((home / "out/teacher-ant/evaluation.json").read_text())["tasks"]["ant"]["target"]
        == meta["tasks"][0]["targets"]["median"]
    )


def test_evaluating_again_with_the_same_seeds_gives_what_training_said(main_job, home):
    call(home, "evaluate.py out/student --eval-episodes 2 --device cpu")
    got, said = (
        files.read_json(home / "out/student/evaluation.json")["tasks"],
        files.read_json(home / "out/student/metrics.json")["tasks"],
    )
    for t in got:
        assert got[t]["return_mean"] == pytest.approx(said[t]["return_mean"], rel=1e-3) and got[t][
            "retention"
        ] == pytest.approx(said[t]["retention"], rel=1e-3)


def test_video_is_made_or_the_reason_is_said(main_job, home):
    out = call(home, "evaluate.py out/teacher-hopper --eval-episodes 1 --video --device cpu")
    assert (
        home / "out/teacher-hopper/hopper.gif"
    ).exists() or "no film of hopper: rendering does not work here" in out


def test_any_minari_dataset_is_distilled_by_its_id(main_job, home):
    call(home, f"teacher.py --dataset {data.dataset_id('hopper')} --steps 5 {TINY} --out-dir out/by-id")
    out = call(
        home,
        f"distill.py --datasets {data.dataset_id('walker2d')} --teacher-steps 5 --steps 5 --out-dir out/by-id-student {TINY}",
    )
    assert (
        "teacher of walker2d is there" in out
        and "1 teachers" in out
        and files.read_json(home / "out/by-id-student/metrics.json")["tasks"]
    )


def test_discrete_actions_are_learnt_and_distilled_beside_continuous_ones(main_job, home):
    assert "cartpole/mixed-v0: 60 episodes" in call(home, "examples/collect_cartpole.py --episodes 60")
    assert "there is a dataset cartpole/mixed-v0 already; give another --id" in call(
        home, "examples/collect_cartpole.py", code=2
    )
    assert "actions 2, discrete" in call(home, "data.py --dataset cartpole/mixed-v0")
    call(home, f"teacher.py --dataset cartpole/mixed-v0 --steps 100 --n-layer 1 --n-embd 32 {TINY}")
    for loss, curriculum in (("kl", "novelty"), ("mse", "novelty"), ("nll", "all")):
        method = f"--loss {loss} --curriculum {curriculum} --surgery pcgrad"
        call(
            home,
            f"distill.py --envs hopper --datasets cartpole/mixed-v0 --steps 60 --n-embd 16 {method} --out-dir out/mixed-{loss} {TINY}",
        )
        log, metrics = (
            files.read_csv(home / f"out/mixed-{loss}/log.csv"),
            files.read_json(home / f"out/mixed-{loss}/metrics.json")["tasks"],
        )
        assert all(log[f"heldout_kl_{t}"][59] < 0.7 * log[f"heldout_kl_{t}"][0] for t in metrics), loss
    assert metrics["cartpole/mixed-v0"]["return_mean"] >= 8
    call(home, "evaluate.py out/mixed-kl --eval-episodes 2 --device cpu")


def test_a_reader_who_has_enough_is_told_nothing(tmp_path):
    shutil.copy(ROOT / "research/results/study.csv", tmp_path)
    command = [sys.executable, str(ROOT / "study.py"), "--report", "--out", str(tmp_path / "study.csv")]
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    p.stdout.close()
    assert p.stderr.read() == "" and p.wait() == 141


def test_a_log_of_trpo_becomes_a_dataset(home):
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=shape) for shape in ((11, 4), (1, 4), (4, 5), (1, 5), (5, 3), (1, 3))]
    mean, square = rng.normal(size=11), 4.0
    with h5py.File(home / "log.h5", "w") as f:
        for i in range(2):
            policy = f.create_group(f"snapshots/iter{i:07d}/GaussianPolicy")
            for k, path in enumerate(
                ("hidden/FeedforwardNet/layer_0", "hidden/FeedforwardNet/layer_1", "out")
            ):
                policy[f"{path}/AffineLayer/W"], policy[f"{path}/AffineLayer/b"] = weights[2 * k : 2 * k + 2]
            policy["logstdevs_1_Da"] = np.full((1, 3), -np.inf)
            policy["obsnorm/Standardizer/count"] = (
                i  # the first snapshot has seen nothing: it does not normalise
            )
            policy["obsnorm/Standardizer/mean_1_D"], policy["obsnorm/Standardizer/meansq_1_D"] = (
                mean[None],
                (mean**2 + square)[None],
            )
    assert "thirdparty/hopper/trpo-replay-v0: " in call(
        home, "examples/collect_trpo.py hopper log.h5 --steps 40"
    )
    assert "there is a dataset thirdparty/hopper/trpo-replay-v0 already" in call(
        home, "examples/collect_trpo.py hopper log.h5", code=2
    )
    episodes = list(minari.load_dataset("thirdparty/hopper/trpo-replay-v0").iterate_episodes())
    assert sum(len(e.rewards) for e in episodes) >= 40
    for e, seen in ((episodes[0], False), (episodes[-1], True)):
        x = (e.observations[:-1] - mean) / 2 if seen else e.observations[:-1]
        for W, b in zip(weights[:4:2], weights[1:4:2], strict=True):
            x = np.tanh(x @ W + b)
        assert np.allclose(e.actions, np.clip(x @ weights[4] + weights[5], -1, 1), atol=1e-4)


def test_a_student_of_teachers_that_never_acted_is_evaluated(home):
    call(
        home,
        "teacher.py --env hopper --steps 3 --n-embd 16 --out-dir out/silent --batch-size 16 --eval-episodes 0 --device cpu",
    )
    call(
        home,
        "distill.py --teachers out/silent --steps 3 --n-embd 16 --out-dir out/silent-student --batch-size 16 --eval-episodes 0 --device cpu",
    )
    assert "retention" not in call(home, "evaluate.py out/silent-student --eval-episodes 1 --device cpu")


def test_data_shows_what_a_dataset_holds(home):
    out = call(home, "data.py --env hopper")
    assert (
        re.search(r"episodes \d+, steps \d+", out)
        and "median" in out
        and "saturated" in out
        and (home / "out/data-hopper.png").stat().st_size > 5000
    )
    assert "observations 27, actions 8" in call(home, f"data.py --dataset {data.dataset_id('ant')}")


def test_training_behaviour_policies_without_its_library_says_what_to_install(home):
    (home / "stable_baselines3.py").write_text("raise ImportError('not installed')")
    assert "pip install stable-baselines3" in call(
        home, "behaviour.py --env hopper", code=2, PYTHONPATH=str(home)
    )
    (home / "stable_baselines3.py").unlink()


def test_bench_times_ours_says_where_and_keeps_the_rows_not_asked_for(home):
    call(home, "bench.py --what distil --rounds 1 --seconds 0.01 --device cpu --out bench.csv")
    call(home, "bench.py --what rollout --rounds 2 --seconds 0.01 --device cpu --out bench.csv")
    with open(home / "bench.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [(r["what"], r["size"], r["contender"].split(",")[0]) for r in rows] == [
        ("rollout", "1", "ours"), ("rollout", "64", "ours"), ("distil", "3", "fixed"), *3 * [("distil", "3", "novelty")]]  # fmt: skip
    assert all(float(r["ms"]) > 0 and int(r["memory_mib"]) > 0 and r["torch"] and r["device"] for r in rows)


def test_a_run_is_made_into_a_page_with_films_where_rendering_works(main_job, home):
    said = call(home, "report.py out/student --film-steps 8")
    page = (home / "out/student/report.html").read_text()
    films = page.count("data:image/webp")
    assert (
        f"films of {films} of 3 tasks" in said
        and films + page.count("rendering does not work here") == 3
        and page.count("<svg") == 5
    )


@pytest.mark.parametrize(
    "script", ["data", "teacher", "distill", "evaluate", "export", "report", "study", "bench", "behaviour"]
)
def test_help_fits_a_screen_for_each_topic_and_says_what_every_option_is(home, script):
    said = call(home, f"{script}.py --help", COLUMNS="120")
    boxes = re.findall(r"╭─ .*?(?:options|arguments) ─+╮\n(.*?)╰", said, re.S)
    options = [
        line
        for line in inspect.getsource(importlib.import_module(script).Config).splitlines()
        if re.match(r"    \w+: ", line)
    ]
    assert (
        boxes
        and all(box.count("\n") <= 40 for box in boxes)
        and sum(box.count(" --") for box in boxes) >= len(options)
    )
    assert all("  # " in line for line in options), [line for line in options if "  # " not in line]


BAD = [
    (
        "teacher.py --env hoper",
        "unknown env 'hoper'; choose from ant, halfcheetah, halfcheetah-back, hopper, walker2d",
    ),
    ("data.py --env hoper", "unknown env 'hoper'"),
    ("behaviour.py --env hoper", "unknown env 'hoper'"),
    ("data.py --seed -1", "--seed -1: must be at least 0"),
    ("behaviour.py --eval-episodes 0", "--eval-episodes 0: must be at least 1"),
    ("bench.py --threads 0", "--threads 0: must be at least 1"),
    ("bench.py --what nothing", "--what nothing: choose from machine, teacher, rollout"),
    ("study.py --report --out nothing.csv", "nothing.csv holds no run"),
    ("study.py --only nothing", "--only nothing: choose from fixed, all"),
    ("distill.py --envs hopper hoper", "unknown env 'hoper'"),
    ("teacher.py --steps 0", "--steps 0: must be at least 1"),
    ("teacher.py --dropout 1", "--dropout 1.0: must be below 1"),
    ("distill.py --grad-clip 0", "--grad-clip 0.0: must be at least 1e-09"),
    ("distill.py --alignment-weight nan", "--alignment-weight nan: must be finite"),
    ("distill.py --loss nll", "--loss nll is no distance"),
    ("study.py --budgets update", "--budgets update: choose from updates, half, time, acting"),
    ("teacher.py --context 2000", "--context 2000: must be at most 1024"),
    ("distill.py --batch-size -4", "--batch-size -4: must be at least 1"),
    ("teacher.py --dataset nobody/nothing-v0", "nobody/nothing-v0 is not in"),
    (
        "distill.py --teachers out/nothing --out-dir out/bad",
        "no model in out/nothing; train one: python teacher.py --env hopper",
    ),
    ("teacher.py --out-dir /proc/x", "can't write to /proc/x"),
    ("distill.py --out-dir /proc/x", "can't write to /proc/x"),
    ("teacher.py --device cuda:77", "--device cuda:77: not available here"),
    ("teacher.py --device mps", "--device mps: choose cpu, cuda, cuda:<number> or auto"),
    ("evaluate.py out/nothing", "no model in out/nothing"),
    ("export.py out/nothing", "no model in out/nothing"),
    ("report.py out/nothing", "out/nothing holds no finished run"),
    ("evaluate.py out/student --target best", "--target best: must be p95 or median or a number"),
]


@pytest.mark.parametrize(("command", "message"), BAD, ids=[c for c, _ in BAD])
def test_bad_input_is_one_clear_line_and_exit_code_2(main_job, home, command, message):
    out = call(home, command, code=2)
    errors = [line for line in out.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and "Traceback" not in out


def test_a_damaged_teacher_is_told_and_the_others_are_untouched(main_job, home):
    weights = home / "out/teacher-hopper/model.safetensors"
    blob = weights.read_bytes()
    weights.write_bytes(blob[:-100])
    try:
        out = call(home, f"distill.py --envs hopper walker2d --steps 2 --out-dir out/never {TINY}", code=2)
    finally:
        weights.write_bytes(blob)
    assert (
        "error: the model in out/teacher-hopper is damaged" in out
        and not (home / "out/never/metrics.json").exists()
    )


def test_the_readmes_three_changes_apply_and_run(main_job, home, tmp_path):
    changes = re.findall(r"`(python [^`]*)`\n\n```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(changes) == 3 and all(diff.count("\n") <= 15 for _, diff in changes)
    shutil.copytree(
        ROOT, tmp_path / "tree", ignore=shutil.ignore_patterns(".*", "out", "__pycache__", "results")
    )
    call(home, "examples/collect_cartpole.py --episodes 20 --id cartpole/mixed-v0") if not (
        home / "out/mixed-kl"
    ).exists() else None
    for i, (command, diff) in enumerate(changes):
        p = subprocess.run(
            ["git", "apply", "-"], cwd=tmp_path / "tree", input=diff, capture_output=True, text=True
        )
        assert p.returncode == 0, diff + p.stderr
        command = command.removeprefix("python ") + f" --steps 3 --out-dir out/change{i} --n-embd 16 {TINY}"
        call(home, command, root=tmp_path / "tree")
        assert files.read_json(home / f"out/change{i}/metrics.json")["tasks"]
    assert files.read_json(home / "out/change0/model.json")["tasks"][0]["reference"] == [22.0, 500.0]


SMALL = {  # what makes a README command tiny
    "teacher.py": f"--steps 3 --n-embd 16 {TINY}", "distill.py": f"--teacher-steps 3 --steps 3 --n-embd 16 --log-interval 2 {TINY}",
    "evaluate.py": "--eval-episodes 1 --device cpu", "report.py": "--film-steps 8", "examples/act_onnx.py": "--episodes 1",
    "examples/collect_cartpole.py": "--episodes 10", "export.py": "--overwrite",
}  # fmt: skip
ELSEWHERE = {
    "python study.py": "test_study.py",
    "python behaviour.py --env hopper": "test_training_behaviour_policies_without_its_library",
}


def test_every_command_of_the_readme_runs_in_its_order(home, tmp_path):
    said = (ROOT / "README.md").read_text().split("\n## Use\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```(bash|python)\n(.*?)```", said, re.S)
    commands = [
        line.split(" #")[0].strip() for kind, block in blocks if kind == "bash" for line in block.splitlines()
    ]
    shutil.rmtree(f"{os.environ['MINARI_DATASETS_PATH']}/cartpole", ignore_errors=True)  # an earlier test's
    for name, O, A in (("hopper", 11, 3), ("ant", 27, 8)):  # stand-ins for those that would be downloaded
        env = environments.make_env(*data.ENVS[name][:2])
        make_dataset(f"mujoco/{name}/medium-v0", [9, 12, 7], obs_dim=O, act_dim=A, spec=env.spec)
    for command in commands:
        if command in ELSEWHERE:
            continue
        if command.startswith("torchrun --nproc_per_node=8 "):
            p = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / "distill.py"), *command.split()[3:],
                                *SMALL["distill.py"].split()],
                               cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
            assert p.returncode == 0, p.stdout + p.stderr
            continue
        python, script, *_ = command.split()
        assert python == "python", command
        call(
            tmp_path, f"{command.removeprefix('python ')} {SMALL.get(script, '')}", MUJOCO_GL="off"
        )  # films take minutes without a GPU; other tests make some
    assert (
        len(commands) >= 17
        and (tmp_path / "out/student/report.html").exists()
        and (tmp_path / "out/student/hopper.onnx").stat().st_size < 1e6
    )
    scripts = {path.name for path in ROOT.glob("*.py") if "cli.run(" in path.read_text()}
    assert scripts - {c.split()[1] for c in commands} == {"bench.py"}  # whose commands stand with its figures
    code = [block for kind, block in blocks if kind == "python"]
    assert len(code) == 1 and "from policy import Policy" in code[0]
    test = (
        "import numpy as np; observation, reward = np.zeros(11), 1.0\n"
        + code[0]
        + "\nassert action.shape == (3,)"
    )
    p = subprocess.run(
        [sys.executable, "-c", test],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert p.returncode == 0, p.stderr


def test_the_readmes_troubleshooting_has_the_words_that_the_program_prints():
    said = (ROOT / "README.md").read_text().split("## Troubleshooting")[1]
    source = " ".join(path.read_text() for path in (*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # strings over several lines
    quoted = re.findall(r"^\| `(.*?)`", said, re.M)
    assert len(quoted) >= 15
    for text in quoted:
        words = max(
            re.split(
                r"\b[XYN]\b|\.\.\.|^error: (?:--\w+ )?|^kernels: |^error: environment|nan|Triton|C compiler| a finished",
                text,
            ),
            key=len,
        ).strip(" ;,'()")
        assert len(words) > 7 and words in source, (text, words)


def test_the_readme_says_how_long_each_file_is():
    said = re.findall(r"^\| `([\w./]+)` \| (\d+) \|", (ROOT / "README.md").read_text(), re.M)
    assert {path.name for path in ROOT.glob("*.py")} <= {name for name, _ in said}
    for name, lines in said:
        files = [ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py")
        there = sum(len(f.read_text().splitlines()) for f in files)
        assert abs(there - int(lines)) < 0.15 * there, f"{name} has {there} lines, README says {lines}"


def test_the_readmes_figures_come_from_the_runs_kept():
    said = (ROOT / "README.md").read_text()
    printed = call(ROOT, "results/tables.py")
    for figure in re.findall(r"\d+ ± \d+", said):
        assert figure in printed, figure
    results = said.split("## Results")[1].split("\n## ")[0]
    speed = said.split("<summary>All rows</summary>")[1].split("</details>")[0]
    files = said.split("**Export.**")[1].split("\n## ")[0]
    several = said.split("## Several processes")[1].split("\n## ")[0]
    tables = [line for line in (results + speed + several + files).splitlines() if line.startswith("| ")]
    assert tables and all(line in printed for line in tables)
