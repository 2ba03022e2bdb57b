"""support/hub.py: the hub's own client, kept from the network, on a cache as it writes one."""

import dataclasses
import functools
from pathlib import Path

import huggingface_hub
import pytest
from test_evaluate import WALK

from support import UserError, hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The hub's cache, with a run directory of maker/hopper in it; there is no network."""
    repository = tmp_path / "models--maker--hopper"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name in hub.FILES:
        (snapshot / name).write_text(name)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    offline = functools.partial(huggingface_hub.snapshot_download, cache_dir=tmp_path, local_files_only=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    return tmp_path


def test_directory__is_a_path_where_there_is_no_address():
    assert hub.directory("out/teacher-hopper") == Path("out/teacher-hopper")


@pytest.mark.parametrize("address", ["hf://maker/hopper", f"hf://maker/hopper@{COMMIT}"])
def test_directory__finds_what_was_downloaded_before(cache, address):
    found = hub.directory(address)
    assert {path.name for path in found.iterdir()} == set(hub.FILES)
    assert (found / "model.json").read_text() == "model.json"


def test_directory__asks_for_a_runs_files_alone(monkeypatch):
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.update(k, name=a) or ".")
    hub.directory("hf://maker/hopper@v1.0")
    assert asked == {"name": ("maker/hopper",), "revision": "v1.0", "allow_patterns": list(hub.FILES)}


@pytest.mark.parametrize("address", ["hf://maker/walker", "hf://maker/hopper@other"])
def test_directory__says_what_can_not_be_downloaded(cache, address):
    with pytest.raises(UserError, match=f"^{address} is not in the hub's cache and can't be downloaded") as e:
        hub.directory(address)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "address", ["hf://", "hf://name", "hf://a/b/c", "hf://../b/c", "hf://a/b@", "hf://a b/c"]
)
def test_directory__names_an_address_that_can_not_be(address):
    with pytest.raises(UserError, match="an address on the hub is hf://organisation/name or"):
        hub.directory(address)


def test_model_card__is_read_by_the_hubs_client():
    metrics = {"walk": {"target": 8.0, "return_mean": 1234.5678, "return_std": 3.21, "episodes": 20}}
    other = dataclasses.replace(WALK, name="data only", env_id=None)
    text = hub.model_card("student", [WALK, other], {**metrics, "data only": {"return_mean": None}}, 12_345)
    card = huggingface_hub.ModelCard(text)
    (result,) = card.data.eval_results
    assert result.dataset_name == WALK.env_id
    assert result.metric_value == "1234.57 +/- 3.21"
    assert card.data.library_name == "manyteachers"
    assert "12,345 parameters" in card.text
    assert f"| walk | {WALK.env_id} | 8 | 1234.57 +/- 3.21 | 20 |" in card.text


def test_model_card__takes_a_run_that_was_not_evaluated():
    assert huggingface_hub.ModelCard(hub.model_card("run", [WALK], {}, 1)).data.eval_results is None
