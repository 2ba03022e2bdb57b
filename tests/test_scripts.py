"""The commands of README and docs/, tiny, as a user would call them, each in a process of its own."""

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
import forked
import model as dt
from conftest import ROOT, make_dataset, slow
from support import environments, files

TINY = "--batch-size 16 --eval-episodes 1 --device cpu"
SILENT = "--batch-size 16 --eval-episodes 0 --device cpu"  # no evaluation
MAIN_JOB = f"distill.py --steps 200 --teacher-steps 40 --log-interval 50 --n-embd 16 {TINY}"
README = (ROOT / "README.md").read_text()
EXTENDING = (ROOT / "docs/extending.md").read_text()
OPERATIONS = (ROOT / "docs/operations.md").read_text()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working directory; the data of four built-in tasks are there, small."""
    for env in ("hopper", "halfcheetah", "walker2d", "ant"):
        data.collect_if_missing(data.dataset_id(env), 4000)
    return tmp_path_factory.mktemp("home")


def subprocess_python(command, cwd, *flags):
    """`python COMMAND` in a new Python: its exit code and what it printed."""
    script, *rest = command.split()
    p = subprocess.run(
        [sys.executable, *flags, str(ROOT / script), *rest],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return p.returncode, p.stdout


@pytest.fixture(scope="module")
def main_job(home):
    """What the default tasks print: training the three teachers, which are missing, then the student."""
    code, printed = subprocess_python(MAIN_JOB, home)
    assert code == 0, printed
    return printed


def tasks_of(run, file="metrics.json"):
    return files.read_json(run / file)["tasks"]


# ---- whole runs --------------------------------------------------------------------------------------------


def test_distill__trains_missing_teachers_and_a_student_five_times_closer_to_them(main_job, home):
    names = ["hopper", "halfcheetah", "walker2d"]
    student = tasks_of(home / "out/student")
    log = files.read_csv(home / "out/student/log.csv")
    assert list(student) == names
    assert len(log["step"]) == 200
    for name in names:
        teacher = home / f"out/teacher-{name}"
        assert f"no teacher in out/teacher-{name}: training it" in main_job
        assert files.read_csv(teacher / "log.csv")["step"].tolist() == [40]
        of_teacher = tasks_of(teacher)[name]
        of_student = student[name]
        assert of_teacher["return_mean"] is not None
        kl = log[f"heldout_kl_{name}"]
        assert kl[199] < kl[0] / 5
        assert of_student["heldout_kl"] == pytest.approx(kl[199], rel=1e-5)
        retention = of_student["normalized_score"] / of_teacher["normalized_score"]
        assert of_student["retention"] == pytest.approx(retention)
    assert files.read_json(home / "out/student/metrics.json")["compression"] > 15
    assert (home / "out/student/plots.png").stat().st_size > 10_000
    assert "retention: mean" in main_job


def test_distill__prints_verdicts_between_its_table_and_the_retention(main_job, home):
    printed = main_job.split("held-out KL\n")[1].split("retention: mean")[0]
    teachers = files.read_json(home / "out/student/model.json")["teachers"]
    students = tasks_of(home / "out/student")
    for model, by_task in {"teacher": teachers, "student": students}.items():
        for name, metrics in by_task.items():
            line = re.search(f"^{name}, {model}: (.*)$", printed, re.M)
            assert bool(line) == bool(metrics["flags"]), (name, model)
            assert all(flag in line[1] for flag in metrics["flags"])
    assert any(metrics["flags"] for metrics in teachers.values())  # of 40 updates
    again = forked.python("evaluate.py out/student --eval-episodes 1 --device cpu", home)
    assert [line for line in printed.splitlines() if ", student: " in line] == [
        line for line in again.splitlines() if ", student: " in line
    ]


def test_distill__skips_a_finished_run_and_reuses_teachers(main_job, home):
    printed = forked.python(MAIN_JOB, home)
    assert "student is there: out/student" in printed
    assert "retention: mean" in printed
    printed = forked.python(
        f"distill.py --envs hopper walker2d --steps 2 --n-embd 16 --out-dir out/two {SILENT}", home
    )
    for name in ("hopper", "walker2d"):
        said = f"teacher of {name} is there: out/teacher-{name}, of 40 updates in place of 1250"
        assert said in printed


def test_teacher__learns_and_can_be_evaluated(home):
    command = f"teacher.py --env ant --steps 60 --log-interval 20 {TINY}"
    assert re.search(r"step 60/60 \| nll .* \| held-out .* it/s \| 0:00 left", forked.python(command, home))
    log = files.read_csv(home / "out/teacher-ant/log.csv")
    assert log["step"].tolist() == [20, 40, 60]
    assert log["heldout_nll"][-1] < log["heldout_nll"][0]
    model, meta = dt.load(home / "out/teacher-ant")
    assert list(model.cfg.obs_dims) == [27]
    assert "teacher of ant is there" in forked.python(command, home)
    forked.python("evaluate.py out/teacher-ant --eval-episodes 1 --target median --device cpu", home)
    target = tasks_of(home / "out/teacher-ant", "evaluation.json")["ant"]["target"]
    assert target == meta["tasks"][0]["targets"]["median"]


def test_evaluate__gives_what_training_reported_for_the_same_seeds(main_job, home):
    forked.python("evaluate.py out/student --eval-episodes 1 --device cpu", home)
    again = tasks_of(home / "out/student", "evaluation.json")
    for name, metrics in tasks_of(home / "out/student").items():
        for key in ("return_mean", "retention"):
            assert again[name][key] == pytest.approx(metrics[key], rel=1e-3), (name, key)


def test_evaluate__films_an_episode_or_says_why_not(main_job, home):
    printed = forked.python("evaluate.py out/teacher-hopper --eval-episodes 1 --video --device cpu", home)
    filmed = (home / "out/teacher-hopper/hopper.gif").exists()
    assert filmed or "no film of hopper: rendering does not work here" in printed


def test_evaluate__works_for_a_student_of_teachers_that_were_never_evaluated(home):
    forked.python(f"teacher.py --env hopper --steps 3 --n-embd 16 --out-dir out/silent {SILENT}", home)
    forked.python(
        f"distill.py --teachers out/silent --steps 3 --n-embd 16 --out-dir out/silent-student {SILENT}", home
    )
    printed = forked.python("evaluate.py out/silent-student --eval-episodes 1 --device cpu", home)
    assert "retention" not in printed


def test_report__makes_a_page_with_films_where_rendering_works(main_job, home):
    printed = forked.python("report.py out/student --film-steps 8", home)
    page = (home / "out/student/report.html").read_text()
    films = page.count("data:image/webp")
    assert f"films of {films} of 3 tasks" in printed
    assert films + page.count("rendering does not work here") == 3
    assert page.count("<svg") == 4


def test_data__shows_what_a_dataset_holds(home):
    printed = forked.python("data.py --env hopper", home)
    assert re.search(r"episodes \d+, steps \d+", printed)
    assert "median" in printed
    assert "saturated" in printed
    assert (home / "out/data-hopper.png").stat().st_size > 5000
    assert "observations 27, actions 8" in forked.python(f"data.py --dataset {data.dataset_id('ant')}", home)


def test_distill__takes_any_minari_dataset_by_its_id(main_job, home):
    hopper = data.dataset_id("hopper")
    walker = data.dataset_id("walker2d")
    forked.python(f"teacher.py --dataset {hopper} --steps 5 {SILENT} --out-dir out/by-id", home)
    options = f"--teacher-steps 5 --steps 5 --out-dir out/by-id-student {SILENT}"
    printed = forked.python(f"distill.py --datasets {walker} {options}", home)
    assert "teacher of walker2d is there" in printed
    assert "1 teachers" in printed
    assert list(tasks_of(home / "out/by-id-student")) == ["walker2d"]


@pytest.fixture(scope="module")
def cartpole(home):
    """A dataset of discrete actions, and a teacher of it."""
    printed = forked.python("examples/collect_cartpole.py --episodes 60", home)
    assert "cartpole/mixed-v0: 60 episodes" in printed
    forked.python(f"teacher.py --dataset cartpole/mixed-v0 --steps 100 --n-layer 1 --n-embd 32 {TINY}", home)


def test_collect_cartpole__refuses_to_replace_a_dataset(cartpole, home):
    printed = forked.python("examples/collect_cartpole.py", home, code=2)
    assert "there is a dataset cartpole/mixed-v0 already; give another --id" in printed


def test_data__says_that_actions_are_discrete(cartpole, home):
    assert "actions 2, discrete" in forked.python("data.py --dataset cartpole/mixed-v0", home)


@pytest.mark.parametrize("loss", ["kl", *slow("mse", "nll", "kl+nll")])
def test_distill__mixes_discrete_actions_with_continuous_ones(main_job, cartpole, home, loss):
    curriculum = "all" if "nll" in loss else "novelty"
    method = f"--loss {loss} --curriculum {curriculum} --surgery pcgrad"
    out = home / f"out/mixed-{loss}"
    options = f"--steps 100 --n-embd 16 {method} --out-dir {out} {TINY}"
    forked.python(f"distill.py --envs hopper --datasets cartpole/mixed-v0 {options}", home)
    log = files.read_csv(out / "log.csv")
    for name, metrics in tasks_of(out).items():
        kl = log[f"heldout_kl_{name}"]
        assert kl[99] < 0.7 * kl[0], name
        if name == "cartpole/mixed-v0":
            assert metrics["return_mean"] >= 8
    forked.python(f"evaluate.py {out} --eval-episodes 1 --device cpu", home)


# ---- third-party data: examples/collect_trpo.py ------------------------------------------------------------


def write_trpo_log(path, weights, mean, square):
    """A log of two snapshots of one policy; only the second has statistics of observations."""
    layers = ("hidden/FeedforwardNet/layer_0", "hidden/FeedforwardNet/layer_1", "out")
    with h5py.File(path, "w") as f:
        for i in range(2):
            policy = f.create_group(f"snapshots/iter{i:07d}/GaussianPolicy")
            for k, layer in enumerate(layers):
                policy[f"{layer}/AffineLayer/W"] = weights[2 * k]
                policy[f"{layer}/AffineLayer/b"] = weights[2 * k + 1]
            policy["logstdevs_1_Da"] = np.full((1, 3), -np.inf)
            policy["obsnorm/Standardizer/count"] = i  # the first has seen nothing: it does not normalise
            policy["obsnorm/Standardizer/mean_1_D"] = mean[None]
            policy["obsnorm/Standardizer/meansq_1_D"] = (mean**2 + square)[None]


def test_collect_trpo__makes_a_dataset_of_a_log(home):
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=shape) for shape in ((11, 4), (1, 4), (4, 5), (1, 5), (5, 3), (1, 3))]
    mean = rng.normal(size=11)
    write_trpo_log(home / "log.h5", weights, mean, square=4.0)
    made = forked.python("examples/collect_trpo.py hopper log.h5 --steps 40", home)
    assert "thirdparty/hopper/trpo-replay-v0: " in made
    refused = forked.python("examples/collect_trpo.py hopper log.h5", home, code=2)
    assert "there is a dataset thirdparty/hopper/trpo-replay-v0 already" in refused
    episodes = list(minari.load_dataset("thirdparty/hopper/trpo-replay-v0").iterate_episodes())
    assert sum(len(e.rewards) for e in episodes) >= 40
    for episode, normalised in ((episodes[0], False), (episodes[-1], True)):
        x = episode.observations[:-1]
        if normalised:
            x = (x - mean) / 2
        for W, b in ((weights[0], weights[1]), (weights[2], weights[3])):
            x = np.tanh(x @ W + b)
        assert np.allclose(episode.actions, np.clip(x @ weights[4] + weights[5], -1, 1), atol=1e-4)


# ---- mistakes ----------------------------------------------------------------------------------------------

BAD = [
    ("data.py --seed -1", "--seed -1: must be at least 0"),
    ("-m research.behaviour --eval-episodes 0", "--eval-episodes 0: must be at least 1"),
    ("-m research.bench --threads 0", "--threads 0: must be at least 1"),
    ("-m research.bench --what nothing", "--what nothing: choose from machine, teacher, rollout"),
    ("-m research.study --teachers 0", "--teachers 0: must be at least 1"),
    ("-m research.study --tune --case nine", "--tune --case nine: rates are tuned on the built-in tasks"),
    ("teacher.py --steps 0", "--steps 0: must be at least 1"),
    ("teacher.py --dropout 1", "--dropout 1.0: must be below 1"),
    ("teacher.py --context 2000", "--context 2000: must be at most 1024"),
    ("teacher.py --dataset nobody/nothing-v0", "nobody/nothing-v0 is not in"),
    (
        "teacher.py --dataset hoper",
        "unknown env 'hoper'; choose from ant, halfcheetah, halfcheetah-back, hopper, walk",
    ),
    ("teacher.py --out-dir /proc/x", "can't write to /proc/x"),
    ("teacher.py --device cuda:77", "--device cuda:77: not available here"),
    ("teacher.py --device mps", "--device mps: choose cpu, cuda, cuda:<number> or auto"),
    ("distill.py --grad-clip 0", "--grad-clip 0.0: must be at least 1e-09"),
    ("distill.py --alignment-weight nan", "--alignment-weight nan: must be finite"),
    ("distill.py --loss nll", "--loss nll is no distance"),
    ("distill.py --teacher-top 0", "--teacher-top 0.0: must be above 0 and at most 1"),
    ("distill.py --batch-size -4", "--batch-size -4: must be at least 1"),
    (
        "distill.py --teachers out/nothing --out-dir out/bad",
        "no model in out/nothing; train one: python teacher.py --env hopper",
    ),
    ("distill.py --out-dir /proc/x", "can't write to /proc/x"),
    ("evaluate.py out/nothing", "no model in out/nothing"),
    (
        "evaluate.py out/student --target best",
        "--target best: must be default, p10, p25, median, p75, p95, supported or a number",
    ),
    ("export.py out/nothing", "no model in out/nothing"),
    ("report.py out/nothing", "out/nothing holds no finished run"),
]


def assert_one_line(printed, message):
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, printed
    assert message in errors[0]
    assert "Traceback" not in printed


@pytest.mark.parametrize(("command", "message"), BAD, ids=[command for command, _ in BAD])
def test_scripts__answer_a_mistake_with_one_line_and_exit_code_2(main_job, home, command, message):
    assert_one_line(forked.python(command, home, code=2), message)


def test_scripts__answer_a_mistake_in_the_same_way_in_a_new_python(home):
    code, printed = subprocess_python("teacher.py --steps 0", home)
    assert code == 2
    assert_one_line(printed, "--steps 0: must be at least 1")


CHOICES = [
    "data.py --env",
    "teacher.py --env",
    "distill.py --envs hopper",
    "distill.py --curriculum",
    "distill.py --surgery",
]


@pytest.mark.parametrize("command", CHOICES)
def test_scripts__name_the_choices_for_a_mistyped_one(home, command):
    printed = forked.python(f"{command} hoper", home, code=2, COLUMNS="300")
    option = re.search("--[a-z]+", command)[0]
    message = rf"invalid choice 'hoper' for argument '{option}'.* Expected one of \('"
    assert re.search(message, printed), printed
    assert "Traceback" not in printed


def test_distill__names_a_damaged_teacher_and_writes_nothing(main_job, home):
    weights = home / "out/teacher-hopper/model.safetensors"
    blob = weights.read_bytes()
    weights.write_bytes(blob[:-100])
    try:
        command = f"distill.py --envs hopper walker2d --steps 2 --out-dir out/never {TINY}"
        printed = forked.python(command, home, code=2)
    finally:
        weights.write_bytes(blob)
    assert "error: the model in out/teacher-hopper is damaged" in printed
    assert not (home / "out/never/metrics.json").exists()


# ---- README and docs/ --------------------------------------------------------------------------------------


def blocks(text, language):
    """The code blocks of a Markdown text in one language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def commands(text):
    """The lines of a Markdown text's bash blocks, without comments."""
    lines = "".join(blocks(text, "bash")).splitlines()
    return [line.split(" #")[0].strip() for line in lines]


