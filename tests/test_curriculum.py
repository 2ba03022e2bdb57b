import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import curriculum

distances = st.lists(st.floats(1e-8, 1e8), min_size=1, max_size=20).map(
    lambda x: torch.tensor(x, dtype=torch.float64)
)
powers = st.sampled_from([0.5, 1.0, 2.0, 4.0])


def shares_of(name, d, step=0, seed=0, **knobs):
    return curriculum.METHODS[name](
        d, step, torch.full_like(d, 1 / len(d)), torch.Generator().manual_seed(seed), **knobs
    )


@given(st.sampled_from(sorted(curriculum.METHODS)), distances, st.integers(0, 1000), st.integers(0, 1000))
def test_shares_are_a_distribution(name, d, step, seed):
    s = shares_of(name, d, step, seed)
    assert s.shape == d.shape and (s >= 0).all() and abs(s.sum() - 1) < 1e-9


@given(st.sampled_from(["novelty", "least"]), distances)
def test_power_zero_is_all_teachers_at_once(name, d):
    assert torch.allclose(shares_of(name, d, power=0.0), shares_of("all", d))


@given(distances)
def test_infinite_power_is_the_argmax_and_leasts_the_argmin(d):
    assert (
        shares_of("novelty", d, power=float("inf")).argmax() == d.argmax()
        and shares_of("novelty", d, power=float("inf")).max() == 1
    )
    assert shares_of("least", d, power=float("inf")).argmax() == d.argmin()


@given(st.sampled_from(["novelty", "least", "dro", "all"]), distances, st.randoms(use_true_random=False))
def test_renaming_the_teachers_renames_their_shares(name, d, random):
    order = list(range(len(d)))
    random.shuffle(order)
    assert torch.allclose(shares_of(name, d[order]), shares_of(name, d)[order])


@given(distances, powers)
def test_the_farther_the_teacher_the_more_of_the_batch_and_least_the_other_way(d, p):
    i = d.argsort()
    assert (shares_of("novelty", d, power=p)[i].diff() >= -1e-12).all() and (
        shares_of("dro", d)[i].diff() >= -1e-12
    ).all()
    assert (shares_of("least", d, power=p)[i].diff() <= 1e-12).all()


def test_twice_as_far_is_four_times_the_share_at_power_two():
    s = (shares_of("novelty", torch.tensor([1.0, 2.0]), power=2.0) - curriculum.FLOOR / 2) / (
        1 - curriculum.FLOOR
    )
    assert torch.allclose(s, torch.tensor([0.2, 0.8]))


@given(st.sampled_from(["novelty", "least", "dro"]), distances, st.integers(-6, 6))
def test_the_scale_of_the_distances_does_not_matter(name, d, k):
    assert torch.allclose(shares_of(name, d * 10.0**k), shares_of(name, d), rtol=1e-6)


@given(st.sampled_from(["novelty", "least", "dro"]), distances)
def test_no_teacher_is_ever_left_out_of_a_mixed_order(name, d):
    assert (shares_of(name, d) >= curriculum.FLOOR / len(d) - 1e-12).all()


@given(st.integers(1, 10), st.integers(0, 100))
def test_fixed_visits_every_teacher_in_turn(n, start):
    assert [int(shares_of("fixed", torch.ones(n), start + k).argmax()) for k in range(n)] == [
        (start + k) % n for k in range(n)
    ]


@given(st.integers(1, 6))
def test_uniform_takes_one_teacher_and_over_time_every_teacher(n):
    gen = torch.Generator().manual_seed(0)
    picks = [curriculum.uniform(torch.ones(n), 0, None, gen) for _ in range(50 * n)]
    assert all(p.max() == 1 for p in picks) and torch.stack(picks).mean(0).min() > 0.5 / n


def test_dro_accumulates_and_novelty_does_not():
    d, gen = torch.tensor([1.0, 3.0]), torch.Generator()
    for name, grows in (("dro", True), ("novelty", False)):
        first = curriculum.METHODS[name](d, 0, torch.tensor([0.5, 0.5]), gen)
        second = curriculum.METHODS[name](d, 1, first, gen)
        assert (second[1] > first[1] + 1e-4) == grows


def test_dro_goes_on_to_the_teacher_that_stays_far():
    d, shares = torch.tensor([1.0, 0.1, 0.1]), torch.full((3,), 1 / 3)
    for step in range(1000):
        shares = curriculum.dro(d, step, shares, torch.Generator())
    assert shares[0] > 0.9 and (shares >= curriculum.FLOOR / 3 - 1e-6).all()


@given(st.integers(1, 8))
def test_ties_go_to_the_lowest_index(n):
    for name in ("novelty", "least"):
        assert shares_of(name, torch.ones(n), power=float("inf")).tolist() == [1.0] + [0.0] * (n - 1)
    assert shares_of("novelty", torch.tensor([1.0, 5.0, 5.0]), power=float("inf")).tolist() == [0.0, 1.0, 0.0]


@given(
    st.sampled_from(sorted(curriculum.METHODS)),
    st.integers(1, 5),
    st.sampled_from([0.0, 1.0, 2.0, float("inf")]),
)
def test_zero_distances_still_give_a_distribution(name, n, p):
    method = (
        functools.partial(curriculum.METHODS[name], power=p)
        if name in ("novelty", "least")
        else curriculum.METHODS[name]
    )
    s = method(torch.zeros(n), 0, torch.ones(n) / n, torch.Generator())
    assert s.isfinite().all() and abs(s.sum() - 1) < 1e-6
    if name == "least" and n > 1:
        assert (
            method(torch.tensor([0.0] + [1.0] * (n - 1)), 0, torch.ones(n) / n, torch.Generator()).argmax()
            == 0
        )


@given(st.sampled_from(sorted(curriculum.METHODS)), st.integers(1, 5), st.data())
def test_nan_is_an_error_that_names_the_teacher(name, n, draws):
    d, i = torch.ones(n), draws.draw(st.integers(0, n - 1))
    d[i] = float("nan")
    with pytest.raises(ValueError, match=f"teacher {i} "):
        shares_of(name, d)


@given(st.sampled_from(sorted(curriculum.METHODS)), st.floats(0, 1e6))
def test_one_teacher_gets_everything(name, x):
    assert torch.allclose(shares_of(name, torch.tensor([x])), torch.ones(1))
