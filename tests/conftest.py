"""What all tests share. They write into one temporary folder, and need no network, GPU or dataset."""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: a test has one core

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
# for the fork server's preload, which does not get sys.path (github.com/python/cpython/issues/117378)
paths = [str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
if "MANYTEACHERS_TESTS" not in os.environ:  # it is set in processes that tests start
    temporary_folder = tempfile.TemporaryDirectory(prefix="manyteachers-tests-")
    os.environ["MANYTEACHERS_TESTS"] = temporary_folder.name
# before data.py is imported; each of pytest's workers has a folder of its own
folder = Path(os.environ["MANYTEACHERS_TESTS"]) / os.environ.get("PYTEST_XDIST_WORKER", "")
os.environ["MINARI_DATASETS_PATH"] = f"{folder}/minari"
os.environ["MANYTEACHERS_CACHE"] = f"{folder}/cache"
os.environ["MINARI_REMOTE"] = "hf://manyteachers-no-such-repository"
os.environ["HF_HUB_OFFLINE"] = "1"  # the hub is never asked
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before kernels/ is imported

import gymnasium as gym  # noqa: E402
import hypothesis  # noqa: E402
import minari  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from minari.data_collector import EpisodeBuffer  # noqa: E402

import kernels  # noqa: E402

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("mutmut", deadline=None, derandomize=True, max_examples=25)
if ROOT.name == "mutants":  # mutmut's copy of the tree
    hypothesis.settings.load_profile("mutmut")
else:
    hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def make_dataset(name, lengths, obs_dim=3, act_dim=2, seed=0, spec="Hopper-v5", edit=None, **spaces):
    """A Minari dataset of random episodes with these lengths. Returns the fields of every episode.

    edit(i, fields): may change those of episode i. spaces: observation_space, action_space, data_format.
    """
    rng = np.random.default_rng(seed)
    obs_space = spaces.pop("observation_space", gym.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float64))
    act_space = spaces.pop("action_space", gym.spaces.Box(-2.0, 2.0, (act_dim,), np.float32))
    episodes = []
    for i, L in enumerate(lengths):
        observations = rng.normal(size=(L + 1, *obs_space.shape))
        if act_space.dtype == np.float32:
            actions = rng.uniform(-2, 2, (L, *act_space.shape)).astype(np.float32)
        else:
            actions = rng.integers(0, 2, L)
        episode = {
            "observations": observations,
            "actions": actions,
            "rewards": rng.normal(size=L) + 1,
            "terminations": np.eye(L, dtype=bool)[-1],
            "truncations": np.zeros(L, bool),
        }
        if edit:
            edit(i, episode)
        episodes.append(episode)
    minari.create_dataset_from_buffers(
        name,
        [EpisodeBuffer(id=i, **episode) for i, episode in enumerate(episodes)],
        observation_space=obs_space,
        action_space=act_space,
        env=spec,
        author="-",
        author_email="-@-.org",
        code_permalink="-",
        algorithm_name="-",
        description="-",
        **spaces,
    )
    return episodes


def slow(*values):
    """Values to parametrize a test by that make it slow."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def result(out_dir):
    """What a run ends with: its weights' bytes, and its log without the column of seconds."""
    rows = [line.split(",") for line in (out_dir / "log.csv").read_text().splitlines()]
    seconds = rows[0].index("seconds")
    return (out_dir / "model.safetensors").read_bytes(), [r[:seconds] + r[seconds + 1 :] for r in rows]


@pytest.fixture
def f64():
    """float64 by default, for comparisons to rounding error."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def tiny_case(tmp_path, monkeypatch):
    """A function that puts n tiny tasks in the place of a case of the study, in a folder of its own."""
    from research.variants import CASES

    monkeypatch.chdir(tmp_path)

    def replace(n, case="builtin", spec="Hopper-v5", act_dim=2, **options):
        names = tuple(f"tests/tiny-{i}-{act_dim}-v0" for i in range(n))
        for i, name in enumerate(names):
            if name not in minari.list_local_datasets():
                make_dataset(name, [9, 12, 5] * 14, obs_dim=3, act_dim=act_dim, seed=i, spec=spec)
        sizes = {"n_layer": 1, "n_embd": 8, "batch_size": 16, "lr": 1e-2, "warmup": 5, "teacher_steps": 20}
        monkeypatch.setitem(CASES, case, {"datasets": names, "eval_episodes": 0, **sizes, **options})

    return replace


# ---- the kernels' tests: compiled where there is a GPU, else in Triton's interpreter -----------------------

DEVICE = "cuda" if torch.cuda.is_available() and not kernels.INTERPRET else "cpu"
triton_needed = pytest.mark.skipif(kernels.triton.__version__ is None, reason="no Triton here")
seeds = st.integers(0, 2**32 - 1)
many_sizes = hypothesis.settings(
    max_examples=int(os.environ.get("KERNEL_EXAMPLES", "25" if DEVICE == "cpu" else "200")),
    derandomize="KERNEL_EXAMPLES" not in os.environ,
)


def lengths(*blocks):
    """A strategy for sizes: 1, primes, and those about a block's."""
    sizes = {1, 2, 3, 5, 7, 11, 13}
    for block in blocks:
        sizes |= {block - 1, block, block + 1}
    return st.sampled_from(sorted(sizes))


def normal(generator, *shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape, generator=generator) * scale).to(dtype).to(DEVICE)


def derivatives(f, inputs, upstream, tangents, dtype):
    """f's output, its forward-mode derivative along `tangents`, its gradients under `upstream`; in dtype."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    y = f(*leaves)
    y.backward(upstream.to(y.dtype))
    primals = tuple(x.detach() for x in leaves)
    _, tangent = torch.func.jvp(f, primals, tuple(t.to(dtype) for t in tangents))
    return y.detach(), tangent, *(x.grad for x in leaves)


def assert_as_exact_as_pytorch(got, reference, exact, names, dtype, least=0.0):
    """A kernel's error against float64 is at most twice plain PyTorch's in the same precision, plus a floor.

    The floor is 8 eps of the result's largest number, or of `least`: the size of what it is a difference of.
    Without it the test would compare the largest of two roundings' errors, which is luck.
    """
    for name, k, r, d in zip(names, got, reference, exact, strict=True):
        size = max(d.abs().max().item(), least)
        error = (k.double() - d.double()).abs().max().item()
        allowed = (r.double() - d.double()).abs().max().item()
        if allowed != allowed:  # plain PyTorch's KL can be NaN in bfloat16
            allowed = float("inf")
        floor = 8 * torch.finfo(dtype).eps * size + 1e-30
        assert error <= 2 * allowed + floor, (
            f"{name}: error {error:.3g}, plain PyTorch's {allowed:.3g}, size {size:.3g}"
        )
