"""distill.py: targets, the update against one written out, whole runs in this process, bad input.

Processes: test_distributed.py. Stopping and resuming: test_resume.py. The command line: test_scripts.py.
"""

import dataclasses
import functools
import math
from pathlib import Path

import huggingface_hub
import minari
import numpy as np
import pytest
import torch
from torch import Tensor

import data
import distill
import kernels
import model as dt
import teacher
from conftest import make_dataset, triton_needed
from kernels.kl import policy_kl
from support import UserError, files, processes, training, update_log

NAMES = ("tests/a-v0", "tests/b-v0")
ALIKE = (NAMES[1], "tests/c-v0")  # of the same spaces
ACT_DIMS = torch.tensor([2, 3])
K = 6


@functools.cache
def two_tasks(alike: bool = False) -> list[data.Dataset]:
    """Two datasets of different sizes of observation and action, or of the same."""
    if NAMES[0] not in minari.list_local_datasets():
        make_dataset(NAMES[0], [9, 1, 23, 4, 12, 7], obs_dim=3, act_dim=2, spec="Hopper-v5")
        make_dataset(NAMES[1], [5, 30, 2, 8, 11, 6], obs_dim=5, act_dim=3, seed=1, spec="Walker2d-v5")
        make_dataset(ALIKE[1], [7, 3, 20, 9, 4, 8], obs_dim=5, act_dim=3, seed=2, spec="Walker2d-v5")
    return [data.load(name) for name in (ALIKE if alike else NAMES)]


def untrained_teachers(alike: bool = False) -> list[dt.DecisionTransformer]:
    torch.manual_seed(5)
    models = []
    for d in two_tasks(alike):
        cfg = dt.ModelConfig((d.task.obs_dim,), (d.task.act_dim,), n_layer=1, n_head=1, n_embd=16, context=K)
        models.append(dt.DecisionTransformer(cfg).eval())
    return models


def windows(
    teachers: list[dt.DecisionTransformer] | None = None, top: float = 1.0, alike: bool = False
) -> data.Windows:
    """Of both tasks; with the teachers' targets, where there are teachers."""
    sets = two_tasks(alike)
    targets = teachers is not None
    w = data.Windows([d.train for d in sets], [d.task for d in sets], K, targets=targets, top=top)
    if targets:
        distill.cache_targets(teachers, w)
    return w


def learner_of(cfg: distill.Config) -> distill.Learner:
    """A tiny student of both tasks' untrained teachers; with --share, of tasks of the same spaces."""
    teachers = untrained_teachers(cfg.share)
    torch.manual_seed(0)
    tasks = [d.task for d in two_tasks(cfg.share)]
    groups = data.groups_of(tasks) if cfg.share else ()
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "context": K, "groups": groups}
    student = dt.DecisionTransformer(dt.ModelConfig.of(tasks, **sizes))
    w = windows(teachers, alike=cfg.share)
    return distill.Learner(cfg, student, teachers, w, torch.Generator().manual_seed(0))


# ---- targets -----------------------------------------------------------------------------------------------


def test_cache_targets__shows_each_teacher_at_least_half_a_context():
    """Every row's target is what its teacher says in some window whose newest half holds the row."""
    teachers = untrained_teachers()
    w = windows(teachers)
    table = torch.stack(w.table[:, -2 * w.A :].chunk(2, dim=-1))  # (2, S, A)
    t = w.table[:, w.O + w.A + 1].long()
    for row in range(len(w.table)):
        task = int(row >= w.size[0])
        matches = []
        for end in range(row, min(len(w.table), row + K // 2)):
            if end > row and t[end] == 0:  # another episode
                break
            batch = w.gather(torch.tensor([task]), torch.tensor([end]))
            live = distill.live_targets(teachers, batch)[:, 0, K - 1 - (end - row)]
            matches.append(torch.allclose(live, table[:, row], atol=1e-5))
        assert any(matches), f"row {row} of timestep {t[row]}"
    assert not table[:, : w.size[0], 2:].any()  # beyond a teacher's action size


def test_cache_targets__holds_what_the_teachers_say_when_asked_for_other_returns():
    """A context of one timestep: every row's target is its only window's."""
    teachers = untrained_teachers()
    sets = two_tasks()
    w = data.Windows([d.train for d in sets], [d.task for d in sets], 1, targets=True, copies=2)
    low, high = torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.4])
    w.ask(0.5, low, high, 0.3, torch.Generator().manual_seed(0))
    distill.cache_targets(teachers, w)
    batch = w.sample(200, torch.tensor([0.5, 0.5]), torch.Generator().manual_seed(0))
    copy = (batch.rows[:, -1] - w.offset[batch.task]) // w.size[batch.task]
    own = w.gather(batch.task, batch.rows[:, -1] - copy * w.size[batch.task])
    asks = copy > 0
    assert 60 < asks.sum() < 140
    assert torch.allclose(batch.targets, distill.live_targets(teachers, batch), atol=1e-5)
    assert not torch.allclose(batch.targets[:, asks], own.targets[:, asks], atol=1e-3)
    assert torch.equal(batch.targets[:, ~asks], own.targets[:, ~asks])


