"""research/little_data_report.py: tables and figure of a small made-up CSV, its numbers computed by hand."""

import csv

import matplotlib.pyplot as plt
import numpy as np
import pytest

from research import little_data_report as little
from research import tables
from research.statistics import holm, mean_retention

SEEDS = [(0, 0), (0, 3), (1, 1), (1, 4), (2, 2), (2, 5)]  # of teachers and student
COLUMNS = [
    *("tasks", "data_share", "data", "mode", "compression", "teacher_seed", "seed", "task", "episodes"),
    *("teacher_return", "return_mean", "return_std", "n_episodes", "retention", "heldout_kl", "target_gap"),
    *("teacher_gap", "seconds", "commit"),
]


def csv_rows(mode, retention, share=0.02, tasks="builtin", seeds=SEEDS, **more):
    """Rows of a run for each of the seeds; retention: {task: a number, or one for each run}."""
    rows = []
    for i, (teacher_seed, seed) in enumerate(seeds):
        for task, values in retention.items():
            value = np.broadcast_to(values, len(seeds))[i]
            row = dict.fromkeys(COLUMNS, "") | {
                "tasks": tasks,
                "data_share": share,
                "data": "all",
                "mode": mode,
            }
            row |= {"compression": 20.8, "teacher_seed": teacher_seed, "seed": seed, "task": task}
            row |= {
                "episodes": 5,
                "retention": value,
                "heldout_kl": 0.25,
                "target_gap": 0.1,
                "teacher_gap": 0.08,
            }
            rows.append(row | more)
    return rows


def read(tmp_path, rows):
    path = tmp_path / "little_data.csv"
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return tables.read_rows(path)


SMALL = [
    *csv_rows("labels", {"hopper": 0.9, "ant": 0.8}),
    *csv_rows("data, tuned", {"hopper": 0.7, "ant": 0.6}, heldout_kl="", episodes=7),
    *csv_rows("data", {"hopper": 0.5, "ant": 0.4}, heldout_kl=""),
    *csv_rows("data", {"hopper": 1.0, "ant": 1.1}, share=1.0, heldout_kl="", episodes=240),
    *csv_rows("labels", {"hopper": 1.0, "ant": [1.1, 1.1, 1.1, 0.7, 1.1, 1.1]}, share=1.0, episodes=240),
    *csv_rows("labels", {"hopper": 0.5, "ant": 0.5}, compression=50),
    *csv_rows("labels", {"hopper": 0.6, "ant": 0.6}, share=1.0, data="worst half", seeds=SEEDS[:2]),
    *csv_rows("clone", {"hopper": [1, 0.96, 1], "ant": 1}, share=1.0, compression=99, seeds=SEEDS[::2]),
]


@pytest.fixture
def small(tmp_path):
    return read(tmp_path, SMALL)


def lines(text):
    """A table's lines below its header, by what stands in the first cells."""
    return text.splitlines()[2:]


def test_phase_diagram__has_a_line_for_each_share_and_a_column_for_each_mode(small):
    text = little.phase_diagram(little.students(small), "builtin")
    assert text.splitlines()[0] == "| data | episodes a task | data | data, tuned | labels |"
    assert lines(text)[0] == (
        "| 2 % | 6 | 0.450 (0.450-0.450), 0.400 | 0.650 (0.650-0.650), 0.600 | 0.850 (0.850-0.850), 0.800 |"
    )
    # of 12 results: 6 of 1, 5 of 1.1, one of 0.7; the worst are 1 in five runs, 0.7 in one
    full, smaller, worst_half = lines(text)[1:]
    assert full.startswith("| 100 % | 240 | 1.050 (1.050-1.050), 1.000 | | 1.017 (")
    assert full.endswith("), 0.950 |")
    assert smaller == "| 2 %, 50 times smaller | 5 | | | 0.500 (0.500-0.500), 0.500 |"
    assert worst_half == "| 100 %, worst half | 5 | | | 0.600, 0.600 |"  # two runs have no interval


def test_phase_diagram__puts_shares_modes_and_what_is_unknown_in_order(tmp_path):
    rows = csv_rows("data", {"ant": 1}, data="worst half", compression=5)
    rows += csv_rows("new", {"ant": 1}, share=0.1) + csv_rows("both", {"ant": 1}, share=0.1)
    rows += csv_rows("asked", {"ant": 1}, share=0.02)
    text = little.phase_diagram(little.students(read(tmp_path, rows)), "builtin")
    assert text.splitlines()[0] == "| data | episodes a task | data | asked | both | new |"
    worst_half = "| 2 %, 5 times smaller, worst half"
    assert [line.split(" | ")[0] for line in lines(text)] == ["| 2 %", "| 10 %", worst_half]