def changes(text):
    """The diffs of a Markdown text, each with the command that stands before it."""
    found = []
    before = ""
    for part in re.split(r"(```diff\n.*?```)", text, flags=re.S):
        if part.startswith("```diff"):
            command = re.findall(r"`python ([^`]*)`", before)[-1]
            found.append((command, part.removeprefix("```diff\n").removesuffix("```")))
        before = part
    return found


def test_diffs_of_the_docs__apply_and_their_commands_run(main_job, cartpole, home, tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "out", "__pycache__", "results"))
    assert len(changes(README)) == 1
    assert len(changes(EXTENDING)) == 3
    for i, (command, diff) in enumerate(changes(README) + changes(EXTENDING)):
        p = subprocess.run(["git", "apply", "-"], cwd=tree, input=diff, capture_output=True, text=True)
        assert p.returncode == 0, diff + p.stderr
        if command.startswith("distill.py"):
            command += " --envs hopper"
        forked.python(f"{command} --steps 3 --out-dir out/change{i} --n-embd 16 {SILENT}", home, root=tree)
        run = files.read_json(home / f"out/change{i}/model.json")
        if "--env cartpole" in command:
            assert run["tasks"][0]["reference"] == [22.0, 500.0]


def test_snippet_of_extending__makes_a_dataset_to_learn_from(tmp_path):
    (code,) = blocks(EXTENDING, "python")
    (tmp_path / "collect.py").write_text(code)
    forked.python(str(tmp_path / "collect.py"), tmp_path)
    assert "`python teacher.py --dataset mine/robot-v0`" in EXTENDING
    forked.python(f"teacher.py --dataset mine/robot-v0 --steps 3 --n-embd 16 {TINY}", tmp_path)
    assert (tmp_path / "out/teacher-mine-robot-v0/metrics.json").exists()