def test_live_targets__are_each_windows_own_teachers():
    teachers = untrained_teachers()
    batch = windows(teachers).sample(20, torch.tensor([0.5, 0.5]), torch.Generator().manual_seed(0))
    targets = distill.live_targets(teachers, batch)
    for i in range(20):
        task = two_tasks()[batch.task[i]].task
        one = [x[i : i + 1] for x in batch[1:6]]
        one[0] = one[0][..., : task.obs_dim]
        one[1] = one[1][..., : task.act_dim]
        wanted = torch.stack(teachers[batch.task[i]](0, *one))[:, 0]
        assert torch.allclose(targets[:, i, :, : task.act_dim], wanted, atol=1e-5)


# ---- the update --------------------------------------------------------------------------------------------


def test_distance__kl_and_nll_together_are_their_sum():
    learner = learner_of(distill.Config())
    batch = learner.windows.sample(30, torch.tensor([0.5, 0.5]), learner.generator)

    def distance(loss):
        cfg = distill.Config(loss=loss, curriculum="all")
        return distill.Distance(cfg, learner.student)(batch, batch.targets)

    torch.testing.assert_close(distance("kl+nll"), distance("kl") + distance("nll"))


def test_live_targets__show_every_teacher_the_images_of_its_own_windows():
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_embd": 8, "context": 3, "tokens": 1}
    images = [(1, 36, 36), (), (2, 36, 36)]
    models = [dt.DecisionTransformer(dt.ModelConfig((2,), (1,), images=(x,), **sizes)).eval() for x in images]
    B, K = 9, 3
    task = torch.arange(B) % 3
    actions = torch.zeros(B, K, 1)
    pixels = torch.randint(0, 256, (B, K, 2 * 36 * 36), dtype=torch.uint8)
    rows = torch.zeros(B, K, dtype=torch.long)
    inputs = (torch.randn(B, K, 2), actions, torch.rand(B, K), rows, rows == 0, pixels)
    targets = distill.live_targets(models, data.Batch(task, *inputs, rows, torch.empty(2, B, K, 0)))
    for i, (model, image) in enumerate(zip(models, images, strict=True)):
        own = [x[i::3] for x in inputs]
        own[-1] = own[-1][..., : math.prod(image)]
        with torch.no_grad():
            assert torch.allclose(targets[:, i::3], torch.stack(model(0, *own)), atol=1e-6)


def gradients_by_teacher(learner: distill.Learner, batch: data.Batch) -> Tensor:
    """(N, P): of each teacher's own mean KL, one backward pass each."""
    student = learner.student
    cfg = learner.cfg
    policy = student(*batch[:6])
    act_dims = torch.tensor(student.cfg.act_dims)
    sums, counts = policy_kl(
        *policy, *batch.targets, batch.mask, batch.task, act_dims, cfg.kl, cfg.sigma_floor
    )
    rows = []
    for L in sums / counts:
        pieces = torch.autograd.grad(L, tuple(dt.flat_order(student).values()), retain_graph=True)
        rows.append(torch.cat([x.flatten() for x in pieces]))
    return torch.stack(rows)


