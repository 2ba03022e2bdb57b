"""Files from strangers: whatever is in them, one clear line, within two seconds and a gibibyte, and nothing of them is executed or written elsewhere."""

import json
import os
import re
import resource
import struct
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
import model as dt
import policy
from conftest import ROOT, make_dataset
from support import (
    UserError,
    files,
    log,
    minari_files,
)

CASES = int(os.environ.get("FUZZ_CASES", "10000"))


def fuzz(share):
    return settings(max_examples=int(share * CASES), suppress_health_check=list(HealthCheck), database=None)


@pytest.fixture(scope="module", autouse=True)
def one_gibibyte():
    """No more than a gibibyte beyond what the process holds."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


def put(path, blob):
    """As a new file: ext4 makes whoever overwrites one wait."""
    path.unlink(missing_ok=True)
    path.write_bytes(blob)


def read_or_told(f):
    """f() succeeds or raises UserError of one line, in at most two seconds."""
    start = time.perf_counter()
    try:
        f()
    except UserError as e:
        assert str(e).strip() and "\n" not in str(e), str(e)
    assert time.perf_counter() - start < 2


NUMBERS = st.sampled_from(
    [
        -1,
        0,
        1,
        2,
        3.5,
        7,
        2**20,
        2**31,
        2**40,
        2**63,
        10**30,
        float("nan"),
        float("inf"),
        "3",
        "../../x",
        None,
        True,
        [],
        {},
        [[]],
        [1e9],
    ]
)
# JSON of many shapes, among them what breaks readers: deep nesting, numbers without bounds, names that climb out of a folder
KEYS = st.sampled_from(["n_embd", "obs_dims", "name", "../x"])
JUNK = st.one_of(
    NUMBERS, st.text(max_size=20), st.lists(NUMBERS, max_size=4), st.dictionaries(KEYS, NUMBERS, max_size=3)
)


@st.composite
def damage(draw, blob):
    """blob, cut short, with bits or bytes changed, a piece repeated or replaced."""
    blob = bytearray(blob)
    for _ in range(draw(st.integers(1, 4))):
        kind, at = draw(st.integers(0, 4)), draw(st.integers(0, max(0, len(blob) - 1)))
        if kind == 0:
            del blob[at:]
        elif kind == 1 and blob:
            blob[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == 2:
            blob[at : at + 8] = struct.pack(
                "<Q", draw(st.sampled_from([0, 1, 2**32 - 1, 2**40, 2**63, 2**64 - 1]))
            )
        elif kind == 3:
            blob[at:at] = blob[at : at + draw(st.integers(1, 400))]
        else:
            blob[at : at + 4] = draw(st.binary(min_size=0, max_size=12))
    return bytes(blob)


# ---- models ----------------------------------------------------------------------------------------------------------

TASK = data.Task(
    "walk",
    "-",
    None,
    {},
    10,
    2,
    1,
    [0.5, -0.5],
    [2.0, 3.0],
    [-3.0],
    [1.0],
    4.0,
    {"p95": 8.0, "median": 2.0},
    (1.0, 5.0),
    "-",
    0,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    dt.save(path, dt.DecisionTransformer(dt.ModelConfig((2,), (1,), 1, 1, 8, 4)), {"tasks": [TASK.__dict__]})
    return path, {f.name: f.read_bytes() for f in path.iterdir()}


def load(path):
    model, meta = dt.load(path)
    task = data.tasks(meta, path)[0]
    actor = policy.Actor(model, 0, 1, task.max_steps)
    assert actor.act(torch.zeros(1, 2), torch.zeros(1), torch.zeros(1, 1)).shape == (1, 1)


@fuzz(0.7)
@given(st.data())
def test_a_hostile_model_is_read_or_told(saved, draws):
    path, files = saved
    for name, blob in files.items():
        put(path / name, blob)
    kind = draws.draw(st.integers(0, 3))
    if kind == 0:
        name = draws.draw(st.sampled_from(sorted(files)))
        put(path / name, draws.draw(damage(files[name])))
    elif kind == 1:  # weights damaged and signed for all the same
        blob, meta = draws.draw(damage(files["model.safetensors"])), json.loads(files["model.json"])
        put(path / "model.safetensors", blob)
        put(
            path / "model.json",
            json.dumps({**meta, "blake2b": dt.hashlib.blake2b(blob).hexdigest()}).encode(),
        )
    else:  # any field of model.json anything
        meta = json.loads(files["model.json"])
        where = draws.draw(
            st.sampled_from([meta, meta["config"], meta["tasks"][0], meta["tasks"][0]["targets"]])
        )
        where[draws.draw(st.sampled_from(sorted(where) + ["../x"]))] = draws.draw(JUNK)
        if kind == 3 and isinstance(meta["config"], dict):
            meta["config"][draws.draw(st.sampled_from(["n_layer", "n_embd", "context", "dropout"]))] = (
                draws.draw(JUNK)
            )
        put(path / "model.json", json.dumps(meta).encode())
    read_or_told(lambda: load(path))


@pytest.mark.parametrize(
    "text",
    ["[" * 10**6, '{"a":' * 10**5, "[[]," * 10**6, "9" * 10**5, "\x00", "[]", '"x"', "null"],
    ids=lambda t: t[:6],
)
def test_json_that_breaks_readers_is_told(saved, text):
    path, files = saved
    (path / "model.safetensors").write_bytes(files["model.safetensors"])
    (path / "model.json").write_text(text)
    with pytest.raises(UserError):
        dt.load(path)
    assert files.read_json(path / "model.json") is None


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_a_file_of_a_tebibyte_is_not_read(saved, name):
    path, files = saved
    for n, blob in files.items():
        (path / n).write_bytes(blob)
    with open(path / name, "r+b") as f:
        f.truncate(2**40)
    read_or_told(lambda: load(path))
    (path / name).unlink()


# ---- caches and datasets ---------------------------------------------------------------------------------------------

NAME = "tests/hostile-v0"


@pytest.fixture(scope="module")
def dataset():
    make_dataset(NAME, [5, 3, 8], seed=3)
    want = minari_files.read(NAME)
    return want, next(minari_files.CACHE.glob("tests--hostile-v0-*")), minari_files.find(NAME)


@fuzz(0.15)
@given(st.data())
def test_a_hostile_cache_is_read_or_made_again(dataset, draws):
    (arrays, about), cached, _ = dataset
    kind, name = draws.draw(st.integers(0, 2)), draws.draw(st.sampled_from(sorted(arrays)))
    if kind == 0:
        blob = draws.draw(damage(safetensors.numpy.save(arrays, {"about": json.dumps(about)})))
    elif kind == 1:  # a whole file, of arrays that don't fit together
        wrong = (
            [x[1:] for x in arrays.values()]
            + [x.astype("f2") for x in arrays.values()]
            + [-arrays["lengths"], arrays["table"] * float("nan")]
        )
        wrong = draws.draw(st.sampled_from(wrong))
        blob = safetensors.numpy.save(
            {**arrays, name: np.ascontiguousarray(wrong)}, {"about": json.dumps(about)}
        )
    else:
        blob = safetensors.numpy.save(
            arrays,
            {"about": json.dumps({**about, draws.draw(st.sampled_from(sorted(about))): draws.draw(JUNK)})},
        )
    put(cached, blob)
    read_or_told(lambda: data.load(NAME))


@fuzz(0.15)
@given(st.data())
def test_a_hostile_minari_dataset_is_read_or_told(dataset, draws):
    _, cached, path = dataset
    f = path / draws.draw(st.sampled_from(["main_data.hdf5", "main_data.hdf5", "metadata.json"]))
    blob = f.read_bytes()
    try:
        put(f, draws.draw(damage(blob)))
        read_or_told(lambda: data.load(NAME))
    finally:
        put(f, blob)


def test_no_file_is_written_through_a_link(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (tmp_path / "run").mkdir()
    for name in ("log.csv", "metrics.json", "model.json", f"model.json.{os.getpid()}.tmp"):
        (tmp_path / "run" / name).symlink_to(outside)
    files.write(tmp_path / "run/model.json", b"{}")
    files.write_json(tmp_path / "run/metrics.json", {})
    log = log.Log(tmp_path / "run/log.csv")
    log.row(a=1)
    log.flush()
    assert outside.read_text() == "mine" and (tmp_path / "run/log.csv").read_text().split() == ["a", "1"]
    assert not (tmp_path / "run/model.json").is_symlink()


def test_nothing_in_the_tree_reads_pickles():
    files = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split() or [str(p.relative_to(ROOT)) for p in ROOT.glob("*.py")]
    words = re.compile(
        r"\bpickle\b|torch\.(load|save)\(|joblib|allow_pickle|\bmarshal\b|\bshelve\b|yaml\.load|(?<![.\w])(eval|exec)\("
    )
    found = [
        (f, line)
        for f in files
        if f != "tests/test_hostile.py"
        for line in (ROOT / f).read_text().splitlines()
        if words.search(line)
    ]
    assert len(files) > 10 and not [x for x in found if "safetensors.torch" not in x[1]]
