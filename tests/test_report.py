"""report.py: which panels a run has, its plots.png, and its page, in a real browser where there is one."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pytest

import distill
import evaluate
import report
import teacher
from conftest import make_dataset
from support import UserError, files, log

TINY = {"batch_size": 4, "device": "cpu", "eval_episodes": 0, "log_interval": 5, "n_embd": 8, "n_layer": 1}
TASKS = ("tests/report-a-v0", "tests/report-b-v0")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MEASURE = """<script>
addEventListener("load", () => {
  const figures = [...document.querySelectorAll("figure")].map(figure => {
    const box = figure.getBoundingClientRect();
    return {width: box.width, height: box.height, paths: figure.querySelectorAll("path").length};
  });
  const tables = [...document.querySelectorAll(".scroll")].map(box => [box.scrollWidth, box.clientWidth]);
  const too_wide = document.documentElement.scrollWidth > innerWidth;
  document.title = JSON.stringify({figures, tables, too_wide});
});
</script>"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """teacher0, teacher1 and their student: runs of two tasks without environments, so without scores."""
    home = tmp_path_factory.mktemp("report")
    for i, name in enumerate(TASKS):
        make_dataset(name, [9, 12, 7], obs_dim=3 + i, act_dim=1 + i, spec=None)
        options = {"dataset": name, "steps": 5, "context": 4, "out_dir": str(home / f"teacher{i}")}
        teacher.main(teacher.Config(**options, **TINY))
    teachers = (str(home / "teacher0"), str(home / "teacher1"))
    distill.main(distill.Config(teachers=teachers, steps=20, out_dir=str(home / "student"), **TINY))
    return home


@pytest.fixture
def student(home, tmp_path) -> Path:
    """A copy of the student's run, with scores as if there had been environments."""
    path = tmp_path / "student"
    shutil.copytree(home / "student", path)
    metrics = files.read_json(path / "metrics.json")
    meta = files.read_json(path / "model.json")
    for i, name in enumerate(TASKS):
        retention = 0.9 + 0.05 * i
        scores = {"return_mean": 100.0 + i, "return_std": 5.0, "normalized_score": 80.0}
        metrics["tasks"][name] |= {**scores, "retention": retention}
        meta["teachers"][name] |= {"return_mean": 110.0, "return_std": 5.0, "normalized_score": 88.0}
    files.write_json(path / "metrics.json", metrics)
    files.write_json(path / "model.json", meta)
    return path


SWEPT = [
    {"name": "median", "target": 2.0, "return_mean": 2.5, "return_std": 0.5, "normalized_score": 20.0},
    {"name": "p95", "target": 5.0, "return_mean": 4.5, "return_std": 0.5, "normalized_score": 50.0},
]


def add_sweeps(student: Path) -> None:
    """Sweeps of two targets, to the student's run and to what it holds of its teachers."""
    metrics = files.read_json(student / "metrics.json")
    meta = files.read_json(student / "model.json")
    for name in TASKS:
        metrics["tasks"][name]["sweep"] = SWEPT
        meta["teachers"][name]["sweep"] = SWEPT
    files.write_json(student / "metrics.json", metrics)
    files.write_json(student / "model.json", meta)


def larger(student: Path) -> report.Run:
    """The same student, as if it had twice the parameters."""
    run = report.Run(student)
    run.metrics["compression"] /= 2
    return run


def titles(runs: list[report.Run]) -> list[str]:
    """The titles of the panels in the report of these runs."""
    found = []
    for panel in [*report.panels(runs[0]), *report.compression_panel(runs)]:
        ax = matplotlib.figure.Figure().subplots()
        panel.draw(ax)
        found.append(ax.get_title())
    return found