@pytest.mark.parametrize("share", [False, True])
def test_learner__projects_every_teachers_own_gradient_with_the_scope_teacher(share):
    cfg = distill.Config(
        share=share,
        curriculum="all",
        surgery="previous",
        surgery_scope="teacher",
        batch_size=8,
        lr=1e-2,
        warmup=1,
        dtype="float32",
    )
    learner = learner_of(cfg)
    u = learner.state["u"]
    conflicts = 0
    for step in range(10):
        before = u.clone()
        same = torch.Generator()
        same.set_state(learner.generator.get_state())
        batch = learner.windows.sample(cfg.batch_size, torch.tensor([0.5, 0.5]), same)
        wanted = torch.zeros_like(u)
        for g in gradients_by_teacher(learner, batch):
            inner = g @ before
            if inner < 0:
                conflicts += 1
                g = g - inner / (before @ before) * before
            wanted += 0.5 * g
        learner.step(step)
        assert torch.allclose(u, wanted, atol=2e-4 * wanted.abs().max())
    assert conflicts > 2


@triton_needed
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"surgery": "previous", "surgery_scope": "teacher"},
        {"alignment_weight": 1.0},
        {"share": True},
        {"share": True, "alignment_weight": 1.0},
    ],
    ids=["default", "by teacher", "by alignment", "shared", "shared by alignment"],
)
def test_learner__gives_the_same_with_the_kernels_as_without(options, monkeypatch):
    states = []
    for on_cpu in (False, True):
        monkeypatch.setattr(kernels, "on_cpu", on_cpu)
        sizes = {"batch_size": 6, "probe_windows": 2, "log_interval": 3}  # small, for the interpreter
        learner = learner_of(distill.Config(lr=1e-2, warmup=1, dtype="float32", **sizes, **options))
        for step in range(3):
            learner.step(step)
        states.append(learner.state)
    assert torch.allclose(states[0]["record"], states[1]["record"], rtol=1e-2, atol=1e-4)
    assert torch.allclose(states[0]["theta"], states[1]["theta"], atol=1e-3)


# ---- whole runs, in this process ---------------------------------------------------------------------------

TINY = {"log_interval": 10, "eval_episodes": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> tuple[str, ...]:
    """Two trained teachers' directories."""
    return trained(two_tasks(), tmp_path_factory.mktemp("teachers"))


@pytest.fixture(scope="module")
def alike(tmp_path_factory) -> tuple[str, ...]:
    """The same, of tasks of the same spaces."""
    return trained(two_tasks(alike=True), tmp_path_factory.mktemp("alike"))


def trained(sets: list[data.Dataset], root: Path) -> tuple[str, ...]:
    directories = []
    for i, d in enumerate(sets):
        cfg = teacher.Config(
            dataset=d.task.dataset,
            steps=60,
            batch_size=16,
            n_layer=1,
            n_embd=16,
            context=K,
            out_dir=str(root / str(i)),
            **TINY,
        )
        directories.append(str(teacher.main(cfg)))
    return tuple(directories)


def distilled(teachers: tuple[str, ...], out: Path, **options) -> dict[str, np.ndarray]:
    """Run distill.main; the run's log."""
    cfg = {"steps": 60, "batch_size": 16, "n_layer": 1, "n_embd": 16, "warmup": 5, "ask": 0.0}
    cfg |= {**TINY, **options}
    distill.main(distill.Config(teachers=teachers, out_dir=str(out), **cfg))
    return files.read_csv(out / "log.csv")


@pytest.fixture
def one_thread():
    """Sums of several threads may differ in the last bit."""
    with training.one_thread():
        yield


ARGMAX = {"novelty_power": float("inf")}
BY_TEACHER = {"surgery": "previous", "surgery_scope": "teacher"}
METHODS = [
    {"curriculum": "novelty"},
    {"surgery": "previous"},
    BY_TEACHER,
    {"targets": "live"},
    {"curriculum": "fixed"},
    {"curriculum": "uniform"},
    {"curriculum": "all"},
    {"curriculum": "dro"},
    ARGMAX,
    {"surgery": "pcgrad"},
    {"alignment_weight": 0.5},
    {"alignment_weight": 0.5, **ARGMAX},
    {"alignment_weight": 0.5, "alignment": "estimate", **BY_TEACHER},
    {"kl": "reverse", "temperature": 2.0},
    {"loss": "mse"},
    {"dropout": 0.05},
    {"ask": 0.5},
    {"ask": 0.5, "targets": "live"},
    {"ask": 0.5, "state_noise": 0.0},
]


@pytest.mark.parametrize("options", METHODS, ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()))
def test_main__lowers_the_kl_at_least_five_times_by_every_method(teachers, tmp_path, options):
    log = distilled(teachers, tmp_path, steps=150, lr=1e-2, **options)
    for name in NAMES:
        kl = log[f"heldout_kl_{name}"]
        kl = kl[~np.isnan(kl)]
        if options.get("loss") == "mse":  # says nothing about sigma: it is held to its own measure
            assert kl[-1] < kl[0]
            assert log["loss"][-10:].mean() < log["loss"][0] / 5
        elif options.get("novelty_power") == float("inf"):  # argmax swings between the two teachers
            assert kl[-1] < kl[0] / 2
        else:
            assert kl[-1] < kl[0] / 5
    shares = np.stack([log[f"share_{name}"] for name in NAMES])
    assert np.allclose(shares.sum(0), 1)
    assert np.abs(log["cosine"]).max() <= 1 + 1e-6
    assert log[f"alignment_{NAMES[0]}"].any() == ("alignment_weight" in options)
    if "surgery" not in options:
        assert not log["projected"].any()
    if options.get("curriculum") == "fixed":
        assert shares[0].tolist() == [1.0, 0.0] * 75