def test_readme_table__has_a_line_where_all_of_its_modes_have_students(tmp_path):
    rows = csv_rows("data", {"hopper": 0.5, "ant": 0.25}) + csv_rows("labels", {"hopper": 0.75, "ant": 0.5})
    rows += csv_rows("asked", {"hopper": 1, "ant": 0.75}) + csv_rows(
        "data", {"hopper": 1, "ant": 1}, share=1.0
    )
    text = little.readme_table(read(tmp_path, rows))
    assert lines(text) == ["| 5 (2 %) | 0.38 (0.25) | 0.62 (0.50) | 0.88 (0.75) | 6 |"]


def test_details__begin_with_the_teachers_evaluated_again(small):
    text = little.details(little.students(small), "builtin")
    head = "| data | mode | runs | worst task | IQM | minimum | below 0.9 "
    assert text.splitlines()[0] == head + "| held-out KL | target gap | teachers' |"
    clone, *rest = lines(text)
    assert clone.startswith("| | teachers, evaluated again | 3 | 0.987 | 1.000 | 0.960 | 0 % |")
    labels = [line for line in rest if line.startswith("| 100 % | labels |")]
    assert len(rest) == 7
    assert rest[0] == (
        "| 2 % | data | 6 | 0.400 (0.400-0.400) | 0.450 | 0.400 | 100 % | | 0.100 | 0.080 |"  # no KL
    )
    # IQM: of the middle six, four are 1 and two are 1.1
    assert labels[0].startswith("| 100 % | labels | 6 | 0.950 (")
    assert labels[0].endswith(") | 1.033 | 0.700 | 8 % | 0.250 | 0.100 | 0.080 |")


def test_students__count_once_all_of_their_tasks_are_there(tmp_path):
    rows = csv_rows("labels", {"hopper": 0.9, "ant": 0.8})
    found = little.students(read(tmp_path, rows[:-1]))
    (runs,) = found.values()
    assert runs.seeds == SEEDS[:-1]
    assert runs.retention.tolist() == [[0.9, 0.8]] * 5
    assert runs.teachers == [0, 0, 1, 1, 2]
    assert little.students(read(tmp_path, [])) == {}
    assert little.tables([]) == ""


def test_students__may_not_lack_retention(tmp_path):
    with pytest.raises(ValueError, match="labels.* has a run without retention"):
        little.students(read(tmp_path, csv_rows("labels", {"ant": ""})))


def test_compare__is_with_the_tuned_data_or_else_the_data_on_the_same_seeds(tmp_path):
    rows = csv_rows("labels", {"hopper": 0.9, "ant": [9, 0.8, 0.8, 0.8, 0.8, 0.8]})
    rows += csv_rows("data", {"hopper": 0.5, "ant": 0.4})
    rows += csv_rows("data, tuned", {"hopper": [0.7, 0.6, 0.8, 0.7, 0.7], "ant": 0.6}, seeds=SEEDS[1:])
    rows += csv_rows("both", {"hopper": 1, "ant": 1}, share=1.0)
    rows += csv_rows("data", {"hopper": [1.1, 0.9, 1.1, 0.9, 1.1, 0.9], "ant": 1}, share=1.0)
    rows += csv_rows("both", {"hopper": 1, "ant": 1}, share=1.0, tasks="thirdparty")  # beside nothing
    rows += csv_rows("data", {"hopper": 1, "ant": 1}, share=0.1, seeds=SEEDS[:4])
    rows += csv_rows("both", {"hopper": 1, "ant": 1}, share=0.1)  # four pairs
    found = little.students(read(tmp_path, rows))
    compared = little.compare(found)
    got = [(100 * c.group.share, c.group.mode, c.baseline, c.what, c.n_pairs) for c in compared]
    assert got == [
        (2, "data", "data, tuned", "mean", 5),
        (2, "data", "data, tuned", "worst task", 5),
        (2, "labels", "data, tuned", "mean", 5),
        (2, "labels", "data, tuned", "worst task", 5),
        (100, "both", "data", "mean", 6),
        (100, "both", "data", "worst task", 6),
    ]
    assert [c.difference for c in compared] == pytest.approx([-0.2, -0.2, 0.2, 0.2, 0, 0.05])
    mean, worst = compared[4:]
    # at 100 % pairs differ by 0.05 and -0.05 in turns, one of each for every teacher
    low, high = np.quantile(mean.resampled, [0.05, 0.95])
    assert mean.cells()[3] == f"{max(-low, high):.3f}"
    assert mean.cells()[0].startswith("0.000 (-0.0")
    assert mean.p > 0.999
    assert 0.01 < worst.p < 0.5
    assert max(c.p for c in compared[:4]) < 0.001


def test_compare__puts_what_asks_teachers_beside_their_labels_too(tmp_path):
    rows = csv_rows("data", {"ant": 0.5}) + csv_rows("labels", {"ant": 0.75}) + csv_rows("asked", {"ant": 1})
    rows += csv_rows("teacher", {"ant": 1}, compression=1.0)  # no students
    compared = little.compare(little.students(read(tmp_path, rows)))
    got = [(c.group.mode, c.baseline, c.difference) for c in compared if c.what == "mean"]
    assert got == [("labels", "data", 0.25), ("asked", "data", 0.5), ("asked", "labels", 0.25)]


