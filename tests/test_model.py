"""model.py: what may reach an output and what may not, flat parameters, model files."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import model as dt
import muon
from kernels import kl
from support import UserError, training

CFG = dt.ModelConfig(obs_dims=(3, 5, 4), act_dims=(2, 1, 4), n_layer=2, n_head=2, n_embd=16, context=6)
ONE_TOKEN = dataclasses.replace(CFG, tokens=1)
SHARED = dataclasses.replace(CFG, obs_dims=(3, 5, 5), act_dims=(2, 4, 4), groups=(0, 1, 1))
layouts = st.sampled_from([CFG, ONE_TOKEN, SHARED, dataclasses.replace(SHARED, tokens=1)])
TASK, STATES, ACTIONS, RTG, TIMESTEPS, MASK = range(6)  # of the model's inputs
seeds = st.integers(0, 1000)


def make(cfg: dt.ModelConfig = CFG, seed: int = 0) -> dt.DecisionTransformer:
    torch.manual_seed(seed)
    return dt.DecisionTransformer(cfg).eval()


def windows(B: int, task: int | None = None, seed: int = 0, cfg: dt.ModelConfig = CFG) -> list[int | Tensor]:
    """The model's inputs for B windows with left padding of 0 .. K - 1.

    task: of all of them, and states and actions of its size; None: a task for each, padded to the widest.
    """
    generator = torch.Generator().manual_seed(seed)
    K = cfg.context
    O = max(cfg.obs_dims) if task is None else cfg.obs_dims[task]
    A = max(cfg.act_dims) if task is None else cfg.act_dims[task]
    start = torch.randint(0, K, (B, 1), generator=generator)
    tasks = torch.randint(0, len(cfg.obs_dims), (B,), generator=generator) if task is None else task
    states = torch.randn(B, K, O, generator=generator)
    actions = torch.rand(B, K, A, generator=generator) * 2 - 1
    rtg = torch.rand(B, K, generator=generator)
    timesteps = torch.randint(0, 80, (B, K), generator=generator)
    return [tasks, states, actions, rtg, timesteps, torch.arange(K) >= start]


PIXELS = 6
IMAGES = dt.ModelConfig(
    obs_dims=(3, 0, 4, 0),
    act_dims=(2, 1, 4, 3),
    n_layer=2,
    n_head=2,
    n_embd=16,
    context=6,
    tokens=1,
    images=((), (1, 36, 40), (2, 36, 44), (1, 36, 40)),
)


def windows_of_images(B: int, seed: int = 0) -> list[Tensor]:
    """The same, with pixels padded to the largest image."""
    generator = torch.Generator().manual_seed(seed)
    P = max(math.prod(image) for image in IMAGES.images)
    pixels = torch.randint(0, 256, (B, IMAGES.context, P), dtype=torch.uint8, generator=generator)
    return [*windows(B, None, seed, IMAGES), pixels]


def all_equal(xs, ys) -> bool:
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def all_close(xs, ys) -> bool:
    return all(torch.allclose(x, y, atol=1e-5) for x, y in zip(xs, ys, strict=True))


# ---- outputs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [0, 1, 2])
def test_forward__gives_the_tasks_own_action_size_within_bounds(task):
    mean, log_std = make()(*windows(7, task))
    assert mean.shape == log_std.shape == (7, 6, CFG.act_dims[task])
    assert (mean.abs() <= 1).all()
    assert (log_std >= kl.LOG_STD[0]).all()
    assert (log_std <= kl.LOG_STD[1]).all()


@given(layouts, seeds, st.integers(0, 5), st.sampled_from([None, 0, 2]))
def test_forward__does_not_see_the_future(cfg, seed, k, task):
    m = make(cfg)
    x = windows(4, task, seed, cfg)
    before = m(*x)
    x[STATES][:, k + 1 :] += 1
    x[ACTIONS][:, k:] -= 0.5  # the action of timestep k is not known yet
    x[RTG][:, k + 1 :] += 1
    after = m(*x)
    for b, a in zip(before, after, strict=True):
        valid = x[MASK][:, : k + 1, None].expand_as(b[:, : k + 1])
        assert torch.equal(b[:, : k + 1][valid], a[:, : k + 1][valid])


@given(layouts, seeds, st.integers(1, 5))
def test_forward__sees_the_past(cfg, seed, k):
    m = make(cfg)
    x = windows(4, None, seed, cfg)
    x[MASK][:] = True
    before = m(*x)[0][:, k].clone()
    x[ACTIONS][:, k - 1] += 1
    assert not torch.allclose(m(*x)[0][:, k], before)


@given(layouts, seeds, st.sampled_from([None, 1]), st.sampled_from([float("nan"), float("inf"), 1e30, -3.0]))
def test_forward__lets_masked_content_change_neither_outputs_nor_gradients(cfg, seed, task, junk):
    def outputs(x):
        m = make(cfg)
        mean, log_std = m(*x)
        (mean + log_std)[x[MASK]].sum().backward()
        return mean[x[MASK]], log_std[x[MASK]], *[p.grad for p in m.parameters()]

    x = windows(5, task, seed, cfg)
    y = [x[TASK], *[v.clone() for v in x[1:]]]
    for i in (STATES, ACTIONS, RTG):
        y[i][~x[MASK]] = junk
    y[TIMESTEPS][~x[MASK]] = 7
    assert all_equal(outputs(x), outputs(y))


@given(layouts, seeds)
def test_forward__takes_every_window_of_a_mixed_batch_through_its_own_task(cfg, seed):
    m = make(cfg)
    x = windows(6, None, seed, cfg)
    together = m(*x)
    assert together[0].shape == together[1].shape == (6, 6, 4)
    for b in range(6):
        task = int(x[TASK][b])
        O = cfg.obs_dims[task]
        A = cfg.act_dims[task]
        valid = x[MASK][b]
        window = [v[b : b + 1].clone() for v in x]
        window[STATES][..., O:] = 0
        window[ACTIONS][..., A:] = 0
        padded = [y[0, valid, :A] for y in m(*window)]
        own = m(task, window[STATES][..., :O], window[ACTIONS][..., :A], *window[RTG:])
        assert all_close([y[0, valid] for y in own], padded)


def test_forward__gives_gradients_to_its_own_tasks_parameters_only():
    m = make()
    m(*windows(4, 1))[0].sum().backward()
    for heads in (m.embed_state, m.embed_action, m.embed_rtg, m.head):
        assert heads.weight.grad[1].any()
        assert not heads.weight.grad[[0, 2]].any()


@pytest.mark.parametrize("tokens", [1, 3])
def test_forward__tells_tasks_that_share_by_their_embedding_alone(tokens):
    cfg = dataclasses.replace(SHARED, tokens=tokens)
    m = make(cfg)
    x = windows(4, 1, 0, cfg)
    of_1 = m(*x)
    assert not torch.allclose(m(2, *x[1:])[0], of_1[0], atol=1e-3)
    m.embed_task.weight.data[2] = m.embed_task.weight[1]
    assert all_equal(m(2, *x[1:]), of_1)
    of_each = m(torch.tensor([1, 2, 2, 1]), *x[1:])
    assert all_close(of_each, of_1)


def test_forward__gives_gradients_to_its_own_groups_maps_and_its_own_tasks_embedding():
    m = make(SHARED)
    m(*windows(4, 2, 0, SHARED))[0].sum().backward()
    for heads in (m.embed_state, m.embed_action, m.embed_rtg, m.head):
        assert heads.weight.grad.shape[0] == 2
        assert heads.weight.grad[1].any()
        assert not heads.weight.grad[0].any()
    assert m.embed_task.weight.grad[2].any()
    assert not m.embed_task.weight.grad[:2].any()


def test_model__has_a_task_embedding_only_where_tasks_share():
    alone = dataclasses.replace(SHARED, groups=())
    assert alone.groups == (0, 1, 2)
    names = dict(make(alone).named_parameters()).keys()
    assert dict(make(SHARED).named_parameters()).keys() - names == {"embed_task.weight"}


@given(layouts, seeds, st.integers(1, 5))
def test_forward__takes_a_padded_window_as_the_window_without_padding(cfg, seed, n):
    m = make(cfg)
    x = windows(3, 1, seed, cfg)
    x[MASK] = (torch.arange(6) >= 6 - n).expand(3, 6)
    long = m(*x)
    short = m(1, *[v[:, -n:] for v in x[1:]])
    assert all_close([y[:, -n:] for y in long], short)


def test_forward__of_one_token_a_timestep_reads_all_that_three_read():
    """Its token is the sum of R_t, s_t and a_{t-1}, each of which changes the policy; a_t does not."""
    m = make(ONE_TOKEN)
    x = windows(4, 1)
    x[MASK][:] = True
    before = m(*x)[0]
    for i, k in ((RTG, 5), (STATES, 5), (ACTIONS, 4)):
        y = [v.clone() if isinstance(v, Tensor) else v for v in x]
        y[i][:, k] += 1
        after = m(*y)[0]
        assert torch.equal(before[:, :k], after[:, :k])
        assert not torch.allclose(before[:, 5], after[:, 5])


def test_dropout__acts_in_training_only():
    m = make(dt.ModelConfig(**{**CFG.__dict__, "dropout": 0.5}))
    x = windows(3)
    assert torch.equal(m(*x)[0], m(*x)[0])
    m.train()
    assert not torch.equal(m(*x)[0], m(*x)[0])


def test_bfloat16__is_near_float32_in_training_and_absent_outside():
    m = make().train()
    x = windows(9)
    wanted = m(*x)[0]
    m.bfloat16 = True
    got = m(*x)[0]
    assert got.dtype == torch.float32
    assert 0 < (got - wanted)[x[MASK]].abs().max() < 0.05
    assert torch.equal(m.eval()(*x)[0], wanted)


def test_mean_nll__is_that_of_torch_distributions_over_valid_tokens():
    torch.manual_seed(0)
    mean, log_std, x = torch.randn(3, 4, 5, 2)
    mask = torch.rand(4, 5) < 0.5
    wanted = -torch.distributions.Normal(mean, log_std.exp()).log_prob(x)[mask].mean()
    assert torch.allclose(dt.mean_nll(mean, log_std, x, mask), wanted)
    actions = torch.randint(2, (4, 5))
    wanted = -torch.distributions.Categorical(logits=mean).log_prob(actions)[mask].mean()
    got = dt.mean_nll(mean.log_softmax(-1), None, torch.eye(2)[actions], mask, factors=(2,))
    assert torch.allclose(got, wanted)


def test_flatten__makes_buffer_and_parameters_the_same_memory():
    m = make()
    x = windows(3)
    before = m(*x)[0].detach().clone()
    theta = dt.flatten(m)
    assert torch.equal(m(*x)[0], before)
    assert theta.numel() == m.n_params
    m(*x)[0].sum().backward()
    assert theta.grad.any()
    assert torch.equal(theta.grad, torch.cat([p.grad.reshape(-1) for p in dt.flat_order(m).values()]))
    theta.data.zero_()
    assert not any(p.any() for p in m.parameters())
    assert all_equal(dt.unflatten(m, theta.data).values(), dt.flat_order(m).values())


# ---- images ------------------------------------------------------------------------------------------------


@given(seeds, st.sampled_from([1, 3]))
def test_forward__takes_images_through_the_encoder_of_their_size(seed, tokens):
    m = make(dataclasses.replace(IMAGES, tokens=tokens))
    assert [encoder.image for encoder in m.encoders] == [(1, 36, 40), (2, 36, 44)]
    x = windows_of_images(8, seed)
    sizes = [(IMAGES.obs_dims[task], IMAGES.act_dims[task]) for task in x[TASK]]
    for b, (O, A) in enumerate(sizes):
        x[STATES][b, :, O:] = 0
        x[ACTIONS][b, :, A:] = 0
    together = m(*x)
    for b, (O, A) in enumerate(sizes):
        _, states, actions, *rest = (v[b : b + 1] for v in x)
        own = m(int(x[TASK][b]), states[..., :O], actions[..., :A], *rest)
        valid = x[MASK][b]
        assert all_close([y[0, valid] for y in own], [y[b, valid, :A] for y in together])


def test_forward__sees_the_pixels_of_valid_timesteps_and_of_its_own_image_alone():
    m = make(IMAGES)
    x = windows_of_images(40)
    sizes = torch.tensor([math.prod(image) if image else 0 for image in IMAGES.images])[x[TASK]]  # (B,)
    before = m(*x)[0]
    y = [v.clone() for v in x]
    y[PIXELS] ^= 255
    changed = (before != m(*y)[0]).any(-1)  # (B, K)
    assert torch.equal(changed[x[MASK]], (sizes > 0)[:, None].expand_as(changed)[x[MASK]])
    y = [v.clone() for v in x]
    y[PIXELS][~x[MASK]] ^= 255
    for b, size in enumerate(sizes):
        y[PIXELS][b, :, size:] ^= 255
    assert torch.equal(m(*y)[0][x[MASK]], before[x[MASK]])


def test_forward__gives_gradients_to_the_encoders_of_its_batch_alone():
    m = make(IMAGES)
    x = windows_of_images(4)
    x[TASK] = torch.tensor([1, 3, 0, 0])
    m(*x)[1][x[MASK]].sum().backward()
    assert all(p.grad.any() for p in m.encoders[0].weights)
    assert all(p.grad is None or not p.grad.any() for p in m.encoders[1].parameters())


@pytest.mark.slow
def test_encoder__learns_at_a_students_learning_rate():
    """Which quarter of an image is bright, in 200 updates."""
    torch.manual_seed(0)
    m = dt.DecisionTransformer(
        dt.ModelConfig((0,), (4,), 1, 1, 16, 1, 1, discrete=(True,), images=((1, 36, 40),))
    )
    theta = dt.flatten(m)
    state = [torch.zeros_like(theta.data) for _ in range(2)]
    rows = training.schedule(200, 16e-3, 20)
    for schedule in rows:
        quarter = torch.randint(0, 4, (64,))
        pixels = torch.randint(90, 110, (64, 36, 40), dtype=torch.uint8)
        for window, q in zip(pixels, quarter.tolist(), strict=True):
            window[18 * (q // 2) :][:18, 20 * (q % 2) :][:, :20] += 100
        zeros = torch.zeros(64, 1)
        inputs = (
            torch.zeros(64, 1, 0),
            torch.zeros(64, 1, 4),
            zeros,
            zeros.long(),
            zeros == 0,
            pixels.view(64, 1, -1),
        )
        nll = -m(0, *inputs)[0][:, 0].gather(1, quarter[:, None]).mean()
        theta.grad.zero_()
        nll.backward()
        options = {"schedule": schedule, "alive": torch.tensor(True), "clip": 0.25, "shapes": muon.shapes(m)}
        with torch.no_grad():
            muon.step(theta, theta.grad, None, *state, **options)
    assert nll < 0.05


def test_encoder__has_mnih_et_als_sizes_at_128_channels():
    shapes = [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (128, 64 * 7 * 7)]
    assert [w.shape for w in dt.Encoder((4, 84, 84), 128).weights] == shapes


def test_bfloat16__of_images_is_near_float32():
    m = make(IMAGES).train()
    x = windows_of_images(9)
    wanted = m(*x)[0]
    m.bfloat16 = True
    assert 0 < (m(*x)[0] - wanted)[x[MASK]].abs().max() < 0.05


def test_flatten__ends_with_the_encoders_matrices_for_muon():
    m = make(IMAGES)
    theta = dt.flatten(m)
    end = len(theta)
    weights = [w for encoder in m.encoders for w in encoder.weights]
    for (n, r, c), weight in zip(muon.shapes(m)[:-9:-1], weights[::-1], strict=True):
        assert (n, r, c) == (1, len(weight), weight[0].numel())
        assert torch.equal(theta[end - r * c : end], weight.reshape(-1))
        end -= r * c


OTHER_IMAGES = [(1, 36, 44), (3, 36, 40), (1, 20, 40), (1, 36), (1, 10**6, 10**6), (0, 36, 40), ("1", 36, 40)]


@pytest.mark.parametrize("image", OTHER_IMAGES, ids=str)
def test_load__gives_back_a_model_of_images_and_refuses_other_images(tmp_path, image):
    m = make(IMAGES)
    dt.save(tmp_path, m, {})
    x = windows_of_images(5)
    assert all_equal(dt.load(tmp_path)[0](*x), m(*x))
    meta = json.loads((tmp_path / "model.json").read_text())
    meta["config"]["images"] = [[], image, [2, 36, 44], image]
    (tmp_path / "model.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="is damaged"):
        dt.load(tmp_path)


# ---- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [CFG, SHARED], ids=["own", "shared"])
def test_save__gives_a_model_of_the_same_outputs_back(tmp_path, cfg):
    m = make(cfg, seed=3)
    x = windows(5, cfg=cfg)
    dt.flatten(m)
    dt.save(tmp_path, m, {"tasks": [{"name": "a"}]})
    again, meta = dt.load(tmp_path)
    assert all_equal(m(*x), again(*x))
    assert not again.training
    assert meta["tasks"] == [{"name": "a"}]
    assert meta["parameters"] == m.n_params
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


@given(st.data())
def test_load__takes_no_damaged_file(tmp_path_factory, draws):
    path = tmp_path_factory.mktemp("model")
    dt.save(path, make(), {"tasks": []})
    file = path / draws.draw(st.sampled_from(["model.safetensors", "model.json"]))
    blob = bytearray(file.read_bytes())
    if draws.draw(st.booleans()):
        del blob[draws.draw(st.integers(0, len(blob) - 1)) :]
    elif file.suffix == ".safetensors":
        blob[draws.draw(st.integers(0, len(blob) - 1))] ^= 1 << draws.draw(st.integers(0, 7))
    else:
        blob[: draws.draw(st.integers(1, 20))] = b"["
    file.write_bytes(blob)
    with pytest.raises(UserError, match=f"{path}.*train it again"):
        dt.load(path)


def test_load__takes_no_weights_of_another_model(tmp_path):
    dt.save(tmp_path, make(), {"tasks": []})
    meta = json.loads((tmp_path / "model.json").read_text())
    meta["config"]["n_embd"] = 32
    (tmp_path / "model.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="damaged"):
        dt.load(tmp_path)


def test_load__says_so_where_a_file_has_another_layout(tmp_path):
    dt.save(tmp_path, make(ONE_TOKEN), {"tasks": []})
    assert dt.load(tmp_path)[0].cfg.tokens == 1
    meta = json.loads((tmp_path / "model.json").read_text())
    for change in ({"tokens": 2}, {"rotary": True}):
        (tmp_path / "model.json").write_text(json.dumps(meta | {"config": meta["config"] | change}))
        with pytest.raises(UserError, match=f"of another layout.*{next(iter(change))}"):
            dt.load(tmp_path)
    del meta["config"]["tokens"]  # a file from before there was a choice
    (tmp_path / "model.json").write_text(json.dumps(meta))
    assert dt.load(tmp_path)[0].cfg.tokens == 3


GROUPS = [[0, 0, 1], [0, 2, 2], [0, 1], [0, 1, 1, 1], [0, 1, True], [0, 1, 1.0], [0, -1, -1], 3]


@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_load__takes_no_groups_that_can_not_be(tmp_path, groups):
    dt.save(tmp_path, make(SHARED), {"tasks": []})
    meta = json.loads((tmp_path / "model.json").read_text())
    meta["config"]["groups"] = groups
    (tmp_path / "model.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="damaged"):
        dt.load(tmp_path)


@pytest.mark.parametrize(
    "other", [{"obs_dims": (3, 5, 4)}, {"act_dims": (2, 4, 3)}, {"images": ((), (), (1, 84, 84))}], ids=str
)
def test_load__takes_no_group_of_different_spaces(tmp_path, other):
    dt.save(tmp_path, make(SHARED), {"tasks": []})
    meta = json.loads((tmp_path / "model.json").read_text())
    meta["config"] |= other
    (tmp_path / "model.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"groups \(0, 1, 1\) of tasks of sizes"):
        dt.load(tmp_path)


def test_load__takes_a_model_from_before_tasks_could_share(tmp_path):
    dt.save(tmp_path, make(), {"tasks": []})
    meta = json.loads((tmp_path / "model.json").read_text())
    del meta["config"]["groups"]
    (tmp_path / "model.json").write_text(json.dumps(meta))
    assert dt.load(tmp_path)[0].cfg == CFG


def test_load__names_the_command_that_makes_a_missing_model(tmp_path):
    with pytest.raises(UserError, match="python teacher.py"):
        dt.load(tmp_path / "nothing")