def test_main__adds_a_task_to_a_finished_student(teachers, tmp_path):
    """It begins where that student ended, learns the new task, and can be added to in turn."""
    first = tmp_path / "first"
    before = distilled(teachers[:1], first, steps=150, lr=1e-2)[f"heldout_kl_{NAMES[0]}"][-1]
    log = distilled(teachers[1:], tmp_path / "both", steps=150, lr=1e-2, student=str(first), n_embd=24)
    old, new = (log[f"heldout_kl_{name}"][[0, -1]] for name in NAMES)
    assert old[0] < 5 * before  # after one update; 7 without its weights
    assert old[1] < 2 * before
    assert new[1] < new[0] / 5
    config = files.read_json(tmp_path / "both" / "config.json")
    assert config["teachers"] == list(teachers)
    assert config["n_embd"] == 16  # the student's, not the option's
    with pytest.raises(UserError, match="the same task twice"):
        distilled(teachers[1:], tmp_path / "again", student=str(tmp_path / "both"))


def test_main__says_what_student_it_can_not_add_to(teachers, tmp_path):
    with pytest.raises(UserError, match=r"^--student .*none: no finished student is there"):
        distilled(teachers, tmp_path / "a", student=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"^--student .*: no finished student is there"):
        distilled(teachers, tmp_path / "a", student=teachers[0])
    first = tmp_path / "first"
    distilled(teachers[:1], first, steps=5)
    with pytest.raises(UserError, match="name the tasks to add"):
        distilled((), tmp_path / "a", student=str(first))
    with pytest.raises(UserError, match=r"first with --teachers, the new tasks without; use it for both"):
        distilled((), tmp_path / "a", student=str(first), datasets=NAMES[1:])


def test_of_shares__names_a_task_that_had_all_it_may_and_is_still_the_worst():
    names = ["a", "b", "c", "d"]
    shares = torch.tensor([0.16, 0.49, 0.17, 0.18])
    said = distill.of_shares(names, [0.1, 1.0, 0.2, 0.2], shares)
    assert "\nb had 49 % of the batches and still has the highest KL" in said
    assert said.startswith("worst KL 1.000; by the share law 1.448 with equal shares")
    for held, s in (([0.1, 0.15, 0.2, 0.2], shares), ([0.1, 1.0, 0.2, 0.2], torch.full((4,), 0.25))):
        assert "\n" not in distill.of_shares(names, held, s)
    assert "\n" not in distill.of_shares(names[:2], [0.1, 1.0], torch.tensor([0.05, 0.95]))