def opened(page: str, tmp_path: Path, width: int) -> tuple[dict[str, Any], list[str]]:
    """A page in a browser's window `width` pixels wide: what MEASURE measures, and the console's lines."""
    file = tmp_path / "page.html"
    file.write_text(
        page.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'") + MEASURE
    )
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path}/browser", f"--window-size={width},1000"]
    command += ["--virtual-time-budget=5000", "--dump-dom", file.as_uri()]
    p = subprocess.run(command, capture_output=True, text=True, timeout=120)
    console = [line for line in p.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(re.search(r"<title>(.*?)</title>", p.stdout)[1]), console


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")


# ---- which panels ------------------------------------------------------------------------------------------


RETURNS = "Normalised return: teacher and student"
SWEEP = "Return asked against return obtained"
KL = "KL to each teacher, held-out episodes"
SHARES = "Share of the batch by teacher"
CONFLICT = "Conflict with the previous update"
ALIGNMENT = "Alignment of each teacher with the previous update"
COMPRESSION = "Compression against retention"


def test_panels__are_result_kl_and_shares_of_a_default_run(student):
    assert titles([report.Run(student)]) == [RETURNS, KL, SHARES]


def test_panels__have_no_returns_without_evaluation(home):
    assert titles([report.Run(home / "student")]) == [KL, SHARES]


def test_panels__have_no_shares_of_a_single_teacher(student):
    run = report.Run(student)
    del run.tasks[TASKS[1]]
    assert titles([run]) == [RETURNS, KL]


@pytest.mark.parametrize(("column", "title"), [("projected", CONFLICT), (f"alignment_{TASKS[1]}", ALIGNMENT)])
def test_panels__show_a_quantity_that_was_not_always_zero(student, column, title):
    run = report.Run(student)
    assert not run.log[column].any()
    run.log[column][7] = 1
    assert titles([run]) == [RETURNS, KL, SHARES, title]


def test_panels__of_a_teacher_are_its_nll_and_its_returns(home):
    run = report.Run(home / "teacher0")
    assert titles([run]) == ["Negative log-likelihood of the dataset's actions"]
    run.tasks[TASKS[0]]["normalized_score"] = 80.0
    assert titles([run])[0] == "Normalised return: teacher"


def test_panels__compare_students_of_several_sizes(home, student):
    run = report.Run(student)
    assert COMPRESSION not in titles([run, report.Run(student)])
    assert COMPRESSION not in titles([run, report.Run(home / "teacher0")])
    assert titles([run, larger(student)])[-1] == COMPRESSION


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["hopper", "ant"], ["hopper", "ant"]),
        (["mujoco/hopper/medium-v0", "mujoco/ant/medium-v0"], ["hopper", "ant"]),
        (["mujoco/ant/medium-v0", "mujoco/ant/expert-v0"], ["medium-v0", "expert-v0"]),
        (["hopper", "mujoco/ant/medium-v0"], ["hopper", "mujoco/ant/medium-v0"]),
        (["mujoco/ant/medium-v0"], ["mujoco/ant/medium-v0"]),
        (["a-name-of-thirty-two-characters-"], ["a-name-of-…aracters-"]),
        (
            ["a-name-of-forty-characters-whose-end-is-1", "a-name-of-forty-characters-whose-end-is-2"],
            ["a-name-of-…-end-is-1", "a-name-of-…-end-is-2"],
        ),
        (
            ["thirdparty/ant/replay-v0", "thirdparty/hopper/replay-v0", "hopper"],
            ["thirdparty/ant/replay-v0", "thirdparty/hopper/replay-v0", "hopper"],
        ),  # cut, two would be the same
        (["$x^{2$"], [r"\$x^{2\$"]),
    ],
)
def test_short_names__leave_out_what_all_tasks_share(names, labels):
    assert report.short_names(names) == dict(zip(names, labels, strict=True))


# ---- plots.png ---------------------------------------------------------------------------------------------


@pytest.fixture
def figures(monkeypatch) -> list:
    """Every figure drawn in a test; they are not closed, so they can be looked at."""
    drawn = []
    monkeypatch.setattr("matplotlib.pyplot.close", drawn.append)
    return drawn


@pytest.mark.parametrize(
    ("projected", "swept", "grid", "titles"),
    [
        (0, False, (1, 3), [RETURNS, KL, SHARES]),
        (1, False, (2, 2), [RETURNS, KL, SHARES, CONFLICT]),
        (0, True, (2, 2), [RETURNS, SWEEP, KL, SHARES]),
        (1, True, (2, 3), [RETURNS, SWEEP, KL, SHARES, CONFLICT]),
    ],
)
def test_plots__lay_up_to_three_panels_in_a_row_and_more_in_two(
    student, monkeypatch, figures, projected, swept, grid, titles
):
    log = files.read_csv(student / "log.csv")
    log["projected"] += projected
    monkeypatch.setattr(files, "read_csv", lambda path: log)
    if swept:
        add_sweeps(student)
    report.plots(student)
    assert (student / "plots.png").stat().st_size > 10_000
    (figure,) = figures
    assert [ax.get_title() for ax in figure.axes] == titles
    assert figure.axes[0].get_gridspec().get_geometry() == grid


