import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import model as dt
from kernels import kl
from support import (
    UserError,
)

CFG = dt.ModelConfig(obs_dims=(3, 5, 4), act_dims=(2, 1, 4), n_layer=2, n_head=2, n_embd=16, context=6)


def make(cfg=CFG, seed=0):
    torch.manual_seed(seed)
    return dt.DecisionTransformer(cfg).eval()


def windows(B, task=None, seed=0, cfg=CFG):
    """Inputs of B windows with left padding of 0 .. K - 1, padded to the widest task unless `task` is an int."""
    gen = torch.Generator().manual_seed(seed)
    K = cfg.context
    O, A = (
        (max(cfg.obs_dims), max(cfg.act_dims)) if task is None else (cfg.obs_dims[task], cfg.act_dims[task])
    )
    start = torch.randint(0, K, (B, 1), generator=gen)
    which = torch.randint(0, len(cfg.obs_dims), (B,), generator=gen) if task is None else task
    return [which, torch.randn(B, K, O, generator=gen), torch.rand(B, K, A, generator=gen) * 2 - 1, torch.rand(B, K, generator=gen),
            torch.randint(0, 80, (B, K), generator=gen), torch.arange(K) >= start]  # fmt: skip


@pytest.mark.parametrize("task", [0, 1, 2])
def test_outputs_have_the_tasks_own_action_size_and_bounds(task):
    mean, log_std = make()(*windows(7, task))
    assert mean.shape == log_std.shape == (7, 6, CFG.act_dims[task])
    assert (mean.abs() <= 1).all() and (log_std >= kl.LOG_STD[0]).all() and (log_std <= kl.LOG_STD[1]).all()


@given(st.integers(0, 1000), st.integers(0, 5), st.sampled_from([None, 0, 2]))
def test_changing_the_future_leaves_the_present_output_alone(seed, k, task):
    m, x = make(), windows(4, task, seed)
    before = m(*x)
    x[1][:, k + 1 :] += 1  # later states
    x[2][:, k:] -= 0.5  # this and later actions
    x[3][:, k + 1 :] += 1  # later returns-to-go
    after = m(*x)
    valid = x[5][:, : k + 1, None].expand_as(before[0][:, : k + 1])
    assert all(
        torch.equal(b[:, : k + 1][valid], a[:, : k + 1][valid]) for b, a in zip(before, after, strict=True)
    )


@given(st.integers(0, 1000), st.integers(1, 5))
def test_the_past_does_reach_the_present_output(seed, k):
    m, x = make(), windows(4, None, seed)
    x[5][:] = True
    before = m(*x)[0][:, k].clone()
    x[2][:, k - 1] += 1
    assert not torch.allclose(m(*x)[0][:, k], before)


@given(
    st.integers(0, 1000),
    st.sampled_from([None, 1]),
    st.sampled_from([float("nan"), float("inf"), 1e30, -3.0]),
)
def test_masked_content_can_change_neither_outputs_nor_gradients(seed, task, junk):
    def outputs(x):
        m = make()
        mean, log_std = m(*x)
        (mean + log_std)[x[5]].sum().backward()
        return mean[x[5]], log_std[x[5]], *[p.grad for p in m.parameters()]

    x = windows(5, task, seed)
    y = [x[0], *[v.clone() for v in x[1:]]]
    for i in (1, 2, 3):
        y[i][~x[5]] = junk
    y[4][~x[5]] = 7
    assert all(torch.equal(a, b) for a, b in zip(outputs(x), outputs(y), strict=True))


@given(st.integers(0, 1000))
def test_a_mixed_batch_is_each_window_through_its_own_task(seed):
    m, x = make(), windows(6, None, seed)
    mean, log_std = m(*x)
    for b in range(6):
        i = int(x[0][b])
        O, A = CFG.obs_dims[i], CFG.act_dims[i]
        one = [i, x[1][b : b + 1, :, :O], x[2][b : b + 1, :, :A], *[v[b : b + 1] for v in x[3:]]]
        x[2][b, :, A:] = 0
        got = m(*one)
        x1 = [
            x[0][b : b + 1],
            x[1][b : b + 1].clone(),
            x[2][b : b + 1].clone(),
            *[v[b : b + 1] for v in x[3:]],
        ]
        x1[1][..., O:], x1[2][..., A:] = 0, 0
        padded = m(*x1)
        valid = x[5][b]
        assert torch.allclose(got[0][0][valid], padded[0][0, valid, :A], atol=1e-5) and torch.allclose(
            got[1][0][valid], padded[1][0, valid, :A], atol=1e-5
        )
    assert mean.shape == log_std.shape == (6, 6, 4)