SHARED = [{}, BY_TEACHER, {"surgery": "pcgrad"}, {"alignment_weight": 0.5}, {"tokens": 3}, {"loss": "mse"}]


@pytest.mark.parametrize(
    "options", SHARED, ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()) or "default"
)
def test_main__lowers_the_kl_of_teachers_of_the_same_spaces_that_share(alike, tmp_path, options):
    log = distilled(alike, tmp_path, steps=150, lr=1e-2, share=True, **options)
    for name in ALIKE:
        kl = log[f"heldout_kl_{name}"]
        kl = kl[~np.isnan(kl)]
        assert kl[-1] < kl[0] / (1 if options.get("loss") == "mse" else 4)
    assert log["loss"][-10:].mean() < log["loss"][0] / 4
    student, meta = dt.load(tmp_path)
    assert student.cfg.groups == (0, 0)
    assert len(student.head.weight) == 1
    assert [t.name for t in data.tasks(meta, tmp_path)] == list(ALIKE)


def test_groups_of__puts_tasks_of_the_same_spaces_together():
    a, b = (d.task for d in two_tasks())
    c = two_tasks(alike=True)[1].task
    discrete = dataclasses.replace(b, first_action=0)
    of_factors = dataclasses.replace(b, first_action=[0, 0], factors=[1, 2])
    words = [{"path": [], "kind": "text", "words": list("abcde")}]
    in_words = dataclasses.replace(b, obs_space=words)
    as_box = dataclasses.replace(b, obs_space=[{"path": [], "kind": "numbers", "size": 5}])
    assert data.groups_of([a, b, c]) == (0, 1, 1)
    given = [b, discrete, in_words, a, as_box, a, of_factors, of_factors]
    assert data.groups_of(given) == (0, 1, 2, 3, 0, 3, 4, 4)
    other_words = dataclasses.replace(in_words, obs_space=[words[0] | {"words": list("vwxyz")}])
    with pytest.raises(
        UserError, match=r"no two tasks have the same spaces, of other words \(tests/b-v0 has"
    ):
        data.groups_of([in_words, other_words])
    message = r"observations 5, 3 discrete actions; .*; and 1 more\); leave it out"
    with pytest.raises(UserError, match=message):
        data.groups_of([a, b, discrete, in_words, other_words])


@pytest.mark.usefixtures("one_thread")
def test_main__gives_the_same_log_to_the_bit_for_the_same_seed(teachers, tmp_path):
    options = {"steps": 20, **BY_TEACHER}
    first = distilled(teachers, tmp_path / "first", seed=0, **options)
    again = distilled(teachers, tmp_path / "again", seed=0, **options)
    other = distilled(teachers, tmp_path / "other", seed=1, **options)
    for column in first.keys() - {"seconds"}:
        assert np.array_equal(first[column], again[column], equal_nan=True), column
    assert not np.array_equal(first["loss"], other["loss"])


def test_main__without_surgery_and_muon_is_plain_adamw_on_the_mean_kl(teachers, tmp_path):
    """Ten steps of an independent loop, parameter by parameter, give the same student."""
    clip = 5.0  # below the first norms, above the last: AdamW alone would not see their scale
    options = {"grad_clip": clip, "lr": 4e-3, "top": 0.25, "dtype": "float32", "log_interval": 100}
    options |= {"optimizer": "adamw", "surgery": "none", "curriculum": "all", "ask": 0.0}
    distilled(teachers, tmp_path, steps=10, **options)
    got, _ = dt.load(tmp_path)
    w = windows([dt.load(directory)[0] for directory in teachers], top=0.25)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    student = dt.DecisionTransformer(got.cfg)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1.0, weight_decay=1e-4)
    for step in range(10):
        batch = w.sample(16, torch.tensor([0.5, 0.5]), generator)
        policy = student(*batch[:6])
        sums, counts = policy_kl(
            *policy, *batch.targets, batch.mask, batch.task, ACT_DIMS, "forward", distill.Config.sigma_floor
        )
        optimizer.zero_grad()
        (sums / counts).mean().backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), clip)
        optimizer.param_groups[0]["lr"] = 4e-3 * min((step + 1) / 5, (10 - step) / 5)
        optimizer.step()
    for (name, p), q in zip(student.named_parameters(), got.parameters(), strict=True):
        if "qkv.bias" not in name:  # the keys' bias has no gradient but rounding, which AdamW enlarges
            assert torch.allclose(p, q, atol=1e-4), f"{name}: {(p - q).abs().max()}"


