"""support/verdict.py: each flag on numbers that deserve it, none on numbers that do not."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_evaluate import WALK

from conftest import ROOT
from support import verdict

TASK = dataclasses.replace(WALK, reference=(-10.0, 1000.0), obs_dim=6, act_dim=4)
DATA = {
    "episodes": 100,
    "steps": 20_000,
    "return_mean": 500.0,
    "return_min": 0.0,
    "return_max": 1000.0,
    "saturation": 0.1,
}


def row(name: str, target: float, mean: float, std: float = 20.0, episodes: int = 5) -> dict[str, Any]:
    return {"name": name, "target": target, "return_mean": mean, "return_std": std, "episodes": episodes}


SWEEP = [row("p10", 200.0, 210.0), row("median", 500.0, 510.0), row("p95", 900.0, 890.0)]
GOOD = {
    "target": 900.0,
    "return_mean": 880.0,
    "return_std": 20.0,
    "episodes": 20,
    "normalized_score": 88.0,
    "sweep": SWEEP,
    "median": {"target": 500.0, "return_mean": 510.0, "return_std": 20.0, "episodes": 20},
    "data": DATA,
    "heldout_nll_rise": 0.0,
    "heldout_log_std": -1.5,
}
UNEVALUATED = {
    **GOOD,
    "return_mean": None,
    "return_std": None,
    "episodes": None,
    "normalized_score": None,
    "sweep": None,
}
CAUSES = {
    "overfit": {"heldout_nll_rise": 0.11},
    "few-data": {"data": {**DATA, "episodes": 9}},
    "deterministic": {"heldout_log_std": -3.1},
    "saturated": {"data": {**DATA, "saturation": 0.51}},
}


def names(metrics: dict[str, Any], teacher: dict[str, Any] | None = None, task: Any = TASK) -> list[str]:
    return verdict.verdict(task, metrics, teacher).names()


# ---- symptoms ----------------------------------------------------------------------------------------------


def test_verdict__has_nothing_against_a_good_teacher_whatever_its_data():
    for cause in CAUSES.values():
        assert names({**GOOD, **cause}) == []
    assert verdict.lines([WALK], {"walk": GOOD}) == []


def test_below_target__is_less_than_80_percent_measured_from_a_random_return():
    # 80 % of the way from -10 to 900 is 718
    assert names({**GOOD, "return_mean": 717.0}) == ["below-target"]
    assert names({**GOOD, "return_mean": 719.0}) == []


def test_below_target__judges_no_target_that_a_random_policy_reaches():
    metrics = {**GOOD, "target": -20.0, "return_mean": -29.5, "data": {**DATA, "return_mean": -30.0}}
    assert names(metrics) == []


def test_below_target__is_not_an_expert_between_its_own_episodes():
    """Data of experts alone: their lowest return scores 0, and is no random policy's."""
    task = dataclasses.replace(TASK, reference=(880.0, 1000.0))
    assert names({**GOOD, "return_mean": 890.0}, task=task) == []


def test_inverted__is_a_lower_target_that_gives_clearly_more():
    def flagged(*rows, mean=800.0, **changes):
        return "inverted" in names({**GOOD, "return_mean": mean, "sweep": rows, **changes})

    assert flagged(row("p10", 200.0, 910.0))
    assert not flagged(row("p10", 200.0, 890.0))  # less than a tenth of the data's range more
    assert not flagged(row("p10", 200.0, 910.0, std=115.0))  # within two standard errors, 115 / sqrt(5 - 1)
    assert flagged(row("p10", 200.0, 910.0, std=105.0))
    assert not flagged(row("p10", 200.0, 910.0, episodes=1))  # one episode tells nothing of the noise
    assert not flagged(row("p99", 990.0, 980.0))  # a higher target may give more
    assert flagged(median={**GOOD["median"], "return_mean": 910.0})
    assert not flagged(row("p10", 900.0, 990.0))  # equal targets are the same question


def test_inverted__names_the_target_that_gives_most():
    rows = (row("p10", 200.0, 950.0), row("p25", 300.0, 970.0))
    line = verdict.verdict(TASK, {**GOOD, "return_mean": 800.0, "sweep": rows}).line("walk, teacher")
    assert line == (
        "walk, teacher: inverted (asked for 300, returns 970; asked for 900, 800); "
        "remedy: ask for 300 (--target p25)"
    )


def test_below_data__is_a_tenth_less_than_the_datas_mean():
    metrics = {**GOOD, "target": 500.0, "sweep": [], "median": None}
    assert names({**metrics, "return_mean": 448.0}) == ["below-data"]
    assert names({**metrics, "return_mean": 450.0}) == []


def test_verdict__of_a_student_passes_its_teachers_symptoms_on():
    bad = {**GOOD, "return_mean": 300.0, "normalized_score": 30.0}
    assert names({**GOOD, "retention": 2.9}, bad) == ["teacher-flagged"]
    assert names({**GOOD, "retention": 1.0}, GOOD) == []
    assert names({**GOOD, "retention": 1.0}, {**UNEVALUATED, **CAUSES["overfit"]}) == []
    assert names({**UNEVALUATED, "retention": None}, bad) == ["teacher-flagged"]