def test_sweep__has_a_line_for_each_task_and_model(student, figures):
    add_sweeps(student)
    run = report.Run(student)
    report.svg(report.panels(run)[1])
    (ax,) = figures[0].axes
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["teachers", "report-a-v0", "report-b-v0", "as asked"]
    low, high = run.references()[TASKS[1]]
    of_student = next(line for line in ax.lines if line.get_label() == "report-b-v0")
    scores = [100 * (target - low) / (high - low) for target in (2.0, 5.0)]
    assert np.allclose(of_student.get_xdata(), scores)
    assert np.allclose(of_student.get_ydata(), [20.0, 50.0])
    dashed = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert len(dashed) == 3  # one of them for the legend


def test_sweep__of_a_teacher_alone_is_drawn_through(home, figures):
    run = report.Run(home / "teacher0")
    run.tasks[TASKS[0]]["sweep"] = SWEPT
    report.svg(report.panels(run)[0])
    (ax,) = figures[0].axes
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [TASKS[0], "as asked"]


def test_every_plot__names_its_lines(home, student, figures):
    run = report.Run(student)
    for column in ("projected", f"alignment_{TASKS[0]}"):
        run.log[column] += 1
    report.page([run, larger(student)], [])
    report.page([report.Run(home / "teacher0")], [])
    assert len(figures) == 6 + 1
    for figure in figures:
        (ax,) = figure.axes
        names = [text.get_text() for text in ax.get_legend().get_texts()]
        assert names == ax.get_legend_handles_labels()[1] != []
        assert ax.get_title() and ax.get_ylabel()


def test_returns__are_annotated_where_they_are_known(student, figures):
    run = report.Run(student)
    del run.teachers[TASKS[1]]["normalized_score"]
    report.svg(report.panels(run)[0])
    (ax,) = figures[0].axes
    assert [text.get_text() for text in ax.texts] == ["88", "", "80", "80"]  # teachers, students
    assert [label.get_text() for label in ax.get_xticklabels()] == ["report-a-v0", "report-b-v0"]


def test_plots__of_a_hundred_tasks_have_no_names(student, tmp_path, figures):
    run = report.Run(student)
    for i in range(100):
        run.tasks[f"task-{i}"] = run.tasks[TASKS[0]]
        run.teachers[f"task-{i}"] = run.teachers[TASKS[0]]
        for column in ("share", "heldout_kl", "alignment"):
            run.log[f"{column}_task-{i}"] = run.log[f"{column}_{TASKS[0]}"]
    for panel in report.panels(run):
        report.svg(panel)
    returns, kl, shares = [figure.axes[0] for figure in figures]
    assert kl.get_legend() is None and shares.get_legend() is None
    assert returns.get_xlabel() == "102 tasks" and not returns.texts


# ---- the page ----------------------------------------------------------------------------------------------


def test_page__holds_the_runs_own_numbers(student):
    run = report.Run(student)
    page = report.page([run], [])
    drawn = re.findall(r'<svg role="img" aria-label="([^"]*)"', page)
    assert drawn == titles([run])
    assert "2 teachers of" in page
    assert "It retains 92.5 % of their scores on average, 90.0 % on the worst task." in page
    for name in TASKS:
        assert name.replace("/", "/<wbr>") in page
        assert f"<td>{log.cell(run.tasks[name]['heldout_kl'])}</td>" in page
    assert page == report.page([run], [])  # to the byte


def test_report__has_success_rates_and_says_where_retention_is_of_them(student, capsys):
    metrics = files.read_json(student / "metrics.json")
    meta = files.read_json(student / "model.json")
    for i, name in enumerate(TASKS):
        metrics["tasks"][name] |= {"success_rate": 0.5 + 0.2 * i, "retention_of": "success"}
        meta["teachers"][name]["success_rate"] = 0.8
    files.write_json(student / "metrics.json", metrics)
    files.write_json(student / "model.json", meta)
    run = report.Run(student)
    assert run.success_rates() == {"teacher": 0.8, "student": pytest.approx(0.6)}
    assert [row["student success"] for row in run.rows()] == [0.5, 0.7]
    assert "of their success rates on average" in report.headline(run)
    distill.summary(student)
    printed = capsys.readouterr().out
    assert "retention of success: mean 0.925, worst 0.900" in printed
    assert "success rate, mean of the tasks that report one: teacher 0.800, student 0.600" in printed