SMALL = {  # what makes a command of README tiny
    "data.py": "",
    "teacher.py": f"--steps 3 --n-embd 16 {TINY}",
    "distill.py": f"--teacher-steps 3 --steps 3 --n-embd 16 --log-interval 2 {TINY}",
    "evaluate.py": "--eval-episodes 1 --device cpu",
    "export.py": "--overwrite",
    "report.py": "--film-steps 8",
    "examples/act_onnx.py": "--episodes 1",
    "examples/collect_cartpole.py": "--episodes 10",
}
ELSEWHERE = {  # commands that take long, or need another package: where they are tested
    "-m research.study": "test_research_study.py",
    "-m research.bench": "test_research_bench.py",
    "-m research.behaviour": "test_research_behaviour.py",
    "-m research.inspect": "test_research_inspect.py",
    "-m research.tables": "test_research_tables.py",
    "-m research.battery_policies": "test_research_battery.py",
    "-m research.battery_runs": "test_research_battery.py",
    "-m research.little_data": "test_research_little_data.py",
    "-m research.metaworld": "test_support_metaworld.py",
    "-m research.conflict": "test_research_conflict.py",
    "-m research.streaming": "test_research_streaming.py",
    "-m research.cells": "test_research_cells.py",
}


@pytest.mark.slow
def test_readme__has_commands_that_run_in_its_order(home, tmp_path):
    shutil.rmtree(f"{os.environ['MINARI_DATASETS_PATH']}/cartpole", ignore_errors=True)  # other tests'
    for name, O, A in (("hopper", 11, 3), ("ant", 27, 8)):  # stand-ins for those that would be downloaded
        spec = environments.make_env(data.ENVS[name].id, data.ENVS[name].options).spec
        make_dataset(f"mujoco/{name}/medium-v0", [9, 12, 7], obs_dim=O, act_dim=A, spec=spec)
    setup, listed = README.split("\n## Commands\n")
    smoke = [command for command in commands(setup) if command.startswith("python ")]
    listed = commands(listed.split("\n## ")[0])
    assert len(smoke) == 1
    assert len(listed) >= 17
    (tmp_path / "out/smoke").mkdir(parents=True)  # a folder of its own: no full run must reuse its teachers
    run_readme_command(smoke[0].replace("../../", ""), tmp_path / "out/smoke")
    for command in listed:
        run_readme_command(command, tmp_path)
    assert (tmp_path / "out/student/report.html").exists()
    assert (tmp_path / "out/student/hopper.onnx").stat().st_size < 1e6
    run_acting_snippet(tmp_path)


