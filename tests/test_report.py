"""Looking at a run: its page, in a real browser where there is one, and other places that a log can go to."""

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import minari
import numpy as np
import pytest

import distill
import evaluate
import report
import teacher
from conftest import make_dataset
from support import (
    UserError,
    files,
    log,
)

TINY = {"batch_size": 4, "device": "cpu", "eval_episodes": 0, "log_interval": 5, "n_embd": 8, "n_layer": 1}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A student's run, of two tasks without environments."""
    home = tmp_path_factory.mktemp("report")
    for i, name in enumerate(("tests/report-a-v0", "tests/report-b-v0")):
        make_dataset(name, [9, 12, 7], obs_dim=3 + i, act_dim=1 + i, spec=None)
        teacher.main(
            teacher.Config(dataset=name, steps=5, context=4, out_dir=str(home / f"teacher{i}"), **TINY)
        )
    options = {"teachers": (str(home / "teacher0"), str(home / "teacher1")), "alignment_weight": 1.0}
    distill.main(distill.Config(**options, steps=20, out_dir=str(home / "student"), **TINY))
    return home / "student"


def evaluated(path):
    """Its Run, with scores as if there had been environments."""
    r = report.Run(path)
    for i, (name, m) in enumerate(r.tasks.items()):
        m |= {
            "return_mean": 100.0 + i,
            "return_std": 5.0,
            "normalized_score": 80.0,
            "retention": 0.9 + 0.05 * i,
        }
        r.retention[name] = m["retention"]
        r.teachers[name] = {"return_mean": 110.0, "normalized_score": 88.0}
    return r


def opened(html, tmp_path, width=1100):
    """What a browser makes of a page: [(width, height, whether anything is drawn) of each figure], whether it is wider than the window, and the console's lines."""
    measure = """<script>addEventListener("load", () => {
        const figures = [...document.querySelectorAll("figure")].map(f => { const r = f.getBoundingClientRect(), x = f.firstElementChild;
            return [r.width, r.height, x.tagName == "IMG" ? x.complete && x.naturalWidth > 0 : x.querySelectorAll("path").length > 20]; });
        document.title = JSON.stringify([figures, document.documentElement.scrollWidth > innerWidth]); });</script>"""
    page = tmp_path / "page.html"
    page.write_text(
        html.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'") + measure
    )
    p = subprocess.run([BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/browser", f"--window-size={width},1000",
                        "--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)  # fmt: skip
    return *json.loads(re.search(r"<title>(.*?)</title>", p.stdout)[1]), [
        line for line in p.stderr.splitlines() if "CONSOLE" in line
    ]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1100, 500])
def test_a_browser_shows_every_figure_and_no_error(student, tmp_path, width):
    r = evaluated(student)
    figures, too_wide, console = opened(
        report.page([r, report.Run(student.parent / "teacher0")], []), tmp_path, width
    )
    assert (
        len(figures) == 6
        and all(w > 300 and h > 200 and drawn for w, h, drawn in figures)
        and not too_wide
        and not console
    )
    _, _, console = opened(
        report.page([r], ["<figure><img src=x></figure><script src='http://nowhere.invalid/x.js'></script>"]),
        tmp_path,
    )
    assert any(
        "Content Security Policy" in line for line in console
    )  # errors are seen, and nothing is fetched