def test_page__shows_verdicts_where_there_are_any(student):
    assert "<li>" not in report.page([report.Run(student)], [])
    run = report.Run(student)
    run.tasks[TASKS[0]]["return_mean"] = -1000.0
    assert f"<li>{TASKS[0]}, student: below-target" in report.page([run], [])


def test_page__of_a_teacher_says_so(home):
    assert "A teacher of" in report.page([report.Run(home / "teacher0")], [])


def test_page__refers_to_nothing_outside_itself(student):
    page = report.page([report.Run(student)], [])
    assert not re.findall(r"""(?:src|href)=["']?(?!data:|#)[^"'>]+""", page)
    assert "<script" not in page


def test_page__shows_names_as_text(student):
    run = report.Run(student)
    run.meta["tasks"][0]["name"] = "<script>alert(1)</script>"
    name = "$x^{2$"
    run.tasks[name] = run.tasks[TASKS[0]]
    run.teachers[name] = {}
    run.retention[name] = 0.9
    for column in ("heldout_kl", "share", "alignment"):
        run.log[f"{column}_{name}"] = run.log[f"{column}_{TASKS[0]}"]
    page = report.page([run, larger(student)], [])
    assert "<script" not in page
    assert "&lt;script&gt;" in page and name in page


def renamed(run: report.Run, name: str) -> report.Run:
    """The run, with long texts in its tables; `name` is its first task's and every dataset's."""
    for task in run.meta["tasks"]:
        task |= {"name": name, "dataset": name, "env_id": "HalfCheetah-v5", "reference": [-280.18, 12135.0]}
        task["reference_source"] = "the dataset's lowest and highest return"
    run.tasks[name] = run.tasks.pop(TASKS[0])
    run.teachers[name] = run.teachers.pop(TASKS[0])
    for column in ("heldout_kl", "share", "alignment"):
        run.log[f"{column}_{name}"] = run.log[f"{column}_{TASKS[0]}"]
    return run


@needs_browser
@pytest.mark.parametrize("width", [1100, 500])
def test_page__shows_figures_and_tables_in_a_browser(student, tmp_path, width):
    run = renamed(report.Run(student), "thirdparty/halfcheetah/trpo-replay-v0")
    seen, console = opened(report.page([run, larger(student)], []), tmp_path, width)
    assert len(seen["figures"]) == 4
    for figure in seen["figures"]:
        assert figure["width"] > 300 and figure["height"] > 200 and figure["paths"] > 20
    assert not seen["too_wide"] and not console
    assert len(seen["tables"]) == 2
    if width == 1100:  # in a narrow window a table may scroll in its column
        assert all(content <= column for content, column in seen["tables"])


@needs_browser
def test_page__breaks_names_that_are_too_long_for_their_column(student, tmp_path):
    run = renamed(report.Run(student), "no_break_in_it_" * 6)
    seen, _ = opened(report.page([run], []), tmp_path, 1100)
    assert all(content <= column for content, column in seen["tables"])


@needs_browser
def test_page__fetches_nothing_whatever_it_holds(student, tmp_path):
    """The policy in its head is enforced, and `opened` would see an error."""
    alien = "<figure><img src=x></figure><script src='http://nowhere.invalid/x.js'></script>"
    _, console = opened(report.page([report.Run(student)], [alien]), tmp_path, 1100)
    assert any("Content Security Policy" in line for line in console)


# ---- the command -------------------------------------------------------------------------------------------


def test_main__names_the_remedy_where_there_is_no_finished_run(tmp_path):
    with pytest.raises(UserError, match="holds no finished run; train one: python distill.py"):
        report.main(report.Config((str(tmp_path),)))
    with pytest.raises(UserError, match="name a run directory"):
        report.main(report.Config(()))


def test_main__says_which_tasks_have_no_film(student, capsys):
    report.main(report.Config((str(student),)))
    page = (student / "report.html").read_text()
    assert f"no film of {TASKS[0]}: its dataset names no environment" in page
    assert "films of 0 of 2 tasks" in capsys.readouterr().out


def test_film__says_why_there_is_none_where_rendering_fails(student, monkeypatch):
    monkeypatch.setattr(evaluate, "play", lambda *args, **options: 1 / 0)
    task = report.data.tasks(report.Run(student).meta, student)[0]
    task.env_id = "Hopper-v5"
    film = report.film(None, task, 0, report.Config(()))
    assert "rendering does not work here (ZeroDivisionError" in film