def test_compare__corrects_for_all_comparisons(small):
    compared = little.compare(little.students(small))
    assert len(compared) == 6
    assert [c.holm_p for c in compared] == holm([c.p for c in compared]).tolist()
    assert max(c.p for c in compared[:4]) < 1e-9  # all pairs differ by as much
    assert min(c.p for c in compared[4:]) > 0.05  # one pair differs
    text = little.comparison_table(little.students(small), compared)
    assert lines(text)[1] == (
        "| builtin, 2 % | labels − data, tuned | 6 | **0.200 (0.200-0.200)** | <0.0001 | <0.0001 | "
        "| **0.200 (0.200-0.200)** | <0.0001 | <0.0001 | |"
    )
    assert lines(text)[2].startswith("| builtin, 100 % | labels − data | 6 | -0.033 (-0.1")
    assert len(lines(text)) == 3


def test_tables__hold_all_tables_each_below_a_line_about_it(small):
    found = little.students(small)
    blocks = little.tables(small).split("\n\n")
    assert blocks[1::2] == [
        little.phase_diagram(found, "builtin"),
        little.details(found, "builtin"),
        little.comparison_table(found, little.compare(found)),
    ]
    assert blocks[0].startswith("Retention: mean (interval), worst task; builtin, 20.8 times smaller")
    assert blocks[4].startswith("Differences of retention on the same seeds: 4 of 6, in bold, survive")


def test_by_episodes__has_the_mean_difference_of_each_range_of_episodes(tmp_path):
    rows = [
        *csv_rows("labels", {"hopper": 0.5, "ant": 0.5}),
        *csv_rows("asked", {"hopper": 0.6, "ant": [0.7, 0.9]}, seeds=SEEDS[:2]),  # the seeds of both count
        *csv_rows("labels", {"hopper": 1.0, "ant": 1.0}, share=1.0, episodes=100, seeds=SEEDS[:1]),
        *csv_rows("asked", {"hopper": 0.9, "ant": 1.0}, share=1.0, episodes=100, seeds=SEEDS[:1]),
        *csv_rows("asked", {"hopper": 9.0, "ant": 9.0}, compression=50),
        *csv_rows("labels", {"hopper": 0.0, "ant": 0.0}, compression=50),
    ]
    error = np.std([0.1, 0.1, 0.2, 0.4], ddof=1) / 2
    expected = [["below 10", "4", "0.200", f"{error:.3f}"], ["100 and more", "2", "-0.050", "0.050"]]
    assert little.by_episodes(little.students(read(tmp_path, rows))) == expected
    assert little.tables(read(tmp_path, rows)).endswith("| 100 and more | 2 | -0.050 | 0.050 |")


def test_plot__shows_a_column_for_each_set_of_tasks(small, tmp_path):
    other = read(tmp_path, csv_rows("asked", {"swimmer": [0.7, 0.8, 0.9] * 2}, tasks="thirdparty"))
    assert little.plot(tmp_path / "one.png", small)
    assert little.plot(tmp_path / "two.png", small + other)
    one, two = (plt.imread(tmp_path / name)[..., :3] for name in ("one.png", "two.png"))
    assert two.shape[1] > 1.9 * one.shape[1]
    right = two[:, one.shape[1] :]
    assert (np.ptp(right, axis=-1) > 0.2).sum() > 100  # colours beside the black and grey of its axes
    assert not little.plot(tmp_path / "none.png", [])
    clones = read(tmp_path, csv_rows("clone", {"ant": 1}))
    assert not little.plot(tmp_path / "none.png", clones)
    assert not (tmp_path / "none.png").exists()


def test_plot_shares__gives_a_mode_its_colour_whatever_else_is_drawn(small, tmp_path):
    alone = read(tmp_path, csv_rows("labels", {"ant": 0.9}))
    colours = []
    for rows in (small, alone):
        fig, ax = plt.subplots()
        little.plot_shares(ax, little.students(rows), "builtin", mean_retention)
        (labels,) = [c for c in ax.containers if c.get_label().startswith("labels")]
        colours.append(labels.lines[0].get_color())
        plt.close(fig)
    assert colours[0] == colours[1]


def test_plot_shares__draws_the_main_students_at_their_shares(small):
    fig, ax = plt.subplots()
    little.plot_shares(ax, little.students(small), "builtin", mean_retention)
    drawn = {}
    for container in ax.containers:
        drawn[container.get_label()] = container.lines[0].get_xydata()
    plt.close(fig)
    assert list(drawn) == ["data (6 runs)", "data, tuned (6 runs)", "labels (6 runs)"]
    assert drawn["labels (6 runs)"][:, 1] == pytest.approx(
        [0.85, 12.2 / 12]
    )  # neither 50 times nor worst half
    assert drawn["data, tuned (6 runs)"].tolist() == [pytest.approx([0.02, 0.65])]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["2 %\n5", "100 %\n240"]
    assert ax.get_xscale() == "log"
