"""research/tables.py: README and docs/ hold what it prints."""

import re

import pytest

import forked
from conftest import ROOT

RESULTS = (ROOT / "docs/results.md").read_text()
SPEED = (ROOT / "docs/speed.md").read_text()
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    return forked.python("-m research.tables", tmp_path_factory.mktemp("tables"))


def rows(text):
    """The lines of a Markdown text's tables, without those below the headers."""
    return [line for line in text.splitlines() if line.startswith("|") and "|---" not in line]


def section(text, title):
    """What stands below a heading of a Markdown text."""
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_results__has_the_tables_that_are_printed(printed):
    lines = printed.splitlines()
    assert len(rows(RESULTS)) >= 25
    assert [row for row in rows(RESULTS) if row not in lines] == []
    machines = re.findall(r"^(?:Retention|Seconds:|Asked for five) .*$", RESULTS, re.M)
    assert len(machines) == 9
    assert [line for line in machines if line not in lines] == []


def test_data__has_the_tables_of_the_battery(printed):
    """All of them: docs/data.md's other table is of the kinds of datasets."""
    text = (ROOT / "docs/data.md").read_text()
    of_battery = printed.split("\nbattery, ")[1:]
    assert of_battery
    in_docs = set(rows(text))
    for half in of_battery:  # the last with what was tried for teachers and students
        half = half.split("\n\ninspect\n")[0].split("\n\nlittle data\n")[0].split("\nbattery, ")[0]
        assert len(rows(half)) >= 3
        assert [row for row in rows(half) if row not in in_docs] == []
        (verdict,) = re.findall(r"^Default / best baseline: .*$", half, re.M)
        assert verdict in text


def test_study__has_the_tables_of_little_data(printed):
    """All of them, and how many comparisons survive the correction."""
    study = (ROOT / "docs/study.md").read_text().splitlines()
    of_little_data, of_readme = printed.split("\nlittle data\n\n")[1].split("\nlittle data, README\n\n")
    of_readme = of_readme.split("\n\ninspect\n")[0]
    assert len(rows(of_readme)) >= 2
    readme = (ROOT / "README.md").read_text().splitlines()
    assert [row for row in rows(of_readme) if row not in readme] == []
    assert len(rows(of_little_data)) >= 3
    assert [row for row in rows(of_little_data) if row not in study] == []
    (survive,) = re.findall(r"\d+ of \d+, in bold, survive", of_little_data)
    assert survive in "\n".join(study)


def test_speed__has_the_tables_that_are_printed(printed):
    lines = printed.splitlines()
    for title in ("All rows", "Several processes", "Kernels inspected without a GPU"):
        of_section = rows(section(SPEED, title))
        assert len(of_section) >= 3, title
        assert [row for row in of_section if row not in lines] == [], title
    bench = printed.split("\nbench_cpu\n")[1].split("\ntried:")[0]
    in_docs = set(rows(SPEED))
    assert [row for row in rows(bench) if row not in in_docs] == []
    machines = re.findall(r"^.*, commit \w+\.$", bench, re.M)
    assert machines
    assert all(line in SPEED for line in machines)


@pytest.mark.parametrize("page", PAGES)
def test_pages__have_returns_that_are_printed(printed, page):
    """Every mean ± standard deviation."""
    found = re.findall(r"\d+ ± \d+", (ROOT / page).read_text())
    assert [text for text in found if text not in printed] == []


def test_readme__has_the_last_lines_of_the_smoke_run():
    log = (ROOT / "research/results/smoke.log").read_text().splitlines()
    command = log[0].removeprefix("$ ")
    text = (ROOT / "README.md").read_text()
    assert f"{command}\n" in text
    shown = text.split("`research/results/smoke.log`):\n\n```\n")[1].split("\n```")[0].splitlines()
    assert shown == log[-3 - len(shown) : -3]  # what `time` printed comes after