def test_a_task_changes_its_own_parameters_only():
    m = make()
    m(*windows(4, 1))[0].sum().backward()
    for heads in (m.embed_state, m.embed_action, m.embed_rtg, m.head):
        assert heads.weight.grad[1].any() and not heads.weight.grad[[0, 2]].any()


def test_nll_is_that_of_torch_distributions_over_valid_tokens():
    torch.manual_seed(0)
    mean, log_std, x = torch.randn(3, 4, 5, 2)
    mask = torch.rand(4, 5) < 0.5
    want = -torch.distributions.Normal(mean, log_std.exp()).log_prob(x)[mask].mean()
    assert torch.allclose(dt.mean_nll(mean, log_std, x, mask), want)
    actions = torch.randint(2, (4, 5))
    want = -torch.distributions.Categorical(logits=mean).log_prob(actions)[mask].mean()
    assert torch.allclose(
        dt.mean_nll(mean.log_softmax(-1), None, torch.eye(2)[actions], mask, discrete=True), want
    )


def test_flat_buffer_and_parameters_are_the_same_memory():
    m, x = make(), windows(3)
    before = m(*x)[0].detach().clone()
    theta = dt.flatten(m)
    assert torch.equal(m(*x)[0], before) and theta.numel() == m.n_params
    m(*x)[0].sum().backward()
    assert (
        torch.equal(theta.grad, torch.cat([p.grad.reshape(-1) for p in m.parameters()])) and theta.grad.any()
    )
    theta.data.zero_()
    assert all(not p.any() for p in m.parameters())
    assert all(
        torch.equal(v, p) for v, p in zip(dt.unflatten(m, theta.data).values(), m.parameters(), strict=True)
    )


def test_dropout_acts_in_training_only():
    m, x = make(dt.ModelConfig(**{**CFG.__dict__, "dropout": 0.5})), windows(3)
    assert torch.equal(m(*x)[0], m(*x)[0])
    m.train()
    assert not torch.equal(m(*x)[0], m(*x)[0])


@given(st.integers(0, 1000), st.integers(1, 5))
def test_a_window_padded_on_the_left_is_the_same_window_without_padding(seed, n):
    m, x = make(), windows(3, 1, seed)
    x[5] = (torch.arange(6) >= 6 - n).expand(3, 6)
    long, short = m(*x), m(1, *[v[:, -n:] for v in x[1:]])
    assert all(torch.allclose(a[:, -n:], b, atol=1e-5) for a, b in zip(long, short, strict=True))


def test_in_bfloat16_training_is_nearly_what_float32_gives():
    m, x = make().train(), windows(9)
    want = m(*x)[0]
    m.bfloat16 = True
    got = m(*x)[0]
    assert got.dtype == torch.float32 and 0 < (got - want)[x[5]].abs().max() < 0.05
    assert torch.equal(m.eval()(*x)[0], want)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_saved_model_gives_the_same_actions(tmp_path):
    m, x = make(seed=3), windows(5)
    dt.flatten(m)
    dt.save(tmp_path, m, {"tasks": [{"name": "a"}]})
    again, meta = dt.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(m(*x), again(*x), strict=True))
    assert meta["tasks"] == [{"name": "a"}] and meta["parameters"] == m.n_params and not again.training
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


@given(st.data())
def test_a_damaged_model_file_is_one_clear_error(tmp_path_factory, draws):
    path = tmp_path_factory.mktemp("model")
    dt.save(path, make(), {"tasks": []})
    f = path / draws.draw(st.sampled_from(["model.safetensors", "model.json"]))
    blob = bytearray(f.read_bytes())
    if draws.draw(st.booleans()):
        del blob[draws.draw(st.integers(0, len(blob) - 1)) :]
    elif f.suffix == ".safetensors":
        blob[draws.draw(st.integers(0, len(blob) - 1))] ^= 1 << draws.draw(st.integers(0, 7))
    else:
        blob[: draws.draw(st.integers(1, 20))] = b"["
    f.write_bytes(blob)
    with pytest.raises(UserError, match=f"{path}.*train it again"):
        dt.load(path)


def test_weights_of_another_model_are_not_taken(tmp_path):
    dt.save(tmp_path, make(), {"tasks": []})
    meta = json.loads((tmp_path / "model.json").read_text())
    meta["config"]["n_embd"] = 32
    (tmp_path / "model.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="damaged"):
        dt.load(tmp_path)


def test_no_model_there_names_the_command_that_makes_one(tmp_path):
    with pytest.raises(UserError, match="python teacher.py"):
        dt.load(tmp_path / "nothing")