def test_below_teacher__is_less_than_80_percent_of_its_score():
    better = {**GOOD, "target": 900.0, "normalized_score": 100.0}
    assert names({**GOOD, "retention": 0.79}, better) == ["below-teacher"]
    of_success = verdict.verdict(TASK, {**GOOD, "retention": 0.79, "retention_of": "success"}, better)
    assert "79 % of its teacher's success rate" in of_success.line("-")
    assert names({**GOOD, "retention": 0.81}, better) == []
    negative = {**GOOD, "normalized_score": -1.0}  # the ratio means nothing
    assert names({**GOOD, "retention": -88.0}, negative) == []


number = st.floats(-2000, 2000)


@given(st.data())
def test_symptoms__are_never_more_for_a_higher_return(draw):
    target = draw.draw(number)
    sweep = [row("p10", draw.draw(number), draw.draw(number)) for _ in range(draw.draw(st.integers(0, 3)))]
    data = {**DATA, "return_mean": draw.draw(number)}
    lower, higher = sorted(draw.draw(st.tuples(number, number)))
    teacher = {**GOOD, "return_mean": draw.draw(number), "normalized_score": draw.draw(number)}

    def symptoms(mean):
        score = 100 * (mean + 10) / 1010
        metrics = {**GOOD, "target": target, "return_mean": mean, "sweep": sweep, "data": data}
        if teacher["normalized_score"]:
            metrics["retention"] = score / teacher["normalized_score"]
        found = verdict.verdict(TASK, metrics, teacher).symptoms
        return {flag.name for flag in found}

    assert symptoms(higher) <= symptoms(lower)


# ---- causes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAUSES)
def test_cause__is_named_beside_a_symptom_or_where_nothing_was_evaluated(name):
    bad = {**GOOD, "return_mean": 600.0}
    assert names(bad) == ["below-target"]
    assert names(UNEVALUATED) == []
    assert names({**bad, **CAUSES[name]}) == ["below-target", name]
    assert names({**UNEVALUATED, **CAUSES[name]}) == [name]


def test_few_data__is_also_few_steps_for_the_dimensions():
    for steps, flags in ((999, ["few-data"]), (1000, [])):  # 100 for each of 6 + 4
        assert names({**UNEVALUATED, "data": {**DATA, "steps": steps}}) == flags


def test_verdict__judges_what_metrics_of_older_runs_hold():
    old = {"target": 900.0, "return_mean": 600.0, "return_std": 20.0, "normalized_score": 60.0}
    old["median"] = {"target": 500.0, "return_mean": 710.0, "return_std": 20.0}
    assert names(old) == ["below-target"]
    assert names({**old, "heldout_log_std": None, "data": None, "sweep": None}) == ["below-target"]
    assert names(old, {}) == ["below-target"]


def test_operations__lists_every_flag():
    source = Path(verdict.__file__).read_text()
    section = (ROOT / "docs/operations.md").read_text().split("## Verdicts")[1].split("\n## ")[0]
    in_code = re.findall(r'Flag\("([a-z-]+)"', source)
    assert re.findall(r"^\| `([a-z-]+)` \|", section, re.M) == in_code


# ---- lines -------------------------------------------------------------------------------------------------


def test_line__has_symptoms_causes_and_a_remedy():
    bad = {**GOOD, "return_mean": 420.0, **CAUSES["few-data"]}
    (line,) = verdict.lines([TASK], {"walk": bad})
    assert line == (
        "walk, teacher: below-target (asked for 900, returns 420: 47 % of the way from -10), "
        "below-data (returns 420, the data's episodes on average 500); "
        "likely cause: few-data (9 episodes of 20,000 steps are few for 10 dimensions); "
        "remedy: collect more episodes, or train for more --steps, or the teacher with more --context "
        "if observations hide a state"
    )


def test_line__is_a_caution_where_nothing_was_evaluated():
    (line,) = verdict.lines([TASK], {"walk": {**UNEVALUATED, **CAUSES["overfit"]}})
    assert line == (
        "walk, teacher: not evaluated, caution: overfit "
        "(the held-out NLL rose by 0.11 nats from its minimum); remedy: fewer --steps, or --dropout 0.1"
    )


def test_lines__of_a_student_follow_its_teachers():
    bad = {**GOOD, "return_mean": 600.0, "normalized_score": 60.0}
    teacher, student = verdict.lines([TASK], {"walk": {**bad, "retention": 1.0}}, {"walk": bad})
    assert teacher.startswith("walk, teacher: below-target")
    assert student.startswith("walk, student: below-target")
    assert student.endswith(
        "teacher-flagged (below-target); remedy: mend the teacher, then distil again with --overwrite"
    )
    good = {**GOOD, "retention": 1.0}
    cautioned = {**UNEVALUATED, **CAUSES["overfit"]}
    assert verdict.lines([TASK], {"walk": good}, {"walk": cautioned}) == []  # its returns are good
    unevaluated = {**UNEVALUATED, "retention": None}
    assert len(verdict.lines([TASK], {"walk": unevaluated}, {"walk": cautioned})) == 1