def test_main__logs_no_more_than_so_many_rows(teachers, tmp_path, monkeypatch):
    monkeypatch.setattr(update_log, "MAX_ROWS", 8)
    log = distilled(teachers, tmp_path, steps=20, log_interval=10)
    assert log["step"].tolist() == [1, 3, 6, 9, 10, 12, 15, 18, 20]


FILES = {".lock", "config.json", "log.csv", "metrics.json", "model.safetensors", "model.json", "plots.png"}
METRICS = {"target", "return_mean", "return_std", "episodes", "normalized_score", "retention", "sweep"}
METRICS |= {"heldout_kl", "data", "flags", "target_gap"}


def test_main__writes_a_run_and_skips_it_the_second_time(teachers, tmp_path, capsys):
    distilled(teachers, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == FILES
    metrics = files.read_json(tmp_path / "metrics.json")
    assert set(metrics) == {"tasks", "compression", "parameters", "seconds", "machine"}
    assert set(metrics["tasks"]) == set(NAMES)
    assert set(metrics["tasks"][NAMES[0]]) == METRICS
    assert f"{NAMES[0]}, teacher: not evaluated, caution: few-data" in capsys.readouterr().out
    model, meta = dt.load(tmp_path)
    loaded = [dt.load(directory) for directory in teachers]
    assert metrics["parameters"] == model.n_params == sum(p.numel() for p in model.parameters())
    assert metrics["compression"] == sum(m.n_params for m, _ in loaded) / model.n_params
    assert meta["tasks"] == [teacher_meta["tasks"][0] for _, teacher_meta in loaded]
    written = (tmp_path / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    distilled(teachers, tmp_path)
    assert "is there" in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == written


def test_main__does_not_overwrite_a_finished_run_of_other_settings_unasked(teachers, tmp_path):
    distilled(teachers, tmp_path, steps=20)
    with pytest.raises(UserError, match="steps 20 -> 10.*--overwrite"):
        distilled(teachers, tmp_path, steps=10)
    assert len(distilled(teachers, tmp_path, steps=10, overwrite=True)["step"]) == 10


# ---- what stops a run --------------------------------------------------------------------------------------


def test_main__stops_at_a_nan_and_keeps_the_last_good_student(teachers, tmp_path, monkeypatch):
    head_kl = distill.head_kl
    calls = []

    def breaks(*args):
        sums, counts = head_kl(*args)
        calls.append(1)
        return (sums * float("nan") if len(calls) > 30 else sums), counts

    monkeypatch.setattr(distill, "head_kl", breaks)
    with pytest.raises(UserError, match=r"loss nan.* in step \d+ .*teacher tests/[ab]-v0.*kept in"):
        distilled(teachers, tmp_path, log_interval=1000)
    assert all(p.isfinite().all() for p in dt.load(tmp_path)[0].parameters())
    assert not (tmp_path / "metrics.json").exists()


def test_main__names_the_teacher_whose_kl_becomes_nan_in_a_probe(teachers, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "averaged", lambda kl: torch.tensor([1.0, float("nan")]))
    with pytest.raises(UserError, match="distance of teacher 1 is NaN in step 1 .* kept in .*lower --lr"):
        distilled(teachers, tmp_path, **ARGMAX)
    assert all(p.isfinite().all() for p in dt.load(tmp_path)[0].parameters())


def test_main__writes_no_model_where_the_job_lost_a_process(teachers, tmp_path, monkeypatch):
    def lost(*_):
        raise UserError("another process of this job ended")

    monkeypatch.setattr(processes, "summed", lost)
    with pytest.raises(UserError, match="^another process of this job ended$"):
        distilled(teachers, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"envs": ("hoper",)}, "unknown env 'hoper'"),
        ({"top": 0.0}, "--top 0.0: must be above 0"),
        ({"top": float("nan")}, "--top nan: must be above 0 and at most 1"),
        ({"datasets": NAMES[:1]}, "2 --teachers for 1 tasks"),
        ({"ask": 1.5}, "--ask 1.5: must be auto, or at least 0 and at most 1"),
        ({"ask": -0.1}, "--ask -0.1: must be auto, or at least 0"),
        ({"ask": float("nan")}, "--ask nan: must be auto"),
        ({"ask_copies": -1}, "--ask-copies -1: must be at least 0"),
        ({"ask_low": 0.9, "ask_high": 0.5}, "--ask-low 0.9: must be at most --ask-high 0.5"),
        ({"ask_high": float("nan")}, "must be at most --ask-high nan"),
        ({"data_share": 0.0}, "--data-share 0.0: must be above 0 and at most 1"),
        (
            {"data_share": 0.25},
            "--data-share 0.25: 1 of the 5 training episodes of tests/a-v0; .* 0.4 of them",
        ),
        (
            {"share": True},
            r"--share: no two tasks have the same spaces \(tests/a-v0 has observations 3, 2 continuous "
            r"actions; tests/b-v0 has observations 5, 3 continuous actions\); leave it out",
        ),
        ({"state_noise": -0.1}, "--state-noise -0.1: must be at least 0"),
        ({"dropout": 1.0}, "--dropout 1.0: must be at least 0 and below 1"),
        ({"dropout": 0.1, "surgery": "pcgrad"}, "--dropout 0.1 with --surgery pcgrad: use one of them"),
        ({"loss": "kl+nll"}, "--loss kl\\+nll is no distance"),
        (
            {"loss": "kl+nll", "curriculum": "all", "ask": 0.5},
            "--ask 0.5: the data's actions are no answer to another return",
        ),
        ({"student_datasets": NAMES[:1]}, "1 --student-datasets for 2 teachers"),
        ({"student_datasets": NAMES[::-1]}, "dataset tests/b-v0 has obs_dim 5, the teacher of tests/a-v0 3"),
    ],
    ids=str,
)
def test_main__names_an_option_that_does_not_fit(teachers, tmp_path, option, message):
    with pytest.raises(UserError, match=message):
        distilled(teachers, tmp_path, **option)


