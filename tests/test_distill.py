import gc
import re
import unittest.mock
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import triton_needed

import alignment
import data
import distill
import kernels
import model as dt
import surgery
import teacher
from conftest import make_dataset
from kernels.kl import policy_kl
from support import (
    UserError,
    cli,
    files,
    log,
    training,
)

ACT = torch.tensor([2, 3, 1])


def problem(dtype=torch.float64, seed=0, B=12):
    """A small student of three tasks, a batch of windows of all three, and losses(theta) -> L (3,)."""
    torch.manual_seed(seed)
    cfg = dt.ModelConfig((3, 5, 2), (2, 3, 1), n_layer=2, n_head=2, n_embd=8, context=4)
    student = dt.DecisionTransformer(cfg).to(dtype)
    theta = dt.flatten(student)
    task = torch.arange(B) % 3
    mask = torch.arange(4) >= torch.randint(0, 4, (B, 1))
    inputs = (
        task,
        torch.randn(B, 4, 5, dtype=dtype),
        torch.randn(B, 4, 3, dtype=dtype),
        torch.randn(B, 4, dtype=dtype),
        torch.randint(0, 20, (B, 4)),
        mask,
    )
    targets = torch.randn(2, B, 4, 3, dtype=dtype).tanh()

    def losses(vector):
        mean, log_std = torch.func.functional_call(student, dt.unflatten(student, vector), inputs)
        sums, counts = policy_kl(mean, log_std, *targets, mask, task, ACT, "forward", 0.05)
        return sums / counts

    return theta, losses


# ---- alignments ------------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_forward_mode_alignments_equal_reverse_mode_in_float64(seed):
    theta, losses = problem(seed=seed)
    u = torch.randn_like(theta.data)
    jacobian = torch.autograd.functional.jacobian(losses, theta.detach())  # (3, P), one backward per teacher
    assert torch.allclose(alignment.exact(losses, theta, u), jacobian @ u, rtol=1e-10, atol=1e-12)


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_estimated_alignments_approach_the_exact_ones_for_small_steps(seed):
    theta, losses = problem(seed=seed)
    u = torch.autograd.grad(losses(theta).sum(), theta)[0]
    delta = -1e-7 * u
    with torch.no_grad():
        got = alignment.estimate(losses(theta), losses(theta + delta), u, delta)
    exact = alignment.exact(losses, theta, u)
    assert torch.allclose(got, exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))


def test_alignments_with_no_update_are_zero():
    zero = torch.zeros(5)
    assert not alignment.estimate(torch.ones(2), torch.ones(2), zero, zero).any()


def test_projecting_by_alignments_is_projecting_each_teachers_own_gradient():
    theta, losses = problem()
    s, gs = (
        torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64),
        torch.autograd.functional.jacobian(losses, theta.detach()),
    )
    u = gs[1] / gs[1].norm() - gs[0] / gs[0].norm()  # in conflict with the first teacher, for sure
    kappa = surgery.per_teacher(alignment.exact(losses, theta, u), s, u @ u)
    want = sum(si * surgery.project(g, u) for si, g in zip(s, gs, strict=True))
    assert torch.allclose(surgery.previous(s @ gs, u, kappa)[0], want, atol=1e-10) and kappa < 0


# ---- targets ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_tasks():
    if "made" not in _made:
        make_dataset("tests/a-v0", [9, 1, 23, 4, 12, 7], obs_dim=3, act_dim=2, spec="Hopper-v5")
        make_dataset("tests/b-v0", [5, 30, 2, 8, 11, 6], obs_dim=5, act_dim=3, seed=1, spec="Walker2d-v5")
        _made["made"] = [data.load(n) for n in ("tests/a-v0", "tests/b-v0")]
    return _made["made"]


_made = {}


def teachers_of(sets, K=6):
    torch.manual_seed(5)
    return [
        dt.DecisionTransformer(dt.ModelConfig((d.task.obs_dim,), (d.task.act_dim,), 1, 1, 16, K)).eval()
        for d in sets
    ]