def test_every_plot_says_what_its_lines_are(student, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.pyplot.close", drawn.append)  # what is not closed can be looked at
    shutil.copytree(student, tmp_path / "run")
    report.plots(tmp_path / "run")
    report.page([report.Run(student)], [])
    axes = [ax for fig in drawn for ax in fig.axes]
    assert len(axes) == 4 + 5
    for ax in axes:
        assert [t.get_text() for t in ax.get_legend().get_texts()] == ax.get_legend_handles_labels()[
            1
        ] != [] and ax.get_title()
        assert not ax.spines["top"].get_visible()


def test_a_page_holds_all_it_shows_and_the_runs_own_numbers(student):
    r = evaluated(student)
    page = report.page([r], [])
    assert not re.findall(r"""(?:src|href)=["']?(?!data:|#)[^"'>]+""", page) and "<script" not in page
    assert (
        page.count("<figure>") == 6
        and "2 teachers of" in page
        and "92.5 % of their scores, 90.0 % of the worst" in page
    )
    assert (
        all(f"<td>{log.cell(m['heldout_kl'])}</td>" in page for m in r.tasks.values())
        and "tests/report-b-v0" in page
    )
    assert page == report.page([r], [])  # to the byte
    of_teacher = report.page([report.Run(student.parent / "teacher0")], [])
    assert of_teacher.count("<figure>") == 2 and "A teacher of" in of_teacher


def test_names_are_text(student):
    r = evaluated(student)
    r.meta["tasks"][0]["name"] = "<script>alert(1)</script>"
    bad = r.tasks["$x^{2$"] = dict(r.tasks["tests/report-a-v0"])
    r.teachers["$x^{2$"], r.retention["$x^{2$"] = {}, bad["retention"]
    r.log |= {f"{k}_$x^{{2$": r.log[f"{k}_tests/report-a-v0"] for k in ("heldout_kl", "share", "alignment")}
    page = report.page([r], [])
    assert "<script" not in page and "&lt;script&gt;" in page and "$x^{2$" in page


def test_a_run_that_is_not_there_or_not_finished_is_told(student, tmp_path):
    with pytest.raises(UserError, match="holds no finished run; train one: python distill.py"):
        report.main(report.Config((str(tmp_path),)))
    with pytest.raises(UserError, match="name a run directory"):
        report.main(report.Config(()))


def test_where_rendering_fails_the_page_says_why(student, monkeypatch, capsys):
    report.main(report.Config((str(student),)))
    assert (
        "no film of tests/report-a-v0: its dataset names no environment"
        in (student / "report.html").read_text()
    )
    monkeypatch.setattr(evaluate, "rollout", lambda *a, **k: 1 / 0)
    task = report.data.tasks(report.Run(student).meta, student)[0]
    task.env_id = "Hopper-v5"
    assert "rendering does not work here (ZeroDivisionError" in report.film(None, task, 0, report.Config(()))
    assert "films of 0 of 2 tasks" in capsys.readouterr().out


# ---- TensorBoard, Weights & Biases -----------------------------------------------------------------------------------


def train(path, **options):
    if "tests/tracked-v0" not in minari.list_local_datasets():
        make_dataset("tests/tracked-v0", [9, 12, 7], spec=None)
    teacher.main(
        teacher.Config(dataset="tests/tracked-v0", steps=20, context=4, out_dir=str(path), **TINY, **options)
    )
    return files.read_csv(path / "log.csv")


def test_tensorboard_shows_what_the_log_holds(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tmp_path, tensorboard=True, seed=1)
    log = train(tmp_path, tensorboard=True, overwrite=True)  # what was there is replaced
    events = reader.EventAccumulator(str(tmp_path)).Reload()
    for column in set(log) - {"step"}:
        scalars = events.Scalars(column)
        assert [s.step for s in scalars] == [5, 10, 15, 20] and np.allclose(
            [s.value for s in scalars], log[column], rtol=1e-5
        )
    assert events.Scalars("tests/tracked-v0/heldout_nll")[0].value == pytest.approx(
        log["heldout_nll"][-1], rel=1e-5
    )


def test_wandb_is_told_what_the_log_holds_and_a_resumed_run_goes_on_as_the_same(tmp_path, monkeypatch):
    told = []

    class Fake:
        def __init__(self, id):
            self.id = id or "abc"

        def log(self, values, step):
            told.append((step, values))

        def finish(self):
            told.append("finished")

    def init(**options):
        told.append(options)
        return Fake(options["id"])

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=SimpleNamespace()))
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: True)
    log = train(tmp_path, wandb=True)
    assert (
        told[0]["project"] == "manyteachers"
        and told[0]["id"] is None
        and told[0]["config"]["n_embd"] == 8
        and told[-1] == "finished"
    )
    rows = {step: values for step, values in told[1:-2]}
    assert list(rows) == [5, 10, 15, 20] and all(
        rows[s][k] == pytest.approx(v) for k in set(log) - {"step"} for s, v in zip(rows, log[k], strict=True)
    )
    log.WandB(teacher.Config(), tmp_path, 10)
    assert told[-1]["id"] == "abc"


def test_a_tracker_that_is_missing_is_told_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    for package in ("tensorboard", "wandb"):
        with pytest.raises(
            UserError, match=f"--{package} needs a package that is not here: pip install {package}"
        ):
            train(tmp_path / "run", **{package: True})
    assert not (tmp_path / "run").exists()