def test_main__finds_that_nothing_can_be_shared_before_a_teacher_is_trained(tmp_path, monkeypatch):
    two_tasks()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--share: no two tasks have the same spaces"):
        distill.main(distill.Config(datasets=NAMES, share=True, teacher_steps=1, eval_episodes=0, jobs=1))
    assert not list(tmp_path.glob("out/teacher-*"))


def test_main__asks_by_itself_unless_the_loss_learns_from_the_datas_actions(teachers, tmp_path):
    def losses(name, **options):
        return distilled(teachers, tmp_path / name, steps=10, curriculum="all", **options)["loss"]

    auto = losses("auto", ask="auto")
    assert np.array_equal(auto, losses("asked", ask=0.5))
    assert not np.array_equal(auto, losses("labels", ask=0.0))
    for loss in ("nll", "kl+nll"):
        assert np.array_equal(losses(f"{loss}-auto", loss=loss, ask="auto"), losses(loss, loss=loss, ask=0.0))


def test_main__takes_the_students_data_from_elsewhere(teachers, tmp_path):
    """Of other episodes, in the teachers' units: with the same episodes, the same student."""
    same = distilled(teachers, tmp_path / "same", steps=10, student_datasets=NAMES)
    assert np.array_equal(distilled(teachers, tmp_path / "own", steps=10)["loss"], same["loss"])
    for name, O, A in zip(NAMES, (3, 5), (2, 3), strict=True):
        other = name.replace("-v", "-other-v")
        if other not in minari.list_local_datasets():
            make_dataset(other, [6, 9, 4], obs_dim=O, act_dim=A, seed=7)
    others = ("tests/a-other-v0", "tests/b-other-v0")
    log = distilled(teachers, tmp_path / "other", steps=10, student_datasets=others)
    assert not np.array_equal(log["loss"], same["loss"])
    assert dt.load(tmp_path / "other")[1]["tasks"] == dt.load(tmp_path / "same")[1]["tasks"]