def test_cached_targets_are_the_teachers_outputs_with_at_least_half_a_context(two_tasks):
    K, ts = 6, teachers_of(two_tasks)
    w = data.Windows([d.train for d in two_tasks], [d.task for d in two_tasks], K, targets=True)
    distill.cache_targets(ts, w)
    table, t = torch.stack(w.table[:, -2 * w.A :].chunk(2, dim=-1)), w.table[:, w.O + w.A + 1].long()
    for row in range(len(w.table)):
        i = int(row >= w.size[0])
        fits = []
        for end in range(
            row, min(len(w.table), row + K // 2)
        ):  # some window whose newest half holds this row made its target
            if end > row and t[end] == 0:
                break
            b = w.gather(torch.tensor([i]), torch.tensor([end]))
            fits.append(
                torch.allclose(
                    distill.live_targets(ts, b)[:, 0, K - 1 - (end - row)], table[:, row], atol=1e-5
                )
            )
        assert any(fits), f"row {row} of timestep {t[row]}"
    assert not table[:, : w.size[0], 2:].any()  # beyond a teacher's action size


def test_live_targets_are_each_windows_own_teachers(two_tasks):
    ts = teachers_of(two_tasks)
    w = data.Windows([d.train for d in two_tasks], [d.task for d in two_tasks], 6)
    b = w.sample(20, torch.tensor([0.5, 0.5]), torch.Generator().manual_seed(0))
    out = distill.live_targets(ts, b)
    for i in range(20):
        k = int(b.task[i])
        O, A = two_tasks[k].task.obs_dim, two_tasks[k].task.act_dim
        one = ts[k](
            0,
            b.states[i : i + 1, :, :O],
            b.actions[i : i + 1, :, :A],
            b.rtg[i : i + 1],
            b.timesteps[i : i + 1],
            b.mask[i : i + 1],
        )
        assert torch.allclose(out[:, i, :, :A], torch.stack(one)[:, 0], atol=1e-5)


@pytest.mark.parametrize("surgery", ["previous", "average"])
def test_surgery_by_teacher_is_the_sum_of_every_teachers_gradient_projected_by_itself(two_tasks, surgery):
    torch.manual_seed(0)
    tasks, ts, B = [d.task for d in two_tasks], teachers_of(two_tasks), 8
    w = data.Windows([d.train for d in two_tasks], tasks, 6, targets=True)
    distill.cache_targets(ts, w)
    m = dt.DecisionTransformer(
        dt.ModelConfig(tuple(t.obs_dim for t in tasks), tuple(t.act_dim for t in tasks), 1, 1, 8, 6)
    )
    cfg = distill.Config(
        curriculum="all",
        surgery=surgery,
        surgery_scope="teacher",
        batch_size=B,
        lr=1e-2,
        warmup=1,
        dtype="float32",
    )
    generator, act_dims, conflicts = (
        torch.Generator().manual_seed(0),
        torch.tensor([t.act_dim for t in tasks]),
        0,
    )
    update, _, state = distill.learner(cfg, m, ts, w, w.spread(4), generator)
    for step in range(10):
        u, same = state["u"].clone(), torch.Generator().manual_seed(0)
        same.set_state(generator.get_state())
        b = w.sample(B, torch.tensor([0.5, 0.5]), same)
        sums, counts = policy_kl(*m(*b[:6]), *b.targets, b.mask, b.task, act_dims, cfg.kl, cfg.sigma_floor)
        each = [
            torch.cat([x.flatten() for x in torch.autograd.grad(L, m.parameters(), retain_graph=True)])
            for L in sums / counts
        ]
        inner = [g @ u for g in each]
        conflicts += sum(x < 0 for x in inner)
        wanted = sum(
            0.5 * (g - x.clamp_max(0) / (u @ u) * u if step else g) for g, x in zip(each, inner, strict=True)
        )
        update(step)
        got = state["u"] if surgery == "previous" else (state["u"] - 0.9 * u) / 0.1
        assert torch.allclose(got, wanted, atol=2e-4 * wanted.abs().max())
    assert conflicts > 2


@triton_needed
@pytest.mark.parametrize(
    "options", [{}, {"surgery": "previous", "surgery_scope": "teacher"}, {"alignment_weight": 1.0}]
)
def test_the_loop_with_the_kernels_is_the_loop_without_them(two_tasks, options, monkeypatch):
    tasks, ts, made = [d.task for d in two_tasks], teachers_of(two_tasks), []
    for on_cpu in (False, True):
        monkeypatch.setattr(kernels, "on_cpu", on_cpu)
        torch.manual_seed(0)
        w = data.Windows([d.train for d in two_tasks], tasks, 6, targets=True)
        distill.cache_targets(ts, w)
        m = dt.DecisionTransformer(
            dt.ModelConfig(tuple(t.obs_dim for t in tasks), tuple(t.act_dim for t in tasks), 1, 1, 8, 6)
        )
        cfg = distill.Config(batch_size=8, lr=1e-2, warmup=1, log_interval=5, dtype="float32", **options)
        update, _, state = distill.learner(cfg, m, ts, w, w.spread(4), torch.Generator().manual_seed(0))
        for step in range(5):
            update(step)
        made.append(state)
    assert torch.allclose(made[0]["record"], made[1]["record"], rtol=1e-2, atol=1e-4)
    assert torch.allclose(made[0]["theta"], made[1]["theta"], atol=1e-3)


def test_a_captured_function_keeps_the_tensors_that_it_reads_and_leaves_those_that_it_changes(monkeypatch):
    monkeypatch.setattr(torch, "cuda", unittest.mock.MagicMock())
    rows, total = training.schedule(1, 1.0, 1), torch.zeros(4)
    assert len(rows) >= training.WARM_UP_CALLS  # it is called so often whatever --steps says
    replay = training.captured(lambda rows=rows: total.add_(rows.sum(0)), [total], torch.Generator())
    alive = weakref.ref(rows)
    del rows
    gc.collect()
    assert alive() is not None and callable(replay) and not total.any()


# ---- whole runs, in this process -------------------------------------------------------------------------------------

TINY = {"log_interval": 10, "eval_episodes": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def teachers(two_tasks, tmp_path_factory):
    """Two trained teachers' directories."""
    root = tmp_path_factory.mktemp("teachers")
    return tuple(str(teacher.main(teacher.Config(dataset=d.task.dataset, steps=60, batch_size=16, n_layer=1, n_embd=16, context=6, out_dir=str(root / str(i)), **TINY)))
                 for i, d in enumerate(two_tasks))  # fmt: skip


def student(teachers, out, **options):
    cfg = {"steps": 60, "batch_size": 16, "n_layer": 1, "n_embd": 16, "warmup": 5, **TINY, **options}
    distill.main(distill.Config(teachers=teachers, out_dir=str(out), **cfg))
    return files.read_csv(out / "log.csv")


METHODS = [{"curriculum": c} for c in ("novelty", "fixed", "uniform", "all", "dro", "least")] + [
    {"novelty_power": float("inf")},
    {"surgery": "previous"},
    {"surgery": "switch", "curriculum": "fixed"},
    {"surgery": "average", "surgery_scope": "teacher"},
    {"surgery": "pcgrad"},
    {"surgery": "previous", "surgery_scope": "teacher"},
    {"alignment_weight": 0.5},
    {"alignment_weight": 0.5, "novelty_power": float("inf")},
    {"alignment_weight": 0.5, "alignment": "estimate", "surgery": "previous", "surgery_scope": "teacher"},
    {"kl": "reverse", "temperature": 2.0},
    {"targets": "live"},
    {"loss": "mse"},
]


@pytest.mark.parametrize("options", METHODS, ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()))
def test_every_method_brings_the_student_at_least_five_times_nearer_to_its_teachers(
    teachers, tmp_path, options
):
    log = student(teachers, tmp_path, steps=150, lr=1e-2, **options)
    for name in ("tests/a-v0", "tests/b-v0"):
        kl = log[f"heldout_kl_{name}"]
        kl = kl[~np.isnan(kl)]
        if options.get("loss") == "mse":  # says nothing about sigma, so it is held to its own measure
            assert kl[-1] < kl[0] and log["loss"][-10:].mean() < log["loss"][0] / 5
        else:
            assert kl[-1] < kl[0] / (
                2 if options.get("novelty_power") == float("inf") else 5
            )  # argmax swings between the two teachers
    shares = np.stack([log["share_tests/a-v0"], log["share_tests/b-v0"]])
    assert np.allclose(shares.sum(0), 1) and np.abs(log["cosine"]).max() <= 1 + 1e-6
    assert bool(log["alignment_tests/a-v0"].any()) == ("alignment_weight" in options)
    if options.get("surgery") == "none":
        assert not log["projected"].any()
    if options.get("curriculum") == "fixed":
        assert shares[0].tolist() == [1.0, 0.0] * 75


def test_the_same_seed_gives_the_same_log_to_the_bit_and_another_seed_another(teachers, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        logs = [
            student(
                teachers, tmp_path / str(i), steps=20, seed=s, surgery="previous", surgery_scope="teacher"
            )
            for i, s in enumerate((0, 0, 1))
        ]
    finally:
        torch.set_num_threads(threads)
    for k in logs[0]:
        assert k == "seconds" or np.array_equal(logs[0][k], logs[1][k], equal_nan=True), k
    assert not np.array_equal(logs[0]["loss"], logs[2]["loss"])


def test_a_teacher_of_the_same_seed_is_the_same_to_the_bit(two_tasks, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for i in range(2):
            teacher.main(
                teacher.Config(
                    dataset="tests/a-v0",
                    steps=20,
                    n_embd=16,
                    dropout=0.1,
                    out_dir=str(tmp_path / str(i)),
                    **TINY,
                )
            )
    finally:
        torch.set_num_threads(threads)
    a, b = (files.read_csv(tmp_path / str(i) / "log.csv") for i in range(2))
    assert all(k == "seconds" or np.array_equal(a[k], b[k]) for k in a)
    assert (tmp_path / "0/model.safetensors").read_bytes() == (tmp_path / "1/model.safetensors").read_bytes()


def test_without_surgery_the_loop_is_plain_adamw_on_the_mixed_loss(teachers, tmp_path):
    """Ten steps of an independent, per-parameter loop give the same student."""
    options = {
        "grad_clip": 5.0,
        "lr": 4e-3,
        "top": 0.25,
        "dtype": "float32",
    }  # norms of 7.4 to 3.2: AdamW alone would not see their scale
    student(teachers, tmp_path, steps=10, surgery="none", curriculum="all", log_interval=100, **options)
    got, _ = dt.load(tmp_path)
    ts = [dt.load(t)[0] for t in teachers]
    sets = [data.load(n) for n in ("tests/a-v0", "tests/b-v0")]
    w = data.Windows([d.train for d in sets], [d.task for d in sets], 6, targets=True, top=0.25)
    distill.cache_targets(ts, w)
    torch.manual_seed(0)
    gen, m = torch.Generator().manual_seed(0), dt.DecisionTransformer(got.cfg)
    opt = torch.optim.AdamW(m.parameters(), lr=1.0, weight_decay=1e-4)
    for step in range(10):
        b = w.sample(16, torch.tensor([0.5, 0.5]), gen)
        sums, counts = policy_kl(
            *m(*b[:6]), *b.targets, b.mask, b.task, torch.tensor([2, 3]), "forward", 0.05
        )
        opt.zero_grad()
        (sums / counts).mean().backward()
        torch.nn.utils.clip_grad_norm_(m.parameters(), 5.0)
        opt.param_groups[0]["lr"] = 4e-3 * min((step + 1) / 5, (10 - step) / 5)
        opt.step()
    for (name, p), q in zip(m.named_parameters(), got.parameters(), strict=True):
        if "qkv.bias" not in name:  # the keys' bias has no gradient but rounding, which AdamW enlarges
            assert torch.allclose(p, q, atol=1e-4), f"{name}: {(p - q).abs().max()}"


def test_a_long_trainings_log_holds_no_more_than_so_many_rows(teachers, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "LOG_ROWS", 8)
    student(teachers, tmp_path, steps=20, log_interval=10)
    assert files.read_csv(tmp_path / "log.csv")["step"].tolist() == [1, 3, 6, 9, 10, 12, 15, 18, 20]


@pytest.mark.parametrize(("spent", "left"), [(1.0, "0:03"), (20.0, "1:00"), (36.0, "1:48"), (39.9, "2:00")])
def test_the_remaining_time_is_minutes_and_seconds(spent, left):
    assert log.progress(100, 400, spent, "").endswith(f" {left} left")


def test_a_run_holds_what_it_promises_and_a_second_call_skips_it(teachers, tmp_path, capsys):
    student(teachers, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        ".lock",
        "config.json",
        "log.csv",
        "metrics.json",
        "model.safetensors",
        "model.json",
        "plots.png",
    }
    metrics = files.read_json(tmp_path / "metrics.json")
    assert set(metrics) == {"tasks", "compression", "parameters", "seconds", "machine"} and set(
        metrics["tasks"]
    ) == {"tests/a-v0", "tests/b-v0"}
    assert set(metrics["tasks"]["tests/a-v0"]) == {
        "target",
        "return_mean",
        "return_std",
        "normalized_score",
        "retention",
        "heldout_kl",
    }
    model, meta = dt.load(tmp_path)
    assert metrics["parameters"] == model.n_params == sum(p.numel() for p in model.parameters())
    assert metrics["compression"] == sum(dt.load(t)[0].n_params for t in teachers) / model.n_params
    assert [data.Task(**t) for t in meta["tasks"]] == [
        data.Task(**dt.load(t)[1]["tasks"][0]) for t in teachers
    ]
    weights = (tmp_path / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    student(teachers, tmp_path)
    assert (
        "is there" in capsys.readouterr().out
        and (tmp_path / "model.safetensors").stat().st_mtime_ns == weights
    )


def test_a_finished_run_of_other_settings_is_not_overwritten_unasked(teachers, tmp_path):
    student(teachers, tmp_path)
    with pytest.raises(UserError, match="steps 60 -> 30.*--overwrite"):
        student(teachers, tmp_path, steps=30)
    assert len(student(teachers, tmp_path, steps=30, overwrite=True)["step"]) == 30


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_a_loss_that_becomes_nan_stops_the_run_and_keeps_the_last_good_student(
    teachers, tmp_path, monkeypatch
):
    real, calls = distill.head_kl, []

    def breaks(*args):
        sums, counts = real(*args)
        calls.append(1)
        return (sums * float("nan") if len(calls) > 30 else sums), counts

    monkeypatch.setattr(distill, "head_kl", breaks)
    with pytest.raises(UserError, match=r"loss nan.* in step \d+ .*teacher tests/[ab]-v0.*kept in"):
        student(teachers, tmp_path, log_interval=1000)
    assert (
        all(p.isfinite().all() for p in dt.load(tmp_path)[0].parameters())
        and not (tmp_path / "metrics.json").exists()
    )


def test_a_job_that_lost_a_process_says_so_and_writes_no_model(teachers, tmp_path, monkeypatch):
    def lost(*xs):
        raise UserError("another process of this job ended")

    monkeypatch.setattr(run, "summed", lost)
    with pytest.raises(UserError, match="^another process of this job ended$"):
        student(teachers, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_teachers_loss_that_becomes_nan_stops_it_and_keeps_the_last_good_model(
    two_tasks, tmp_path, monkeypatch
):
    real, calls = dt.gaussian_nll, []

    def breaks(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 7 else 1)

    monkeypatch.setattr(dt, "gaussian_nll", breaks)
    with pytest.raises(UserError, match="loss nan.* in step 7 of teacher tests/a-v0.*kept in"):
        teacher.main(
            teacher.Config(dataset="tests/a-v0", steps=20, n_embd=16, out_dir=str(tmp_path / "t"), **TINY)
        )
    assert all(p.isfinite().all() for p in dt.load(tmp_path / "t")[0].parameters())


def test_teachers_that_do_not_fit_are_told(teachers, tmp_path):
    student(teachers, tmp_path / "student", steps=1)
    for options, message in (
        ({"teachers": (teachers[0], str(tmp_path / "nowhere"))}, "no model in .*nowhere"),
        (
            {"teachers": teachers[::-1], "datasets": ("tests/a-v0", "tests/b-v0")},
            "holds a teacher of tests/b-v0, not of tests/a-v0",
        ),
        ({"teachers": teachers, "datasets": ("tests/a-v0",)}, "2 --teachers for 1 tasks"),
        ({"teachers": (teachers[0], teachers[0])}, "same task twice"),
        ({"teachers": (str(tmp_path / "student"),)}, "holds a student of 2 tasks"),
        ({"teachers": teachers, "envs": ("hoper",)}, "unknown env 'hoper'"),
        ({"teachers": teachers, "top": 0.0}, "--top 0.0: must be above 0"),
        ({"teachers": teachers, "top": float("nan")}, "--top nan: must be above 0 and at most 1"),
    ):
        with pytest.raises(UserError, match=message):
            distill.main(distill.Config(out_dir=str(tmp_path / "s"), **{**TINY, "steps": 2, **options}))


def test_a_teacher_whose_dataset_has_changed_is_told(two_tasks, tmp_path):
    make_dataset("tests/moves-v0", [5] * 10)
    t = teacher.main(
        teacher.Config(
            dataset="tests/moves-v0", steps=2, n_embd=16, context=6, out_dir=str(tmp_path / "t"), **TINY
        )
    )
    import minari

    minari.delete_dataset("tests/moves-v0")
    make_dataset("tests/moves-v0", [5] * 10, seed=9)
    with pytest.raises(UserError, match="not what the teacher .* was trained on"):
        distill.main(distill.Config(teachers=(str(t),), out_dir=str(tmp_path / "s"), steps=2, **TINY))


IMPOSSIBLE = [
    {"steps": 0},
    {"steps": -3},
    {"batch_size": 0},
    {"n_embd": -1},
    {"lr": -1.0},
    {"eval_episodes": -1},
    {"lr": float("nan")},
    {"n_embd": 48, "n_head": 5},
]


@pytest.mark.parametrize("option", IMPOSSIBLE, ids=str)
@pytest.mark.parametrize("script", [teacher, distill])
def test_sizes_that_can_not_be_are_told_with_the_value(script, option, tmp_path):
    name, value = next(iter(option.items()))
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {value}: must be"):
        script.main(script.Config(out_dir=str(tmp_path / "x"), **option))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("surgery", ["none", "pcgrad"])
def test_a_scope_without_anything_to_project_is_told(surgery, tmp_path):
    with pytest.raises(
        UserError, match=f"--surgery {surgery} there is nothing to project by teacher; choose previous"
    ):
        distill.main(distill.Config(surgery=surgery, surgery_scope="teacher", out_dir=str(tmp_path / "x")))
    assert not (tmp_path / "x").exists()


def test_running_out_of_memory_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["distill.py"])
    monkeypatch.setattr(run, "keep_memory", lambda: None)  # these two are for a process of its own
    monkeypatch.setattr(run.signal, "signal", lambda *args: None)
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 1"),
    ):

        def main(cfg, error=error):
            raise error

        with pytest.raises(SystemExit, match="2"):
            cli.run(main, distill.Config, "-")
        assert re.fullmatch(
            r"error: out of memory \(.*\); try a smaller --batch-size, or --data-device host\n",
            capsys.readouterr().err,
        )
    with pytest.raises(RuntimeError, match="something else"):
        cli.run(lambda cfg: (_ for _ in ()).throw(RuntimeError("something else")), distill.Config, "-")