def run_readme_command(command, cwd):
    if command.startswith("torchrun --nproc_per_node=8 distill.py "):
        options = command.removeprefix("torchrun --nproc_per_node=8 distill.py ")
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
        code, printed = subprocess_python(f"distill.py {options} {SMALL['distill.py']}", cwd, *launcher)
        assert code == 0, printed
        return
    program, command = command.split(" ", 1)
    assert program == "python"
    script = command.split()[0]
    if script == "-m":  # see ELSEWHERE
        return
    forked.python(f"{command} {SMALL[script]}", cwd, MUJOCO_GL="off")  # films take minutes without a GPU


def run_acting_snippet(cwd):
    """The README's snippet that acts, in a folder where there is a student."""
    (code,) = [block for block in blocks(README, "python") if "from policy import Policy" in block]
    before = "import numpy as np\nobservation, reward = np.zeros(11), 1.0\n"
    (cwd / "act.py").write_text(f"{before}{code}\nassert action.shape == (3,)\n")
    forked.python(str(cwd / "act.py"), cwd)


def test_readme__has_an_acting_snippet_that_runs(main_job, home):
    run_acting_snippet(home)


def test_readme__lists_a_command_for_every_script():
    """CONTRIBUTING.md has those of research/."""
    text = README + (ROOT / "CONTRIBUTING.md").read_text()
    listed = {re.sub("^python ", "", command) for command in commands(text)}
    scripts = {path.name for path in ROOT.glob("*.py") if "cli.run(" in path.read_text()}
    modules = {
        f"-m research.{path.stem}" for path in ROOT.glob("research/*.py") if '"__main__"' in path.read_text()
    }
    for script in scripts | modules:
        assert any(command.startswith(script) for command in listed), script
    for module in modules:
        assert (ROOT / "tests" / ELSEWHERE[module]).exists(), module


def test_troubleshooting__has_the_words_that_the_program_prints():
    paths = [*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("support/*.py")]
    source = " ".join(path.read_text() for path in paths)
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # strings over several lines
    quoted = re.findall(r"^\| `(.*?)`", OPERATIONS.split("## Troubleshooting")[1], re.M)
    assert len(quoted) >= 15
    prefixes = r"^error: (?:--\w+ )?|^kernels: |^error: environment"
    variable = rf"\b[XYN]\b|\.\.\.|{prefixes}|nan|Triton|C compiler| a finished"
    for text in quoted:
        longest = max(re.split(variable, text), key=len).strip(" ;,'()")
        assert len(longest) > 7, text
        assert longest in source, (text, longest)


def test_operations__names_tests_that_exist():
    named = set(re.findall(r"`(tests/\w+\.py)`", OPERATIONS))
    assert len(named) >= 5
    for name in named:
        assert (ROOT / name).exists(), name