def test_main__names_teachers_that_do_not_fit(teachers, tmp_path):
    distilled(teachers, tmp_path / "student", steps=1)
    swapped = f"holds a teacher of {NAMES[1]}, not of {NAMES[0]}"
    for directories, options, message in (
        ((teachers[0], str(tmp_path / "nowhere")), {}, "no model in .*nowhere"),
        (teachers[::-1], {"datasets": NAMES}, swapped),
        ((teachers[0], teachers[0]), {}, "same task twice"),
        ((str(tmp_path / "student"),), {}, "holds a student of 2 tasks"),
    ):
        with pytest.raises(UserError, match=message):
            distilled(directories, tmp_path / "another", **options)


@pytest.mark.usefixtures("one_thread")
def test_main__takes_teachers_from_the_hub(teachers, tmp_path, monkeypatch):
    shared = {"maker/a": teachers[0], "maker/b": teachers[1]}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: shared[name])
    log = distilled(("hf://maker/a", "hf://maker/b"), tmp_path / "hub", steps=5)
    assert np.array_equal(log["loss"], distilled(teachers, tmp_path / "local", steps=5)["loss"])


def test_main__takes_a_teacher_saved_with_fewer_targets(tmp_path):
    options = {"dataset": NAMES[0], "steps": 2, "n_embd": 16, "context": K, **TINY}
    directory = teacher.main(teacher.Config(out_dir=str(tmp_path / "teacher"), **options))
    meta = files.read_json(directory / "model.json")
    targets = meta["tasks"][0]["targets"]
    meta["tasks"][0]["targets"] = {name: targets[name] for name in ("p95", "median")}
    files.write_json(directory / "model.json", meta)
    distilled((str(directory),), tmp_path / "student")
    meta["tasks"][0]["targets"]["median"] += 1
    files.write_json(directory / "model.json", meta)
    with pytest.raises(UserError, match="not what the teacher .* was trained on"):
        distilled((str(directory),), tmp_path / "other")


def test_main__names_a_teacher_whose_dataset_has_changed(tmp_path):
    name = "tests/moves-v0"
    make_dataset(name, [5] * 10)
    options = {"dataset": name, "steps": 2, "n_embd": 16, "context": K, **TINY}
    directory = teacher.main(teacher.Config(out_dir=str(tmp_path / "teacher"), **options))
    minari.delete_dataset(name)
    make_dataset(name, [5] * 10, seed=9)
    with pytest.raises(UserError, match="not what the teacher .* was trained on"):
        distilled((str(directory),), tmp_path / "student")


IMPOSSIBLE = [
    ("steps", 0),
    ("steps", -3),
    ("batch_size", 0),
    ("n_embd", -1),
    ("lr", -1.0),
    ("eval_episodes", -1),
    ("lr", float("nan")),
]


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_check__names_a_value_that_can_not_be(name, value, tmp_path):
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {value}: must be"):
        distill.main(distill.Config(out_dir=str(tmp_path / "x"), **{name: value}))
    assert not (tmp_path / "x").exists()


def test_check__needs_channels_that_the_heads_divide(tmp_path):
    with pytest.raises(UserError, match="--n-embd 48: must be a multiple of --n-head 5"):
        distill.main(distill.Config(out_dir=str(tmp_path / "x"), n_embd=48, n_head=5))


@pytest.mark.parametrize("surgery", ["none", "pcgrad"])
def test_check__needs_a_surgery_that_projects_for_the_scope_teacher(surgery, tmp_path):
    message = f"--surgery {surgery} there is nothing to project by teacher; choose previous"
    with pytest.raises(UserError, match=message):
        distill.main(distill.Config(surgery=surgery, surgery_scope="teacher", out_dir=str(tmp_path / "x")))
    assert not (tmp_path / "x").exists()
